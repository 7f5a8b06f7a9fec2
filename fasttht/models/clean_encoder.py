"""The clean encoder g: the features that adversarial ones are pulled to (THAT, sections 3 and 4.3).

`frozen`: weights from a file, evaluation-mode BN, never trained; the paper's default.
`momentum`: starts as a copy of f and follows it slowly (Table 7), train-mode BN on clean images.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttht.checkpoint import read_encoder
from fasttht.errors import CheckpointError
from fasttht.models.denoise import has_denoising, remove_denoising_
from fasttht.models.mixture_bn import norms
from fasttht.models.moco_checkpoint import is_torch_file, read_moco
from fasttht.models.resnet import BasicBlock, Bottleneck, ResNet, Stem
from fasttht.models.two_head import FeatureHead, Normalize, TwoHead


class Encoder(nn.Module):
    """A trunk and a feature head without a classifier: what contrastive pre-training trains to become g.

    Unlike f's, its blocks do not start as the identity: MoCo starts from torchvision's plain initial weights.
    bn_group_size: as ResNet's.

    Shapes: x (B, 3, H, W) float in [0, 1]; returns (B, feat_dim), float32 or wider, unit norm.
    """

    def __init__(
        self, arch: str, *, stem: Stem = "imagenet", width: int = 64, feat_dim: int = 128, bn_group_size: int = 0
    ) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.trunk = ResNet(arch, stem=stem, width=width, bn_group_size=bn_group_size)
        for block in self.trunk.modules():
            if isinstance(block, Bottleneck | BasicBlock):
                for norm in norms(block.bn3 if isinstance(block, Bottleneck) else block.bn2):
                    nn.init.ones_(norm.weight)
        self.feature_head: FeatureHead | None = FeatureHead(self.trunk.num_features, feat_dim)

    def forward(self, x: Tensor) -> Tensor:
        assert self.feature_head is not None, "an encoder is built with its feature head"
        feat: Tensor = self.feature_head(self.trunk(self.normalize(x)))
        return feat


class CleanEncoder(nn.Module):
    """g: [0, 1] pixels to unit-norm features; no gradient ever reaches it.

    Shapes: x (B, 3, H, W); returns feat_clean (B, D), float32 or wider, unit norm.
    """

    def __init__(self, model: TwoHead | Encoder, *, frozen: bool) -> None:
        super().__init__()
        if model.feature_head is None:
            raise ValueError("clean encoder: expected a model with a feature head, got one without")
        self.frozen = frozen
        self.normalize: Normalize = copy.deepcopy(model.normalize)
        self.trunk = copy.deepcopy(model.trunk)
        self.feature_head: FeatureHead = copy.deepcopy(model.feature_head)
        self.requires_grad_(False)
        self.train(not frozen)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        feat: Tensor = self.feature_head(self.trunk(self.normalize(x)))
        return feat

    @torch.no_grad()
    def follow_(self, model: TwoHead | Encoder, rate: Tensor) -> None:
        """Move every parameter by `rate` = 1 - m towards f's, in place; BN buffers are g's own.

        rate is a () tensor, so that a skipped optimizer step can pass 0 without a host sync.
        """
        assert model.feature_head is not None, "a momentum encoder follows a model with a feature head"
        lerp_(
            [*self.trunk.parameters(), *self.feature_head.parameters()],
            [*model.trunk.parameters(), *model.feature_head.parameters()],
            rate,
        )


def lerp_(targets: list[Tensor], sources: list[Tensor], rate: Tensor) -> None:
    """Move every target by `rate` (a () tensor) of the way to its source, in place."""
    gaps = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(gaps, rate)
    torch._foreach_add_(targets, gaps)


def load_frozen(model: TwoHead | Encoder, path: Path, arch: str | None = None) -> CleanEncoder:
    """Build a frozen g of f's architecture with weights from `path`.

    `path` is a safetensors file with `trunk.*` and `feature_head.*` keys; or a published MoCo v2 checkpoint (see
    moco_checkpoint; `arch` is then compared with the file's own); or a run folder: then its clean encoder if it has one
    (pre-training's result, or the momentum encoder), else its robust encoder. What a file is, its first bytes say.

    Raises: CheckpointError naming the first key that is missing, of another shape, not finite or too many.
    """
    encoder = CleanEncoder(model, frozen=True)
    published = path.is_file() and is_torch_file(path)
    tensors = {} if published else read_encoder(path)
    if has_denoising(encoder) and not any(name.endswith(".theta.weight") for name in tensors):
        remove_denoising_(encoder)  # weights of a plain network beside a denoising f
    own = encoder.state_dict()
    if published:
        tensors = read_moco(path, own, arch)
    unknown = sorted(name for name in tensors.keys() - own.keys() if name.split(".")[0] in ("trunk", "feature_head"))
    if unknown:
        raise CheckpointError(
            f"{path}: expected a clean encoder of the same --arch, got one with {unknown[0]} and {len(unknown) - 1} "
            "more tensors that this one lacks; a deeper network's weights would be cut"
        )
    for name, tensor in own.items():
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"{path}: expected {name} of shape {tuple(tensor.shape)}, got no such tensor; "
                "is it a clean encoder of the same --arch, --stem and --width, with a feature head?"
            )
        if not found.isfinite().all():
            raise CheckpointError(
                f"{path}: expected finite numbers in {name}, got others; the run overflowed: take another"
            )
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: expected {name} of shape {tuple(tensor.shape)}, got {tuple(found.shape)}; "
                "the clean encoder needs the same --arch, --stem and --width"
            )
        tensor.copy_(found)
    return encoder
