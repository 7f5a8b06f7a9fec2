"""Nearest neighbours among unit features, and what they vote (THAT, Eq. 8): functions of tensors alone.

Pre-training counts with them how good its features are, the nearest-neighbour defence classifies with them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from fasttht import kernels, signals
from fasttht.errors import UsageError
from fasttht.pipelines.loader import Batch

Search = Literal["exact", "faiss"]
Weighting = Literal["similarity", "exponential"]

# sigma of instance discrimination (Wu et al. 2018): exp(cosine / 0.07).
TEMPERATURE = 0.07


@torch.no_grad()
def encoded(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Batch], on_batch: Callable[[int], None] = lambda images: None
) -> tuple[Tensor, Tensor]:
    """Return the features (N, D) and labels (N,) of images, in the order of the batches.

    on_batch is called with the number of images done.
    """
    features, labels, images = [], [], 0
    for batch in batches:
        signals.check()
        features.append(encode(kernels.u8_to_input(batch.x)))
        labels.append(batch.y)
        images += len(batch.y)
        on_batch(images)
    return torch.cat(features), torch.cat(labels)


def check_k(k: int, images: int) -> None:
    """Refuse more neighbours than there are. Raises: UsageError."""
    if not 1 <= k <= images:
        raise UsageError(f"--knn-k: expected 1 to {images}, the number of training images, got {k}")


def nearest(
    queries: Tensor, known: Tensor, k: int, *, search: Search = "exact", query_rows: int = 256, known_rows: int = 65536
) -> tuple[Tensor, Tensor]:
    """Return the k largest dot products of each query with the known features, and their rows, both (B, k).

    Sorted, largest first; of equal ones the lower row comes first, also where the k-th and the next are equal. Equal
    means equal as computed: a matrix product may round the same pair differently at another place. At most query_rows x
    known_rows products exist at a time. faiss searches an IndexFlatIP on the CPU, for which rows equal at the k-th
    place are any of them.

    Shapes: queries (B, D), known (N, D), of one type, on one device.

    Raises: UsageError for a k outside 1 to N, or if faiss is asked for and not there.
    """
    check_k(k, len(known))
    return finder(known, search=search, query_rows=query_rows, known_rows=known_rows)(queries, k)


Find = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def finder(known: Tensor, *, search: Search = "exact", query_rows: int = 256, known_rows: int = 65536) -> Find:
    """Return `nearest` among known features for any queries and k from 1 to N: faiss's index is built once.

    Raises: UsageError if faiss is asked for and not there.
    """
    index = _faiss(known) if search == "faiss" else None

    def find(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = [
            _sorted(*index(part, k)) if index is not None else _in_chunks(part, known, k, known_rows)
            for part in torch.split(queries, query_rows)
        ]
        return torch.cat([products for products, _ in found]), torch.cat([rows for _, rows in found])

    return find


def confidences(similarity: Tensor, classes: Tensor, num_classes: int, weighting: Weighting = "similarity") -> Tensor:
    """Return P(c) of Eq. 8, (B, num_classes) float64: for each class the sum of its neighbours' weights.

    `similarity` weighs a neighbour with its dot product as it is, negative ones too, so a class without a neighbour (0)
    comes before one whose neighbours point away: that is the equation. `exponential` weighs it with exp(s / 0.07).
    Summed in float64, in which sums of float32 cosines are exact but for the smallest, so their order does not matter.

    Shapes: similarity, classes (B, k), the labels of the neighbours.
    """
    weights = similarity.double()
    if weighting == "exponential":
        weights = (weights / TEMPERATURE).exp()
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)


def vote(
    queries: Tensor,
    known: Tensor,
    labels: Tensor,
    *,
    k: int,
    num_classes: int,
    weighting: Weighting = "similarity",
    search: Search = "exact",
) -> Tensor:
    """Return the class of each query by its k nearest known features, (B,) int64; of equal ones the lower class.

    Shapes: queries (B, D), known (N, D), labels (N,).
    """
    similarity, rows = nearest(queries, known, k, search=search)
    return confidences(similarity, labels[rows], num_classes, weighting).argmax(dim=1)


def _in_chunks(queries: Tensor, known: Tensor, k: int, known_rows: int) -> tuple[Tensor, Tensor]:
    """Search chunk by chunk, keeping the best k so far; these stand before the new ones, as their rows are lower."""
    products, rows = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(known), known_rows):
        values, columns = _top(queries @ known[start : start + known_rows].t(), k)
        products, rows = torch.cat([products, values], dim=1), torch.cat([rows, columns + start], dim=1)
        products, order = products.sort(dim=1, descending=True, stable=True)
        products, rows = products[:, :k], rows.gather(1, order)[:, :k]
    return products, rows


def _top(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the largest min(k, N) of each row of (B, N) and their columns, sorted as `nearest` says.

    topk says nothing of which of equal ones it takes. Where more are equal to the last than it took, a stable sort of
    that row decides; elsewhere the set is the only one, and sorting it suffices.
    """
    k = min(k, products.shape[1])
    values, columns = products.topk(k, dim=1)
    torn = ((products >= values[:, -1:]).sum(dim=1) > k).nonzero().squeeze(1)
    if len(torn):
        in_order = products[torn].sort(dim=1, descending=True, stable=True)
        values[torn], columns[torn] = in_order.values[:, :k], in_order.indices[:, :k]
    return _sorted(values, columns)


def _sorted(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each line by falling value and, where these are equal, by rising row."""
    rows, by_row = rows.sort(dim=1)
    values, by_value = values.gather(1, by_row).sort(dim=1, descending=True, stable=True)
    return values, rows.gather(1, by_value)


def faiss_module() -> Any:
    """Return the package faiss, which is no dependency of ours. Raises: UsageError with what installs it."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise UsageError(
            "--knn-search: expected exact, or faiss with its package, got faiss without it; run: pip install faiss-cpu"
        ) from None


def _faiss(known: Tensor) -> Find:
    """Build faiss's exact index; return its search. Raises: UsageError if the package is not there."""
    index = faiss_module().IndexFlatIP(known.shape[1])
    index.add(known.detach().float().cpu().contiguous().numpy())

    def find(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        products, rows = index.search(queries.detach().float().cpu().contiguous().numpy(), k)
        return torch.from_numpy(products).to(queries), torch.from_numpy(rows).to(queries.device)

    return find
