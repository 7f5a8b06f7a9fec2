"""A run's folder: what it was asked, what it ran on, and its rows of metrics.

metrics.jsonl holds only what the run computes, so that a resumed run's file equals an uninterrupted one's byte for
byte: wall-clock figures go to timing.jsonl. On resume both are cut back to what the checkpoint had seen.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fasttht
from fasttht.config import TrainConfig
from fasttht.config_file import AnyConfig, identity, stored, to_toml
from fasttht.errors import CheckpointError, UsageError

METRICS, TIMING, CONFIG = "metrics.jsonl", "timing.jsonl", "config.toml"


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
        (self.path / CONFIG).write_text(to_toml(config))
        for file in (METRICS, TIMING):
            (self.path / file).write_text("")
        (self.path / "env.json").write_text(json.dumps(environment(device), indent=1) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; a last line that a kill left without its end is none."""
        try:
            return [json.loads(line) for line in (self.path / METRICS).read_text().split("\n")[:-1]]
        except FileNotFoundError:
            return []

    def final(self) -> dict[str, Any] | None:
        """Return the final evaluation's row if the run is finished, else None."""
        rows = self.rows()
        return rows[-1] if rows and rows[-1]["kind"] == "final" else None

    def append(self, file: str, row: dict[str, Any]) -> None:
        """Append one JSON line."""
        with (self.path / file).open("a") as out:
            out.write(json.dumps(row) + "\n")

    def positions(self) -> dict[str, int]:
        """Return the sizes of the row files in bytes, for the checkpoint; what they cover is synced to disk."""
        sizes = {}
        for file in (METRICS, TIMING):
            with (self.path / file).open("ab") as out:
                os.fsync(out.fileno())
                sizes[file] = out.tell()
        return sizes

    def rewind(self, positions: dict[str, int]) -> None:
        """Cut the row files back to what a checkpoint had seen."""
        for file, size in positions.items():
            path = self.path / file
            if not path.exists() or path.stat().st_size < size:
                raise CheckpointError(f"{path}: expected at least {size} bytes, as the checkpoint had seen; restore it")
            os.truncate(path, size)

    def write_summary(self) -> None:
        """Write summary.csv: one line per evaluation."""
        rows = [row for row in self.rows() if row["kind"] in ("eval", "final")]
        with (self.path / "summary.csv").open("w", newline="") as out:
            table = csv.DictWriter(out, fieldnames=list(rows[0]), restval="", extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)


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
