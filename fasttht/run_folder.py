"""A run's folder: what it was asked, what it ran on, and its rows of metrics.

metrics.jsonl holds only what the run computes, so that a resumed run's file equals an uninterrupted one's byte for
byte: wall-clock figures go to timing.jsonl. On resume both are cut back to what the checkpoint had seen.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fasttht
from fasttht import checkpoint
from fasttht.config import TrainConfig
from fasttht.config_file import AnyConfig, identity, stored, to_toml
from fasttht.errors import CheckpointError, UsageError
from fasttht.preemption import MARKER

METRICS, TIMING, CONFIG = "metrics.jsonl", "timing.jsonl", "config.toml"
# What --resume said, while a command runs that was told of a checkpoint, or to find none.
RESUMED = "resumed.txt"
_NO_SCORES = {"kind", "epoch", "step", "images"}


class RunFolder:
    """The files of one run beside its checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).exists()

    def config(self) -> TrainConfig:
        """Return the resolved configuration of a run of `fasttht train`.

        Raises: CheckpointError if the folder holds no such run.
        """
        if not self.exists():
            raise CheckpointError(f"{self.path}: expected a run folder with {CONFIG}, got none")
        config = stored(self.path / CONFIG)
        if not isinstance(config, TrainConfig):
            raise CheckpointError(f"{self.path}: expected a run of `fasttht train`, got one of `fasttht pretrain`")
        return config

    def check_same(self, config: AnyConfig) -> None:
        """Refuse to continue a run with other options.

        The data may have moved: that they are the same data is for their fingerprint to say, not their path.

        Raises: CheckpointError naming the options that differ, with both values.
        """
        there = stored(self.path / CONFIG)
        if type(there) is not type(config):
            raise CheckpointError(f"{self.path}: expected a run of this command, got one of another; give --output")
        theirs, ours = identity(there), identity(config)
        differ = [
            f"{key} {theirs[key]} (now {ours[key]})" for key in ours if key != "data" and theirs[key] != ours[key]
        ]
        if differ:
            raise CheckpointError(
                f"{self.path}: expected the options of the run that is there, got others: {', '.join(differ)}; "
                "give another --output, or the run's own options"
            )

    def check_free(self) -> None:
        """Refuse a folder that is no run of ours but holds files that a run would write.

        Raises: UsageError naming the first of them.
        """
        for name in (METRICS, TIMING, "summary.csv", "env.json", "checkpoints"):
            if (self.path / name).exists():
                raise UsageError(
                    f"--output: expected a new folder or a run's, got {self.path} with a {name} but no run"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock goes with the process, however that ends.

        Raises: UsageError if another process holds it.
        """
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for path in created:
            checkpoint.sync(path.parent)
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(f"--output: expected a folder that no other process trains in, got {self.path}") from None
        try:
            yield
        finally:
            if created and not self.exists():  # nothing was trained: leave no trace
                (self.path / ".lock").unlink(missing_ok=True)
                with suppress(OSError):  # not empty: somebody else's by now
                    for path in created:
                        path.rmdir()
            os.close(handle)

    def create(self, config: AnyConfig, device: torch.device) -> None:
        """Write config.toml and env.json and empty the row files: a run without a checkpoint starts again.

        config.toml comes first: it is what makes the folder a run's, so a kill in here leaves one that starts again.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / CONFIG, to_toml(config))
        for file in (METRICS, TIMING):
            (self.path / file).write_text("")
        write_whole(self.path / "env.json", json.dumps(environment(device), indent=1) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl. What a kill or a power loss has left behind the whole ones is none.

        Raises: CheckpointError for a damaged row that whole ones follow, or that is the first.
        """
        found = [_row(line) for line in self._lines()]
        while found[1:] and found[-1] is None:
            found.pop()
        return self._whole(found)

    def final(self) -> dict[str, Any] | None:
        """Return the final evaluation's row if the run is finished, else None."""
        last = [_row(line) for line in self._lines()[-1:]]
        return last[0] if last and last[0] is not None and last[0]["kind"] == "final" else None

    def _lines(self, size: int | None = None) -> list[bytes]:
        """Return the lines of metrics.jsonl that have an end; or, of its first `size` bytes, all."""
        try:
            data = (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return []
        *lines, rest = data[:size].split(b"\n")
        return [*lines, rest] if rest and size is not None else lines

    def _whole(self, found: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
        rows = [row for row in found if row is not None]
        if len(rows) < len(found):
            raise CheckpointError(
                f"{self.path / METRICS}: expected a line of JSON for each row, got something else in line "
                f"{found.index(None) + 1}; restore the file, or give another --output"
            )
        return rows

    def begun_with(self) -> str:
        """Return what `note_resume` was told last: `auto`, `never` or a checkpoint's name."""
        try:
            return (self.path / RESUMED).read_text(errors="replace")
        except FileNotFoundError:
            return "auto"

    def note_resume(self, resume: str) -> None:
        """Keep what --resume says, so that the same command is known if it comes again; `auto` needs no file."""
        if resume == "auto":
            (self.path / RESUMED).unlink(missing_ok=True)
        elif self.begun_with() != Path(resume).name:
            write_whole(self.path / RESUMED, Path(resume).name)

    def result(self, config: AnyConfig) -> dict[str, Any] | None:
        """Return the final row of a finished run of this configuration; None if it is to be trained, or continued.

        What says that a finished run was preempted, at its very end, is removed: nothing is left to go on with.

        Raises: CheckpointError for another run's folder.
        """
        if not self.exists():
            return None
        self.check_same(config)
        row = self.final() if config.run.resume == "auto" else None
        if row is not None and (self.path / MARKER).exists():
            (self.path / MARKER).unlink()
        return row

    def best_step(self, steps: Collection[int]) -> int | None:
        """Return which of these steps had the best evaluation, None if none of them has had one.

        The best one is that whose lowest accuracy is highest, which is the one under the strongest attack; of equal
        ones it is the first.
        """
        found = [row for row in self.rows() if row["kind"] in ("eval", "final") and row["step"] in steps]
        best = max(found, key=lambda row: min(row[name] for name in row.keys() - _NO_SCORES), default=None)
        return None if best is None else int(best["step"])

    def append(self, file: str, row: dict[str, Any]) -> None:
        """Append one JSON line. Raises: OSError naming the file, if the disk does not take it."""
        path = self.path / file
        try:
            with path.open("a") as out:
                out.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def positions(self) -> dict[str, int]:
        """Return the sizes of the row files in bytes, for the checkpoint; what they cover is synced to disk."""
        sizes = {}
        for file in (METRICS, TIMING):
            with (self.path / file).open("ab") as out:
                os.fsync(out.fileno())
                sizes[file] = out.tell()
        return sizes

    def check_rows(self, positions: dict[str, int]) -> None:
        """Look at what a checkpoint had seen of the row files; what came after it does not matter.

        Raises: CheckpointError if one of them is shorter, or a row of metrics.jsonl is damaged.
        """
        for file, size in positions.items():
            path = self.path / file
            if not path.exists() or path.stat().st_size < size:
                raise CheckpointError(f"{path}: expected at least {size} bytes, as the checkpoint had seen; restore it")
        self._whole([_row(line) for line in self._lines(positions.get(METRICS, 0))])

    def rewind(self, positions: dict[str, int]) -> None:
        """Cut the row files back to what a checkpoint had seen. Raises: as `check_rows`, and then nothing is cut."""
        self.check_rows(positions)
        for file in (METRICS, TIMING):
            if file in positions:
                os.truncate(self.path / file, positions[file])

    def write_summary(self, newest: dict[str, Any]) -> None:
        """Write summary.csv: one line per evaluation, of which `newest` is not in metrics.jsonl yet.

        It is written first: the final row there says that the run is finished, and nothing is written after it.
        """
        rows = [row for row in [*self.rows(), newest] if row["kind"] in ("eval", "final")]
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(rows[0]), restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        write_whole(self.path / "summary.csv", text.getvalue())


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, or None if it is no row: of evaluations all is figures, and one an accuracy."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or type(row.get("step")) is not int:
        return None
    if row["kind"] in ("eval", "final"):
        figures = row.keys() - {"kind"}
        if figures <= _NO_SCORES or "images" not in row:
            return None
        if not all(type(row[name]) in (int, float) for name in figures):
            return None
    return row


def write_whole(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    shared: whether other processes may write the same file, each under a temporary name of its own.

    Raises: OSError naming the file.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}" if shared else f".partial-{path.name}")
    try:
        with partial.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        partial.rename(path)
        checkpoint.sync(path.parent)
    except BaseException as error:  # a second signal's too
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the run ran on: versions and hardware, no names, no variables."""
    found: dict[str, Any] = {
        "fasttht": fasttht.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": str(device),
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "compute_capability": torch.cuda.get_device_capability(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return found
