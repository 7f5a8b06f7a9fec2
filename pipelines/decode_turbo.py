"""CPU decoding with libjpeg-turbo (simplejpeg): the embedded default, no system packages.

One call does one sample: bytes -> RGB pixels -> the plan's window -> the output slot, flipped if the plan says so.
Nothing here draws a random number: windows and flips come from `pipelines.plan`.

An image is decoded whole even where a window is wanted: neither simplejpeg 1.9 nor Pillow or OpenCV decodes a part of a
JPEG, and PyTurboJPEG crops only losslessly, into another JPEG.

The resampler is torch's antialiased bilinear one: Pillow's BILINEAR in fixed point (at most 2/255 apart, 0.02/255 on
average), which is what torchvision trains and evaluates with; at RRC 224 it takes a third of OpenCV's INTER_AREA.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fasttht.pipelines import DataError
from fasttht.pipelines.decoder import Cut
from fasttht.pipelines.samples import MAX_PIXELS, Pixels, Sample
from fasttht.pipelines.stages import Track

# The loader already runs one thread per worker; OpenCV's own pool would oversubscribe the cores.
cv2.setNumThreads(1)

# Palette transparency and broken EXIF blocks are of no interest here; an image of more pixels than Pillow trusts is a
# bad one. Set once: catch_warnings() in the decoding threads would race over the process's filters.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def image_size(data: Pixels) -> tuple[int, int]:
    """Read (height, width) of an encoded image from its header.

    Raises: DataError if the header of neither a JPEG nor any format Pillow knows can be read, or claims too much.
    """
    if is_jpeg(data) and (header := jpeg_header(data)) is not None:
        return header[0], header[1]
    with _pillow(data) as image:
        return image.height, image.width


def decode_rgb(sample: Sample, *, denominator: int = 1) -> Pixels:
    """Decode one sample to RGB pixels, (height, width, 3) uint8.

    denominator 2 or 4 asks for half or a quarter of height and width, rounded up; what cannot be shrunk while it is
    decoded (CMYK, say) comes in full size.
    EXIF rotation is ignored, as FFCV and torchvision ignore it. Gray and CMYK become RGB.
    Strict: a truncated or damaged JPEG raises instead of yielding gray or stale pixels.

    Raises: DataError with the decoder's words, and for more than MAX_PIXELS or than memory has room for.
    """
    try:
        return _decode(sample, denominator)
    except MemoryError:
        raise DataError("expected an image that memory has room for, got one too large") from None


def check_pixels(height: int, width: int, what: str = "an image") -> None:
    """Refuse a size before anything of it is allocated. Raises: DataError."""
    if height * width > MAX_PIXELS:
        raise DataError(f"expected {what} of at most {MAX_PIXELS:,} pixels, got {height}x{width}; shrink it")


def _decode(sample: Sample, denominator: int) -> Pixels:
    data = sample.data
    if sample.mode == "raw":
        expected = sample.height * sample.width * 3
        if data.size != expected:
            raise DataError(f"expected {expected} raw bytes ({sample.height}x{sample.width}x3), got {data.size}")
        return data.reshape(sample.height, sample.width, 3)
    if is_jpeg(data):
        header = jpeg_header(data)
        # Four inks have no one conversion to RGB: Pillow's is taken, which torchvision's loader takes too.
        if header is not None and header[2] not in ("CMYK", "YCCK"):
            height, width = (-(-side // denominator) for side in header[:2])
            try:
                return simplejpeg.decode_jpeg(  # type: ignore[no-any-return]
                    data, "RGB", min_height=height, min_width=width, min_factor=denominator, strict=True
                )
            except ValueError as error:
                raise DataError(f"expected a whole JPEG, got {error}") from None
    with _pillow(data) as image:
        return np.asarray(image.convert("RGB"))


def is_jpeg(data: Pixels) -> bool:
    """Return whether encoded bytes begin as a JPEG does."""
    return data[:2].tobytes() == b"\xff\xd8"


def jpeg_header(data: Pixels) -> tuple[int, int, str] | None:
    """Return (height, width, colour space), or None for a legal JPEG whose chroma layout simplejpeg cannot name.

    Every decoder asks here first. Raises: DataError for a header that cannot be read, or claims more than MAX_PIXELS.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if "subsampling" in str(error):
            return None
        raise DataError(f"expected a readable JPEG header, got {error}") from None
    check_pixels(int(height), int(width))
    return int(height), int(width), colorspace


@contextmanager
def _pillow(data: Pixels) -> Iterator[Image.Image]:
    """Open an image with Pillow; whatever it cannot read, then or while it is used, becomes a DataError."""
    wanted = "a whole JPEG" if is_jpeg(data) else "an image"
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            check_pixels(image.height, image.width)
            yield image
    except UnidentifiedImageError:
        raise DataError(f"expected {wanted}, got bytes of no known format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"expected {wanted}, got {error}") from None


def crop_resize_into(pixels: Pixels, window: tuple[int, int, int, int], flip: bool, out: Pixels) -> None:
    """Write `window` (top, left, height, width) of `pixels`, resized, into `out` (size, size, 3) uint8, C order.

    Antialiased bilinear; equal size copies. Pixels outside the window have no influence.
    """
    top, left, height, width = window
    _resize_into(pixels[top : top + height, left : left + width], flip, out)


def resize_center_into(pixels: Pixels, short_side: int, out: Pixels) -> None:
    """Resize until the short side has `short_side` pixels, then write the centre into `out` (size, size, 3) uint8.

    What torchvision's Resize(short_side) and CenterCrop(size) do to a Pillow image, rounding included.

    Raises: ValueError if `out` is larger than the resized image; DataError for an image so long that it is too large
    once resized.
    """
    height, width = pixels.shape[:2]
    short, size = min(height, width), len(out)
    if size > short_side:
        raise ValueError(f"resize_center_into: expected an output of at most {short_side} pixels, got {size}")
    tall, wide = int(short_side * height / short), int(short_side * width / short)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    check_pixels(tall, wide, f"an image with {short_side} on its short side")
    if (tall, wide) == (size, size):
        _resize_into(pixels, False, out)
        return
    resized = np.empty((tall, wide, 3), dtype=np.uint8)
    _resize_into(pixels, False, resized)
    out[:] = resized[top : top + size, left : left + size]


def decode_into(sample: Sample, cut: Cut, out: Pixels, track: Track) -> None:
    """Decode one sample, cut and resize it into its slot `out` (S, S, 3). Raises: DataError."""
    track.enter("decode")
    denominator = _scale_denominator(sample, cut, len(out))
    pixels = decode_rgb(sample, denominator=denominator)
    track.enter("resize")
    height, width = cut.shape  # the window was cut for the announced size
    if pixels.shape[:2] == (height, width):
        if cut.short_side is not None:
            resize_center_into(pixels, cut.short_side, out)
        else:
            crop_resize_into(pixels, cut.window, cut.flip, out)
    elif pixels.shape[:2] == (-(-height // denominator), -(-width // denominator)):
        _resize_scaled_into(pixels, denominator, cut, out)
    else:
        found = "x".join(map(str, image_size(sample.data) if denominator > 1 else pixels.shape[:2]))
        raise DataError(f"expected an image of {height}x{width} pixels, as announced, got {found}")


def _scale_denominator(sample: Sample, cut: Cut, size: int) -> int:
    """Return 1, 2 or 4: by how much the decoder may shrink an image in its DCT.

    Only where the window stays at least twice the output: then the pixels are 0.4/255 on average from those of a full
    decode, 1.2 in the worst of seven photographs (without that margin 3). Other factors take longer than a full decode.
    Never in evaluation.
    """
    if cut.short_side is not None or not is_jpeg(sample.data) or sample.mode == "raw":
        return 1
    side = min(cut.window[2:])
    return next((denominator for denominator in (4, 2) if side >= 2 * denominator * size), 1)


def _resize_scaled_into(pixels: Pixels, denominator: int, cut: Cut, out: Pixels) -> None:
    """Resize a window given in full-size pixels out of an image decoded at 1/denominator.

    By Pillow, which takes windows with fractions; the image is large, so the decoder's saving outweighs its slowness.
    """
    top, left, height, width = (side / denominator for side in cut.window)
    bottom, right = min(top + height, pixels.shape[0]), min(left + width, pixels.shape[1])
    image = Image.fromarray(pixels).resize(
        (out.shape[1], out.shape[0]), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    crop_resize_into(np.array(image), (0, 0, *out.shape[:2]), cut.flip, out)


def _resize_into(pixels: Pixels, flip: bool, out: Pixels) -> None:
    """Resize all of `pixels` into all of `out`, mirrored if asked.

    torch and OpenCV write into `out` themselves: a mirrored numpy copy alone costs 300 us at 224 pixels, cv2.flip 50.
    """
    if not out.flags.c_contiguous:
        raise ValueError("resize: expected out in C order, got a strided view; the resampler would write beside it")
    if pixels.shape == out.shape:
        if flip:
            cv2.flip(pixels, 1, dst=out)
        else:
            out[:] = pixels
        return
    if not pixels.flags.writeable:  # a view of something shared, which torch refuses to wrap
        pixels = pixels.copy()
    target = np.empty_like(out) if flip else out
    torch.ops.aten._upsample_bilinear2d_aa.out(_as_image(pixels), out.shape[:2], False, out=_as_image(target))
    if flip:
        cv2.flip(target, 1, dst=out)


def _as_image(pixels: Pixels) -> Tensor:
    """Return (H, W, 3) pixels as a (1, 3, H, W) channels-last tensor of the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
