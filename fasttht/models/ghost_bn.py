"""Ghost batch normalisation: groups of a batch normalised apart, as if each group were on a GPU of its own.

How many images share BN statistics changes what is learnt: the paper has 128 on each GPU, Xie et al. 32. With this,
fewer and larger GPUs, or larger micro-batches, train the same network. Only where statistics are a batch's own: in
evaluation mode, folded into convolutions or saved, such a layer is an ordinary BatchNorm2d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training-mode statistics are those of each `group_size` consecutive images.

    A last group is smaller where the batch does not divide; of one image it joins the group before it, since one value
    has no variance. With at most `group_size` images it is BatchNorm2d, bit for bit.

    The running statistics take one step of the momentum per forward, towards the groups' mean and unbiased variance,
    averaged with the groups' sizes as weights: what the mean over as many GPUs' running statistics would be.

    `views`: consecutive images that are one image of the data set; `paired` says 2 for clean and adversarial.

    Shapes: x (B, C, H, W); returns the same. Mutates the running statistics, in training mode only.
    """

    def __init__(self, channels: int, *, group_size: int) -> None:
        super().__init__(channels)
        if group_size < 2:
            raise ValueError(f"ghost BN: expected groups of at least 2 images, got {group_size}")
        self.group_size = group_size
        self.views = 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        sizes = group_sizes(len(x), self.group_size * self.views)
        mean, var = self.running_mean, self.running_var
        if len(sizes) == 1 or not (self.training or mean is None):
            return super().forward(x)
        self._check_input_dim(x)
        if mean is None or var is None or not self.training:  # statistics of this batch, not to be remembered
            return torch.cat([self._normalized(part, None, None, 0.0) for part in torch.split(x, sizes)])
        assert self.momentum is not None, "a constant one"
        assert self.num_batches_tracked is not None, "it keeps statistics"
        # With a momentum of 1 each group leaves its own statistics in its row.
        means, variances = mean.new_zeros(len(sizes), len(mean)), var.new_zeros(len(sizes), len(var))
        groups = zip(torch.split(x, sizes), means.unbind(), variances.unbind(), strict=True)
        out = torch.cat([self._normalized(part, own_mean, own_var, 1.0) for part, own_mean, own_var in groups])
        with torch.no_grad():
            for running, found in ((mean, means), (var, variances)):  # all groups but the last are of one size
                average = (found[:-1].sum(dim=0) * sizes[0] + found[-1] * sizes[-1]) / len(x)
                running.lerp_(average, self.momentum)
            self.num_batches_tracked.add_(1)
        return out

    def _normalized(self, x: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)


def group_sizes(rows: int, size: int) -> list[int]:
    """Return how many of `rows` consecutive images each group has."""
    whole, rest = divmod(rows, size)
    if rest == 1 and whole:
        return [size] * (whole - 1) + [size + 1]
    return [size] * whole + [rest] * (rest > 0 or not whole)


def group_size_of(model: nn.Module) -> int:
    """Return the group size of a network's ghost BN, 0 if it has none."""
    return next((layer.group_size for layer in model.modules() if isinstance(layer, GhostBatchNorm2d)), 0)


@contextmanager
def paired(model: nn.Module) -> Iterator[None]:
    """While inside, a group has two views of each of its images, one behind the other as `interleave` orders them."""
    layers = [layer for layer in model.modules() if isinstance(layer, GhostBatchNorm2d)]
    for layer in layers:
        layer.views = 2
    try:
        yield
    finally:
        for layer in layers:
            layer.views = 1


def interleave(x: Tensor, other: Tensor, size: int) -> Tensor:
    """Return two views of the same images group by group: `size` of x, their others, and so on. (2 B, ...)."""
    return torch.cat(
        [part for pair in zip(torch.split(x, size), torch.split(other, size), strict=True) for part in pair]
    )


def separate(both: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return what `interleave` was given."""
    whole, rest = divmod(len(both) // 2, size)
    parts = torch.split(both, [length for length in [size] * whole + [rest] * (rest > 0) for _ in range(2)])
    return torch.cat(parts[0::2]), torch.cat(parts[1::2])
