"""What one call of a job asks of the machine besides time: launches, waits of the host, memory. Counted, not timed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from fasttht.bench.jobs import Job, synchronize
from fasttht.bench.ladder import Counter

# Calls of the CUDA runtime and driver that put work into a stream, by the start of their names.
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
_WAIT = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Calls:
    """launches: work the host asked for. kernels: what the device ran, a graph's nodes each; None: not counted.

    waits: how often the host waited for the device. counted_by: `profiler` (CUDA's own calls); `dispatch` (torch's
    operators, views left out: what a GPU would be asked for, where every operator is one launch); or `meta` (the same
    on tensors without data, where a fused op is one).
    """

    launches: float
    waits: float
    kernels: float | None
    counted_by: str

    def per(self, steps: int) -> dict[str, Any]:
        """Return the row's entries, for one of `steps` attack steps."""
        return {
            "launches_per_step": self.launches / steps,
            "waits_per_step": self.waits / steps,
            "kernels_per_step": None if self.kernels is None else self.kernels / steps,
            "counted_by": self.counted_by,
        }


def count_calls(job: Job, device: torch.device) -> Calls:
    """Count one warm call: on CUDA by the profiler and torch's own watch over waits, elsewhere by the dispatcher."""
    if device.type != "cuda":
        with Counter() as counter:
            job()
        return Calls(counter.count.launches, counter.count.waits, None, "dispatch")
    synchronize(device)
    waits = _count_waits(job)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        job()
        synchronize(device)
    launches = kernels = 0
    for event in profile.events() or ():
        launches += event.name.startswith(_LAUNCHES)
        kernels += event.device_type.name == "CUDA"
    if not launches:  # CUPTI is not there, or not allowed to look: the operators are left
        with Counter() as counter:
            job()
        return Calls(counter.count.launches, waits, None, "dispatch")
    return Calls(launches, waits, kernels, "profiler")


def _count_waits(job: Job) -> int:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            job()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum(_WAIT in str(warning.message) for warning in said)


def peak_memory_gib(job: Job, device: torch.device) -> float | None:
    """Return the memory that one warm call needs beyond what lay on the device before it; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    job()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30
