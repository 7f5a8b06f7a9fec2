"""K-step projected gradient descent (THAT, Eq. 7; Madry et al.): a pure function of the network and the images.

It reads input gradients only: parameter gradients and the global RNG are as they were when it returns, also if it
raises. Inside `evaluating`, so are BN buffers and the modules' modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.threat import Threat

# The loss is multiplied by this power of two where activations are float16: with the sum (not the mean) over the
# batch it keeps input gradients above float16's smallest subnormal, below which sign(0) = 0 stops the attack
# silently. The sign of the gradient does not depend on it.
FP16_LOSS_SCALE = 2.0**8


@dataclass(frozen=True)
class Draw:
    """The counters that key every random number of a step, beside the dataset row."""

    seed: int
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Attacked:
    """The result of an attack: images, and how healthy the last gradient was.

    x_adv (B, 3, H, W); zero_grad and nan_grad are () tensors, the share of input-gradient elements that were
    exactly zero or NaN at the last step (both 0 when no step was taken).
    """

    x_adv: Tensor
    zero_grad: Tensor
    nan_grad: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode and bring each back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


InputGradient = Callable[[Tensor, Tensor], Tensor]
"""Images x (B, 3, H, W) and classes y (B,) to the gradient, like x, of the cross entropy's sum over the batch.

Times any positive factor; one image's gradient does not depend on the others.
"""


def input_gradient(logits: Callable[[Tensor], Tensor], loss_scale: float = 1.0) -> InputGradient:
    """Return the input gradient of a function from images to logits (B, C), by autograd.

    The function runs in whatever mode and autocast the caller has put it in; parameter gradients are not touched.
    """

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            loss = F.cross_entropy(logits(leaf), y, reduction="sum") * loss_scale
            (found,) = torch.autograd.grad(loss, leaf)
        return found

    return gradient


def attack(
    gradient: InputGradient,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    threat: Threat,
    draw: Draw,
    *,
    num_classes: int,
) -> Attacked:
    """Draw the target and the start, then run PGD; the last iterate is returned.

    Shapes: x (B, 3, H, W), y (B,), index (B,) int64. Draws depend on (draw, index) alone, so any split of a batch gives
    the same. x is float in [0, 1]; or uint8, and then the attack stays on the lattice of 8-bit images: integer offsets
    to start from, whole levels as steps, so every iterate is exact.

    Raises: ValueError for a uint8 x and a threat of broken levels.
    """
    counters = {"seed": draw.seed, "epoch": draw.epoch, "step": draw.step}
    if threat.targeted:
        y = kernels.draw_target(y, index, num_classes, **counters)
    if x.dtype == torch.uint8:
        levels = _levels(threat.eps)
        start = kernels.draw_lattice_start(x, index, eps=levels, clean_prob=threat.clean_prob, **counters)
        return pgd_lattice(gradient, x, y, threat, start)
    start = kernels.draw_start(x, index, eps=threat.eps, clean_prob=threat.clean_prob, **counters)
    return pgd_linf(gradient, x, y, threat, start)


def pgd_linf(gradient: InputGradient, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> Attacked:
    """Run `threat.steps` signed gradient steps from `start`, each projected on the ball and on [0, 1].

    y is the label to move away from, or, if the threat is targeted, the class to move to.
    """
    alpha = -threat.alpha if threat.targeted else threat.alpha
    x_adv = start.detach().clone(memory_format=torch.preserve_format)

    def step(grad: Tensor) -> None:
        kernels.pgd_linf_step_(x_adv, grad, x, eps=threat.eps, alpha=alpha)

    zero_grad, nan_grad = _run(threat.steps, lambda: gradient(x_adv, y), step, x.device)
    return Attacked(x_adv, zero_grad, nan_grad)


def pgd_lattice(gradient: InputGradient, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> Attacked:
    """Do as pgd_linf does on uint8 images x and start; x_adv comes back as float32 in [0, 1].

    Raises: ValueError for a threat of broken levels.
    """
    eps, alpha = _levels(threat.eps), _levels(threat.alpha)
    state = start.detach().clone(memory_format=torch.preserve_format)

    def step(grad: Tensor) -> None:
        kernels.pgd_lattice_step_(state, grad, x, eps=eps, alpha=-alpha if threat.targeted else alpha)

    zero_grad, nan_grad = _run(threat.steps, lambda: gradient(kernels.u8_to_input(state), y), step, x.device)
    return Attacked(kernels.u8_to_input(state), zero_grad, nan_grad)


def _run(
    steps: int, gradient: Callable[[], Tensor], step: Callable[[Tensor], None], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Take steps; return the shares of zero and of NaN elements in the last gradient."""
    zero_grad = nan_grad = torch.zeros((), device=device)
    for i in range(steps):
        grad = gradient()
        if i == steps - 1:
            zero_grad, nan_grad = (grad == 0).float().mean(), grad.isnan().float().mean()
        with torch.no_grad():
            step(grad)
    return zero_grad, nan_grad


def _levels(length: float) -> int:
    levels = round(255 * length)
    if abs(255 * length - levels) > 1e-6:
        raise ValueError(f"lattice attack: expected eps and alpha of whole 255ths, got {255 * length:g}/255")
    return levels
