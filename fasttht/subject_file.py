"""Anything that can be evaluated: a run folder, an exported folder, or a file of weights with torchvision's names.

A file says little: what it does not is taken from options, or refused. Its network is told by names and shapes, is in
[0, 1] pixels, and subtracts ImageNet's mean and deviation itself, as all of ours do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttht.build import open_device
from fasttht.config import TrainConfig
from fasttht.config_file import QUICKSTART, from_flat, read_preset
from fasttht.errors import CheckpointError, UsageError
from fasttht.export import is_export, read_export
from fasttht.models.initial import read_network
from fasttht.models.resnet import ARCHS
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.splits import Splits, open_splits
from fasttht.resolve import check_ranges, default_eps, resolve
from fasttht.run_folder import CONFIG, RunFolder
from fasttht.subject import Origin, Subject, open_run

# What an export's model.json and our options both say, under the same names.
_SAID = ("arch", "stem", "width", "classifier", "feat_dim", "denoise", "img_size", "crop_pct", "norm", "eps")


def open_subject(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    which: str = "last",
    device: str = "auto",
    several: bool = False,
) -> Subject:
    """Open a run folder, an exported folder or a file of weights, with options of `fasttht train` changed.

    changes: options by name, in place of the run's or of what a file implies. Another norm without an eps has its
    default radius. A plain file needs eps; without data it is the embedded digits, if its classes are theirs.

    which: a run's checkpoint, see `open_run`.
    several: whether the caller can be one of several processes.

    Raises: CheckpointError for a path that is none of these, a damaged one, or data of another number of classes;
    UsageError for options that are missing or cannot be; DataError if the data are gone.
    """
    options = dict(changes or {})
    if path.is_file() or is_export(path):
        if which != "last":
            raise UsageError(f"--checkpoint: expected it with a run folder, got {which} and {path}")
        return _open_file(path, options, device, several)
    config = RunFolder(path).config() if (path / CONFIG).exists() else _no_run(path)
    return open_run(path, changed(config, options), which=which, device=device, several=several)


def changed(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Return a resolved configuration with other options; another norm without an eps has its default radius.

    Raises: UsageError for one that is out of range.
    """
    options = dict(options)
    norm = options.get("norm", config.attack.norm)
    if norm != config.attack.norm:
        options |= {"alpha": None}
        options.setdefault("eps", None)
        if options["eps"] is None:
            options["eps"] = default_eps(norm, free=config.attack.replay > 1)
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, section in sections.items():
        own = {field.name for field in dataclasses.fields(section)} & options.keys()
        sections[name] = dataclasses.replace(section, **{option: options.pop(option) for option in own})
    assert not options, f"expected only known options, got {sorted(options)}"
    config = dataclasses.replace(config, **sections)
    check_ranges(config)
    return config


def _no_run(path: Path) -> TrainConfig:
    raise CheckpointError(
        f"{path}: expected a run folder with {CONFIG}, an exported folder with model.json, or a file of weights, got "
        + ("neither" if path.exists() else "nothing there")
    )


def _open_file(path: Path, options: dict[str, Any], device: str, several: bool) -> Subject:
    origin: Origin = "file"
    if is_export(path) and (path.is_dir() or path.name in ("model.json", "model.safetensors")):
        model, header = read_export(path)
        said = {name: header[name] for name in _SAID}
        said["feat_dim"] = header["feat_dim"] or TrainConfig().model.feat_dim
        if options.get("norm", said["norm"]) != said["norm"]:
            del said["eps"]
        num_classes, name = int(header["num_classes"]), "model.safetensors" if path.is_dir() else ""
        origin = "export"
    else:
        model, said = network_of(read_network(path), path)
        num_classes, name = model.classifier.weight.shape[0], ""
        if options.get("eps") is None:
            raise UsageError(f"--eps: expected a radius beside {path}, got none; a file of weights has none of its own")
    splits = _splits(path, options, num_classes)
    config = _config_of(path, said, options)
    config.run.device = device
    target = open_device(config, several=several)
    model = model.to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Subject(path, model, config, splits, target, "model", name, origin)


def _splits(path: Path, options: Mapping[str, Any], num_classes: int) -> Splits:
    """Open the data. Raises: UsageError or CheckpointError if they have other classes than the network."""
    data = options.get("data")
    splits = open_splits(data)
    if splits.num_classes != num_classes:
        if data is None:
            raise UsageError(
                f"--data: expected a folder with images of {num_classes} classes, as {path} has, got none; the "
                f"embedded digits have {splits.num_classes}"
            )
        raise CheckpointError(
            f"{path}: expected data of {num_classes} classes, as the network has, got {splits.num_classes}"
        )
    return splits


def _config_of(path: Path, said: dict[str, Any], options: dict[str, Any]) -> TrainConfig:
    """Return the configuration that a file and the options make together, resolved.

    The embedded digits are shown whole, at their 8 pixels, and threads are few, as in their preset; else an evaluation
    has its defaults. Attacks are untargeted.
    """
    found: dict[str, Any] = {}
    if options.get("data") is None:
        preset = read_preset(QUICKSTART)
        found = {name: preset[name] for name in ("img_size", "crop_pct", "eval_batch_size", "threads")}
    found |= said | {name: value for name, value in options.items() if value is not None}
    if "img_size" not in found and found["stem"] == "small":
        raise UsageError(
            f"--img-size: expected the side of the images beside {path}, got none; only networks with ImageNet's stem "
            "have a usual one"
        )
    return resolve(from_flat({"objective": "at", "targeted": False, **found}, where=str(path)))


def network_of(found: dict[str, Tensor], path: Path) -> tuple[TwoHead, dict[str, Any]]:
    """Build the network whose tensors these are, by our names; return it and what it is, by the options' names.

    A file of a few bytes can say that it has any shape: nothing is allocated before all of them are compared.

    Raises: CheckpointError if they are not those of a ResNet-18, 34, 50, 101 or 152 with a classifier, naming the first
    that is missing, superfluous, of another shape or not finite.
    """
    weight = found.get("classifier.weight")
    stem = found.get("trunk.conv1.weight")
    if weight is None or stem is None or weight.ndim != 2 or stem.ndim != 4:
        raise CheckpointError(
            f"{path}: expected a network with a first convolution (conv1.weight) and a classifier (fc.weight or "
            f"classifier.weight), got {len(found)} tensors without them"
        )
    head = found.get("feature_head.2.weight")
    if 0 in (*weight.shape, *stem.shape) or (head is not None and (head.ndim != 2 or 0 in head.shape)):
        raise CheckpointError(f"{path}: expected a first convolution and heads with weights, got one without any")
    is_: dict[str, Any] = {
        "arch": _arch_of(found, path),
        "stem": "imagenet" if stem.shape[-1] == 7 else "small",
        "width": stem.shape[0],
        "classifier": "cosine" if "classifier.scale" in found else "linear",
        "denoise": any(".theta." in name for name in found),
    }
    build = partial(
        TwoHead,
        num_classes=weight.shape[0],
        feat_dim=None if head is None else head.shape[0],
        mixture_bn=any(".adversarial." in name for name in found),
        **is_,
    )
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                shapes = build().state_dict()
        except RuntimeError as error:  # more bytes than a number can say
            raise CheckpointError(f"{path}: expected a network, got shapes that none has: {error}") from None
        _check(shapes, found, path)
        model = build()
    _copy_(model, found)
    if head is not None:
        is_["feat_dim"] = head.shape[0]
    return model, is_


def _arch_of(found: Mapping[str, Tensor], path: Path) -> str:
    """Return the architecture with these blocks. Raises: CheckpointError if there is none."""
    blocks: list[set[int]] = [set(), set(), set(), set()]
    for name in found:
        block = re.match(r"trunk\.layer([1-4])\.(\d+)\.conv1\.weight$", name)
        if block is not None:
            blocks[int(block[1]) - 1].add(int(block[2]))
    depths = tuple(len(stage) for stage in blocks)
    bottleneck = "trunk.layer1.0.conv3.weight" in found
    for arch, form in ARCHS.items():
        if form == (bottleneck, depths):
            return arch
    kind = "bottleneck" if bottleneck else "basic"
    raise CheckpointError(
        f"{path}: expected a network of {', '.join(ARCHS)}, got {kind} blocks in stages of "
        + " ".join(map(str, depths))
    )


def _check(own: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Compare all weights with those of a network on the meta device; BN's batch counters may be missing."""
    for name in sorted(own.keys() | found.keys()):
        theirs, ours = found.get(name), own.get(name)
        if theirs is None and name.endswith("num_batches_tracked"):
            continue
        if theirs is None or ours is None or theirs.shape != ours.shape:
            words = ["no such tensor" if t is None else f"shape {tuple(t.shape)}" for t in (ours, theirs)]
            raise CheckpointError(
                f"{path}: expected {name.removeprefix('trunk.')} with {words[0]}, as its architecture has it, got "
                f"{words[1]}; wide and grouped ResNets are not known here"
            )
        if theirs.untyped_storage().nbytes() < theirs.nbytes:  # a PyTorch file can say one number a million times
            raise CheckpointError(f"{path}: expected {theirs.numel():,} numbers in {name}, got fewer in the file")
        if not theirs.isfinite().all():
            raise CheckpointError(f"{path}: expected finite numbers in {name}, got infinity or NaN")


@torch.no_grad()
def _copy_(model: TwoHead, found: Mapping[str, Tensor]) -> None:
    """Copy the weights into the network, in place."""
    own = model.state_dict()
    for name, theirs in found.items():
        own[name].copy_(theirs)
