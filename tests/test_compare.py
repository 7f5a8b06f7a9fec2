"""Comparing methods: the statistics against independent ones, and a small comparison that is stopped and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fasttht import compare
from fasttht.cli import run
from fasttht.compare import Paired, Plan, holm, mcnemar, sentences
from fasttht.errors import UsageError


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 5), (9, 2), (2, 9), (40, 15), (0, 12)])
def test_mcnemar_is_the_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected)


def test_holm_multiplies_by_the_tests_that_are_left_and_keeps_the_order() -> None:
    pairs = [Paired("a", "b", str(p), 1.0, 1, 0, p, agree=True) for p in (0.04, 0.01, 0.5, 0.03)]
    assert [pair.p for pair in holm(pairs)] == pytest.approx([0.09, 0.04, 0.5, 0.09])


def plan_of(path: Path, **options: object) -> Plan:
    settings = {"methods": ("at", "that"), "seeds": (0, 1), "eval_steps": (3,), "restarts": 2} | options
    return Plan(output=path, **settings)  # type: ignore[arg-type]


def test_the_report_counts_images_of_all_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    theirs, ours = rng.random((2, 400)) < 0.5, rng.random((2, 400)) < 0.7
    hits = {("at", seed): {"pgd3": theirs[seed]} for seed in (0, 1)}
    hits |= {("that", seed): {"pgd3": ours[seed]} for seed in (0, 1)}
    found = compare.report(plan_of(tmp_path), hits)
    assert found["images"] == 400
    assert found["rows"][1]["scores"]["pgd3"] == pytest.approx(100 * ours.mean(axis=1))
    (pair,) = found["paired"]
    assert (pair["wins"], pair["losses"]) == ((ours & ~theirs).sum(), (theirs & ~ours).sum())
    assert pair["gain"] == pytest.approx(100 * (ours.mean() - theirs.mean()))
    (said,) = sentences(found["paired"])
    assert said.startswith(f"that is better than at under pgd3: {pair['gain']:+.2f} points")


def test_nothing_is_claimed_where_the_images_do_not_separate() -> None:
    pairs = [
        vars(Paired("that", "at", "clean", 0.5, 6, 4, 0.75, agree=True)),
        vars(Paired("that", "at", "pgd3", -9.0, 0, 30, 1e-8, agree=True)),
        vars(Paired("that", "at", "pgd9", 9.0, 30, 0, 1e-8, agree=False)),
    ]
    worse, rest = sentences(pairs)
    assert worse.startswith("that is worse than at under pgd3: -9.00 points")
    assert rest == "not separated from at: that under clean (+0.50), that under pgd9 (+9.00)"


@pytest.mark.slow
def test_a_comparison_trains_evaluates_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [
        "compare", "--methods", "at", "at-free", "--seeds", "0", "--output", str(tmp_path / "c"),
        "--eval-steps", "1", "--eval-restarts", "2", "--", "--epochs", "1", "--width", "4", "--batch-size", "700",
    ]  # fmt: skip
    assert run(words) == 0
    first = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [row["method"] for row in first["rows"]] == ["at", "at-free"]
    assert list(first["rows"][0]["scores"]) == ["clean", "pgd1", "pgd1_r2"]
    assert first["images"] == 360

    def refuse(words: list[str], method: str) -> None:
        raise AssertionError(f"{method} was run again")

    with monkeypatch.context() as patched:
        patched.setattr(compare, "_call", refuse)
        assert run(words) == 0
        assert json.loads((tmp_path / "c" / "compare.json").read_text()) == first
    assert run([*words, "--weight-decay", "0"]) == 4  # the runs that are there were trained otherwise


def test_a_run_that_cannot_be_trained_ends_it_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nonsense: expected .* to end with 0, got 2: .*nonsense"):
        compare.compare(plan_of(tmp_path, methods=("nonsense",)))


@pytest.mark.parametrize("words", [["--methods", "at", "at"], ["--seeds", "1", "1"], ["--jobs", "0"]])
def test_bad_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["compare", *words, "--output", str(tmp_path / "c")]) == 2
    assert not (tmp_path / "c").exists()
    assert words[0] in capsys.readouterr().err


def test_what_has_not_begun_does_not_begin_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int]] = []

    def fail(plan: Plan, method: str, seed: int, say: object) -> None:
        begun.append((method, seed))
        raise UsageError("no")

    monkeypatch.setattr(compare, "_run", fail)
    with pytest.raises(UsageError, match="no"):
        compare.compare(plan_of(tmp_path, seeds=tuple(range(50))))
    assert len(begun) < 100


def test_seeds_that_disagree_are_said(tmp_path: Path) -> None:
    right, wrong = np.ones(40, dtype=bool), np.zeros(40, dtype=bool)
    hits = {("at", 0): {"clean": wrong}, ("that", 0): {"clean": right}}
    hits |= {("at", 1): {"clean": right[:9]}, ("that", 1): {"clean": wrong[:9]}}
    (pair,) = compare.report(plan_of(tmp_path), hits)["paired"]
    assert pair["p"] < 0.05
    assert not pair["agree"]
