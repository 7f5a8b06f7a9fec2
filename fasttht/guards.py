"""What ends a run before it trains on nothing: losses and gradients that are not finite."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fasttht.errors import NonFiniteError

# A storm: of the last so many updates, counted in whole rows of metrics, half were skipped. A loss scaler that looks
# for its scale skips fewer: from 65536 it has reached 2^-34 after 50, and no scale is going to help. Once it has found
# it, it skips one in 2,000.
_WINDOW = 100


class FiniteGuard:
    """Looks at every row's sums; a non-finite gradient itself never reaches the weights (state.guarded_update_).

    rows: updates taken and skipped in each of the newest rows that the window covers. They are in the checkpoint, else
    a run that is stopped often enough would never see a storm.
    """

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def check(
        self,
        step: int,
        loss: float,
        sums: dict[str, float],
        scale: float,
        dtype: torch.dtype,
        kept: list[Path],
        *,
        updates: int = 1,
    ) -> None:
        """Judge the steps since the last row. In float16 the scaler may skip steps; elsewhere none is skipped in peace.

        kept: the run's checkpoints, of which the message names the newest. updates: how many a step has.

        Raises: NonFiniteError for a loss that is not finite, a skipped update outside of float16, or a storm of them in
        it.
        """
        skipped = int(sums["skipped"])
        where = f"{kept[-1]} is kept; " if kept else "no checkpoint was written yet; "
        event = step
        if skipped and dtype != torch.float16:  # there, an earlier one may have been the scaler's
            event -= int(sums["steps"] - 1 - sums["before_skip"]) // updates
        if not math.isfinite(loss) or (skipped and dtype != torch.float16):
            raise NonFiniteError(
                f"step {event}: expected a finite loss and gradient, got loss {loss:g} and {skipped} steps with a "
                f"non-finite gradient up to step {step}; {where}"
                + ("lower --lr" if dtype == torch.float32 else "lower --lr, or try --amp-dtype bf16 or fp32")
            )
        self.rows.append([int(sums["steps"]), skipped])
        while sum(steps for steps, _ in self.rows[1:]) >= _WINDOW:
            del self.rows[0]
        steps, skipped = (sum(counts) for counts in zip(*self.rows, strict=True))
        if 2 * skipped >= max(steps, _WINDOW):
            found = f"{skipped} steps in a row" if skipped == steps else f"{skipped} of the last {steps} steps"
            raise NonFiniteError(
                f"step {step}: expected a finite gradient, got {found} without one, at a loss scale of {scale:g}; "
                f"{where}lower --lr, or try --amp-dtype bf16 or fp32"
            )
