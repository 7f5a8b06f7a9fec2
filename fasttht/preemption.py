"""What stays of a preemption under torchrun, whose own exit code says nothing of it: a file in the run folder.

torchrun ends with 1 after any signal, and restarts workers that exit with 75 (`--max-restarts`). So a batch script
looks for the file, and a worker that was restarted and finds the file of this very launch exits again. A new launch
removes it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasttht.signals import Terminated

MARKER = "preempted"


def launch() -> str | None:
    """Return a name of this start of torchrun, also after it restarted its workers; None without torchrun."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    run, *job = (os.environ.get(name, "") for name in names)
    return " ".join([run, *job]).strip() if run else None


def mark(folder: Path, number: signal.Signals) -> None:
    """Leave the file, under torchrun; Ctrl-C is no preemption."""
    name = launch()
    if name is not None and number != signal.SIGINT:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(f"{name}\n")


def again(folder: Path) -> bool:
    """Return whether torchrun restarted this process after a preemption; if not, remove the file of an older launch."""
    file, restarts = folder / MARKER, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and file.exists() and file.read_text().strip() == launch():
        return True
    file.unlink(missing_ok=True)
    return False


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Leave the file also for a signal that comes before there is a step to finish, or that does not wait for it."""
    try:
        yield
    except Terminated:
        if os.environ.get("RANK", "0") == "0":
            mark(folder, signal.SIGTERM)
        raise
