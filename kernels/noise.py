"""Starting points that need normal deviates, in plain torch: uniform in an l2 ball, and TRADES' Gaussian cloud.

Keyed like every draw (see `draws`); they share its stream of starts, because an attack has one start. A deviate
is rounded to a multiple of 2**-16, which makes a row's squared norm an exact integer sum: the same bits however the
batch is cut and in every memory format. Between devices the logarithm and the cosine are a library's, so there an
element may, rarely, differ by that last step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttht.kernels import checks
from fasttht.kernels.draws import STREAM_START, _element, _moves, _shift_right, draw_bits, draw_uniform, row_keys

_STEPS = 2.0**16  # to 1


def draw_normal(keys: Tensor, element: Tensor) -> Tensor:
    """Return float32 standard normals, multiples of 2**-16, for every (key, element) pair; the arguments broadcast.

    Box and Muller's cosine, of the upper and the lower half of one word: |value| is at most 6.7.
    """
    bits = draw_bits(keys, element)
    radius = _shift_right(bits, 32).double().add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32).cos_()
    return radius.mul_(angle).mul_(_STEPS).round_().div_(_STEPS).to(torch.float32)


def draw_l2_start(
    x: Tensor,
    index: Tensor,
    *,
    radius: Tensor,
    clean_prob: float,
    seed: int | Tensor,
    epoch: int | Tensor,
    step: int | Tensor,
) -> Tensor:
    """Draw x plus noise uniform in the l2 ball of each image's radius, clipped to [0, 1].

    The direction is that of a normal vector, the length radius * U**(1/d). With probability `clean_prob` the whole
    batch starts from x itself.

    Shapes: x (B, C, H, W) float in [0, 1]; index (B,) int64; radius (B, 1, 1, 1); returns a new tensor like x.
    """
    checks.draw_start("draw_l2_start", x, index, None, 0.0, lattice=False)
    keys = row_keys(STREAM_START, seed, epoch, step, index).view(-1, 1, 1, 1)
    normal = draw_normal(keys, _element(x))
    whole = (normal * _STEPS).to(torch.int64)
    norm = whole.mul_(whole).sum(dim=(1, 2, 3), keepdim=True).clamp_(min=1).double().sqrt_().div_(_STEPS)
    size = x[0].numel() if len(x) else 1
    # Rounded to float32, so that the power's last bit in float64 is not seen.
    share = draw_uniform(keys, torch.full_like(keys, size)).double().pow_(1 / size).to(torch.float32)
    length = radius * share / norm * _moves(index, clean_prob, seed, epoch, step).double()
    return (x + normal.to(x.dtype) * length.to(x.dtype)).clamp_(0, 1)


def draw_gaussian_start(
    x: Tensor,
    index: Tensor,
    *,
    std: float,
    clean_prob: float,
    seed: int | Tensor,
    epoch: int | Tensor,
    step: int | Tensor,
) -> Tensor:
    """Draw x + std N(0, 1), not projected on anything; `clean_prob` as for draw_l2_start.

    Shapes: x (B, C, H, W) float; index (B,) int64; returns a new tensor like x.
    """
    checks.draw_start("draw_gaussian_start", x, index, None, 0.0, lattice=False)
    normal = draw_normal(row_keys(STREAM_START, seed, epoch, step, index).view(-1, 1, 1, 1), _element(x))
    return x + normal.to(x.dtype) * (std * _moves(index, clean_prob, seed, epoch, step).to(x.dtype))
