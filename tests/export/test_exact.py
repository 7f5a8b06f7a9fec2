"""The exact export: the network as it is, for people with and without fasttht, kept only if it is the run's."""

from __future__ import annotations

import ast
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttht import checkpoint, cli, export_run
from fasttht.config_file import to_toml
from fasttht.errors import CheckpointError
from fasttht.export import read_export
from fasttht.export_check import chosen_rows, compare_exact
from fasttht.models import standalone
from fasttht.models.mixture_bn import through
from fasttht.models.resnet import ARCHS
from fasttht.pretrain_config import PretrainConfig, resolve_pretrain
from fasttht.run_folder import RunFolder
from fasttht.subject import open_run

# Both blocks, each stem, head and addition at least once; the depths are a table that is compared below.
KINDS: dict[str, dict[str, Any]] = {
    "ghost BN": {"bn_group_size": 8},
    "that": {"objective": "that", "feat_dim": 16},
    "cosine without a feature head": {"objective": "that-no-cl", "width": 5},
    "linear with a feature head": {"objective": "that-no-nce"},
    "denoising": {"denoise": True},
    "mixture": {"objective": "mbn", "stem": "imagenet", "img_size": 32},
    "both, deeper": {"objective": "mbn", "arch": "resnet50", "width": 2, "denoise": True},
}

READ_WITHOUT_US = """
import importlib.util, sys
sys.modules["fasttht"] = None  # from here on, importing it is an error
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
root, out = Path(sys.argv[1]), {}
x = load_file(root / "x.safetensors")
for folder in sorted(root.glob("export-*")):
    spec = importlib.util.spec_from_file_location("model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load()
    assert not model.training
    assert not [name for name in vars(module) if "fasttht" in name]
    state = torch.get_rng_state()
    with torch.no_grad():
        out[folder.name] = model(x[folder.name])
        if model.feature_head is not None:
            out[folder.name + " features"] = model.features(x[folder.name])
        model.set_branch("clean")
        out[folder.name + " clean"] = model(x[folder.name])
assert not [name for name in sys.modules if name.startswith("fasttht.")]
save_file(out, root / "out.safetensors")
"""


def test_every_network_gives_the_same_logits_with_and_without_us(make_run: Any, tmp_path: Path) -> None:
    images, expected = {}, {}
    generator = torch.Generator().manual_seed(0)
    for i, options in enumerate(KINDS.values()):
        run, folder = make_run(f"run-{i}", **options), tmp_path / f"export-{i:02d}"
        export_run.export_run(run, output=folder, limit=3)
        size = options.get("img_size", 8)
        x = torch.rand(4, 3, size, size, generator=generator)
        own = open_run(run, RunFolder(run).config()).model.eval()
        back, header = read_export(folder)
        assert not back.training
        assert header["step"] == 3
        with torch.no_grad():
            out = own(x)
            assert len(torch.unique(out.logits)) > 10
            torch.testing.assert_close(back.logits(x), out.logits, rtol=0, atol=1e-5)
            images[folder.name], expected[folder.name] = x, out.logits
            if out.feat is not None:
                expected[folder.name + " features"] = out.feat
            with through(own, "clean"):
                expected[folder.name + " clean"] = own.logits(x)
    mixed = f"export-{list(KINDS).index('mixture'):02d}"
    assert not torch.equal(expected[mixed], expected[mixed + " clean"]), "the branches differ"
    save_file(images, tmp_path / "x.safetensors")
    words = [sys.executable, "-I", "-B", "-c", READ_WITHOUT_US, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    assert sorted(found) == sorted(expected)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits.contiguous(), rtol=0, atol=1e-5, msg=name)


def test_the_wrapper_knows_the_same_networks_and_imports_torch_and_safetensors_only() -> None:
    assert standalone.BLOCKS == ARCHS
    found = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(Path(standalone.__file__).read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)])
        if isinstance(node, ast.Import | ast.ImportFrom) and name
    }
    assert found - sys.stdlib_module_names == {"torch", "safetensors"}


def test_a_run_is_exported_with_the_scores_of_its_own_evaluation(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(digits_cache))
    run = tmp_path / "run"
    options = ["--width", "4", "--replay", "2", "--epochs", "4", "--eval-steps", "10", "3", "--model-ema"]
    assert cli.run(["train", *options, "--output", str(run)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.run(["export", str(run)]) == 0, capsys.readouterr().err
    folder = run / "export" / "exact"
    assert {path: path.read_bytes() for path in before} == before
    files = {"model.safetensors", "model.json", "README.md", "model.py", "resnet18-that.json"}
    assert {path.name for path in folder.iterdir()} == files
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    header = json.loads((folder / "model.json").read_text())
    scores = header["scores"]
    assert (scores["clean_top1"], scores["pgd10_top1"]) == (final["clean_top1"], final["pgd10_top1"])
    assert scores["images"] == scores["held_out"] == 360
    assert header["run_scores"]["pgd3_top1"] == final["pgd3_top1"]
    assert header["weights"] == "ema"
    assert header["checks"]["max_logit_difference"] <= 1e-5
    card = (folder / "README.md").read_text()
    assert f"| {final['pgd10_top1']:.2f} | 360 |" in card
    assert f"| PGD-3 | {final['pgd3_top1']:.2f} | 360 |" in card
    assert "AutoAttack | not measured" in card
    assert str(tmp_path) not in card + json.dumps(header), "where a run lies is not published"
    info = json.loads((folder / "resnet18-that.json").read_text())
    assert info["clean_acc"] == f"{final['clean_top1']:.2f}"
    assert info["autoattack_acc"] is None
    assert info["eps"] == "0.15"
    assert os.stat(folder / "model.safetensors").st_mode & 0o777 == os.stat(folder / "model.json").st_mode & 0o777


def test_the_moving_average_is_what_is_exported(make_run: Any, tmp_path: Path) -> None:
    run = make_run(model_ema=True)
    export_run.export_run(run, output=tmp_path / "e", limit=2)
    model, header = read_export(tmp_path / "e")
    averaged = checkpoint.read_tensors(run / "checkpoints" / "step-00000003" / "ema.safetensors")
    raw = checkpoint.read_tensors(run / "checkpoints" / "step-00000003" / "model.safetensors")
    weight = model.trunk.conv1.weight.detach()
    assert header["weights"] == "ema"
    assert torch.equal(weight, averaged["trunk.conv1.weight"])
    assert not torch.equal(weight, raw["trunk.conv1.weight"])


def test_what_differs_when_read_back_is_not_kept(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = export_run.write_weights

    def corrupt(file: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        name = next(name for name in tensors if name.endswith("fc.weight") or name.endswith("classifier.weight"))
        write(file, {**tensors, name: tensors[name] + torch.eye(*tensors[name].shape)}, *rest)

    monkeypatch.setattr(export_run, "write_weights", corrupt)
    words = ["--output", str(tmp_path / "new" / "e"), "--limit", "2"]
    assert cli.run(["export", str(make_run()), *words]) == 4
    err = capsys.readouterr().err
    assert "classifier.weight" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_networks_that_answer_otherwise_are_told_apart(make_run: Any, tmp_path: Path) -> None:
    """The comparison by itself: logits, features, either branch of mixture BN, model.py and ONNX each by name."""
    run = make_run(objective="that")
    export_run.export_run(run, output=tmp_path / "e", limit=2)
    subject = open_run(run, RunFolder(run).config())
    rows = chosen_rows(360, 5)

    def compare(spoil: Any, onnx: Any = None) -> str:
        model, wrapper = read_export(tmp_path / "e")[0], standalone.load(tmp_path / "e")
        with torch.no_grad():
            spoil(model, wrapper)
        with pytest.raises(CheckpointError) as caught:
            compare_exact(subject, model, wrapper, onnx, rows)
        return str(caught.value)

    def raise_logit(model: Any, wrapper: Any) -> None:
        model.classifier.scale += 1e-3

    def turn_features(model: Any, wrapper: Any) -> None:
        model.feature_head[2].bias += 0.1

    def spoil_wrapper(model: Any, wrapper: Any) -> None:
        wrapper.classifier.scale += 1e-3

    def make_nan(model: Any, wrapper: Any) -> None:
        model.classifier.scale.fill_(torch.nan)

    assert "logits of model.safetensors within 1e-05" in compare(raise_logit)
    assert "features of model.safetensors" in compare(turn_features)
    assert "logits of model.py" in compare(spoil_wrapper)
    assert "nan" in compare(make_nan)
    untouched = lambda model, wrapper: None  # noqa: E731
    assert "logits of model.onnx" in compare(untouched, lambda x: subject.model.logits(x).detach() + 1e-2)
    assert "logits of model.onnx" in compare(untouched, lambda x: subject.model.logits(x).detach() * torch.nan)
    tally = compare_exact(subject, *_both(tmp_path / "e"), None, rows)
    assert (tally.images, tally.attacked_differ) == (5, 0)
    assert max(tally.logits, tally.wrapper) < 1e-5  # not 0: a CPU's sums may go by how memory is aligned

    mixed = make_run("mixed", objective="mbn")
    export_run.export_run(mixed, output=tmp_path / "m", limit=2)
    model, wrapper = _both(tmp_path / "m")
    with torch.no_grad():
        model.trunk.bn1.clean.weight += 0.1  # what attacks and accuracy never see
    with pytest.raises(CheckpointError, match=r"logits of model\.safetensors"):
        compare_exact(open_run(mixed, RunFolder(mixed).config()), model, wrapper, None, rows)


def _both(folder: Path) -> tuple[Any, Any]:
    return read_export(folder)[0], standalone.load(folder)


def test_a_full_disk_leaves_nothing(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, earlier = make_run(), tmp_path / "earlier"
    export_run.export_run(run, output=earlier, limit=2)
    kept = {path: path.read_bytes() for path in earlier.iterdir()}
    write = export_run.write_text

    def full(file: Path, text: str) -> None:
        if file.name == "README.md":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(file, text)

    monkeypatch.setattr(export_run, "write_text", full)
    for output, force in ((tmp_path / "new" / "e", []), (earlier, ["--force"])):
        assert cli.run(["export", str(run), "--output", str(output), "--limit", "2", *force]) == 6
        assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in earlier.iterdir()} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "run"]

    def no_room(*args: Any, **kwargs: Any) -> None:
        raise export_run.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_run, "write_text", write)
    monkeypatch.setattr(export_run, "save_file", no_room)
    assert cli.run(["export", str(run), "--output", str(tmp_path / "new")]) == 6
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_replaced_only_by_force_and_only_if_it_is_an_export(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output, theirs = make_run(), tmp_path / "e", tmp_path / "theirs"
    words = ["export", str(run), "--limit", "2", "--output"]
    assert cli.run([*words, str(output)]) == 0
    assert cli.run([*words, str(output), "--name", "second"]) == 2
    assert "there already" in capsys.readouterr().err
    assert cli.run([*words, str(output), "--name", "second", "--force"]) == 0
    assert (output / "second.json").exists()
    assert not (output / "resnet18-at.json").exists()
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    assert cli.run([*words, str(theirs), "--force"]) == 2
    assert "which is neither" in capsys.readouterr().err
    assert (theirs / "thesis.tex").read_text() == "years of work"
    (tmp_path / "k.partial").mkdir()  # as a killed export leaves it
    assert cli.run([*words, str(tmp_path / "k")]) == 2
    assert "killed" in capsys.readouterr().err
    assert cli.run([*words, str(tmp_path / "k"), "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "k", "run", "theirs"]


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        (["--kind", "torchvision", "--onnx"], 2, "--kind exact"),
        (["--name", "../up"], 2, "--name"),
        (["--name", "model"], 2, "--name"),
        (["--limit", "-1"], 2, "--limit"),
        (["--device", "tpu"], 2, "--device"),
    ],
)
def test_wrong_words(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, fragment: str
) -> None:
    assert cli.run(["export", str(make_run()), "--output", str(tmp_path / "e"), *words]) == code
    assert fragment in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_run_of_train_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pre").mkdir()
    (tmp_path / "pre" / "config.toml").write_text(to_toml(resolve_pretrain(PretrainConfig())))
    assert cli.run(["export", str(tmp_path / "pre")]) == 4
    assert "got one of `fasttht pretrain`" in capsys.readouterr().err
    assert cli.run(["export", str(tmp_path / "nothing")]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["pre"]


def test_rows_are_evenly_spaced() -> None:
    assert chosen_rows(10, 0).tolist() == chosen_rows(10, 99).tolist() == list(range(10))
    assert chosen_rows(10, 4).tolist() == [0, 2, 5, 7]
    gaps = np.diff(chosen_rows(360, 50).numpy())
    assert gaps.min() >= 7
    assert gaps.max() <= 8
