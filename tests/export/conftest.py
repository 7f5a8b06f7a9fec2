"""Run folders to export: made in place of being trained, with networks that tell images apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fasttht import checkpoint
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset, to_toml
from fasttht.export_run import export_run
from fasttht.models.mixture_bn import through
from fasttht.models.two_head import TwoHead
from fasttht.resolve import resolve

MakeRun = Callable[..., Path]


def config_of(**options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), "width": 4, "objective": "at", **options}, where="test"))


@torch.no_grad()
def wake(model: TwoHead, size: int, seed: int = 0) -> TwoHead:
    """Give BN affine parameters and running statistics that matter, in place: a new network says one class of all."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.uniform_(-0.5, 0.5, generator=generator)
            module.momentum = 1.0
    for branch in ("clean", "adversarial"):
        with through(model, branch):  # type: ignore[arg-type]
            model(torch.rand(16, 3, size, size, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def make_run(tmp_path: Path, digits_cache: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Return a function from options to a run folder with one checkpoint, step 3, of the embedded digits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(digits_cache))

    return lambda name="run", **options: write_run(tmp_path / name, **options)


def write_run(folder: Path, **options: Any) -> Path:
    config = config_of(**options)
    model = wake(build_model(config, 10, torch.device("cpu")), config.data.img_size)
    tensors = {"model": dict(model.state_dict())}
    if config.optim.model_ema:
        tensors["ema"] = {k: v * 1.01 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    checkpoint.save(folder, 3, tensors, {"num_classes": 10, "step": 3}, keep=1)
    (folder / "config.toml").write_text(to_toml(config))
    return folder


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path) -> Path:
    """An exact export to copy."""
    folder = tmp_path_factory.mktemp("exported")
    export_run(write_run(folder / "run"), output=folder / "e", limit=2)
    return folder / "e"
