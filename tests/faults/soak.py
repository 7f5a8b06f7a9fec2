"""F13: 10,000 steps in one process, with checkpoints and evaluations: memory, threads and files stay flat."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

from fasttht.train import Trainer
from tests.faults import runs
from tests.faults.case import Context, Kind

STEPS, EVERY = 10_000, 500
# One batch of images kept per step would be 130 MB over the run, a tensor of the bank 1.5 GB.
ALLOWED_MB = 16.0


def usage() -> tuple[float, int, int]:
    """Return resident memory in MB, threads and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threading.active_count(), len(os.listdir("/proc/self/fd"))


def soak(number: int, at: Context) -> str:
    total = STEPS // 100 if at.short else STEPS
    every = EVERY // 100 if at.short else EVERY
    run, rows = at.folder / "run", at.folder / "usage.txt"
    words = [*runs.command("free fp32", run), "--epochs", str(2 * total // runs.PASS)]
    place = words.index("--epochs")
    del words[place : place + 2]  # the mode's own
    for flag, value in (("--checkpoint-interval", "250"), ("--eval-interval", "50")):
        words[words.index(flag) + 1] = value

    def prepare() -> None:
        step = Trainer._step

        def watched(self: Trainer, item: Any) -> None:
            step(self, item)
            if self.state.step % every == 0:
                gc.collect()
                with rows.open("a") as out:
                    out.write("{:.2f} {} {}\n".format(*usage()))

        Trainer._step = watched  # type: ignore[method-assign]

    code, _, err = runs.call(words, at.folder, prepare)
    assert code == 0, err[-600:]
    found = [tuple(float(word) for word in line.split()) for line in rows.read_text().splitlines()]
    assert len(found) == total // every, f"{len(found)} rows"
    settled = found[len(found) // 4 :]
    memory = [row[0] for row in settled]
    assert max(memory[-3:]) - memory[0] < ALLOWED_MB, f"memory grew: {memory}"
    for column, what in ((1, "threads"), (2, "files")):
        values = {row[column] for row in settled}
        assert max(values) - min(values) <= 1, f"{what}: {values}"
    return f"{total} steps: {memory[0]:.0f} MB after a quarter, {memory[-1]:.0f} MB at the end"


KIND = Kind(
    "soak",
    1,
    "10,000 steps: resident memory grows by less than 16 MB after the first quarter, threads and open files by one",
    "the free fp32 run of kill, with 10,000 steps",
    soak,
    limit_s=5400,
)
