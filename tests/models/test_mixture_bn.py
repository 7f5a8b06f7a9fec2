"""Mixture BN: halves that never meet, two branches with everything of their own, one of them attacked and evaluated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fasttht.attacks.engine import EagerEngine, FoldedEngine, batch_statistics
from fasttht.attacks.pgd import evaluating, input_gradient
from fasttht.models.mixture_bn import MixtureBatchNorm2d, has_mixture_bn, norms, through
from fasttht.models.resnet import ResNet
from fasttht.models.two_head import TwoHead, decay_groups

pytestmark = pytest.mark.changes_rng  # networks are initialised from the global generator


def network() -> TwoHead:
    """A network whose branches differ in every layer."""
    torch.manual_seed(0)
    model = TwoHead("resnet18", 5, stem="small", width=4, feat_dim=None, mixture_bn=True).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


def images(seed: int, rows: int = 4) -> Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def branch_alone(model: TwoHead, branch: str) -> TwoHead:
    """An ordinary network with the layers of one branch: the oracle."""
    plain = TwoHead("resnet18", 5, stem="small", width=4, feat_dim=None).double()
    keys = {name.replace(f".{branch}.", "."): tensor for name, tensor in model.state_dict().items()}
    other = "adversarial" if branch == "clean" else "clean"
    plain.load_state_dict({name: tensor for name, tensor in keys.items() if f".{other}." not in name})
    return plain


@pytest.mark.parametrize("training", [True, False])
def test_each_half_is_what_an_ordinary_network_makes_of_it_alone(training: bool) -> None:
    """Outputs, and in training mode the running statistics: nothing of one half is in the other's."""
    model, clean, adv = network().train(training), images(1), images(2)
    oracles = {name: branch_alone(model, name).train(training) for name in ("clean", "adversarial")}
    with through(model, "split"):
        found = model(torch.cat([clean, adv])).logits.chunk(2)
    for half, x, (name, oracle) in zip(found, (clean, adv), oracles.items(), strict=True):
        torch.testing.assert_close(half, oracle(x).logits, rtol=1e-10, atol=1e-12)
        for key, tensor in branch_alone(model, name).state_dict().items():
            torch.testing.assert_close(tensor, oracle.state_dict()[key], rtol=1e-10, atol=1e-12)


def test_no_gradient_crosses_from_one_half_to_the_other() -> None:
    """A known wrong port lets a data-parallel split mix them; with one BN for both it does cross."""
    x, x_adv = images(1).requires_grad_(True), images(2).requires_grad_(True)
    model = network().train()
    with through(model, "split"):
        logits, logits_adv = model(torch.cat([x, x_adv])).logits.chunk(2)
    for half, own, other in ((logits, x, x_adv), (logits_adv, x_adv, x)):
        grads = torch.autograd.grad(half.square().sum(), (own, other), retain_graph=True)
        assert grads[0].any()
        assert not grads[1].any()
    shared = branch_alone(model, "clean").train()
    half = shared(torch.cat([x, x_adv])).logits[: len(x)]
    assert torch.autograd.grad(half.square().sum(), x_adv)[0].any()


def test_gradient_of_each_half_reaches_its_own_branch_only() -> None:
    model = network().train()
    with through(model, "split"):
        halves = model(torch.cat([images(1), images(2)])).logits.chunk(2)
    names = [name for name, _ in model.named_parameters()]
    for half, own, other in ((halves[0], "clean", "adversarial"), (halves[1], "adversarial", "clean")):
        grads = torch.autograd.grad(half.square().sum(), list(model.parameters()), retain_graph=True)
        for name, grad in zip(names, grads, strict=True):
            assert bool(grad.any()) == (f".{other}." not in name), (own, name)


def test_outside_of_a_split_images_take_the_adversarial_branch_in_either_mode() -> None:
    model, x = network(), images(3)
    for training in (False, True):
        twin = copy.deepcopy(model).train(training)
        oracle = branch_alone(twin, "adversarial").train(training)
        torch.testing.assert_close(twin.logits(x), oracle.logits(x), rtol=1e-12, atol=1e-12)
        for name, tensor in twin.state_dict().items():
            if ".clean." in name:
                assert torch.equal(tensor, model.state_dict()[name])
    model.eval()
    with through(model, "clean"):
        torch.testing.assert_close(
            model.logits(x), branch_alone(model, "clean").eval().logits(x), rtol=1e-12, atol=1e-12
        )


def test_the_branch_is_as_before_after_an_error() -> None:
    model = network()
    layers = [layer for layer in model.modules() if isinstance(layer, MixtureBatchNorm2d)]
    with pytest.raises(ValueError, match="two equal halves, got 3 images"), through(model, "split"):
        model(images(1, rows=3))
    assert {layer.branch for layer in layers} == {"adversarial"}


@pytest.mark.parametrize("name", ["eager", "folded", "fused"])
def test_attacks_go_through_the_adversarial_branch(name: str) -> None:
    model, x, y = network(), images(4), torch.arange(4)
    engine = EagerEngine(model, model.logits) if name == "eager" else FoldedEngine(name, model, dtype=torch.float64)
    found = engine.gradient(x, y)
    for branch, same in (("adversarial", True), ("clean", False)):
        expected = input_gradient(branch_alone(model, branch).eval().logits)(x, y)
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10) == same
    with evaluating(model), torch.no_grad():
        expected = branch_alone(model, "adversarial").eval().logits(x).softmax(dim=1)
    torch.testing.assert_close(engine.probabilities(x), expected, rtol=1e-9, atol=1e-10)


def test_batch_statistics_in_the_attack_are_those_of_the_attacked_images() -> None:
    model, x = network().eval(), images(5)
    before = copy.deepcopy(model.state_dict())
    with batch_statistics(model):
        found = model.logits(x)
    torch.testing.assert_close(found, branch_alone(model, "adversarial").train().logits(x), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_keys_name_the_branch_and_last_gammas_start_at_zero_in_both() -> None:
    torch.manual_seed(0)
    mixture, plain = ResNet("resnet50", width=4, mixture_bn=True), ResNet("resnet50", width=4)
    expected = set()
    for name, module in plain.named_modules():
        for key in module.state_dict():
            if "." not in key:
                branches = ("clean.", "adversarial.") if isinstance(module, nn.BatchNorm2d) else ("",)
                expected |= {f"{name}.{branch}{key}" for branch in branches}
    assert set(mixture.state_dict()) == expected
    last = mixture.layer2[1].bn3
    assert isinstance(last, MixtureBatchNorm2d)
    assert not any(bool(layer.weight.any()) for layer in norms(last))
    assert len(norms(last)) == 2
    assert has_mixture_bn(mixture)
    assert not has_mixture_bn(plain)


def test_no_bn_parameter_of_either_branch_decays() -> None:
    model = network()
    decayed, kept = (group["params"] for group in decay_groups(model, 1e-4))
    norm_parameters = {id(p) for name, p in model.named_parameters() if ".clean." in name or ".adversarial." in name}
    assert len(norm_parameters) == 4 * 20  # weight and bias, two branches, twenty layers of a ResNet-18
    assert not norm_parameters & {id(p) for p in decayed}  # type: ignore[attr-defined]
    assert norm_parameters <= {id(p) for p in kept}  # type: ignore[attr-defined]
