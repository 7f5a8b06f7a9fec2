"""`bench zeros` finds what half precision loses; `--preset` tells hours only of the step that was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fasttht import cli
from fasttht.bench.hours import IMAGENET_IMAGES, Plan, hours, plan_preset
from fasttht.config_file import preset_names
from fasttht.errors import UsageError

SMALL = ("--arch", "resnet18", "--stem", "small", "--width", "4", "--batch-size", "4", "--img-size", "8", "--cpu")
R50: dict[str, Any] = {"arch": "resnet50", "stem": "imagenet", "width": 64, "img_size": 224, "steps": 10, "replay": 4}


def test_gradients_vanish_in_float16_as_the_scale_falls_and_sooner_under_a_mean(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["bench", "zeros", "--exponents", "-24", "-20", "0", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == 2 * 2 * 3
    for reduction in ("mean", "sum"):
        shares = [rows[f"fp16 {reduction} 2^{exponent}"]["zero_grad_pct"] for exponent in (-24, -20, 0)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 50 > 1 > shares[-1]
        assert rows[f"bf16 {reduction} 2^-24"]["zero_grad_pct"] < 1  # its exponents are float32's
    assert rows["fp16 mean 2^-24"]["zero_grad_pct"] > rows["fp16 sum 2^-24"]["zero_grad_pct"]
    # A mean over 4 images is the sum at a scale 2 powers lower.
    signs = [rows["fp16 sum 2^0"]["sign_agreement_pct"], rows["fp16 sum 2^-24"]["sign_agreement_pct"]]
    assert signs[0] > 95 > 50 > signs[1]
    assert all(row["nonfinite_pct"] == 0 for row in report["rows"])
    assert report["float32_zero_grad_pct"] < 1


def test_a_scale_that_is_too_large_overflows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "zeros", "--dtypes", "fp16", "--exponents", "30", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(row["nonfinite_pct"] > 50 for row in report["rows"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--exponents", "41"), "--exponents: expected powers of two from -40 to 40, got 41"),
        (("--exponents",), "--exponents"),
        (("--batch-size", "0"), "--batch-size: expected 1 or more, got 0"),
    ],
)
def test_bad_words_exit_with_2(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "zeros", *words]) == 2
    assert said in capsys.readouterr().err


def test_hours_are_images_times_passes_over_speed() -> None:
    plan = plan_preset("that-r50-pgd10", **R50)
    assert plan == Plan("that-r50-pgd10", "that-pgd10", IMAGENET_IMAGES, 100)
    rows = [{"name": "clean", "img_per_s": 9.0}, {"name": "that-pgd10/eager", "img_per_s": 1.0},
            {"name": "that-pgd10/fused", "img_per_s": 2.0}]  # fmt: skip
    found = hours(plan, rows)
    assert found is not None
    assert found["row"] == "that-pgd10/fused"
    assert found["hours"] == pytest.approx(1_281_167 * 100 / 2 / 3600)
    assert hours(None, rows) is None


def test_a_free_preset_counts_passes_not_replays() -> None:
    plan = plan_preset("that-r50-free", **R50)
    assert plan == Plan("that-r50-free", "that-free4", IMAGENET_IMAGES, 23)


def test_every_preset_of_imagenet_has_hours_where_its_own_step_is_measured() -> None:
    for name in preset_names():
        # The MoCo variant's clean encoder is trained too, and without a bank THAT is plain adversarial training.
        if name.startswith("that-r") and "moco" not in name and not name.endswith("bank0"):
            arch = f"resnet{name.split('-')[1].removeprefix('r')}"
            steps = 3 if "eps4" in name else 10
            assert plan_preset(name, **R50 | {"arch": arch, "steps": steps}) is not None


@pytest.mark.parametrize(
    ("preset", "changes", "said"),
    [
        ("that-r152-pgd10", {}, "--arch: expected resnet152 beside --preset that-r152-pgd10, got resnet50"),
        ("that-r50-pgd10", {"steps": 2}, "--steps: expected 10"),
        ("that-r50-free", {"replay": 8}, "--replay: expected 4"),
        ("that-r50-pgd10", {"img_size": 64}, "--img-size: expected 224"),
        ("that-r50-pgd10", {"width": 8}, "--width: expected 64"),
        ("quickstart", {}, "expected a preset that trains on ImageNet, got quickstart"),
        ("that-r50-pgd1", {}, "did you mean"),
        ("denoise-r152-pgd10", {"arch": "resnet152"}, "expected one that trains plain THAT"),
        ("at-r50-pgd10", {}, "expected one that trains plain THAT"),
        ("that-r152-moco", {"arch": "resnet152"}, "expected one that trains plain THAT"),
    ],
)
def test_another_step_is_refused(preset: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_preset(preset, **R50 | changes)
    assert plan_preset(None, **R50 | changes) is None
