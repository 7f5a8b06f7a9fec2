"""The exported folder: what it holds, written and read back without trusting it.

    model.safetensors  weights by our names, contiguous
    model.json         what the network is, how it was trained, how it scored, and the sha256 of the weights
    README.md          the model card
    model.py           the network for people without fasttht: torch and safetensors only (an exact export)
    NAME.json          RobustBench's model_info (an exact export)
    model.onnx         on request (an exact export)

`exact` keeps the network as it is: mean and deviation inside, cosine classifier with its s, both heads. `torchvision`
has torchvision's keys and only the same predictions, see export_torchvision. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fasttht.errors import CheckpointError
from fasttht.models.resnet import ARCHS
from fasttht.models.two_head import MEAN, STD, Normalize, TwoHead

EXACT, TORCHVISION = "fasttht-exact-1", "fasttht-torchvision-1"
WEIGHTS, HEADER, CARD, WRAPPER, ONNX = "model.safetensors", "model.json", "README.md", "model.py", "model.onnx"

_MAX_HEADER = 64 * 2**20  # class names of any data set fit many times over
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda v: type(v) is str and v in values


def _three(expected: tuple[float, ...]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and v == list(expected)


def _text(v: Any) -> bool:
    return type(v) is str and len(v) <= 200


def _flag(v: Any) -> bool:
    return type(v) is bool


# Key -> what it must be, in words and as a test. Numbers are bounded before anything is built from them.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arch": (f"one of {', '.join(ARCHS)}", _one_of(*ARCHS)),
    "stem": ("imagenet or small", _one_of("imagenet", "small")),
    "width": ("a whole number from 1 to 4096", _whole(1, 4096)),
    "classifier": ("cosine or linear", _one_of("cosine", "linear")),
    "feat_dim": ("null or a whole number from 1 to 65536", lambda v: v is None or _whole(1, 65536)(v)),
    "num_classes": ("a whole number from 2 to 1000000", _whole(2, 1_000_000)),
    "class_names": (
        "null or as many texts as classes",
        lambda v: v is None or (isinstance(v, list) and all(type(name) is str for name in v)),
    ),
    "img_size": ("a whole number from 1 to 8192", _whole(1, 8192)),
    "crop_pct": ("a number above 0, at most 1", _number(1e-9, 1)),
    "denoise": ("true or false", _flag),
    "mixture_bn": ("true or false", _flag),
    "norm": ("linf, l2 or l2-relative", _one_of("linf", "l2", "l2-relative")),
    "eps": ("a number from 0 to 1000000", _number(0, 1e6)),
    "mean": (f"{list(MEAN)}", _three(MEAN)),
    "std": (f"{list(STD)}", _three(STD)),
    "sha256": ("64 hex digits", lambda v: type(v) is str and len(v) == 64 and not set(v) - set("0123456789abcdef")),
    "fasttht": ("a version", _text),
    "step": ("a whole number of at least 0", _whole(0, 2**53)),
    "scores": ("an object", lambda v: isinstance(v, dict)),
}


def is_export(path: Path) -> bool:
    """Whether a path is an exported folder, of either kind, or its model.json or model.safetensors."""
    return (_folder(path) / HEADER).is_file()


def read_export(path: Path) -> tuple[TwoHead, dict[str, Any]]:
    """Read an exact export; return the network (CPU, evaluation mode, channels-last) and its model.json.

    path: the folder, or its model.json or model.safetensors. Only JSON and safetensors are read, nothing is executed;
    the weights' names, shapes and types are compared with what model.json describes before any is loaded. The global
    RNG is left as it was.

    Raises: CheckpointError naming what is missing, out of range, damaged or not finite; or saying that this is the
    torchvision kind, whose attacks are not this network's.
    """
    folder, header = _folder(path), read_header(path)
    if header["format"] != EXACT:
        raise CheckpointError(
            f"{folder}: expected an exact export, got one with torchvision's keys, whose logits are scaled image by "
            "image; export the run with --kind exact"
        )
    with torch.device("meta"):
        model = TwoHead(
            header["arch"],
            header["num_classes"],
            stem=header["stem"],
            width=header["width"],
            classifier=header["classifier"],
            feat_dim=header["feat_dim"],
            denoise=header["denoise"],
            mixture_bn=header["mixture_bn"],
        )
    return fill(model, read_weights(folder, header, dict(model.state_dict()))), header


def fill(model: TwoHead, tensors: dict[str, Tensor]) -> TwoHead:
    """Give a network built on the meta device its weights, in place; return it, channels-last, in evaluation mode."""
    model.load_state_dict(tensors, assign=True)
    model.normalize = Normalize()  # its statistics are buffers that no file holds
    model.requires_grad_(True)
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def read_header(path: Path) -> dict[str, Any]:
    """Return the model.json of an export of either kind.

    Raises: CheckpointError naming the first key that is missing or is not what it must be.
    """
    file = _folder(path) / HEADER
    try:
        if file.stat().st_size > _MAX_HEADER:
            raise CheckpointError(f"{file}: expected at most {_MAX_HEADER >> 20} MiB, got more")
        header = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected an exported folder with {HEADER}, got {error}") from None
    if not isinstance(header, dict) or header.get("format") not in (EXACT, TORCHVISION):
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise CheckpointError(f"{file}: expected the format {EXACT} or {TORCHVISION}, got {_short(found)}")
    for key, (words, right) in _FIELDS.items():
        if key not in header:
            raise CheckpointError(f"{file}: expected {key} to be {words}, got no such key; export the run again")
        if not right(header[key]):
            raise CheckpointError(f"{file}: expected {key} to be {words}, got {_short(header[key])}")
    names = header["class_names"]
    if names is not None and len(names) != header["num_classes"]:
        raise CheckpointError(f"{file}: expected {header['num_classes']} class_names, got {len(names)}")
    return header


def read_weights(folder: Path, header: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, on the CPU, after comparing them with `expected` (on any device) by name, shape and type.

    Raises: CheckpointError naming the first difference.
    """
    file = folder / WEIGHTS
    try:
        found = sha256(file)
        if found != header["sha256"]:
            raise CheckpointError(f"{file}: expected sha256 {header['sha256'][:12]}, got {found[:12]}; copy it again")
        with safe_open(file, framework="pt") as opened:
            stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 -- it is no dict
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in stored.items()}
        wanted = {name: (tuple(tensor.shape), _DTYPES[tensor.dtype]) for name, tensor in expected.items()}
        for name in sorted(wanted.keys() | shapes.keys()):
            if wanted.get(name) != shapes.get(name):
                raise CheckpointError(
                    f"{file}: expected {name} {_words(wanted.get(name))}, got {_words(shapes.get(name))}; "
                    f"do {HEADER} and {WEIGHTS} belong together?"
                )
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file, got {error}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: expected finite numbers in {name}, got infinity or NaN")
    return tensors


def sha256(path: Path) -> str:
    """Return a file's sha256 as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(path: Path) -> Path:
    return path.parent if path.name in (WEIGHTS, HEADER) else path


def _no_constant(text: str) -> None:
    raise ValueError(f"the number {text}, which is not finite")


def _words(found: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if found is None else f"{found[1]} {found[0]}"


def _short(value: Any) -> str:
    text = ascii(value)  # nothing that would move a terminal's cursor
    return text if len(text) <= 60 else text[:57] + "..."
