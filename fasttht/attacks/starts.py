"""What an attack begins with: the class it is about and the point it starts from.

Both are keyed by (seed, epoch, step) in device memory and the dataset row, so a captured attack draws anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks import l2
from fasttht.attacks.threat import Threat


def goal(
    y: Tensor,
    index: Tensor,
    threat: Threat,
    counters: Tensor,
    *,
    num_classes: int,
    soft_target: Tensor | None,
    target: Tensor | None = None,
) -> tuple[Tensor, Threat]:
    """Return what the loss compares logits with, and the threat that pursues it.

    That is y (B,); if the threat is targeted, `target` (B,) where it is given, else other classes (B,) drawn for it; or
    soft_target (B, C), class probabilities that are moved away from, whatever the threat's goal.

    Raises: ValueError for a soft_target of another shape, or for a least-likely target that is not given.
    """
    if soft_target is not None:
        if tuple(soft_target.shape) != (len(y), num_classes):
            raise ValueError(
                f"attack: expected soft_target of shape {(len(y), num_classes)}, got {tuple(soft_target.shape)}"
            )
        return soft_target.detach(), replace(threat, targeted=False)
    if threat.targeted and target is not None:
        return target, threat
    if threat.targeted and threat.target != "random":
        raise ValueError(f"attack: expected a target beside {threat.name}, got none; take losses.least_likely")
    if threat.targeted:
        seed, epoch, step = counters.unbind()
        y = kernels.draw_target(y, index, num_classes, seed=seed, epoch=epoch, step=step)
    return y, threat


def draw_start(x: Tensor, index: Tensor, threat: Threat, counters: Tensor) -> Tensor:
    """Return the attack's starting point, a new tensor like x (B, 3, H, W), float in [0, 1] or uint8.

    Raises: ValueError for a uint8 x and a threat that has no lattice.
    """
    if x.dtype == torch.uint8:
        eps = levels(threat.eps)
        if threat.norm != "linf" or threat.start == "gaussian":
            raise ValueError(
                f"lattice attack: expected the norm linf and a start that is uniform or clean, "
                f"got {threat.norm} and {threat.start}; give float images"
            )
        if threat.start == "clean":
            return x.clone()
        return kernels.draw_lattice_start_at(x, index, counters, eps=eps, clean_prob=threat.clean_prob)
    if threat.start == "clean":
        return x.detach().clone()
    if threat.norm == "linf" and threat.start == "uniform":
        return kernels.draw_start_at(x, index, counters, eps=threat.eps, clean_prob=threat.clean_prob)
    seed, epoch, step = counters.unbind()
    if threat.start == "gaussian":
        start = kernels.draw_gaussian_start(
            x, index, std=threat.start_std, clean_prob=threat.clean_prob, seed=seed, epoch=epoch, step=step
        )
        if threat.norm == "linf":
            return kernels.clip_to_ball_(start, x, threat.eps)
        return l2.project_(start, x, l2.units(x, threat) * threat.eps)
    return kernels.draw_l2_start(
        x,
        index,
        radius=l2.units(x, threat) * threat.eps,
        clean_prob=threat.clean_prob,
        seed=seed,
        epoch=epoch,
        step=step,
    )


def levels(length: float) -> int:
    """Return a pixel-space length in levels of 8-bit images.

    Raises: ValueError where that is no whole number.
    """
    whole = round(255 * length)
    if abs(255 * length - whole) > 1e-6:
        raise ValueError(f"lattice attack: expected eps and alpha of whole 255ths, got {255 * length:g}/255")
    return whole
