"""ResNet-18/34/50/101/152 (v1.5: the stride sits on the 3x3), with torchvision's state-dict keys.

Written here rather than imported because the stem, the width, the normalisation and the blocks vary with the recipe,
and torchvision cannot be installed beside every torch build.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fasttht.models.denoise import DenoisingBlock
from fasttht.models.ghost_bn import GhostBatchNorm2d
from fasttht.models.mixture_bn import MixtureBatchNorm2d, norms

Norm = Callable[[int], nn.Module]
Stem = Literal["imagenet", "small"]

# name -> (bottleneck?, blocks per stage)
ARCHS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}


def _conv(channels_in: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=kernel // 2, bias=False)


class NarrowShortcut(nn.Conv2d):
    """A 1x1 convolution with a stride, on few channels: the pixels that it sees are picked out first.

    oneDNN's weight gradient of a strided 1x1 convolution (AVX2, channels-last) writes past its scratch memory when
    there are fewer than eight input channels: the heap is corrupt and the process dies, later and elsewhere.
    """

    CHANNELS = 8  # inputs from which the ordinary convolution is sound

    def forward(self, x: Tensor) -> Tensor:
        seen = x[:, :, :: self.stride[0], :: self.stride[1]]
        return nn.functional.conv2d(seen, self.weight)


def _shortcut(channels_in: int, channels: int, stride: int) -> nn.Conv2d:
    if stride == 1 or channels_in >= NarrowShortcut.CHANNELS:
        return _conv(channels_in, channels, 1, stride)
    return NarrowShortcut(channels_in, channels, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, downsample: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, 3, stride)
        self.bn1 = norm(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand by four, and a shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int, downsample: nn.Module | None, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, 1)
        self.bn1 = norm(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = norm(channels)
        self.conv3 = _conv(channels, channels * self.expansion, 1)
        self.bn3 = norm(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A ResNet trunk: images to pooled features.

    Shapes: x (B, 3, H, W), already normalised; returns (B, num_features).
    Stem `imagenet`: 7x7 stride 2 and a 3x3 max-pool; `small`: 3x3 stride 1, no pool (images up to ~64 px).
    `width` is the channel count of the first stage, 64 in the standard networks.
    `denoise` adds a denoising block behind the last block of each stage, as that stage's last child: the keys of the
    others are the same with and without. `mixture_bn` makes every BN a clean and an adversarial one. `bn_group_size`
    above 0 makes them ghost BN, which has the same keys.

    Raises: ValueError for an unknown architecture or stem.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        *,
        stem: Stem = "imagenet",
        width: int = 64,
        denoise: bool = False,
        mixture_bn: bool = False,
        bn_group_size: int = 0,
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch}")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem: expected imagenet or small, got {stem}")
        bottleneck, blocks = ARCHS[arch]
        block = Bottleneck if bottleneck else BasicBlock
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = _conv(3, width, 3)
            self.maxpool = nn.Identity()
        norm: Callable[[int], nn.BatchNorm2d] = nn.BatchNorm2d
        if bn_group_size:
            norm = partial(GhostBatchNorm2d, group_size=bn_group_size)
        self._norm: Norm = partial(MixtureBatchNorm2d, norm=norm) if mixture_bn else norm
        self._denoise = denoise
        self.bn1 = self._norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.num_features = width
        self.layer1 = self._stage(block, width, blocks[0], 1)
        self.layer2 = self._stage(block, width * 2, blocks[1], 2)
        self.layer3 = self._stage(block, width * 4, blocks[2], 2)
        self.layer4 = self._stage(block, width * 8, blocks[3], 2)
        self._init_weights()

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], channels: int, num_blocks: int, stride: int
    ) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i in range(num_blocks):
            channels_out = channels * block.expansion
            block_stride = stride if i == 0 else 1
            downsample = None
            if block_stride != 1 or self.num_features != channels_out:
                downsample = nn.Sequential(
                    _shortcut(self.num_features, channels_out, block_stride), self._norm(channels_out)
                )
            layers.append(block(self.num_features, channels, block_stride, downsample, self._norm))
            self.num_features = channels_out
        if self._denoise:
            layers.append(DenoisingBlock(self.num_features, self._norm))
        return nn.Sequential(*layers)

    def _init_weights(self) -> None:
        """He fan-out for convolutions; gamma of each block's last BN is zero, so blocks start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck | BasicBlock):
                for layer in norms(module.bn3 if isinstance(module, Bottleneck) else module.bn2):
                    nn.init.zeros_(layer.weight)
        for module in self.modules():  # again: they are visited before their own convolutions
            if isinstance(module, DenoisingBlock):
                module.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
