"""How ranks that work on parts of their own stop together: at a signal to any of them, all after the same part."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from fasttht.distributed import World
from fasttht.signals import Stop, Stopped, check, interruptible


class Meeting:
    """A context in which `signals.check` raises Stopped, on no rank without all the others.

    parts: how many times all ranks meet, the largest number of parts of any; leaving meets as often as is left. lag:
    how many parts a rank may be ahead of the slowest. A wait is for two parts of another rank at most, however many
    there are: gloo runs two asks at a time, and counts the time of each from there.

    Raises: Stopped, on all ranks, from `meet` or when left.
    """

    def __init__(self, world: World, stop: Stop, parts: int, *, lag: int = 0) -> None:
        self._world, self._stop, self._left, self._lag = world, stop, parts, lag
        self._pending: deque[Callable[[], int]] = deque()
        self._agreed = False
        self._inside = ExitStack()

    def __enter__(self) -> Meeting:
        if self._left:
            self._inside.enter_context(interruptible(self._stop))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._inside.close()
        if self._world.size > 1 and (error is None or (isinstance(error, Stopped) and not self._agreed)):
            while self._left:
                self.meet()
            while self._pending:
                self._hear()

    def meet(self) -> None:
        """Say that a part is done, and hear whether a rank was told to stop. Raises: Stopped."""
        if self._world.size == 1:
            return check()
        self._pending.append(self._world.ask("stop signals", int(self._stop.signal or 0)))
        self._left -= 1
        if not self._left:  # nobody would hear of a part that is broken off from here on
            self._inside.close()
        if len(self._pending) > self._lag:
            self._hear()
        return None

    def _hear(self) -> None:
        told = self._pending.popleft()()
        if told:
            self._agreed = True
            while self._pending:  # all ranks have asked as often
                self._pending.popleft()()
            raise Stopped(signal.Signals(told))
