"""Mixture batch normalisation: clean and adversarial images each with BN layers of their own (Xie & Yuille 2020).

Convolutions and heads are shared; running statistics and affine parameters are not. State-dict keys: where an ordinary
network has `trunk.bn1.weight`, this has `trunk.bn1.clean.weight` and `trunk.bn1.adversarial.weight`, and so on for
bias, running_mean, running_var and num_batches_tracked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Branch = Literal["clean", "adversarial", "split"]


class MixtureBatchNorm2d(nn.Module):
    """Two BatchNorm2d. Which of them an image goes through is said by `branch`, never guessed from the mode.

    `adversarial` (the default: attacks and evaluation) and `clean` take the whole batch through one; `split` takes the
    first half of concat[clean, adv] through the clean one and the second through the adversarial one. The batch is the
    one that this process sees at once, so halves never mix over ranks or micro-batches.

    norm: what makes each branch's layer; ghost BN then has its groups inside each half.

    Shapes: x (B, C, H, W), B even for `split`; returns the same.
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.clean = norm(channels)
        self.adversarial = norm(channels)
        self.branch: Branch = "adversarial"

    def forward(self, x: Tensor) -> Tensor:
        if self.branch == "split":
            half, odd = divmod(len(x), 2)
            if odd:
                raise ValueError(f"mixture BN: expected concat[clean, adv] of two equal halves, got {len(x)} images")
            return torch.cat([self.clean(x[:half]), self.adversarial(x[half:])])
        norm = self.clean if self.branch == "clean" else self.adversarial
        return norm(x)  # type: ignore[no-any-return]


@contextmanager
def through(model: nn.Module, branch: Branch) -> Iterator[None]:
    """Send images through one branch, or through both by halves, while inside; plain networks do as always."""
    layers = [module for module in model.modules() if isinstance(module, MixtureBatchNorm2d)]
    kept = [layer.branch for layer in layers]
    for layer in layers:
        layer.branch = branch
    try:
        yield
    finally:
        for layer, before in zip(layers, kept, strict=True):
            layer.branch = before


def has_mixture_bn(model: nn.Module) -> bool:
    """Return whether a network has a clean and an adversarial branch."""
    return any(isinstance(module, MixtureBatchNorm2d) for module in model.modules())


def norms(layer: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the BatchNorm2d layers that a normalisation layer consists of."""
    return [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
