"""Attacks on features instead of logits: away from the clean feature, and across the margin between neighbours.

A loss on unit features u is given by its gradient there, `ascent`; the network carries that to the pixels. Everything
else of an attack (starts, projection, draws) is `pgd.attack`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fasttht.attacks.pgd import InputGradient

Ascent = Callable[[Tensor, Tensor], Tensor]
"""Features u (B, D) and classes y (B,) to the gradient, (B, D), of a loss that an untargeted attack ascends.

A targeted one descends it, with y the class to go to.
"""


def feature_gradient(encode: Callable[[Tensor], Tensor], ascent: Ascent) -> InputGradient:
    """Return the input gradient of a loss on the features `encode` gives; parameter gradients are not touched."""

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            feat = encode(leaf)
            (found,) = torch.autograd.grad(feat, leaf, ascent(feat.detach(), y))
        return found

    return gradient


def away_from(anchors: Callable[[Tensor], Tensor]) -> Ascent:
    """Return the ascent of -<u, anchors(y)>: half the squared distance to unit anchors (B, D), but for a constant."""
    return lambda feat, y: -anchors(y)


def neighbour_margin(
    known: Tensor, labels: Tensor, *, k: int, temperature: float = math.inf, known_rows: int = 65536
) -> Ascent:
    """Return the ascent of a soft kNN's margin: the k nearest of other classes against the k nearest of class y.

    With a temperature T, T log sum exp(u.v_i/T) over the one less the same over the other; without, the difference of
    the means of u.v_i. So each weighs its neighbours as the defence does, exponentially or by similarity. No neighbour
    enters or leaves the vote: each side's nearest are searched anew at every step, so the gradient vanishes neither
    where all that vote agree nor, being a margin's and not a cross entropy's, where the vote is sure. Over the whole
    bank instead of k the far features of a large one would outweigh the few that vote.

    A side with fewer than k features has those; without any it gives no gradient. At most B x known_rows products exist
    at a time.

    Shapes: known (N, D) unit norm, labels (N,).
    """

    @torch.no_grad()
    def ascent(feat: Tensor, y: Tensor) -> Tensor:
        others, own = _Nearest(feat, k), _Nearest(feat, k)
        for start in range(0, len(known), known_rows):
            products = feat @ known[start : start + known_rows].t()
            same = labels[start : start + known_rows] == y[:, None]
            others.add_(products.masked_fill(same, -torch.inf), start)
            own.add_(products.masked_fill_(~same, -torch.inf), start)
        return others.mean(known, temperature) - own.mean(known, temperature)

    return ascent


class _Nearest:
    """The k largest of products that come chunk by chunk, with -inf for what does not count."""

    def __init__(self, like: Tensor, k: int) -> None:
        self._k = k
        self._products, self._rows = like.new_empty(len(like), 0), like.new_empty(len(like), 0, dtype=torch.int64)

    def add_(self, products: Tensor, start: int) -> None:
        """Take products (B, n) with the features from row `start` on."""
        best, columns = products.topk(min(self._k, products.shape[1]), dim=1)
        best, rows = torch.cat([self._products, best], dim=1), torch.cat([self._rows, columns + start], dim=1)
        self._products, order = best.topk(min(self._k, best.shape[1]), dim=1)
        self._rows = rows.gather(1, order)

    def mean(self, known: Tensor, temperature: float) -> Tensor:
        """Return the mean (B, D) of the features found, weighted by the softmax of products / T; zero without any."""
        counts = self._products.isfinite()
        scores = (self._products / temperature).masked_fill(~counts, -torch.inf)  # -inf / inf is NaN
        weights = scores.softmax(dim=1).masked_fill(~counts, 0)  # a softmax of nothing is NaN as well
        return torch.einsum("bk,bkd->bd", weights, known[self._rows])
