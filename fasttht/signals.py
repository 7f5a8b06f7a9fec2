"""Stopping a run. What SIGINT, SIGTERM and SIGUSR2 (a batch system's warning) do depends on where they arrive.

In a training step or a checkpoint   noted; the step, attack and replays included, and the checkpoint are finished
                                     (`stop_signals`): an abandoned step would have to give back what it has drawn,
                                     counted and normalised.
In an evaluation                     noted, and seen between two attack steps (`interruptible`, `check`).
Anywhere else in a command           SIGTERM and SIGUSR2 end it there, as Ctrl-C does (`ending`).

A second signal does not wait; of torchrun's workers none counts as a second one for _ECHO_S: torchrun passes on what a
batch system may have sent to them as well. Forked workers have these handlers too, and ignore the signals: their parent
decides.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

# How long after a signal another one may be the same one, come by another way, in seconds.
_ECHO_S = 5.0
_echo_until = 0.0


class Stop:
    """Which signal asked to stop, or None."""

    signal: signal.Signals | None = None


class Stopped(Exception):
    """Raised by `check`; signal is the one that was noted, here or by another rank."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR2 outside of a training loop. Like KeyboardInterrupt, no `except Exception` swallows it."""


# What `check` looks at; None outside of `interruptible`.
_open: Stop | None = None


def _heard() -> bool:
    """Note that a signal has come; return whether it may be the last one again."""
    global _echo_until
    now = time.monotonic()
    if now < _echo_until:
        return True
    _echo_until = now + _ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    return False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note the first signal instead of dying; the handlers that were there come back with it, or at the end.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in _STOPS}
    own = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        global _echo_until
        if os.getpid() != own or _heard():
            return
        first, stop.signal = stop.signal is None, stop.signal or signal.Signals(number)
        if first and _echo_until:
            return
        for each, handler in before.items():
            signal.signal(each, handler)
        if not first:
            _echo_until = 0.0
            os.kill(own, number)  # to the handler that is there now

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """Let `check` raise Stopped in here, once `stop` has noted a signal: for work that changes no state."""
    global _open
    before, _open = _open, stop
    try:
        yield
    finally:
        _open = before


def check() -> None:
    """Raise Stopped if this is inside of `interruptible` and a signal was noted; costs a comparison otherwise."""
    if _open is not None and _open.signal is not None:
        raise Stopped(_open.signal)


@contextmanager
def ending() -> Iterator[None]:
    """Raise Terminated wherever SIGTERM or SIGUSR2 arrive in here, unless `stop_signals` notes them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPS[1:]}
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own and not _heard():
            raise Terminated(signal.Signals(number).name)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
