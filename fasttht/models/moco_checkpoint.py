"""MoCo v2 checkpoints as their authors publish them, read into our names without running anything in them.

Such a file is torch.save's of {"arch", "state_dict", ...}; the state dict has torchvision's names below
`module.encoder_q.`, with `fc.0` and `fc.2` as the projection, which becomes our feature head. Files of people's own
runs hold `encoder_k` and the queue as well; those are left behind, as the released files leave them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttht.errors import CheckpointError

# How torch.save's files begin: a zip archive, or (before torch 1.6) a bare pickle of protocol 2.
_MAGIC = (b"PK\x03\x04", b"\x80\x02")

_QUERY, _PROJECTION = "encoder_q.", re.compile(r"fc\.[02]\.(weight|bias)")
_LEFT_BEHIND = re.compile(r"encoder_k\..*|queue|queue_ptr")
_COUNTER = "num_batches_tracked"


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as torch.save's do, whatever its name ends in."""
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(_MAGIC)
    except OSError:
        return False


def read_moco(path: Path, own: dict[str, Tensor], arch: str | None = None) -> dict[str, Tensor]:
    """Return encoder_q's tensors by the names `trunk.*` and `feature_head.*`.

    own: what the clean encoder expects, by those names; a file must hold exactly that, but may leave out BN's batch
    counters. arch: the name that the file's own `arch` must equal, if it has one.

    Raises: CheckpointError saying what the file is instead: not readable without running code in it, of another
    architecture, a MoCo v1 (one linear projection), a supervised network (none), or what is missing, extra or of
    another shape.
    """
    stored = load_torch_file(path)
    found = stored.get("arch")
    if arch is not None and isinstance(found, str) and found != arch:
        raise CheckpointError(f"{path}: expected a clean encoder of --arch {arch}, got one of {found}")
    query = _query(path, stored)
    if "fc.weight" in query:
        raise CheckpointError(
            f"{path}: expected a MoCo v2 checkpoint with encoder_q.fc.0 and fc.2, got encoder_q.fc.weight of shape "
            f"{tuple(query['fc.weight'].shape)}: one linear projection, as MoCo v1 has; take a v2 file"
        )
    if not any(_PROJECTION.fullmatch(name) for name in query):
        raise CheckpointError(
            f"{path}: expected a projection in encoder_q.fc.0 and fc.2, got none; was it stripped for transfer?"
        )
    tensors = {
        f"feature_head.{name[3:]}" if _PROJECTION.fullmatch(name) else f"trunk.{name}": tensor
        for name, tensor in query.items()
    }
    _check(path, tensors, own)
    return {name: tensors.get(name, expected) for name, expected in own.items()}


def load_torch_file(path: Path) -> dict[str, Any]:
    """Read a dict from a torch.save file with the reader that knows tensors and plain values only.

    Whatever a foreign file makes it raise is the file's fault, hence the bare Exception.

    Raises: CheckpointError, also for a file that asks to run code; none of it was run.
    """
    try:
        with path.open("rb") as file:  # given a name, torch.load would look at its ending
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        asks = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asks:
            raise CheckpointError(
                f"{path}: expected tensors and plain values only, got a pickle that asks for {asks[1]}, which could "
                "run code; nothing was run. Save its state dict alone, where you trust it"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: expected a whole file of torch.save, got: {reason}; copy it again") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: expected a dict with a state_dict, got {type(stored).__name__}")
    return stored


def _query(path: Path, stored: dict[str, Any]) -> dict[str, Tensor]:
    """Return encoder_q's part of a state dict, by torchvision's names."""
    state = stored.get("state_dict", stored)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: expected a state_dict of names and tensors, got something else")
    query, foreign = {}, []
    for full, tensor in state.items():
        name = full.removeprefix("module.")
        if name.startswith(_QUERY) and isinstance(tensor, Tensor):
            query[name.removeprefix(_QUERY)] = tensor
        elif not _LEFT_BEHIND.fullmatch(name):
            foreign.append(full)
    if query and foreign:
        raise CheckpointError(
            f"{path}: expected tensors of encoder_q, encoder_k and the queue only, got {some(foreign)} as well"
        )
    if not query and "conv1.weight" in {name.removeprefix("module.") for name in foreign}:
        raise CheckpointError(
            f"{path}: expected a MoCo v2 checkpoint with encoder_q.*, got a plain ResNet ({some(foreign)}); "
            "THAT needs the projection that contrastive training made, which a supervised network does not have"
        )
    if not query:
        raise CheckpointError(f"{path}: expected a MoCo v2 checkpoint with encoder_q.*, got {some(foreign)}")
    return query


def _check(path: Path, tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Compare names, shapes and types with what is expected. Raises: CheckpointError naming the first difference."""
    missing = [name for name in own if name not in tensors and not name.endswith(_COUNTER)]
    extra = [name for name in tensors if name not in own]
    for words, names in (("no", missing), ("also", extra)):
        if names:
            theirs = [_published(name) for name in names]
            raise CheckpointError(
                f"{path}: expected the tensors of this --arch and a MoCo v2 projection, got {words} {some(theirs)}; "
                "is it of the same --arch?"
            )
    for name, tensor in tensors.items():
        expected = own[name]
        if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(
                f"{path}: expected {_published(name)} of shape {tuple(expected.shape)}, got {tuple(tensor.shape)} "
                f"{str(tensor.dtype).removeprefix('torch.')}; the clean encoder needs the same --arch, --stem, --width "
                "and --feat-dim"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: expected finite numbers in {_published(name)}, got infinity or NaN")


def _published(name: str) -> str:
    """Return the name that a tensor of ours has in a published file."""
    return _QUERY + name.removeprefix("trunk.").replace("feature_head.", "fc.")


def some(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    shown = ", ".join(names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
