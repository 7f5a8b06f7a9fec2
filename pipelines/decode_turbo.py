"""CPU decoding with libjpeg-turbo (simplejpeg) and OpenCV: the embedded default, no system packages.

One call does one sample: bytes -> RGB pixels -> the plan's window -> the output slot, flipped if the plan says so.
Nothing here draws a random number: windows and flips come from `pipelines.plan`.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from fasttht.pipelines import DataError

if TYPE_CHECKING:
    from fasttht.pipelines.datasets import Sample

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# The loader already runs one thread per worker; OpenCV's own pool would oversubscribe the cores.
cv2.setNumThreads(1)


def image_size(data: Pixels) -> tuple[int, int]:
    """Read (height, width) of an encoded image from its header.

    Raises: DataError if the header of neither a JPEG nor any format Pillow knows can be read.
    """
    if data[:2].tobytes() == b"\xff\xd8":
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise DataError(f"expected a readable JPEG header, got {error}") from None
        return int(height), int(width)
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"expected an image, got {error}") from None


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
    if data[:2].tobytes() == b"\xff\xd8":
        try:
            if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)  # type: ignore[no-any-return]
        except ValueError as error:
            raise DataError(f"expected a whole JPEG, got {error}") from None
    # Not a JPEG, or one with four inks, whose conversion to RGB Pillow defines.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about palette transparency and broken EXIF blocks
            with Image.open(io.BytesIO(data.tobytes())) as image:
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"expected an image, got {error}") from None


def crop_resize_into(pixels: Pixels, window: tuple[int, int, int, int], flip: bool, out: Pixels) -> None:
    """Write `window` (top, left, height, width) of `pixels`, resized, into `out` (size, size, 3) uint8.

    Shrinking averages areas (antialiased), enlarging is bilinear, equal size copies.
    """
    top, left, height, width = window
    crop = pixels[top : top + height, left : left + width]
    size_y, size_x = out.shape[:2]
    if (height, width) != (size_y, size_x):
        method = cv2.INTER_AREA if height >= size_y and width >= size_x else cv2.INTER_LINEAR
        resized: Any = cv2.resize(crop, (size_x, size_y), interpolation=method)
        crop = resized
    out[:] = crop[:, ::-1] if flip else crop
