"""What an attacker may do: the norm, radius, step size, number of steps and goal of an attack."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Threat:
    """A linf threat in [0, 1] pixels.

    eps is the radius, alpha the step size, steps the number of gradient steps (0: the random start alone).
    `targeted` descends on a random other class instead of ascending on the label. `clean_prob` is the share of
    batches that start from the clean image instead of noise: 0.2 while training the paper's recipe, 0 otherwise.

    Raises: ValueError where a number is outside its range.
    """

    eps: float
    alpha: float
    steps: int
    targeted: bool = False
    clean_prob: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ValueError(f"threat: expected eps in [0, 1], got {self.eps}; pixels are in [0, 1], so 16 is 16/255")
        if not (self.alpha >= 0 and self.steps >= 0):
            raise ValueError(f"threat: expected alpha and steps of at least 0, got {self.alpha} and {self.steps}")
        if not 0 <= self.clean_prob <= 1:
            raise ValueError(f"threat: expected clean_prob in [0, 1], got {self.clean_prob}")

    @property
    def name(self) -> str:
        """The name its accuracy is reported under, without `_top1`: `pgd10`, or `pgd10_targeted`."""
        return f"pgd{self.steps}_targeted" if self.targeted else f"pgd{self.steps}"
