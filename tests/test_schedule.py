"""The learning rate against its formula in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttht.schedule import Schedule


def rate_of(schedule: Schedule, updates: int) -> float:
    rate = schedule.at(torch.tensor(updates))
    assert rate.shape == ()
    assert rate.dtype == torch.float64
    return float(rate)


def formula(
    lr: float, warmup_updates: int, warmup_lr: float, milestones: list[int], rate: float, updates: int
) -> float:
    """The rate of update number `updates`, counted from 0."""
    if updates + 1 < warmup_updates:
        lr = warmup_lr + (lr - warmup_lr) * (updates + 1) / warmup_updates
    for milestone in milestones:
        if updates >= milestone:
            lr = lr * rate
    return lr


@given(
    lr=st.floats(1e-6, 10), warmup_updates=st.integers(0, 50), warmup_lr=st.floats(0, 10),
    milestones=st.lists(st.integers(0, 120), max_size=4), rate=st.floats(0.01, 1), updates=st.integers(0, 150),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_rate_equals_the_formula(
    lr: float, warmup_updates: int, warmup_lr: float, milestones: list[int], rate: float, updates: int
) -> None:
    schedule = Schedule(lr, warmup_updates=warmup_updates, warmup_lr=warmup_lr, milestones=milestones, rate=rate)
    expected = formula(lr, warmup_updates, warmup_lr, milestones, rate, updates)
    assert rate_of(schedule, updates) == pytest.approx(expected, rel=1e-12)


def test_warmup_rises_in_equal_steps_and_reaches_the_peak_with_its_last_update() -> None:
    schedule = Schedule(0.8, warmup_updates=4, milestones=[])
    assert [rate_of(schedule, n) for n in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-14)
    higher = Schedule(0.8, warmup_updates=4, warmup_lr=0.4, milestones=[])
    assert [rate_of(higher, n) for n in range(5)] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.8], rel=1e-14)


def test_rate_drops_with_the_update_of_its_milestone() -> None:
    schedule = Schedule(1.0, milestones=[3, 5], rate=0.5)
    assert [rate_of(schedule, n) for n in range(7)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_default_drop_is_to_a_tenth_without_warmup() -> None:
    schedule = Schedule(0.5, milestones=[1])
    assert [rate_of(schedule, n) for n in range(3)] == pytest.approx([0.5, 0.05, 0.05], rel=1e-14)


def test_rate_is_computed_where_the_count_is_without_a_sync() -> None:
    """On meta there is no value to read: any sync would raise."""
    schedule = Schedule(0.5, warmup_updates=3, warmup_lr=0.1, milestones=[4, 5])
    rate = schedule.at(torch.zeros((), dtype=torch.int64, device="meta"))
    assert rate.device.type == "meta"
    assert rate.dtype == torch.float64


def test_rate_far_into_a_run_is_exact_in_the_count() -> None:
    """A float32 count would round 2**24 + 1 down to the update before the milestone."""
    schedule = Schedule(1.0, milestones=[2**24 + 1], rate=0.5)
    assert [rate_of(schedule, 2**24 + n) for n in (0, 1)] == [1.0, 0.5]
    rising = Schedule(1.0, warmup_updates=2**25, milestones=[])
    assert rate_of(rising, 2**24) == (2**24 + 1) / 2**25
