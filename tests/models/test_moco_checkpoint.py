"""Published MoCo v2 files: taken whole and exactly, refused in one sentence otherwise, and never run."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttht.errors import CheckpointError
from fasttht.models.clean_encoder import load_frozen
from fasttht.models.two_head import TwoHead

State = OrderedDict[str, Tensor]


@pytest.fixture(autouse=True)
def _keep_rng() -> Iterator[None]:
    """Initial weights come from the global generator: it is seeded here and restored behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def released(torchvision: ModuleType, arch: str, *, prefix: str = "module.encoder_q.", dim: int = 128) -> State:
    """The names and shapes of a released file, from torchvision's network and the published projection.

    Each tensor is one distinct number, stored once, so that a file of a whole ResNet-50 is small.
    """
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
    features = shapes.pop("fc.weight")[0][1]
    del shapes["fc.bias"]
    real = torch.float32
    shapes["fc.0.weight"], shapes["fc.0.bias"] = (
        (torch.Size((features, features)), real),
        (torch.Size((features,)), real),
    )
    shapes["fc.2.weight"], shapes["fc.2.bias"] = (torch.Size((dim, features)), real), (torch.Size((dim,)), real)
    return OrderedDict(
        (prefix + name, torch.full((1,), i + 1, dtype=dtype).expand(shape) if shape else torch.tensor(i + 1))
        for i, (name, (shape, dtype)) in enumerate(shapes.items())
    )


def tiny(**options: Any) -> TwoHead:
    defaults: dict[str, Any] = {"stem": "imagenet", "width": 4, "feat_dim": 6}
    return TwoHead("resnet18", 5, **{**defaults, **options})


def published(model: TwoHead, prefix: str = "module.encoder_q.") -> State:
    """A small network's tensors under published names, each with its own random values."""
    generator = torch.Generator().manual_seed(1)
    found: State = OrderedDict()
    for name, tensor in model.state_dict().items():
        head, rest = name.split(".", 1)
        if head == "classifier":
            continue
        value = torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 7
        found[prefix + (rest if head == "trunk" else f"fc.{rest}")] = value
    return found


def write(path: Path, state: Any, arch: str | None = "resnet18", **options: Any) -> Path:
    extra = {} if arch is None else {"arch": arch, "epoch": 200}
    torch.save({**extra, "state_dict": state}, path, **options)
    return path


@pytest.mark.parametrize("arch", ["resnet50", "resnet101", "resnet152"])
def test_a_file_with_the_released_names_and_shapes_is_taken_whole(
    arch: str, torchvision: ModuleType, tmp_path: Path
) -> None:
    state = released(torchvision, arch)
    path = write(tmp_path / "moco_v2_800ep_pretrain.pth.tar", state, arch)
    with torch.device("meta"):
        model = TwoHead(arch, 1000)
    encoder = load_frozen(model.to_empty(device="cpu"), path, arch)
    own = encoder.state_dict()
    names = {name: f"module.encoder_q.{name.removeprefix('trunk.').replace('feature_head', 'fc')}" for name in own}
    assert sorted(names.values()) == sorted(state)
    for name, tensor in own.items():
        theirs = state[names[name]]
        assert tensor.shape == theirs.shape
        assert bool((tensor == theirs.flatten()[0]).all()), name
    assert encoder.frozen
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("prefix", ["module.encoder_q.", "encoder_q."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_features_are_those_of_the_published_network(prefix: str, zipped: bool, tmp_path: Path) -> None:
    """Computed by hand from the file: normalised pixels, trunk, Linear, ReLU, Linear, unit norm."""
    state = published(tiny(), prefix)
    path = write(tmp_path / "g.pth", state, _use_new_zipfile_serialization=zipped)
    encoder = load_frozen(tiny(), path)
    x = torch.rand(3, 3, 32, 32)
    found = encoder(x)
    shift = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    h = encoder.trunk((x - shift) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
    hidden = (h @ state[f"{prefix}fc.0.weight"].T + state[f"{prefix}fc.0.bias"]).clamp(min=0)
    feat = hidden @ state[f"{prefix}fc.2.weight"].T + state[f"{prefix}fc.2.bias"]
    torch.testing.assert_close(found, feat / feat.norm(dim=1, keepdim=True))
    assert torch.equal(encoder.trunk.conv1.weight, state[f"{prefix}conv1.weight"])


def test_own_runs_checkpoint_keeps_the_query_encoder_and_leaves_the_rest(tmp_path: Path) -> None:
    state = published(tiny())
    plain = load_frozen(tiny(), write(tmp_path / "plain.pth", state)).state_dict()
    state.update({name.replace("encoder_q", "encoder_k"): tensor + 1 for name, tensor in published(tiny()).items()})
    state["module.queue"], state["module.queue_ptr"] = torch.rand(6, 64), torch.zeros(1, dtype=torch.int64)
    whole = load_frozen(tiny(), write(tmp_path / "whole.pth", state)).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in whole.items())


def test_a_bare_state_dict_and_one_without_batch_counters_are_taken(tmp_path: Path) -> None:
    state = published(tiny())
    without = OrderedDict((name, t) for name, t in state.items() if not name.endswith("num_batches_tracked"))
    assert len(without) < len(state)
    torch.save(without, tmp_path / "bare.pth")
    encoder = load_frozen(tiny(), tmp_path / "bare.pth")
    assert torch.equal(encoder.trunk.bn1.running_mean, state["module.encoder_q.bn1.running_mean"])
    assert int(encoder.trunk.bn1.num_batches_tracked) == 0


def test_what_a_file_is_stands_in_its_bytes_not_in_its_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny()
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("classifier.")}
    save_file(own, tmp_path / "ours.pth.tar")
    write(tmp_path / "theirs.safetensors", published(model))
    assert torch.equal(load_frozen(tiny(), tmp_path / "ours.pth.tar").trunk.conv1.weight, own["trunk.conv1.weight"])
    theirs = load_frozen(tiny(), tmp_path / "theirs.safetensors")
    assert torch.equal(theirs.trunk.conv1.weight, published(model)["module.encoder_q.conv1.weight"])


def edited(state: State, drop: str | None = None, **add: Tensor) -> State:
    found: State = OrderedDict((name, t) for name, t in state.items() if drop is None or drop not in name)
    found.update({f"module.{name.replace('__', '.')}": tensor for name, tensor in add.items()})
    return found


REFUSALS: dict[str, tuple[Any, str]] = {
    "MoCo v1": (
        lambda s: edited(s, ".fc.", encoder_q__fc__weight=torch.rand(6, 32), encoder_q__fc__bias=torch.rand(6)),
        r"expected a MoCo v2 checkpoint .*got encoder_q\.fc\.weight of shape \(6, 32\).*v1",
    ),
    "no projection": (lambda s: edited(s, ".fc."), r"expected a projection in encoder_q\.fc\.0 and fc\.2, got none"),
    "half a projection": (lambda s: edited(s, "fc.2.bias"), r"got no encoder_q\.fc\.2\.bias"),
    "a missing weight": (lambda s: edited(s, "layer3.0.conv2"), r"got no encoder_q\.layer3\.0\.conv2\.weight"),
    "a missing statistic": (lambda s: edited(s, "layer1.1.bn1.running_var"), r"layer1\.1\.bn1\.running_var"),
    "an extra weight": (
        lambda s: edited(s, encoder_q__layer1__2__conv1__weight=torch.rand(4, 4, 3, 3)),
        r"got also encoder_q\.layer1\.2\.conv1\.weight",
    ),
    "a foreign name": (lambda s: edited(s, predictor__weight=torch.rand(2)), r"got module\.predictor\.weight as well"),
    "a wrong shape": (
        lambda s: edited(s, encoder_q__conv1__weight=torch.rand(4, 3, 3, 3)),
        r"expected encoder_q\.conv1\.weight of shape \(4, 3, 7, 7\), got \(4, 3, 3, 3\)",
    ),
    "a NaN": (
        lambda s: edited(s, encoder_q__bn1__bias=torch.full((4,), float("nan"))),
        r"finite numbers in encoder_q\.bn1\.bias",
    ),
    "whole numbers": (
        lambda s: edited(s, encoder_q__bn1__bias=torch.zeros(4, dtype=torch.int64)), r"bn1\.bias .*int64",
    ),
    "a supervised network": (
        lambda s: OrderedDict((n.removeprefix("module.encoder_q."), t) for n, t in edited(s, ".fc.").items())
        | {"fc.weight": torch.rand(1000, 32), "fc.bias": torch.rand(1000)},
        r"got a plain ResNet \(.*\); THAT needs the projection",
    ),
    "nothing": (lambda s: OrderedDict(), r"expected a MoCo v2 checkpoint with encoder_q\.\*, got nothing"),
    "other things": (lambda s: {"a": torch.rand(1), "b": 3}, r"got a, b"),
    "no names": (lambda s: [torch.rand(1)], r"expected a state_dict of names and tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_moco_v2_encoder_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, expected = REFUSALS[case]
    path = write(tmp_path / "g.pth", change(published(tiny())))
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_frozen(tiny(), path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_another_architecture_width_or_stem_is_refused(torchvision: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "g.pth", released(torchvision, "resnet18"), "resnet18")
    with pytest.raises(CheckpointError, match="expected a clean encoder of --arch resnet34, got one of resnet18"):
        load_frozen(tiny(), path, "resnet34")
    with torch.device("meta"):
        wide, deep, small = (
            TwoHead("resnet18", 5, width=32),
            TwoHead("resnet34", 5),
            TwoHead("resnet18", 5, stem="small"),
        )
    for model, words in (
        (wide, r"\(32, 3, 7, 7\), got \(64, 3, 7, 7\)"),
        (deep, r"got no encoder_q\.layer1\.2"),
        (small, r"\(64, 3, 3, 3\), got \(64, 3, 7, 7\)"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_frozen(model.to_empty(device="cpu"), path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, zipped: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "g.pth", published(tiny()), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"expected a whole file of torch\.save"):
        load_frozen(tiny(), path)


class Executes:
    """Asks its reader to make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(place: str, zipped: bool, tmp_path: Path) -> None:
    trap = Executes(tmp_path / "executed")
    state: Any = published(tiny())
    if place == "inside":
        state["module.encoder_q.conv1.weight"] = trap
    extra = {"args": trap} if place == "beside" else {}
    torch.save({"arch": "resnet18", "state_dict": state, **extra}, tmp_path / "g.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.mkdir, which could run code; nothing was run"):
        load_frozen(tiny(), tmp_path / "g.pth")
    assert not (tmp_path / "executed").exists()


def test_the_trap_of_that_test_would_have_sprung(tmp_path: Path) -> None:
    torch.save({"args": Executes(tmp_path / "executed")}, tmp_path / "g.pth")
    torch.load(tmp_path / "g.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write(tmp_path / "g.pth", edited(published(tiny()), "fc.2.bias"))
    with pytest.raises(CheckpointError):
        load_frozen(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
