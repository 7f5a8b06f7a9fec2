"""Ghost BN: each group is what an ordinary BN makes of it alone; everything else is an ordinary BN."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttht.attacks.engine import EagerEngine, FoldedEngine, batch_statistics
from fasttht.attacks.pgd import input_gradient
from fasttht.config import MethodConfig
from fasttht.models.fused_norm import fuse_norms
from fasttht.models.ghost_bn import GhostBatchNorm2d, group_size_of, group_sizes, interleave, paired, separate
from fasttht.models.mixture_bn import MixtureBatchNorm2d, through
from fasttht.models.two_head import TwoHead
from fasttht.objectives import OBJECTIVES, Views

pytestmark = pytest.mark.changes_rng  # networks are initialised from the global generator

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def images(rows: int, channels: int = 3, side: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, side, side, generator=generator, dtype=torch.float64)
    return (x * torch.arange(1, rows + 1).view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)


def stir(module: nn.Module) -> None:
    """Give every BN parameters and statistics of its own."""
    generator = torch.Generator().manual_seed(5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5, generator=generator)


def layers(group: int, channels: int = 3) -> tuple[GhostBatchNorm2d, nn.BatchNorm2d]:
    """A ghost layer and an ordinary one with the same state."""
    ghost, plain = GhostBatchNorm2d(channels, group_size=group).double(), nn.BatchNorm2d(channels).double()
    stir(ghost)
    plain.load_state_dict(ghost.state_dict())
    return ghost, plain


def run(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, all gradients and all buffers after one forward and backward."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
    out = layer(leaf)
    grads = torch.autograd.grad((out * upstream).sum(), [leaf, *layer.parameters()])
    return [out.detach(), *grads, *(buffer.clone() for buffer in layer.buffers())]


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), surplus=st.integers(0, 3), training=st.booleans())
def test_groups_as_large_as_the_batch_are_ordinary_bn_bit_for_bit(rows: int, surplus: int, training: bool) -> None:
    ghost, plain = layers(max(rows + surplus, 2))
    x, upstream = images(rows), images(rows, seed=1)
    for own, theirs in zip(
        run(ghost.train(training), x, upstream), run(plain.train(training), x, upstream), strict=True
    ):
        assert torch.equal(own, theirs)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 17), size=st.integers(2, 6), side=st.integers(1, 3))
def test_each_group_is_what_an_ordinary_bn_makes_of_it_alone(rows: int, size: int, side: int) -> None:
    """Outputs, input gradients, the sum of parameter gradients, and the mean of the running statistics."""
    ghost, plain = layers(size)
    x, upstream = images(rows, side=side), images(rows, side=side, seed=1)
    ends = [n for n in range(size, rows, size) if rows - n > 1]
    bounds = list(zip([0, *ends], [*ends, rows], strict=True))
    assert [end - begin for begin, end in bounds] == group_sizes(rows, size)
    alone = [run(copy.deepcopy(plain), x[slice(*b)], upstream[slice(*b)]) for b in bounds]
    out, grad, weight, bias, mean, var, count = run(ghost, x, upstream)
    torch.testing.assert_close(out, torch.cat([found[0] for found in alone]), **EXACT)
    torch.testing.assert_close(grad, torch.cat([found[1] for found in alone]), **EXACT)
    torch.testing.assert_close(weight, sum(found[2] for found in alone), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, sum(found[3] for found in alone), rtol=1e-9, atol=1e-9)
    shares = [(end - begin) / rows for begin, end in bounds]
    for running, place in ((mean, 4), (var, 5)):
        expected = sum(share * found[place] for share, found in zip(shares, alone, strict=True))
        torch.testing.assert_close(running, expected, **EXACT)
    assert int(count) == 1, "one step of the momentum for one forward"


def test_in_evaluation_mode_it_reads_the_running_statistics_and_changes_nothing() -> None:
    ghost, plain = layers(2)
    x = images(7)
    before = {name: tensor.clone() for name, tensor in ghost.state_dict().items()}
    assert torch.equal(ghost.eval()(x), plain.eval()(x))
    assert ghost.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ghost.state_dict().items())


def test_statistics_of_the_attacked_batch_are_of_its_groups_and_are_not_remembered() -> None:
    ghost, plain = layers(2)
    x = images(5)
    before = {name: tensor.clone() for name, tensor in ghost.state_dict().items()}
    with batch_statistics(ghost.eval()):
        found = ghost(x)
    expected = torch.cat([copy.deepcopy(plain).train()(part) for part in (x[:2], x[2:])])
    torch.testing.assert_close(found, expected, **EXACT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ghost.state_dict().items())


@pytest.mark.parametrize("size", [0, 1])
def test_groups_without_a_variance_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="groups of at least 2 images"):
        GhostBatchNorm2d(3, group_size=size)


def network(*, group: int, mixture: bool = False) -> TwoHead:
    torch.manual_seed(0)
    model = TwoHead(
        "resnet18",
        5,
        stem="small",
        width=4,
        classifier="linear",
        feat_dim=None,
        mixture_bn=mixture,
        bn_group_size=group,
    ).double()
    stir(model)
    return model


def test_a_network_has_the_keys_and_weights_of_an_ordinary_one() -> None:
    ghost, plain = network(group=2).state_dict(), network(group=0).state_dict()
    assert ghost.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ghost.items())
    assert (group_size_of(network(group=2)), group_size_of(network(group=0))) == (2, 0)


def test_the_folded_network_and_its_gradient_are_the_ordinary_ones() -> None:
    x, y = images(3, side=8).abs().clamp(0, 1), torch.tensor([0, 1, 2])
    models = [network(group=2).eval(), network(group=0).eval()]
    own, theirs = (FoldedEngine("folded", model, dtype=torch.float64).gradient(x, y) for model in models)
    assert torch.equal(own, theirs)
    eager = EagerEngine(models[0], models[0].logits).gradient(x, y)
    torch.testing.assert_close(own, eager, rtol=1e-9, atol=1e-12)
    assert input_gradient(models[1].logits)(x, y).shape == x.shape


def test_mixture_bn_has_groups_inside_each_half() -> None:
    layer = MixtureBatchNorm2d(3, lambda channels: GhostBatchNorm2d(channels, group_size=2)).double()
    stir(layer)
    alone = copy.deepcopy(layer)
    x = images(10)
    with through(layer, "split"):
        found = layer(x)
    torch.testing.assert_close(found, torch.cat([alone.clean(x[:5]), alone.adversarial(x[5:])]), **EXACT)
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], **EXACT)
    model = network(group=2, mixture=True)
    assert sum(isinstance(module, GhostBatchNorm2d) for module in model.modules()) == 2 * sum(
        isinstance(module, MixtureBatchNorm2d) for module in model.modules()
    )


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 20), size=st.integers(2, 7))
def test_interleaved_views_come_apart_again_and_share_groups(rows: int, size: int) -> None:
    x, other = torch.arange(rows), torch.arange(rows) + 100
    both = interleave(x, other, size)
    own, theirs = separate(both, size)
    assert torch.equal(own, x)
    assert torch.equal(theirs, other)
    for group in both.split(group_sizes(2 * rows, 2 * size)):
        assert sorted(group[group < 100].tolist()) == sorted((group[group >= 100] - 100).tolist())


@pytest.mark.parametrize("name", ["alp", "at-kl", "trades", "mbn-alp"])
def test_an_objective_of_two_views_is_the_sum_over_groups_as_on_so_many_gpus(name: str) -> None:
    """A batch of two groups: losses and gradients are the mean of those of each group in an ordinary network."""
    mixture = name.startswith("mbn")
    x, x_adv = images(6, side=8), images(6, side=8, seed=2)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    objective, method = OBJECTIVES[name], MethodConfig()
    ghost, plain = network(group=3, mixture=mixture), network(group=0, mixture=mixture)

    def loss(model: TwoHead, rows: slice) -> tuple[Tensor, Tensor]:
        views = Views(x[rows], x_adv[rows], y[rows], torch.arange(6)[rows], None)
        terms = objective(model, views, None, method, smoothing=0.1)
        terms.loss.backward()  # type: ignore[no-untyped-call]
        return terms.loss.detach(), terms.logits.detach()

    found, logits = loss(ghost, slice(0, 6))
    alone = [loss(plain, rows) for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(found, (alone[0][0] + alone[1][0]) / 2, **EXACT)
    torch.testing.assert_close(logits, torch.cat([part[1] for part in alone]), rtol=1e-9, atol=1e-10)
    for own, theirs in zip(ghost.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(own.grad, theirs.grad / 2, rtol=1e-7, atol=1e-9)
    assert all(layer.views == 1 for layer in ghost.modules() if isinstance(layer, GhostBatchNorm2d))


def test_pairs_are_undone_when_a_forward_fails() -> None:
    model = network(group=2)
    with pytest.raises(RuntimeError, match="stop"), paired(model):
        raise RuntimeError("stop")
    assert all(layer.views == 1 for layer in model.modules() if isinstance(layer, GhostBatchNorm2d))


def test_fused_norms_leave_it_a_layer() -> None:
    model, fused = network(group=2), network(group=2)
    assert fuse_norms(fused) == 0
    x = images(5, side=8)
    torch.testing.assert_close(fused.logits(x), model.logits(x), **EXACT)
    for name, tensor in fused.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], **EXACT)
