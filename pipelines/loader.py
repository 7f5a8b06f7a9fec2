"""Plan + samples + decoder -> batches on a device, decoded ahead.

One producer thread walks the plan, always with one batch in the decoder's hands beyond the one it waits for, copies
finished ones to the device on a stream of its own, and puts them into a queue of `prefetch` batches. The consumer's
stream waits for the copy's event, never the host. Whose memory a batch is, and when it is used again, stands in
`pipelines/host_memory.py`: a batch handed out is the consumer's to keep.

An exception in any thread is raised in the consumer, and so is a stall, with the stage and the sample that is stuck.
State is the position of the last batch *delivered*, so a resume neither repeats nor skips one, in O(1).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch

from fasttht.pipelines import DataError, ResourceError
from fasttht.pipelines.backends import open_decoder
from fasttht.pipelines.decoder import Decoder
from fasttht.pipelines.plan import EpochPlan
from fasttht.pipelines.producer import BadSample, Batch, Item, Producer, Ready
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.stages import Stages

__all__ = ["Batch", "Loader"]

STATE_VERSION = 2

# How often a waiting consumer is called back.
_WAIT_S = 0.5

# How long a closed loader waits for its producer. It ends within one sample, unless a read or a driver holds it.
_END_S = 5.0


class Loader:
    """Iterate over one epoch's remaining batches; iterating again continues with the next epoch.

    One iterator at a time: `close`, or a new one, ends an older one, whose `next` then raises ValueError.

    `plan` is the template: its seed, batch size, augmentation and rank hold for every epoch, its `epoch` is where
    the loader starts. `decoder` is the name of one of `backends.DECODERS`, with `workers` threads.

    size_of: the side of the images in each epoch, where it is not always img_size. It must be a function of the epoch
    alone, so that a resumed epoch is what it was; a new size opens the decoder anew.

    on_bad says what a sample does that cannot be read or decoded. error: it ends the epoch. replace: another row, which
    depends on (seed, epoch, row) alone, takes its place; `report` is called once with a sentence about each bad row,
    and more than `max_bad` different ones are an error. Evaluation (a plan without augmentation) always raises.

    stall_s: how many seconds without a batch mean that something is stuck. waiting: called every half second in which
    none has come; what it raises ends the epoch's iteration, between two batches.

    `wait_s` is the time the consumer has spent waiting for batches, in seconds; `stages` knows what the threads did.

    Raises: ValueError for the numbers; from the consumer's `next` DataError if a sample cannot be read or decoded,
    ResourceError on a stall.
    """

    def __init__(
        self,
        samples: Samples,
        plan: EpochPlan,
        *,
        img_size: int,
        size_of: Callable[[int], int] | None = None,
        device: torch.device | str = "cpu",
        decoder: str = "turbo",
        workers: int = 1,
        prefetch: int = 3,
        on_bad: Literal["error", "replace"] = "error",
        max_bad: int = 100,
        report: Callable[[str], None] | None = None,
        stall_s: float = 600.0,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        if workers < 1 or prefetch < 1:
            raise ValueError(f"loader: expected at least one worker and one batch ahead, got {workers} and {prefetch}")
        self.samples = samples
        self.plan = plan
        self.img_size = img_size  # of the epoch that was entered last
        self._size_of = size_of
        self.device = torch.device(device)
        self.stages = Stages()
        self.step = 0
        self.wait_s = 0.0
        self.bad_rows: set[int] = set()
        self._decoder_name, self._workers = decoder, workers
        self._decoder: Decoder | None = None
        self._active: tuple[threading.Event, Ready, threading.Thread] | None = None
        self._prefetch = prefetch
        self._replaces = on_bad == "replace" and plan.augment is not None
        self._max_bad = max_bad
        self._report = report
        self._stall_s, self._waiting = stall_s, waiting
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch that iterating will continue."""
        return self.plan.epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, then move to the start of the next."""
        if self._active is not None:
            _end(*self._active)
        if self._size_of is not None and (size := self._size_of(self.plan.epoch)) != self.img_size:
            self.close()
            self.img_size = size
        if self._decoder is None:
            self._decoder = open_decoder(
                self._decoder_name, self.samples, img_size=self.img_size, workers=self._workers,
                device=self.device, stages=self.stages,
            )  # fmt: skip
        producer = Producer(
            self.samples, self.plan, self._decoder, self.stages,
            img_size=self.img_size, device=self.device, stream=self._stream, replaces=self._replaces,
        )  # fmt: skip
        stop, ready = threading.Event(), Ready(maxsize=self._prefetch)
        thread = threading.Thread(
            target=producer.run, args=(self.step, ready, stop), name="fasttht-loader", daemon=True
        )
        self._active = stop, ready, thread
        thread.start()
        try:
            while (item := self._next(ready)) is not None:
                self._note(item.bad)
                self.step += 1
                yield self._deliver(item)
        finally:
            _end(stop, ready, thread)
        self.plan = replace(self.plan, epoch=self.plan.epoch + 1)
        self.step = 0

    def close(self) -> None:
        """End all threads and free the decoder's memory; iterating again opens it anew."""
        if self._active is not None:
            _end(*self._active)
        if self._decoder is not None:
            self._decoder.close()
        self._active = self._decoder = None

    # -- the consumer's side ---------------------------------------------------------------------------------------

    def _next(self, ready: Ready) -> Item | None:
        """Wait for the next batch, or None at the end. Raises: the producer's error, or ResourceError on a stall."""
        start = time.perf_counter()
        item: Item | BaseException | None
        while True:
            left = start + self._stall_s - time.perf_counter()
            try:
                item = ready.get(timeout=min(max(left, 0), _WAIT_S))
                break
            except queue.Empty:
                self._waiting()
            if left <= _WAIT_S:
                raise ResourceError(
                    f"loader: expected a batch within {self._stall_s:g} s, got none; {self._stuck()}; "
                    "check the disk, or raise --stall-timeout"
                )
        self.wait_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def _stuck(self) -> str:
        """Say which stage has been busy for longest, and with which sample."""
        found = self.stages.busiest()
        if found is None:
            return "no thread is at work"
        stage, row, thread, seconds = found
        what = f"{stage} of {self._where(row)}" if row >= 0 else stage
        return f"stuck for {seconds:.0f} s in {what} ({thread})"

    def _where(self, row: int) -> str:
        """Name a row without waiting for long: its name may lie on the very disk that is stuck."""
        names = [f"{self.samples.path}, row {row}"]

        def ask() -> None:
            with suppress(Exception):
                names.append(self.samples.where(row))

        thread = threading.Thread(target=ask, name="fasttht-where", daemon=True)
        thread.start()
        thread.join(timeout=_END_S)
        return names[-1]

    def _note(self, found: tuple[BadSample, ...]) -> None:
        """Count and report what the batch about to be delivered had to replace."""
        for bad in found:
            if bad.row in self.bad_rows:
                continue
            self.bad_rows.add(bad.row)
            where = self.samples.where(bad.row)
            if len(self.bad_rows) > self._max_bad:
                raise DataError(
                    f"{where}: {bad.reason}; expected at most {self._max_bad} bad samples, got one more; run "
                    "`fasttht data verify`, or raise --max-bad-samples"
                )
            if self._report is not None:
                self._report(f"{where}: {bad.reason}; row {bad.shown} is shown in its place")

    def _deliver(self, item: Item) -> Batch:
        if item.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(item.copied)
            for tensor in (item.batch.x, item.batch.y, item.batch.index):
                tensor.record_stream(stream)  # its memory was taken on the loader's stream
        return item.batch

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last delivered batch, and what it is a position in."""
        return {
            "version": STATE_VERSION,
            "epoch": self.plan.epoch,
            "step": self.step,
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "fingerprint": self.samples.fingerprint,
            "order": "random" if self.plan.pages is None else "paged",
            "bad_rows": sorted(self.bad_rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; refuses one of another data set, seed, batch size or order.

        Raises: DataError naming the first difference.
        """
        own = self.state_dict()
        state = {"order": own["order"], **state}  # older ones have none
        for key in ("version", "seed", "batch_size", "fingerprint", "order"):
            if state.get(key) != own[key]:
                raise DataError(
                    f"loader state: expected {key} {own[key]}, got {state.get(key)}; "
                    "resume with the data and options that the run started with"
                )
        self.plan = replace(self.plan, epoch=int(state["epoch"]))
        self.step = int(state["step"])
        self.bad_rows = {int(row) for row in state["bad_rows"]}


def _end(stop: threading.Event, ready: Ready, thread: threading.Thread) -> None:
    """Unblock a producer that waits for room, wait until it ends, and have whoever waits for it told.

    A producer that is stuck is left behind.
    """
    stop.set()
    deadline = time.perf_counter() + _END_S
    while thread.is_alive() and time.perf_counter() < deadline:
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(timeout=0.01)
    with suppress(queue.Empty):
        while True:
            ready.get_nowait()
    with suppress(queue.Full):
        ready.put_nowait(ValueError("loader: expected an iterator in use, got one that was closed or replaced"))
