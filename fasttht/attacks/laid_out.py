"""The attack in the network's own input: each step updates the images and writes what the first convolution reads.

Between two gradients there is one kernel: no gradient is brought back to pixels, and no image is normalised, rounded
or laid out beside it. The images found are those of `pgd.attack`, which stays the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks import l2
from fasttht.attacks.pgd import Attacked, health
from fasttht.attacks.starts import draw_start, goal, levels
from fasttht.attacks.threat import Threat
from fasttht.regions import region


class LaidOut(Protocol):
    """A network that takes normalised images in a layout of its own. mean, std: per channel; dtype: of its input."""

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def layout(self, x: Tensor) -> kernels.Layout:
        """Return how images x (B, 3, H, W) are laid out."""
        ...

    def gradient(self, pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        """Return what an `InputGradient` does, with respect to the network's own input and laid out like it."""
        ...


def attack_laid_out(
    network: LaidOut,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    threat: Threat,
    counters: Tensor,
    *,
    num_classes: int,
    soft_target: Tensor | None = None,
) -> Attacked:
    """Do what `pgd.attack` does; x_adv is channels-last. Waits for nothing, and can be captured.

    Shapes: as there; counters (3,) int64 (seed, epoch, step) on the device of x.
    """
    x = x.detach().contiguous(memory_format=torch.channels_last)
    wanted, threat = goal(y, index, threat, counters, num_classes=num_classes, soft_target=soft_target)
    with torch.no_grad():
        state = draw_start(x, index, threat, counters)
        layout = network.layout(x)
        pixels = kernels.empty_model_input(x, network.dtype, layout)
        kernels.model_input_(pixels, state, mean=network.mean, std=network.std, layout=layout)
        step = _step(network, threat, x, state, pixels, layout)
    zero_grad = nan_grad = torch.zeros((), device=x.device)
    for i in range(threat.steps):
        with region("attack_gradient"):
            grad = network.gradient(pixels, wanted, layout)
        with torch.no_grad(), region("attack_update"):
            if i == threat.steps - 1:
                zero_grad, nan_grad = health(kernels.image_grad(grad, layout))
            step(grad.contiguous(memory_format=torch.channels_last))
    return Attacked(kernels.u8_to_input(state) if state.dtype == torch.uint8 else state, zero_grad, nan_grad)


def _step(
    network: LaidOut, threat: Threat, x: Tensor, state: Tensor, pixels: Tensor, layout: kernels.Layout
) -> Callable[[Tensor], None]:
    """Return what takes a gradient like `pixels`, moves `state` along it and rewrites `pixels`."""
    alpha = -threat.alpha if threat.targeted else threat.alpha
    mean, std = network.mean, network.std
    if state.dtype == torch.uint8:
        eps, level = levels(threat.eps), levels(alpha)
        return lambda grad: kernels.pgd_lattice_step_input_(
            state, pixels, grad, x, eps=eps, alpha=level, mean=mean, std=std, layout=layout
        )
    if threat.norm == "linf":
        return lambda grad: kernels.pgd_linf_step_input_(
            state, pixels, grad, x, eps=threat.eps, alpha=alpha, mean=mean, std=std, layout=layout
        )
    units = l2.units(x, threat)
    radii, lengths, deviations = units * threat.eps, units * alpha, kernels.per_channel(std, state)

    def l2_step(grad: Tensor) -> None:
        in_pixels = kernels.image_grad(grad, layout).to(state.dtype) / deviations  # here the sign is not enough
        l2.pgd_l2_step_(state, in_pixels, x, radius=radii, alpha=lengths)
        kernels.model_input_(pixels, state, mean=mean, std=std, layout=layout)

    return l2_step
