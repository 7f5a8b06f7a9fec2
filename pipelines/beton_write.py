"""Laying a .beton v2 down, sample after sample, in a file that stock FFCV reads. The format is in `beton.py`.

Where a sample goes depends on the samples before it only, so that a stopped write can be taken up again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import (
    ALLOCATION,
    DEFAULT_PAGE_SIZE,
    DESCRIPTOR,
    FORMAT_VERSION,
    HEADER,
    IMAGE_FIELD,
    IMAGE_ROW,
    INT_FIELD,
    MAX_PAGE_SIZE,
    MAX_SIDE,
    MIN_PAGE_SIZE,
    MODES,
)
from fasttht.pipelines.manifest import replacing
from fasttht.pipelines.samples import Sample

_ROW = np.dtype([("image", IMAGE_ROW), ("label", "<i8")], align=True)


class BetonWriter:
    """Writes samples, modes jpg and raw, into `file` as fields `image` and `label`; the caller owns the file.

    Streams: memory holds 48 bytes of index for each sample. Room for the metadata of `max_samples` is kept before
    the first page; fewer may come. `page_size` grows to the next power of two when a sample needs it; what was laid
    down before stays valid, since the larger pages contain the smaller ones whole. The bytes depend on the samples,
    `max_samples` and the page size only.

    path: for error messages. end: where the samples stored so far end.

    Raises: ValueError for the arguments; DataError for an image the format cannot hold.
    """

    def __init__(self, file: BinaryIO, path: Path, max_samples: int, *, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        if not (MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE and page_size.bit_count() == 1):
            raise ValueError(f"page_size: expected a power of two from 2 MiB to 2 GiB, got {page_size}")
        if max_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {max_samples}")
        self.path, self.page_size, self.num_samples = path, page_size, 0
        self._file = file
        self._fields = _describe_fields()
        self._metadata = np.zeros(max_samples, _ROW)
        self._table = np.zeros(max_samples, ALLOCATION)
        self.end = _round_up(HEADER.itemsize + self._fields.nbytes + self._metadata.nbytes, page_size)

    def append(self, sample: Sample, label: int) -> None:
        """Store one sample behind the others."""
        _check_row(self.path, self.num_samples, sample, label)
        self._file.seek(self.place(sample.mode, sample.height, sample.width, sample.data.size, label))
        self._file.write(np.ascontiguousarray(sample.data).data)

    def place(self, mode: str, height: int, width: int, size: int, label: int) -> int:
        """Note a sample of `size` bytes in the index without writing them; return the address where they belong."""
        row = self.num_samples
        if row == len(self._metadata):
            raise ValueError(f"{self.path}: expected {row} rows, got more")
        self.page_size = max(self.page_size, 1 << (size - 1).bit_length())
        if self.end // self.page_size != (self.end + size - 1) // self.page_size:
            self.end = _round_up(self.end, self.page_size)  # what is skipped reads as zeros
        start = self.end
        self._metadata[row] = (_mode_number(mode), width, height, start), label
        self._table[row] = row, start, size
        self.end += size
        self.num_samples += 1
        return start

    def finish(self) -> str:
        """Write table, metadata and header, in this order; return the file's fingerprint."""
        table, metadata = self._table[: self.num_samples], self._metadata[: self.num_samples]
        end = _round_up(self.end, self.page_size)
        header = np.array((FORMAT_VERSION, len(self._fields), self.page_size, self.num_samples, end), dtype=HEADER)
        self._file.seek(end)
        self._file.write(table.tobytes())
        head: bytes = header.tobytes() + self._fields.tobytes() + metadata.tobytes()
        self._file.seek(0)
        self._file.write(head)
        return hashlib.sha256(head + table.tobytes()).hexdigest()[:16]


def write_beton(
    path: Path | str,
    rows: Iterable[tuple[Sample, int]],
    num_samples: int,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
) -> str:
    """Write (sample, label) rows to `path`, which appears when all is on disk, or not at all; return the fingerprint.

    Raises: ValueError for the arguments; DataError for an image the format cannot hold; what `rows` raises.
    """
    path = Path(path)
    with replacing(path) as file:
        writer = BetonWriter(file, path, num_samples, page_size=page_size)
        for sample, label in rows:
            writer.append(sample, label)
        if writer.num_samples != num_samples:
            raise ValueError(f"{path}: expected {num_samples} rows, got {writer.num_samples}")
        return writer.finish()


def _mode_number(mode: str) -> int:
    known: tuple[str, ...] = MODES
    return known.index(mode)


def _describe_fields() -> np.ndarray[Any, np.dtype[np.void]]:
    fields = np.zeros(2, DESCRIPTOR)
    for field, type_id, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name, dtype=np.uint8)
    return fields


def _check_row(path: Path, row: int, sample: Sample, label: int) -> None:
    if sample.mode not in MODES or label < 0:
        raise ValueError(f"{path}: expected mode jpg or raw and a label, got {sample.mode} and {label} in row {row}")
    size, height, width = sample.data.size, sample.height, sample.width
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and 0 < size <= MAX_PAGE_SIZE):
        raise DataError(
            f"{path}: expected images of 1 to {MAX_SIDE} pixels a side and at most 2 GiB, got "
            f"{height}x{width} and {size} bytes in row {row}; write with a maximum resolution"
        )
    if sample.mode == "raw" and size != 3 * height * width:
        raise ValueError(f"{path}: expected {height}x{width}x3 raw bytes, got {size} in row {row}")


def _round_up(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size
