"""What an attack moves along: scalar functions of the logits, summed over the batch, so that images stay independent.

All grow as the image moves away from `y`: an untargeted attack ascends on them, y the label; a targeted one descends, y
the class to move to. Cross entropy flattens where a network is confident, and with it the gradient; the other
two do not, and DLR does not change with the scale of the logits either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.attacks.threat import Threat

AttackLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, C) and classes (B,) to a () tensor, the sum over the batch."""

# Beside the denominator of DLR, as its authors have it: equal logits divide by this and not by 0.
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy; y may be class probabilities (B, C)."""
    return F.cross_entropy(logits, y, reduction="sum")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{c != y} z_c - z_y: positive where another class wins (Carlini & Wagner 2017)."""
    return (_best_other(logits, y) - _of(logits, y)).sum()


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{c != y} z_c) / (z_(1) - z_(3)), z_(i) the i-th largest (Croce & Hein 2020, Eq. 6).

    Raises: ValueError for fewer than three classes.
    """
    ranked = _ranked(logits, 3)
    return ((_best_other(logits, y) - _of(logits, y)) / (ranked[:, 0] - ranked[:, 2] + _TINY)).sum()


def dlr_targeted(logits: Tensor, target: Tensor, *, label: Tensor) -> Tensor:
    """(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): minus the targeted DLR of Croce & Hein 2020, to descend on.

    label (B,) is the y of it. Raises: ValueError for fewer than four classes.
    """
    ranked = _ranked(logits, 4)
    scale = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + _TINY
    return ((_of(logits, label) - _of(logits, target)) / scale).sum()


def loss_of(threat: Threat, label: Tensor) -> AttackLoss:
    """Return the loss that a threat moves along, for images of class label (B,)."""
    if threat.loss == "dlr":
        return partial(dlr_targeted, label=label) if threat.targeted else dlr
    return margin if threat.loss == "margin" else cross_entropy


def least_likely(logits: Tensor, y: Tensor) -> Tensor:
    """Return the class of each image's lowest logit that is not its label, (B,) (Kurakin et al. 2017)."""
    return logits.scatter(1, y[:, None], torch.inf).argmin(dim=1)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None])[:, 0]


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    others: Tensor = logits.scatter(1, y[:, None], -torch.inf).max(dim=1).values
    return others


def _ranked(logits: Tensor, least: int) -> Tensor:
    if logits.shape[1] < least:
        raise ValueError(f"dlr: expected at least {least} classes, got {logits.shape[1]}; take margin")
    return logits.topk(least, dim=1).values
