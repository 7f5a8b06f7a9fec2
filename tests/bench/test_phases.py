"""The breakdown of a step: phases are disjoint, all are there, and they are those that the step's code names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fasttht.bench import step as bench_step
from fasttht.bench.phases import PHASES, Timeline, break_down, summarise, time_phases
from fasttht.regions import region

CPU = torch.device("cpu")


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def job(self) -> None:
        """A step of 10 s: 1 before, 2 in the attack beside 3 in its update, 4 after."""
        self.now += 1
        with region("attack"):
            self.now += 0.5
            with region("attack_update"):
                self.now += 3
            self.now += 1.5
        self.now += 4


def test_time_belongs_to_the_innermost_region() -> None:
    clock = FakeClock()
    found, host = time_phases(clock.job, CPU, clock=clock)
    assert found == {"other": 5000.0, "attack": 2000.0, "attack_update": 3000.0}
    assert host == 10_000


def test_a_region_entered_twice_adds_up() -> None:
    stamps = iter(range(100))
    timeline = Timeline(lambda: next(stamps))
    timeline.start()
    for _ in range(2):
        timeline.enter("bank")
        timeline.leave()
    timeline.stop()
    assert timeline.milliseconds(lambda a, b: b - a) == {"other": 3, "bank": 2}


def test_jobs_are_watched_in_turn_and_shares_add_up() -> None:
    clock = FakeClock()
    found = break_down({"a": clock.job, "b": clock.job}, CPU, windows=3, clock=clock)
    assert clock.now == 60
    for own in found.values():
        rows = {row["name"]: row for row in own["phases"]}
        assert list(rows) == list(PHASES)
        assert own["watched_ms"] == own["host_ms"] == 10_000
        assert rows["attack_update"]["ms"] == 3000
        assert rows["attack_update"]["pct"] == pytest.approx(30)
        assert sum(row["pct"] for row in rows.values()) == pytest.approx(100)
        assert (rows["data_wait"]["ms"], rows["data_wait"]["note"]) == (0, "0: the images lie on the device")


def test_a_region_that_nobody_expected_gets_a_row_of_its_own() -> None:
    rows = summarise([({"new": 1.0, "other": 3.0}, 4.0)])["phases"]
    assert rows[-1] == {"name": "new", "ms": 1.0, "pct": 25.0}


@pytest.fixture
def kinds() -> Callable[..., dict[str, float]]:
    """Return the phases of one step of a small network."""

    def watch(objective: str, *, replay: int = 1, engine: str = "folded") -> dict[str, float]:
        settings = bench_step.Settings(
            arch="resnet18", stem="small", width=4, batch_size=4, img_size=8, steps=2, replay=2, engine=engine,
            windows=1, step_engines=("eager",), cpu=True,
        )  # fmt: skip
        return time_phases(bench_step._make_step(settings, objective, replay, "eager", CPU).run, CPU)[0]

    return watch


def test_the_phases_of_a_standard_step(kinds: Callable[..., dict[str, float]]) -> None:
    expected = {
        "clean_encoder", "attack_refresh", "attack", "attack_gradient", "attack_forward", "attack_backward",
        "attack_update", "train_step", "train_forward", "train_backward", "optimizer", "bank", "other",
    }  # fmt: skip
    assert set(kinds("that")) == expected <= set(PHASES)
    assert set(kinds("that", engine="fused")) == expected - {"attack_forward"}


def test_the_phases_of_a_free_minibatch_and_of_a_clean_step(kinds: Callable[..., dict[str, float]]) -> None:
    training = {"clean_encoder", "train_step", "train_forward", "train_backward", "optimizer", "bank", "other"}
    assert set(kinds("that", replay=2)) == training | {"attack_update"}
    assert set(kinds("clean")) == training
