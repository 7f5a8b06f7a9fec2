"""The export with torchvision's keys: torchvision loads it strictly and predicts the same class of every image."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttht import cli, export_run
from fasttht.errors import CheckpointError
from fasttht.export import read_export
from fasttht.export_check import compare_predictions
from fasttht.export_torchvision import read_torchvision
from fasttht.kernels import u8_to_input
from fasttht.models.two_head import MEAN, STD, CosineClassifier
from fasttht.run_folder import RunFolder
from fasttht.subject import images, open_run

STANDARD: dict[str, Any] = {"stem": "imagenet", "width": 64, "img_size": 32, "eval_batch_size": 90}


@pytest.mark.parametrize(("arch", "objective"), [("resnet18", "that"), ("resnet18", "at"), ("resnet50", "that-no-cl")])
def test_torchvision_predicts_the_same_class_of_every_held_out_image(
    make_run: Any, tmp_path: Path, torchvision: ModuleType, arch: str, objective: str
) -> None:
    run = make_run(**STANDARD, arch=arch, objective=objective)
    assert cli.run(["export", str(run), "--kind", "torchvision"]) == 0
    folder = run / "export" / "torchvision"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.json", "README.md"}
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)(num_classes=10)
    assert theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
    theirs.eval()
    subject = open_run(run, RunFolder(run).config())
    own, seen = subject.model.eval(), set()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    total = 0
    with torch.no_grad():
        for batch in images(subject):
            x = u8_to_input(batch.x)
            expected = own.logits(x)
            found = theirs((x - mean) / std)
            assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
            if isinstance(own.classifier, CosineClassifier):  # each image's times its own |h|
                h = own.trunk(own.normalize(x))
                torch.testing.assert_close(found, expected * h.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-3)
                assert h.norm(dim=1).std() > 0
            else:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            seen |= set(expected.argmax(dim=1).tolist())
            total += len(x)
    assert total == 360
    assert len(seen) >= 3, "a network that always says the same proves nothing"
    header = json.loads((folder / "model.json").read_text())
    assert header["attack_evaluation"] is False
    assert header["feat_dim"] is None
    assert set(header["scores"]) == {"clean_top1", "images", "held_out"}
    card = (folder / "README.md").read_text()
    assert "Not for attack evaluation" in card
    assert "under attack | not measured" in card
    assert "0.485" in card


def test_the_cosine_head_becomes_s_times_unit_rows_without_bias(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**STANDARD, objective="that")
    export_run.export_run(run, output=tmp_path / "e", kind="torchvision", limit=2)
    tensors = load_file(tmp_path / "e" / "model.safetensors")
    head = open_run(run, RunFolder(run).config()).model.classifier
    assert isinstance(head, CosineClassifier)
    torch.testing.assert_close(tensors["fc.weight"].norm(dim=1), head.scale.detach().expand(10))
    cosine = torch.nn.functional.cosine_similarity(tensors["fc.weight"], head.weight.detach(), dim=1)
    torch.testing.assert_close(cosine, torch.ones(10))
    assert not tensors["fc.bias"].any()


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"stem": "small"}, "--stem imagenet"),
        ({"width": 32}, "--width 64"),
        ({"denoise": True}, "denoising"),
        ({"objective": "mbn"}, "mixture BN"),
    ],
)
def test_what_torchvision_does_not_have_is_refused_by_name(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], fragment: str
) -> None:
    run = make_run(**{"stem": "imagenet", "width": 64, "img_size": 32, **options})
    assert cli.run(["export", str(run), "--kind", "torchvision", "--output", str(tmp_path / "e")]) == 2
    assert fragment in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_the_two_kinds_are_not_taken_for_each_other(make_run: Any, tmp_path: Path) -> None:
    run = make_run(**STANDARD, objective="that")
    for kind in ("exact", "torchvision"):
        export_run.export_run(run, output=tmp_path / kind, kind=kind, limit=2)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="--kind exact"):
        read_export(tmp_path / "torchvision")
    with pytest.raises(CheckpointError, match="got an exact one"):
        read_torchvision(tmp_path / "exact")
    header = json.loads((tmp_path / "torchvision" / "model.json").read_text())
    for key, value in (("stem", "small"), ("width", 32), ("denoise", True), ("mixture_bn", True)):
        (tmp_path / "torchvision" / "model.json").write_text(json.dumps(header | {key: value}))
        with pytest.raises(CheckpointError, match=key):
            read_torchvision(tmp_path / "torchvision")


def test_other_predictions_are_not_kept(make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(**STANDARD, objective="that")
    export_run.export_run(run, output=tmp_path / "e", kind="torchvision", limit=2)
    exported, _ = read_torchvision(tmp_path / "e")
    with torch.no_grad():
        exported.classifier.weight.copy_(exported.classifier.weight.roll(1, dims=0))
    with pytest.raises(CheckpointError, match=r"expected the run's predictions, got class \d instead of \d"):
        compare_predictions(open_run(run, RunFolder(run).config()), exported, torch.arange(5))


def test_a_writer_that_corrupts_a_tensor_is_caught(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = export_run.write_weights

    def corrupt(file: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        write(file, {**tensors, "fc.weight": tensors["fc.weight"].flip(0)}, *rest)

    monkeypatch.setattr(export_run, "write_weights", corrupt)
    run = make_run(**STANDARD)
    assert cli.run(["export", str(run), "--kind", "torchvision", "--output", str(tmp_path / "e"), "--limit", "2"]) == 4
    assert "fc.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
