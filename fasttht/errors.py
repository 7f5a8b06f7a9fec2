"""What can go wrong for a user, and the exit code of each. Anything else is a bug and exits with 1."""

from __future__ import annotations

import signal


class FastthtError(Exception):
    """Base of the errors that end a command with one line and no traceback."""

    exit_code: int = 1


class UsageError(FastthtError):
    """A flag, preset or configuration file asks for something that cannot be."""

    exit_code = 2


class CheckpointError(FastthtError):
    """A checkpoint is damaged, or belongs to another run."""

    exit_code = 4


class NonFiniteError(FastthtError):
    """The loss or a gradient became infinite or NaN; the weights of the last good checkpoint are kept."""

    exit_code = 5


class Interrupted(FastthtError):
    """A signal ended the run between two steps, after a checkpoint: 130 for Ctrl-C, 75 (try again) for SIGTERM."""

    def __init__(self, number: signal.Signals, where: str) -> None:
        super().__init__(f"{number.name} after {where}, saved; the same command continues from there")
        self.exit_code = 130 if number == signal.SIGINT else 75
