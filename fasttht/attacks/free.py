"""Free adversarial training: a perturbation that lives across minibatches and epochs (Shafahi et al. 2019).

One backward serves the weights and delta, so this is the stated exception to the attack being a pure function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.distributed import SOLO, World
from fasttht.regions import region


class FreeDelta:
    """One perturbation per position of the global batch, never re-randomised.

    Shapes: value (batch_size, 3, H, W) float, channels-last, within +-eps. A short last batch uses its first rows. Of
    several ranks each holds the rows of its slice of a full batch; shape is that of the global batch.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        world: World = SOLO,
    ) -> None:
        self.shape, self._world = shape, world
        own = torch.zeros((world.counts(shape[0])[world.rank], *shape[1:]), device=device, dtype=dtype)
        self.value = own.contiguous(memory_format=torch.channels_last)

    @contextmanager
    def serving(self, total: int) -> Iterator[None]:
        """Hold, while inside, the rows of this rank's slice of a global batch of `total` images.

        Ranks cut a short batch anew, so its rows are others than those of their slice of a full one: they change hands
        before and after, which takes memory for one global batch. A full batch, and one process, need none of it.
        """
        world, size = self._world, self.shape[0]
        if world.size == 1 or total == size:
            yield
            return
        full = [world.rows(size, rank) for rank in range(world.size)]
        counts = [min(rows.stop, total) - min(rows.start, total) for rows in full]
        held, start, count = self.value, full[world.rank].start, counts[world.rank]
        whole = world.gather_rows("delta", held[:count], counts)
        self.value = whole[world.rows(total)].contiguous(memory_format=torch.channels_last)
        try:
            yield
            whole = world.gather_rows("delta", self.value, world.counts(total))
            held[:count] = whole[start : start + count]
        finally:
            self.value = held

    def collect(self) -> Tensor | None:
        """Return the rows of all ranks in global order, on rank 0; None elsewhere. One process: its own tensor."""
        if self._world.size == 1:
            return self.value
        return self._world.collect_rows("delta", self.value, self._world.counts(self.shape[0]))

    def take_(self, whole: Tensor) -> None:
        """Copy this rank's rows from those of all ranks, which any number of them may have written."""
        self.value.copy_(whole[self._world.rows(self.shape[0])])

    def leaf(self, rows: slice) -> Tensor:
        """Return a copy of some rows that collects a gradient."""
        return self.value[rows].clone(memory_format=torch.channels_last).requires_grad_(True)

    @region("attack_update")
    def step_(self, rows: slice, grad: Tensor, skip: Tensor, *, eps: float, alpha: float) -> None:
        """Ascend some rows along their gradient and clip to +-eps, in place; skip is () and 1 leaves them."""
        kernels.free_delta_step_(self.value[rows], grad, skip, eps=eps, alpha=alpha)


def perturbed(x: Tensor, leaf: Tensor) -> Tensor:
    """Return clip(x + delta, 0, 1), differentiable in delta.

    The clip is inside the graph: where a pixel leaves [0, 1] its gradient is zero, and its delta stays.
    """
    return (x + leaf).clamp(0, 1)
