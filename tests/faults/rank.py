"""F11: one of 2 to 4 processes is killed, frozen, slow or stopped by an error: the others end, and say which it was."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from fasttht import loop
from fasttht.pipelines import DataError
from fasttht.train import Trainer
from tests.faults import group, runs
from tests.faults.case import Context, Kind
from tests.ranks import Ranks

FAULTS = ("killed in a step", "killed in a save", "killed in an evaluation", "frozen", "slow", "an error")


def rank(number: int, at: Context) -> str:
    size, fault = 2 + number % 3, FAULTS[number // 3 % len(FAULTS)]
    draw = random.Random(number)
    victim, step = draw.randrange(size), draw.randrange(1, group.STEPS)
    run = at.folder / "run"
    words = group.command(run)
    group.end_soon()

    def work(own: int) -> None:
        if own == victim:
            _harm(fault, step)
        code = runs.cli.run(words)
        runs.cli._exit_at_once(code, "")
        sys.exit(code)

    begun = time.monotonic()
    ranks = Ranks(size, at.folder / "out", work)
    others = [process for own, process in enumerate(ranks.processes) if own != victim]
    for process in others:
        process.join(60)
    seconds = time.monotonic() - begun
    said = [ranks.text(own) for own in range(size)]
    codes = [process.exitcode for process in others]
    assert codes == [6] * (size - 1), f"{fault}: {codes} {said}"
    ranks.processes[victim].kill()
    ranks.processes[victim].join()
    lines = [line for text in said for line in text.splitlines() if line.startswith("fasttht: ")]
    expected = {"slow": f"rank {victim} is at step ", "an error": f"rank {victim}: val.beton: expected"}
    names = [expected.get(fault, f"rank {victim} does not answer, dead or frozen")]
    if victim == 0 and fault.startswith(("killed", "frozen")):
        # Without torchrun's agent rank 0 keeps the store through which the others ask: as the one is, so is the other.
        names.append("rank 0's process or machine")
    assert any(name in line for name in names for line in lines), f"{fault}: expected {names}, got {said}"
    assert not any("Traceback" in text for text in said), said
    group.finish(size, run, at.folder / "again")
    runs.same(run, group.baseline(size, at.shared))
    return f"rank {victim} of {size}, {fault}, step {step}: {seconds:.0f} s, {lines[0][:100]}"


def _harm(fault: str, step: int) -> None:
    """Make this process do it at a step of the run, or in what comes next after it."""

    def act() -> None:
        if fault.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "slow":
            time.sleep(100)
        else:
            raise DataError("val.beton: expected a whole image, got half of one; write it anew")

    owner, name = {"killed in a save": (loop.Loop, "save"), "killed in an evaluation": (Trainer, "_evaluate")}.get(
        fault, (Trainer, "_step")
    )
    original: Callable[..., Any] = getattr(owner, name)

    def harmed(self: Any, *arguments: Any) -> Any:
        if self.state.step >= step:
            act()
        return original(self, *arguments)

    setattr(owner, name, harmed)


KIND = Kind(
    "rank",
    30,
    "a killed, frozen, slow or broken one of 2 to 4 processes ends all (exit 6) and is named; then as kill",
    "18 steps of a width-4 ResNet-18 on the digits, in ghost groups of 12, by 2 to 4 processes over gloo",
    rank,
    limit_s=240,
)
