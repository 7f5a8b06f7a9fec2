"""One warm call of each job as a Chrome trace, with the regions of the step as named spans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fasttht.bench.jobs import Job, synchronize
from fasttht.errors import UsageError
from fasttht.regions import watched


class _Spans:
    """A watcher that opens a span of the profiler for each region."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, name: str) -> None:
        span = torch.profiler.record_function(name)
        span.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(span)

    def leave(self) -> None:
        self._open.pop().__exit__(None, None, None)


def check_trace(trace: Path | None) -> None:
    """Refuse a file that could not be written at the end. Raises: UsageError."""
    if trace is None:
        return
    if not trace.absolute().parent.is_dir():
        raise UsageError(f"--trace: expected a file in an existing folder, got {trace}; make the folder first")
    if not trace.name.endswith((".json", ".json.gz")):
        raise UsageError(f"--trace: expected a name that ends in .json or .json.gz, got {trace}; trace viewers want it")


def write_trace(jobs: Mapping[str, Job], device: torch.device, path: Path) -> None:
    """Run every job once under the profiler, each in a span of its name, and write what happened to `path`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile, watched(_Spans()):
        for name, job in jobs.items():
            synchronize(device)
            with torch.profiler.record_function(name):
                job()
            synchronize(device)
    profile.export_chrome_trace(str(path))
