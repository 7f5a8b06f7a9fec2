"""What `bench load` measures: our loader with each of its decoders, stock FFCV, and torchvision on a GPU.

All decode the same file, cut random windows (RRC), flip half of them, and deliver uint8 batches on the device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fasttht.bench.env import package_version
from fasttht.bench.jobs import synchronize
from fasttht.bench.windows import Candidate
from fasttht.pipelines.backends import DECODERS, why_not
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.plan import Augment, EpochPlan, Index
from fasttht.pipelines.samples import Sample, Samples

FFCV_STOCK, TORCHVISION = "ffcv-stock", "torchvision-cuda"
NAMES = (*DECODERS, FFCV_STOCK, TORCHVISION)

# Batch sizes that stock FFCV is tried with: its threads meet at the end of every batch, so a small one costs it.
FFCV_BATCH_SIZES = (32, 64, 128, 256)

# Rows of an epoch. A short file is repeated to so many: an epoch's first batches cost everyone something (stock FFCV
# allocates all its memory anew), which a data set of ImageNet's size never notices.
_EPOCH_ROWS = 1 << 16

_PACKAGES = {
    "turbo": "simplejpeg",
    "ffcv": "ffcv",
    "dali-cpu": "nvidia-dali-cuda120",
    "dali-gpu": "nvidia-dali-cuda120",
    FFCV_STOCK: "ffcv",
    TORCHVISION: "torchvision",
}


def unable(name: str, device: torch.device) -> str | None:
    """Return why a candidate cannot run here, or None if it may be tried."""
    if name == TORCHVISION:
        return None if device.type == "cuda" else f"it decodes on a CUDA device and this run is on {device.type}"
    return why_not("ffcv" if name == FFCV_STOCK else name, device)


def version(name: str) -> str | None:
    """Return "package version" of what decodes for a candidate, or None where nothing does."""
    package = _PACKAGES.get(name)
    return None if package is None else f"{package} {package_version(package)}"


def open_candidate(
    name: str, beton: Path, *, workers: int, batch_size: int, img_size: int, device: torch.device
) -> Candidate:
    """Build one of NAMES. Raises: DataError for the file; ImportError, or anything else, from a peer's package."""
    if name == FFCV_STOCK:
        return StockFfcv(beton, workers, batch_size, img_size, device)
    samples = Repeated(BetonFile(beton))
    if name == TORCHVISION:
        return TorchvisionCuda(samples, batch_size, img_size, device)
    return OurLoader(name, samples, workers, batch_size, img_size, device)


def deliver_one(name: str, beton: str, *, workers: int, batch_size: int, img_size: int, device: str) -> None:
    """Write a line to stdout once the first batch is there: the body of a process that is timed from its start."""
    candidate = open_candidate(
        name, Path(beton), workers=workers, batch_size=batch_size, img_size=img_size, device=torch.device(device)
    )
    next(candidate.batches())
    os.write(1, b"first batch\n")


class Repeated:
    """The samples of a file over and over: rows beyond the last start again with the first."""

    def __init__(self, samples: Samples) -> None:
        self._samples, self._num = samples, len(samples)
        self.path, self.class_names, self.fingerprint = samples.path, samples.class_names, samples.fingerprint
        self.labels: Index = np.tile(samples.labels, _times(self._num))

    def __len__(self) -> int:
        return len(self.labels)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        return self._samples.sizes(index % self._num)

    def sample(self, i: int) -> Sample:
        return self._samples.sample(i % self._num)

    def where(self, i: int) -> str:
        return self._samples.where(i % self._num)

    def origin(self, i: int) -> str:
        return self._samples.origin(i % self._num)


def _times(num: int) -> int:
    return max(1, -(-_EPOCH_ROWS // num))


class OurLoader:
    """`pipelines.loader.Loader` with one of its decoders."""

    def __init__(
        self, name: str, samples: Samples, workers: int, batch_size: int, img_size: int, device: torch.device
    ) -> None:
        self.name, self.batch_size, self._device = name, batch_size, device
        plan = EpochPlan(num_samples=len(samples), batch_size=batch_size, augment=Augment(), drop_last=True)
        self._loader = Loader(samples, plan, img_size=img_size, device=device, decoder=name, workers=workers)

    def batches(self) -> Generator[int]:
        try:
            while True:
                # Closed by name: left to the garbage collector, its threads would work on into another's window.
                with closing(_generator(self._loader)) as epoch:
                    for batch in epoch:
                        synchronize(self._device)  # a batch that is only promised is not counted
                        yield len(batch.y)
        finally:
            self._loader.close()

    def seconds(self) -> dict[str, float]:
        return self._loader.stages.seconds()


class StockFfcv:
    """FFCV's own `Loader` with the pipeline of its ImageNet example, from the page cache.

    batch_size may be set between two calls of `batches`: what it has compiled does not depend on it.
    """

    name = FFCV_STOCK

    def __init__(self, beton: Path, workers: int, batch_size: int, img_size: int, device: torch.device) -> None:
        with _silence():
            basics, images, loader, transforms = (
                import_module(f"ffcv.{name}") for name in ("fields.basics", "fields.rgb_image", "loader", "transforms")
            )
            to_device = [transforms.ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
            num = len(BetonFile(beton))
            threads = torch.get_num_threads()
            self._device = device
            self._loader: Any = loader.Loader(
                str(beton),
                batch_size=batch_size,
                num_workers=workers,
                os_cache=True,
                order=loader.OrderOption.RANDOM,
                seed=0,  # else it draws one from the global random state
                indices=np.tile(np.arange(num, dtype=np.uint64), _times(num)),
                pipelines={
                    "image": [
                        images.RandomResizedCropRGBImageDecoder((img_size, img_size)),
                        transforms.RandomHorizontalFlip(),
                        transforms.ToTensor(),
                        *to_device,
                        transforms.ToTorchImage(),
                    ],
                    "label": [basics.IntDecoder(), transforms.ToTensor(), *to_device],
                },
            )
            torch.set_num_threads(threads)  # it gives torch as many threads as it has itself

    @property
    def batch_size(self) -> int:
        return int(self._loader.batch_size)

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._loader.batch_size = batch_size

    def batches(self) -> Generator[int]:
        threads = torch.get_num_threads()
        with _silence():
            while True:
                epoch = iter(self._loader)
                try:
                    _await_first(epoch)
                    for batch in epoch:
                        synchronize(self._device)  # a batch that is only promised is not counted
                        yield len(batch[0])
                finally:
                    # Told to end, it still fills its queue; then its thread looks up.
                    epoch.terminate_event.set()
                    epoch.join(timeout=60)
                    epoch.close()
                    torch.set_num_threads(threads)

    def seconds(self) -> dict[str, float]:
        return {}


def _await_first(epoch: Any) -> None:
    """Wait for the first batch of FFCV's thread; if the thread dies of an error, nobody else would be told."""
    while epoch.output_queue.empty():
        alive = epoch.is_alive()
        epoch.join(timeout=0.01)
        if not alive and epoch.output_queue.empty():
            raise RuntimeError("its thread ended before the first batch; its words are on stderr")


class TorchvisionCuda:
    """Batched JPEG decoding on the GPU by torchvision, then crop, resize and flip there, one batch at a time."""

    name = TORCHVISION

    def __init__(self, samples: Samples, batch_size: int, img_size: int, device: torch.device) -> None:
        io: Any = import_module("torchvision.io")
        self.batch_size, self._img_size, self._device = batch_size, img_size, device
        self._samples = samples
        self._plan = EpochPlan(num_samples=len(samples), batch_size=batch_size, augment=Augment(), drop_last=True)
        self._decode = partial(io.decode_jpeg, mode=io.ImageReadMode.RGB, device=device)

    def batches(self) -> Generator[int]:
        order = self._plan.order()
        while True:
            for step in range(self._plan.num_steps):
                index = self._plan.batch(order, step)
                self._batch(index)
                synchronize(self._device)
                yield len(index)

    def _batch(self, index: Index) -> torch.Tensor:
        jpegs = [torch.from_numpy(np.array(self._samples.sample(int(i)).data)) for i in index]
        images = self._decode(jpegs)
        windows = self._plan.windows(index, *self._samples.sizes(index)).tolist()
        cut = []
        for image, (top, left, height, width), flip in zip(images, windows, self._plan.flips(index), strict=True):
            window = image[None, :, top : top + height, left : left + width].float()
            pixels = F.interpolate(window, (self._img_size, self._img_size), mode="bilinear", antialias=True)
            cut.append(pixels.flip(-1) if flip else pixels)
        return torch.cat(cut).round().clamp(0, 255).to(torch.uint8, memory_format=torch.channels_last)

    def seconds(self) -> dict[str, float]:
        return {}


def _generator(loader: Loader) -> Generator[Any]:
    found = iter(loader)
    assert isinstance(found, Generator)
    return found


@contextmanager
def _silence() -> Iterator[None]:
    """Keep FFCV's and numba's warnings to themselves: they are about their code, not about this measurement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
