"""F16: two runs in one folder, a clock that leaps, another place on another host, a full log file."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

from fasttht import checkpoint, loop, run_folder
from tests.faults import runs
from tests.faults.case import Context, Kind

UNTIL = 50


def host(number: int, at: Context) -> str:
    mode = list(runs.MODES)[number % 2]
    base = runs.baseline(mode, at.shared)
    run = at.folder / "run"
    runs.begin_from(base, 40, run)
    work = (_two_runs, _leaps, _moved, _no_room, _full_file)[number // 2]
    return f"{mode}: {work(mode, base, at, number)}"


def _goes_on(words: list[str], base: runs.Baseline, at: Context, prepare: Callable[[], object] = lambda: None) -> None:
    run = at.folder / "run"
    code = runs.train(words, run, until=UNTIL, prepare=prepare)
    assert code == 0, f"exit {code}: {runs.tail(at.folder / 'said.txt')}"
    runs.same(run, base.snapshot(UNTIL))


def _two_runs(mode: str, base: runs.Baseline, at: Context, number: int) -> str:
    run = at.folder / "run"
    words = runs.command(mode, run)
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = (run / "metrics.jsonl").read_bytes()
    line = runs.one_line(runs.call(words, at.folder), 2)
    assert "no other process" in line, line
    assert (run / "metrics.jsonl").read_bytes() == before
    os.close(handle)
    _goes_on(words, base, at)
    return "a second run was refused"


def _leaps(mode: str, base: runs.Baseline, at: Context, number: int) -> str:
    """Every clock leaps by hours, as on a machine that was suspended; the wall clock goes back too."""
    run, leaps = at.folder / "run", at.folder / "leaps.txt"

    def prepare() -> None:
        draw, ahead = random.Random(number), [0.0]
        monotonic, perf_counter, wall, save = time.monotonic, time.perf_counter, time.time, loop.Loop.save

        def leap() -> float:
            ahead[0] += 10_000 * (draw.random() < 0.2)
            return ahead[0]

        def counted(self: Any) -> Any:
            with leaps.open("a") as out:
                out.write(f"{self.state.step}\n")
            return save(self)

        time.monotonic = lambda: monotonic() + leap()
        time.perf_counter = lambda: perf_counter() + leap()
        time.time = lambda: wall() + draw.uniform(-1e8, 1e8)
        loop.Loop.save = counted  # type: ignore[method-assign]

    rows = len((run / "timing.jsonl").read_text().splitlines())
    _goes_on([*runs.command(mode, run), "--checkpoint-minutes", "30"], base, at, prepare)
    saved = [int(step) for step in leaps.read_text().splitlines()]
    assert any(step % runs.INTERVAL for step in saved), f"no leap was felt: saved at {saved}"
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()][rows - 1 :]
    assert all(math.isfinite(value) and value >= 0 for row in timing for value in row.values()), timing
    return f"clocks leapt, {len(saved)} checkpoints"


def _moved(mode: str, base: runs.Baseline, at: Context, number: int) -> str:
    """To another place, and from there resumed with other threads of decoding."""
    run, moved = at.folder / "run", at.folder / "other host" / "é run"
    shutil.copytree(run, moved)
    shutil.rmtree(run)
    words = runs.command(mode, moved)
    words[words.index("--workers") + 1] = "3"
    assert runs.train(words, moved, until=UNTIL) == 0, runs.tail(moved.with_name("said.txt"))
    runs.same(moved, base.snapshot(UNTIL))
    return "moved"


def _no_room(mode: str, base: runs.Baseline, at: Context, number: int) -> str:
    """For another row."""

    def refuse(self: run_folder.RunFolder, file: str, row: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / file))

    def full() -> None:
        run_folder.RunFolder.append = refuse  # type: ignore[method-assign]

    words = runs.command(mode, at.folder / "run")
    line = runs.one_line(runs.call(words, at.folder, full), 6)
    _goes_on(words, base, at)
    return f"no room for a row: {line[:100]}"


def _full_file(mode: str, base: runs.Baseline, at: Context, number: int) -> str:
    """/dev/full in the place of a row file; not of metrics.jsonl, whose reading would never end."""
    run, name = at.folder / "run", "timing.jsonl"
    words = runs.command(mode, run)
    kept = (run / name).read_bytes()
    (run / name).unlink()
    (run / name).symlink_to("/dev/full")
    line = runs.one_line(runs.call(words, at.folder), 4, 6)
    (run / name).unlink()
    (run / name).write_bytes(kept)
    for folder in checkpoint.listing(run):
        checkpoint.verify(folder)
    _goes_on(words, base, at)
    return f"{name} is full: {line[:100]}"


KIND = Kind(
    "host",
    10,
    "a second run exits 2; a full log exits 6; moved runs, leaping clocks and what comes after give the same bytes",
    "the runs of kill in fp32, from step 40 to step 50",
    host,
)
