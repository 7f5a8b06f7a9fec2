"""The examples do what their first lines say, with public names, in few lines."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttht import objectives, traits

FOLDER = Path(__file__).parents[1] / "examples"
SHORT = ("custom_attack", "custom_data", "custom_objective")

pytestmark = [pytest.mark.changes_rng, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep caches and run folders away from the user's, and objectives of an example out of the other tests."""
    folder = tmp_path_factory.getbasetemp() / "examples"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("runs")))
    kept = [(names, dict(names)) for names in (objectives.OBJECTIVES, traits.TRAITS)]
    yield
    for names, before in kept:
        names.clear()
        names.update(before)  # type: ignore[arg-type]


def run(name: str, *words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def percent(out: str, of: str) -> float:
    found = re.search(rf"{of}:? ([\d.]+) %", out)
    assert found is not None, out
    return float(found[1])


def test_an_attack_on_any_module_gets_stronger_with_its_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("custom_attack", monkeypatch=monkeypatch, capsys=capsys)
    clean, noise, ten, fifty = (percent(out, name) for name in ("clean", "PGD-0", "PGD-10", "PGD-50"))
    assert clean > 85
    assert noise > 80
    assert ten < 40
    assert fifty <= ten


def test_arrays_of_ones_own_are_trained_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("custom_data", monkeypatch=monkeypatch, capsys=capsys)
    assert percent(out, "clean") > 80, "two classes: half of it is chance"
    assert "of 360 held-out images" in out


def test_a_folder_of_ones_own_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for label, level in (("dark", 0), ("light", 128)):
        (tmp_path / label).mkdir()
        for i in range(80):
            pixels = (rng.integers(0, 100, (10, 12, 3)) + level).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    out = run("custom_data", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert "of 16 held-out images" in out


def test_an_objective_of_ones_own_trains_and_logs_its_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("custom_objective", monkeypatch=monkeypatch, capsys=capsys)
    assert percent(out, "clean") > 60
    row = (Path(out.rsplit("rows are in ", 1)[1].strip()) / "metrics.jsonl").read_text().splitlines()[0]
    assert '"loss_squeeze"' in row


@pytest.mark.parametrize("name", SHORT)
def test_it_is_short_says_how_to_run_it_and_uses_public_names(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 40
    tree = ast.parse(source)
    assert f"python examples/{name}.py" in (ast.get_docstring(tree) or "")
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names} | set((node.module or "").split("."))
    assert not [found for found in names if found.startswith("_")]
