"""What a data set is to everything here: a `Samples`, which gives a `Sample` for every row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from fasttht.pipelines.plan import Index

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# An image of more pixels is taken for a decompression bomb, whatever its format: a bad sample. Pillow's own limit, 256
# MiB as RGB; the largest image of ImageNet has 61 million.
MAX_PIXELS = 89_478_485


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One stored image: encoded bytes ("jpg", "file": any format, told by its first bytes) or "raw" pixels.

    data is 1-D uint8 and must not be written to (it may be a view of something shared); raw data is
    height x width x 3, RGB. height and width may be 0 for "file": unknown until the header is read.
    """

    mode: Literal["jpg", "raw", "file"]
    data: Pixels
    height: int
    width: int


class Samples(Protocol):
    """A labelled image set with random access. Rows are 0 .. len-1 and never change their meaning.

    path: the file or folder, or a name where there is none.
    labels: class of every row, (N,) int64, 0 or more.
    class_names: in label order; empty if unknown.
    fingerprint: short hex that changes when the data changes, not when it moves.
    sizes: heights and widths, int64, of the rows in `index`.
    sample: the stored bytes of row i.
    where: words for an error message: the file, and what it was made from if that is known.
    origin: name of row i relative to where the set came from, empty if unknown; never an absolute path.

    Raises: DataError from any of them, when a file is missing or cannot be read.
    """

    @property
    def path(self) -> Path: ...
    @property
    def labels(self) -> Index: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def sizes(self, index: Index) -> tuple[Index, Index]: ...
    def sample(self, i: int) -> Sample: ...
    def where(self, i: int) -> str: ...
    def origin(self, i: int) -> str: ...


@runtime_checkable
class Paged(Protocol):
    """Samples of one large file, laid out in pages that are best read whole.

    pages: the number of the page that each row lies in, (N,) int64.
    read_ahead: ask the operating system to have these pages in memory soon; returns at once.
    """

    @property
    def pages(self) -> Index: ...
    def read_ahead(self, pages: Iterable[int]) -> None: ...
