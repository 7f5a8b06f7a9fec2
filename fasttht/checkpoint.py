"""Checkpoints: folders of safetensors and JSON, written whole or not at all, checked before they are used.

    checkpoints/step-00000120/{model,training[,ema][,clean_encoder]}.safetensors  state.json  MANIFEST.json

The folder is written under a temporary name, synced and renamed, so there is never a moment without a good one.
MANIFEST.json holds the sha256 of every file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttht.errors import CheckpointError

FOLDER = "checkpoints"
_PREFIX = "step-"


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `step`, and remove later ones and all but the newest `keep`.

    Tensors are stored contiguous, whatever their strides. Returns the checkpoint's folder.
    """
    parent = run / FOLDER
    name = f"{_PREFIX}{step:08d}"
    # A step may be reached again, after a fall-back from a damaged checkpoint. The new one then takes a name beside
    # the old one's, which goes only when the new one is in place.
    earlier = sorted(parent.glob(f"{name}*"))
    names = (f"{name}.{n}" if n else name for n in itertools.count())
    final = next(path for path in (parent / free for free in names) if path not in earlier)
    for leftover in parent.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial = parent / f".partial-{final.name}"
    partial.mkdir(parents=True)
    for file, group in tensors.items():
        whole = {key: tensor.detach().to("cpu").contiguous() for key, tensor in group.items()}
        save_file(_unshared(whole), partial / f"{file}.safetensors")
    (partial / "state.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / "MANIFEST.json").write_text(json.dumps(sums, indent=1))
    for path in [*partial.iterdir(), partial]:
        _fsync(path)
    partial.rename(final)
    _fsync(parent)
    for old in earlier:
        shutil.rmtree(old)
    steps = listing(run)
    # Later steps belong to a course that this run has left; the newest `keep` of the others stay.
    now = steps.index(final)
    for old in [*steps[: max(now + 1 - keep, 0)], *steps[now + 1 :]]:
        shutil.rmtree(old)
    return final


def listing(run: Path) -> list[Path]:
    """Return the run's checkpoint folders, oldest first."""
    return sorted((run / FOLDER).glob(f"{_PREFIX}*"))


def newest(run: Path, on_damaged: Callable[[CheckpointError], None]) -> Path | None:
    """Return the run's newest checkpoint that is whole, or None if it has none at all.

    on_damaged is told of every newer one that is not; it may raise, where an older one will not do.

    Raises: CheckpointError if there are checkpoints but every one is damaged.
    """
    problems = []
    for folder in reversed(listing(run)):
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
            on_damaged(error)
        else:
            return folder
    if problems:
        raise CheckpointError(f"{problems[0]}; no older checkpoint is whole either: give another --output")
    return None


def refuse(error: CheckpointError) -> None:
    """Do not fall back to an older checkpoint: for whoever wants the newest or none."""
    raise error


def verify(folder: Path) -> None:
    """Check every file against the manifest.

    Raises: CheckpointError naming the first file that is missing or differs.
    """
    try:
        sums = json.loads((folder / "MANIFEST.json").read_text())
        found = {name: _sha256(folder / name) for name in sums}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: expected a whole checkpoint, got {error}") from None
    for name, expected in sums.items():
        if found[name] != expected:
            raise CheckpointError(f"{folder / name}: expected sha256 {expected[:12]}, got {found[name][:12]}")


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's state.json."""
    return json.loads((folder / "state.json").read_text())  # type: ignore[no-any-return]


def restore(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Copy a checkpoint into live tensors, in place, so that each keeps its own strides and device.

    Raises: CheckpointError naming the first tensor that is missing, superfluous or of another shape; then nothing
    was copied.
    """
    loaded = {name: read_tensors(folder / f"{name}.safetensors") for name in tensors}
    for name, group in tensors.items():
        for key in sorted(group.keys() | loaded[name].keys()):
            own, found = group.get(key), loaded[name].get(key)
            if own is None or found is None or own.shape != found.shape or own.dtype != found.dtype:
                raise CheckpointError(
                    f"{folder / name}.safetensors: expected {key} {_words(own)}, got {_words(found)}; "
                    "resume with the options that the run started with"
                )
    with torch.no_grad():
        for name, group in tensors.items():
            for key, own in group.items():
                own.copy_(loaded[name][key])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file, on the CPU.

    Raises: CheckpointError if it is missing or not one.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got {error}") from None


def read_encoder(path: Path) -> dict[str, Tensor]:
    """Return the trunk and feature head to freeze as clean encoder, from a file or a run folder.

    A run folder gives its momentum clean encoder if it has one, else its robust encoder.

    Raises: CheckpointError if nothing can be read there.
    """
    if path.is_dir():
        folder = newest(path, refuse)
        if folder is None:
            raise CheckpointError(f"--clean-encoder: expected a run folder with a checkpoint, got {path}")
        own = folder / "clean_encoder.safetensors"
        path = own if own.exists() else folder / "model.safetensors"
    return read_tensors(path)


def _words(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clone what safetensors would refuse: two names over one storage."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        pointer = tensor.data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
