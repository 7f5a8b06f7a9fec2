"""The breakdown of a step: phases are disjoint, all are there, and they are those that the step's code names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import state
from fasttht.attacks.engine import FoldedEngine
from fasttht.attacks.pgd import Attacked
from fasttht.bench import step as bench_step
from fasttht.bench.phases import PHASES, Timeline, break_down, summarise, time_phases
from fasttht.errors import UsageError
from fasttht.pipelines import DataError
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.datasets import DigitsSamples
from fasttht.regions import region

CPU = torch.device("cpu")
SETTINGS = bench_step.Settings(
    arch="resnet18", stem="small", width=4, batch_size=4, img_size=8, steps=2, replay=2, engine="folded",
    windows=1, step_engines=("eager",), cpu=True,
)  # fmt: skip


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
        assert (rows["data_wait"]["ms"], rows["data_wait"]["note"]) == (
            0,
            "0: the images lie on the device; --data has them loaded",
        )


def test_a_region_that_nobody_expected_gets_a_row_of_its_own() -> None:
    rows = summarise([({"new": 1.0, "other": 3.0}, 4.0)])["phases"]
    assert rows[-1] == {"name": "new", "ms": 1.0, "pct": 25.0}


@pytest.fixture
def kinds() -> Callable[..., dict[str, float]]:
    """Return the phases of one step of a small network."""

    def watch(objective: str, *, replay: int = 1, engine: str = "folded") -> dict[str, float]:
        settings = dataclasses.replace(SETTINGS, engine=engine)
        return time_phases(bench_step._make_step(settings, objective, replay, "eager", CPU).run, CPU)[0]

    return watch


def test_the_phases_of_a_standard_step(kinds: Callable[..., dict[str, float]]) -> None:
    expected = {
        "clean_encoder", "attack_refresh", "attack", "attack_gradient", "attack_forward", "attack_backward",
        "attack_update", "train_step", "train_forward", "train_backward", "optimizer", "bank", "other",
    }  # fmt: skip
    assert set(kinds("that")) == expected <= set(PHASES)
    assert set(kinds("that", engine="fused")) == expected


def test_the_phases_of_a_free_minibatch_and_of_a_clean_step(kinds: Callable[..., dict[str, float]]) -> None:
    training = {"clean_encoder", "train_step", "train_forward", "train_backward", "optimizer", "bank", "other"}
    assert set(kinds("that", replay=2)) == training | {"attack_update"}
    assert set(kinds("clean")) == training


def test_what_lies_ready_is_used_up_before_a_job_is_watched() -> None:
    """A job that waits for its fourth call on, as one does whose images were loaded while others ran."""
    clock, calls = FakeClock(), iter(range(99))

    def job() -> None:
        with region("data_wait"):
            clock.now += 2 * (next(calls) >= 3)
        clock.now += 6

    found = break_down({"a": job}, CPU, windows=1, clock=clock, lead=3)["a"]["phases"][0]
    assert (found["name"], found["ms"], found["pct"]) == ("data_wait", 2000, 25)
    assert "note" not in found


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A folder with 40 images for training."""
    split = DigitsSamples("train")
    for name in ("train", "val"):
        write_beton(tmp_path / f"{name}.beton", ((split.sample(i), int(split.labels[i])) for i in range(40)), 40)
    return tmp_path


def test_steps_wait_for_images_that_are_loaded(digits: Path) -> None:
    settings = dataclasses.replace(SETTINGS, data=digits, workers=1)
    kind = bench_step._make_step(settings, "clean", 1, "eager", CPU)
    samples = bench_step._samples(settings, CPU)
    rows = bench_step._watch({"clean": kind}, settings, samples, CPU, print)["clean"]["phases"]
    wait = next(row for row in rows if row["name"] == "data_wait")
    assert wait["ms"] > 0


def test_only_runs_whose_images_are_loaded_alike_are_compared(digits: Path) -> None:
    loaded = dataclasses.replace(SETTINGS, data=digits, loader="ffcv", workers=3)
    added = {"data": str(digits), "loader": "ffcv", "workers": 3}
    assert bench_step.described(loaded) == bench_step.described(SETTINGS) | added
    assert not added.keys() & bench_step.described(SETTINGS).keys()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"batch_size": 41}, UsageError, "the 40 training images, got 41"),
        ({"loader": "dali-gpu"}, UsageError, "--loader: expected a decoder that can run here, got dali-gpu"),
        ({"data": Path("missing")}, DataError, "missing: expected a folder"),
    ],
)
def test_data_that_cannot_be_loaded_are_refused_before_anything_is_timed(
    digits: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    monkeypatch.setattr(bench_step, "_make_step", lambda *args: pytest.fail("a step was built"))
    settings = dataclasses.replace(SETTINGS, **{"data": digits, **changes})
    with pytest.raises(error, match=said):
        bench_step.measure(settings)


class Tape:
    """Stands for the recorder of CUDA graphs: a replay is one piece, and nothing is named in it."""

    def __init__(self, device: torch.device) -> None:
        pass

    def record(self, run: Callable[[], Attacked]) -> tuple[Attacked, Callable[[], None]]:
        return run(), lambda: None


def test_an_attack_in_one_piece_is_watched_once_more_in_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: Any, **options: Any) -> FoldedEngine:
        return FoldedEngine("fused", args[1], dtype=torch.float32, recorder=Tape(CPU))

    monkeypatch.setattr(state, "build_engine", build)
    kinds = {name: bench_step._make_step(SETTINGS, name, 1, "eager", CPU) for name in ("that", "clean")}
    for kind in kinds.values():
        for _ in range(2):
            kind.run()
    found = bench_step._watch(kinds, SETTINGS, None, CPU, print)
    whole = {row["name"]: row for row in found["that"]["phases"]}
    assert whole["attack"]["ms"] > 0
    assert whole["attack_forward"]["ms"] == whole["attack_update"]["ms"] == 0
    assert "one CUDA graph" in whole["attack"]["note"]
    apart = {row["name"]: row["ms"] for row in found["that"]["attack_apart"]}
    assert all(apart[f"attack_{part}"] > 0 for part in ("forward", "backward", "update"))
    assert "attack_apart" not in found["clean"]
    assert kinds["that"].graphed is not None  # and the recording is kept
