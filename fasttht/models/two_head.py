"""The robust encoder f: a ResNet trunk with a feature head and a classifier head (THAT, section 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht.models.resnet import ResNet, Stem

Classifier = Literal["cosine", "linear"]

# ImageNet statistics of [0, 1] pixels; inside the model, so that eps always lives in pixel space.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Bounds of the learnable sharpness s = 1/eta. Below 1 a 1000-class softmax over cosines cannot become confident;
# above 100 training is known to become unstable.
SCALE_MIN, SCALE_MAX = 1.0, 100.0


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32 if it is a half type, unchanged otherwise (float64 tests stay float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Outputs(NamedTuple):
    """What one forward of f gives: logits (B, C), and feat (B, D) of unit norm or None without a feature head."""

    logits: Tensor
    feat: Tensor | None


class CosineClassifier(nn.Module):
    """Logits s * cos(h, w_c): the normalized cross entropy's classifier (Eq. 6), s = 1/eta learnable, no bias.

    s is stored as itself: stored as a logarithm, free training at lr 0.1 drove it from 16 to 0.12 in one pass.
    Computed in float32 whatever the autocast type: at s = 100 a bfloat16 cosine is off by up to 0.4 in the logit.

    Shapes: h (B, num_features); returns (B, num_classes).
    """

    def __init__(self, num_features: int, num_classes: int, scale_init: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, num_features), dim=1))
        self.scale = nn.Parameter(torch.tensor(scale_init))

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            h = at_least_float32(h)
            return self.scale * F.normalize(h, dim=1) @ F.normalize(self.weight, dim=1).t()

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Bring s back into [1, 100], in place; called after every optimizer step."""
        self.scale.clamp_(SCALE_MIN, SCALE_MAX)


class FeatureHead(nn.Sequential):
    """Two linear layers with a ReLU between them: MoCo v2's projection, then unit l2 norm.

    Shapes: h (B, num_features); returns (B, feat_dim), float32 (or wider), unit norm.
    """

    def __init__(self, num_features: int, feat_dim: int) -> None:
        super().__init__(
            nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, feat_dim)
        )

    def forward(self, h: Tensor) -> Tensor:
        for layer in self:
            h = layer(h)
        return F.normalize(at_least_float32(h), dim=1)


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel; the statistics are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class TwoHead(nn.Module):
    """The robust encoder: [0, 1] pixels to logits, and to a unit-norm feature if it has that head.

    Shapes: x (B, 3, H, W) float in [0, 1]; returns Outputs.
    Only the heads that the objective uses are built: an unused one would wait for gradients under DDP.
    With mixture BN, images take the adversarial branch unless `mixture_bn.through` says otherwise.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int,
        *,
        stem: Stem = "imagenet",
        width: int = 64,
        classifier: Classifier = "cosine",
        scale_init: float = 16.0,
        feat_dim: int | None = 128,
        denoise: bool = False,
        mixture_bn: bool = False,
        bn_group_size: int = 0,
    ) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.trunk = ResNet(
            arch, stem=stem, width=width, denoise=denoise, mixture_bn=mixture_bn, bn_group_size=bn_group_size
        )
        self.classifier: CosineClassifier | nn.Linear
        if classifier == "cosine":
            self.classifier = CosineClassifier(self.trunk.num_features, num_classes, scale_init)
        else:
            self.classifier = nn.Linear(self.trunk.num_features, num_classes)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)
        self.feature_head = None if feat_dim is None else FeatureHead(self.trunk.num_features, feat_dim)

    def forward(self, x: Tensor) -> Outputs:
        h = self.trunk(self.normalize(x))
        feat = None if self.feature_head is None else self.feature_head(h)
        return Outputs(self._logits(h), feat)

    def logits(self, x: Tensor) -> Tensor:
        """Return the classifier's logits only: what attacks and evaluation differentiate and count."""
        return self._logits(self.trunk(self.normalize(x)))

    def _logits(self, h: Tensor) -> Tensor:
        return at_least_float32(self.classifier(h))


def decay_groups(model: nn.Module, weight_decay: float, *, decay_all: bool = False) -> list[dict[str, object]]:
    """Split parameters for SGD: convolution and linear weights decay; BN, biases and s do not.

    decay_all: BN and biases decay too. s, the only parameter without a dimension, never does: it is a temperature.
    """
    least = 1 if decay_all else 2
    decayed = [p for p in model.parameters() if p.ndim >= least]
    kept = [p for p in model.parameters() if p.ndim < least]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
