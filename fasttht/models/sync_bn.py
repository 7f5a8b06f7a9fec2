"""Batch normalisation with the statistics of all ranks: what one process would compute on the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm

from fasttht.distributed import World

STATISTICS = "BN batch statistics"


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training-mode statistics are those of the images of all ranks, however many each has.

    On CUDA torch's own kernels compute it; torch has none for the CPU, where it is written out below. In evaluation
    mode it is BatchNorm2d, and exchanges nothing.

    Shapes: x (B, C, H, W); returns the same. Mutates the running statistics, in training mode only.
    """

    def __init__(self, like: nn.BatchNorm2d, world: World) -> None:
        super().__init__(like.num_features, like.eps, like.momentum)
        self.to(like.weight.device, like.weight.dtype)
        self.load_state_dict(like.state_dict())
        self.train(like.training)
        self.world = world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None:
            return super().forward(x)
        self._check_input_dim(x)
        assert self.num_batches_tracked is not None, "it keeps statistics"
        assert self.momentum is not None, "a constant one"
        self.num_batches_tracked.add_(1)
        if x.is_cuda:
            return _Fused.apply(  # type: ignore[no-any-return, no-untyped-call]
                x.contiguous(memory_format=torch.channels_last), self.weight, self.bias, self.running_mean,
                self.running_var, self.eps, self.momentum, dist.group.WORLD, self.world.size, self.world,
            )  # fmt: skip
        out, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps, self.world)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert self.running_var is not None, "it keeps statistics"
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        return out  # type: ignore[no-any-return]


class _Fused(SyncBatchNorm):
    """torch's own for CUDA, whose exchanges, one each way, say what is waited for and who is missing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.world = inputs[-1]
        ctx.world.calls[STATISTICS] += 1
        with ctx.world.exchange(STATISTICS):
            return SyncBatchNorm.forward(ctx, *inputs[:-1])  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.world.calls[STATISTICS] += 1
        with ctx.world.exchange(STATISTICS):
            return *SyncBatchNorm.backward(ctx, *grads), None  # type: ignore[no-untyped-call]


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with mean and var over all ranks; one exchange each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        own_var, own_mean = torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0)
        own = torch.cat([own_mean, own_var, own_mean.new_full((1,), x.numel() // x.shape[1])])
        rows = world.gather_rows(STATISTICS, own[None], [1] * world.size)
        means, variances = rows[:, :-1].chunk(2, dim=1)
        count = rows[:, -1].sum()
        shares = rows[:, -1:] / count
        mean = (shares * means).sum(dim=0)
        # Around the common mean: a difference of squares would lose digits.
        var = (shares * (variances + (means - mean).square())).sum(dim=0)
        out = F.batch_norm(x, mean, var, weight.to(wide), bias.to(wide), False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.world = eps, world
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        scale = (var + ctx.eps).rsqrt()
        normal = (x - mean.view(shape)) * scale.view(shape)
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = (grad * normal).sum(dim=(0, 2, 3))
        sums = ctx.world.sum_(STATISTICS, torch.cat([grad_bias, grad_weight]))
        mean_grad, mean_product = (sums / count).chunk(2)
        centred = grad - mean_grad.view(shape) - normal * mean_product.view(shape)
        grad_x = (centred * (weight * scale).view(shape)).to(x.dtype)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def synchronise_(model: nn.Module, world: World) -> int:
    """Exchange every plain BatchNorm2d of a network for a SyncBatchNorm2d, in place; return how many there are."""
    number = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, SyncBatchNorm2d(child, world))
                number += 1
    return number
