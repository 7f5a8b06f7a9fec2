"""The .beton v2 format with numpy alone: stock FFCV reads what is written here, and the other way round.

A file is a header, field descriptors, one metadata row per sample, then pages with the images' bytes, then
the allocation table up to the end of the file. Pages start at multiples of `page_size` and no sample crosses
one; an image's address is in its metadata row, but its length only in the allocation table.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fasttht.pipelines import DataError
from fasttht.pipelines.manifest import manifest_path, read_manifest
from fasttht.pipelines.plan import Index
from fasttht.pipelines.samples import Pixels, Sample

DEFAULT_PAGE_SIZE = 8 << 20
MIN_PAGE_SIZE = 2 << 20
MAX_PAGE_SIZE = 2 << 30  # the largest power of two in the header's 32 bits
MAX_SIDE = 2**16 - 1
MAX_CLASSES = 1_000_000  # a larger label is damage, not a class; classifiers and counts are sized by it

FORMAT_VERSION = 2
INT_FIELD, IMAGE_FIELD = 1, 2
MODES: tuple[Literal["jpg"], Literal["raw"]] = ("jpg", "raw")
_Rows = npt.NDArray[np.void]

HEADER = np.dtype(
    {
        "names": ["version", "num_fields", "page_size", "num_samples", "alloc_table_ptr"],
        "formats": ["<u2", "<u2", "<u4", "<u8", "<u8"],
    },
    align=True,
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES_ROW = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# Metadata of the field types FFCV has: float, int, image, bytes, array, JSON, tensor. 255 is a user's own.
_ROW_TYPES: dict[int, Any] = {
    0: "<f8",
    INT_FIELD: "<i8",
    IMAGE_FIELD: IMAGE_ROW,
    3: _BYTES_ROW,
    4: "<u8",
    5: _BYTES_ROW,
    6: "<u8",
}


class BetonFile:
    """A .beton as a labelled image set: its first image field and its first integer field.

    Opening reads the index (29 bytes a sample stay in memory). Every number in the header and the index is checked
    against the file before anything is sized by it, so a damaged file is refused here, not met as garbage later. The
    images' own bytes are looked at when they are read, see `sample`. Nothing is mapped: a file that is cut, or a disk
    that fails, while somebody looks at a mapped page ends the process with SIGBUS.

    class_names come from the manifest beside the file and are empty without one. The fingerprint covers
    header, metadata and allocation table. Can be pickled: the copy opens the file again.

    has_manifest: a manifest lies beside the file. settings: what it says about the writing.
    verified: it holds checksums, so that every sample is checked when it is read.

    Raises: DataError.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file, self._file_size = self._open()
        header, fields = self._read_header()
        self.page_size = int(header["page_size"])
        self._images, labels, table = self._read_index(header, fields)
        self._check_images()
        self._num_bytes = self._find_sizes(table)
        if labels.min() < 0:
            raise self._refusal("labels of 0 or more", f"{labels.min()} in row {labels.argmin()}")
        if labels.max() >= MAX_CLASSES:
            raise self._refusal(f"labels below {MAX_CLASSES:,}", f"{labels.max()} in row {labels.argmax()}")
        self.labels = labels
        labels.setflags(write=False)
        manifest = read_manifest(self.path, fingerprint=self.fingerprint, with_sources=False)
        self.has_manifest = manifest is not None
        self.class_names = manifest.class_names if manifest else ()
        self.settings: Mapping[str, Any] = manifest.settings if manifest else {}
        if self.class_names and labels.max() >= len(self.class_names):
            raise self._refusal(f"labels below {len(self.class_names)} (its manifest's classes)", str(labels.max()))
        checksums = np.frombuffer(manifest.checksums if manifest else b"", dtype="<u4")
        if len(checksums) not in (0, len(self)):
            problem = f"{manifest_path(self.path)}: expected {len(self)} checksums, got {len(checksums)}"
            raise DataError(f"{problem}; write the data again, or remove this file and go without")
        self._checksums = checksums
        self.verified = len(checksums) > 0

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type[BetonFile], tuple[Path]]:
        return BetonFile, (self.path,)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        rows = self._images[index]
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def sample(self, i: int) -> Sample:
        """Read row i's bytes (10 us for 49 kB that the system has in memory).

        They are compared with their checksum in the manifest (CRC-32: 4.1 GB/s on one core, 27 us for an
        ImageNet image of 110 kB, a hundredth of what its decoding takes). Without checksums a JPEG's own size is
        compared with the one in the index (3 us), so that damage cannot ask for a picture of any size.

        Raises: DataError naming the row.
        """
        mode, width, height, ptr = self._images[i].item()
        data = self._read(ptr, int(self._num_bytes[i]), row=i)
        if self.verified:
            expected, found = int(self._checksums[i]), zlib.crc32(data.data)
            if found != expected:
                problem = f"row {i}: expected bytes with checksum {expected:08x}, got {found:08x}"
                raise DataError(f"{problem}; the file is damaged, write it again")
        elif MODES[mode] == "jpg":
            from fasttht.pipelines.decode_turbo import image_size  # OpenCV and Pillow

            try:
                size = image_size(data)
            except DataError as error:
                raise DataError(f"row {i}: {error}") from None
            if size != (height, width):
                problem = f"row {i}: expected an image of {height}x{width}, as the index says, got {size[0]}x{size[1]}"
                raise DataError(f"{problem}; the file is damaged, write it again")
        return Sample(MODES[mode], data, height, width)

    def stored(self) -> tuple[Index, Index]:
        """Return mode (an index into MODES) and length in bytes of every image, (N,) int64 each."""
        return self._images["mode"].astype(np.int64), self._num_bytes

    @property
    def pages(self) -> Index:
        return self._images["data_ptr"].astype(np.int64) // self.page_size

    def read_ahead(self, pages: Iterable[int]) -> None:
        for page in pages:
            os.posix_fadvise(self._file, page * self.page_size, self.page_size, os.POSIX_FADV_WILLNEED)

    def where(self, i: int) -> str:
        try:
            origin = self.origin(i)
        except DataError:  # these words are part of another error, which matters more than a damaged side file
            origin = ""
        return f"{self.path}, row {i}" + (f" ({origin})" if origin else "")

    def origin(self, i: int) -> str:
        # Read anew: a million paths are wanted for an error message, not in the memory of every worker.
        manifest = read_manifest(self.path, fingerprint=self.fingerprint)
        return manifest.sources[i] if manifest and manifest.sources else ""

    def _open(self) -> tuple[int, int]:
        """Return a descriptor that is closed with the last reference to this object, and the file's size."""
        try:
            file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, file).atexit = False
            os.pread(file, 1, 0)  # fails for a folder
            size = os.fstat(file).st_size
            if size < HEADER.itemsize:
                raise self._refusal(f"a header of {HEADER.itemsize} bytes", f"{size} bytes in all")
            return file, size
        except OSError as error:
            raise self._refusal("a readable file", str(error.strerror)) from None

    def _read(self, start: int, size: int, row: int | None = None) -> Pixels:
        """Read bytes into memory of their own, of a row or of what opening needs.

        Raises: DataError, naming the row or the file, if the file ends before, or the disk fails.
        """
        where = f"{self.path}: " if row is None else f"row {row}: "
        data, done = np.empty(size, dtype=np.uint8), 0
        try:
            while done < size and (num := os.preadv(self._file, [data.data[done:]], start + done)):
                done += num
        except OSError as error:
            raise DataError(
                f"{where}expected {size:,} bytes at {start}, got {error.strerror}; check the disk"
            ) from None
        if done < size:
            raise DataError(
                f"{where}expected {size:,} bytes at {start}, got {done:,}; the file was cut, write it again"
            )
        return data

    def _read_header(self) -> tuple[np.void, _Rows]:
        """Check the fixed part: every number that decides where something lies or how large it is."""
        header = self._read(0, HEADER.itemsize).view(HEADER)[0]
        file_size, num_fields = self._file_size, int(header["num_fields"])
        page_size, table_ptr = int(header["page_size"]), int(header["alloc_table_ptr"])
        if header["version"] != FORMAT_VERSION:
            raise self._refusal(f"format version {FORMAT_VERSION}", str(header["version"]))
        if not (MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE and page_size.bit_count() == 1):
            raise self._refusal(f"a power of two from {MIN_PAGE_SIZE} as page size", str(page_size))
        fields_end = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
        if num_fields < 2 or fields_end > file_size:
            raise self._refusal("at least an image and a label field", f"{num_fields} in {file_size} bytes")
        if table_ptr == 0:
            raise self._refusal("an allocation table", "none (its writer was stopped before the end)")
        if not fields_end <= table_ptr <= file_size or (file_size - table_ptr) % ALLOCATION.itemsize:
            raise self._refusal("an allocation table up to the end of the file", f"{table_ptr} of {file_size} bytes")
        return header, self._read(HEADER.itemsize, fields_end - HEADER.itemsize).view(DESCRIPTOR)

    def _read_index(self, header: np.void, fields: _Rows) -> tuple[_Rows, Index, _Rows]:
        """Return the image rows, the labels, and the allocation table."""
        types = [int(type_id) for type_id in fields["type_id"]]
        unknown = [type_id for type_id in types if type_id not in _ROW_TYPES]
        if unknown:
            raise self._refusal("FFCV's own field types (0 to 6)", f"type {unknown[0]}")
        if IMAGE_FIELD not in types or INT_FIELD not in types:
            raise self._refusal("an image field (type 2) and an integer field (type 1)", f"types {types}")
        row_type = np.dtype([(f"f{i}", _ROW_TYPES[type_id]) for i, type_id in enumerate(types)], align=True)
        begin, table_ptr = HEADER.itemsize + fields.nbytes, int(header["alloc_table_ptr"])
        num_samples = int(header["num_samples"])
        end = begin + num_samples * row_type.itemsize
        if num_samples < 1 or end > table_ptr:
            raise self._refusal("at least one sample, with metadata inside the file", f"{num_samples} samples")
        head, tail = self._read(0, end), self._read(table_ptr, self._file_size - table_ptr)
        table = tail.view(ALLOCATION)
        table = table[table["size"] > 0]  # FFCV notes empty values too, at any address, another's included
        ptrs, sizes = table["ptr"], table["size"]
        # Written so that nothing overflows: the table may hold any 64-bit number.
        inside = (ptrs >= end) & (ptrs <= table_ptr) & (sizes <= table_ptr - np.minimum(ptrs, table_ptr))
        if not inside.all():
            row = int(np.argmin(inside))
            raise self._refusal("every allocation between metadata and table", f"{sizes[row]} bytes at {ptrs[row]}")
        digest = hashlib.sha256(head.data)
        digest.update(tail.data)
        self.fingerprint = digest.hexdigest()[:16]
        rows = head[begin:].view(row_type)
        labels = rows[f"f{types.index(INT_FIELD)}"].astype(np.int64)
        return rows[f"f{types.index(IMAGE_FIELD)}"].copy(), labels, table

    def _check_images(self) -> None:
        modes, heights, widths = (self._images[name] for name in ("mode", "height", "width"))
        good = (modes < len(MODES)) & (heights > 0) & (widths > 0)
        if not good.all():
            row = int(np.argmin(good))
            got = f"mode {modes[row]}, {heights[row]}x{widths[row]} in row {row}"
            raise self._refusal("images of mode 0 (jpg) or 1 (raw), 1x1 or larger", got)

    def _find_sizes(self, table: _Rows) -> Index:
        """Look every image's address up in the allocation table; return its length in bytes."""
        order = np.argsort(table["ptr"], kind="stable")
        ptrs, wanted = table["ptr"][order], self._images["data_ptr"]
        slots = np.searchsorted(ptrs, wanted)
        known = slots < len(ptrs)
        known[known] = ptrs[slots[known]] == wanted[known]
        if not known.all():
            row = int(np.argmin(known))
            raise self._refusal("every image in the allocation table", f"row {row} at {wanted[row]}, not in it")
        sizes: Index = table["size"][order][slots].astype(np.int64)
        pixels = 3 * self._images["height"].astype(np.int64) * self._images["width"]
        good = (self._images["mode"] != MODES.index("raw")) | (sizes == pixels)
        if not good.all():
            row = int(np.argmin(good))
            raise self._refusal(f"{pixels[row]} bytes for the raw image in row {row}", str(sizes[row]))
        return sizes

    def _refusal(self, expected: str, got: str) -> DataError:
        return DataError(f"{self.path}: expected {expected}, got {got}; is this a .beton file?")
