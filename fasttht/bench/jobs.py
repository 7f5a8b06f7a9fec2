"""Timing whole calls in turn: the ladder of attack engines, the kinds of training steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fasttht.bench.windows import Clock, Progress, quartiles

Job = Callable[[], object]

# Why a figure is not there.
OUT_OF_MEMORY = "out of memory"


def synchronize(device: torch.device) -> None:
    """Wait for the current stream of a CUDA device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def time_jobs(
    jobs: Mapping[str, Job],
    device: torch.device,
    *,
    windows: int,
    progress: Progress = lambda what: None,
    clock: Clock = time.perf_counter,
    drop: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Run every job to warm up, then `windows` times in turn; return the seconds of each call, by name.

    Once to warm up, on CUDA twice: the second call of an attack or a step may be the one that is recorded.
    drop: told of a job that memory does not suffice for, which is then left out; without it the error is raised.
    """
    found: dict[str, list[float]] = {name: [] for name in jobs}
    warm_ups = 2 if device.type == "cuda" else 1
    for i in range(1 - warm_ups, windows + 1):
        for name in list(found):
            progress(f"{name}: {f'window {i} of {windows}' if i > 0 else 'warm-up, and compiling where it is needed'}")
            try:
                synchronize(device)
                start = clock()
                jobs[name]()
                synchronize(device)
                seconds = clock() - start
            except torch.OutOfMemoryError:
                if drop is None:
                    raise
                del found[name]
            else:
                if i > 0:
                    found[name].append(seconds)
                continue
            drop(name)  # after the handler: the error's traceback kept the job's tensors alive
    return found


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more: other jobs may need it in other pieces."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summarise_jobs(seconds: Mapping[str, list[float]], images: int, reference: str) -> list[dict[str, Any]]:
    """Return a row for each job: img/s, milliseconds, and how much faster it is than `reference` in the same window.

    ratio is the median over windows of reference / own time, ratio_quartiles their quartiles: what else the machine did
    in a window met both.
    """
    rows = []
    for name, own in seconds.items():
        low, median, high = quartiles(own)
        ratio_low, ratio, ratio_high = quartiles([a / b for a, b in zip(seconds[reference], own, strict=True)])
        rows.append(
            {
                "name": name,
                "img_per_s": images / median,
                "ms": 1000 * median,
                "quartiles_ms": [1000 * low, 1000 * high],
                "ratio": ratio,
                "ratio_quartiles": [ratio_low, ratio_high],
                "ratio_to": reference,
            }
        )
    return rows
