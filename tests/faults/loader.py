"""F10: a loader that dies: its threads raise, vanish or hang, in training and in evaluation. It ends, and says why."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Any

from fasttht import checkpoint
from fasttht.pipelines import DataError, threaded
from fasttht.pipelines import loader as loading
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.producer import Producer
from tests.faults import runs
from tests.faults.case import Context, Kind

# From step 35 it is five steps to an evaluation.
AT, UNTIL = 35, 50
STALLED = "expected a batch within 1 s, got none"


def _raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def _hangs() -> None:
    time.sleep(1000)


def _ends() -> None:
    raise SystemExit  # the one exception of which a thread says nothing


Prepare = Callable[[str, int], None]


def _in_a_read(what: Callable[[], None]) -> Prepare:
    """Let it happen in a decoding thread, when a file's sample of some number is read."""

    def prepare(file: str, number: int) -> None:
        sample, count = BetonFile.sample, [0]

        def read(self: BetonFile, i: int) -> Any:
            count[0] += self.path.name == file
            if count[0] > number and self.path.name == file:
                what()
            return sample(self, i)

        BetonFile.sample = read  # type: ignore[method-assign]

    return prepare


class _Watched:
    """A queue that something happens at, once it was used so often."""

    def __init__(self, queue: Any, uses: int, what: Callable[[], None]) -> None:
        self._queue, self._left, self._what = queue, uses, what

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def get(self) -> Any:
        task = self._queue.get()
        self._use(task)
        return task

    def put(self, item: Any, *arguments: Any, **options: Any) -> None:
        self._use(item)
        self._queue.put(item, *arguments, **options)

    def _use(self, item: Any) -> None:
        self._left -= 1
        if self._left < 0 and item is not None:
            self._what()


def _in_a_worker(what: Callable[[], None]) -> Prepare:
    """Let it happen to a decoding thread that has taken its task and not begun."""

    def prepare(file: str, number: int) -> None:
        work = threaded._work

        def harmed(tasks: Any, decode_into: Any, samples: Any, stages: Any) -> None:
            own = samples.path.name == file
            work(_Watched(tasks, number // 16, what) if own else tasks, decode_into, samples, stages)  # type: ignore[arg-type]

        threaded._work = harmed

    return prepare


def _in_the_producer(what: Callable[[], None]) -> Prepare:
    """Let it happen to the loader's own thread, in the place of a batch."""

    def prepare(file: str, number: int) -> None:
        run = Producer.run

        def harmed(self: Producer, step: int, ready: Any, stop: Any) -> None:
            own = self._samples.path.name == file
            run(self, step, _Watched(ready, number // 180, what) if own else ready, stop)  # type: ignore[arg-type]

        Producer.run = harmed  # type: ignore[method-assign]

    return prepare


def _no_thread(file: str, number: int) -> None:
    """No further thread: the machine's limit of them is reached when the decoder begins."""
    start = loading.threading.Thread.start

    def refuse(self: Any) -> None:
        if self.name.startswith("fasttht-decode"):
            raise RuntimeError("can't start new thread")
        start(self)

    loading.threading.Thread.start = refuse  # type: ignore[method-assign]


# What happens, the exit code, and what must be said. 99: an unforeseen error leaves the command with its trace.
FAULTS: list[tuple[str, Prepare, int, str]] = [
    ("a read fails", _in_a_read(_raises(OSError(errno.EIO, os.strerror(errno.EIO), "x.beton"))), 6, "x.beton"),
    ("a sample is bad", _in_a_read(_raises(DataError("expected bytes, got none"))), 3, "expected bytes, got none"),
    ("no memory", _in_a_read(_raises(MemoryError("got none"))), 6, "memory"),
    ("an error that nobody foresaw", _in_a_read(_raises(ZeroDivisionError("of a codec"))), 99, "of a codec"),
    ("a read hangs", _in_a_read(_hangs), 6, STALLED),
    ("a decoding thread is gone", _in_a_worker(_ends), 6, STALLED),
    ("a decoding thread hangs", _in_a_worker(_hangs), 6, STALLED),
    ("the loader's thread is gone", _in_the_producer(_ends), 6, STALLED),
    ("the loader's thread hangs", _in_the_producer(_hangs), 6, STALLED),
    ("no thread can be started", _no_thread, 6, "thread"),
]
PLACES = (("standard fp32", "train.beton"), ("free fp32", "train.beton"), ("standard fp32", "val.beton"))


def dead(number: int, at: Context) -> str:
    what, harm, code, words = FAULTS[number % len(FAULTS)]
    mode, file = PLACES[number // len(FAULTS)]
    base = runs.baseline(mode, at.shared)
    run = at.folder / "run"
    runs.begin_from(base, AT, run)

    def prepare() -> None:
        loading._END_S = 0.2
        # Into the second batch of an evaluation, or some batches into the training that is left of the pass.
        harm(file, 200 if file == "val.beton" else 300)

    stalls = ["--stall-timeout", "1"] if words == STALLED else []
    said = runs.call([*runs.command(mode, run), *stalls], at.folder, prepare)
    what = f"{mode}, {file}: {what}"
    if code == 99:
        assert said[0] == code, f"{what}: exit {said[0]}: {said[2][-600:]}"
        assert "ZeroDivisionError: of a codec" in said[2].splitlines()[-1], said[2][-600:]
        line = "its trace"
    else:
        line = runs.one_line(said, code)
        assert words in line, f"{what}: {line}"
    for folder in checkpoint.listing(run):
        checkpoint.verify(folder)
    code = runs.train(runs.command(mode, run), run, until=UNTIL)
    assert code == 0, f"{what}: resumed: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    runs.same(run, base.snapshot(UNTIL))
    return f"{what}: exit {said[0]}, {line[:120]}"


KIND = Kind(
    "loader",
    len(FAULTS) * len(PLACES),
    "a loader whose threads raise, vanish or hang: exit 3 or 6 in one line, an unforeseen error with its trace; then "
    "the same bytes",
    "the runs of kill in fp32 from step 35, in training and in evaluation, resumed to step 50",
    dead,
)
