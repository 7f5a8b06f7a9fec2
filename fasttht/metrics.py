"""What is measured while training: sums on the device, a row of them now and then, and the clock beside it."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttht.distributed import SOLO, World


class Waits(Protocol):
    """A loader that knows how many seconds its consumer has waited for it."""

    @property
    def wait_s(self) -> float: ...


class Meter:
    """Sums since the last row, kept on the device and read once per row.

    Losses, correct predictions and images are sums over the images that were trained on (replays counted), the rest
    sums over optimizer steps; before_skip are those before the first skipped one. parts: summands of an objective that
    NAMES does not have.

    Of several ranks each holds the sums of its own images, and what is counted once a step stands on rank 0 alone, so
    that the plain sum over ranks is what one process would have.
    """

    NAMES = (
        "loss", "loss_cls", "loss_cl", "loss_kl", "loss_alp", "kl_tail", "correct", "images", "zero_grad",
        "nan_grad", "grad_norm", "skipped", "steps", "before_skip",
    )  # fmt: skip

    def __init__(self, device: torch.device, parts: tuple[str, ...] = (), *, world: World = SOLO) -> None:
        self._world = world
        self.names = (*self.NAMES, *(name for name in parts if name not in self.NAMES))
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def add(self, **values: Tensor | float) -> None:
        """Add to the named sums, in place."""
        unknown = values.keys() - set(self.names)
        assert not unknown, f"meter: expected names of {self.names}, got {sorted(unknown)}"
        row = [
            value.to(torch.float64) if isinstance(value, Tensor) else self.sums.new_full((), value)
            for value in (values.get(name, 0.0) for name in self.names)
        ]
        self.sums += torch.stack(row)
        if "skipped" in values:
            skipped, steps, before = (self.names.index(name) for name in ("skipped", "steps", "before_skip"))
            self.sums[before] += (self.sums[skipped] == 0) * row[steps]

    def once(self, **values: Tensor | float) -> None:
        """Add what all ranks know alike, on one of them."""
        if self._world.main:
            self.add(**values)

    def total(self) -> Tensor:
        """Return the sums over all ranks, on every rank; they stay as they are."""
        return self._world.sum_("metrics", self.sums.clone())

    def read(self) -> dict[str, float]:
        """Return the sums over all ranks, on every rank, and clear them. This waits for the device."""
        values = dict(zip(self.names, self.total().tolist(), strict=True))
        self.sums.zero_()
        return values


def means(sums: dict[str, float], *, attacked: bool, parts: tuple[str, ...]) -> dict[str, float]:
    """Turn a meter's sums into the figures of a row: losses per image, shares in percent, norms per step.

    parts names the losses that the objective has beside loss_cls. A KL brings `kl_tail_pct`: the share of it that
    comes from classes with p(x) below 0.01, by Eq. 4's own terms, which have either sign.
    """
    images, steps = max(sums["images"], 1), max(sums["steps"], 1)
    row = {name: sums[name] / images for name in ("loss", "loss_cls", *parts)}
    if "loss_kl" in parts:
        row["kl_tail_pct"] = 100 * sums["kl_tail"] / sums["loss_kl"] if sums["loss_kl"] else 0.0
    row["adv_top1" if attacked else "clean_top1"] = 100 * sums["correct"] / images
    row["grad_norm"] = sums["grad_norm"] / steps
    row |= {f"{name}_pct": 100 * sums[name] / steps for name in ("zero_grad", "nan_grad")}
    row["skipped_steps"] = int(sums["skipped"])
    return row


def figures(row: dict[str, Any], timing: dict[str, float]) -> dict[str, str]:
    """Return the few figures that people watch, as text."""
    shown = {"loss": f"{row['loss']:.3f}", "cls": f"{row['loss_cls']:.3f}"}
    for name, value in row.items():
        if name.startswith("loss_") and name not in ("loss_cls", "loss_scale"):
            shown[name.removeprefix("loss_")] = f"{value:.3f}"
    name = "adv" if "adv_top1" in row else "clean"
    shown[f"{name} top-1"] = f"{row[f'{name}_top1']:.1f}%"
    return shown | {"img/s": f"{timing['img_per_s']:.0f}", "wait": f"{timing['data_wait_pct']:.0f}%"}


class Clock:
    """Images per second and the share of time spent waiting for data, since the last row."""

    def __init__(self, loader: Waits) -> None:
        self.loader = loader
        self.restart()

    def restart(self) -> None:
        """Start again from now: what came before, an evaluation for instance, is not counted."""
        self._start, self._wait_s = time.perf_counter(), self.loader.wait_s

    def row(self, images: float) -> dict[str, float]:
        """Return the figures since the last row (img_per_s, data_wait_pct, seconds) and start again."""
        seconds = time.perf_counter() - self._start
        waited = self.loader.wait_s - self._wait_s
        self.restart()
        return {
            "img_per_s": round(images / seconds, 1),
            "data_wait_pct": round(100 * waited / seconds, 1),
            "seconds": round(seconds, 3),
        }
