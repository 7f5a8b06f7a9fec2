"""The exported network in one file: it needs torch and safetensors, nothing else.

    model = load("folder of this file")  # an nn.Module in evaluation mode, on the CPU
    logits = model(x)                    # x (B, 3, H, W) float in [0, 1]; logits (B, num_classes) float32

As RobustBench and attack libraries expect: pixels in [0, 1], mean and deviation inside, logits out. With mixture BN
images take the adversarial branch, `model.set_branch("clean")` sends them through the other. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# name -> (bottleneck?, blocks per stage)
BLOCKS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}


class MixtureNorm(nn.Module):
    """A BN for clean images and one for adversarial ones; every image takes the one that `branch` names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.clean = nn.BatchNorm2d(channels)
        self.adversarial = nn.BatchNorm2d(channels)
        self.branch = "adversarial"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.clean if self.branch == "clean" else self.adversarial)(x)
        return out


class Denoise(nn.Module):
    """A feature denoising block: self-attention over positions (Xie et al. 2019), shapes kept."""

    def __init__(self, channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, value = (h.flatten(2).transpose(1, 2)[:, None] for h in (self.theta(x), self.phi(x), x))
        mixed = F.scaled_dot_product_attention(theta, phi, value, scale=theta.shape[-1] ** -0.5)
        out: Tensor = x + self.bn(self.conv(mixed[:, 0].transpose(1, 2).reshape(x.shape)))
        return out


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or (bottleneck) 1x1, 3x3 with the stride, 1x1 to four times as many."""

    def __init__(self, channels_in: int, channels: int, stride: int, bottleneck: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        if bottleneck:
            shapes = [(channels_in, channels, 1, 1), (channels, channels, 3, stride), (channels, 4 * channels, 1, 1)]
        else:
            shapes = [(channels_in, channels, 3, stride), (channels, channels, 3, 1)]
        self.steps = len(shapes)
        for i, (before, after, kernel, step) in enumerate(shapes, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", norm(after))
        after = shapes[-1][1]
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != after:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, after, 1, stride, bias=False), norm(after))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.steps + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.steps:
                out = F.relu(out, inplace=True)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Trunk(nn.Module):
    """A ResNet without its classifier: normalised images to pooled features (B, num_features)."""

    def __init__(self, arch: str, stem: str, width: int, denoise: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        bottleneck, blocks = BLOCKS[arch]
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = norm(width)
        self.pool = stem == "imagenet"
        self.num_features = width
        for stage, count in enumerate(blocks):
            layers: list[nn.Module] = []
            for i in range(count):
                step = 2 if stage > 0 and i == 0 else 1
                layers.append(Block(self.num_features, width * 2**stage, step, bottleneck, norm))
                self.num_features = width * 2**stage * (4 if bottleneck else 1)
            if denoise:
                layers.append(Denoise(self.num_features, norm))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.pool:
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class Cosine(nn.Module):
    """Logits s * cos(h, w_c)."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * F.normalize(h, dim=1) @ F.normalize(self.weight, dim=1).t()


class Network(nn.Module):
    """[0, 1] pixels to logits; `features` gives the unit-norm output of the feature head, if there is one."""

    mean: Tensor
    std: Tensor

    def __init__(self, header: dict[str, Any]) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(header[name]).view(1, 3, 1, 1), persistent=False)
        norm = MixtureNorm if header["mixture_bn"] else nn.BatchNorm2d
        self.trunk = Trunk(header["arch"], header["stem"], header["width"], header["denoise"], norm)
        size, classes = self.trunk.num_features, header["num_classes"]
        self.classifier = Cosine(size, classes) if header["classifier"] == "cosine" else nn.Linear(size, classes)
        self.feature_head: nn.Sequential | None = None
        if header["feat_dim"] is not None:
            self.feature_head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, header["feat_dim"]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.trunk((x - self.mean) / self.std))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Return the feature head's output, (B, feat_dim), of unit norm. Raises: ValueError without such a head."""
        if self.feature_head is None:
            raise ValueError("features: expected a network with a feature head, got one without")
        return F.normalize(self.feature_head(self.trunk((x - self.mean) / self.std)), dim=1)

    def set_branch(self, branch: str) -> None:
        """Send images through the `clean` or the `adversarial` BN layers; a network without mixture BN ignores it."""
        if branch not in ("clean", "adversarial"):
            raise ValueError(f"branch: expected clean or adversarial, got {branch}")
        for module in self.modules():
            if isinstance(module, MixtureNorm):
                module.branch = branch


def load(folder: str | Path = Path(__file__).parent) -> Network:
    """Build the network that `folder` describes and load its weights strictly; by default this file's own folder.

    Raises: ValueError if the weights are not those that model.json was written with; OSError if a file is missing.
    """
    folder = Path(folder)
    header = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    if not str(header.get("format")).startswith("fasttht-exact-"):
        raise ValueError(f"{folder / 'model.json'}: expected an exact export, got {header.get('format')!r}")
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != header["sha256"]:
        raise ValueError(f"{folder / 'model.safetensors'}: expected sha256 {header['sha256']}, got {found}")
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, then replaced
        model = Network(header)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
