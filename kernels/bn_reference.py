"""Batch norm, residual addition and ReLU in training, in plain torch: what the kernels of bn_relu*.cu must equal.

Statistics and parameters are float32 beside half-precision tensors and of the tensors' own type beside others;
arithmetic is in the statistics' type, and each result is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor, mean: Tensor) -> Tensor:
    return x.to(mean.dtype)


def _row(vector: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, 1)."""
    return vector.view(1, -1, 1, 1)


def bn_relu(x: Tensor, other: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return relu((x - mean) * (weight * invstd) + bias + other).

    Shapes: x, other (B, C, H, W); the others (C,); returns a new tensor like x.
    """
    total = (_wide(x, mean) - _row(mean)) * _row(weight * invstd) + _row(bias)
    if other is not None:
        total = total + _wide(other, mean)
    return total.relu_().to(x.dtype)


def bn_relu_sums(grad: Tensor, out: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Return, per channel, the sum of the gradient through the ReLU and that of its products with x - mean: (2, C).

    Shapes: grad, out, x (B, C, H, W), out as bn_relu returned it; mean (C,).
    """
    masked = _wide(torch.ops.aten.threshold_backward(grad, out, 0), mean)
    product = masked * (_wide(x, mean) - _row(mean))
    return torch.stack([masked.sum(dim=(0, 2, 3)), product.sum(dim=(0, 2, 3))])


def bn_relu_grad_(
    dx: Tensor,
    dother: Tensor | None,
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sums: Tensor,
) -> None:
    """Write the gradient with respect to x over dx, and that of `other`, if it was there, over dother.

    Shapes: all (B, C, H, W) but mean, invstd, weight (C,) and sums (2, C), as bn_relu_sums returned them.
    """
    masked = torch.ops.aten.threshold_backward(grad, out, 0)
    if dother is not None:
        dother.copy_(masked)
    count = x.numel() // x.shape[1]
    slope = sums[1] * invstd * invstd / count
    centred = _wide(x, mean) - _row(mean)
    dx.copy_((_wide(masked, mean) - _row(sums[0] / count) - centred * _row(slope)) * _row(weight * invstd))
