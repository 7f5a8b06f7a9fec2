"""The memory bank: clean features that Eq. 5 takes its negatives from. A ring (the default), or one slot an image.

The ring, FeatureBank: feature number k (counted from 0 over the whole run) sits in slot k mod size until feature
k + size replaces it.
`ptr` is the next slot to be written; a slot whose index is -1 has never been written. Any bank size, any batch
size: a batch that does not divide the ring wraps, one larger than the ring leaves its last `size` rows.
The other, DatasetBank: the newest feature of every training image, negatives drawn anew for every minibatch (Wu et
al. 2018, whose bank the paper cites beside MoCo's queue).
All state is on the device and no method syncs with the host, so that a train step can be captured.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.config import MethodConfig

EMPTY = -1


class Bank(Protocol):
    """What the train steps and the objectives use of a bank."""

    def enqueue(self, feat_clean: Tensor, index: Tensor) -> None:
        """Store a batch of clean features; only the train step does, once per global batch."""
        ...

    def negatives(self, index: Tensor, *, mask_same_index: bool = True) -> tuple[Tensor, Tensor]:
        """Return negatives (N, D), and which of them each anchor uses, (B, N) bool."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors a checkpoint must hold; they are the bank's own, not copies."""
        ...


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
        _check(self.features, feat_clean, index)
        unit = _unit(self.features, feat_clean)
        kernels.bank_write_(self.features, self.index, self.ptr, unit, index)

    def mask(self, index: Tensor, *, mask_same_index: bool = True) -> Tensor:
        """Return which slots are negatives for each anchor, (B, size) bool.

        Empty slots never are; slots holding the anchor's own image are not if `mask_same_index`.
        """
        filled = self.index != EMPTY
        if not mask_same_index:
            return filled.expand(len(index), -1)
        return filled & (self.index != index[:, None])

    def negatives(self, index: Tensor, *, mask_same_index: bool = True) -> tuple[Tensor, Tensor]:
        """Return every slot (size, feat_dim), and `mask` of it, (B, size) bool."""
        return self.features, self.mask(index, mask_same_index=mask_same_index)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors a checkpoint must hold; they are the bank's own, not copies."""
        return {"features": self.features, "index": self.index, "ptr": self.ptr}


class DatasetBank:
    """One slot for every training image, holding the newest feature of it; negatives are drawn from all of them.

    A draw is `num_negatives` rows, uniform and independent, the same for every anchor of a minibatch: an anchor masks
    its own row and those not written yet, so what is left to it is uniform over the other images. One draw for each
    anchor (Wu et al.) would gather B x N features instead of N. The draw is keyed by the seed and by `count`, the
    minibatches written so far: micro-batches, ranks and replays of a minibatch share it, and a resumed run repeats it.

    Shapes: features (num_images, feat_dim) float, 0.66 GB for ImageNet at 128; written (num_images,) bool; count ()
    int64. Only the train step writes it, once per global batch.
    """

    def __init__(
        self,
        num_images: int,
        feat_dim: int,
        *,
        num_negatives: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_images < 1 or num_negatives < 1:
            raise ValueError(f"bank: expected images and negatives, got {num_images} and {num_negatives}")
        self.num_negatives = num_negatives
        self._seed = seed
        self.features = torch.zeros(num_images, feat_dim, device=device, dtype=dtype)
        self.written = torch.zeros(num_images, dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def enqueue(self, feat_clean: Tensor, index: Tensor) -> None:
        """Normalise a batch of clean features and write each to its image's slot.

        Where a batch holds an image twice (a bad one's replacement), the later feature stays.

        Shapes: feat_clean (B, feat_dim), index (B,) dataset rows. Mutates the bank only.
        """
        _check(self.features, feat_clean, index)
        unit = _unit(self.features, feat_clean)
        # A scatter with one slot named twice has no order on a GPU: all that name it write the last one's feature.
        order = torch.arange(len(index), device=index.device)
        last = torch.zeros_like(self.written, dtype=torch.int64).scatter_reduce_(0, index, order, "amax")
        self.features.index_copy_(0, index, unit[last[index]])
        self.written.index_fill_(0, index, True)
        self.count.add_(1)

    def negatives(self, index: Tensor, *, mask_same_index: bool = True) -> tuple[Tensor, Tensor]:
        """Return the drawn features (num_negatives, feat_dim), and which each anchor uses, (B, num_negatives) bool."""
        rows = kernels.draw_rows(len(self.features), self.num_negatives, seed=self._seed, step=self.count)
        mask = self.written.index_select(0, rows)
        if not mask_same_index:
            return self.features.index_select(0, rows), mask.expand(len(index), -1)
        return self.features.index_select(0, rows), mask & (rows != index[:, None])

    def state(self) -> dict[str, Tensor]:
        """Return the tensors a checkpoint must hold; they are the bank's own, not copies."""
        return {"features": self.features, "written": self.written, "count": self.count}


def build_bank(
    method: MethodConfig, feat_dim: int, num_images: int | None, *, seed: int, device: torch.device, dtype: torch.dtype
) -> Bank | None:
    """Build the bank that a resolved configuration asks for, or None. num_images: of the training split."""
    if method.negatives == "batch" or method.bank_size == 0:
        return None
    if method.bank_kind == "queue":
        return FeatureBank(method.bank_size, feat_dim, device=device, dtype=dtype)
    if num_images is None:
        raise ValueError("bank: expected the number of training images for a dataset bank, got none")
    assert method.num_negatives is not None, "the config was not resolved"
    return DatasetBank(num_images, feat_dim, num_negatives=method.num_negatives, seed=seed, device=device, dtype=dtype)


def _unit(features: Tensor, feat_clean: Tensor) -> Tensor:
    """Return features of unit norm in the bank's type; a feature that overflowed is zero.

    Kept as it is, it would make every anchor's loss NaN, and every step be skipped, until its slot is written anew.
    """
    return F.normalize(feat_clean.to(features.dtype), dim=1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _check(features: Tensor, feat_clean: Tensor, index: Tensor) -> None:
    if feat_clean.ndim != 2 or feat_clean.shape[1] != features.shape[1]:
        raise ValueError(
            f"bank: expected feat_clean of shape (B, {features.shape[1]}), got {tuple(feat_clean.shape)}; "
            "pass the projected feature, not the trunk output"
        )
    if index.shape != feat_clean.shape[:1]:
        raise ValueError(f"bank: expected {len(feat_clean)} indices, one per feature, got {tuple(index.shape)}")
