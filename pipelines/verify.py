"""Whether .beton files are whole: every image's checksum, decoding, size and label; and what a file holds."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import MODES, BetonFile
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.manifest import read_manifest
from fasttht.pipelines.ordered import count_workers, map_ordered

SHOWN_PROBLEMS = 20
LISTED_CLASSES = 20  # of more, verify shows quantiles
_QUANTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found in one file: its first SHOWN_PROBLEMS problems, and how many there are.

    histogram: images per label; class_names: theirs, if they are known. checksums: the manifest has some, so that equal
    bytes are proven and not only whole pictures. stock: what stock FFCV's reader says to the file, in words.
    """

    path: Path
    num_samples: int
    problems: tuple[str, ...]
    num_problems: int
    histogram: tuple[int, ...]
    class_names: tuple[str, ...]
    checksums: bool
    stock: str

    def describe_histogram(self) -> str:
        """Return images per class in words: of every class, or of many the quantiles and the extreme ones."""
        counts = np.array(self.histogram)
        names = [self.class_names[i] if i < len(self.class_names) else str(i) for i in range(len(counts))]
        if len(counts) <= LISTED_CLASSES:
            return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
        order = np.argsort(counts, kind="stable")
        low, middle, high = np.percentile(counts, (5, 50, 95), method="nearest")
        fewest, most = (", ".join(f"{names[i]} {counts[i]:,}" for i in chosen) for chosen in (order[:3], order[:-4:-1]))
        return f"fewest {fewest}; 5 % {low:,}, median {middle:,}, 95 % {high:,}; most {most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What the index and the manifest of one file say; no image was looked at.

    modes: images by how they are stored. sides: (percentile, shorter side, longer side) in pixels.
    """

    path: Path
    num_samples: int
    num_classes: int
    num_bytes: int
    num_image_bytes: int
    page_size: int
    modes: Mapping[str, int]
    sides: tuple[tuple[int, int, int], ...]
    fingerprint: str
    has_manifest: bool
    checksums: bool
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    remarks: Mapping[str, int]
    num_skipped: int


def find_betons(path: Path | str) -> list[Path]:
    """Return the file `path`, or both files of a data set folder. Raises: DataError if they are not there."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    betons = [path / f"{split}.beton" for split in ("train", "val")]
    missing = [beton.name for beton in betons if not beton.exists()]
    if missing:
        raise DataError(
            f"{path}: expected train.beton and val.beton, got no {missing[0]}; write both, or name one file"
        )
    return betons


def verify_beton(
    path: Path | str, *, workers: int = 1, progress: Callable[[int, int, int], None] | None = None
) -> Verdict:
    """Look at every image of one file, in `workers` threads (0: one per core).

    `progress` is called with (images done, images in all, bytes done). A damaged index is a problem too, not an error.
    """
    path, problems, num_problems, num_bytes = Path(path), list[str](), 0, 0
    num_workers = count_workers(workers)
    try:
        beton = BetonFile(path)
        manifest = read_manifest(path, with_sources=False)
        if manifest is not None and manifest.num_samples != len(beton):
            raise DataError(f"{path}: expected {manifest.num_samples:,} samples (its manifest), got {len(beton):,}")
    except DataError as error:
        return Verdict(
            path=path,
            num_samples=0,
            problems=(str(error),),
            num_problems=1,
            histogram=(),
            class_names=(),
            checksums=False,
            stock="not asked",
        )
    _, sizes = beton.stored()
    heights, widths = beton.sizes(np.arange(len(beton)))

    def look(i: int) -> str:
        """Return what is wrong with row i, or nothing."""
        try:
            shape = decode_rgb(beton.sample(i)).shape
        except DataError as error:
            return f"{beton.where(i)}: {str(error).removeprefix(f'row {i}: ')}"
        if shape != (heights[i], widths[i], 3):
            return f"{beton.where(i)}: expected {heights[i]}x{widths[i]} pixels, got {shape[0]}x{shape[1]}"
        return ""

    for i, problem in enumerate(map_ordered(look, range(len(beton)), num_workers)):
        num_bytes += int(sizes[i])
        if problem:
            num_problems += 1
            problems += [problem] if len(problems) < SHOWN_PROBLEMS else []
        if progress is not None:
            progress(i + 1, len(beton), num_bytes)
    stock, agrees = _ask_stock_reader(beton)
    if not agrees:
        num_problems += 1
        problems = [f"{path}: expected stock FFCV to read it, got {stock}", *problems][:SHOWN_PROBLEMS]
    return Verdict(
        path=path,
        num_samples=len(beton),
        problems=tuple(problems),
        num_problems=num_problems,
        histogram=tuple(np.bincount(beton.labels, minlength=len(beton.class_names)).tolist()),
        class_names=beton.class_names,
        checksums=beton.verified,
        stock=stock,
    )


def describe_beton(path: Path | str) -> Info:
    """Read index and manifest of one file. Raises: DataError."""
    beton = BetonFile(path)
    manifest = read_manifest(beton.path, with_sources=False)
    modes, sizes = beton.stored()
    heights, widths = beton.sizes(np.arange(len(beton)))
    shorter, longer = (
        np.percentile(side, _QUANTILES, method="nearest").astype(np.int64).tolist()
        for side in (np.minimum(heights, widths), np.maximum(heights, widths))
    )
    num_modes = np.bincount(modes, minlength=len(MODES)).tolist()
    return Info(
        path=beton.path,
        num_samples=len(beton),
        num_classes=max(int(beton.labels.max()) + 1, len(beton.class_names)),
        num_bytes=beton.path.stat().st_size,
        num_image_bytes=int(sizes.sum()),
        page_size=beton.page_size,
        modes={mode: num for mode, num in zip(MODES, num_modes, strict=True) if num},
        sides=tuple(zip(_QUANTILES, shorter, longer, strict=True)),
        fingerprint=beton.fingerprint,
        has_manifest=manifest is not None,
        checksums=beton.verified,
        settings=manifest.settings if manifest else {},
        counts=manifest.counts if manifest else {},
        remarks=manifest.remarks if manifest else {},
        num_skipped=len(manifest.skipped) if manifest else 0,
    )


def _ask_stock_reader(beton: BetonFile) -> tuple[str, bool]:
    """Open the file with FFCV's own reader, if that is installed; return its answer, and whether it is a good one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of FFCV and numba, about each other
            reader_module = importlib.import_module("ffcv.reader")
    except (ImportError, OSError) as error:
        return f"skipped, FFCV does not import ({error})", True
    try:
        reader = reader_module.Reader(str(beton.path))
        if reader.num_samples != len(beton):
            return f"{reader.num_samples:,} samples", False
    except Exception as error:  # whatever it stumbles over is the answer
        return f"{type(error).__name__}: {error}", False
    return "reads it", True
