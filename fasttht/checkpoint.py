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
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttht.errors import CheckpointError
from fasttht.pipelines import ResourceError

FOLDER = "checkpoints"
_PREFIX = "step-"
_PARTIAL = ".partial-"
# What `save` names a folder, and nothing else: only these are ever read, counted or removed.
_NAME = re.compile(rf"{_PREFIX}(\d{{8}}|[1-9]\d{{8,}})(?:\.([1-9]\d*))?", re.ASCII)


def save(
    run: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    meta: dict[str, Any],
    *,
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write the checkpoint of `step`, and remove later ones and all but the newest `keep` and that of step `spare`.

    Tensors are stored contiguous, whatever their strides. Returns the checkpoint's folder.

    Raises: ResourceError or OSError if the disk does not take it; older checkpoints are then as they were, and nothing
    is left of this one.
    """
    parent = run / FOLDER
    # A step may be reached again, after a fall-back from a damaged checkpoint. The new one then takes a name behind
    # the old one's, which goes only when the new one is in place.
    earlier = [path for path in listing(run) if step_of(path) == step]
    name = f"{_PREFIX}{step:08d}"
    names = (f"{name}.{n}" if n else name for n in itertools.count(_again(earlier[-1]) + 1 if earlier else 0))
    final = next(path for path in (parent / free for free in names) if not os.path.lexists(path))
    if not parent.exists():
        parent.mkdir(parents=True)
        sync(run)
    for leftover in _ours(parent, _PARTIAL):
        shutil.rmtree(leftover)
    partial = parent / f"{_PARTIAL}{final.name}"
    try:
        partial.mkdir()
        _check_room(partial, tensors)
        for file, group in tensors.items():
            whole = {key: tensor.detach().to("cpu").contiguous() for key, tensor in group.items()}
            _write_tensors(_unshared(whole), partial / f"{file}.safetensors")
        (partial / "state.json").write_text(json.dumps(meta | {"step": step}, indent=1, sort_keys=True))
        sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / "MANIFEST.json").write_text(json.dumps(sums, indent=1))
        for path in [*partial.iterdir(), partial]:
            sync(path)
        partial.rename(final)
    except BaseException:  # a second signal's too: the room is needed, and the error says what happened
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(parent)
    for old in earlier:
        shutil.rmtree(old)
    # Later steps belong to a course that this run has left; the newest `keep` of the others stay.
    forget_later(final)
    for old in listing(run)[:-keep]:
        if step_of(old) != spare:
            shutil.rmtree(old)
    return final


def forget_later(folder: Path) -> None:
    """Remove the run's checkpoints of later steps than this one's, the newest first."""
    for later in reversed(listing(folder.parent.parent)):
        if step_of(later) > step_of(folder):
            shutil.rmtree(later)


def listing(run: Path) -> list[Path]:
    """Return the run's checkpoint folders, oldest first; what else lies beside them is not ours."""
    return sorted(_ours(run / FOLDER), key=lambda path: (step_of(path), _again(path)))


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after; -1 if none of ours is named so."""
    named = _NAME.fullmatch(folder.name)
    return int(named[1]) if named is not None else -1


def _again(folder: Path) -> int:
    """Return how many of the names of this step were taken when this one was given."""
    named = _NAME.fullmatch(folder.name)
    return int(named[2] or 0) if named is not None else 0


def _ours(parent: Path, before: str = "") -> list[Path]:
    """Return the folders in here that have the name of a checkpoint, with `before` before it; links are none."""
    found = parent.iterdir() if parent.is_dir() else ()
    return [
        path
        for path in found
        if path.name.startswith(before)
        and _NAME.fullmatch(path.name.removeprefix(before))
        and path.is_dir()
        and not path.is_symlink()
    ]


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
    """Check every file against the manifest, and that they are of the step that the folder is named after.

    Raises: CheckpointError naming the first file that is missing or differs.
    """
    sums = _read_json(folder / "MANIFEST.json")
    files = {path.name for path in folder.glob("*.safetensors")} | {"state.json"}
    if unlisted := sorted(files - sums.keys()):
        raise CheckpointError(f"{folder}: expected a whole checkpoint, got a manifest without {unlisted[0]}")
    for name, expected in sums.items():
        try:
            if Path(name).name != name:
                raise OSError("the manifest names a file elsewhere")
            found = _sha256(folder / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: expected a whole checkpoint, got {error}") from None
        if found != expected:
            raise CheckpointError(f"{folder / name}: expected sha256 {str(expected)[:12]}, got {found[:12]}")
    step = read_meta(folder).get("step")
    if not isinstance(step, int) or step_of(folder) != step:
        raise CheckpointError(f"{folder}: expected a checkpoint of that step, got one of step {step}; was it renamed?")


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's state.json. Raises: CheckpointError if there is none."""
    return _read_json(folder / "state.json")


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.parent}: expected a whole checkpoint, got {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _check_room(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Refuse to begin what cannot end. Raises: ResourceError with both sizes."""
    size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ResourceError(
            f"{folder.parent}: expected room for a checkpoint of {size / 2**20:.1f} MiB, got {free / 2**20:.1f} MiB; "
            "make room, or lower --checkpoint-hist; the same command then continues from the last checkpoint"
        )


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its word for an error of the disk
        raise ResourceError(
            f"{path}: expected to write it, got: {error}; check the disk; the same command then continues from the "
            "last checkpoint"
        ) from None


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


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
