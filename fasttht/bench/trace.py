"""One warm call of each job as a Chrome trace, with the regions of the step as named spans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fasttht.bench.jobs import OUT_OF_MEMORY, Job, free_memory, synchronize
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


def write_trace(jobs: Mapping[str, Job], device: torch.device, path: Path) -> dict[str, str]:
    """Run every job once under the profiler, each in a span of its name, and write what happened to `path`.

    Returns what the report says of it: nothing; or, as not_traced, that memory does not suffice and there is no file.
    """
    try:
        _write_trace(jobs, device, path)
        return {}
    except torch.OutOfMemoryError:
        pass
    free_memory(device)  # after the handler: the error's traceback kept the job's tensors alive
    return {"not_traced": OUT_OF_MEMORY}


def show_trace(trace: Path | None, report: dict[str, Any]) -> None:
    """Say where the trace is, or why there is none, if one was asked for."""
    from fasttht import log

    if trace is not None:
        log.say(f"not traced: {report['not_traced']}" if "not_traced" in report else f"trace: {trace}")


def _write_trace(jobs: Mapping[str, Job], device: torch.device, path: Path) -> None:
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
