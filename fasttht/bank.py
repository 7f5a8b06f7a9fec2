"""The memory bank: a ring of clean features that Eq. 5 takes its negatives from.

Feature number k (counted from 0 over the whole run) sits in slot k mod size until feature k + size replaces it.
`ptr` is the next slot to be written; a slot whose index is -1 has never been written. Any bank size, any batch
size: a batch that does not divide the ring wraps, one larger than the ring leaves its last `size` rows.
All state is on the device and no method syncs with the host, so that a train step can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels

EMPTY = -1


class FeatureBank:
    """A ring buffer of `size` unit-norm features and the dataset rows they came from.

    Shapes: features (size, feat_dim) float; index (size,) int64, -1 where empty; ptr () int64.
    Only the train step writes it, once per global batch.
    """

    def __init__(
        self,
        size: int,
        feat_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if size < 1:
            raise ValueError(f"bank: expected a size of at least 1, got {size}; size 0 means no bank at all")
        self.features = torch.zeros(size, feat_dim, device=device, dtype=dtype)
        self.index = torch.full((size,), EMPTY, dtype=torch.int64, device=device)
        self.ptr = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def enqueue(self, feat_clean: Tensor, index: Tensor) -> None:
        """Normalise and append a batch of clean features, overwriting the oldest.

        Shapes: feat_clean (B, feat_dim), index (B,) dataset rows. Mutates the bank only.
        """
        if feat_clean.ndim != 2 or feat_clean.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"bank: expected feat_clean of shape (B, {self.features.shape[1]}), got {tuple(feat_clean.shape)}; "
                "pass the projected feature, not the trunk output"
            )
        if index.shape != feat_clean.shape[:1]:
            raise ValueError(f"bank: expected {len(feat_clean)} indices, one per feature, got {tuple(index.shape)}")
        unit = F.normalize(feat_clean.to(self.features.dtype), dim=1)
        kernels.bank_write_(self.features, self.index, self.ptr, unit, index)

    def mask(self, index: Tensor, *, mask_same_index: bool = True) -> Tensor:
        """Return which slots are negatives for each anchor, (B, size) bool.

        Empty slots never are; slots holding the anchor's own image are not if `mask_same_index`.
        """
        filled = self.index != EMPTY
        if not mask_same_index:
            return filled.expand(len(index), -1)
        return filled & (self.index != index[:, None])

    def state(self) -> dict[str, Tensor]:
        """Return the tensors a checkpoint must hold; they are the bank's own, not copies."""
        return {"features": self.features, "index": self.index, "ptr": self.ptr}
