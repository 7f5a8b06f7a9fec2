"""What is minimised: one class per kind of loss, and the dict that names the objectives.

Each runs f exactly once: where it needs clean and adversarial images, on concat[clean, adv], because DDP allows one
forward for each backward. BN then normalises both halves together, where the TRADES authors' two forwards normalise
each alone; mixture BN keeps them apart. A group of ghost BN has both halves of its images, as a GPU would. What an
objective asks of its attack, and of f, is in traits.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasttht.bank import Bank
from fasttht.config import MethodConfig
from fasttht.losses import contrastive, kl_divergence, logit_pairing, normalized_cross_entropy
from fasttht.models.ghost_bn import group_size_of, interleave, paired, separate
from fasttht.models.mixture_bn import has_mixture_bn, through
from fasttht.models.two_head import TwoHead


@dataclass(frozen=True)
class Views:
    """What an objective may look at in one micro-batch.

    x (B, 3, H, W) clean and x_adv attacked images in [0, 1] (the same tensor if the objective is not attacked);
    y (B,); index (B,) dataset rows; feat_clean (B, D) or None if the objective has no clean encoder. feat_batch (A, D)
    and index_batch (A,): the same of all ranks' images, where they are each other's negatives; None: these are all.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    index: Tensor
    feat_clean: Tensor | None
    feat_batch: Tensor | None = None
    index_batch: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """loss () to differentiate; parts, its named summands () and their diagnostics; logits (B, C) of x_adv."""

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor


class Objective(Protocol):
    """A loss of f on one micro-batch."""

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        """Run f (exactly one forward) and return the loss; called under the caller's autocast."""
        ...


class CrossEntropy:
    """Cross entropy on the attacked images only: standard adversarial training (THAT, Eq. 1).

    On clean images it is ordinary training, with a cosine classifier THAT without its contrastive loss, and with an
    attack of one step from noise FGSM-RS (Wong et al. 2020).
    """

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits = model(views.x_adv).logits
        loss = normalized_cross_entropy(logits, views.y, smoothing=smoothing)
        return Terms(loss, {"loss_cls": loss}, logits)


class TwoHeadLoss:
    """THAT: normalized cross entropy plus the contrastive pull to the clean encoder's features (Eq. 7).

    With a linear classifier it is THAT without NCE; on clean images, R152-Con (section 4.2).
    """

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits, feat_adv = model(views.x_adv)
        assert feat_adv is not None, "THAT needs the feature head"
        assert views.feat_clean is not None, "THAT needs the clean encoder's features"
        loss_cls = normalized_cross_entropy(logits, views.y, smoothing=smoothing)
        negatives, mask = gather_negatives(views, bank, method)
        loss_cl = contrastive(feat_adv, views.feat_clean, negatives, tau=method.tau, mask=mask)
        loss = loss_cls + method.lambda_cl * loss_cl
        return Terms(loss, {"loss_cls": loss_cls, "loss_cl": loss_cl}, logits)


class CrossEntropyKL:
    """CE + lambda KL(p(x) || p(x_adv)): standard adversarial training with KL (THAT, Table 5).

    The images were attacked on the classification loss. Which images the cross entropy sees is `--ce-on`, the mean of
    the two for `both`. Gradient flows through both distributions.
    """

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits, logits_adv = _both(model, views)
        seen = {"clean": (logits,), "adv": (logits_adv,), "both": (logits, logits_adv)}[method.ce_on]
        loss_cls = torch.stack([normalized_cross_entropy(z, views.y, smoothing=smoothing) for z in seen]).mean()
        loss_kl, tail = kl_divergence(logits, logits_adv)
        loss = loss_cls + method.lambda_kl * loss_kl
        return Terms(loss, {"loss_cls": loss_cls, "loss_kl": loss_kl, "kl_tail": tail}, logits_adv)


class Trades:
    """CE(f(x), y) + beta KL(p(x) || p(x_adv)), x_adv attacked on that KL (Zhang et al. 2019; THAT, Eq. 2-4).

    Gradient flows through both distributions, as in the authors' code.
    """

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits, logits_adv = _both(model, views)
        loss_cls = normalized_cross_entropy(logits, views.y, smoothing=smoothing)
        loss_kl, tail = kl_divergence(logits, logits_adv)
        loss = loss_cls + method.trades_beta * loss_kl
        return Terms(loss, {"loss_cls": loss_cls, "loss_kl": loss_kl, "kl_tail": tail}, logits_adv)


class LogitPairing:
    """Adversarial logit pairing: mean CE over both halves + lambda x mean squared logit difference (Kannan et al.)."""

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        logits, logits_adv = _both(model, views)
        loss_cls = 0.5 * _sum_of_both(logits, logits_adv, views.y, smoothing)
        loss_alp = logit_pairing(logits, logits_adv)
        return Terms(loss_cls + method.lambda_alp * loss_alp, {"loss_cls": loss_cls, "loss_alp": loss_alp}, logits_adv)


class MixtureBN:
    """CE(f(x), y) + CE(f(x_adv), y), each half through its own BN branch (Xie & Yuille 2020).

    pairing adds lambda x mean squared logit difference: MBN-ALP. The two cross entropies are summed, as that paper
    writes them; logit pairing's authors take their mean.
    """

    def __init__(self, *, pairing: bool) -> None:
        self.pairing = pairing

    def __call__(
        self,
        model: TwoHead,
        views: Views,
        bank: Bank | None,
        method: MethodConfig,
        *,
        smoothing: float,
    ) -> Terms:
        with through(model, "split"):
            logits, logits_adv = _both(model, views)
        loss_cls = _sum_of_both(logits, logits_adv, views.y, smoothing)
        if not self.pairing:
            return Terms(loss_cls, {"loss_cls": loss_cls}, logits_adv)
        loss_alp = logit_pairing(logits, logits_adv)
        return Terms(loss_cls + method.lambda_alp * loss_alp, {"loss_cls": loss_cls, "loss_alp": loss_alp}, logits_adv)


def gather_negatives(views: Views, bank: Bank | None, method: MethodConfig) -> tuple[Tensor, Tensor]:
    """Return the negatives of Eq. 5, (N, D), and which of them each anchor uses, (B, N) bool."""
    assert views.feat_clean is not None, "the contrastive loss needs the clean encoder's features"
    features, masks = [], []
    index, feat_clean = views.index, views.feat_clean
    if method.negatives in ("bank", "both") and bank is not None:
        stored, mask = bank.negatives(index, mask_same_index=method.mask_same_index)
        features.append(stored)
        masks.append(mask)
    if method.negatives in ("batch", "both"):
        everyones = index if views.index_batch is None else views.index_batch
        features.append(feat_clean if views.feat_batch is None else views.feat_batch)
        masks.append(index[:, None] != everyones[None, :])
    return torch.cat([f.to(feat_clean.dtype) for f in features]), torch.cat(masks, dim=1)


def _both(model: TwoHead, views: Views) -> tuple[Tensor, Tensor]:
    """Return the logits of clean and of attacked images, (B, C) each, from one forward."""
    size = 0 if has_mixture_bn(model) else group_size_of(model)
    if size:
        with paired(model):
            return separate(model(interleave(views.x, views.x_adv, size)).logits, size)
    logits, logits_adv = model(torch.cat([views.x, views.x_adv])).logits.chunk(2)
    return logits, logits_adv


def _sum_of_both(logits: Tensor, logits_adv: Tensor, y: Tensor, smoothing: float) -> Tensor:
    return normalized_cross_entropy(logits, y, smoothing=smoothing) + normalized_cross_entropy(
        logits_adv, y, smoothing=smoothing
    )


OBJECTIVES: dict[str, Objective] = {
    "that": TwoHeadLoss(),
    "that-no-cl": CrossEntropy(),
    "that-no-nce": TwoHeadLoss(),
    "at": CrossEntropy(),
    "at-kl": CrossEntropyKL(),
    "alp": LogitPairing(),
    "mbn": MixtureBN(pairing=False),
    "mbn-alp": MixtureBN(pairing=True),
    "trades": Trades(),
    "fast": CrossEntropy(),
    "clean": CrossEntropy(),
    "clean-con": TwoHeadLoss(),
}
