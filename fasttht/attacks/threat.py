"""What an attacker may do: the norm, radius, step size, number of steps and goal of an attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Norm = Literal["linf", "l2", "l2-relative"]
Start = Literal["uniform", "gaussian", "clean"]
Loss = Literal["ce", "margin", "dlr"]
Target = Literal["random", "least-likely"]

# What a norm adds to the name of an attack.
_NAMES: dict[Norm, str] = {"linf": "", "l2": "_l2", "l2-relative": "_l2_relative"}


@dataclass(frozen=True, kw_only=True)
class Threat:
    """A threat in [0, 1] pixels.

    eps is the radius, alpha the step size, steps the number of gradient steps (0: the random start alone).
    `targeted` descends on a random other class instead of ascending on the label. `clean_prob` is the share of
    batches that start from the clean image instead of noise: 0.2 while training the paper's recipe, 0 otherwise.
    norm: `l2-relative` measures eps and alpha in each image's own ||x||_2 (the paper's Table 4).
    start: `uniform` in the ball; `gaussian`, x + start_std N(0, 1), projected on the ball (TRADES; there without the
    projection, which its first step makes good); `clean`, x itself.
    loss: what the gradient is of, see attacks/losses.py; it is in the name, and whoever makes the gradient reads it.
    target: the class that a targeted attack moves to: `random`, drawn; `least-likely`, given to the attack.
    named_eps: the radius is part of the name, as in a sweep.

    Raises: ValueError where a number is outside its range.
    """

    eps: float
    alpha: float
    steps: int
    targeted: bool = False
    clean_prob: float = 0.0
    norm: Norm = "linf"
    start: Start = "uniform"
    start_std: float = 0.001
    loss: Loss = "ce"
    target: Target = "random"
    named_eps: bool = False

    def __post_init__(self) -> None:
        if self.norm == "linf" and not 0 <= self.eps <= 1:
            raise ValueError(f"threat: expected eps in [0, 1], got {self.eps}; pixels are in [0, 1], so 16 is 16/255")
        if not (self.eps >= 0 and math.isfinite(self.eps)):
            raise ValueError(f"threat: expected a finite eps of at least 0, got {self.eps}")
        if not (self.alpha >= 0 and self.steps >= 0):
            raise ValueError(f"threat: expected alpha and steps of at least 0, got {self.alpha} and {self.steps}")
        if not 0 <= self.clean_prob <= 1:
            raise ValueError(f"threat: expected clean_prob in [0, 1], got {self.clean_prob}")
        if not (self.start_std >= 0 and math.isfinite(self.start_std)):
            raise ValueError(f"threat: expected a finite start_std of at least 0, got {self.start_std}")

    @property
    def name(self) -> str:
        """The name its accuracy is reported under, without `_top1`.

        `pgd10`, `pgd10_l2`, `pgd10_targeted` (a random class), `pgd10_least_likely`, `pgd10_margin`, `pgd10_eps0.0625`.
        """
        goal = f"_{'targeted' if self.target == 'random' else 'least_likely'}" if self.targeted else ""
        loss = "" if self.loss == "ce" else f"_{self.loss}"
        radius = f"_eps{self.eps:.5g}" if self.named_eps else ""
        return f"pgd{self.steps}{_NAMES[self.norm]}{goal}{loss}{radius}"
