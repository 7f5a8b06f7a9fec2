"""Free adversarial training: a perturbation that lives across minibatches and epochs (Shafahi et al. 2019).

One backward serves the weights and delta, so this is the stated exception to the attack being a pure function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.regions import region


class FreeDelta:
    """One perturbation per position of the global batch, never re-randomised.

    Shapes: value (batch_size, 3, H, W) float, channels-last, within +-eps. A short last batch uses its first rows.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, device: torch.device | str, dtype: torch.dtype) -> None:
        self.value = torch.zeros(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

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
