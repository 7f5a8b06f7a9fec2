"""Files of weights: told by names and shapes, equal to the network they came from, refused with the reason."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fasttht import subject_file
from fasttht.cli import run
from fasttht.errors import CheckpointError, UsageError
from fasttht.models.initial import read_network
from fasttht.models.resnet import ARCHS
from fasttht.models.two_head import MEAN, STD, TwoHead
from fasttht.subject import images
from fasttht.subject_file import network_of, open_subject

pytestmark = pytest.mark.changes_rng


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def network(arch: str = "resnet18", num_classes: int = 10, **options: Any) -> TwoHead:
    """A network none of whose parts is an identity."""
    settings = {"stem": "small", "width": 4, "feat_dim": None, "classifier": "linear"} | options
    model = TwoHead(arch, num_classes, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.trunk.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.3, generator=generator)
    return model


def tensors(model: TwoHead) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def published(model: TwoHead, prefix: str = "") -> dict[str, Tensor]:
    """The network's tensors by torchvision's names."""
    return {
        prefix + name.removeprefix("trunk.").replace("classifier.", "fc."): tensor
        for name, tensor in tensors(model).items()
    }


def write_torch(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


def tree(path: Path, classes: int = 3, side: int = 40, each: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            (path / split / f"c{label}").mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / f"c{label}" / f"{i}.png")
    return path


@pytest.mark.parametrize("arch", list(ARCHS))
def test_the_architecture_is_told_by_names_and_shapes(arch: str) -> None:
    model = network(arch, 7)
    found, is_ = network_of(tensors(model), Path("file"))
    assert (is_["arch"], is_["stem"], is_["width"], is_["classifier"]) == (arch, "small", 4, "linear")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(found.eval().logits(x), model.logits(x))


@pytest.mark.parametrize(
    "options",
    [
        {"classifier": "cosine", "feat_dim": 5},
        {"denoise": True},
        {"mixture_bn": True},
        {"stem": "imagenet", "width": 6},
    ],
    ids=str,
)
def test_what_only_ours_have_is_told_too(options: dict[str, Any]) -> None:
    model = network(**options)
    found, is_ = network_of(tensors(model), Path("file"))
    assert {name: is_[name] for name in options if name != "mixture_bn"} == {
        name: value for name, value in options.items() if name != "mixture_bn"
    }
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.eval().logits(x), model.logits(x))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("form", ["safetensors", "pth", "state_dict", "model"])
def test_files_of_all_forms_hold_the_same_network(tmp_path: Path, form: str, prefix: str) -> None:
    model = network()
    state, path = published(model, prefix), tmp_path / "weights"
    if form == "safetensors":
        save_file(state, path)
    else:
        write_torch(path, state if form == "pth" else {form: state, "epoch": 3})
    subject = open_subject(path, {"eps": 0.1})
    assert subject.config.attack.eps == 0.1
    assert (subject.config.data.img_size, subject.config.data.crop_pct) == (8, 1.0)
    found = subject.model.state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    (batch,) = images(subject, "val", torch.tensor([3, 5]))
    assert tuple(batch.x.shape) == (2, 3, 8, 8)
    assert batch.index.tolist() == [3, 5]


def test_torchvisions_network_is_right_where_it_says_so(tmp_path: Path, torchvision: ModuleType) -> None:
    """Its own forward on normalised pixels is the oracle; the images are of another size, so they are cut as well."""
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    write_torch(tmp_path / "their.pth", theirs.state_dict())
    options = {"data": tree(tmp_path / "tree"), "img_size": 32, "crop_pct": 0.8, "eps": 4 / 255}
    subject = open_subject(tmp_path / "their.pth", options)
    assert subject.config.model.arch == "resnet18"
    (batch,) = images(subject)
    x = (batch.x.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert tuple(x.shape) == (12, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(subject.model.eval().logits(batch.x.float() / 255), theirs(x), rtol=1e-4, atol=1e-5)
    words = ["eval", str(tmp_path / "their.pth"), "--data", str(tmp_path / "tree"), "--img-size", "32", "--crop-pct",
             "0.8", "--eps", "4/255", "--eval-steps", "1", "--per-image", str(tmp_path / "hits.npz"), "--alarms", "off",
             "--losses", "ce", "dlr"]  # fmt: skip
    assert run(words) == 0
    with np.load(tmp_path / "hits.npz") as hits, torch.no_grad():
        assert (hits["clean"] == (theirs(x).argmax(dim=1) == batch.y).numpy()).all()
        assert sorted(hits) == ["clean", "pgd1", "pgd1_dlr"]


def test_what_a_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    save_file(tensors(network()), tmp_path / "w")
    with pytest.raises(UsageError, match="--eps: expected a radius beside"):
        open_subject(tmp_path / "w")
    with pytest.raises(UsageError, match="--checkpoint: expected it with a run folder, got best and"):
        open_subject(tmp_path / "w", {"eps": 0.1}, which="best")
    save_file(tensors(network(num_classes=3)), tmp_path / "three")
    with pytest.raises(UsageError, match=r"--data: expected a folder with images of 3 classes.*digits have 10"):
        open_subject(tmp_path / "three", {"eps": 0.1})
    data = tree(tmp_path / "tree")
    with pytest.raises(UsageError, match="--img-size: expected the side of the images"):
        open_subject(tmp_path / "three", {"eps": 0.1, "data": data})
    assert open_subject(tmp_path / "three", {"eps": 0.1, "data": data, "img_size": 16}).config.data.img_size == 16
    save_file(tensors(network(num_classes=3, stem="imagenet")), tmp_path / "usual")
    subject = open_subject(tmp_path / "usual", {"eps": 3.0, "norm": "l2", "data": data})
    assert (subject.config.data.img_size, subject.config.attack.norm, subject.config.attack.targeted) == (
        224, "l2", False,
    )  # fmt: skip


def edited(model: TwoHead, **changes: Tensor | None) -> dict[str, Tensor]:
    found = published(model) | {name.replace("__", "."): t for name, t in changes.items() if t is not None}
    return {name: t for name, t in found.items() if changes.get(name.replace(".", "__"), t) is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer1__0__conv1__weight": torch.zeros(8, 4, 3, 3)}, "expected layer1.0.conv1.weight with shape .*wide"),
        ({"layer2__0__bn1__weight": None}, "expected layer2.0.bn1.weight with shape .* got no such tensor"),
        ({"extra": torch.zeros(1)}, "expected extra with no such tensor"),
        ({"fc__weight": None}, "expected a network with a first convolution"),
        ({"conv1__weight": None}, "expected a ResNet with torchvision's names or ours"),
        ({"layer4__2__conv1__weight": torch.zeros(1)}, "got basic blocks in stages of 2 2 2 3"),
        ({"fc__bias": torch.full((10,), torch.nan)}, "expected finite numbers in classifier.bias"),
    ],
    ids=str,
)
def test_other_networks_are_refused_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    save_file(edited(network(), **change), tmp_path / "w")
    with pytest.raises(CheckpointError, match=words):
        network_of(read_network(tmp_path / "w"), tmp_path / "w")
    assert run(["eval", str(tmp_path / "w"), "--eps", "0.1"]) == 4
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv1.weight": torch.zeros(60_000, 1, 3, 3)}, r"expected classifier.weight with shape \(10, 480000\)"),
        ({"conv1.weight": torch.zeros(60_000, 0, 3, 3)}, "heads with weights"),
        ({"conv1.weight": torch.zeros(2**40, 0, 3, 3), "fc.weight": torch.zeros(10, 4)}, "heads with weights"),
        ({"fc.weight": torch.zeros(2**50, 0)}, "heads with weights"),
        ({"fc.weight": torch.zeros(10, 32).as_strided((2**57, 32), (0, 0))}, "shapes that none has"),
        ({"fc.weight": torch.zeros(1, 1).expand(10, 32)}, "expected 320 numbers in classifier.weight, got fewer"),
        ({"fc.weight": torch.zeros(1, 1).expand(10**9, 32)}, r"expected classifier.bias with shape \(1000000000,\)"),
        ({"feature_head.2.weight": torch.zeros(())}, "heads with weights"),
    ],
    ids=range(8),
)
def test_a_small_file_of_large_shapes_allocates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Tensor], words: str
) -> None:
    weights = {
        "trunk." + name if name[0] == "c" else name.replace("fc.", "classifier."): t for name, t in changes.items()
    }
    found = tensors(network()) | weights

    def build(*args: Any, **options: Any) -> TwoHead:
        assert torch.get_default_device().type == "meta", "it is allocated"
        return TwoHead(*args, **options)

    monkeypatch.setattr(subject_file, "TwoHead", build)
    with pytest.raises(CheckpointError, match=words) as error:
        network_of(read_network(write_torch(tmp_path / "w.pth", found)), tmp_path / "w.pth")
    assert "\n" not in str(error.value)
    assert (tmp_path / "w.pth").stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["text", "--eps", "0.1"], 4, "expected a safetensors file"),
        (["folder"], 4, "expected a run folder with config.toml, an exported folder"),
        (["nowhere"], 4, "got nothing there"),
        (["weights", "--eps", "0.1", "--data", "folder"], 3, "folder"),
        (["weights", "--eps", "0.1", "--data", "nowhere"], 3, "nowhere"),
        (["weights", "--eps", "0.1", "--data", "tree"], 4, "expected data of 10 classes"),
        (["weights", "--eps", "16"], 2, "--eps"),
        (["weights", "--eps", "0.1", "--suites", "autoatack"], 2, "autoattack"),
        (["weights", "--eps", "0.1", "--limit", "0"], 2, "--limit"),
        (["weights", "--eps", "0.1", "--csv", "nowhere/rows.csv"], 6, "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_ends_in_one_line_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(published(network()), "weights")
    Path("text").write_text("no tensors")
    Path("folder").mkdir()
    tree(Path("tree"), each=1)
    assert run(["eval", *words]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_an_export_says_itself_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads exports is stood in for: here is only what becomes of what it returns."""
    model = network(classifier="cosine", feat_dim=6)
    header = {
        "arch": "resnet18", "stem": "small", "width": 4, "classifier": "cosine", "feat_dim": 6, "num_classes": 10,
        "img_size": 8, "crop_pct": 0.9, "denoise": False, "mixture_bn": False, "norm": "l2", "eps": 0.7,
    }  # fmt: skip
    monkeypatch.setattr("fasttht.subject_file.read_export", lambda path: (model, header))
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        subject = open_subject(path)
        attack, data = subject.config.attack, subject.config.data
        assert (attack.norm, attack.eps, data.img_size, data.crop_pct) == ("l2", 0.7, 8, 0.9)
        assert (subject.config.model.classifier, subject.weights) == ("cosine", "model")
        assert subject.model is model
    changed = open_subject(tmp_path, {"norm": "linf", "crop_pct": 1.0})
    assert (changed.config.attack.norm, changed.config.attack.eps) == ("linf", 16 / 255)
    assert changed.config.data.crop_pct == 1.0
