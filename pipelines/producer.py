"""The loader's thread: walks the plan, has batches decoded and mended, and sends them to the device."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasttht.pipelines import DataError
from fasttht.pipelines.decoder import Decoded, Decoder, Job, Request
from fasttht.pipelines.plan import EpochPlan, Index
from fasttht.pipelines.samples import Paged, Samples
from fasttht.pipelines.stages import IDLE, Stages, Track

# How often a waiting producer looks up at its stop sign.
_POLL_S = 0.1

# How many replacements are tried for one bad sample.
_REPLACEMENTS = 16


# How many batches before it is needed a page of the file is asked for, in the paged order.
_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """One step's images on the device.

    x (B, 3, H, W) uint8 with channels-last strides; y (B,) int64 labels; index (B,) int64 dataset rows.
    """

    x: Tensor
    y: Tensor
    index: Tensor


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be decoded, and the row that was shown in its place."""

    row: int
    reason: str
    shown: int


@dataclass(frozen=True)
class Item:
    """A batch in the queue. copied: recorded behind its copy to the device, None where there was none."""

    batch: Batch
    bad: tuple[BadSample, ...]
    copied: torch.cuda.Event | None


Ready = queue.Queue[Item | BaseException | None]
"""What a producer fills: batches in the plan's order, then None; or, at any point, an error and nothing more."""


class Producer:
    """Produces the batches of `plan` from `first_step` on.

    While it waits for one batch the next is already in the decoder's hands. stream: the CUDA stream that copies run
    on, or None on CPU. replaces: put another sample in the place of a bad one, instead of raising.
    """

    def __init__(
        self,
        samples: Samples,
        plan: EpochPlan,
        decoder: Decoder,
        stages: Stages,
        *,
        img_size: int,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        replaces: bool,
    ) -> None:
        self._samples = samples
        self._plan = plan
        self._decoder = decoder
        self._stages = stages
        self._img_size = img_size
        self._device = device
        self._stream = stream
        self._replaces = replaces

    def run(self, first_step: int, ready: Ready, stop: threading.Event) -> None:
        """Fill `ready` until the plan ends or `stop` is set; the body of a thread."""
        track = self._stages.track()
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._run(first_step, ready, stop, track)
        except BaseException as error:  # handed to the consumer: an error must never become a hang
            ready.put(error)
        finally:
            self._stages.leave()

    def _run(self, first_step: int, ready: Ready, stop: threading.Event, track: Track) -> None:
        under_way: deque[tuple[Request, Job]] = deque()
        read_ahead = _reader_ahead(self._samples, self._plan)
        track.enter("plan")
        order = self._plan.order()
        for step in range(first_step, self._plan.num_steps + 1):
            if step < self._plan.num_steps:
                track.enter("plan")
                read_ahead(order, step)
                request = self._request(self._plan.batch(order, step))
                under_way.append((request, self._decoder.start(request)))
            if step > first_step:
                request, job = under_way.popleft()
                track.enter(IDLE)
                while not job.wait(_POLL_S):
                    if stop.is_set():
                        return
                item = self._finish(request, job, track)
                track.enter(IDLE)
                ready.put(item)
                del item, job  # while the next is waited for, this one's memory may be used again
            if stop.is_set():
                return
        ready.put(None)

    def _request(self, index: Index) -> Request:
        heights, widths = self._sizes(index)
        evaluates = self._plan.augment is None
        return Request(
            index=index,
            shapes=np.stack([heights, widths], axis=1),
            windows=self._plan.windows(index, heights, widths),
            flips=self._plan.flips(index),
            short_side=round(self._img_size / self._plan.crop_pct) if evaluates else None,
        )

    def _sizes(self, index: Index) -> tuple[Index, Index]:
        """Return the sizes of rows; 1 x 1 where a file does not tell, and whose decoding then says why."""
        try:
            return self._samples.sizes(index)
        except DataError:
            found = np.ones((len(index), 2), dtype=np.int64)
            for position in range(len(index)):
                with suppress(DataError):
                    one = self._samples.sizes(index[position : position + 1])
                    found[position] = np.concatenate(one)
            return found[:, 0], found[:, 1]

    def _finish(self, request: Request, job: Job, track: Track) -> Item:
        """Take a decoded batch, mend it, and send it to the device."""
        decoded = job.result()
        index, bad = request.index, tuple[BadSample, ...]()
        if decoded.bad:
            index, bad = self._mend(request, decoded, track)
        track.enter("copy", -1)
        x, y, rows = decoded.pixels, torch.from_numpy(self._samples.labels[index]), torch.from_numpy(index)
        copied = None
        if self._stream is not None:
            x, y, rows = (self._to_device(tensor) for tensor in (x, y, rows))
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        return Item(Batch(x.permute(0, 3, 1, 2), y, rows), bad, copied)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Copy without waiting; the pinned memory goes back to its allocator once the copy is done."""
        if tensor.device.type == self._device.type:
            return tensor
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)

    def _mend(self, request: Request, decoded: Decoded, track: Track) -> tuple[Index, tuple[BadSample, ...]]:
        """Put other samples in the place of bad ones; return the batch's rows as they are now, and what was bad."""
        index, found = request.index.copy(), list[BadSample]()
        for position, reason in decoded.bad:
            row = int(index[position])
            if not self._replaces:
                raise DataError(f"{self._samples.where(row)}: {reason}; remove or repair it")
            pixels, shown = self._another(row, track)
            decoded.pixels[position].copy_(pixels)
            index[position] = shown
            found.append(BadSample(row, reason, shown))
        return index, tuple(found)

    def _another(self, row: int, track: Track) -> tuple[Tensor, int]:
        """Decode the first good replacement of a bad row; return its pixels and its own row.

        By the embedded decoder whatever the loader's own is: a few images, whose pixels are then always the same.
        """
        from fasttht.pipelines.decode_turbo import decode_into  # OpenCV and Pillow: most runs here need neither

        pixels = torch.empty((self._img_size, self._img_size, 3), dtype=torch.uint8)
        for attempt in range(_REPLACEMENTS):
            shown = self._plan.replacement(row, attempt)
            track.enter("read", shown)
            try:
                cut = self._request(np.array([shown])).cut(0)
                decode_into(self._samples.sample(shown), cut, pixels.numpy(), track)
            except DataError:
                continue  # counted when the plan comes to it
            return pixels, shown
        raise DataError(
            f"{self._samples.where(row)}: expected a good sample to show in its place, got {_REPLACEMENTS} bad ones; "
            "run `fasttht data verify`"
        )


def _reader_ahead(samples: Samples, plan: EpochPlan) -> Callable[[Index, int], None]:
    """Return what asks the disk for the pages of the batches to come: nothing, but in the paged order."""
    pages, asked = plan.pages, set[int]()
    if pages is None or not isinstance(samples, Paged):
        return lambda order, step: None

    def ask(order: Index, step: int) -> None:
        begin = step * plan.batch_size if not asked else (step + _AHEAD) * plan.batch_size
        rows = order[begin : (step + _AHEAD + 1) * plan.batch_size]
        new = sorted(set(pages[rows].tolist()) - asked)
        samples.read_ahead(new)
        asked.update(new)

    return ask
