"""Where samples come from: class-per-folder image trees, ImageNet, and the digits that ship with the package.

Everything here is a `Samples`: a labelled image set with random access, stable row numbers and a fingerprint.
Row order is decided once, at construction, by sorted names, so the same data gives the same rows everywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from fasttht.pipelines import DataError
from fasttht.pipelines.plan import STREAM_WRITE, Index, hash_rows
from fasttht.pipelines.samples import Pixels, Sample, Samples

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
NUM_DIGITS_TRAIN = 1437

_Array = TypeVar("_Array", bound=np.ndarray[Any, Any])

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_WNID = re.compile(r"n\d{8}")
# Headers fit in this, but for files with large colour profiles or previews, which are then read whole.
_HEADER_BYTES = 1 << 16


class ImageTree:
    """A class-per-folder image tree: root/<class>/**/<image>; labels follow the sorted class names.

    Hidden files, files that are no images and images beside the class folders are ignored. Links are taken.
    The fingerprint covers names and file sizes, not contents: one stat per file instead of one read.

    Raises: DataError if there are not at least two class folders, or one of them holds no image.
    """

    def __init__(self, root: Path | str) -> None:
        self.path = Path(root)
        self.class_names = class_folders(self.path)
        by_class = [sorted(_images_below(self.path / name, name)) for name in self.class_names]
        if not any(by_class):
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{self.path}: expected images ({suffixes}), got none; check the folder")
        empty = [name for name, files in zip(self.class_names, by_class, strict=True) if not files]
        if empty:
            problem = f"{self.path}: expected an image in every class folder"
            raise DataError(f"{problem}, got none in {_some(empty)}; remove the empty folders")
        if len(by_class) < 2:
            problem = f"{self.path}: expected at least two class folders with images"
            raise DataError(f"{problem}, got only {self.class_names[0]!r}; point at the folder above it")
        self._files = [name for files in by_class for name in files]
        counts = [len(files) for files in by_class]
        self.labels = _read_only(np.repeat(np.arange(len(counts), dtype=np.int64), counts))

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._files:
            try:
                size = (self.path / name).stat().st_size
            except OSError as error:
                raise _unreadable(self.path / name, error) from None
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def sizes(self, index: Index) -> tuple[Index, Index]:
        found = np.empty((len(index), 2), dtype=np.int64)
        for row, i in enumerate(index):
            found[row] = _size_in_file(self.path / self._files[i])
        return found[:, 0], found[:, 1]

    def sample(self, i: int) -> Sample:
        path = self.path / self._files[i]
        try:
            return Sample("file", np.frombuffer(path.read_bytes(), dtype=np.uint8), 0, 0)
        except OSError as error:
            raise _unreadable(path, error) from None

    def where(self, i: int) -> str:
        return str(self.path / self._files[i])

    def origin(self, i: int) -> str:
        return self._files[i]


class Subset:
    """Some rows of another set, in the order given."""

    def __init__(self, samples: Samples, rows: Index) -> None:
        self._samples = samples
        self._rows = _read_only(np.array(rows, dtype=np.int64))
        self.path = samples.path
        self.class_names = samples.class_names
        self.labels = _read_only(samples.labels[self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def fingerprint(self) -> str:
        rows = self._rows.astype("<i8").tobytes()
        return hashlib.sha256(self._samples.fingerprint.encode() + rows).hexdigest()[:16]

    def sizes(self, index: Index) -> tuple[Index, Index]:
        return self._samples.sizes(self._rows[index])

    def sample(self, i: int) -> Sample:
        return self._samples.sample(int(self._rows[i]))

    def where(self, i: int) -> str:
        return self._samples.where(int(self._rows[i]))

    def origin(self, i: int) -> str:
        return self._samples.origin(int(self._rows[i]))


class DigitsSamples:
    """One split of the embedded digits: 8x8 RGB pixels, the source's 0..16 spread over 0..255.

    `attribution` names the authors and the licence of the data, CC BY 4.0.
    """

    class_names = tuple("0123456789")

    def __init__(self, split: Literal["train", "val"]) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"digits: expected split 'train' or 'val', got {split!r}")
        images, labels, order, self.attribution = _load_digits()
        self._rows = order[:NUM_DIGITS_TRAIN] if split == "train" else order[NUM_DIGITS_TRAIN:]
        gray = np.round(images[self._rows].astype(np.float64) * (255 / 16)).astype(np.uint8)
        self._pixels = _read_only(np.repeat(gray.reshape(len(gray), -1), 3, axis=1))
        self.path = Path(f"digits-{split}")
        self.labels = _read_only(labels[self._rows].astype(np.int64))
        self.fingerprint = hashlib.sha256(self._pixels.tobytes() + self.labels.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._rows)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        return np.full(len(index), 8, dtype=np.int64), np.full(len(index), 8, dtype=np.int64)

    def sample(self, i: int) -> Sample:
        return Sample("raw", self._pixels[i], 8, 8)

    def where(self, i: int) -> str:
        return f"embedded {self.path}, row {i} (image {self._rows[i]} of the source)"

    def origin(self, i: int) -> str:
        return str(self._rows[i])


def digits(split: Literal["train", "val"]) -> DigitsSamples:
    """Open the digits that ship with the package: 1,437 to train on, 360 held out, never overlapping."""
    return DigitsSamples(split)


def imagenet_splits(source: Path | str) -> dict[str, ImageTree]:
    """Open train/ and val/ of an ImageNet root, or of ILSVRC/Data/CLS-LOC below it.

    Any number of wnid folders is taken (subsets are fine), but both splits must have the same ones.

    Raises: DataError; for a flat val/ folder too, since its labels are not in the file names.
    """
    roots = Path(source), Path(source, "ILSVRC/Data/CLS-LOC")
    root = next((r for r in roots if (r / "train").is_dir() and (r / "val").is_dir()), None)
    if root is None:
        problem = f"{source}: expected train/ and val/, here or in ILSVRC/Data/CLS-LOC, got no such folders"
        raise DataError(f"{problem}; point at the ImageNet root")
    flat = _visible(root / "val")
    if not any(entry.is_dir() for entry in flat):
        problem = f"{root / 'val'}: expected wnid folders, got {len(flat):,} files and no folder"
        raise DataError(f"{problem}; sort the validation images into their n######## folders first")
    for split in ("train", "val"):
        strange = [name for name in class_folders(root / split) if not _WNID.fullmatch(name)]
        if strange:
            problem = f"{root / split}: expected only wnid folders (n########), got {_some(strange)}"
            raise DataError(f"{problem}; remove them, or write the tree as kind 'folder'")
    _check_same_classes(root / "train", root / "val")
    return {split: ImageTree(root / split) for split in ("train", "val")}


def folder_splits(source: Path | str, *, val_fraction: float = 0.1, seed: int = 0) -> dict[str, Samples]:
    """Open a train and a val split of class-per-folder trees.

    `train/` beside `val/` (else `valid/`, `validation/`, `test/`) are used as they are. A `train/` alone, or
    a single tree without splits, gives `val_fraction` of every class (at least one image, at most all but
    one) to val, by a seeded hash of the row.

    Raises: DataError if the trees cannot be used or a class has too few images; ValueError for the fraction.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a number between 0 and 1, got {val_fraction}")
    root = Path(source)
    train = root / "train"
    # A folder named train without folders in it is a class of trains.
    if train.is_dir() and any(entry.is_dir() for entry in _visible(train)):
        val = next((root / name for name in _VAL_FOLDERS if (root / name).is_dir()), None)
        if val is not None:
            _check_same_classes(train, val)
            return {"train": ImageTree(train), "val": ImageTree(val)}
        root = train
    tree = ImageTree(root)
    held_out = _hold_out(tree, val_fraction, seed)
    return {"train": Subset(tree, np.flatnonzero(~held_out)), "val": Subset(tree, np.flatnonzero(held_out))}


def class_folders(root: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders in `root`. Raises: DataError if there are none."""
    entries = _visible(root)
    names = tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    if not names:
        problem = f"{root}: expected one folder per class, got {len(entries):,} files and no folder"
        raise DataError(f"{problem}; sort the images into class folders")
    return names


def _hold_out(tree: ImageTree, fraction: float, seed: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    # step 1 of the stream: step 0 is the order in which the writer lays the rows down
    keys = hash_rows(STREAM_WRITE, seed, 0, 1, np.arange(len(tree), dtype=np.int64))
    held_out = np.zeros(len(tree), dtype=np.bool_)
    for label, name in enumerate(tree.class_names):
        rows = np.flatnonzero(tree.labels == label)
        if len(rows) < 2:
            problem = f"{tree.path / name}: expected at least two images, to hold one out, got 1"
            raise DataError(f"{problem}; add images or make train/ and val/ folders")
        num_held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out[rows[np.argsort(keys[rows], kind="stable")[:num_held]]] = True
    return held_out


def _check_same_classes(train: Path, val: Path) -> None:
    in_train, in_val = set(class_folders(train)), set(class_folders(val))
    different = sorted(in_train ^ in_val)
    if different:
        missing_in = val if different[0] in in_train else train
        problem = f"{missing_in}: expected the same class folders in {train.name}/ and {val.name}/"
        raise DataError(f"{problem}, got no {different[0]!r} here ({len(different)} differ); make them equal")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from None


def _images_below(folder: Path, prefix: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the images below `folder` as `prefix`/..., unordered. A link to a folder above is not taken."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in _visible(folder):
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _images_below(Path(entry.path), name, above | {here})
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield name


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: expected something readable, got {error.strerror}; check the path")


def _size_in_file(path: Path) -> tuple[int, int]:
    from fasttht.pipelines.decode_turbo import image_size  # OpenCV and Pillow, which the digits need not

    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
            try:
                return image_size(np.frombuffer(head, dtype=np.uint8))
            except DataError:
                return image_size(np.frombuffer(head + file.read(), dtype=np.uint8))
    except OSError as error:
        raise _unreadable(path, error) from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


@cache
def _load_digits() -> tuple[Pixels, Pixels, np.ndarray[tuple[int], np.dtype[np.uint16]], str]:
    with resources.files("fasttht.pipelines").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        return stored["images"], stored["labels"], stored["order"], str(stored["attribution"])


def _read_only(array: _Array) -> _Array:
    array.setflags(write=False)
    return array


def _some(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
