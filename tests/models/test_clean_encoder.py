"""The clean encoder: no gradient, frozen or following, and loaded only from weights that fit."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fasttht import checkpoint
from fasttht.errors import CheckpointError
from fasttht.models.clean_encoder import CleanEncoder, lerp_, load_frozen
from fasttht.models.two_head import TwoHead


@pytest.fixture(autouse=True)
def _keep_rng() -> Iterator[None]:
    """Initial weights come from the global generator: it is seeded here and restored behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def network(**options: Any) -> TwoHead:
    defaults: dict[str, Any] = {"stem": "small", "width": 4, "feat_dim": 6}
    model = TwoHead("resnet18", 5, **{**defaults, **options})
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def encoder_part(model: TwoHead) -> dict[str, Tensor]:
    """What a clean encoder holds of a robust one: everything but the classifier."""
    return {name: tensor for name, tensor in snapshot(model).items() if not name.startswith("classifier.")}


@pytest.mark.parametrize("frozen", [True, False])
def test_no_gradient_reaches_the_encoder_or_passes_it(frozen: bool) -> None:
    encoder = CleanEncoder(network(), frozen=frozen)
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    feat = encoder(x)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not feat.requires_grad
    assert torch.is_grad_enabled()
    torch.testing.assert_close(feat.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("frozen", [True, False])
def test_encoder_starts_as_a_copy_that_shares_nothing(frozen: bool) -> None:
    model = network()
    encoder = CleanEncoder(model, frozen=frozen)
    model.train(not frozen)
    x, before = torch.rand(4, 3, 8, 8), snapshot(encoder)
    assert set(before) == set(encoder_part(model))
    feat = model(x).feat
    assert feat is not None
    if frozen:
        assert torch.equal(encoder(x), feat)
    of_f = {name: model.state_dict()[name] for name in before}
    assert changed(encoder, of_f) <= {name for name in before if is_statistic(name)}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert changed(encoder, before) == set()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_encoder_is_in_evaluation_mode_and_keeps_its_statistics() -> None:
    encoder = CleanEncoder(network().train(), frozen=True)
    before = snapshot(encoder)
    assert not any(module.training for module in encoder.modules())
    one = encoder(torch.rand(4, 3, 8, 8))
    assert changed(encoder, before) == set()
    assert one.shape == (4, 6)


def test_frozen_features_of_an_image_do_not_depend_on_its_batch() -> None:
    encoder = CleanEncoder(network(), frozen=True).double()
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([encoder(x[:1]), encoder(x[1:])]), encoder(x), rtol=1e-10, atol=1e-12)


def test_momentum_encoder_normalises_with_the_batch_and_updates_its_own_statistics() -> None:
    encoder = CleanEncoder(network().eval(), frozen=False)
    before = snapshot(encoder)
    assert all(module.training for module in encoder.modules())
    encoder(torch.rand(4, 3, 8, 8))
    assert changed(encoder, before) == {name for name in before if is_statistic(name)}


def test_following_moves_every_parameter_by_the_rate_and_nothing_else() -> None:
    model = network()
    encoder = CleanEncoder(model, frozen=False).double()
    model = network().double()  # with other weights
    theirs, before = encoder_part(model), snapshot(encoder)
    encoder.follow_(model, torch.tensor(0.25))
    assert encoder_part(model).keys() == before.keys()
    for name, tensor in encoder.state_dict().items():
        if is_statistic(name):
            assert torch.equal(tensor, before[name])
        else:
            expected = 0.75 * before[name] + 0.25 * theirs[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-15)
            assert not torch.equal(tensor, before[name])
    assert changed(model, {**snapshot(model), **theirs}) == set()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_following_at_rate_zero_leaves_everything_and_at_one_copies(dtype: torch.dtype) -> None:
    encoder = CleanEncoder(network(), frozen=False).to(dtype)
    model = network().to(dtype)
    before = snapshot(encoder)
    encoder.follow_(model, torch.tensor(0.0))
    assert changed(encoder, before) == set()
    encoder.follow_(model, torch.tensor(1.0))
    for own, theirs in zip(encoder.parameters(), [*model.trunk.parameters(), *_head(model)], strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6)


def _head(model: TwoHead) -> list[nn.Parameter]:
    assert model.feature_head is not None
    return list(model.feature_head.parameters())


def test_lerp_writes_its_targets_in_place_and_leaves_its_sources() -> None:
    target, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    alias = target.view(2)
    lerp_([target], [source], torch.tensor(0.5))
    assert alias.tolist() == [2.0, 0.0]
    assert source.tolist() == [3.0, -2.0]


def test_model_without_a_feature_head_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a model with a feature head"):
        CleanEncoder(network(feat_dim=None), frozen=True)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A whole robust encoder, classifier included: what is superfluous does not matter."""
    path = tmp_path / "encoder.safetensors"
    save_file(snapshot(network()), path)
    return path


def test_frozen_encoder_has_the_weights_of_the_file(weights: Path) -> None:
    from safetensors.torch import load_file

    model = network()
    before = snapshot(model)
    encoder = load_frozen(model, weights)
    stored = load_file(weights)
    assert changed(encoder, stored) == set()
    assert changed(encoder, encoder_part(model)) != set()
    assert changed(model, before) == set()
    assert encoder.frozen
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "name",
    ["trunk.conv1.weight", "trunk.layer4.1.bn2.running_var", "feature_head.2.bias", "trunk.bn1.num_batches_tracked"],
)
def test_a_missing_tensor_is_refused_by_name(weights: Path, name: str) -> None:
    stored = encoder_part(network())
    del stored[name]
    save_file(stored, weights)
    with pytest.raises(CheckpointError, match=rf"expected {name} of shape .*, got no such tensor"):
        load_frozen(network(), weights)


@pytest.mark.parametrize("options", [{"width": 8}, {"stem": "imagenet"}, {"feat_dim": 7}], ids=str)
def test_a_tensor_of_another_shape_is_refused_by_name(weights: Path, options: dict[str, Any]) -> None:
    other = network(**options)
    stored, own = encoder_part(network()), encoder_part(other)
    first = next(name for name in own if own[name].shape != stored[name].shape)
    expected = rf"expected {first} of shape \({own[first].shape[0]}, .*\), got \({stored[first].shape[0]}, .*\)"
    if own[first].ndim == 1:
        expected = expected.replace(" .*", "")
    with pytest.raises(CheckpointError, match=expected):
        load_frozen(other, weights)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "weights.pt"
    text.write_text("not tensors")
    for path in (text, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=f"{path}: expected a safetensors file"):
            load_frozen(network(), path)


def test_a_run_folder_gives_its_clean_encoder_or_else_its_robust_one(tmp_path: Path) -> None:
    robust, clean = network(), network()
    checkpoint.save(tmp_path, 1, {"model": snapshot(robust)}, {}, keep=2)
    assert changed(load_frozen(network(), tmp_path), snapshot(robust)) == set()
    files = {"model": snapshot(robust), "clean_encoder": encoder_part(clean)}
    newest = checkpoint.save(tmp_path, 2, files, {}, keep=2)
    assert changed(load_frozen(network(), tmp_path), snapshot(clean)) == set()
    (newest / "clean_encoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="clean_encoder"):  # an older encoder is not what was asked for
        load_frozen(network(), tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a run folder with a checkpoint"):
        load_frozen(network(), tmp_path)


def test_a_refused_file_leaves_the_model_as_it_was(weights: Path) -> None:
    model = network(feat_dim=7)
    before = copy.deepcopy(snapshot(model))
    with pytest.raises(CheckpointError):
        load_frozen(model, weights)
    assert changed(model, before) == set()


def test_a_deeper_networks_weights_are_refused_and_not_cut(weights: Path) -> None:
    deeper = TwoHead("resnet34", 5, stem="small", width=4, feat_dim=6)
    save_file(snapshot(deeper), weights)
    with pytest.raises(
        CheckpointError, match=r"expected a clean encoder of the same --arch, got one with trunk\.layer"
    ):
        load_frozen(network(), weights)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(weights: Path, value: float) -> None:
    stored = encoder_part(network())
    stored["trunk.bn1.running_var"][1] = value
    save_file(stored, weights)
    with pytest.raises(CheckpointError, match=r"expected finite numbers in trunk\.bn1\.running_var"):
        load_frozen(network(), weights)
