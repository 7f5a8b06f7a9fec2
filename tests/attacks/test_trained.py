"""A network that training has made, under the attack of every engine: the same held-out images are right, but one."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.engine import EagerEngine, Engine, FoldedEngine, choose_engine
from fasttht.attacks.pgd import Draw
from fasttht.attacks.threat import Threat
from fasttht.config_file import from_flat, read_preset
from fasttht.resolve import resolve
from fasttht.train import Trainer

CPU = torch.device("cpu")
PGD10 = Threat(eps=0.15, alpha=2.5 * 0.15 / 10, steps=10)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The quickstart's method and network, half as wide, for a few seconds."""
    folder = tmp_path_factory.mktemp("trained")
    options: dict[str, Any] = {
        "width": 8, "replay": 4, "epochs": 16, "eval_steps": [1], "output": str(folder / "run"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("XDG_CACHE_HOME", str(folder))
        trainer = Trainer(resolve(from_flat({**read_preset("quickstart"), **options}, where="test")))
        trainer.fit()
    trainer.state.model.eval()
    return trainer


@pytest.fixture(scope="module")
def held_out(trainer: Trainer) -> tuple[Tensor, Tensor]:
    samples = trainer.splits.val
    pixels = [torch.from_numpy(samples.sample(i).data.copy()).view(8, 8, 3) for i in range(len(samples))]
    x = torch.stack(pixels).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return kernels.u8_to_input(x), torch.from_numpy(samples.labels.copy())


def hits(trainer: Trainer, engine: Engine, held_out: tuple[Tensor, Tensor]) -> Tensor:
    """Return which images are right after PGD-10 by this engine, judged by the network itself."""
    x, y = held_out
    x_adv = engine.attack(x, y, torch.arange(len(x)), PGD10, Draw(seed=0), num_classes=10).x_adv
    with torch.no_grad():
        return trainer.state.model.logits(x_adv).argmax(dim=1) == y


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folded", "fused", "compiled"])
def test_every_engine_leaves_the_accuracy_of_a_trained_network_within_one_image(
    name: str, trainer: Trainer, held_out: tuple[Tensor, Tensor]
) -> None:
    if name == "compiled" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    model = trainer.state.model
    exact = hits(trainer, EagerEngine(model, model.logits), held_out)
    assert len(exact) == 360
    assert 90 < int(exact.sum()) < 330  # learnt, and attacked
    found = hits(trainer, FoldedEngine(name, model, dtype=torch.float32), held_out)
    assert abs(int(found.sum()) - int(exact.sum())) <= 1
    assert int((found != exact).sum()) <= 2


def test_training_takes_the_default_engine(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("default")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        config = resolve(from_flat({**read_preset("quickstart"), "steps": 10, "output": str(folder / "run")}, where=""))
        trainer = Trainer(config)
    assert config.attack.attack_engine == "auto"
    assert trainer.state.engine is not None
    name, reason = choose_engine("auto", trainer.state.model, 8, CPU, batch_norm="eval")
    assert (trainer.state.engine.name, trainer.state.engine.reason) == (name, reason)
    assert isinstance(trainer.state.engine, FoldedEngine)
