"""When memory runs out: what was asked for, what there is, and the option that fits by what was measured so far."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fasttht import checkpoint
from fasttht.build import check_parts
from fasttht.config import TrainConfig
from fasttht.config_file import AnyConfig
from fasttht.distributed import World
from fasttht.errors import MemoryShortError, UsageError, is_shortage
from fasttht.resolve import resolve

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# What of the room is left to fragments and to libraries, as a share.
_SPARE = 0.05


@dataclass(frozen=True)
class Usage:
    """Bytes: held now, the most held at once, and what this process may hold in all."""

    held: int
    peak: int
    room: int


def usage(device: torch.device) -> Usage:
    """Measure, on CUDA what torch's tensors hold, elsewhere what the process has in memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return Usage(held, peak, free + torch.cuda.memory_reserved(device))
    page = os.sysconf("SC_PAGE_SIZE")
    addresses, held = (int(pages) * page for pages in Path("/proc/self/statm").read_text().split()[:2])
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    room = held + (int(available[1]) * 1024 if available else 0)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        room = min(room, held + max(limit - addresses, 0))
    return Usage(held, max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, held), room)


class Watch:
    """What one kind of work takes of a device's memory, from before its first part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None

    @contextmanager
    def over(self, where: str, images: int, advise: Callable[[int], str]) -> Iterator[None]:
        """Explain what runs out of memory inside, which handles so many images at once.

        advise: gets the number of images that fit, by the peak measured so far, and at most half of them: memory ran
        out before the peak was reached. Returns what to do.

        Raises: MemoryShortError.
        """
        if self._before is None:
            self._before = usage(self._device).held
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            asked, now = _asked(error), usage(self._device)
            each = max(now.peak + asked - self._before, 1) / images
            fits = min(int((now.room * (1 - _SPARE) - self._before) / each), images // 2)
            more = f"{_text(asked)} more" if asked else "more"
            raise MemoryShortError(
                f"{where}: expected memory for {images} images at once, got none for {more}: {_text(now.peak)} were in "
                f"use at most, {_text(each)} or more for each image, of {_text(now.room)} that this process can have "
                f"on {self._device}; {advise(max(fits, 0))}"
            ) from None


def at_once(config: AnyConfig, world: World) -> int:
    """Return how many images of a rank one forward of a train step takes."""
    assert config.optim.batch_size is not None, "the config was not resolved"
    parts = config.optim.grad_accum_steps if isinstance(config, TrainConfig) else 1
    return -(-max(world.counts(config.optim.batch_size)) // parts)


def step_advice(config: AnyConfig, world: World, num_images: int, run: Path, fits: int) -> str:
    """Advise on a train step: the fewest parts of a batch that fit; name the run's newest checkpoint."""
    batch, kept = config.optim.batch_size, checkpoint.listing(run)
    assert batch is not None, "the config was not resolved"
    safe = f"{kept[-1]} is kept" if kept else "no checkpoint was written yet"
    if not isinstance(config, TrainConfig):
        groups = config.moco.shuffle_groups
        smaller = fits * world.size // groups * groups
        if smaller < 2 * groups:
            return f"lower --batch-size, --img-size or --queue-size; {safe}"
        return f"a run with --batch-size {smaller} is expected to fit; {safe}"
    own = max(world.counts(batch))
    for parts in range(config.optim.grad_accum_steps + 1, own // 2 + 1):
        size = -(-own // parts)
        if size <= fits and _allowed(config, parts, num_images, world):
            again = f" (another --output; --init {run} starts from its weights)" if kept else ""
            return f"--grad-accum-steps {parts} is expected to fit, {size} images at once{again}; {safe}"
    return f"lower --batch-size, --img-size or --bank-size; {safe}"


def eval_advice(fits: int) -> str:
    """Advise on an evaluation, which may go on with other batches: the largest power of two that fits."""
    if not fits:
        return "free memory on the device"
    return f"the same command with --eval-batch-size {1 << (fits.bit_length() - 1)} is expected to fit"


def _allowed(config: TrainConfig, parts: int, images: int, world: World) -> bool:
    """Return whether a run may have so many parts: they divide the batch, and BN has enough images in each."""
    optim = config.optim
    assert optim.batch_size is not None, "the config was not resolved"
    try:
        resolve(replace(config, optim=replace(optim, grad_accum_steps=parts)))
        check_parts(images, optim.batch_size, parts, world, drop_last=optim.drop_last)
    except UsageError:
        return False
    return True


def _asked(error: BaseException) -> int:
    """Return the bytes that an allocator's message names, 0 if it names none."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error), re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _text(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
