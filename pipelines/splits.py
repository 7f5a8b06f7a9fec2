"""Open what `--data` names: .beton files, an image tree, or the digits that ship with the package."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.cache import cache_folder
from fasttht.pipelines.datasets import folder_splits
from fasttht.pipelines.samples import Samples


@dataclass(frozen=True)
class Splits:
    """The two halves of a data set; labels of both are below num_classes."""

    train: Samples
    val: Samples

    @property
    def num_classes(self) -> int:
        """How many classes the labels need; a named class without images counts."""
        highest = max(int(self.train.labels.max()), int(self.val.labels.max()))
        return max(highest + 1, len(self.train.class_names))


def open_splits(data: Path | None) -> Splits:
    """Open a folder with train.beton and val.beton, an image tree, or (None) the embedded digits.

    The digits take the same road as everything else: written to .beton once, in a cache folder, and read back.

    Raises: DataError with what was expected there.
    """
    if data is None:
        data = _cached_digits()
    if not data.exists():
        raise DataError(f"{data}: expected a folder with train.beton and val.beton, or an image tree, got nothing")
    betons = [data / f"{split}.beton" for split in ("train", "val")]
    if any(path.exists() for path in betons):
        missing = [path.name for path in betons if not path.exists()]
        if missing:
            raise DataError(f"{data}: expected train.beton and val.beton, got no {missing[0]}; write both splits")
        splits = Splits(*(BetonFile(path) for path in betons))
    elif data.is_dir():
        trees = folder_splits(data)
        splits = Splits(trees["train"], trees["val"])
    else:
        raise DataError(f"{data}: expected a folder with train.beton and val.beton, or an image tree, got a file")
    if splits.num_classes < 2:
        raise DataError(f"{data}: expected at least two classes, got labels of one only")
    return splits


def _cached_digits() -> Path:
    """Return the folder with the digits' .beton files, writing them first if they are not there.

    Runs that start at the same moment each write their own copy and move it in file by file: all copies are equal.
    """
    folder = cache_folder("digits-v1")
    if not all((folder / f"{split}.beton").exists() for split in ("train", "val")):
        from fasttht.pipelines.writer import write_dataset  # OpenCV and Pillow: only who writes needs them

        with tempfile.TemporaryDirectory(dir=folder) as own:
            write_dataset("digits", None, own)
            for path in sorted(Path(own).iterdir(), reverse=True):  # each manifest before its file
                path.replace(folder / path.name)
    return folder
