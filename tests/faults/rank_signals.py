"""Signals to one of several processes, or to all: they stop together, with one checkpoint, and go on from there."""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Any

from fasttht import checkpoint, loop
from fasttht.train import Trainer
from tests.faults import group, runs
from tests.faults.case import Context, Kind
from tests.ranks import Ranks

SENT = (signal.SIGTERM, signal.SIGINT)
PLACES: tuple[tuple[Any, str], ...] = ((Trainer, "_step"), (loop.Loop, "save"), (Trainer, "_evaluate"))


def stop(number: int, at: Context) -> str:
    """Every fifth goes to all processes, as a batch system sends it; the others to one."""
    size, sent, draw = 2 + number % 3, SENT[number % 2], random.Random(number)
    owner, name = PLACES[number // 2 % len(PLACES)]
    victim, step = draw.randrange(size), draw.randrange(1, group.STEPS - 4)
    if name == "_evaluate":  # that between the passes: the last one is taken to its end, which is the run's
        step = min(step, group.STEPS // 2)
    run = at.folder / "run"
    everybody = number % 5 == 4

    def work(own: int) -> None:
        original, done = getattr(owner, name), list[int]()

        def signalled(self: Any, *arguments: Any) -> Any:
            if self.state.step >= step and not done:
                done.append(self.state.step)
                (at.folder / f"sent-{own}").write_text(str(self.state.step))
                os.kill(os.getpid(), sent)
            return original(self, *arguments)

        if everybody or own == victim:
            setattr(owner, name, signalled)
        sys.exit(runs.cli.run(group.command(run)))

    ranks = Ranks(size, at.folder / "out", work)
    code = 130 if sent == signal.SIGINT else 75
    found = ranks.join(100)
    said = [ranks.text(own) for own in range(size)]
    assert found == [code] * size, f"{sent.name}: {found} {said}"
    assert sum(text.count("fasttht: ") for text in said) == 1, said
    assert not any("Traceback" in text for text in said), said
    # It is asked about before a step and heard of after it: the one after the step in which it came is the last.
    heard = min(int(path.read_text()) for path in at.folder.glob("sent-*"))
    stopped = checkpoint.step_of(checkpoint.listing(run)[-1])
    assert stopped <= heard + 2, f"{sent.name} when {heard} steps were done, stopped after {stopped}"
    group.finish(size, run, at.folder / "again")
    runs.same(run, group.baseline(size, at.shared))
    to = "all" if everybody else f"rank {victim}"
    return f"{sent.name} to {to} of {size} in {name} after step {heard}: all ended with {code} after step {stopped}"


KIND = Kind(
    "rank-signal",
    10,
    "SIGTERM (75) or SIGINT (130) to one of 2 to 4 processes or all: all end so, two steps later at most; then as kill",
    "the run of rank",
    stop,
    limit_s=240,
)
