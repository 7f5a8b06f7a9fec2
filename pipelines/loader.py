"""Plan + samples + decoder -> batches, decoded ahead by threads.

One producer thread walks the plan; a pool of `workers` threads decodes each batch into one uint8 array; a bounded
queue of `prefetch` batches sits between the producer and the consumer. A batch handed out is the consumer's to keep:
its storage is never reused. An exception in any thread is raised in the consumer, with the sample's name.

State is the position of the last batch *delivered*, so a resume neither repeats nor skips one, in O(1).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttht.pipelines import DataError
from fasttht.pipelines.datasets import Samples
from fasttht.pipelines.decode_turbo import Pixels, crop_resize_into, decode_rgb
from fasttht.pipelines.plan import EpochPlan, Index, Windows

STATE_VERSION = 1

# Samples decoded by one task: amortises the pool's hand-over (~20 us) for tiny images, still balances large ones.
_CHUNK = 16


@dataclass(frozen=True)
class Batch:
    """One step's images on the device.

    x (B, 3, H, W) uint8 with channels-last strides; y (B,) int64 labels; index (B,) int64 dataset rows.
    """

    x: Tensor
    y: Tensor
    index: Tensor


class Loader:
    """Iterate over one epoch's remaining batches; iterating again continues with the next epoch.

    `plan` is the template: its seed, batch size, augmentation and rank hold for every epoch, its `epoch` is where
    the loader starts. `wait_s` is the time the consumer has spent waiting for batches, in seconds.

    Raises: DataError from the consumer's `next` if a sample cannot be read or decoded.
    """

    def __init__(
        self,
        samples: Samples,
        plan: EpochPlan,
        *,
        img_size: int,
        device: torch.device | str = "cpu",
        workers: int = 1,
        prefetch: int = 3,
    ) -> None:
        self.samples = samples
        self.plan = plan
        self.img_size = img_size
        self.device = torch.device(device)
        self.workers = workers
        self.prefetch = prefetch
        self.step = 0
        self.wait_s = 0.0

    @property
    def epoch(self) -> int:
        """The epoch that iterating will continue."""
        return self.plan.epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, then move to the start of the next."""
        stop = threading.Event()
        ready: queue.Queue[tuple[Pixels, Index] | BaseException | None] = queue.Queue(maxsize=self.prefetch)
        producer = threading.Thread(
            target=self._produce, args=(self.plan, self.step, ready, stop), name="fasttht-loader", daemon=True
        )
        producer.start()
        try:
            while True:
                start = time.perf_counter()
                item = ready.get()
                self.wait_s += time.perf_counter() - start
                if item is None:
                    break
                if isinstance(item, BaseException):
                    raise item
                self.step += 1
                yield self._to_device(*item)
        finally:
            stop.set()
            while producer.is_alive():  # unblock a producer waiting for room, then let it end
                try:
                    ready.get_nowait()
                except queue.Empty:
                    producer.join(timeout=0.01)
        self.plan = replace(self.plan, epoch=self.plan.epoch + 1)
        self.step = 0

    def _produce(
        self,
        plan: EpochPlan,
        first_step: int,
        ready: queue.Queue[tuple[Pixels, Index] | BaseException | None],
        stop: threading.Event,
    ) -> None:
        try:
            order = plan.order()
            with ThreadPoolExecutor(self.workers, thread_name_prefix="fasttht-decode") as pool:
                for step in range(first_step, plan.num_steps):
                    if stop.is_set():
                        return
                    ready.put(self._decode_batch(plan, plan.batch(order, step), pool))
            ready.put(None)
        except BaseException as error:  # handed to the consumer: an error must never become a hang
            ready.put(error)

    def _decode_batch(self, plan: EpochPlan, index: Index, pool: ThreadPoolExecutor) -> tuple[Pixels, Index]:
        heights, widths = self.samples.sizes(index)
        windows = plan.windows(index, heights, widths)
        flips = plan.flips(index)
        out = np.empty((len(index), self.img_size, self.img_size, 3), dtype=np.uint8)
        chunks = [slice(i, i + _CHUNK) for i in range(0, len(index), _CHUNK)]
        shapes = np.stack([heights, widths], axis=1)
        tasks = [pool.submit(self._decode_chunk, index[c], shapes[c], windows[c], flips[c], out[c]) for c in chunks]
        for task in tasks:
            task.result()
        return out, index

    def _decode_chunk(
        self, index: Index, shapes: Index, windows: Windows, flips: np.ndarray[Any, Any], out: Pixels
    ) -> None:
        for i, row in enumerate(index):
            try:
                pixels = decode_rgb(self.samples.sample(int(row)))
                if pixels.shape[:2] != tuple(shapes[i]):  # the window was cut for the announced size
                    announced, found = "x".join(map(str, shapes[i])), "x".join(map(str, pixels.shape[:2]))
                    raise DataError(f"expected an image of {announced} pixels, as announced, got {found}")
            except DataError as error:
                raise DataError(f"{self.samples.where(int(row))}: {error}; remove or repair it") from None
            top, left, height, width = (int(v) for v in windows[i])
            crop_resize_into(pixels, (top, left, height, width), bool(flips[i]), out[i])

    def _to_device(self, pixels: Pixels, index: Index) -> Batch:
        host = [
            torch.from_numpy(pixels),
            torch.from_numpy(self.samples.labels[index]),
            torch.from_numpy(index),
        ]
        if self.device.type == "cuda":
            host = [t.pin_memory() for t in host]
        x, y, rows = (t.to(self.device, non_blocking=True) for t in host)
        return Batch(x.permute(0, 3, 1, 2), y, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last delivered batch, and what it is a position in."""
        return {
            "version": STATE_VERSION,
            "epoch": self.plan.epoch,
            "step": self.step,
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "fingerprint": self.samples.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; refuses one of another data set, seed or batch size.

        Raises: DataError naming the first difference.
        """
        own = self.state_dict()
        for key in ("version", "seed", "batch_size", "fingerprint"):
            if state.get(key) != own[key]:
                raise DataError(
                    f"loader state: expected {key} {own[key]}, got {state.get(key)}; "
                    "resume with the data and options that the run started with"
                )
        self.plan = replace(self.plan, epoch=int(state["epoch"]))
        self.step = int(state["step"])
