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

from fasttht import kernels, signals
from fasttht.attacks import l2
from fasttht.attacks.losses import AttackLoss, cross_entropy
from fasttht.attacks.starts import draw_start, goal, levels
from fasttht.attacks.threat import Threat
from fasttht.regions import region

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

    def write_(self, counters: Tensor) -> None:
        """Write them to counters (3,) int64, without waiting for its device."""
        for place, word in zip(counters.unbind(), (self.seed, self.epoch, self.step), strict=True):
            place.fill_(kernels.int64(word))

    def counters(self, device: torch.device) -> Tensor:
        """Return them as a new tensor, (3,) int64."""
        counters = torch.empty(3, dtype=torch.int64, device=device)
        self.write_(counters)
        return counters


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
"""Images x (B, 3, H, W) and classes y to the gradient, like x, of the loss's sum over the batch: the cross entropy's.

y is (B,) int64, or class probabilities (B, C). Times any positive factor; one image's gradient does not depend on the
others.
"""


def input_gradient(
    logits: Callable[[Tensor], Tensor], loss_scale: float = 1.0, loss: AttackLoss = cross_entropy
) -> InputGradient:
    """Return the input gradient of a function from images to logits (B, C), by autograd.

    The function runs in whatever mode and autocast the caller has put it in; parameter gradients are not touched.
    """

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            with region("attack_forward"):
                value = loss(logits(leaf), y) * loss_scale
            with region("attack_backward"):
                (found,) = torch.autograd.grad(value, leaf)
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
    soft_target: Tensor | None = None,
    target: Tensor | None = None,
) -> Attacked:
    """Draw the target and the start, then run PGD; the last iterate is returned.

    Shapes: x (B, 3, H, W), y (B,), index (B,) int64. Draws depend on (draw, index) alone, so any split of a batch gives
    the same. x is float in [0, 1]; or uint8, and then the attack stays on the lattice of 8-bit images: integer offsets
    to start from, whole levels as steps, so every iterate is exact. With soft_target (B, C), class probabilities p, it
    moves away from those and not from y, and `threat.targeted` does not count: the gradient of the cross entropy to p
    is that of KL(p || q), so with p the clean prediction this is TRADES' attack. target (B,): the classes of a targeted
    threat in place of drawn ones.

    Raises: ValueError for a uint8 x and a threat of broken levels or of another norm than linf.
    """
    counters = draw.counters(x.device)
    wanted, threat = goal(y, index, threat, counters, num_classes=num_classes, soft_target=soft_target, target=target)
    start = draw_start(x, index, threat, counters)
    if x.dtype == torch.uint8:
        return pgd_lattice(gradient, x, wanted, threat, start)
    return (pgd_linf if threat.norm == "linf" else pgd_l2)(gradient, x, wanted, threat, start)


def pgd_linf(gradient: InputGradient, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> Attacked:
    """Run `threat.steps` signed gradient steps from `start`, each projected on the ball and on [0, 1].

    y is what to move away from, or, if the threat is targeted, the class to move to.
    """
    alpha = -threat.alpha if threat.targeted else threat.alpha
    x_adv = start.detach().clone(memory_format=torch.preserve_format)

    def step(grad: Tensor) -> None:
        kernels.pgd_linf_step_(x_adv, grad, x, eps=threat.eps, alpha=alpha)

    zero_grad, nan_grad = _run(threat.steps, lambda: gradient(x_adv, y), step, x.device)
    return Attacked(x_adv, zero_grad, nan_grad)


def pgd_l2(gradient: InputGradient, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> Attacked:
    """Run `threat.steps` steps of length alpha along the normalised gradient, each projected on the ball and [0, 1]."""
    units = l2.units(x, threat)
    radius, alpha = units * threat.eps, units * (-threat.alpha if threat.targeted else threat.alpha)
    x_adv = start.detach().clone(memory_format=torch.preserve_format)

    def step(grad: Tensor) -> None:
        l2.pgd_l2_step_(x_adv, grad, x, radius=radius, alpha=alpha)

    zero_grad, nan_grad = _run(threat.steps, lambda: gradient(x_adv, y), step, x.device)
    return Attacked(x_adv, zero_grad, nan_grad)


def pgd_lattice(gradient: InputGradient, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> Attacked:
    """Do as pgd_linf does on uint8 images x and start; x_adv comes back as float32 in [0, 1].

    Raises: ValueError for a threat of broken levels.
    """
    eps, alpha = levels(threat.eps), levels(threat.alpha)
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
        signals.check()  # an evaluation may be stopped here, a training step goes on
        with region("attack_gradient"):
            grad = gradient()
        if i == steps - 1:
            zero_grad, nan_grad = health(grad)
        with torch.no_grad(), region("attack_update"):
            step(grad)
    return zero_grad, nan_grad


def health(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of a gradient's elements that are exactly zero and that are NaN, both ()."""
    return (grad == 0).float().mean(), grad.isnan().float().mean()
