"""CPU decoding with libjpeg-turbo (simplejpeg) and OpenCV: the embedded default, no system packages.

One call does one sample: bytes -> RGB pixels -> the plan's window -> the output slot, flipped if the plan says so.
Nothing here draws a random number: windows and flips come from `pipelines.plan`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fasttht.pipelines import DataError

if TYPE_CHECKING:
    from fasttht.pipelines.datasets import Sample

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# The loader already runs one thread per worker; OpenCV's own pool would oversubscribe the cores.
cv2.setNumThreads(1)

# Palette transparency and broken EXIF blocks are of no interest here; an image of more pixels than Pillow trusts is a
# bad one. Set once: catch_warnings() in the decoding threads would race over the process's filters.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def image_size(data: Pixels) -> tuple[int, int]:
    """Read (height, width) of an encoded image from its header.

    Raises: DataError if the header of neither a JPEG nor any format Pillow knows can be read.
    """
    if _is_jpeg(data) and (header := _jpeg_header(data)) is not None:
        return header[0], header[1]
    with _pillow(data) as image:
        return image.height, image.width


def decode_rgb(sample: Sample) -> Pixels:
    """Decode one sample to RGB pixels, (height, width, 3) uint8.

    EXIF rotation is ignored, as FFCV and torchvision ignore it. Gray and CMYK become RGB.
    Strict: a truncated or damaged JPEG raises instead of yielding gray or stale pixels.

    Raises: DataError with the decoder's words.
    """
    data = sample.data
    if sample.mode == "raw":
        expected = sample.height * sample.width * 3
        if data.size != expected:
            raise DataError(f"expected {expected} raw bytes ({sample.height}x{sample.width}x3), got {data.size}")
        return data.reshape(sample.height, sample.width, 3)
    if _is_jpeg(data):
        header = _jpeg_header(data)
        # Four inks have no one conversion to RGB: Pillow's is taken, which torchvision's loader takes too.
        if header is not None and header[2] not in ("CMYK", "YCCK"):
            try:
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)  # type: ignore[no-any-return]
            except ValueError as error:
                raise DataError(f"expected a whole JPEG, got {error}") from None
    with _pillow(data) as image:
        return np.asarray(image.convert("RGB"))


def _is_jpeg(data: Pixels) -> bool:
    return data[:2].tobytes() == b"\xff\xd8"


def _jpeg_header(data: Pixels) -> tuple[int, int, str] | None:
    """Return (height, width, colour space), or None for a legal JPEG whose chroma layout simplejpeg cannot name."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if "subsampling" in str(error):
            return None
        raise DataError(f"expected a readable JPEG header, got {error}") from None
    return int(height), int(width), colorspace


@contextmanager
def _pillow(data: Pixels) -> Iterator[Image.Image]:
    """Open an image with Pillow; whatever it cannot read, then or while it is used, becomes a DataError."""
    wanted = "a whole JPEG" if _is_jpeg(data) else "an image"
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            yield image
    except UnidentifiedImageError:
        raise DataError(f"expected {wanted}, got bytes of no known format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"expected {wanted}, got {error}") from None


def crop_resize_into(pixels: Pixels, window: tuple[int, int, int, int], flip: bool, out: Pixels) -> None:
    """Write `window` (top, left, height, width) of `pixels`, resized, into `out` (size, size, 3) uint8, C order.

    Shrinking averages areas (antialiased), enlarging is bilinear, equal size copies.
    OpenCV writes into `out` itself: a mirrored numpy copy alone costs 300 us at 224 pixels, its flip 50.
    """
    if not out.flags.c_contiguous:
        raise ValueError("crop_resize_into: expected out in C order, got a strided view; OpenCV would write beside it")
    top, left, height, width = window
    crop = pixels[top : top + height, left : left + width]
    size_y, size_x = out.shape[:2]
    if (height, width) != (size_y, size_x):
        method = cv2.INTER_AREA if height >= size_y and width >= size_x else cv2.INTER_LINEAR
        if not flip:
            cv2.resize(crop, (size_x, size_y), dst=out, interpolation=method)
            return
        resized: Any = cv2.resize(crop, (size_x, size_y), interpolation=method)
        crop = resized
    if flip:
        cv2.flip(crop, 1, dst=out)
    else:
        out[:] = crop
