"""A data set from images: `train.beton` and `val.beton` in one folder, both or none, or what they would be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from fasttht.pipelines.datasets import digits, folder_splits, imagenet_splits
from fasttht.pipelines.encode import Encode, Encoding
from fasttht.pipelines.estimate import Estimate, check_space, estimate_split
from fasttht.pipelines.manifest import manifest_path, sync
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.split_writer import (
    MAX_ERRORS,
    OnError,
    Tally,
    WriteReport,
    finished_report,
    refuse_existing,
    write_split,
)
from fasttht.pipelines.staging import staged
from fasttht.pipelines.subset import balanced_subset

Kind = Literal["imagenet", "folder", "digits"]

# Longest side kept when the caller does not choose. Larger ImageNet images would never be seen at full size.
MAX_RESOLUTION: Mapping[Kind, int | None] = {"imagenet": 500, "folder": None, "digits": None}


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
    subset: float | None = None,
    force: bool = False,
    resume: bool = False,
    workers: int = 1,
    on_error: OnError = "abort",
    max_errors: int = MAX_ERRORS,
    progress: Callable[[str, Tally], None] | None = None,
) -> dict[str, WriteReport]:
    """Write `train.beton` and `val.beton`, with manifests, into the folder `output`; reports by split.

    `source` is the folder of images, None for the embedded digits. `max_resolution` "default" is
    MAX_RESOLUTION[kind]. `val_fraction` is used for a folder without a val split. `subset` keeps fewer images of each
    split, see `balanced_subset`, and is among the manifest's settings. `progress` is called with the split as well.
    The rest is as in `write_split`, with one limit of errors for each split.

    Both files are made in a hidden folder inside `output` and moved once both are whole. After an error or a kill that
    folder is kept if a file is whole or a journal lists images, and removed otherwise.

    Raises: DataError; ResourceError if the disk has no room, told beforehand from a sample; ValueError.
    """
    output = Path(output)
    limit = _resolve(kind, source, max_resolution)
    encoding = Encoding(encode=encode, max_resolution=limit, quality=quality)
    if not resume:  # first, since the rest may have to look at a million files
        for split in ("train", "val"):
            refuse_existing(output / f"{split}.beton", force=force)
    splits = _open_source(kind, source, val_fraction, subset, seed)
    own: dict[str, Any] = {"kind": kind}
    if subset is not None:
        own["subset"] = int(subset) if subset >= 1 else subset
    reports: dict[str, WriteReport] = {}
    for split in splits if resume else ():
        # One that a killed run had moved already, with the settings and images of this one.
        job = {**own, "split": split, **asdict(encoding), "seed": seed, "shuffle": shuffle}
        found = finished_report(output / f"{split}.beton", job, splits[split].fingerprint, force=force)
        if found is None:
            refuse_existing(output / f"{split}.beton", force=force, resume=True)
        else:
            reports[split] = found
    with staged(output, resume=resume, force=force) as staging:
        missing = [split for split in splits if split not in reports]
        estimates = [estimate_split(splits[split], encoding, seed=seed, workers=workers) for split in missing]
        there = sum(file.stat().st_size for file in staging.iterdir())
        check_space(output, sum(estimate.num_bytes for estimate in estimates) - there)
        for split in missing:
            reports[split] = write_split(
                splits[split],
                staging / f"{split}.beton",
                encode=encode,
                max_resolution=limit,
                quality=quality,
                seed=seed,
                shuffle=shuffle,
                settings={**own, "split": split},
                resume=resume,
                workers=workers,
                on_error=on_error,
                max_errors=max_errors,
                progress=None if progress is None else partial(progress, split),
            )
        for split in missing:
            _publish(staging / f"{split}.beton", output / f"{split}.beton")
    return {split: reports[split] for split in splits}


def _publish(staged: Path, beton: Path) -> None:
    """Move a file and its manifest out of the staging folder; each step is on the disk before the next begins.

    A copy of the manifest first: a kill in between leaves the staged pair whole.
    """
    copy = shutil.copyfile(manifest_path(staged), staged.with_name("manifest"))
    sync(copy)
    copy.replace(manifest_path(beton))
    sync(beton.parent)
    staged.replace(beton)
    sync(beton.parent)
    sync(staged.parent)  # which lists it no more


def plan_dataset(
    kind: Kind,
    source: Path | str | None,
    *,
    encode: Encode = "passthrough",
    max_resolution: int | Literal["default"] | None = "default",
    quality: int = 95,
    seed: int = 0,
    val_fraction: float = 0.1,
    subset: float | None = None,
    workers: int = 1,
) -> dict[str, Estimate]:
    """Say what `write_dataset` would write, by split, and write nothing: see `estimate_split`, one image in 100.

    Raises: DataError if the source cannot be used; ValueError.
    """
    limit = _resolve(kind, source, max_resolution)
    encoding = Encoding(encode=encode, max_resolution=limit, quality=quality)
    return {
        split: estimate_split(samples, encoding, share=0.01, seed=seed, workers=workers)
        for split, samples in _open_source(kind, source, val_fraction, subset, seed).items()
    }


def _resolve(kind: Kind, source: Path | str | None, max_resolution: int | Literal["default"] | None) -> int | None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {get_args(Kind)}, got {kind!r}")
    if (source is None) != (kind == "digits"):
        raise ValueError(f"source: expected a folder, or None for the embedded digits, got {source} for {kind!r}")
    return MAX_RESOLUTION[kind] if max_resolution == "default" else max_resolution


def _open_source(
    kind: Kind, source: Path | str | None, val_fraction: float, subset: float | None, seed: int
) -> Mapping[str, Samples]:
    splits: Mapping[str, Samples]
    if source is None:
        splits = {"train": digits("train"), "val": digits("val")}
    elif kind == "imagenet":
        splits = imagenet_splits(source)
    else:
        splits = folder_splits(source, val_fraction=val_fraction, seed=seed)
    if subset is None:
        return splits
    return {split: balanced_subset(samples, subset, seed) for split, samples in splits.items()}
