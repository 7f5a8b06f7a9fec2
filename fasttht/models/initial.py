"""`--init`: start f from a network that was trained before, on clean images say; read once, before the first step.

The trunk is taken strictly, by name and shape. A head is taken where it fits f's, else it stays as it was drawn: the
cosine classifier takes a linear one's rows, scaled to unit norm, because only their directions count there; a linear
one takes no cosine classifier, whose logits are another function of the features. Torchvision's networks expect the
mean and standard deviation that f subtracts and divides by itself, so their weights mean here what they meant there.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import checkpoint
from fasttht.errors import CheckpointError, UsageError
from fasttht.models.moco_checkpoint import is_torch_file, load_torch_file, some
from fasttht.models.two_head import CosineClassifier, TwoHead

_COUNTER = "num_batches_tracked"
_WRAPPERS = re.compile(r"^((module|model)\.)+")  # what DistributedDataParallel and others put before every name
_BRANCH = re.compile(r"\.(clean|adversarial)(?=\.\w+$)")


@torch.no_grad()
def load_initial_(model: TwoHead, path: Path) -> str:
    """Copy the weights of `path` into f, in place; return one line that says what was taken.

    path: a run folder (its moving average if it keeps one, else its network; of pre-training the encoder), or a file:
    safetensors or torch.save's, with our names (`trunk.*`) or torchvision's, alone or as `state_dict` or `model`. With
    mixture BN both branches start from the file's BN if that has no branches.

    Raises: UsageError if nothing is there; CheckpointError naming the first trunk tensor that is missing, superfluous
    or of another shape, with f as it was.
    """
    found = _read(path)
    trunk = _trunk(model, {name: tensor for name, tensor in found.items() if name.startswith("trunk.")}, path)
    classifier = _classifier(model.classifier, found)
    head = None if model.feature_head is None else _feature_head(model.feature_head, found)
    own = model.state_dict()
    said = ["trunk"]
    for name, taken in (("classifier", classifier), ("feature head", head)):
        if isinstance(taken, dict):
            trunk |= taken
            said.append(name)
        elif taken is not None:
            said.append(f"but not the {name} ({taken})")
    for name, tensor in trunk.items():
        own[name].copy_(tensor)
    return f"initial weights of {path}: {', '.join(said)}"


def _read(path: Path) -> dict[str, Tensor]:
    """Return what a file or run folder holds, by our names."""
    if not path.exists():
        raise UsageError(f"--init: expected a run folder, a safetensors file or a PyTorch file, got {path}: not there")
    if path.is_dir():
        folder = checkpoint.newest(path, checkpoint.refuse)
        if folder is None:
            raise CheckpointError(f"--init: expected a run folder with a checkpoint, got {path}")
        names = ("ema", "model", "clean_encoder")
        files = [folder / f"{name}.safetensors" for name in names if (folder / f"{name}.safetensors").exists()]
        if not files:
            raise CheckpointError(f"{folder}: expected a network in it, got none")
        return checkpoint.read_tensors(files[0])
    return read_network(path)


def read_network(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by our names, `trunk.*`, `classifier.*` and, if it has them, `feature_head.*`.

    The file is safetensors or torch.save's, and has our names or torchvision's, with `module.` and `model.` before them
    or not, alone or as `state_dict` or `model`.

    Raises: CheckpointError for anything else.
    """
    state: object
    if is_torch_file(path):
        stored = load_torch_file(path)
        state = stored.get("state_dict", stored.get("model", stored))
    else:
        state = checkpoint.read_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of names and tensors, got something else")
    tensors = {_WRAPPERS.sub("", str(name)): tensor for name, tensor in state.items()}
    if any(name.startswith("trunk.") for name in tensors):
        return tensors
    if "conv1.weight" not in tensors:
        raise CheckpointError(
            f"{path}: expected a ResNet with torchvision's names or ours, got {some(sorted(tensors))}; a MoCo "
            "checkpoint is a --clean-encoder"
        )
    return {
        name.replace("fc.", "classifier.") if name.startswith("fc.") else f"trunk.{name}": tensor
        for name, tensor in tensors.items()
    }


def _trunk(model: TwoHead, found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the trunk's tensors by f's names; BN's batch counters may be missing, as in old files."""
    own = {f"trunk.{name}": tensor for name, tensor in model.trunk.state_dict().items()}
    source = {name: name if name in found else _BRANCH.sub("", name) for name in own}
    advice = "--init needs the same --arch, --stem, --width and --denoise"
    extra = sorted(set(found) - set(source.values()))
    if extra:
        raise CheckpointError(f"{path}: expected the tensors of f's trunk only, got {some(extra)} as well; {advice}")
    taken = {}
    for name, tensor in own.items():
        theirs = found.get(source[name])
        if theirs is None:
            if name.endswith(_COUNTER):
                continue
            raise CheckpointError(
                f"{path}: expected {source[name]} of shape {tuple(tensor.shape)}, got no such tensor; {advice}"
            )
        if theirs.shape != tensor.shape or theirs.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: expected {source[name]} of shape {tuple(tensor.shape)}, got {tuple(theirs.shape)} "
                f"{str(theirs.dtype).removeprefix('torch.')}; {advice}"
            )
        if theirs.is_floating_point() and not theirs.isfinite().all():
            raise CheckpointError(f"{path}: expected finite numbers in {source[name]}, got infinity or NaN")
        taken[name] = theirs
    return taken


def _classifier(own: CosineClassifier | nn.Linear, found: dict[str, Tensor]) -> dict[str, Tensor] | str:
    """Return the classifier's tensors by f's names, or why there are none to take."""
    weight, bias, scale = (found.get(f"classifier.{name}") for name in ("weight", "bias", "scale"))
    if weight is None:
        return "the file has none"
    if weight.shape != own.weight.shape:
        return f"the file's is of {'x'.join(map(str, weight.shape))}, f's of {'x'.join(map(str, own.weight.shape))}"
    if isinstance(own, CosineClassifier):
        if scale is not None and scale.shape == own.scale.shape:
            return _finite({"classifier.weight": weight, "classifier.scale": scale})
        return _finite({"classifier.weight": F.normalize(weight.to(own.weight.dtype), dim=1)})
    if scale is not None:
        return "the file's is a cosine classifier, f's a linear one"
    if bias is None or bias.shape != own.bias.shape:
        return "the file's has no bias"
    return _finite({"classifier.weight": weight, "classifier.bias": bias})


def _feature_head(own: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor] | str:
    """Return the feature head's tensors by f's names, or why there are none to take."""
    names = {f"feature_head.{name}": tensor.shape for name, tensor in own.state_dict().items()}
    theirs = {name: tensor for name, tensor in found.items() if name.startswith("feature_head.")}
    if not theirs:
        return "the file has none"
    if {name: tensor.shape for name, tensor in theirs.items()} != names:
        return "the file's is of another shape"
    return _finite(theirs)


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor] | str:
    return tensors if all(tensor.isfinite().all() for tensor in tensors.values()) else "the file's is not finite"
