"""`--init`: a trunk strictly, heads where they fit, one line that says which, and nothing after the first step."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht.build import build_state
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import CheckpointError, UsageError
from fasttht.models.initial import load_initial_
from fasttht.models.two_head import CosineClassifier, TwoHead
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import resolve
from fasttht.train import Trainer

pytestmark = pytest.mark.changes_rng  # networks are initialised from the global generator


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(seed: int = 0, *, classes: int = 5, **options: Any) -> TwoHead:
    torch.manual_seed(seed)
    return TwoHead("resnet18", classes, **{"stem": "small", "width": 4, "feat_dim": 6, **options})


def stirred(model: TwoHead, seed: int = 9) -> TwoHead:
    """The same network with every number drawn anew, so that equality means it was copied."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 1 if tensor.is_floating_point() else tensor + 3)
    return model


def published(model: TwoHead) -> dict[str, Tensor]:
    """The tensors by torchvision's names, without what torchvision does not have."""
    names = {"trunk.": "", "classifier.": "fc."}
    return {
        names[prefix] + name.removeprefix(prefix): tensor.contiguous()
        for prefix in names
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }


def assert_trunk(model: TwoHead, source: TwoHead) -> None:
    for name, tensor in model.trunk.state_dict().items():
        assert torch.equal(tensor, source.trunk.state_dict()[name]), name


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "model", "module."])
def test_torchvision_names_in_a_torch_file(wrapped: str, tmp_path: Path) -> None:
    source = stirred(tiny(classifier="linear", feat_dim=None))
    state: Any = published(source)
    if wrapped == "module.":
        state = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    elif wrapped != "bare":
        state = {wrapped: state}
    torch.save(state, tmp_path / "net.pth")
    linear, cosine = tiny(1, classifier="linear"), tiny(1, classifier="cosine")
    said = [load_initial_(model, tmp_path / "net.pth") for model in (linear, cosine)]
    for model in (linear, cosine):
        assert_trunk(model, source)
    assert isinstance(source.classifier, nn.Linear)
    assert isinstance(linear.classifier, nn.Linear)
    assert isinstance(cosine.classifier, CosineClassifier)
    assert torch.equal(linear.classifier.weight, source.classifier.weight)
    assert torch.equal(linear.classifier.bias, source.classifier.bias)
    assert torch.equal(cosine.classifier.weight, F.normalize(source.classifier.weight, dim=1))
    assert float(cosine.classifier.scale.detach()) == 16
    for line in said:
        assert line.startswith(f"initial weights of {tmp_path / 'net.pth'}: trunk, classifier, ")
        assert line.endswith(", but not the feature head (the file has none)")


def test_torchvisions_own_network_is_taken_and_computes_what_it_did(torchvision: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    model = tiny(stem="imagenet", width=64, classifier="linear", feat_dim=None).eval()
    load_initial_(model, tmp_path / "resnet18.pth")
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.logits(x), theirs(model.normalize(x)), rtol=1e-4, atol=1e-5)


def test_a_safetensors_file_of_ours_is_taken_with_every_head_that_fits(tmp_path: Path) -> None:
    source = stirred(tiny())
    save_file({name: t.contiguous() for name, t in source.state_dict().items()}, tmp_path / "f.safetensors")
    model = tiny(1)
    assert load_initial_(model, tmp_path / "f.safetensors").endswith(": trunk, classifier, feature head")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": 7}, r"not the classifier \(the file's is of 5x32, f's of 7x32\)"),
        ({"classifier": "linear"}, r"not the classifier \(the file's is a cosine classifier, f's a linear one\)"),
        ({"feat_dim": 8}, r"not the feature head \(the file's is of another shape\)"),
    ],
)
def test_a_head_that_does_not_fit_stays_fresh_and_is_named(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = stirred(tiny())
    save_file({name: t.contiguous() for name, t in source.state_dict().items()}, tmp_path / "f.safetensors")
    model, fresh = tiny(1, **options), tiny(1, **options)
    assert re.search(said, load_initial_(model, tmp_path / "f.safetensors"))
    assert_trunk(model, source)
    head = "feature_head" if "feat_dim" in options else "classifier"
    for name, tensor in model.state_dict().items():
        if name.startswith(head):
            assert torch.equal(tensor, fresh.state_dict()[name])


def test_both_branches_of_mixture_bn_start_from_an_ordinary_network(tmp_path: Path) -> None:
    source = stirred(tiny(classifier="linear", feat_dim=None))
    torch.save(published(source), tmp_path / "net.pth")
    model = tiny(1, classifier="linear", feat_dim=None, mixture_bn=True)
    load_initial_(model, tmp_path / "net.pth")
    plain = source.trunk.state_dict()
    for name, tensor in model.trunk.state_dict().items():
        assert torch.equal(tensor, plain[name.replace(".clean.", ".").replace(".adversarial.", ".")]), name


def broken(change: Any) -> dict[str, Tensor]:
    state = published(stirred(tiny(classifier="linear", feat_dim=None)))
    change(state)
    return state


REFUSED: list[tuple[Any, str]] = [
    (lambda s: s.pop("layer2.0.conv1.weight"), r"trunk\.layer2\.0\.conv1\.weight of shape .* got no such tensor"),
    (lambda s: s.update({"layer9.conv": torch.ones(2)}), r"f's trunk only, got trunk\.layer9\.conv as well"),
    (lambda s: s.update({"bn1.bias": torch.ones(5)}), r"trunk\.bn1\.bias of shape \(4,\), got \(5,\) float32"),
    (lambda s: s.update({"bn1.bias": torch.ones(4, dtype=torch.int64)}), r"got \(4,\) int64"),
    (lambda s: s["bn1.bias"].fill_(float("nan")), "finite numbers in trunk.bn1.bias"),
    (lambda s: s.pop("conv1.weight"), "a ResNet with torchvision's names or ours"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_a_trunk_that_differs_is_refused_and_f_stays_as_it_was(change: Any, said: str, tmp_path: Path) -> None:
    torch.save(broken(change), tmp_path / "net.pth")
    model, fresh = tiny(1), tiny(1)
    with pytest.raises(CheckpointError, match=said):
        load_initial_(model, tmp_path / "net.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])


def test_batch_counters_may_be_missing_as_in_old_files(tmp_path: Path) -> None:
    state = broken(lambda s: [s.pop(name) for name in list(s) if name.endswith("num_batches_tracked")])
    torch.save(state, tmp_path / "net.pth")
    assert "trunk, classifier" in load_initial_(tiny(1), tmp_path / "net.pth")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_a_file_that_could_run_code_is_refused_and_none_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": Harmful()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_initial_(tiny(), tmp_path / "net.pth")
    assert capsys.readouterr().out == ""


def test_what_is_not_there_and_what_is_no_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--init: expected a run folder, .* not there"):
        load_initial_(tiny(), tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="expected a run folder with a checkpoint"):
        load_initial_(tiny(), tmp_path)
    torch.save({"state_dict": [1, 2]}, tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        load_initial_(tiny(), tmp_path / "list.pth")


TINY: dict[str, Any] = {
    "width": 4, "batch_size": 400, "epochs": 1, "eval_steps": [1], "bank_size": 100, "steps": 1, "log_interval": 1,
}  # fmt: skip


def config_of(output: Path, **options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), **TINY, **options, "output": str(output)}, where="test"))


def test_a_run_starts_from_another_ones_folder_and_resumes_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """f, g and the moving average start there; it is a part of the run's identity."""
    Trainer(
        config_of(tmp_path / "clean", objective="clean", classifier="cosine", model_ema=True, warmup_epochs=0)
    ).fit()
    options = {"init": str(tmp_path / "clean"), "model_ema": True, "seed": 1}
    config = config_of(tmp_path / "run", **options)
    state = build_state(config, open_splits(None), torch.device("cpu"), 3)
    from fasttht import checkpoint

    newest = checkpoint.newest(tmp_path / "clean", checkpoint.refuse)
    assert newest is not None
    source = checkpoint.read_tensors(newest / "ema.safetensors")  # what a run with an average is evaluated by
    assert state.ema is not None
    assert state.clean_encoder is not None
    for name, tensor in source.items():
        assert torch.equal(state.model.state_dict()[name], tensor), name
        assert torch.equal(state.ema.state_dict()[name], tensor), name
        if name.startswith("trunk."):
            assert torch.equal(state.clean_encoder.state_dict()[name], tensor), name
    assert Trainer(config).fit(stop_at=1) is None
    out = capsys.readouterr().out
    assert "trunk, classifier, but not the feature head (the file has none)" in out.replace("\n", " ")
    (tmp_path / "clean").rename(tmp_path / "gone")
    second = Trainer(config_of(tmp_path / "run", **options))
    assert second.resumed
    assert second.fit() is not None
    assert "initial weights" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"init .*clean \(now None\)"):
        Trainer(config_of(tmp_path / "run", model_ema=True, seed=1))
