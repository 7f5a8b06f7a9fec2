"""Runs of several processes that faults are injected into: 18 steps of a tiny network in ghost groups."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from fasttht import roll_call
from tests import ranks
from tests.faults import runs
from tests.ranks import Ranks, commands

# Two passes of 9 steps and an evaluation after each; slices of 2, 3 and 4 processes have whole ghost groups of 12.
STEPS, TIMEOUT_S = 18, 8.0
_TINY = [*runs.TINY, "--bn-group-size", "12"]
_TINY[_TINY.index("--batch-size") + 1] = "144"
STANDARD, FREE = [*_TINY, "--epochs", "2", "--steps", "1"], [*_TINY, "--epochs", "4", "--replay", "2"]


def command(run: Path, options: list[str] = STANDARD) -> list[str]:
    return ["train", *options, "--dist-timeout", f"{TIMEOUT_S:g}", "--output", str(run)]


def free_port() -> int:
    """Return a port below those that the system hands out by itself, so that only other cases could take it meanwhile.

    They begin to look elsewhere.
    """
    first = 12_000 + os.getpid() * 7919 % 18_000
    for port in range(first, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


ranks.free_port = free_port


def end_soon() -> None:
    """Make ranks that wait for one that is gone give up sooner than in a run of days."""
    roll_call._END_S = 5.0


def baseline(size: int, shared: Path, options: list[str] = STANDARD) -> Path:
    """Return the run of so many processes that nothing happened to, made at the first call."""

    def make(home: Path) -> None:
        finish(size, home / "run", home / "out", options)

    return runs.made(shared / f"{size}-processes-{'free' if options == FREE else 'standard'}", make) / "run"


def finish(size: int, run: Path, out: Path, options: list[str] = STANDARD) -> None:
    """Run to the end in so many processes."""
    started: Ranks = commands(size, out, lambda own: command(run, options))
    assert started.join(120) == [0] * size, [started.text(own) for own in range(size)]
