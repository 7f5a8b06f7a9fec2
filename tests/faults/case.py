"""What a kind of fault is to the runner, and how one of its cases is run: in a forked process, within a time limit."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Context:
    """Where a case works: `folder` is its own and empty, `shared` keeps uninterrupted runs. short: CI's slice.

    noted: what the case leaves for its kind's summary.
    """

    folder: Path
    shared: Path
    short: bool
    noted: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One finished case, and the code that it ran on."""

    kind: str
    number: int
    passed: bool
    said: str
    seconds: float
    short: bool
    commit: str
    date: str
    noted: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A kind of fault. run: number of the case -> a sentence on what was done; it raises where the product fails.

    criterion says what a case that passes has shown, `setting` what it ran on; summary: lines on all that passed;
    prepare: what is slow, done once in the process that the cases fork from.
    """

    name: str
    planned: int
    criterion: str
    setting: str
    run: Callable[[int, Context], str]
    limit_s: float = 120.0
    summary: Callable[[list[Result]], list[str]] = lambda results: []
    prepare: Callable[[], None] = lambda: None


def run_case(kind: Kind, number: int, shared: Path, *, short: bool, commit: str) -> Result:
    """Run one case in a process group of its own; a case that hangs is killed and has failed."""
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"{kind.name}-{number}-", dir=shared))
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        os.chdir(folder)
        at = Context(folder, shared, short)
        try:
            said, passed = kind.run(number, at), True
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
            passed = False
        answer = json.dumps([passed, said[:3000], at.noted]).encode()
        while answer:
            answer = answer[os.write(writer, answer) :]
        os._exit(0)
    os.close(writer)
    answer, found = b"", None
    deadline = start + kind.limit_s
    # Until it is whole: the pipe's end may be held open by what a case has left running.
    while found is None and (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0] or not (part := os.read(reader, 65536)):
            break
        answer += part
        with suppress(ValueError):
            found = json.loads(answer)
    os.close(reader)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # the group that this case has made, whatever is left of it
    os.waitpid(child, 0)
    seconds = round(time.monotonic() - start, 3)
    passed, said, noted = found or (False, f"no answer within {kind.limit_s:g} s, or it died", {})
    shutil.rmtree(folder, ignore_errors=True)
    return Result(kind.name, number, passed, said, seconds, short, commit, time.strftime("%Y-%m-%d"), noted)
