"""The trunk's training-mode batch norms with their additions and ReLUs as single ops; the modules stay what they are.

Only forwards are exchanged, on the instances: state-dict keys, parameters and buffers are the same, and so is what is
computed in evaluation mode. The norm of a projection shortcut has no ReLU of its own and stays a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fasttht import kernels
from fasttht.models.resnet import BasicBlock, Bottleneck, ResNet
from fasttht.models.two_head import TwoHead


def fuse_norms(model: TwoHead) -> int:
    """Make the model's trunk train with fused batch norms, in place; return how many will be.

    A block of another class than resnet.py's own, or with another activation, is left as it is.
    """
    number = 0
    for module in model.trunk.modules():
        forward = _FORWARDS.get(type(module))
        if forward is not None and type(module.relu) is nn.ReLU:
            module.forward = MethodType(forward, module)
            number += sum(name in _NORMS and _plain(norm) for name, norm in module.named_children())
    return number


_NORMS = ("bn1", "bn2", "bn3")


def _plain(norm: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None


def _bn_relu(norm: nn.Module, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Return relu(norm(x) + other), in one op where the layer trains and is an ordinary one that nobody watches."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    if not norm.training or not _plain(norm) or norm.running_mean is None or hooked:
        out: Tensor = norm(x)
        return (out if other is None else out + other).relu_()
    assert isinstance(norm, nn.BatchNorm2d), "an ordinary one"
    assert norm.running_mean is not None, "it keeps statistics"
    assert norm.running_var is not None, "it keeps statistics"
    assert norm.num_batches_tracked is not None, "it keeps statistics"
    assert norm.momentum is not None, "a constant one"
    norm.num_batches_tracked.add_(1)
    return kernels.bn_relu(
        x, other, norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum=norm.momentum, eps=norm.eps
    )


def _basic_block(self: BasicBlock, x: Tensor) -> Tensor:
    shortcut = x if self.downsample is None else self.downsample(x)
    out = _bn_relu(self.bn1, self.conv1(x))
    return _bn_relu(self.bn2, self.conv2(out), shortcut)


def _bottleneck(self: Bottleneck, x: Tensor) -> Tensor:
    shortcut = x if self.downsample is None else self.downsample(x)
    out = _bn_relu(self.bn1, self.conv1(x))
    out = _bn_relu(self.bn2, self.conv2(out))
    return _bn_relu(self.bn3, self.conv3(out), shortcut)


def _trunk(self: ResNet, x: Tensor) -> Tensor:
    x = self.maxpool(_bn_relu(self.bn1, self.conv1(x)))
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)


_FORWARDS: dict[type, Callable[..., Any]] = {BasicBlock: _basic_block, Bottleneck: _bottleneck, ResNet: _trunk}
