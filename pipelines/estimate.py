"""How many images a write would store, and how many bytes, told from a sample; and whether the disk has room."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fasttht.pipelines import DataError, ResourceError
from fasttht.pipelines.beton import DEFAULT_PAGE_SIZE
from fasttht.pipelines.encode import Encoding, encode_sample
from fasttht.pipelines.ordered import count_workers, map_ordered
from fasttht.pipelines.plan import STREAM_WRITE, hash_rows
from fasttht.pipelines.samples import Samples

# A sample of this many images is taken in any case: of a small set, that is all of it.
_LEAST = 128
_METADATA_BYTES, _SIDE_BYTES = 24, 24 + 60  # per image: before the pages; behind them, and in the manifest
_PAGE = DEFAULT_PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a file would hold: images in all and by class name, and its bytes.

    Told from `num_sampled` images, of which `num_failed` could not be stored.
    """

    num_samples: int
    class_counts: Mapping[str, int]
    num_bytes: int
    num_sampled: int
    num_failed: int


def estimate_split(
    samples: Samples, encoding: Encoding, *, share: float = 0.0, seed: int = 0, workers: int = 1
) -> Estimate:
    """Estimate the file that `write_split` would make: the sizes of all image files times what a sample shrinks to.

    The sample is `share` of the images, 128 at least, drawn by a hash. Where everything passes through the result is
    exact but for the padding of the pages.
    """
    # step 2 of the stream: 0 is the order in the file, 1 the hold-out
    keys = hash_rows(STREAM_WRITE, seed, 0, 2, np.arange(len(samples), dtype=np.int64))
    chosen = np.argsort(keys, kind="stable")[: max(_LEAST, math.ceil(share * len(samples)))].tolist()
    found = list(map_ordered(partial(_measure, samples, encoding), chosen, count_workers(workers)))
    good = [pair for pair in found if pair is not None]
    before, after = (sum(sizes) for sizes in zip(*good, strict=True)) if good else (1, 1)
    total = _file_bytes(samples)
    images = total * after / before if total is not None else len(samples) * after / max(1, len(good))
    # Every page loses half an image at its end.
    pages = _round_up(_METADATA_BYTES * len(samples)) + _round_up(images * (1 + after / len(good or found) / 2 / _PAGE))
    classes = np.bincount(samples.labels, minlength=len(samples.class_names)).tolist()
    names = samples.class_names or tuple(map(str, range(len(classes))))
    return Estimate(
        num_samples=len(samples),
        class_counts=dict(zip(names, classes, strict=True)),
        num_bytes=pages + _SIDE_BYTES * len(samples),
        num_sampled=len(chosen),
        num_failed=len(found) - len(good),
    )


def check_space(folder: Path, needed: int) -> int:
    """Return the free bytes of the disk that `folder` is or would be on. Raises: ResourceError below `needed`."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        problem = f"{folder}: expected {needed / 1e9:,.2f} GB of free space, got {free / 1e9:,.2f} GB"
        raise ResourceError(f"{problem}; make room, write elsewhere, or choose a smaller resolution")
    return free


def _round_up(num_bytes: float) -> int:
    return math.ceil(num_bytes / _PAGE) * _PAGE


def _measure(samples: Samples, encoding: Encoding, i: int) -> tuple[int, int] | None:
    """Return the bytes of row i before and after, None if it cannot be stored."""
    try:
        sample = samples.sample(i)
        return sample.data.size, encode_sample(sample, encoding)[0].data.size
    except DataError:
        return None


def _file_bytes(samples: Samples) -> int | None:
    """Return the bytes of all image files; None where the images are no files."""
    if not samples.path.is_dir():
        return None
    root = str(samples.path)
    try:
        return sum(os.stat(f"{root}/{samples.origin(i)}").st_size for i in range(len(samples)))
    except OSError:  # an image that is gone; the write will name it
        return None
