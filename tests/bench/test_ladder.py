"""The gate that needs no GPU: each rung moves fewer bytes than the one below, as the model says, and none waits."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from fasttht import cli
from fasttht.bench.ladder import COUNTED, RUNGS, Count, Counter, count_collectives, count_rung, predicted_bytes

counted = cache(count_rung)


@pytest.mark.changes_rng
@pytest.mark.parametrize("rung", COUNTED)
def test_a_rung_moves_the_bytes_that_the_model_predicts_and_never_waits(rung: str) -> None:
    count = counted(rung)
    assert count.num_bytes == pytest.approx(predicted_bytes(rung), rel=0.05)
    assert count.waits == 0


@pytest.mark.changes_rng
def test_no_engine_exchanges_anything_with_other_processes() -> None:
    """Where they share their statistics, training-mode BN does: at each of 53 layers, forward and backward."""
    assert {rung: count_collectives(rung) for rung in COUNTED} == {"A0": 106, "A1": 0, "A2": 0, "A3": 0, "A5": 0}


@pytest.mark.changes_rng
def test_statistics_of_the_batch_cost_bytes_but_no_launches() -> None:
    """Training-mode BN counts its batches: one launch more at each of 53 layers."""
    assert counted("A0").launches - counted("A1").launches == 53
    assert counted("A1").launches == counted("A2").launches


@pytest.mark.changes_rng
def test_bytes_and_launches_fall_from_rung_to_rung() -> None:
    counts = [counted(rung) for rung in COUNTED]
    sizes = [count.num_bytes for count in counts]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    launches = [count.launches for count in counts]
    assert launches == sorted(launches, reverse=True)
    assert sizes[-1] < 0.4 * sizes[0]


@pytest.mark.changes_rng
def test_the_model_holds_for_another_network_and_size() -> None:
    for rung in ("A2", "A5"):
        assert count_rung(rung, "resnet101", 160).num_bytes == pytest.approx(
            predicted_bytes(rung, "resnet101", 160), rel=0.05
        )


@pytest.mark.changes_rng
def test_the_model_holds_less_closely_for_basic_blocks() -> None:
    for rung in COUNTED:
        found = count_rung(rung, "resnet18", 160).num_bytes
        assert found == pytest.approx(predicted_bytes(rung, "resnet18", 160), rel=0.12), rung


def test_the_models_figures_for_resnet_50() -> None:
    assert [round(predicted_bytes(rung) / 1e6) for rung in RUNGS] == [474, 431, 342, 253, 209, 171]


def test_what_waits_for_the_device_is_counted() -> None:
    with Counter() as counter:
        x = torch.ones(5, 64, 2, 2)
        float(x.sum())
        torch.nonzero(x)
    assert counter.count.waits == 2


def test_passes_are_counted_once_for_each_tensor_read_and_written() -> None:
    x = torch.ones(5, 64, 2, 2)
    for function, passes in (
        (lambda: x + x, 2),
        (lambda: x + 1, 2),
        (lambda: x * x.clone(), 5),
        (lambda: x.add_(1), 2),
    ):
        with Counter() as counter:
            function()  # type: ignore[no-untyped-call]
        assert counter.count.num_bytes == passes * x.numel() * 4
    with Counter() as counter:
        x.view(5, -1).sum()
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert counter.count.num_bytes == 0  # four dimensions and the batch in front: what an activation is
    assert isinstance(counter.count, Count)


@pytest.mark.changes_rng
def test_the_command_prints_a_row_for_each_rung(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "ladder", "--img-size", "64"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in report["rows"]] == list(RUNGS) == ["A0", "A1", "A2", "A3", "A4", "A5"]
    for row in report["rows"]:
        assert row["predicted_mb"] > 0
        if row["name"] == "A4":
            assert "torch.compile" in row["not_counted"]
            assert "launches" not in row
        else:
            assert row["mb_per_image"] > 0


@pytest.mark.changes_rng
def test_model_is_another_word_for_arch_and_basic_blocks_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for flag in ("--arch", "--model"):
        assert cli.run(["bench", "ladder", flag, "resnet18", "--img-size", "64"]) == 0
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert reports[0] == reports[1]
    assert reports[0]["settings"]["arch"] == "resnet18"
