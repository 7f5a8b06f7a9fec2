"""The l2 ball: each image's radius, the normalised gradient step and the projection, in plain torch.

Norms are summed in float64. Per image, never over the batch, so the cut of a batch changes nothing but rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttht.attacks.threat import Threat


def image_norms(x: Tensor) -> Tensor:
    """Return every image's l2 norm, (B, C, H, W) to (B, 1, 1, 1), in the type of x."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return norms.to(x.dtype)


def units(x: Tensor, threat: Threat) -> Tensor:
    """Return what eps and alpha are multiples of, (B, 1, 1, 1): 1, or with a relative threat ||x_i||_2."""
    return image_norms(x) if threat.norm == "l2-relative" else torch.ones_like(x[:, :1, :1, :1])


def direction(grad: Tensor) -> Tensor:
    """Return the gradient scaled to unit norm, image by image; a gradient of zero stays zero.

    A NaN counts as 0. Divided by its largest element first, so that a gradient of any magnitude has a direction; where
    elements are infinite only they count.
    """
    grad = grad.nan_to_num(nan=0.0)
    peak = grad.abs().amax(dim=(1, 2, 3), keepdim=True)
    grad = grad / torch.where(peak > 0, peak, 1)
    return grad.div_(image_norms(grad).clamp_(min=1))  # at least 1, but where all is zero


def project_(x_adv: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Bring x_adv in place to the nearest point of the ball around x, then clip it to [0, 1]; return it.

    Shapes: x_adv, x (B, C, H, W), x in [0, 1]; radius (B, 1, 1, 1). The clip does not leave the ball, as x is in both.
    """
    delta = x_adv - x
    norm = image_norms(delta)
    delta.mul_((radius / torch.where(norm > 0, norm, 1)).clamp_(max=1))
    return torch.add(x, delta, out=x_adv).clamp_(0, 1)


def pgd_l2_step_(x_adv: Tensor, grad: Tensor, x: Tensor, *, radius: Tensor, alpha: Tensor) -> None:
    """Take one step of length alpha along `grad` and project, in place. A negative alpha descends.

    Shapes: x_adv, grad, x (B, C, H, W) float; radius, alpha (B, 1, 1, 1).
    """
    x_adv.add_(direction(grad.to(x_adv.dtype)).mul_(alpha))
    project_(x_adv, x, radius)
