"""How fast images get from the file to the device: our decoders and their peers, in one run, on the same cores.

A candidate's figure is the median over windows that are interleaved with everyone else's, so that whatever else the
machine does meets all of them. Nothing is estimated: what did not run has a reason where its figure would be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttht.bench.env import environment
from fasttht.bench.overlap import measure_slowdown
from fasttht.bench.peers import FFCV_BATCH_SIZES, FFCV_STOCK, open_candidate, unable, version
from fasttht.bench.windows import (
    Candidate,
    Progress,
    Window,
    interleave,
    measure_window,
    pinned,
    probe,
    quartiles,
    stage_speeds,
)
from fasttht.errors import UsageError
from fasttht.pipelines import DataError
from fasttht.pipelines.beton import BetonFile

# Processes started to measure the time to the first batch, and how long one may take.
_STARTS, _START_LIMIT_S = 3, 300.0

# Nothing optional is in these: where they fail, it is our bug and not a row of a table.
_OURS = ("turbo", "synthetic")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. data: a .beton, a folder with train.beton, or None for the benchmark's photographs.

    windows: per candidate and number of workers, each at least window_s seconds. slowdown None: on CUDA only.
    """

    data: Path | None
    loaders: tuple[str, ...]
    workers: tuple[int, ...]
    batch_size: int
    img_size: int
    windows: int
    window_s: float
    cpu: bool = False
    first_batch: bool = True
    slowdown: bool | None = None


def described(settings: Settings) -> dict[str, Any]:
    """Return the report's settings."""
    device = "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"
    names = ("workers", "batch_size", "img_size", "windows", "window_s")
    return {name: getattr(settings, name) for name in names} | {"device": device}


def measure(
    settings: Settings,
    progress: Progress = lambda what: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. `progress` is told what is being measured.

    keep: gets the report whenever it has grown; what follows may take minutes.

    Raises: DataError for the data.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
    threads = torch.get_num_threads()
    # A worker is one thread: torch's own pool under each of them would fight them over the same cores.
    torch.set_num_threads(1)
    try:
        report: dict[str, Any] = {"bench": "load", "env": environment(device)}
        beton, report["data"] = _find_data(settings.data)
        report["settings"] = described(settings)
        report["rows"], report["skipped"] = [], []
        for workers in settings.workers:
            report["rows"] += _rows(settings, beton, device, workers, progress)
            keep(report)
        able = list(dict.fromkeys(row["name"] for row in report["rows"] if "img_per_s" in row))
        _more(report, settings, beton, device, able, progress, keep)
    finally:
        torch.set_num_threads(threads)
    return report


def _more(
    report: dict[str, Any],
    settings: Settings,
    beton: Path,
    device: torch.device,
    names: list[str],
    progress: Progress,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Add what is measured besides speed, with all cores and the largest number of workers, or why it is not."""
    options: dict[str, Any] = {
        "workers": max(settings.workers), "batch_size": settings.batch_size, "img_size": settings.img_size,
    }  # fmt: skip
    if settings.first_batch:
        code = "from fasttht.bench.peers import deliver_one; deliver_one({!r}, {!r}, **{!r})"
        own = {**options, "device": str(device)}
        codes = {name: code.format(name, str(beton.resolve()), own) for name in names}
        report["first_batch"] = first_batch_times(codes, progress)
        keep(report)
    else:
        report["skipped"].append("time to the first batch: as asked")
    if settings.slowdown or (settings.slowdown is None and device.type == "cuda"):
        # Synthetic batches cost nothing to make: fetched at full speed they would only show how Python threads contend.
        decoders = [name for name in names if name not in (FFCV_STOCK, "synthetic")]
        candidates = [open_candidate(name, beton, device=device, **options) for name in decoders]
        report["attack"] = measure_slowdown(
            candidates, device, windows=settings.windows, seconds=settings.window_s, progress=progress, **options
        )
    else:
        why = "as asked" if settings.slowdown is False else "no CUDA device in this run; --slowdown takes the CPU"
        report["skipped"].append(f"slowdown of the attack: {why}")


# -- img/s -------------------------------------------------------------------------------------------------------------


def _rows(
    settings: Settings, beton: Path, device: torch.device, workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """Measure every candidate with this many workers on as many cores; a row for each, in the order asked for."""
    candidates: list[Candidate] = []
    ready: list[Candidate] = []
    reasons: dict[str, str] = {}
    probed: dict[str, float] = {}
    # Opened on all cores: numba takes the number it finds at its import for the most there will ever be.
    for name in settings.loaders:
        if (reason := unable(name, device)) is not None:
            reasons[name] = reason
            continue
        try:
            candidates.append(
                open_candidate(
                    name, beton, workers=workers, batch_size=settings.batch_size, img_size=settings.img_size,
                    device=device,
                )
            )  # fmt: skip
        except Exception as error:
            reasons[name] = _reason(name, error)
    with pinned(workers) as cores:
        for candidate in candidates:
            progress(f"{candidate.name}, workers {workers}: warm-up")
            try:
                if candidate.name == FFCV_STOCK:
                    measure_window(candidate, 0.0)  # it compiles
                    probed = probe(candidate, FFCV_BATCH_SIZES, settings.window_s)
                else:
                    measure_window(candidate, settings.window_s)
                ready.append(candidate)
            except Exception as error:
                reasons[candidate.name] = _reason(candidate.name, error)
        windows = interleave(ready, settings.windows, settings.window_s, progress=progress)
    rows = summarise(windows, workers)
    for row, candidate in zip(rows, ready, strict=True):
        row |= {"batch_size": candidate.batch_size, "cores": cores, "version": version(candidate.name)}
        if candidate.name == FFCV_STOCK:
            row["probed_batch_sizes"] = probed
    rows += [{"name": name, "workers": workers, "not_run": reason} for name, reason in reasons.items()]
    return sorted(rows, key=lambda row: settings.loaders.index(row["name"]))


def _reason(name: str, error: Exception) -> str:
    """Put into words why a candidate failed. Raises: the error again if it is the data's fault, or ours."""
    if isinstance(error, DataError) or name in _OURS:
        raise error
    return " ".join(f"{type(error).__name__}: {error}".split())


def summarise(windows: dict[str, list[Window]], workers: int) -> list[dict[str, Any]]:
    """Return a row for each candidate; ratios are to stock FFCV's median, or to turbo's where that did not run."""
    reference = next((name for name in (FFCV_STOCK, "turbo") if name in windows), None)
    speeds = {name: [window.images / window.seconds for window in own] for name, own in windows.items()}
    rows = []
    for name, own in windows.items():
        low, median, high = quartiles(speeds[name])
        row: dict[str, Any] = {"name": name, "workers": workers, "img_per_s": median, "quartiles": [low, high]}
        if reference is not None:
            row |= {"ratio": median / quartiles(speeds[reference])[1], "ratio_to": reference}
        row |= {"windows": speeds[name], "stages": stage_speeds(own)}
        rows.append(row)
    return rows


# -- the first batch ---------------------------------------------------------------------------------------------------


def first_batch_times(codes: dict[str, str], progress: Progress) -> list[dict[str, Any]]:
    """Time processes that run `codes` from their start to their line, three times each, in turn.

    The first row is a process that imports torch and nothing else: what no loader can be faster than.
    """
    codes = {"import torch": "import os, torch; os.write(1, b'first batch\\n')", **codes}
    times: dict[str, list[float]] = {name: [] for name in codes}
    failed: dict[str, str] = {}
    for i in range(_STARTS):
        for name in [name for name in codes if name not in failed]:
            progress(f"{name}: first batch, start {i + 1} of {_STARTS}")
            found = time_to_line(codes[name])
            if isinstance(found, str):
                failed[name] = found
            else:
                times[name].append(found)
    return [
        {"name": name, "not_run": failed[name]}
        if name in failed
        else {"name": name, "seconds": quartiles(own)[1], "runs": own}
        for name, own in times.items()
    ]


def time_to_line(code: str) -> float | str:
    """Return the seconds from the start of `python -c code` to its line, or its last words if none came."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as child:
            limit = threading.Timer(_START_LIMIT_S, child.kill)
            limit.start()
            assert child.stdout is not None
            try:
                came = any(line == b"first batch\n" for line in child.stdout)
                seconds = time.perf_counter() - start
            finally:
                limit.cancel()
                child.kill()  # ending orderly takes some of them seconds
        errors.seek(0)
        words = errors.read().decode(errors="replace").strip().splitlines()
    if came:
        return seconds
    return words[-1] if words else f"no batch within {seconds:.0f} s, and not a word"


# -- what it was measured on -------------------------------------------------------------------------------------------


def _find_data(data: Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the .beton, and what the report says about it."""
    if data is None:
        try:
            from fasttht.pipelines.photographs import photographs
        except ModuleNotFoundError as error:
            install = "run: pip install opencv-python-headless pillow"
            raise UsageError(f"bench load: expected OpenCV and Pillow, got none ({error}); {install}") from None
        found = photographs()
        beton = found.beton
        origin: dict[str, Any] = {"source": "made-up" if found.made_up else "photographs", "cut_from": found.sources}
    else:
        beton = data / "train.beton" if data.is_dir() else data
        if not beton.exists():
            raise DataError(
                f"{data}: expected a .beton file or a folder with train.beton, got neither; "
                "write one with `fasttht data write`"
            )
        origin = {"source": str(data)}
    file = BetonFile(beton)
    sizes = np.stack(file.sizes(np.arange(len(file))), axis=1)
    return beton, {
        **origin,
        "images": len(file),
        "mean_bytes": float(file.stored()[1].mean()),
        "median_size": [int(side) for side in np.median(sizes, axis=0)],
        "fingerprint": file.fingerprint,
    }
