"""The moments of a run that a fault can fall on, told one by one while the process runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttht import bank, checkpoint, loop, run_folder, state
from fasttht.attacks import free
from fasttht.models import clean_encoder
from fasttht.pipelines.loader import Loader
from fasttht.pretrain import Pretrainer
from fasttht.train import Trainer

# Functions that are told of before and after: their owner and name, and what the moments are called.
AROUND = (
    (state, "_follow_all_", "EMA"), (state.GuardedSGD, "step", "SGD"), (bank.FeatureBank, "enqueue", "bank"),
    (clean_encoder.CleanEncoder, "follow_", "momentum encoder"), (free.FreeDelta, "step_", "delta"),
    (checkpoint, "_sha256", "sha256"), (os, "fsync", "fsync"), (loop.Loop, "save", "save"),
    (Trainer, "_evaluate", "evaluation"), (Pretrainer, "_evaluate", "evaluation"),
    (run_folder.RunFolder, "rewind", "rewind"),
)  # fmt: skip
_FILES = ("half metrics.jsonl", "half timing.jsonl", "half config.toml", "half env.json", "half summary.csv")
_EVERYWHERE = {
    "data", "batch", "step end", "before tensors", "half tensors", *_FILES, "open state.json", "open MANIFEST.json",
    "os.rename .partial-step-", "os.rmdir step-",
    *(f"{w} {label}" for _, _, label in AROUND if label not in ("EMA", "delta", "rewind") for w in ("before", "after")),
}  # fmt: skip
# A run that goes on has these before its first step; a whole run never does.
RESUMING = [(-1, "before rewind 1"), (-1, "after rewind 1")]
_TRAIN = {
    f"{when} {name}"
    for name in ("clean_encoder", "train_forward", "train_backward", "optimizer", "bank", "attack_gradient")
    for when in ("enter", "leave")
} | {"before EMA", "after EMA"}


def missing(mode: str, labels: set[str]) -> set[str]:
    """Return the kinds of moment that a mode's whole run should have had and has not."""
    kinds = {label.rpartition(" ")[0] for label in labels}
    wanted = set(_EVERYWHERE)
    if mode != "pretrain":
        wanted |= _TRAIN
    if mode.startswith("free"):
        wanted |= {"before delta", "after delta"}
    if mode.startswith("standard"):
        wanted |= {"enter attack", "leave attack", "enter attack_update"}
    return wanted - kinds


@dataclass
class Events:
    """Moments of one process, by (step, label); step -1 is before the first step. act is called at each, before it.

    The label ends in the number of its kind within the step, so a process that resumes meets the same ones.
    """

    act: Callable[[int, str], bool] = lambda step, label: False
    step: int = -1
    seen: dict[str, int] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    busy: bool = False

    def __call__(self, name: str, half: Callable[[], object] | None = None) -> None:
        """Tell of a moment. half leaves something half done; it runs only if `act` says that this moment is the one."""
        if self.busy or threading.current_thread() is not threading.main_thread():
            return
        self.busy = True
        number = self.seen[name] = self.seen.get(name, 0) + 1
        if self.act(self.step, f"{name} {number}") and half is not None:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.busy = False

    def enter(self, name: str) -> None:
        self.inside.append(name)
        self(f"enter {name}")

    def leave(self) -> None:
        self(f"leave {self.inside.pop()}")


def _around(owner: Any, name: str, events: Events, label: str) -> None:
    """Tell of a function's beginning and end."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def told(*args: Any, **kwargs: Any) -> Any:
        events(f"before {label}")
        found = original(*args, **kwargs)
        events(f"after {label}")
        return found

    setattr(owner, name, told)


def install(events: Events, folder: Path, trace: Path) -> None:
    """Make this process, which is to end afterwards, tell of its moments and of the images of each step.

    trace: a line for every step that begins, and between them a byte for every signal, from where it arrived.
    """
    trained = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
    signal.set_wakeup_fd(trained)
    iterate = Loader.__iter__

    def told_step(step: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def told(self: Any, item: Any) -> None:
            events.step, events.seen = self.state.step + 1, {}
            events("data")
            index = b"".join(view.index.numpy().tobytes() for view in (item if isinstance(item, tuple) else (item,)))
            os.write(trained, f"{events.step} {hashlib.sha256(index).hexdigest()[:16]}\n".encode())
            step(self, item)
            events("step end")

        return told

    def told_iterate(self: Loader) -> Iterator[Any]:
        for batch in iterate(self):
            events("batch")
            yield batch

    Trainer._step = told_step(Trainer._step)  # type: ignore[method-assign]
    Pretrainer._step = told_step(Pretrainer._step)  # type: ignore[method-assign]
    Loader.__iter__ = told_iterate  # type: ignore[method-assign]
    for owner, name, label in AROUND:
        _around(owner, name, events, label)
    save_file, append, write = checkpoint.save_file, run_folder.RunFolder.append, run_folder.write_whole

    def told_save_file(tensors: Any, path: Path) -> None:
        events("before tensors")
        save_file(tensors, path)
        events("half tensors", lambda: os.truncate(path, path.stat().st_size // 2))

    def told_append(self: run_folder.RunFolder, file: str, row: Any) -> None:
        def half() -> None:
            with (self.path / file).open("a") as out:
                out.write(json.dumps(row)[: 20 + events.step % 30])

        events(f"half {file}", half)
        append(self, file, row)

    def told_write(path: Path, text: str) -> None:
        events(f"half {path.name}", lambda: path.with_name(f".partial-{path.name}").write_text(text[: len(text) // 2]))
        write(path, text)

    checkpoint.save_file = told_save_file
    run_folder.RunFolder.append = told_append  # type: ignore[method-assign]
    run_folder.write_whole = told_write
    own = str(folder)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"):
            path = str(arguments[0])
            if path.startswith(own):
                # A folder's own name says its step; what it is called in the next one must be the same.
                events(f"{event} {Path(path).name.rstrip('0123456789')}")

    sys.addaudithook(audit)


_SIGNALS = bytes(range(1, 32)).replace(b"\n", b"")  # signal 10 is SIGUSR1, which nothing here sends


def trace_of(path: Path) -> dict[int, str]:
    """Return the images' digest of every step that was begun; a step begun twice must have met the same images."""
    found: dict[int, str] = {}
    for line in path.read_bytes().translate(None, _SIGNALS).decode().splitlines():
        step, digest = line.split()
        assert found.setdefault(int(step), digest) == digest, f"step {step}: other images than the first time"
    return found


def begun(path: Path) -> int:
    """Return how many steps were begun so far."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begun_after_a_signal(path: Path) -> int | None:
    """Return how many steps began after the first signal had arrived, None if none has."""
    content = path.read_bytes()
    at = next((place for place, byte in enumerate(content) if byte in _SIGNALS), None)
    return None if at is None else content[at:].count(b"\n")
