"""`bench attack` and `bench step`: rows of what ran, ratios of what was timed in turn; never who is faster."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttht import cli
from fasttht.bench import attack as bench_attack
from fasttht.bench.jobs import summarise_jobs, time_jobs

SMALL = (
    *("--arch", "resnet18", "--stem", "small", "--width", "4", "--batch-size", "4"),
    *("--img-size", "16", "--steps", "2", "--windows", "2", "--cpu"),
)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a benchmark with small settings and return its last line, parsed."""

    def call(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.run(["bench", *words, *SMALL]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return call


def test_jobs_take_turns_after_one_warm_up_each() -> None:
    calls: list[str] = []
    ticks = iter(range(100))
    jobs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = time_jobs(jobs, torch.device("cpu"), windows=3, clock=lambda: float(next(ticks)))
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_ratios_are_of_the_same_window() -> None:
    rows = summarise_jobs({"a": [1.0, 2.0, 3.0], "b": [0.5, 2.0, 1.0]}, 10, "a")
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["ratio_quartiles"] == [1.5, 2.5]
    assert (rows[1]["img_per_s"], rows[1]["ms"]) == (10.0, 1000.0)


def test_attack_reports_each_engine(report: Callable[..., dict[str, Any]]) -> None:
    found = report("attack", "--engines", "backward", "eager", "folded", "fused")
    assert found["bench"] == "attack"
    assert found["settings"]["attack"] == "pgd2"
    assert [row["name"] for row in found["rows"]] == ["backward", "eager", "folded", "fused"]
    for row in found["rows"]:
        assert row["ratio_to"] == "eager"
        assert row["img_per_s"] == pytest.approx(4000 / row["ms"])
        if row["name"] != "backward":
            assert row["sign_agreement_pct"] > 99
    assert found["rows"][1]["ratio"] == 1


def test_a_peer_that_is_not_installed_is_named_and_not_a_zero(
    report: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(bench_attack, "import_module", missing)
    found = report("attack", "--engines", "eager", "torchattacks")
    assert found["rows"][1]["name"] == "torchattacks"
    assert "it is not installed" in found["rows"][1]["not_run"]
    assert "img_per_s" not in found["rows"][1]


def test_all_engines_end_the_attack_at_the_same_images() -> None:
    settings = bench_attack.Settings(
        engines=(), arch="resnet18", stem="small", width=4, batch_size=4, img_size=16, steps=3, windows=1, cpu=True
    )
    model, x, y = bench_attack._subject(settings, torch.device("cpu"))
    threat = bench_attack.Threat(eps=4 / 255, alpha=1 / 255, steps=3)
    expected = bench_attack._job("eager", model, x, y, threat)()
    assert (expected - x).abs().max() > 0
    for name in ("folded", "fused"):
        found = bench_attack._job(name, model, x, y, threat)()
        assert ((found - expected).abs() > 1e-6).double().mean() < 0.01


def test_step_reports_costs_in_clean_steps(report: Callable[..., dict[str, Any]]) -> None:
    found = report("step", "--replay", "3")
    assert [row["name"] for row in found["rows"]] == ["clean", "that-pgd2", "that-free3"]
    assert [row["engine"] for row in found["rows"]] == [None, "folded", None]
    assert found["rows"][0]["clean_steps"] == 1
    for row in found["rows"][1:]:
        assert row["clean_steps"] == pytest.approx(1 / row["ratio"])
        assert row["clean_steps_quartiles"][0] <= row["clean_steps"] <= row["clean_steps_quartiles"][1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("attack", "--windows", "0"), "--windows: expected 1 or more, got 0"),
        (("step", "--replay", "1"), "--replay: expected 2 or more, got 1"),
        (("attack", "--engines", "none"), "none"),
    ],
)
def test_bad_words_exit_with_2(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
