"""What pyautoattack warns of while it attacks, kept off the screen and passed on as alarms."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fasttht.alarm_rows import Alarm
from fasttht.attacks.auto_results import Done

# What the library's warnings begin to differ in, and the alarm that each becomes.
_NAMES = {
    "randomized defense": "aa_randomized",
    "probability distribution": "aa_probabilities",
    "zero gradient": "aa_zero_gradient",
    "dynamic defense": "aa_dynamic",
}


# Share of the images that untargeted DLR may start from with a gradient of exactly zero. It is 1, whatever the image,
# where noise alone has brought the label's logit to the third place; that is no sign of anything.
_DLR_ZERO_SHARE = 0.05


def as_alarms(done: Mapping[tuple[int, str], Done], chunks: int) -> list[Alarm]:
    """Return the library's own warnings, each kind once, with where they came from.

    done: by (chunk, attack). Zero gradients of untargeted DLR count above 5 % of the images; all else always.
    """
    met: dict[str, dict[tuple[int, str], list[str]]] = {}
    for place, found in done.items():
        for warning in found.warnings:
            name = next((name for words, name in _NAMES.items() if words in warning), "aa_warning")
            met.setdefault(name, {}).setdefault(place, []).append(warning)
    zeros = met.get("aa_zero_gradient", {})
    dlr = {place for place in zeros if place[1] == "apgd-dlr"}
    images = sum(len(found.hits) for (_, attack), found in done.items() if attack == "apgd-dlr")
    if _points(zeros, dlr) <= _DLR_ZERO_SHARE * images:
        zeros = {place: warnings for place, warnings in zeros.items() if place not in dlr}
        met = {name: places for name, places in (met | {"aa_zero_gradient": zeros}).items() if places}
    alarms = []
    for name, places in met.items():
        text = next(iter(places.values()))[0].split(" See ")[0].rstrip(".! ")
        if name == "aa_zero_gradient":
            text = f"the gradient of the DLR loss was exactly zero at {_points(zeros, zeros)} starting points"
        attacks = ", ".join(dict.fromkeys(attack for _, attack in places))
        where = len({k for k, _ in places})
        alarms.append(
            Alarm(name, f"pyautoattack, in {attacks}, {where} of {chunks} chunks: {text} (Croce & Hein 2020).")
        )
    return alarms


def _points(zeros: Mapping[tuple[int, str], list[str]], places: Iterable[tuple[int, str]]) -> int:
    """Return how many points the warnings of zero gradients at these places speak of."""
    words = [warning for place in places for warning in zeros[place]]
    return sum(int(number) for warning in words for number in re.findall(r"there are (\d+) points", warning))


@contextmanager
def library_warnings(library: Any) -> Iterator[list[str]]:
    """Give the warnings that pyautoattack logs; nothing reaches the screen. A debugger's trace function stays set."""
    logger, found = logging.getLogger("auto-attack"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    propagate, level, trace = logger.propagate, logger.level, sys.gettrace()
    library.checks.funcs.update(dict.fromkeys(library.checks.funcs, 0))  # it counts over the life of the process
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        sys.settrace(trace)
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
