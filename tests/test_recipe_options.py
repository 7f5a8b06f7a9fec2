"""Ghost BN and decay of everything, from the flag to the update, the checkpoint and the evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import checkpoint, cli
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import CheckpointError, UsageError
from fasttht.metrics import Meter
from fasttht.models.ghost_bn import GhostBatchNorm2d
from fasttht.models.two_head import CosineClassifier, decay_groups
from fasttht.resolve import resolve
from fasttht.state import GuardedSGD
from fasttht.train import Trainer


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


TINY: dict[str, Any] = {
    "width": 4, "batch_size": 400, "epochs": 1, "log_interval": 1, "eval_steps": [1], "bank_size": 700, "steps": 1,
}  # fmt: skip


def config_of(output: Path, **options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), **TINY, **options, "output": str(output)}, where="test"))


@pytest.mark.parametrize(
    "options", [{}, {"replay": 2, "steps": None, "grad_accum_steps": 2}, {"objective": "mbn-alp"}, {"objective": "alp"}]
)
def test_a_run_with_ghost_bn_resumes_bit_for_bit_and_is_evaluated_as_any(
    options: dict[str, Any], tmp_path: Path
) -> None:
    given = {"bn_group_size": 32, "step_engine": "fused", "model_ema": True, **options}
    given = {name: value for name, value in given.items() if value is not None}
    if "replay" in given:
        given["epochs"] = 2
    base = {name: value for name, value in TINY.items() if name != "steps" or "replay" not in given}

    def trainer(name: str) -> Trainer:
        flat = {**read_preset("quickstart"), **base, **given, "output": str(tmp_path / name)}
        return Trainer(resolve(from_flat(flat, where="test")))

    whole = trainer("whole")
    assert "without fused norms: ghost batch norms (--bn-group-size) are no single op" in whole.describe()
    assert isinstance(whole.state.model.trunk.bn1, GhostBatchNorm2d) == (options.get("objective") != "mbn-alp")
    row = whole.fit()
    assert trainer("run").fit(stop_at=1) is None
    assert trainer("run").fit() == row
    own, theirs = (checkpoint.listing(tmp_path / name)[-1] for name in ("run", "whole"))
    for path in theirs.glob("*.safetensors"):
        assert (own / path.name).read_bytes() == path.read_bytes()
    assert cli.run(["eval", str(tmp_path / "run"), "--output", str(tmp_path / "row.json")]) == 0
    found = json.loads((tmp_path / "row.json").read_text())
    assert row is not None
    assert found["clean_top1"] == row["clean_top1"]


def test_the_groups_size_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    Trainer(config_of(tmp_path, bn_group_size=32)).fit(stop_at=1)
    with pytest.raises(CheckpointError, match=r"bn_group_size 32 \(now 16\)"):
        Trainer(config_of(tmp_path, bn_group_size=16))


@pytest.mark.parametrize("size", [1, -2])
def test_groups_of_one_image_are_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--bn-group-size: expected 0 or at least 2, got {size}"):
        config_of(tmp_path, bn_group_size=size)


@pytest.mark.changes_rng
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_everything_decays_but_the_temperature(classifier: str, tmp_path: Path) -> None:
    """One update without gradients is w <- (1 - lr wd) w, for every parameter that decays."""
    objective = "that" if classifier == "cosine" else "at"
    model = build_model(config_of(tmp_path, objective=objective), 5, torch.device("cpu"))
    lr = torch.tensor(0.5)
    optimizer = GuardedSGD(decay_groups(model, 0.2, decay_all=True), momentum=0.9, nesterov=True, lr=lr)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name == "classifier.scale" else 1 - 0.5 * 0.2 * 1.9  # Nesterov's first step counts 1.9 times
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert ("classifier.scale" in before) == isinstance(model.classifier, CosineClassifier) == (classifier == "cosine")


def test_the_flag_reaches_the_optimizer(tmp_path: Path) -> None:
    for decay_all, expected in ((False, {1e-4, 0.0}), (True, {1e-4})):
        state = Trainer(config_of(tmp_path / str(decay_all), objective="at", decay_all=decay_all)).state
        found = {group["weight_decay"] for group in state.optimizer.param_groups if group["params"]}
        assert found == expected


def test_a_meter_has_room_for_the_parts_of_an_objective_of_ones_own() -> None:
    meter = Meter(torch.device("cpu"), ("loss_cl", "loss_new"))
    meter.add(loss_cl=2.0, loss_new=torch.tensor(3.0))
    sums = meter.read()
    assert (sums["loss_cl"], sums["loss_new"], sums["loss"]) == (2, 3, 0)
    assert len(Meter(torch.device("cpu"), ("loss_cl",)).sums) == len(Meter.NAMES), "older checkpoints stay readable"
    with pytest.raises(AssertionError, match="loss_other"):
        meter.add(loss_other=1.0)
