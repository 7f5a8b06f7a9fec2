"""Images to .beton files: what is stored as it is, what is encoded anew, and in which order.

`encode_sample` is the work on one image and pure; `write_split` makes one file; `write_dataset` makes a
folder with `train.beton` and `val.beton`. The same data and settings give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import simplejpeg

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import MAX_SIDE, write_beton
from fasttht.pipelines.datasets import Sample, Samples, digits, folder_splits, imagenet_splits
from fasttht.pipelines.decode_turbo import Pixels, decode_rgb
from fasttht.pipelines.manifest import Manifest, manifest_path, write_manifest
from fasttht.pipelines.plan import STREAM_WRITE, hash_rows

Encode = Literal["passthrough", "jpeg", "raw"]
Kind = Literal["imagenet", "folder", "digits"]
Outcome = Literal["passthrough", "reencoded", "resized", "raw"]

# Longest side kept when the caller does not choose. Larger ImageNet images would never be seen at full size.
MAX_RESOLUTION: Mapping[Kind, int | None] = {"imagenet": 500, "folder": None, "digits": None}

# Unfinished work, by machine and process: ranks that start together may write the same folder at once.
_STAGING = f".fasttht-partial-{socket.gethostname()}-"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What was written: images, bytes of the .beton, and images per outcome (they add up to num_samples).

    Outcomes: "passthrough" byte for byte, "reencoded" as JPEG at the same size, "raw" pixels at the same
    size, "resized" shrunk first, then either.
    """

    num_samples: int
    num_bytes: int
    counts: dict[Outcome, int]


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
    if keeps and sample.mode != "raw" and _is_plain_jpeg(sample.data):
        return Sample("jpg", sample.data, height, width), "passthrough"
    if limit is not None and not fits:
        pixels = _shrink(pixels, limit)
        height, width = pixels.shape[:2]
    if encoding.encode == "raw" or (encoding.encode == "passthrough" and sample.mode == "raw"):
        return Sample("raw", np.ascontiguousarray(pixels).reshape(-1), height, width), "raw" if fits else "resized"
    if max(height, width) > MAX_SIDE:
        raise DataError(
            f"expected at most {MAX_SIDE} pixels a side, got {height}x{width}; write with a maximum resolution"
        )
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), encoding.quality, "RGB", "444")
    return Sample("jpg", np.frombuffer(jpeg, np.uint8), height, width), "reencoded" if fits else "resized"


def write_split(
    samples: Samples,
    path: Path | str,
    *,
    encode: Encode = "passthrough",
    max_resolution: int | None = None,
    quality: int = 95,
    seed: int = 0,
    shuffle: bool = True,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WriteReport:
    """Write `samples` to the .beton `path`, and its manifest beside it.

    Rows are laid down in an order drawn from `seed` (files read page by page then still mix the classes), or
    as they come. `settings` are noted in the manifest beside this function's own. `progress` is called with
    (images done, images in all) after every image. On any error no new file is left; if that comes before
    the last image is stored, an older file stays as it was.

    Raises: DataError if `path` exists (without `force`) or an image cannot be stored, naming it; ValueError.
    """
    encoding = Encoding(encode=encode, max_resolution=max_resolution, quality=quality)
    path = Path(path)
    if not path.parent.is_dir():
        raise DataError(f"{path}: expected an existing folder to write to, got none; make it first")
    _refuse_existing(path, force)
    order = np.arange(len(samples), dtype=np.int64)
    if shuffle:
        order = np.argsort(hash_rows(STREAM_WRITE, seed, 0, 0, order), kind="stable")
    counts: Counter[Outcome] = Counter()

    def rows() -> Iterator[tuple[Sample, int]]:
        for done, i in enumerate(order.tolist(), start=1):
            try:
                stored, outcome = encode_sample(samples.sample(i), encoding)
            except DataError as error:
                raise DataError(f"{samples.where(i)}: {error}") from None
            counts[outcome] += 1
            yield stored, int(samples.labels[i])
            if progress is not None:
                progress(done, len(order))

    fingerprint = write_beton(path, rows(), len(order))
    manifest = Manifest(
        num_samples=len(order),
        fingerprint=fingerprint,
        class_names=samples.class_names,
        settings={**(settings or {}), **asdict(encoding), "seed": seed, "shuffle": shuffle},
        sources=tuple(samples.origin(i) for i in order.tolist()),
    )
    try:
        write_manifest(path, manifest)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return WriteReport(num_samples=len(order), num_bytes=path.stat().st_size, counts=dict(counts))


def write_dataset(
    kind: Kind,
    source: Path | str | None,
    output: Path | str,
    *,
    encode: Encode = "passthrough",
    max_resolution: int | Literal["default"] | None = "default",
    quality: int = 95,
    seed: int = 0,
    shuffle: bool = True,
    val_fraction: float = 0.1,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, WriteReport]:
    """Write `train.beton` and `val.beton`, with manifests, into the folder `output`; reports by split.

    `source` is the folder of images, None for the embedded digits. `max_resolution` "default" is
    MAX_RESOLUTION[kind]. `val_fraction` is used for a folder without a val split. `progress` is called with
    (split, images done, images in all).

    Both files are made in a hidden folder inside `output` (one per process) and moved once both are whole:
    after an error neither is there, and older ones stay as they were.

    Raises: DataError if the source cannot be used or the output exists (without `force`); ValueError.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {get_args(Kind)}, got {kind!r}")
    limit = MAX_RESOLUTION[kind] if max_resolution == "default" else max_resolution
    Encoding(encode=encode, max_resolution=limit, quality=quality)
    output = Path(output)
    for split in ("train", "val"):
        _refuse_existing(output / f"{split}.beton", force)
    splits = _open_splits(kind, source, val_fraction, seed)
    existed = output.exists()
    staging = output / f"{_STAGING}{os.getpid()}"
    reports: dict[str, WriteReport] = {}
    try:
        _make_staging(staging)
        for split, samples in splits.items():
            reports[split] = write_split(
                samples,
                staging / f"{split}.beton",
                encode=encode,
                max_resolution=limit,
                quality=quality,
                seed=seed,
                shuffle=shuffle,
                settings={"kind": kind, "split": split},
                progress=None if progress is None else _bind(progress, split),
            )
        for split in splits:
            beton = output / f"{split}.beton"
            (staging / beton.name).replace(beton)
            manifest_path(staging / beton.name).replace(manifest_path(beton))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                output.rmdir()  # succeeds only where it is empty, after an error
    return reports


def _open_splits(kind: Kind, source: Path | str | None, val_fraction: float, seed: int) -> Mapping[str, Samples]:
    if (source is None) != (kind == "digits"):
        raise ValueError(f"source: expected a folder, or None for the embedded digits, got {source} for {kind!r}")
    if source is None:
        return {"train": digits("train"), "val": digits("val")}
    if kind == "imagenet":
        return imagenet_splits(source)
    return folder_splits(source, val_fraction=val_fraction, seed=seed)


def _bind(progress: Callable[[str, int, int], None], split: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(split, done, total)


def _make_staging(staging: Path) -> None:
    """Make the folder `staging`, and remove what killed processes of this machine have left beside it.

    Raises: DataError.
    """
    for left in staging.parent.glob(f"{_STAGING}*"):
        pid = left.name.removeprefix(_STAGING)
        if left == staging or not (pid.isdecimal() and _is_running(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{staging.parent}: expected a folder to write to, got {error.strerror}") from None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _refuse_existing(path: Path, force: bool) -> None:
    for file in (path, manifest_path(path)):
        if file.exists() and not force:
            raise DataError(f"{file}: expected no such file, got one; choose another output or force the write")


def _is_plain_jpeg(data: Pixels) -> bool:
    """Tell whether every JPEG decoder, on CPU and GPU, makes the same colours of it: gray or YCbCr."""
    if data[:2].tobytes() != b"\xff\xd8":
        return False
    try:
        return simplejpeg.decode_jpeg_header(data)[2] in ("Gray", "YCbCr")
    except ValueError:  # a chroma sampling that libjpeg-turbo has no name for: FFCV could not read it
        return False


def _shrink(pixels: Pixels, limit: int) -> Pixels:
    """Shrink (H, W, 3) pixels, area-averaged, until the longest side is `limit`."""
    height, width = pixels.shape[:2]
    scale = limit / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shrunk: Any = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return shrunk  # type: ignore[no-any-return]
