"""Fewer images of every class, for a trial or a smaller benchmark: the same ones each time."""

from __future__ import annotations

import numpy as np

from fasttht.pipelines.datasets import Subset
from fasttht.pipelines.plan import STREAM_WRITE, Index, hash_rows
from fasttht.pipelines.samples import Samples


def is_amount(amount: float) -> bool:
    """Return whether this is a share of the images (above 0, below 1) or a whole number of them."""
    return 0 < amount < 1 or (1 <= amount < 2**63 and amount == int(amount))


def balanced_subset(samples: Samples, amount: float, seed: int) -> Subset:
    """Return a share of the images or so many of them, in their order; all, if there are not more.

    Every class gives as many as any other, and a class with too few all it has; drawn by a hash of (seed, row), so a
    smaller amount is a part of a larger one.

    Raises: ValueError if it is no amount.
    """
    if not is_amount(amount):
        raise ValueError(f"subset: expected a share below 1 or a whole number of images, got {amount:g}")
    number = int(amount) if amount >= 1 else max(1, round(amount * len(samples)))
    return Subset(samples, np.sort(_rounds(samples.labels, seed)[:number]))


def _rounds(labels: Index, seed: int) -> Index:
    """Return all rows in an order in which the classes take turns, each until it has no more."""
    # steps 3 and 4 of the stream: 0 is the order in the file, 1 the hold-out, 2 the estimate's sample
    rows = np.arange(len(labels), dtype=np.int64)
    by_class = np.lexsort((hash_rows(STREAM_WRITE, seed, 0, 3, rows), labels))
    counts = np.bincount(labels)
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = rows - np.repeat(np.cumsum(counts) - counts, counts)
    order: Index = np.lexsort((labels, hash_rows(STREAM_WRITE, seed, 0, 4, labels), turn))
    return order
