"""The paper's two losses and the baselines' terms, as pure functions computed in float32 or wider."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.models.two_head import at_least_float32

# A class whose clean probability is below this is of the tail that the paper blames for TRADES' failure (section 2).
TAIL_BELOW = 0.01


def normalized_cross_entropy(logits: Tensor, y: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross entropy over scaled cosine logits (THAT, Eq. 6); over linear logits it is the plain one.

    Shapes: logits (B, C), already scaled by 1/eta; y (B,) int64; returns (), the batch mean.
    """
    return F.cross_entropy(at_least_float32(logits), y, label_smoothing=smoothing)


class Divergence(NamedTuple):
    """A KL divergence (), and the part of it (), without gradient, that classes of small p contribute."""

    kl: Tensor
    tail: Tensor


def kl_divergence(logits: Tensor, logits_adv: Tensor) -> Divergence:
    """KL(p || q) of p = softmax(logits) and q = softmax(logits_adv): TRADES' regulariser (THAT, Eq. 4).

    Both sides carry gradient. From log-probabilities alone, which are finite: a p or q that underflows to 0
    contributes 0, where p log(p/q) of probabilities would be NaN. The tail is the sum of Eq. 4's own terms over
    classes with p below 0.01; terms have either sign, so it can be negative or exceed the whole.

    Shapes: logits, logits_adv (B, C); returns batch means.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_p, log_q = (F.log_softmax(at_least_float32(z), dim=1) for z in (logits, logits_adv))
        p = log_p.exp()
        terms = p * (log_p - log_q)
        tail = torch.where(p < TAIL_BELOW, terms, 0).detach().sum(dim=1).mean()
        return Divergence(terms.sum(dim=1).mean(), tail)


def logit_pairing(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Mean squared difference over images and classes: adversarial logit pairing (Kannan et al. 2018).

    Shapes: logits, logits_adv (B, C); returns ().
    """
    return F.mse_loss(at_least_float32(logits_adv), at_least_float32(logits))


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
