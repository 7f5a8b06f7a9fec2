"""The plan of an epoch: pure functions of (seed, epoch, index), every sample once, every window inside its image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from fasttht.pipelines.plan import STREAM_FLIP, Augment, EpochPlan, Index, Windows, hash_rows, uniforms

TRAIN = EpochPlan(num_samples=101, batch_size=16, seed=5, epoch=2, augment=Augment())
EXTREME = [(1, 1), (500, 33), (33, 500), (2592, 3888), (1, 500), (500, 1), (2, 3)]
sides = st.integers(1, 5000)
seeds = st.integers(0, 2**63)


def numbers(*values: int) -> Index:
    return np.array(values, dtype=np.int64)


def windows_of(plan: EpochPlan, index: Index, height: int, width: int) -> Windows:
    return plan.windows(index, np.full(len(index), height), np.full(len(index), width))


def batches(plan: EpochPlan) -> list[list[int]]:
    order = plan.order()
    return [plan.batch(order, step).tolist() for step in range(plan.num_steps)]


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return [row for part in rows for row in part]


@given(num=st.integers(1, 300), seed=seeds, epoch=st.integers(0, 1000))
@settings(deadline=None)
def test_training_order_is_a_permutation(num: int, seed: int, epoch: int) -> None:
    plan = replace(TRAIN, num_samples=num, seed=seed, epoch=epoch)
    assert sorted(plan.order().tolist()) == list(range(num))
    assert plan.order().dtype == np.int64


def test_order_changes_with_epoch_and_seed_only() -> None:
    order = TRAIN.order().tolist()
    assert order != list(range(101))
    assert replace(TRAIN, batch_size=3, rank=1, world=4, drop_last=True).order().tolist() == order
    for other in (replace(TRAIN, epoch=3), replace(TRAIN, seed=6)):
        assert other.order().tolist() != order
        # Two independent permutations of 101 share one position on average, 8 or more once in 100,000 times.
        assert sum(a == b for a, b in zip(other.order().tolist(), order, strict=True)) < 8


def test_every_sample_comes_first_equally_often() -> None:
    first = [int(replace(TRAIN, num_samples=10, epoch=epoch).order()[0]) for epoch in range(2000)]
    assert stats.chisquare(np.bincount(first, minlength=10)).pvalue > 1e-3


@given(st.data())
@settings(deadline=None)
def test_windows_and_flips_are_the_same_however_a_batch_is_cut(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 12), "rows")
    column = st.lists(sides, min_size=rows, max_size=rows)
    heights, widths = numbers(*data.draw(column, "heights")), numbers(*data.draw(column, "widths"))
    index = numbers(*data.draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows), "index"))
    order = np.array(data.draw(st.permutations(range(rows)), "order"))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=3), "cuts"))
    whole, flips = TRAIN.windows(index, heights, widths), TRAIN.flips(index)
    elsewhere = replace(TRAIN, num_samples=7, batch_size=2, rank=1, world=2, drop_last=True)
    for plan in (TRAIN, elsewhere):
        for part in np.split(order, cuts):
            assert np.array_equal(plan.windows(index[part], heights[part], widths[part]), whole[part])
            assert np.array_equal(plan.flips(index[part]), flips[part])


def test_windows_and_flips_change_with_seed_epoch_and_sample() -> None:
    index = np.arange(200)
    windows, flips = windows_of(TRAIN, index, 375, 500), TRAIN.flips(index)
    assert len(np.unique(windows, axis=0)) > 190
    for plan in (replace(TRAIN, seed=6), replace(TRAIN, epoch=3)):
        assert (windows_of(plan, index, 375, 500) != windows).any(axis=1).sum() > 190
        assert 60 < (plan.flips(index) != flips).sum() < 140


def assert_inside(windows: Windows, heights: Index, widths: Index) -> None:
    top, left, height, width = windows.T
    assert windows.dtype == np.int64
    assert (np.minimum(height, width) >= 1).all()
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


@pytest.mark.parametrize(("height", "width"), EXTREME)
@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0)), Augment(ratio=(0.1, 0.3)), Augment(ratio=(3, 9)), None],
    ids=str,
)
def test_windows_of_extreme_images_are_inside_them(augment: Augment | None, height: int, width: int) -> None:
    windows = windows_of(replace(TRAIN, augment=augment), np.arange(300), height, width)
    assert_inside(windows, numbers(height), numbers(width))


ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted)
scales = st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).map(sorted)


@given(height=sides, width=sides, scale=scales, ratio=ratios, train=st.booleans(), seed=seeds)
@settings(deadline=None, max_examples=300)
def test_windows_of_any_image_are_inside_it(
    height: int, width: int, scale: Any, ratio: Any, train: bool, seed: int
) -> None:
    augment = Augment(scale=tuple(scale), ratio=tuple(ratio)) if train else None
    plan = replace(TRAIN, augment=augment, seed=seed)
    assert_inside(windows_of(plan, np.arange(20), height, width), numbers(height), numbers(width))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (224, 224), (2592, 3888), (40, 41)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.25, 0.4), (0.5, 0.5)])
def test_area_and_aspect_ratio_are_in_their_ranges(height: int, width: int, scale: tuple[float, float]) -> None:
    """Sides are rounded to pixels: half a pixel either way is allowed."""
    plan = replace(TRAIN, augment=Augment(scale=scale, ratio=(0.75, 4 / 3)))
    _, _, cut_h, cut_w = windows_of(plan, np.arange(3000), height, width).T
    area = height * width
    assert ((cut_h + 0.5) * (cut_w + 0.5) >= scale[0] * area).all()
    assert ((cut_h - 0.5) * (cut_w - 0.5) <= scale[1] * area).all()
    assert ((cut_w + 0.5) / (cut_h - 0.5) >= 0.75).all()
    assert ((cut_w - 0.5) / (cut_h + 0.5) <= 4 / 3).all()


def test_area_is_uniform_and_aspect_ratio_log_uniform_and_position_uniform() -> None:
    """Where every attempt fits, nothing is rejected, so the laws are exact (to a pixel of 4000)."""
    plan = replace(TRAIN, augment=Augment(scale=(0.1, 0.3), ratio=(0.5, 3.0)))
    top, left, cut_h, cut_w = windows_of(plan, np.arange(8000), 4000, 4000).T
    share = (cut_h * cut_w / 4000**2 - 0.1) / 0.2
    ratio = np.log(cut_w / cut_h / 0.5) / np.log(3.0 / 0.5)
    laws: list[npt.NDArray[np.float64]] = [share, ratio, top / (4000 - cut_h), left / (4000 - cut_w)]
    for law in laws:
        assert stats.kstest(law, "uniform").pvalue > 1e-3
    for i, one in enumerate(laws):
        for two in laws[:i]:
            assert abs(np.corrcoef(one, two)[0, 1]) < 4 / 8000**0.5


def test_every_position_of_a_window_can_be_drawn() -> None:
    plan = replace(TRAIN, augment=Augment(scale=(0.25, 0.25), ratio=(1.0, 1.0)))
    windows = windows_of(plan, np.arange(2000), 8, 8)
    assert set(windows[:, 2:].ravel().tolist()) == {4}
    for corner in windows[:, :2].T:
        counts = np.bincount(corner)
        assert len(counts) == 5  # 0 .. 8 - 4, both ends included
        assert stats.chisquare(counts).pvalue > 1e-3


def test_images_that_no_window_fits_fall_back_to_the_centre() -> None:
    """As torchvision does: the longest cut of an allowed ratio, over the whole short side."""
    plan = replace(TRAIN, augment=Augment(scale=(1.0, 1.0), ratio=(0.75, 4 / 3)))
    assert windows_of(plan, np.arange(3), 33, 500).tolist() == [[0, 228, 33, 44]] * 3
    assert windows_of(plan, np.arange(3), 500, 33).tolist() == [[228, 0, 44, 33]] * 3
    square = replace(plan, augment=Augment(scale=(1.0, 1.0), ratio=(2.0, 2.0)))
    assert windows_of(square, np.arange(3), 90, 100).tolist() == [[20, 0, 50, 100]] * 3


@pytest.mark.parametrize("hflip", [0.0, 0.3, 0.5, 1.0])
def test_share_of_flips_is_the_probability_asked_for(hflip: float) -> None:
    flips = replace(TRAIN, augment=Augment(hflip=hflip)).flips(np.arange(20_000))
    low, high = stats.binom.interval(0.9999, 20_000, hflip) if 0 < hflip < 1 else (20_000 * hflip,) * 2
    assert flips.dtype == np.bool_
    assert low <= flips.sum() <= high


def test_flip_probability_is_exact_to_the_last_bit_of_the_draw() -> None:
    index = np.arange(50)
    draws = uniforms(hash_rows(STREAM_FLIP, 5, 2, 0, index), 1)[:, 0].tolist()
    for row, u in enumerate(draws):
        for hflip, expected in ((u, False), (u + 2**-24, True)):
            assert replace(TRAIN, augment=Augment(hflip=hflip)).flips(index)[row] == expected


@given(
    num=st.integers(1, 200), batch_size=st.integers(1, 64), world=st.integers(1, 4), drop_last=st.booleans(),
    train=st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_slices_of_the_ranks_concatenate_to_the_global_batches(
    num: int, batch_size: int, world: int, drop_last: bool, train: bool
) -> None:
    batch_size = min(num, batch_size)
    options: dict[str, Any] = {"num_samples": num, "batch_size": batch_size, "drop_last": drop_last}
    plan = replace(TRAIN, augment=Augment() if train else None, **options)
    ranks = [batches(replace(plan, rank=rank, world=world)) for rank in range(world)]
    order = plan.order().tolist()
    expected = [order[i : i + batch_size] for i in range(0, num, batch_size)]
    if drop_last:
        expected = [rows for rows in expected if len(rows) == batch_size]
    assert batches(plan) == expected
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == expected
    assert plan.num_steps == len(expected)
    for parts in zip(*ranks, strict=True):
        sizes = [len(rows) for rows in parts]
        assert max(sizes) - min(sizes) <= 1


def test_dropped_tail_is_another_in_another_epoch() -> None:
    plan = replace(TRAIN, drop_last=True)
    left_out = [set(range(101)) - set(flat(batches(replace(plan, epoch=epoch)))) for epoch in range(30)]
    assert {len(rows) for rows in left_out} == {101 % 16}
    assert len({tuple(sorted(rows)) for rows in left_out}) == 30


def test_evaluation_takes_every_sample_once_in_file_order_and_whole() -> None:
    plan = replace(TRAIN, augment=None)
    assert [len(rows) for rows in batches(plan)] == [16] * 6 + [5]
    assert flat(batches(plan)) == list(range(101))
    expected = [[0, 0, 400, 320], [0, 0, 1, 8]]
    assert plan.windows(np.arange(2), numbers(400, 1), numbers(320, 8)).tolist() == expected
    assert not plan.flips(np.arange(1000)).any()


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 0}, {"batch_size": 0}, {"rank": 1}, {"rank": -1}, {"rank": 4, "world": 4},
        {"num_samples": 15, "drop_last": True},
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        replace(TRAIN, **options)


def paged(epoch: int = 0, *, per_page: int = 7, num: int = 7 * 200) -> EpochPlan:
    """200 pages of 7 rows, laid down in no order of their own."""
    pages = np.random.default_rng(1).permutation(np.repeat(np.arange(num // per_page), per_page))
    return EpochPlan(num_samples=num, batch_size=16, epoch=epoch, augment=Augment(), pages=pages)


def test_the_paged_order_is_a_permutation_that_enters_each_page_once() -> None:
    """Every 64 pages together: all their rows come before any row of the next 64."""
    plan = paged()
    assert plan.pages is not None
    order = plan.order()
    assert sorted(order.tolist()) == list(range(1400))
    groups = np.split(plan.pages[order], [64 * 7, 128 * 7, 192 * 7])
    seen = [set(group.tolist()) for group in groups]
    assert [len(pages) for pages in seen] == [64, 64, 64, 8]
    assert sum(len(pages) for pages in seen) == len(set.union(*seen))
    for group in groups:  # and within them the rows are mixed: hardly two neighbours share a page
        assert np.mean(group[1:] == group[:-1]) < 0.2


def test_the_paged_order_changes_with_the_epoch_in_pages_and_in_rows() -> None:
    first, second = paged(0), paged(1)
    assert first.pages is not None
    groups = [set(first.pages[plan.order()[: 64 * 7]].tolist()) for plan in (first, second)]
    assert 5 < len(groups[0] & groups[1]) < 40  # 20.5 expected of two independent draws of 64 of 200
    one_page = EpochPlan(num_samples=50, batch_size=5, augment=Augment(), pages=np.zeros(50, dtype=np.int64))
    assert one_page.order().tolist() == replace(one_page, pages=None).order().tolist()


def test_pages_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a page for each of 4 rows, got 3"):
        EpochPlan(num_samples=4, batch_size=2, pages=np.zeros(3, dtype=np.int64))


@given(num=st.integers(2, 50), seed=seeds, epoch=st.integers(0, 9), attempt=st.integers(0, 15), data=st.data())
def test_a_replacement_is_another_row(num: int, seed: int, epoch: int, attempt: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, num - 1))
    plan = replace(TRAIN, num_samples=num, seed=seed, epoch=epoch)
    shown = plan.replacement(row, attempt)
    assert 0 <= shown < num
    assert shown != row
    assert replace(plan, batch_size=3, rank=1, world=4).replacement(row, attempt) == shown


def test_a_single_row_has_no_other_replacement_than_itself() -> None:
    assert [replace(TRAIN, num_samples=1, batch_size=1).replacement(0, attempt) for attempt in range(4)] == [0] * 4


def test_replacements_are_uniform_over_the_other_rows() -> None:
    shown = [replace(TRAIN, num_samples=11, epoch=epoch).replacement(4, 0) for epoch in range(3000)]
    counts = np.bincount(shown, minlength=11)
    assert counts[4] == 0
    assert stats.chisquare(np.delete(counts, 4)).pvalue > 1e-3
    assert len({TRAIN.replacement(4, attempt) for attempt in range(16)}) > 10
