"""A small trained run and a copy of it under another name, for what needs a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttht.config_file import from_flat, read_preset
from fasttht.resolve import resolve
from fasttht.train import Trainer


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of one pass; do not write into it."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        **read_preset("quickstart"), "width": 4, "epochs": 1, "batch_size": 700, "steps": 1, "objective": "at",
        "eval_steps": [2], "output": str(folder / "first"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        Trainer(resolve(from_flat(options, where="test"))).fit()
        yield folder / "first"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to draw into."""
    return Path(shutil.copytree(trained, tmp_path / "first"))
