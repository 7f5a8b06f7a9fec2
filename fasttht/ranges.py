"""How large a number may be that a run is asked for: no run needs more, and some part of it could not hold it.

No torch here. What a number must be beside that, `resolve` and `pretrain_config` say.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fasttht.errors import UsageError

# Largest size of the whole numbers and of the others, unless the option has its own: so that sizes, their products
# and counts of updates stay within 64 bits, and rates within float32.
_WHOLE, _BROKEN = 10**9, 1e30
_LARGEST: dict[str, int] = {
    "seed": 2**63 - 1,
    "img_size": 2**16 - 1,
    "width": 2**16,
    "feat_dim": 2**20,
    "batch_size": 10**7,
    "eval_batch_size": 10**7,
    "grad_accum_steps": 10**7,
    "epochs": 10**6,
    "warmup_epochs": 10**6,
    "steps": 10**6,
    "replay": 10**6,
    "eval_steps": 10**6,
    "eval_restarts": 10**6,
    # Threads of one process; and three years in seconds, or 19 centuries in minutes.
    "workers": 1024,
    "threads": 1024,
    "stall_timeout": 10**8,
    "dist_timeout": 10**8,
}


def check_sizes(config: Any) -> None:
    """Refuse numbers of a configuration, in sections, that are too large or not finite. Raises: UsageError."""
    for section in dataclasses.fields(config):
        for name, value in vars(getattr(config, section.name)).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not isinstance(number, bool):
                    _check(name, number)


def _check(name: str, number: float) -> None:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(number, float) and not math.isfinite(number):
        raise UsageError(f"{flag}: expected a finite number, got {number}")
    largest = _LARGEST.get(name, _WHOLE if isinstance(number, int) else _BROKEN)
    if not -largest <= number <= largest:
        sign, words = ("-", "least") if number < 0 else ("", "most")
        raise UsageError(
            f"{flag}: expected at {words} {sign}{largest if isinstance(largest, int) else f'{largest:g}'}, "
            f"got {short(str(number))}"
        )


def short(text: str) -> str:
    """Return a text as it may stand in a message: cut where it is longer than any number that makes sense."""
    return text if len(text) <= 40 else text[:32] + "..."
