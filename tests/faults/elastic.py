"""F15: runs that are killed and go on with another number of processes: the same images, the same network."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fasttht import build, checkpoint
from fasttht.train import Trainer
from tests.faults import group, runs
from tests.faults.case import Context, Kind
from tests.ranks import Ranks

# Numbers of processes, one after the other: all but the last are killed.
COURSES = ((4, 2, 1), (1, 2, 4), (2, 4), (4, 1), (1, 4))
TORCHRUN = 2
# In float64, over 18 steps: sums over ranks are taken in another order.
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def elastic(number: int, at: Context) -> str:
    """Every course in standard and in free training, then runs that a real torchrun starts again."""
    if number >= 2 * len(COURSES):
        return _torchrun(number, at)
    course, options = COURSES[number // 2], (group.STANDARD, group.FREE)[number % 2]
    base, draw = _whole(options, at.shared), random.Random(number)
    run, stop, said = at.folder / "run", 0, []
    for part, size in enumerate(course):
        last = part == len(course) - 1
        stop = group.STEPS if last else draw.randrange(stop + 2, group.STEPS - 2 * (len(course) - part - 1))
        ranks = _start(size, run, options, at.folder / f"part{part}", None if last else stop)
        if last:
            assert ranks.join(150) == [0] * size, [ranks.text(own) for own in range(size)]
        else:
            _kill_all(ranks)
        said.append(f"{size} to step {stop}")
    _same_order(base.parent / "order", at.folder.glob("part*/order-*"))
    apart = _close(run, base)
    return f"{', '.join(said)} {'free' if number % 2 else 'standard'}: the same images, {apart:.1e} apart"


def _start(size: int, run: Path, options: list[str], out: Path, stop: int | None) -> Ranks:
    """Start a run in float64 that notes the rows of every step, and whose processes kill themselves before one."""
    out.mkdir(parents=True, exist_ok=True)
    group.end_soon()

    def work(own: int) -> None:
        build_model: Callable[..., Any] = build.build_model
        build.build_model = lambda *arguments: build_model(*arguments).double()
        plain = Trainer._step

        def noted(self: Trainer, item: Any) -> None:
            if stop is not None and self.state.step + 1 == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            row = [self.state.step + 1, own, size, item.index.tolist()]
            with (out / f"order-{own}").open("a") as file:
                file.write(json.dumps(row) + "\n")
            plain(self, item)

        Trainer._step = noted  # type: ignore[method-assign]
        sys.exit(runs.cli.run(group.command(run, options)))

    return Ranks(size, out, work)


def _kill_all(ranks: Ranks) -> None:
    """When one has died, kill those that have not come as far."""
    deadline = time.monotonic() + 100
    while all(process.is_alive() for process in ranks.processes):
        assert time.monotonic() < deadline, "none has died"
        time.sleep(0.01)
    for process in ranks.processes:
        process.kill()
        process.join()
    assert any(process.exitcode == -signal.SIGKILL for process in ranks.processes), ranks.text(0)


def _whole(options: list[str], shared: Path) -> Path:
    """Return the run of one process in float64 that nothing happened to, made at the first call."""

    def make(home: Path) -> None:
        ranks = _start(1, home / "run", options, home / "out", None)
        assert ranks.join(150) == [0], ranks.text(0)
        (home / "out" / "order-0").rename(home / "order")

    return runs.made(shared / f"float64-{'free' if options == group.FREE else 'standard'}", make) / "run"


def _same_order(expected: Path, found: Any) -> None:
    """Check that every process of every part has met its slice of the images that one process meets."""
    whole = {row[0]: row[3] for row in map(json.loads, expected.read_text().splitlines())}
    met = set()
    for path in found:
        for step, own, size, rows in map(json.loads, path.read_text().splitlines()):
            total = len(whole[step])
            assert rows == whole[step][total * own // size : total * (own + 1) // size], f"{path.parent.name}: {step}"
            met.add(step)
    assert met == whole.keys(), f"steps missing: {whole.keys() - met}"


def _close(run: Path, base: Path) -> float:
    """Compare all that the newest checkpoints hold; return the network's largest difference, relative to its tensor."""
    ours, theirs = checkpoint.listing(run)[-1], checkpoint.listing(base)[-1]
    assert ours.name == theirs.name, f"{ours.name}, expected {theirs.name}"
    apart = 0.0
    for path in sorted(theirs.glob("*.safetensors")):
        found, expected = load_file(ours / path.name), load_file(path)
        assert found.keys() == expected.keys(), path.name
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype, key
            torch.testing.assert_close(found[key], tensor, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
            if path.stem == "model" and tensor.is_floating_point():
                scale = float(tensor.abs().max()) or 1.0
                apart = max(apart, float((found[key] - tensor).abs().max()) / scale)
    for own, other in zip(*(_rows(folder) for folder in (run, base)), strict=True):
        assert own.keys() == other.keys()
        for key, value in other.items():
            close = (
                abs(own[key] - value) <= 1e-6 * max(abs(value), 1) if isinstance(value, float) else own[key] == value
            )
            assert close, f"{key} {own[key]}, expected {value}"
    return apart


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SCRIPT = """
import os, signal
from fasttht.train import Trainer
plain = Trainer._step
def step(self, item):
    first = os.environ["RANK"] == "{victim}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if self.state.step == {step} and first:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, item)
Trainer._step = step
from fasttht.cli import main
main()
"""


def _torchrun(number: int, at: Context) -> str:
    """One of two processes is killed; torchrun starts both again: the bytes of two that nothing happened to."""
    victim, options = number % 2, (group.STANDARD, group.FREE)[number % 2]
    step = random.Random(number).randrange(6, group.STEPS)
    run, script = at.folder / "run", at.folder / "killed_once.py"
    script.write_text(SCRIPT.format(victim=victim, step=step))
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        str(script), *group.command(run, options),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert "resuming" in done.stdout, f"nothing was killed: {done.stdout[-1000:]}"
    runs.same(run, group.baseline(2, at.shared, options))
    return f"torchrun: rank {victim} of 2 killed before step {step + 1}, both started again, the same bytes"


KIND = Kind(
    "elastic",
    2 * len(COURSES) + TORCHRUN,
    f"killed, resumed by another number of processes: the same images at every step, networks, momentum, bank and rows "
    f"within {CLOSE['rtol']:g} of one process's; {TORCHRUN} killed under torchrun --max-restarts 1: the same bytes",
    "the run of rank and its free twin by 1, 2 and 4 processes, in float64 but under torchrun",
    elastic,
    limit_s=300,
)
