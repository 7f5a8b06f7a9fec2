"""What changes in the course of a run: the learning rate with the updates taken, the image size with the passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LearningRate(Protocol):
    """Any schedule: the () float64 rate of the next update, given the () count of those taken."""

    def at(self, updates: Tensor) -> Tensor: ...


class Schedule:
    """Linear warm-up, then a drop by `rate` at each milestone.

    Counted in updates, not in steps: an update that the loss scaler skipped does not advance it. The count lives
    on the device, so the rate is a device computation and costs no sync.
    """

    def __init__(
        self,
        lr: float,
        *,
        warmup_updates: int = 0,
        warmup_lr: float = 0.0,
        milestones: list[int],
        rate: float = 0.1,
    ) -> None:
        self.lr = lr
        self.warmup_updates = warmup_updates
        self.warmup_lr = warmup_lr
        self.milestones = milestones
        self.rate = rate

    def at(self, updates: Tensor) -> Tensor:
        """Return the () float64 learning rate of the next update, given the () count of those taken."""
        done = updates.to(torch.float64)
        lr = torch.full_like(done, self.lr)
        if self.warmup_updates:
            share = ((done + 1) / self.warmup_updates).clamp(max=1)
            lr = self.warmup_lr + (self.lr - self.warmup_lr) * share
        drops = torch.zeros_like(done)
        for milestone in self.milestones:
            drops = drops + (updates >= milestone)
        return lr * self.rate**drops


class CosineSchedule:
    """From `lr` to 0 along half a cosine, over `total` updates; counted as Schedule counts them.

    MoCo moves along the same curve once per epoch; here every update has its own point of it.
    """

    def __init__(self, lr: float, *, total: int) -> None:
        self.lr = lr
        self.total = total

    def at(self, updates: Tensor) -> Tensor:
        """Return the () float64 learning rate of the next update, given the () count of those taken."""
        share = (updates.to(torch.float64) / self.total).clamp(max=1)
        return self.lr * 0.5 * (1 + torch.cos(math.pi * share))


@dataclass(frozen=True)
class ProgressiveSize:
    """The side of the training images in each pass: `first` up to pass `begin`, `full` from pass `end`.

    Between them it grows in a line, rounded to multiples of 32 where `full` is 128 or more and to multiples of 4 below
    (the strides of the trunk with the `imagenet` and most of the `small` stem); never outside first .. full, which are
    taken as they are. Passes are counted from 0.
    """

    first: int
    full: int
    begin: int
    end: int

    def __call__(self, epoch: int) -> int:
        """Return the side of the images of a pass."""
        if epoch >= self.end:
            return self.full
        if epoch <= self.begin:
            return self.first
        step = 32 if self.full >= 128 else 4
        exact = self.first + (self.full - self.first) * (epoch - self.begin) / (self.end - self.begin)
        return min(max(math.floor(exact / step + 0.5) * step, self.first), self.full)
