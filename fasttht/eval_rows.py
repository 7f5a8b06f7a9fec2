"""Which held-out images are evaluated: all, a random subset, or those of a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttht.errors import UsageError
from fasttht.pipelines.plan import Index, hash_rows
from fasttht.pipelines.samples import Samples

_STREAM_SUBSET = 0x4556

_AMBIGUOUS = -1


def shuffled(rows: Index, seed: int) -> Index:
    """Return rows (N,) int64 in an order that depends on the seed and on each row alone."""
    return rows[np.argsort(hash_rows(_STREAM_SUBSET, seed, 0, 0, rows), kind="stable")]


def choose_rows(samples: Samples, *, limit: int | None, images_file: Path | None, seed: int) -> Tensor:
    """Return rows of a data set, (N,) int64, ascending: those of the list, and of them at most `limit` at random.

    The rows of the smallest hashes of (seed, row) are taken, so a smaller subset is part of every larger one, and it
    depends on nothing else.

    Raises: UsageError for a list with unknown, ambiguous or repeated images, or with none.
    """
    rows = np.arange(len(samples), dtype=np.int64) if images_file is None else listed_rows(samples, images_file)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: expected at least 1 image, got {limit}")
    if limit is not None:
        rows = shuffled(rows, seed)[:limit]
    return torch.from_numpy(np.sort(rows))


def listed_rows(samples: Samples, path: Path) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the rows that a text file names, one a line: a row number, or an image's path or the end of one.

    Empty lines and lines that begin with # say nothing. An end begins at a folder's or the file's name:
    `n01440764/ILSVRC2012_val_00000293.JPEG` is found below any folder.

    Raises: UsageError naming the first line that is unknown, ambiguous or repeated.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--images-file: expected a readable text file, got {path}: {error}") from None
    wanted = [(number, line) for number, line in enumerate(lines, start=1) if line and not line.startswith("#")]
    names = {} if all(line.isdecimal() for _, line in wanted) else _ends(samples)
    found: dict[int, int] = {}
    for number, line in wanted:
        row = names.get(line)
        if row is None and line.isdecimal() and int(line) < len(samples):
            row = int(line)
        if row is None or row == _AMBIGUOUS:
            what = "no image" if row is None else "several images"
            raise UsageError(
                f"--images-file: expected rows below {len(samples)} or paths of {samples.path}, got {what} of line "
                f"{number} of {path}, {line}"
            )
        if row in found:
            raise UsageError(
                f"--images-file: expected each image once, got that of line {found[row]} of {path} in line {number} too"
            )
        found[row] = number
    if not found:
        raise UsageError(f"--images-file: expected one or more images, got none in {path}")
    return np.fromiter(found, dtype=np.int64)


def _ends(samples: Samples) -> dict[str, int]:
    """Return the row of every image by its path and all ends of it; -1 where several have one."""
    whole, ends = {}, {}
    for row in range(len(samples)):
        origin = samples.origin(row)
        if not origin:
            continue
        whole[origin] = row
        parts = origin.split("/")
        for i in range(1, len(parts)):
            end = "/".join(parts[i:])
            ends[end] = _AMBIGUOUS if end in ends else row
    return ends | whole
