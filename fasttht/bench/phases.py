"""Where one training step's time goes: the regions named in the step, timed in windows of their own.

The headline's windows run with nobody watching. Here every entry into and exit from a region puts a stamp on the
timeline, the clock's on a CPU and an event in the stream on CUDA, and the time between two stamps belongs to the
innermost region open there: phases are disjoint, and with `other` they add up to the watched step by construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fasttht.bench.jobs import Job, synchronize
from fasttht.bench.windows import Clock, Progress, quartiles
from fasttht.regions import watched

# In the order of a step. A phase is what regions inside it leave of it: attack is its draws, and all of an attack that
# is replayed from a recording; attack_gradient is all of a compiled engine's gradient; train_step is what a recorded
# training step has in one piece; comm is the exchange with other processes where the step waits for it.
PHASES = (
    "data_wait", "clean_encoder", "attack_refresh", "attack", "attack_gradient", "attack_forward", "attack_backward",
    "attack_update", "train_step", "train_forward", "train_backward", "optimizer", "bank", "comm", "other",
)  # fmt: skip
OTHER = "other"
NOTES = {
    "data_wait": "0: the images lie on the device; --data has them loaded",
    "comm": "0: one process",
}

Stamp = Any  # seconds, or a CUDA event


class Timeline:
    """A watcher that remembers when each region was entered and left. stamp: takes the time, without waiting."""

    def __init__(self, stamp: Callable[[], Stamp]) -> None:
        self._stamp = stamp
        self._open = [OTHER]
        self._stretches: list[tuple[str, Stamp]] = []
        self._start: Stamp = None

    def start(self) -> None:
        self._start = self._stamp()

    def enter(self, name: str) -> None:
        self._cut()
        self._open.append(name)

    def leave(self) -> None:
        self._cut()
        self._open.pop()

    def stop(self) -> None:
        self._cut()

    def _cut(self) -> None:
        """End a stretch of time, and give it to the innermost region that is open."""
        self._stretches.append((self._open[-1], self._stamp()))

    def milliseconds(self, between: Callable[[Stamp, Stamp], float]) -> dict[str, float]:
        """Return the milliseconds of each region, those inside it left out; all stamps must have happened."""
        found: dict[str, float] = {}
        before = self._start
        for name, stamp in self._stretches:
            found[name] = found.get(name, 0.0) + between(before, stamp)
            before = stamp
        return found


class _Events:
    """Stamps of a CUDA device. Inside a capture there are none: an event would become part of the graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Stamp = None

    def __call__(self) -> Stamp:
        if self._last is None or not torch.cuda.is_current_stream_capturing():
            self._last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._last.record(torch.cuda.current_stream(self._device))
        return self._last


def _between_events(first: Stamp, second: Stamp) -> float:
    return 0.0 if first is second else float(first.elapsed_time(second))


def time_phases(job: Job, device: torch.device, *, clock: Clock = time.perf_counter) -> tuple[dict[str, float], float]:
    """Run a warm step under watch; return milliseconds by region, and how long the host took to ask for it all.

    On a CPU the second is the step itself. On CUDA a host that takes as long as the step is what the device waits for.
    """
    on_gpu = device.type == "cuda"
    timeline = Timeline(_Events(device) if on_gpu else clock)
    synchronize(device)
    with watched(timeline):
        start = clock()
        timeline.start()
        job()
        timeline.stop()
        host = 1000 * (clock() - start)
    synchronize(device)
    between = _between_events if on_gpu else lambda first, second: 1000 * (second - first)
    return timeline.milliseconds(between), host


def break_down(
    jobs: Mapping[str, Job],
    device: torch.device,
    *,
    windows: int,
    progress: Progress = lambda what: None,
    clock: Clock = time.perf_counter,
    lead: int = 0,
) -> dict[str, dict[str, Any]]:
    """Watch every job `windows` times in turn; return, by name, its phases as `summarise` gives them.

    lead: calls before each that is watched, until what lies ready from the job before it is used up.
    """
    found: dict[str, list[tuple[dict[str, float], float]]] = {name: [] for name in jobs}
    for i in range(windows):
        for name, job in jobs.items():
            progress(f"{name}: phases, window {i + 1} of {windows}")
            for _ in range(lead):
                job()
            found[name].append(time_phases(job, device, clock=clock))
    return {name: summarise(own) for name, own in found.items()}


def summarise(watches: Sequence[tuple[dict[str, float], float]]) -> dict[str, Any]:
    """Return the watched step's median milliseconds, host_ms, and a row for every phase.

    ms: the median over windows. pct: the share of all the watched time, so that the shares sum to 100. A region that
    PHASES does not know gets a row behind them.
    """
    totals = [sum(own.values()) for own, _ in watches]
    names = dict.fromkeys([*PHASES, *(name for own, _ in watches for name in own)])
    rows = []
    for name in names:
        own = [watch.get(name, 0.0) for watch, _ in watches]
        row: dict[str, Any] = {"name": name, "ms": quartiles(own)[1], "pct": 100 * sum(own) / max(sum(totals), 1e-12)}
        if name in NOTES and not any(own):
            row["note"] = NOTES[name]
        rows.append(row)
    return {
        "watched_ms": quartiles(totals)[1],
        "host_ms": quartiles([host for _, host in watches])[1],
        "phases": rows,
    }
