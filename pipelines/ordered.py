"""Work spread over threads, results in the order of the items: what follows cannot tell how many threads there were."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Items under way per worker: enough that one slow image does not stop the others, few enough to hold in memory.
_WINDOW = 4


def count_workers(workers: int) -> int:
    """Return how many threads `workers` means: 0 is one per core that this process may use. Raises: ValueError."""
    if workers < 0:
        raise ValueError(f"workers: expected 0 (one per core) or more, got {workers}")
    return workers or len(os.sched_getaffinity(0))


def map_ordered(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """Yield work(item) for every item, in order, with at most `_WINDOW` items per worker under way.

    Threads and not processes: decoding, encoding, checksums and reading release the interpreter's lock, and a
    thread cannot die without its exception. That exception is raised at its item's place, as in a plain loop.
    One worker is a plain loop.
    """
    if workers == 1:
        yield from map(work, items)
        return
    under_way: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="fasttht-write") as pool:
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                if len(under_way) == _WINDOW * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
