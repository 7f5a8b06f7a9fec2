"""Names for the parts of a step, so that a benchmark can time and trace them where they are written.

A region costs two calls and a comparison while nobody watches (0.6 us on a slow core, fifty to two hundred times in a
PGD-10 step), and does nothing else: no torch here, no waiting. A function is one by `@region("optimizer")`, a few lines
are one by `with region("attack_update"):`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from itertools import islice
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Watcher(Protocol):
    """What is told of regions, in the order in which they are entered and left; they nest."""

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...


_watcher: Watcher | None = None


class region(ContextDecorator):
    """A named part of a step; one object may be entered again while it is open, because it keeps nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _watcher is not None:
            _watcher.enter(self.name)

    def __exit__(self, *error: object) -> None:
        if _watcher is not None:
            _watcher.leave()


def waited_for(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; the time until each is there is the region `data_wait`."""
    iterator = iter(items)
    while True:
        with region("data_wait"):
            found = list(islice(iterator, 1))
        if not found:
            return
        yield found.pop()  # and nothing of it is kept while the next is waited for


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of every region entered inside; around whole steps only. Nobody watched before or after.

    Raises: RuntimeError if there is a watcher already.
    """
    global _watcher
    if _watcher is not None:
        raise RuntimeError("regions: expected no watcher yet, got a second one; let the first one end")
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None
