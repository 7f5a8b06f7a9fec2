"""The export with torchvision's keys: for whoever loads a ResNet and wants its predictions.

`fc.weight` holds s times the unit rows of the cosine classifier and `fc.bias` zeros, so that the logits are
s |h| cos(h, w_c): each image's are multiplied by its own |h| > 0. The class on top is the same; probabilities, losses
and input gradients are not, so an attack on this network says nothing of ours. Mean and deviation are the caller's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.config import TrainConfig
from fasttht.errors import CheckpointError, UsageError
from fasttht.export import TORCHVISION, fill, read_header, read_weights
from fasttht.models.two_head import CosineClassifier, TwoHead
from fasttht.traits import TRAITS


def check_known(config: TrainConfig) -> None:
    """Refuse what torchvision has no network for. Raises: UsageError naming it."""
    model, known = config.model, "use --kind exact"
    if model.stem != "imagenet":
        raise UsageError(f"--kind torchvision: expected --stem imagenet, as torchvision has, got {model.stem}; {known}")
    if model.width != 64:
        raise UsageError(f"--kind torchvision: expected --width 64, as torchvision has, got {model.width}; {known}")
    if model.denoise:
        raise UsageError(f"--kind torchvision: expected a plain ResNet, got one with denoising blocks; {known}")
    if TRAITS[config.method.objective].mixture_bn:
        raise UsageError(f"--kind torchvision: expected a plain ResNet, got one with mixture BN; {known}")


@torch.no_grad()
def torchvision_tensors(model: TwoHead) -> dict[str, Tensor]:
    """Return the state dict of a torchvision ResNet that predicts what f does; the feature head is left behind."""
    tensors = dict(model.trunk.state_dict())
    head = model.classifier
    if isinstance(head, CosineClassifier):
        tensors["fc.weight"] = head.scale * F.normalize(head.weight, dim=1)
        tensors["fc.bias"] = torch.zeros(len(head.weight), device=head.weight.device)
    else:
        tensors |= {"fc.weight": head.weight.detach(), "fc.bias": head.bias.detach()}
    return tensors


def read_torchvision(path: Path) -> tuple[TwoHead, dict[str, Any]]:
    """Read an export of this kind; return a network with a linear classifier (as read_export) and its model.json.

    What is returned normalises inside, as all of ours do; its logits are those of torchvision's ResNet.

    Raises: CheckpointError as read_export does, or if it is an exact export.
    """
    header = read_header(path)
    if header["format"] != TORCHVISION:
        raise CheckpointError(f"{path}: expected an export with torchvision's keys, got an exact one")
    for key, value in (("stem", "imagenet"), ("width", 64), ("denoise", False), ("mixture_bn", False)):
        if header[key] != value:
            raise CheckpointError(f"{path}: expected {key} {value}, as torchvision has, got {header[key]}")
    with torch.device("meta"):
        model = TwoHead(header["arch"], header["num_classes"], classifier="linear", feat_dim=None)
    names = {_published(name): name for name in model.state_dict()}
    expected = {name: model.state_dict()[own] for name, own in names.items()}
    folder = path if path.is_dir() else path.parent
    tensors = read_weights(folder, header, expected)
    return fill(model, {names[name]: tensor for name, tensor in tensors.items()}), header


def _published(name: str) -> str:
    """Return the name that a tensor of ours has in torchvision's ResNet."""
    return name.removeprefix("trunk.").replace("classifier.", "fc.")
