"""How the benchmarks measure: windows in turn, medians with quartiles, everyone on the same cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Clock = Callable[[], float]
Progress = Callable[[str], None]

# Batches let pass before a window opens. Each of the first ones lands in fresh memory, whose page faults cost up to a
# third of the speed; an epoch of ImageNet never notices. Stock FFCV has five slots for batches, our loader up to six.
_LEAD = 6


class Candidate(Protocol):
    """Something that delivers batches."""

    name: str
    batch_size: int

    def batches(self) -> Generator[int]:
        """Start, and yield the size of each batch as it arrives, without end; closing it leaves nothing running."""
        ...

    def seconds(self) -> dict[str, float]:
        """Return the thread seconds of each stage so far; empty if it keeps no such diary."""
        ...


@dataclass(frozen=True)
class Window:
    """What one candidate did in one window. stages: thread seconds by stage."""

    images: int
    seconds: float
    stages: dict[str, float]


def measure_window(candidate: Candidate, seconds: float, clock: Clock = time.perf_counter) -> Window:
    """Let a candidate work for at least `seconds`, from one delivery to another, and leave it at rest."""
    with closing(candidate.batches()) as batches:
        for _ in range(_LEAD):
            next(batches)
        before, images = candidate.seconds(), 0
        start = end = clock()
        while end - start < seconds or not images:
            images += next(batches)
            end = clock()
        after = candidate.seconds()
    return Window(images, end - start, {stage: after[stage] - before.get(stage, 0.0) for stage in after})


def interleave(
    candidates: Sequence[Candidate],
    num_windows: int,
    seconds: float,
    clock: Clock = time.perf_counter,
    progress: Progress = lambda what: None,
) -> dict[str, list[Window]]:
    """Give every candidate its window i before any its window i + 1."""
    found: dict[str, list[Window]] = {candidate.name: [] for candidate in candidates}
    for i in range(num_windows):
        for candidate in candidates:
            progress(f"{candidate.name}: window {i + 1} of {num_windows}")
            found[candidate.name].append(measure_window(candidate, seconds, clock))
    return found


def probe(
    candidate: Candidate, batch_sizes: Iterable[int], seconds: float, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Leave a candidate with the batch size that it is fastest with; return img/s of each, the better of two windows.

    The better and not the mean: a peer must not lose its best size to what else the machine did in one window.
    """
    found = dict.fromkeys(batch_sizes, 0.0)
    for batch_size in [*found, *found]:
        candidate.batch_size = batch_size
        window = measure_window(candidate, seconds, clock)
        found[batch_size] = max(found[batch_size], window.images / window.seconds)
    candidate.batch_size = max(found, key=lambda batch_size: found[batch_size])
    return {str(batch_size): speed for batch_size, speed in found.items()}


def stage_speeds(windows: Iterable[Window]) -> dict[str, float]:
    """Return the img/s that one thread would reach if it did nothing but this stage, by stage.

    From the time on the threads' clocks: where they are more than the cores, it includes waiting for one.
    """
    windows = list(windows)
    images = sum(window.images for window in windows)
    names = dict.fromkeys(stage for window in windows for stage in window.stages)
    spent = {name: sum(window.stages.get(name, 0.0) for window in windows) for name in names}
    return {name: images / seconds for name, seconds in spent.items() if seconds > 0}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile, interpolated between the two nearest values."""
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75)).tolist()
    return low, median, high


@contextmanager
def pinned(num_cores: int) -> Iterator[int]:
    """Keep every thread of this process, and those it starts, on `num_cores` of its cores; yield how many there are.

    Afterwards, after an error too, all may run where they might before.
    """
    allowed = os.sched_getaffinity(0)
    before = {thread: found for thread in _threads() if (found := _affinity(thread)) is not None}
    cores = set(sorted(allowed)[:num_cores])
    try:
        for thread in _threads():
            _pin(thread, cores)
        yield len(cores)
    finally:
        for thread in _threads():
            _pin(thread, before.get(thread, allowed))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _affinity(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:  # it has just ended
        return None


def _pin(thread: int, cores: set[int]) -> None:
    with suppress(ProcessLookupError):
        os.sched_setaffinity(thread, cores)
