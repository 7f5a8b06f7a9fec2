"""Every op of fasttht.kernels beside its plain-torch reference: time, GB/s, share of what copying reaches here.

Each call meets operands that the last ones have driven out of the cache: sets of them take turns, larger together than
the cache. Implementations of an op take turns too, window by window. On a CPU the op is its reference, and one is run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fasttht import kernels
from fasttht.bench.env import environment
from fasttht.bench.jobs import synchronize
from fasttht.bench.kernel_cases import CASES, Case, Operands, Shapes, which_ran, without_case
from fasttht.bench.peaks import cache_bytes, copy_bandwidth
from fasttht.bench.windows import Clock, Progress, quartiles

# Sets of operands together take so many caches; more than so many sets, or bytes, are not made.
_CACHES, _MOST_SETS, _MOST_BYTES = 2, 256, 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to time. ops: names of CASES; window_s: seconds of each window; cache_bytes None: as the machine says."""

    ops: tuple[str, ...]
    batch_size: int
    img_size: int
    channels: int
    windows: int
    window_s: float
    compiled: bool = False
    cpu: bool = False
    cache_bytes: int | None = None


def device_of(settings: Settings) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")


def described(settings: Settings) -> dict[str, Any]:
    """Return the report's settings."""
    device = device_of(settings)
    return {
        "batch_size": settings.batch_size, "img_size": settings.img_size, "channels": settings.channels,
        "windows": settings.windows, "window_s": settings.window_s, "device": str(device),
        "dtype": "float16" if device.type == "cuda" else "float32",
    }  # fmt: skip


def measure(settings: Settings, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. ratio: reference's time / own, in the same window."""
    device = device_of(settings)
    half = torch.float16 if device.type == "cuda" else torch.float32
    shapes = Shapes(settings.batch_size, settings.img_size, settings.channels, device, half)
    progress("copying, for the bandwidth that the ops are compared with")
    cache = settings.cache_bytes or cache_bytes(device)
    copy = copy_bandwidth(device, windows=settings.windows, buffer_bytes=settings.cache_bytes)
    rows: list[dict[str, Any]] = []
    for name in settings.ops:
        rows += _measure_op(name, CASES[name], shapes, settings, cache, copy["gb_per_s"], progress)
    rows += [{"name": name, "not_run": "the benchmark has no operands for it"} for name in without_case()]
    found = kernels.implementation() if device.type == "cuda" else None
    reason = found.reason if found else "CPU tensors always get the reference."
    return {
        "bench": "kernels",
        "env": environment(device) | {"threads": torch.get_num_threads()},
        "settings": described(settings),
        "implementation": {"name": found.name if found else "torch", "reason": reason},
        "copy": copy,
        "cache_mb": cache / 1e6,
        "rows": rows,
    }


def _measure_op(
    name: str, case: Case, shapes: Shapes, settings: Settings, cache: int, gb_per_s: float, progress: Progress
) -> list[dict[str, Any]]:
    """Return a row for each implementation of one op."""
    progress(f"{name}: operands")
    sets = _operand_sets(case, shapes, cache)
    size = sum(tensor.numel() * tensor.element_size() for tensor in sets[0])
    moved = case.moved(sets[0])
    calls: dict[str, Callable[..., object]] = {"reference": case.reference}
    if shapes.device.type == "cuda":
        calls["op"] = case.op
    ran = {"reference": "torch"}
    missing = []
    if settings.compiled:
        progress(f"{name}: compiling the reference")
        compiled = torch.compile(case.reference, dynamic=False)
        try:
            compiled(*sets[0])
        except Exception as error:  # whatever the compiler stumbles over, the others are still worth their figures
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            missing.append({"name": name, "implementation": "compiled", "not_run": f"it does not compile ({reason})"})
        else:
            calls["compiled"], ran["compiled"] = compiled, "inductor"
    # On a CPU too, though it runs the reference: its check is part of the call.
    ran["op"] = which_ran(name, partial(case.op, *sets[0]))
    seconds = time_calls(
        calls, sets, shapes.device, windows=settings.windows, window_s=settings.window_s,
        progress=lambda what: progress(f"{name}, {what}"),
    )  # fmt: skip
    rows = []
    for implementation, own in seconds.items():
        low, median, high = quartiles(own)
        ratios = quartiles([a / b for a, b in zip(seconds["reference"], own, strict=True)])
        rows.append(
            {
                "name": name, "implementation": implementation, "ran": ran[implementation],
                "us": 1e6 * median, "quartiles_us": [1e6 * low, 1e6 * high], "traffic_mb": moved / 1e6,
                "gb_per_s": moved / median / 1e9, "copy_pct": 100 * moved / median / (gb_per_s * 1e9),
                "ratio": ratios[1], "ratio_quartiles": [ratios[0], ratios[2]], "ratio_to": "reference",
                "sets": len(sets), "cold": len(sets) * size >= _CACHES * cache,
            }
        )  # fmt: skip
    return rows + missing


def _operand_sets(case: Case, shapes: Shapes, cache: int) -> list[Operands]:
    first = case.make(shapes)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    most = max(min(_MOST_SETS, _MOST_BYTES // size), 1)
    return [first, *(case.make(shapes) for _ in range(min(math.ceil(_CACHES * cache / size), most) - 1))]


def time_calls(
    calls: Mapping[str, Callable[..., object]],
    sets: list[Operands],
    device: torch.device,
    *,
    windows: int,
    window_s: float,
    progress: Progress = lambda what: None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of a call in each window, by name: windows take turns, and so do the sets in each of them.

    A window holds as many calls as fill `window_s`, found out by a first window that is not kept.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    numbers = dict.fromkeys(calls, 1)
    for i in range(windows + 1):
        for name, call in calls.items():
            progress(f"{name}: {f'window {i} of {windows}' if i else 'warm-up'}")
            order = itertools.cycle(sets)
            if not i:
                call(*next(order))
            synchronize(device)
            start = clock()
            for _ in range(numbers[name]):
                call(*next(order))
            synchronize(device)
            seconds = (clock() - start) / numbers[name]
            if i:
                found[name].append(seconds)
            else:
                numbers[name] = max(math.ceil(window_s / max(seconds, 1e-9)), 1)
    return found
