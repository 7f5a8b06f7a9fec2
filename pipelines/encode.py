"""One image to what the file stores: kept as it is, encoded anew or shrunk, and what was odd about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import simplejpeg

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import MAX_SIDE
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.samples import Pixels, Sample

Encode = Literal["passthrough", "jpeg", "raw"]
Outcome = Literal["passthrough", "reencoded", "resized", "raw"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# What can be odd about an image; the place in this tuple is its bit in a journal.
REMARKS = (
    "not a JPEG",
    "JPEG by name only",
    "CMYK",
    "unusual JPEG layout",
    "larger than max_resolution",
    "broken EXIF",
    "EXIF rotation ignored",
)
_NOT_JPEG, _NAME_ONLY, _CMYK, _UNUSUAL, _LARGE, _BROKEN_EXIF, _ROTATED = REMARKS

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_TAG_ORIENTATION = 0x112


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How images are stored.

    encode: "passthrough" keeps plain JPEGs (and raw pixels) as they are and encodes the rest as JPEG; "jpeg"
    encodes everything anew; "raw" stores pixels.
    max_resolution: longest side in pixels, larger images are shrunk to it; None for no limit.
    quality: of the JPEGs encoded here, 1 to 100; they keep full colour resolution (4:4:4).

    Raises: ValueError.
    """

    encode: Encode = "passthrough"
    max_resolution: int | None = None
    quality: int = 95

    def __post_init__(self) -> None:
        if self.encode not in get_args(Encode):
            raise ValueError(f"encode: expected one of {get_args(Encode)}, got {self.encode!r}")
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ValueError(f"max_resolution: expected at least 1 pixel or None, got {self.max_resolution}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality: expected 1 to 100, got {self.quality}")


def encode_sample(sample: Sample, encoding: Encoding) -> tuple[Sample, Outcome]:
    """Turn one image into what the file stores, and say what was done.

    Every image is decoded in full, the ones that pass through too: a truncated file is found now, not in the
    middle of a training run.

    Raises: DataError if the image cannot be decoded, or is too large for the format.
    """
    pixels = decode_rgb(sample)
    height, width = pixels.shape[:2]
    limit = encoding.max_resolution
    fits = limit is None or max(height, width) <= limit
    keeps = encoding.encode == "passthrough" and fits
    if keeps and sample.mode != "raw" and _colours(sample.data) in ("Gray", "YCbCr"):
        return Sample("jpg", sample.data, height, width), "passthrough"
    if limit is not None and not fits:
        pixels = _shrink(pixels, limit)
        height, width = pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise DataError(
            f"expected at most {MAX_SIDE} pixels a side, got {height}x{width}; write with a maximum resolution"
        )
    if encoding.encode == "raw" or (encoding.encode == "passthrough" and sample.mode == "raw"):
        return Sample("raw", np.ascontiguousarray(pixels).reshape(-1), height, width), "raw" if fits else "resized"
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), encoding.quality, "RGB", "444")
    return Sample("jpg", np.frombuffer(jpeg, np.uint8), height, width), "reencoded" if fits else "resized"


def find_remarks(sample: Sample, name: str, outcome: Outcome) -> tuple[str, ...]:
    """Return what is odd about an image that could be decoded, in the order of REMARKS.

    Oddities that force a new encoding (no JPEG, CMYK, a layout that not every decoder reads, too large), and two
    that change nothing, since EXIF is never looked at: a block that readers of EXIF stumble over, and a rotation.
    """
    found = set()
    if outcome == "resized":
        found.add(_LARGE)
    if sample.mode != "raw":
        colours = _colours(sample.data)
        if colours is None:
            found.add(_NOT_JPEG)
            if name.lower().endswith((".jpg", ".jpeg")):
                found.add(_NAME_ONLY)
        elif colours in ("CMYK", "YCCK"):
            found.add(_CMYK)
        elif colours not in ("Gray", "YCbCr"):
            found.add(_UNUSUAL)
        for block in _exif_blocks(sample.data) if colours is not None else ():
            orientation = _orientation(block)
            if orientation is None:
                found.add(_BROKEN_EXIF)
            elif orientation != 1:
                found.add(_ROTATED)
    return tuple(remark for remark in REMARKS if remark in found)


def _colours(data: Pixels) -> str | None:
    """Return the colour space of a JPEG, "unnamed" if its chroma sampling has no name, None if it is no JPEG.

    Every JPEG decoder, on CPU and GPU, makes the same colours of gray and YCbCr. A chroma sampling that
    libjpeg-turbo has no name for FFCV could not read.
    """
    if data[:2].tobytes() != b"\xff\xd8":
        return None
    try:
        return str(simplejpeg.decode_jpeg_header(data)[2])
    except ValueError:
        return "unnamed"


def _exif_blocks(data: Pixels) -> Iterator[bytes]:
    """Yield the payload of every EXIF segment before the first scan of a JPEG."""
    at = 2
    while at + 4 <= data.size and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int(data[at + 2]) << 8 | int(data[at + 3])
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10].tobytes() == b"Exif\0\0":
            yield data[at + 10 : at + 2 + length].tobytes()
        at += 2 + max(length, 2)


def _orientation(exif: bytes) -> int | None:
    """Return the orientation in an EXIF block (1, upright, without one), None if its first directory is broken."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    directory, orientation = number(4, 4), 1
    num_entries = number(directory, 2)
    complete = directory + 2 + 12 * num_entries + 4 <= len(exif)
    if exif[:2] not in (b"II", b"MM") or number(2, 2) != 42 or directory < 8 or not complete:
        return None
    for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
        size = _TIFF_SIZES.get(number(entry + 2, 2), 0) * number(entry + 4, 4)
        if size > 4 and number(entry + 8, 4) + size > len(exif):
            return None
        if number(entry, 2) == _TAG_ORIENTATION:
            orientation = number(entry + 8, 2)
    return orientation


def _shrink(pixels: Pixels, limit: int) -> Pixels:
    """Shrink (H, W, 3) pixels, area-averaged, until the longest side is `limit`."""
    height, width = pixels.shape[:2]
    scale = limit / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrunk: Any = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return shrunk  # type: ignore[no-any-return]
