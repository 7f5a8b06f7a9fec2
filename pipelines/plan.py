"""Which sample, window and flip every step of an epoch sees: pure functions of (seed, epoch, index).

No generator state anywhere, so an epoch can be entered at any step in O(1), and the same step shows the same
crop whatever the decoder, the number of workers or the number of ranks. The hash is `kernels/draws.py`'s,
stated in numpy because this package must not depend on that one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Windows = npt.NDArray[np.int64]

STREAM_ORDER = 0x4F52
STREAM_WINDOW = 0x574E
STREAM_FLIP = 0x464C
STREAM_WRITE = 0x5752
STREAM_REPLACE = 0x5250

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

# Attempts at a random-resized-crop before falling back to the centre, as in torchvision.
_CROP_ATTEMPTS = 10

# Pages shuffled together in the paged order: 512 MiB of the default size, well mixed, and little against any memory.
_PAGES_TOGETHER = 64


def mix64(z: Words) -> Words:
    """Apply SplitMix64's finaliser to uint64 words."""
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def hash_rows(stream: int, seed: int, epoch: int, step: int, index: Index) -> Words:
    """Hash the counters of a draw to one 64-bit key per row of `index`."""
    with np.errstate(over="ignore"):
        key = np.zeros(1, dtype=np.uint64)
        for word in (stream, seed, epoch, step):
            key = mix64((key ^ np.uint64(word & (2**64 - 1))) + _GOLDEN)
        return mix64((key ^ index.astype(np.uint64)) + _GOLDEN)


def uniforms(keys: Words, num_elements: int) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1), shape (rows, num_elements): elements 0 .. num_elements-1 of every key."""
    element = np.arange(1, num_elements + 1, dtype=np.uint64) * _GOLDEN
    bits = mix64(keys[:, None] + element[None, :])
    return (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How a training sample is cut: random-resized-crop ranges and the probability of a horizontal flip.

    scale is the share of the image's area, ratio the width over the height of the window.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The order, windows and flips of one pass over `num_samples` images.

    Training (`augment` given): a permutation of all samples, cut into global batches; with `drop_last` the short
    tail is left out of this epoch (another epoch's permutation has another tail). Evaluation (`augment=None`):
    file order, every sample once, whole images, no flip; of each the centre is shown, `crop_pct` of its short side.
    Ranks take contiguous slices of each global batch, so the order does not depend on the world size.

    view: which of several looks at the same images this is: another one has the same order, other windows and flips.

    pages: None, or the page of the file that each row lies in: the `paged` order, for files larger than memory. The
    pages are permuted, and rows only within `_PAGES_TOGETHER` pages at a time, so that a pass reads each page once.

    Raises: ValueError if there is no full batch to give, the rank is outside the world, or pages are not one a row.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    epoch: int = 0
    augment: Augment | None = None
    drop_last: bool = False
    crop_pct: float = 0.875
    rank: int = 0
    world: int = 1
    view: int = 0
    pages: Index | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"plan: expected samples and a batch, got {self.num_samples} and {self.batch_size}")
        if self.drop_last and self.num_samples < self.batch_size:
            raise ValueError(
                f"plan: expected at least one full batch of {self.batch_size}, got {self.num_samples} samples"
            )
        if not 0 <= self.rank < self.world:
            raise ValueError(f"plan: expected a rank in 0..{self.world - 1}, got {self.rank}")
        if self.pages is not None and len(self.pages) != self.num_samples:
            raise ValueError(f"plan: expected a page for each of {self.num_samples} rows, got {len(self.pages)}")

    @property
    def num_steps(self) -> int:
        """Steps of this epoch: full global batches, and the short one unless it is dropped."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + int(rest > 0 and not self.drop_last)

    def images(self, step: int) -> int:
        """Return how many images the global batch of `step` has, those of all ranks."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def order(self) -> Index:
        """Return the whole epoch's dataset rows, (num_samples,)."""
        rows = np.arange(self.num_samples, dtype=np.int64)
        if self.augment is None:
            return rows
        keys = hash_rows(STREAM_ORDER, self.seed, self.epoch, 0, rows)
        if self.pages is None:
            return np.argsort(keys, kind="stable").astype(np.int64)
        # step 1 of the stream: step 0 is the order of the rows themselves
        names, page = np.unique(self.pages, return_inverse=True)
        place = np.empty(len(names), dtype=np.int64)
        place[np.argsort(hash_rows(STREAM_ORDER, self.seed, self.epoch, 1, names), kind="stable")] = np.arange(
            len(names)
        )
        return np.lexsort((keys, place[page] // _PAGES_TOGETHER)).astype(np.int64)

    def replacement(self, row: int, attempt: int) -> int:
        """Return the row shown in place of one that cannot be decoded: another one, by a draw of (epoch, row).

        Its window and flip are its own of this epoch; it may be shown twice in it. attempt counts from 0. Of a single
        row there is no other: it is its own replacement.
        """
        if self.num_samples == 1:
            return row
        key = hash_rows(STREAM_REPLACE, self.seed, self.epoch, attempt, np.array([row], dtype=np.int64))
        drawn = int(uniforms(key, 1)[0, 0] * (self.num_samples - 1))
        return drawn + int(drawn >= row)

    def batch(self, order: Index, step: int) -> Index:
        """Return this rank's dataset rows at `step`, cut from what `order()` returned."""
        rows = order[step * self.batch_size : (step + 1) * self.batch_size]
        bounds = [len(rows) * r // self.world for r in (self.rank, self.rank + 1)]
        return rows[bounds[0] : bounds[1]]

    def windows(self, index: Index, heights: Index, widths: Index) -> Windows:
        """Return the crop of every sample as (top, left, height, width) rows, int64, inside the image."""
        if self.augment is None:
            return np.stack([0 * heights, 0 * widths, heights, widths], axis=1)
        keys = hash_rows(STREAM_WINDOW, self.seed, self.epoch, self.view, index)
        return _random_resized_windows(keys, heights, widths, self.augment)

    def flips(self, index: Index) -> npt.NDArray[np.bool_]:
        """Return which samples are mirrored left to right, (len(index),) bool."""
        if self.augment is None:
            return np.zeros(len(index), dtype=np.bool_)
        keys = hash_rows(STREAM_FLIP, self.seed, self.epoch, self.view, index)
        return uniforms(keys, 1)[:, 0] < self.augment.hflip


def _random_resized_windows(keys: Words, heights: Index, widths: Index, augment: Augment) -> Windows:
    """Draw windows of random area and aspect ratio; after ten misses, the largest centred one that fits."""
    draws = uniforms(keys, 4 * _CROP_ATTEMPTS).reshape(len(keys), _CROP_ATTEMPTS, 4)
    h, w = heights[:, None].astype(np.float64), widths[:, None].astype(np.float64)
    low, high = np.log(augment.ratio[0]), np.log(augment.ratio[1])
    area = h * w * (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * draws[..., 0])
    ratio = np.exp(low + (high - low) * draws[..., 1])
    cut_w, cut_h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (cut_w >= 1) & (cut_w <= w) & (cut_h >= 1) & (cut_h <= h)
    # Where nothing fits, clamp the image's own aspect ratio into the range and take the centre.
    own = w[:, 0] / h[:, 0]
    fall_w = np.where(own > augment.ratio[1], np.round(h[:, 0] * augment.ratio[1]), w[:, 0])
    fall_h = np.where(own < augment.ratio[0], np.round(w[:, 0] / augment.ratio[0]), h[:, 0])
    first = np.argmax(fits, axis=1)
    row = np.arange(len(keys))
    hit = fits[row, first]
    out_h = np.where(hit, cut_h[row, first], np.clip(fall_h, 1, h[:, 0])).astype(np.int64)
    out_w = np.where(hit, cut_w[row, first], np.clip(fall_w, 1, w[:, 0])).astype(np.int64)
    slack_h, slack_w = heights - out_h, widths - out_w
    top = np.where(hit, np.floor(draws[row, first, 2] * (slack_h + 1)), slack_h // 2).astype(np.int64)
    left = np.where(hit, np.floor(draws[row, first, 3] * (slack_w + 1)), slack_w // 2).astype(np.int64)
    windows: Any = np.stack([top, left, out_h, out_w], axis=1)
    return windows  # type: ignore[no-any-return]
