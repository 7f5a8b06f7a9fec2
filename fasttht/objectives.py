"""What is minimised: one class per objective, and the dict that names them.

To add one: write a class with the four attributes and `__call__`, and add a line to OBJECTIVES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fasttht.bank import FeatureBank
from fasttht.config import MethodConfig
from fasttht.losses import contrastive, normalized_cross_entropy
from fasttht.models.two_head import TwoHead


@dataclass(frozen=True)
class Views:
    """What an objective may look at in one micro-batch.

    x (B, 3, H, W) clean and x_adv attacked images in [0, 1] (the same tensor if the objective is not attacked);
    y (B,); index (B,) dataset rows; feat_clean (B, D) or None if the objective has no clean encoder.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    index: Tensor
    feat_clean: Tensor | None


@dataclass(frozen=True)
class Terms:
    """loss () to differentiate; parts, its named summands (); logits (B, C) of the images trained on."""

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor


class Objective(Protocol):
    """What a trainer needs to know of an objective, and the objective itself."""

    attacked: ClassVar[bool]
    "Whether it trains on adversarial images."
    has_feature_head: ClassVar[bool]
    "Whether f needs a feature head; without one none is built."
    has_clean_encoder: ClassVar[bool]
    "Whether it reads feat_clean, and with it the bank."

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: FeatureBank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        """Run f (exactly one forward) and return the loss; called under the caller's autocast."""
        ...


class CrossEntropy:
    """Standard adversarial training: cross entropy on adversarial images only (THAT, Eq. 1)."""

    attacked: ClassVar[bool] = True
    has_feature_head: ClassVar[bool] = False
    has_clean_encoder: ClassVar[bool] = False

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: FeatureBank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits = model(views.x_adv).logits
        loss = normalized_cross_entropy(logits, views.y, smoothing=smoothing)
        return Terms(loss, {"loss_cls": loss}, logits)


class Clean(CrossEntropy):
    """Ordinary training on clean images: the undefended network that a robust one is compared with."""

    attacked = False


class TwoHeadAdversarial:
    """THAT: normalized cross entropy plus the contrastive pull to the clean encoder's features (Eq. 7)."""

    attacked: ClassVar[bool] = True
    has_feature_head: ClassVar[bool] = True
    has_clean_encoder: ClassVar[bool] = True

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: FeatureBank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits, feat_adv = model(views.x_adv)
        assert feat_adv is not None, "THAT needs the feature head"
        assert views.feat_clean is not None, "THAT needs the clean encoder's features"
        loss_cls = normalized_cross_entropy(logits, views.y, smoothing=smoothing)
        negatives, mask = gather_negatives(views.feat_clean, views.index, bank, method)
        loss_cl = contrastive(feat_adv, views.feat_clean, negatives, tau=method.tau, mask=mask)
        loss = loss_cls + method.lambda_cl * loss_cl
        return Terms(loss, {"loss_cls": loss_cls, "loss_cl": loss_cl}, logits)


def gather_negatives(
    feat_clean: Tensor, index: Tensor, bank: FeatureBank | None, method: MethodConfig
) -> tuple[Tensor, Tensor]:
    """Return the negatives of Eq. 5, (N, D), and which of them each anchor uses, (B, N) bool."""
    features, masks = [], []
    if method.negatives in ("bank", "both") and bank is not None:
        features.append(bank.features)
        masks.append(bank.mask(index, mask_same_index=method.mask_same_index))
    if method.negatives in ("batch", "both"):
        features.append(feat_clean)
        masks.append(index[:, None] != index[None, :])
    return torch.cat([f.to(feat_clean.dtype) for f in features]), torch.cat(masks, dim=1)


OBJECTIVES: dict[str, Objective] = {
    "that": TwoHeadAdversarial(),
    "at": CrossEntropy(),
    "clean": Clean(),
}
