"""The norm of a threat from the flag to the table: defaults, refusals, training against it and evaluation under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fasttht import cli
from fasttht.attacks.threat import Threat
from fasttht.config import TrainConfig
from fasttht.config_file import digest, from_flat, radius_text, read_preset
from fasttht.errors import UsageError
from fasttht.evaluate import evaluate_run, step_size, threats
from fasttht.resolve import resolve
from fasttht.steps import train_threat
from fasttht.train import Trainer


def config_of(**options: Any) -> TrainConfig:
    return resolve(from_flat({"objective": "at", **options}, where="test"))


@pytest.mark.parametrize(
    ("options", "eps", "alpha"),
    [
        ({}, 16 / 255, 4 / 255),
        ({"replay": 4}, 4 / 255, 4 / 255),
        ({"norm": "l2-relative"}, 0.06, 0.015),
        ({"norm": "l2-relative", "steps": 5}, 0.06, 0.03),
        ({"norm": "l2", "eps": 3}, 3, 0.75),
        ({"norm": "l2", "eps": 3, "steps": 0}, 3, 7.5),
        ({"norm": "l2", "eps": 3, "alpha": 2}, 3, 2),
    ],
    ids=str,
)
def test_radius_and_step_follow_the_norm(options: dict[str, Any], eps: float, alpha: float) -> None:
    config = config_of(**options)
    assert (config.attack.eps, config.attack.alpha) == (pytest.approx(eps), pytest.approx(alpha))
    if config.attack.replay == 1:
        threat = train_threat(config)
        assert (threat.norm, threat.eps) == (options.get("norm", "linf"), config.attack.eps)
        assert {found.norm for found in threats(config)} == {threat.norm}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "l2"}, "--eps: expected a radius beside --norm l2, got nothing; for example --eps 3"),
        ({"norm": "l2", "eps": 3, "replay": 4}, "--norm: expected linf beside --replay, got l2; free training"),
        (
            {"norm": "l2-relative", "attack_start": "lattice"},
            "--norm: expected linf beside --attack-start lattice, got l2-relative; l2 steps do not end on whole levels",
        ),
        ({"eps": 16}, r"--eps: expected a number in \[0, 1\] or a fraction, got 16; did you mean 16/255\?"),
        (
            {"eps": 0.1, "alpha": 4},
            r"--alpha: expected a number in \[0, 1\] or a fraction, got 4; did you mean 4/255\?",
        ),
        ({"eps": -0.1, "norm": "l2"}, "--eps: expected at least 0, got -0.1"),
        (
            {"attack_graph": "on", "attack_engine": "eager"},
            "--attack-graph: expected auto or off beside --attack-engine",
        ),
        ({"attack_graph": "on", "attack_bn": "batch"}, "--attack-graph: expected auto or off beside --attack-bn batch"),
        ({"attack_graph": "on", "replay": 4}, "--attack-graph: expected auto or off beside --replay, got on"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_flag(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_of(**options)


def test_a_long_l2_radius_gets_past_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "--objective", "at", "--norm", "l2", "--eps", "3", "--alpha", "3/4"]) == 0
    printed = capsys.readouterr().out
    assert 'norm = "l2"' in printed
    assert 'eps = "3.0"' in printed
    assert cli.run(["config", "--eps", "3"]) == 2
    assert "did you mean 3/255?" in capsys.readouterr().err
    assert cli.run(["config", "--norm", "l2", "--eps", "-3"]) == 2
    assert "--eps" in capsys.readouterr().err


def test_the_graph_is_not_part_of_what_a_run_is() -> None:
    assert digest(config_of(attack_graph="off")) == digest(config_of())
    assert digest(config_of(norm="l2-relative")) != digest(config_of())


@pytest.mark.parametrize(
    ("norm", "steps", "alpha"), [("linf", 1000, 1 / 255), ("l2", 1000, 0.0003), ("l2-relative", 10, 0.03)]
)
def test_the_papers_rule_has_a_floor_in_linf_only(norm: str, steps: int, alpha: float) -> None:
    assert step_size(0.3, steps, "paper", norm) == pytest.approx(alpha)


def test_people_read_the_norm_of_a_radius() -> None:
    assert radius_text(config_of()) == "linf eps 16/255"
    assert radius_text(config_of(norm="l2-relative")) == "l2-relative eps 0.06"
    assert radius_text(config_of(norm="l2", eps=0.2)) == "l2 eps 0.2"


@pytest.mark.slow
@pytest.mark.changes_rng
def test_a_run_against_l2_is_trained_evaluated_and_asked_again_in_another_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {
        **read_preset("quickstart"), "objective": "at", "width": 4, "epochs": 1, "batch_size": 700, "steps": 1,
        "norm": "l2-relative", "eps": 0.1, "eval_steps": [2], "output": tmp_path / "r",
    }  # fmt: skip
    seen: list[Threat] = []
    trainer = Trainer(resolve(from_flat(options, where="test")))
    assert "l2-relative eps 0.1, alpha 0.25" in trainer.describe()
    engine = trainer.state.engine
    assert engine is not None
    original = engine.attack
    monkeypatch.setattr(engine, "attack", lambda *a, **k: (seen.append(a[3]), original(*a, **k))[1])
    row = trainer.fit()
    assert {threat.norm for threat in seen} == {"l2-relative"}
    assert row is not None
    assert "pgd2_l2_relative_top1" in row
    again = evaluate_run(tmp_path / "r", changes={}, goal="run")
    assert again["pgd2_l2_relative_top1"] == row["pgd2_l2_relative_top1"]
    assert (again["norm"], again["eps"]) == ("l2-relative", 0.1)
    other = evaluate_run(tmp_path / "r", changes={}, goal="run", norm="linf")
    assert (other["norm"], other["eps"]) == ("linf", 16 / 255)
    assert "pgd2_top1" in other
    with pytest.raises(UsageError, match="--eps: expected a radius beside --norm l2"):
        evaluate_run(tmp_path / "r", changes={}, goal="run", norm="l2")
    wide = evaluate_run(tmp_path / "r", changes={}, goal="both", norm="l2", eps=2.0)
    assert {name for name in wide if name.startswith("pgd") and name.endswith("_top1")} == {
        "pgd2_l2_top1",
        "pgd2_l2_targeted_top1",
    }
