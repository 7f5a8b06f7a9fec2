"""Which attacks an evaluation consists of, what they are called, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from fasttht.attacks.threat import Threat
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import UsageError
from fasttht.eval_attacks import GOALS, alarm_threats, check_losses, image_steps, threats
from fasttht.resolve import resolve


def config_of(**options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), **options}, where="test"))


def names(found: list[Threat]) -> list[str]:
    return [threat.name for threat in found]


def test_every_goal_is_done_with_every_loss_at_every_length_and_radius() -> None:
    found = threats(config_of(eval_steps=[10, 30]), GOALS["all"], losses=("ce", "dlr"), eps_sweep=(8 / 255, 1.0))
    own = [
        "pgd10", "pgd30", "pgd10_dlr", "pgd30_dlr",
        "pgd10_targeted", "pgd30_targeted", "pgd10_targeted_dlr", "pgd30_targeted_dlr",
        "pgd10_least_likely", "pgd30_least_likely", "pgd10_least_likely_dlr", "pgd30_least_likely_dlr",
    ]  # fmt: skip
    assert names(found) == [name + end for end in ("", "_eps0.031373", "_eps1") for name in own]
    assert len(set(found)) == len(found)
    assert {threat.eps for threat in found[:12]} == {0.15}
    assert {threat.eps for threat in found[12:24]} == {8 / 255}
    assert found[12].alpha == pytest.approx(2.5 * (8 / 255) / 10)


def test_names_say_the_norm_before_the_goal() -> None:
    config = config_of(norm="l2-relative", eps=0.1, eval_steps=[5])
    assert names(threats(config, GOALS["both"], losses=("margin",), eps_sweep=(0.2,))) == [
        "pgd5_l2_relative_margin", "pgd5_l2_relative_targeted_margin",
        "pgd5_l2_relative_margin_eps0.2", "pgd5_l2_relative_targeted_margin_eps0.2",
    ]  # fmt: skip


def test_the_ones_for_alarms_are_noise_one_step_other_losses_longer_and_wider() -> None:
    found = alarm_threats(config_of(eval_steps=[10, 30]), 10)
    assert names(found) == [
        "pgd0", "pgd1", "pgd150", "pgd10", "pgd10_margin", "pgd10_dlr", "pgd10_targeted",
        "pgd10_eps0.075", "pgd10_eps0.3", "pgd10_eps1",
    ]  # fmt: skip
    assert "pgd10_dlr" not in names(alarm_threats(config_of(eval_steps=[10]), 2))
    black_to_white = alarm_threats(config_of(norm="l2", eps=1.0, eval_steps=[10]), 10)[-1]
    assert black_to_white.eps == 14  # (3 x 8 x 8)^0.5 is 13.86, and the name has five digits
    assert black_to_white.name == "pgd10_l2_eps14"
    relative = alarm_threats(config_of(norm="l2-relative", eps=0.06, eval_steps=[10]), 10)
    assert [threat.eps for threat in relative if threat.named_eps] == [0.03, 0.12]
    assert len({threat.eps for threat in alarm_threats(config_of(eps=1.0), 10) if threat.named_eps}) == 2


def test_dlr_is_refused_where_classes_are_too_few() -> None:
    plain, aimed = Threat(eps=0.1, alpha=0.1, steps=1, loss="dlr"), Threat(
        eps=0.1, alpha=0.1, steps=1, loss="dlr", targeted=True
    )  # fmt: skip
    check_losses([plain, Threat(eps=0.1, alpha=0.1, steps=1, loss="margin")], 3)
    check_losses([plain, aimed], 4)
    with pytest.raises(UsageError, match="--losses: expected at least 3 classes for dlr, got 2"):
        check_losses([plain], 2)
    with pytest.raises(UsageError, match="--losses: expected at least 4 classes for dlr with a target, got 3"):
        check_losses([plain, aimed], 3)


def test_image_steps_count_forwards_and_gradients_once() -> None:
    config = config_of(eval_steps=[10])
    assert image_steps([], 5) == 1
    assert image_steps(threats(config), 1) == 1 + 11
    assert image_steps(threats(config, eps_sweep=(0.15, 0.3)), 3) == 1 + 3 * 11 * 2
