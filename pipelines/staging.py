"""Where an unfinished data set lies: a hidden folder inside the output, one per process, locked while it is written.

The lock is the kernel's, so a killed process holds none: what it left is told from what another is writing, and can
be taken over by a later process on any machine that sees the folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fasttht.pipelines import DataError
from fasttht.pipelines.journal import journal_path
from fasttht.pipelines.manifest import sync

_PREFIX = ".fasttht-partial-"
_LOCK = "lock"
_TRIES = 100


@contextmanager
def staged(output: Path, *, resume: bool, force: bool) -> Iterator[Path]:
    """Give the folder to write in; it goes at the end of the block, or after an error if it holds nothing of worth.

    Of worth are finished files and journals: `resume` takes such a folder over from a process that has ended,
    `force` alone removes it, without either it is refused. A folder that another process holds is left alone.

    Raises: DataError.
    """
    existed = output.exists()
    staging, lock = _open_staging(output, resume=resume, force=force)
    try:
        yield staging
    except BaseException:
        if not is_of_worth(staging):
            shutil.rmtree(staging, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    output.rmdir()  # succeeds only where it is empty
        raise
    else:
        shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(lock)


def is_of_worth(staging: Path) -> bool:
    """Tell whether a folder holds work that would be lost with it."""
    betons = (path.with_suffix("") if path.suffix == ".journal" else path for path in staging.glob("*.beton*"))
    return any(beton.suffix == ".beton" and (beton.exists() or journal_path(beton).exists()) for beton in betons)


def _open_staging(output: Path, *, resume: bool, force: bool) -> tuple[Path, int]:
    left, busy = [], []
    for folder in sorted(output.glob(f"{_PREFIX}*")):
        lock = _lock(folder)
        if lock is None:
            busy.append(folder)
        elif is_of_worth(folder) and (resume or not force):
            left.append((folder, lock))
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    if left and resume:
        (folder, lock), *others = sorted(left, key=lambda pair: pair[0].stat().st_mtime, reverse=True)
        for other, its_lock in others:
            shutil.rmtree(other, ignore_errors=True)
            os.close(its_lock)
        return folder, lock
    for _, lock in left:
        os.close(lock)
    if left:
        raise DataError(f"{left[0][0]}: expected no unfinished write, got one; add --resume, or --force to start anew")
    if busy and resume:
        raise DataError(f"{busy[0]}: expected an unfinished write to resume, got one that another process is at")
    return _make_staging(output)


def _make_staging(output: Path) -> tuple[Path, int]:
    staging = output / f"{_PREFIX}{socket.gethostname()}-{os.getpid()}"
    for _ in range(_TRIES):  # a process that clears up may take the folder before it is locked
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{output}: expected a folder to write to, got {error.strerror}") from None
        lock = _lock(staging)
        if lock is not None:
            for folder in (output, output.absolute().parent):  # which hold the new names
                with suppress(OSError):  # one above may not be ours to open
                    sync(folder)
            return staging, lock
        time.sleep(0.01)
    raise DataError(f"{staging}: expected to lock this folder, got another process in it; choose another output")


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if another process holds it, or has just removed it."""
    descriptor = -1
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(folder / _LOCK).st_ino:
            return descriptor
    except OSError:
        pass
    if descriptor >= 0:
        os.close(descriptor)
    return None
