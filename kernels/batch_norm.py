"""Training-mode batch norm with the residual addition and the ReLU that follow it, differentiable.

Forward: one pass for the statistics (torch's own), one that normalises, adds and clips. Backward: one pass that masks
and sums, one that writes the gradients. torch on its own makes two and three more over the same tensors, and saves
nothing less: here as there the convolution's output and the ReLU's, which the next convolution saves anyway.

apex has the like in its groupbn extension (`bnp`), for half precision alone and built from source; it is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttht.kernels import bn_calls, bn_reference
from fasttht.kernels.registered import InPlaceOp, NewTensorOp, register


def _new_statistics(running_mean: Tensor, running_var: Tensor, x: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(running_mean), torch.empty_like(running_var)


# torch's own kernels under a name of ours: torch's name has no fake, so nothing could be counted or traced through it.
_statistics = register(
    "bn_statistics_",
    "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor x, float momentum) -> (Tensor, Tensor)",
    lambda running_mean, running_var, x, momentum: torch.batch_norm_update_stats(
        x, running_mean, running_var, momentum
    ),
    _new_statistics,
)

_forward = NewTensorOp(
    "bn_relu",
    "(Tensor x, Tensor? other, Tensor mean, Tensor invstd, Tensor weight, Tensor bias)",
    bn_calls.check_forward,
    bn_calls.plan_forward,
    bn_reference.bn_relu,
    lambda x, *_: torch.empty_like(x),
)

_sums = NewTensorOp(
    "bn_relu_sums",
    "(Tensor grad, Tensor out, Tensor x, Tensor mean)",
    bn_calls.check_sums,
    bn_calls.plan_sums,
    bn_reference.bn_relu_sums,
    lambda grad, out, x, mean: (mean.new_empty if x.numel() else mean.new_zeros)((2, len(mean))),
)

_grad = InPlaceOp(
    "bn_relu_grad_",
    "(Tensor(a!) dx, Tensor(b!)? dother, Tensor grad, Tensor out, Tensor x, Tensor mean, Tensor invstd, "
    "Tensor weight, Tensor sums)",
    bn_calls.check_grad,
    bn_calls.plan_grad,
    bn_reference.bn_relu_grad_,
)


def bn_relu(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float,
    eps: float,
) -> Tensor:
    """Return relu(batch_norm(x) + other) with the batch's own statistics; `other` may be None.

    Shapes: x, other (B, C, H, W); the others (C,). Mutates running_mean and running_var as nn.BatchNorm2d does, which
    keeps the unbiased variance. Differentiable, once, in x, other, weight and bias.

    Raises: ValueError for less than two values per channel, or operands that do not fit.
    """
    if x.numel() // x.shape[1] < 2:
        raise ValueError(f"bn_relu: expected at least two values per channel in training, got x {tuple(x.shape)}")
    found: Tensor = _BatchNormReLU.apply(x, other, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[no-untyped-call]
    return found


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        if x.is_cpu:
            # torch's own passes, as the unfused layers make them: nothing is gained on a CPU, and nothing lost.
            out, mean, invstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
            out = (out if other is None else out.add_(other)).relu_()
        else:
            out, mean, invstd = forward_by_ops(x, other, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, out, weight, mean, invstd)
        ctx.eps, ctx.added = eps, other is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, weight, mean, invstd = ctx.saved_tensors
        if x.is_cpu:
            dother = torch.ops.aten.threshold_backward(grad, out, 0)
            dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dother, x, weight, None, None, mean, invstd, True, ctx.eps, (True, True, True)
            )
            return dx, dother if ctx.added else None, dweight, dbias, None, None, None, None
        dx, dother, dweight, dbias = backward_by_ops(grad, out, x, mean, invstd, weight, added=ctx.added)
        return dx, dother, dweight, dbias, None, None, None, None


def forward_by_ops(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result and the batch's means and inverse deviations, in two passes; changes the running statistics."""
    mean, var = _statistics(running_mean, running_var, x, momentum)
    invstd = torch.rsqrt(var + eps)
    return _forward(x, other, mean, invstd, weight, bias), mean, invstd


def backward_by_ops(
    grad: Tensor, out: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *, added: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients with respect to x, other (None unless `added`), weight and bias, in two passes."""
    # Whatever made the gradient may have laid it out otherwise; the kernels want all alike.
    grad = grad.contiguous(memory_format=torch.channels_last)
    sums = _sums(grad, out, x, mean)
    dx, dother = torch.empty_like(x), torch.empty_like(x) if added else None
    _grad(dx, dother, grad, out, x, mean, invstd, weight, sums)
    return dx, dother, sums[1] * invstd, sums[0]
