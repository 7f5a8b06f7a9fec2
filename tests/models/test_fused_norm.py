"""A network with fused norms is the network: same numbers, same keys, and only where it trains."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fasttht.models.fused_norm import fuse_norms
from fasttht.models.two_head import TwoHead


def network(arch: str, stem: str = "small") -> TwoHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoHead(arch, 5, stem=stem, width=8, feat_dim=4).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 1:  # no block is born as an identity
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def images(seed: int = 0) -> Tensor:
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def gradients(model: TwoHead, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_(True)
    logits, feat = model(leaf)
    assert feat is not None
    loss = logits.square().mean() + (feat * torch.arange(4)).sum()
    return [logits, feat, *torch.autograd.grad(loss, [leaf, *model.parameters()])]


@pytest.mark.parametrize(("arch", "stem", "number"), [("resnet18", "small", 17), ("resnet50", "imagenet", 49)])
def test_training_is_the_same_bit_for_bit(arch: str, stem: str, number: int) -> None:
    """Outputs, the gradients of images and weights, and statistics, over two steps; a CPU rounds as before."""
    plain, fused = network(arch, stem), network(arch, stem)
    assert fuse_norms(fused) == number
    assert list(fused.state_dict()) == list(plain.state_dict())
    for seed in range(2):
        for one, two in zip(gradients(plain, images(seed)), gradients(fused, images(seed)), strict=True):
            assert torch.equal(one, two)
    for (name, one), two in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert int(fused.trunk.bn1.num_batches_tracked) == 2  # type: ignore[arg-type]


def fused_calls(model: TwoHead, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many fused ops one forward makes."""
    from fasttht import kernels
    from fasttht.kernels import batch_norm

    calls = []

    def spy(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        return batch_norm.bn_relu(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "bn_relu", spy)
        model(images())
    return len(calls)


def test_only_layers_that_train_and_nobody_watches_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = network("resnet18"), network("resnet18")
    fuse_norms(model)
    assert fused_calls(plain, monkeypatch) == 0
    assert fused_calls(model, monkeypatch) == 17
    seen: list[Tensor] = []
    handle = model.trunk.bn1.register_forward_hook(lambda _module, _args, out: seen.append(out))
    assert fused_calls(model, monkeypatch) == 16
    assert len(seen) == 1
    handle.remove()
    model.eval()
    assert fused_calls(model, monkeypatch) == 0
    assert torch.equal(model(images()).logits, model.logits(images()))
    model.train()
    model.trunk.bn1.momentum = None  # a mean over all batches, which the op does not keep
    assert fused_calls(model, monkeypatch) == 16


def test_evaluation_is_that_of_the_layers() -> None:
    plain, fused = network("resnet18"), network("resnet18")
    fuse_norms(fused)
    for model in (plain, fused):
        model(images(3))
        model.eval()
    assert torch.equal(plain(images()).logits, fused(images()).logits)


def test_a_copy_runs_its_own_layers() -> None:
    """As the average of the weights and the momentum encoder are copies."""
    model = network("resnet18")
    fuse_norms(model)
    twin = copy.deepcopy(model)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with torch.no_grad():
        twin.trunk.conv1.weight.zero_()
    twin(images())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert int(twin.trunk.bn1.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_other_blocks_and_norms_are_left_alone() -> None:
    class Other(nn.BatchNorm2d):
        pass

    model = network("resnet18")
    model.trunk.bn1 = Other(8, dtype=torch.float64)
    model.trunk.layer1[0].relu = nn.SiLU()
    assert fuse_norms(model) == 17 - 1 - 2
    assert "forward" not in vars(model.trunk.layer1[0])
    model(images())
    assert int(model.trunk.bn1.num_batches_tracked) == 1  # type: ignore[arg-type]
