"""The runs that faults are injected into: a tiny network on the digits, and what they leave behind.

Every run is a forked process that goes through `cli.run`, watched (`moments.py`): what happens at one of its moments is
the case's choice.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it: once here, not in every process

from fasttht import checkpoint, cli, loop, regions, run_folder
from fasttht.pipelines import threaded  # noqa: F401 -- so does a loader
from fasttht.pipelines.splits import open_splits
from tests.faults.moments import Events, install, missing, trace_of

torch.set_num_threads(1)  # a process with threads must not fork

PASS, INTERVAL = 20, 5
TINY = [
    "--width", "4", "--batch-size", "70", "--bank-size", "300", "--warmup-epochs", "1", "--log-interval", "7",
    "--checkpoint-interval", str(INTERVAL), "--eval-steps", "2", "--eval-interval", "1", "--eval-batch-size", "180",
    "--workers", "1", "--threads", "1", "--model-ema", "--device", "cpu", "--attack-engine", "folded",
]  # fmt: skip
STANDARD = ["--epochs", "3", "--steps", "2", "--targeted", "--start-clean-prob", "0.3"]
FREE = ["--epochs", "6", "--replay", "2"]
MODES: dict[str, list[str]] = {
    "standard fp32": STANDARD,
    "free fp32": FREE,
    "standard bf16": [*STANDARD, "--amp-dtype", "bf16"],
    "free bf16": [*FREE, "--amp-dtype", "bf16"],
}
# Beside those four: MoCo in 2 shuffled groups, 30 steps.
PRETRAIN = "pretrain"
_PRETRAIN = [
    "--width", "4", "--batch-size", "140", "--epochs", "3", "--queue-size", "300", "--shuffle-groups", "2",
    "--no-mask-same-index", "--eval-interval", "1", "--knn-k", "5", "--log-interval", "7",
    "--checkpoint-interval", str(INTERVAL), "--workers", "1", "--threads", "1", "--device", "cpu",
]  # fmt: skip


def command(mode: str, output: Path) -> list[str]:
    """Return the words of a mode's run in a folder."""
    words = ["pretrain", *_PRETRAIN] if mode == PRETRAIN else ["train", *TINY, *MODES[mode]]
    return [*words, "--output", str(output)]


def warm() -> None:
    """Do once, in the process that all cases fork from, what the first run of a process is slow at; nothing trains.

    No gradient is computed here: after that a process must not fork.
    """
    fit = loop.Loop.fit
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        loop.Loop.fit = lambda self, **_: sys.exit(0)  # type: ignore[method-assign]
        for mode in (*MODES, PRETRAIN):
            with suppress(SystemExit):
                cli.run(command(mode, Path(folder) / "run"))
    loop.Loop.fit = fit  # type: ignore[method-assign]
    assert threading.active_count() == 1, "a process with threads must not fork"
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, every page that the cases share with this process


def in_child(work: Callable[[], int | None]) -> int:
    """Run `work` in a forked process; return its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def call(words: list[str], folder: Path, prepare: Callable[[], object] = lambda: None) -> tuple[int, str, str]:
    """Run a command in a forked process, with files for its output in `folder`; return code, stdout and stderr."""
    out, err = folder / "out.txt", folder / "err.txt"

    def work() -> int:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        prepare()
        return cli.run(words)

    code = in_child(work)
    return code, out.read_text(errors="replace"), err.read_text(errors="replace")


def one_line(said: tuple[int, str, str], *codes: int) -> str:
    """Check that a command was refused as it should be: exit code, one line on stderr, no traceback. Returns it."""
    code, out, err = said
    assert code in codes, f"expected exit {codes}, got {code}: {out[-300:]} {err[-600:]}"
    assert err.startswith("fasttht: "), f"stderr: {err[-600:]}"
    assert err.count("\n") == 1, f"expected one line, got {err.count(chr(10))}: {err[-600:]}"
    assert "Traceback" not in out + err, (out + err)[-600:]
    return err.strip()


def quiet(path: Path) -> None:
    """Send this process' output to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def train(
    words: list[str],
    folder: Path,
    events: Events | None = None,
    *,
    until: int | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """Run the words in a forked process, watched, and return its exit code; stop after step `until`.

    prepare: what to do in that process first. Its output is appended to said.txt beside the folder.
    """

    def work() -> int:
        quiet(folder.with_name("said.txt"))
        prepare()
        watching = events or Events()
        install(watching, folder, folder.with_name("trace.txt"))
        if until is not None:
            fit = loop.Loop.fit

            def stopping(self: Any, **_: Any) -> Any:
                fit(self, stop_at=until)
                os._exit(0)

            loop.Loop.fit = stopping  # type: ignore[method-assign]
        with ExitStack() as stack:
            stack.enter_context(regions.watched(watching))
            return cli.run(words)

    return in_child(work)


def made(place: Path, make: Callable[[Path], object]) -> Path:
    """Return what is made at the first call, beside its place and then renamed: a case killed meanwhile leaves none."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent)) / "it"
        partial.mkdir()
        make(partial)
        partial.rename(place)
        partial.parent.rmdir()
    return place


@dataclass(frozen=True)
class Baseline:
    """An uninterrupted run: folder, its state after every checkpoint, its moments, the images of each step."""

    folder: Path
    moments: list[tuple[int, str]]
    trace: dict[int, str]

    @property
    def steps(self) -> int:
        return max(self.trace)

    def snapshot(self, step: int) -> Path:
        return self.folder.parent / f"at-{step}"

    def checkpoint_before(self, step: int) -> int:
        """Return the step of the last checkpoint that was whole when this step began, 0 for none."""
        return max(step - 1, 0) // INTERVAL * INTERVAL

    def checkpoint_after(self, step: int) -> int | None:
        """Return the first checkpoint's step after this one, None where that is the run's end."""
        found = (max(step, 0) // INTERVAL + 1) * INTERVAL
        return found if found < self.steps else None


def baseline(mode: str, shared: Path) -> Baseline:
    """Return a mode's uninterrupted run, made at the first call."""

    def make(home: Path) -> None:
        run = home / "run"
        in_child(lambda: (open_splits(None), 0)[1])  # the first to open the digits writes them
        moments: list[tuple[int, str]] = []

        def note(step: int, label: str) -> bool:
            moments.append((step, label))
            return False

        def watched() -> int:
            save = loop.Loop.save

            def kept(self: Any) -> Path | None:
                found = save(self)
                watching.busy = True
                shutil.copytree(run, home / f"at-{self.state.step}", dirs_exist_ok=True)
                watching.busy = False
                return found

            loop.Loop.save = kept  # type: ignore[method-assign]
            quiet(home / "said.txt")
            watching = Events(note)
            install(watching, run, home / "trace.txt")
            with regions.watched(watching):
                code = cli.run(command(mode, run))
            (home / "moments.json").write_text(json.dumps(moments))
            return code

        code = in_child(watched)
        assert code == 0, (home / "said.txt").read_text()[-2000:]
        labels = {label for _, label in json.loads((home / "moments.json").read_text())}
        assert not (absent := missing(mode, labels)), f"{mode}: these moments never come: {sorted(absent)}"

    home = made(shared / mode.replace(" ", "-"), make)
    found = [(step, label) for step, label in json.loads((home / "moments.json").read_text())]
    return Baseline(home / "run", found, trace_of(home / "trace.txt"))


def contents(run: Path) -> dict[str, Any]:
    """Return what a run has computed: its newest checkpoint's tensors and position, and its rows."""
    newest = checkpoint.newest(run, checkpoint.refuse)
    assert newest is not None
    meta = checkpoint.read_meta(newest)
    found = {key: meta[key] for key in ("step", "loader", "identity", "depends_on", "evaluation_due")}
    found |= {path.name: path.read_bytes() for path in sorted(newest.glob("*.safetensors"))}
    there = [checkpoint.step_of(path) for path in checkpoint.listing(run)]
    found["best"] = run_folder.RunFolder(run).best_step(there)
    for name in ("metrics.jsonl", "summary.csv"):
        found[name] = (run / name).read_bytes() if (run / name).exists() else b""
    found["rows"] = meta["rows"]["metrics.jsonl"]
    return found


def same(run: Path, expected: Path) -> None:
    """Compare two run folders. Raises: AssertionError naming what differs."""
    ours, theirs = contents(run), contents(expected)
    assert ours.keys() == theirs.keys(), f"files differ: {sorted(ours.keys() ^ theirs.keys())}"
    for name in theirs:
        assert ours[name] == theirs[name], f"{name} differs from the uninterrupted run's"
    left = [path.name for path in [*run.glob(".partial*"), *(run / "checkpoints").glob(".partial*")]]
    assert not left, f"left behind: {left}"


def begin_from(base: Baseline, step: int, run: Path) -> None:
    """Put the uninterrupted run as it was after the checkpoint of `step` (0: nothing) into a folder."""
    if step:
        shutil.copytree(base.snapshot(step), run)


def tail(path: Path, size: int = 600) -> str:
    return path.read_text(errors="replace")[-size:] if path.exists() else "(said nothing)"
