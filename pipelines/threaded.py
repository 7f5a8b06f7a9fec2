"""A decoder of single samples, run over whole batches by daemon threads.

Threads take chunks of a batch from one queue, and a batch may start before the one ahead of it has ended: no thread
idles at the end of a batch. Daemons, because a read that never returns (a dead network disk) must not keep the
process from ending.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

from fasttht.pipelines import DataError
from fasttht.pipelines.decoder import Cut, Decoded, Request
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.samples import Pixels, Sample, Samples
from fasttht.pipelines.stages import IDLE, Stages, Track

DecodeInto = Callable[[Sample, Cut, Pixels, Track], None]
"""Decode one sample into its slot (S, S, 3), telling the diary its stages. Raises: DataError for a bad sample."""

# Samples decoded by one task: amortises the hand-over (~20 us) for tiny images, still balances large ones.
_MAX_CHUNK = 16


class _ThreadedJob:
    """One batch in the hands of the threads."""

    def __init__(self, request: Request, memory: HostMemory) -> None:
        self.request = request
        self.pixels = memory.take(len(request.index))
        self.out: Pixels = self.pixels.numpy()
        self._bad: list[tuple[int, str]] = []
        self._error: BaseException | None = None
        self._left = len(request.index)
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not self._left:
            self._done.set()

    def finish(self, num: int, bad: list[tuple[int, str]], error: BaseException | None) -> None:
        """Note that `num` more samples are done with."""
        with self._lock:
            self._bad += bad
            self._error = self._error or error
            self._left -= num
            if not self._left:
                self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> Decoded:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return Decoded(self.pixels, tuple(sorted(self._bad)))


class ThreadedDecoder:
    """Runs `decode_into` over the rows of each request in `workers` threads.

    The threads start with the first request and end with `close`, or with the decoder's last reference.
    """

    def __init__(
        self, name: str, decode_into: DecodeInto, samples: Samples, memory: HostMemory, stages: Stages, *, workers: int
    ) -> None:
        self.name = name
        self._memory = memory
        self._workers = workers
        self._threads: list[threading.Thread] = []
        # The threads know the queue and not the decoder: a forgotten decoder can die, and then ends them.
        self._tasks: queue.SimpleQueue[tuple[_ThreadedJob, range] | None] = queue.SimpleQueue()
        self._arguments = (self._tasks, decode_into, samples, stages)
        self._finalizer = weakref.finalize(self, _end_threads, self._tasks, workers)
        self._finalizer.atexit = False

    def start(self, request: Request) -> _ThreadedJob:
        if not self._finalizer.alive:
            raise ValueError("decoder: expected an open one, got one that was closed")
        if not self._threads:
            for i in range(self._workers):
                thread = threading.Thread(target=_work, args=self._arguments, name=f"fasttht-decode-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)  # only those that run can be joined
        num = len(request.index)
        job = _ThreadedJob(request, self._memory)
        # At least two chunks for each thread, where there are enough samples.
        chunk = max(1, min(_MAX_CHUNK, num // (2 * self._workers)))
        for begin in range(0, num, chunk):
            self._tasks.put((job, range(begin, min(begin + chunk, num))))
        return job

    def close(self) -> None:
        self._finalizer()
        for thread in self._threads:
            thread.join(timeout=1)  # one that is stuck in a read is left behind, see above


def _end_threads(tasks: queue.SimpleQueue[tuple[_ThreadedJob, range] | None], workers: int) -> None:
    for _ in range(workers):
        tasks.put(None)


def _work(
    tasks: queue.SimpleQueue[tuple[_ThreadedJob, range] | None],
    decode_into: DecodeInto,
    samples: Samples,
    stages: Stages,
) -> None:
    track = stages.track()
    while (task := tasks.get()) is not None:
        job, positions = task
        bad: list[tuple[int, str]] = []
        problem: BaseException | None = None
        try:
            for position in positions:
                row = int(job.request.index[position])
                track.enter("read", row)
                try:
                    sample = samples.sample(row)
                    decode_into(sample, job.request.cut(position), job.out[position], track)
                except DataError as error:
                    bad.append((position, str(error)))
        except BaseException as error:  # handed to whoever waits for the job: an error must never become a hang
            problem = error
        job.finish(len(positions), bad, problem)
        track.enter(IDLE)
        del job, task  # a waiting thread must not keep the last batch's memory from being used again
    stages.leave()
