"""The loss around one held-out image (Figure 6): on the plane of its adversarial and a random direction, and of two
random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.pgd import evaluating, input_gradient
from fasttht.errors import UsageError
from fasttht.precision import full_precision
from fasttht.subject import Subject, images

Grid = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Surface:
    """Cross entropy to the label at clip(x + a d1 + b d2, 0, 1).

    offsets: (P,) values of a and of b, from -eps to eps in pixels. adversarial: (P, P), b by row and a by column, where
    d1 is the sign of the input gradient at x and d2 a Rademacher direction; random: the same d2 and another one.
    Where both offsets are large the image has left the ball, as in the paper: the plane is the square around it.
    """

    row: int
    label: int
    predicted: int
    offsets: Grid
    adversarial: Grid
    random: Grid

    def data(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "row": self.row, "label": self.label, "predicted": self.predicted, "offsets": self.offsets.tolist(),
            "adversarial": self.adversarial.tolist(), "random": self.random.tolist(),
        }  # fmt: skip


def check_rows(flag: str, rows: list[int], total: int) -> Tensor:
    """Return rows of the held-out split as a tensor, (N,) int64.

    Raises: UsageError for one outside of it.
    """
    outside = [row for row in rows if not 0 <= row < total]
    if outside:
        raise UsageError(f"{flag}: expected rows of the held-out images, 0 to {total - 1}, got {outside[0]}")
    return torch.tensor(rows)


def surface(subject: Subject, row: int, *, eps: float, points: int, flag: str = "--image") -> Surface:
    """Measure the loss on a grid of points x points around a held-out image.

    The random directions depend on the run's seed, the row and the image's shape alone.

    Raises: UsageError for a row outside the data.
    """
    (batch,) = images(subject, "val", check_rows(flag, [row], len(subject.splits.val)))
    x, model = kernels.u8_to_input(batch.x), subject.model
    generator = torch.Generator().manual_seed(subject.config.run.seed * 1_000_003 + row)
    first, second = (
        (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x.device, x.dtype) for _ in range(2)
    )
    offsets = torch.linspace(-eps, eps, points, dtype=x.dtype, device=x.device)
    with evaluating(model), full_precision():
        uphill = input_gradient(model.logits)(x, batch.y).sign()
        with torch.no_grad():
            predicted = int(model.logits(x).argmax())
            grids = [_grid(subject, x, batch.y, across, first, offsets) for across in (uphill, second)]
    return Surface(row, int(batch.y), predicted, offsets.double().cpu().numpy(), *grids)


def _grid(subject: Subject, x: Tensor, y: Tensor, across: Tensor, up: Tensor, offsets: Tensor) -> Grid:
    """Return the loss at x + a across + b up, (P, P): b by row, a by column."""
    num = len(offsets)
    a, b = offsets.repeat(num), offsets.repeat_interleave(num)
    losses = []
    size = subject.config.evaluation.eval_batch_size
    for start in range(0, num * num, size):
        aside, above = (part[start : start + size].view(-1, 1, 1, 1) for part in (a, b))
        logits = subject.model.logits((x + aside * across + above * up).clamp(0, 1))
        losses.append(F.cross_entropy(logits, y.expand(len(logits)), reduction="none"))
    return torch.cat(losses).view(num, num).double().cpu().numpy()
