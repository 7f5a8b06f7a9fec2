"""FFCV's own C kernels (libjpeg-turbo with its fast DCT, OpenCV's INTER_AREA), called from our worker threads.

Only the two functions of FFCV's compiled library are used, with the windows and flips of our plan and with their
return codes checked: FFCV's loader ignores them, draws crops of its own and trains on what a damaged JPEG left in the
buffer. The `ffcv` package itself is not imported; that would compile numba kernels for seconds.

The pixels are not those of decode_turbo, for two reasons. FFCV asks for the fast DCT: it darkens by 0.8/255, and on
photographs it is off by 1.0/255 on average and 8 at most at quality 90, by 1.4 and 19 at 95, by 2.1 and 36 at 100 (on
noise of quality 100 by 11 and 89). And INTER_AREA averages over a box where antialiased bilinear weights a triangle
twice as wide: with both, random-resized-crops of photographs differ by 1.4/255 on average at 224 pixels and by 3.1 at
32, the worst image by 5. The geometry is the same, in evaluation too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from fasttht.pipelines import DataError
from fasttht.pipelines.decode_turbo import check_pixels, decode_rgb, is_jpeg, jpeg_header
from fasttht.pipelines.samples import Pixels

if TYPE_CHECKING:
    from fasttht.pipelines.decoder import Cut
    from fasttht.pipelines.samples import Sample
    from fasttht.pipelines.stages import Track
    from fasttht.pipelines.threaded import DecodeInto

# Decoded images up to this size share one buffer per thread: fresh pages for each are page faults. A
# larger one is rare, and its buffer is not kept.
_MAX_SCRATCH_BYTES = 32 << 20


def load_decode_into() -> DecodeInto:
    """Return the function that decodes one sample with FFCV's kernels.

    Raises: ImportError if FFCV or its compiled library is not there, or is not the one that is known here.
    """
    return _Kernels(_find_library()).decode_into


def _find_library() -> Path:
    spec = importlib.util.find_spec("ffcv")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('loader ffcv: expected the ffcv package, got none; run: pip install "fasttht[ffcv]"')
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("_libffcv*.so")):
            return path
    raise ImportError(
        f"loader ffcv: expected a compiled _libffcv*.so in {folder}, got none; "
        'run: pip install --force-reinstall --no-deps "ffcv==1.0.2"'
    )


class _Kernels:
    """The two C functions, with their types. A call through ctypes lets go of the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            self._imdecode, self._resize = library.imdecode, library.resize
        except (OSError, AttributeError) as error:
            raise ImportError(
                f"loader ffcv: expected the functions imdecode and resize in {path}, got {error}; "
                "install ffcv 1.0.2, or take the loader turbo"
            ) from None
        self._imdecode.restype = ctypes.c_int
        self._imdecode.argtypes = [
            ctypes.c_void_p, ctypes.c_uint64,  # encoded bytes
            ctypes.c_uint32, ctypes.c_uint32,  # the image's height and width, unused by FFCV
            ctypes.c_void_p,                   # where the pixels go
            ctypes.c_uint32, ctypes.c_uint32,  # height and width decoded to
            ctypes.c_uint32, ctypes.c_uint32,  # x and y of a crop
            ctypes.c_uint32, ctypes.c_uint32,  # scale: numerator, denominator
            ctypes.c_bool, ctypes.c_bool,      # crop, mirror
        ]  # fmt: skip
        self._resize.restype = None
        self._resize.argtypes = [ctypes.c_int64] * 11
        # FFCV links an OpenCV of its own, whose pool would start a thread per core in every worker. It has no C
        # function for that: this is the C++ one's name. Without it images are resized no differently.
        set_num_threads = getattr(library, "_ZN2cv13setNumThreadsEi", None)
        if set_num_threads is not None:
            set_num_threads.restype = None
            set_num_threads.argtypes = [ctypes.c_int]
            set_num_threads(1)
        self._local = threading.local()

    def decode_into(self, sample: Sample, cut: Cut, out: Pixels, track: Track) -> None:
        """Decode one sample, cut and resize it into its slot `out` (S, S, 3). Raises: DataError."""
        if not out.flags.c_contiguous:
            raise ValueError("decode: expected out in C order, got a strided view; the kernel would write beside it")
        track.enter("decode")
        pixels = self._decode(sample, cut.shape)
        track.enter("resize")
        if cut.short_side is not None:
            self._resize_center(pixels, cut.short_side, out)
            return
        target = np.empty_like(out) if cut.flip else out
        self._resize_window(pixels, cut.window, target)
        if cut.flip:
            cv2.flip(target, 1, dst=out)

    def _decode(self, sample: Sample, shape: tuple[int, int]) -> Pixels:
        """Decode to exactly (*shape, 3) uint8; the result lives until the thread's next call."""
        header = jpeg_header(sample.data) if sample.mode != "raw" and is_jpeg(sample.data) else None
        if header is None or header[2] in ("CMYK", "YCCK"):
            pixels = decode_rgb(sample)
            _check_shape(pixels.shape[:2], shape)
            return pixels
        # Before anything is written: the kernel trusts the size it is told.
        _check_shape(header[:2], shape)
        pixels = self._scratch(shape)
        data = np.ascontiguousarray(sample.data)
        failed = self._imdecode(
            data.ctypes.data, data.size, *shape, pixels.ctypes.data, *shape, 0, 0, 1, 1, False, False
        )
        if failed:  # also where libjpeg only warns of damage and fills the rest with gray
            decode_rgb(sample)  # knows the words for what is wrong
            raise DataError("expected a whole JPEG, got one that FFCV's decoder refuses")
        return pixels

    def _scratch(self, shape: tuple[int, int]) -> Pixels:
        num_bytes = shape[0] * shape[1] * 3
        if num_bytes > _MAX_SCRATCH_BYTES:
            try:
                return np.empty((*shape, 3), dtype=np.uint8)
            except MemoryError:
                raise DataError("expected an image that memory has room for, got one too large") from None
        buffer: Pixels | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < num_bytes:
            buffer = self._local.buffer = np.empty(num_bytes, dtype=np.uint8)
        return buffer[:num_bytes].reshape(*shape, 3)

    def _resize_center(self, pixels: Pixels, short_side: int, out: Pixels) -> None:
        """Resize to a short side of `short_side` pixels and take the centre: decode_turbo's geometry, to the pixel."""
        height, width = pixels.shape[:2]
        tall, wide = (int(short_side * side / min(height, width)) for side in (height, width))
        check_pixels(tall, wide, f"an image with {short_side} on its short side")
        resized = np.empty((tall, wide, 3), dtype=np.uint8)
        self._resize_window(pixels, (0, 0, height, width), resized)
        top, left = (round((side - len(out)) / 2) for side in (tall, wide))
        out[:] = resized[top : top + len(out), left : left + len(out)]

    def _resize_window(self, pixels: Pixels, window: tuple[int, int, int, int], out: Pixels) -> None:
        top, left, height, width = window
        inside = top >= 0 and left >= 0 and top + height <= pixels.shape[0] and left + width <= pixels.shape[1]
        if not inside or min(height, width, *out.shape[:2]) < 1:
            # OpenCV would throw through C code that catches nothing, and end the process.
            raise ValueError(f"resize: expected a window inside {pixels.shape[:2]} pixels, got {window}")
        pixels = np.ascontiguousarray(pixels)
        self._resize(
            0, pixels.ctypes.data, *pixels.shape[:2], top, top + height, left, left + width,
            out.ctypes.data, *out.shape[:2],
        )  # fmt: skip


def _check_shape(found: tuple[int, ...], announced: tuple[int, int]) -> None:
    if found != announced:
        problem = f"expected an image of {announced[0]}x{announced[1]} pixels, as announced"
        raise DataError(f"{problem}, got {found[0]}x{found[1]}")
