"""F5: a disk that is full, read-only or failing, at any file operation: exit 6, nothing half written, then the same."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace

from fasttht import checkpoint
from tests.faults import runs
from tests.faults.case import Context, Kind

AT, UNTIL = 40, 50
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.EDQUOT)


def disk(number: int, at: Context) -> str:
    mode = list(runs.MODES)[number // 4 % 2]
    base = runs.baseline(mode, at.shared)
    run, draw = at.folder / "run", random.Random(number)
    begun = AT if number // 8 % 3 else 0  # a third begins in a fresh folder, by every fault in either mode
    runs.begin_from(base, begun, run)
    before = checkpoint.listing(run)
    words = runs.command(mode, run)
    what, prepare = _fault(number, draw, str(run))
    code, out, err = runs.call(words, at.folder, prepare)
    if code == 0 and "at the" in what:
        raise AssertionError(f"{what}: was not reached")
    line = runs.one_line((code, out, err), 6)
    for folder in checkpoint.listing(run):
        checkpoint.verify(folder)
    assert not before or checkpoint.listing(run), "no checkpoint is left"
    left = [path.name for path in [*run.glob(".partial*"), *(run / "checkpoints").glob(".partial*")]]
    assert not left, f"{what}: left behind {left}"
    code = runs.train(words, run, until=UNTIL)
    assert code == 0, f"{what}, then exit {code}: {runs.tail(at.folder / 'said.txt')}"
    runs.same(run, base.snapshot(UNTIL))
    return f"{what}: {line[:100]}"


def _fault(number: int, draw: random.Random, own: str) -> tuple[str, Callable[[], None]]:
    """Return what breaks, and how a process breaks it for itself."""
    error = ERRORS[number // 4 % len(ERRORS)]
    name = errno.errorcode[error]
    after = draw.randint(1, 12)
    if number % 4 == 0:  # really: the kernel refuses to let a file grow beyond this
        size = draw.choice((25_000, 60_000, 90_000, 120_000))

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        return f"EFBIG at the byte {size} of any file", limit
    if number % 4 == 1:
        count = [0]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event not in ("open", "os.rename", "os.mkdir") or not str(arguments[0]).startswith(own):
                return
            writes = event != "open" or (isinstance(arguments[1], str) and arguments[1][:1] in ("w", "a", "x"))
            if writes:
                count[0] += 1
                if count[0] > after:
                    raise OSError(error, os.strerror(error), str(arguments[0]))

        return f"{name} at the file operation {after + 1}", lambda: sys.addaudithook(hook)
    if number % 4 == 2:
        fsync, calls = os.fsync, [0]

        def failing(handle: int) -> None:
            calls[0] += 1
            if calls[0] > after:
                raise OSError(error, os.strerror(error))
            fsync(handle)

        def replace() -> None:
            os.fsync = failing

        return f"{name} at the sync {after + 1}", replace

    def small() -> None:
        shutil.disk_usage = lambda path: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)  # type: ignore[assignment,misc]

    return "a disk with 1000 bytes left", small


KIND = Kind(
    "disk",
    60,
    "exit 6 in one line, checkpoints whole, nothing half written left; then the same bytes",
    "the runs of kill in fp32, from step 40 or the start, resumed to step 50; the errors are those of Python's file "
    "calls, but for a quarter: there the kernel refuses to let a file grow",
    disk,
)
