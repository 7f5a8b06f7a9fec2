"""What can go wrong for a user, and the exit code of each. Anything else is a bug and exits with 1."""

from __future__ import annotations

import signal


class FastthtError(Exception):
    """Base of the errors that end a command with one line and no traceback; `told`: another process says the line."""

    exit_code: int = 1
    told: bool = False


def is_shortage(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: Python's, or by its words torch's, cuDNN's or cuBLAS's."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


class UsageError(FastthtError):
    """A flag, preset or configuration file asks for something that cannot be."""

    exit_code = 2


class CheckpointError(FastthtError):
    """A checkpoint is damaged, or belongs to another run."""

    exit_code = 4


class NonFiniteError(FastthtError):
    """The loss or a gradient became infinite or NaN; the weights of the last good checkpoint are kept."""

    exit_code = 5


class PeerError(FastthtError):
    """Another process of the run is dead, too slow, or ended by an error of its own."""

    exit_code = 6

    def __init__(self, text: str, *, told: bool = False) -> None:
        super().__init__(text)
        self.told = told


class MemoryShortError(FastthtError):
    """A device or the host has too little memory for what was to be done at once."""

    exit_code = 6


class Interrupted(FastthtError):
    """A signal ended all ranks together: 130 for Ctrl-C, 75 (try again) for SIGTERM and SIGUSR2."""

    def __init__(self, number: signal.Signals, what: str) -> None:
        super().__init__(f"{number.name} {what}")
        self.exit_code = 130 if number == signal.SIGINT else 75
