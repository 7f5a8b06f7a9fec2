"""The paper's two losses, as pure functions computed in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.models.two_head import at_least_float32


def normalized_cross_entropy(logits: Tensor, y: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross entropy over scaled cosine logits (THAT, Eq. 6); over linear logits it is the plain one.

    Shapes: logits (B, C), already scaled by 1/eta; y (B,) int64; returns (), the batch mean.
    """
    return F.cross_entropy(at_least_float32(logits), y, label_smoothing=smoothing)


def contrastive(
    feat_adv: Tensor,
    feat_clean: Tensor,
    negatives: Tensor,
    *,
    tau: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Pull each adversarial feature to its clean twin and away from the negatives (THAT, Eq. 5).

    Shapes: feat_adv (B, D), feat_clean (B, D), negatives (N, D), all unit norm; mask (B, N) or (N,) bool, True
    where a negative takes part; returns (), the batch mean. N = 0, or a row with nothing unmasked, gives loss 0.
    Float32 whatever the autocast type: similarities over tau reach +-14 at tau 0.07, where bfloat16 steps by 1/16.

    Raises: ValueError if tau is not positive or the feature sizes differ.
    """
    if tau <= 0:
        raise ValueError(f"contrastive: expected tau > 0, got {tau}")
    if not feat_adv.shape[-1] == feat_clean.shape[-1] == negatives.shape[-1]:
        raise ValueError(
            f"contrastive: expected features of one size, got {feat_adv.shape[-1]}, "
            f"{feat_clean.shape[-1]} and {negatives.shape[-1]}"
        )
    with torch.autocast(feat_adv.device.type, enabled=False):
        u, v = at_least_float32(feat_adv), at_least_float32(feat_clean)
        positive = (u * v).sum(dim=1, keepdim=True)
        similarity = u @ negatives.to(u.dtype).t()
        if mask is not None:
            similarity = similarity.masked_fill(~mask, float("-inf"))
        scores = torch.cat([positive, similarity], dim=1) / tau
        return (torch.logsumexp(scores, dim=1) - scores[:, 0]).mean()
