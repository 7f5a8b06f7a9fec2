"""ONNX: what onnxruntime computes is what the network computes, for any batch size."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import cli
from fasttht.export import read_export
from fasttht.export_onnx import open_onnx
from fasttht.export_run import export_run
from fasttht.kernels import u8_to_input
from fasttht.models import standalone
from fasttht.run_folder import RunFolder
from fasttht.subject import images, open_run

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.filterwarnings("ignore")  # the exporter warns of its own parts
def test_onnx_agrees_on_every_held_out_image(make_run: Any, tmp_path: Path) -> None:
    run = make_run(objective="that", feat_dim=8, scale_init=4.0)
    export_run(run, output=tmp_path / "e", onnx=True)
    run_onnx, (model, header) = open_onnx(tmp_path / "e" / "model.onnx"), read_export(tmp_path / "e")
    assert header["checks"]["onnx"]["images"] == 360
    assert header["checks"]["onnx"]["max_difference"] <= 1e-4
    for batch_size in (1, 7, 360):
        batch = next(iter(images(open_run(run, RunFolder(run).config()), batch_size=batch_size)))
        x = u8_to_input(batch.x)
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(x), model.logits(x), rtol=0, atol=1e-4)
    assert "model.onnx" in (tmp_path / "e" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "e").iterdir() if "onnx" in path.name) == ["model.onnx"]


@pytest.mark.filterwarnings("ignore")
def test_branches_and_denoising_blocks_reach_onnx(make_run: Any, tmp_path: Path) -> None:
    """Attention over positions multiplies float32's own rounding: compared with the same network in float64."""
    run = make_run(objective="mbn", classifier="cosine", denoise=True, width=2)
    export_run(run, output=tmp_path / "e", onnx=True, limit=40)
    run_onnx, wrapper = open_onnx(tmp_path / "e" / "model.onnx"), standalone.load(tmp_path / "e")
    x = u8_to_input(next(iter(images(open_run(run, RunFolder(run).config()), batch_size=40))).x)
    with torch.no_grad():
        rounded, exact = wrapper(x), wrapper.double()(x.double())
    rounding = float((rounded - exact).abs().max())
    assert float((run_onnx(x) - exact).abs().max()) <= max(1e-4, 3 * rounding) < 1e-2


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_to_type(
    make_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    assert cli.run(["export", str(make_run()), "--output", str(tmp_path / "e"), "--onnx"]) == 2
    err = capsys.readouterr().err
    assert f"expected the {package} package" in err
    assert 'pip install "fasttht[onnx]"' in err
    assert not (tmp_path / "e").exists()
