"""Every engine of the ladder gives the network's own input gradients, and an attack that ends in the same place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttht import kernels
from fasttht.attacks import fused
from fasttht.attacks.engine import EagerEngine, Engine, FoldedEngine, batch_statistics, choose_engine, count_macs
from fasttht.attacks.folded import FoldedConv, FoldedNet
from fasttht.attacks.pgd import Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.kernels import packed
from fasttht.models.two_head import TwoHead

pytestmark = pytest.mark.changes_rng  # networks are initialised from the global generator

CLASSES = 7
ARCHS = ["resnet18", "resnet50"]
LADDER = ["folded", "compiled", "fused"]


def network(arch: str, stem: str, classifier: str = "cosine", dtype: torch.dtype = torch.float64) -> TwoHead:
    """A network whose BN layers all do something: no identity, no zero gamma."""
    torch.manual_seed(0)
    model = TwoHead(arch, CLASSES, stem=stem, width=8, classifier=classifier, feat_dim=None)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def images(num: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(num, 3, size, size, generator=generator, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )


def engine_of(name: str, model: TwoHead, dtype: torch.dtype = torch.float64) -> Engine:
    return EagerEngine(model, model.logits) if name == "eager" else FoldedEngine(name, model, dtype=dtype)


def largest_relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
@pytest.mark.parametrize(("stem", "size"), [("small", 10), ("imagenet", 32), ("imagenet", 33)])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["folded", "fused"])
def test_gradients_equal_the_networks_own(name: str, arch: str, stem: str, size: int, classifier: str) -> None:
    """In float64 to 1e-10; an odd size takes the stem without blocks."""
    model, x, y = network(arch, stem, classifier), images(3, size), torch.tensor([1, 6, 3])
    expected = engine_of("eager", model).gradient(x, y)
    found = engine_of(name, model).gradient(x, y)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert largest_relative(found, expected) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of the compiler's own modules
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_compiled_gradients_equal_the_networks_own(stem: str) -> None:
    """And still after the weights have moved: the compiled code reads the refreshed ones."""
    model, x, y = network("resnet18", stem), images(2, 32), torch.tensor([1, 6])
    engine = engine_of("compiled", model)
    assert largest_relative(engine.gradient(x, y), engine_of("eager", model).gradient(x, y)) < 1e-10
    move(model)
    engine.refresh_()
    assert largest_relative(engine.gradient(x, y), engine_of("eager", model).gradient(x, y)) < 1e-10


@torch.no_grad()
def move(model: TwoHead) -> None:
    """Change every weight and every running statistic."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.0 + 0.3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_refresh_takes_over_new_weights_in_place(classifier: str) -> None:
    model, x = network("resnet18", "imagenet", classifier), images(2, 32)
    net = FoldedNet(model, torch.float64)
    addresses = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    before = net(x)
    move(model)
    assert torch.equal(net(x), before)
    net.refresh_(model)
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == addresses
    with evaluating(model):
        assert largest_relative(net(x), model.logits(x)) < 1e-10
    assert largest_relative(net(x), before) > 1e-3


def test_folding_is_done_in_float32_before_it_is_rounded_to_half() -> None:
    """Folded in half, a weight would carry three roundings; here each is the nearest half of the float32 product."""
    model = network("resnet18", "small", dtype=torch.float32)
    net = FoldedNet(model, torch.bfloat16)
    conv, norm = model.trunk.layer1[0].conv1, model.trunk.layer1[0].bn1
    folded = net.blocks[0].convs[0].weight  # type: ignore[union-attr,index]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    exact = conv.weight.double() * scale.double().view(-1, 1, 1, 1)
    spacing = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
    assert ((folded.double() - exact).abs() <= 0.501 * spacing).all()
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert net.stem.weight.dtype == torch.float32  # which sees the pixels: bfloat16 would move them by 0.45/255
    assert net.head_weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["eager", "folded", "fused"])
def test_nothing_of_the_model_changes(name: str) -> None:
    model, x, y = network("resnet18", "imagenet"), images(2, 32), torch.tensor([0, 5])
    model.train()
    model.trunk.layer2.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    engine = engine_of(name, model)
    engine.refresh_()
    engine.gradient(x, y)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(list(model.modules())) == len(modes)
    assert not any(parameter.requires_grad for parameter in nn.ModuleList(_nets(engine)).parameters())


def _nets(engine: Any) -> list[nn.Module]:
    return [engine._net] if hasattr(engine, "_net") else []


@pytest.mark.parametrize("name", ["folded", "fused"])
def test_float32_gradients_agree_in_sign(name: str) -> None:
    model, x, y = network("resnet50", "imagenet", dtype=torch.float32), images(4, 64, torch.float32), torch.arange(4)
    exact = engine_of("eager", copy.deepcopy(model).double()).gradient(x.double(), y)
    found = engine_of(name, model, torch.float32).gradient(x, y)
    assert float((found.sign() == exact.sign()).double().mean()) >= 0.999


@pytest.mark.parametrize("name", ["folded", "fused"])
def test_bfloat16_gradients_agree_in_most_signs(name: str) -> None:
    model, x, y = network("resnet18", "imagenet", dtype=torch.float32), images(4, 64, torch.float32), torch.arange(4)
    exact = engine_of("eager", model).gradient(x, y)
    found = engine_of(name, model, torch.bfloat16).gradient(x, y)
    assert found.dtype == torch.float32
    assert float((found.sign() == exact.sign()).double().mean()) >= 0.95


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["folded", "fused"])
def test_an_attack_stays_in_its_ball_and_fools_as_the_eager_one_does(name: str, targeted: bool) -> None:
    """In float64 no sign differs, so all ten steps are the same."""
    model, x, y, index = network("resnet18", "imagenet"), images(6, 32), torch.arange(6), torch.arange(6)
    threat = Threat(eps=4 / 255, alpha=1 / 255, steps=10, targeted=targeted)
    results = [
        attack(engine_of(each, model).gradient, x, y, index, threat, Draw(3), num_classes=CLASSES).x_adv
        for each in ("eager", name)
    ]
    assert (results[1] - x).abs().max() <= threat.eps + 1e-12
    assert results[1].min() >= 0
    assert results[1].max() <= 1
    assert torch.allclose(results[0], results[1], rtol=0, atol=1e-12)
    assert (results[1] - x).abs().mean() > threat.eps / 2


# -- batch statistics --------------------------------------------------------------------------------------------------


def test_batch_statistics_are_the_batchs_own_and_leave_the_running_ones_alone() -> None:
    model, x, y = network("resnet18", "imagenet"), images(5, 32), torch.arange(5)
    before = copy.deepcopy(model.state_dict())
    found = EagerEngine(model, model.logits, batch_norm="batch").gradient(x, y)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    twin = copy.deepcopy(model).train()
    assert largest_relative(found, input_gradient(twin.logits)(x, y)) < 1e-12
    assert largest_relative(found, engine_of("eager", model).gradient(x, y)) > 1e-3


def test_batch_statistics_give_the_running_ones_back_after_an_error() -> None:
    model = network("resnet18", "small")
    kept = [buffer.data_ptr() for buffer in model.buffers()]

    def fail() -> None:
        with batch_statistics(model):
            assert model.trunk.bn1.running_mean is None
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [buffer.data_ptr() for buffer in model.buffers()] == kept


# -- choice ------------------------------------------------------------------------------------------------------------


def test_auto_takes_large_networks_by_hand_on_a_cpu() -> None:
    small = TwoHead("resnet18", 10, stem="small", width=16)
    cpu = torch.device("cpu")
    assert choose_engine("auto", small, 8, cpu, batch_norm="eval")[0] == "folded"
    assert choose_engine("auto", small, 8, cpu, batch_norm="batch")[0] == "eager"
    large = TwoHead("resnet50", 10)
    assert choose_engine("auto", large, 224, cpu, batch_norm="eval") == (
        "fused", "4.1 billion multiply-adds an image",
    )  # fmt: skip
    assert choose_engine("compiled", small, 8, cpu, batch_norm="eval") == ("compiled", "as asked")


def test_macs_are_those_of_the_literature() -> None:
    """ResNet-50 at 224 pixels: 4.09 billion multiply-adds, 2 million of them in a classifier of 1000 classes."""
    assert count_macs(TwoHead("resnet50", 10), 224) == pytest.approx(4.087e9, rel=1e-3)


def test_a_network_that_cannot_be_folded_is_refused_with_a_reason() -> None:
    model = network("resnet18", "small")
    model.trunk.bn1 = nn.GroupNorm(2, 8)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="expected BatchNorm2d with running statistics behind every convolution"):
        FoldedEngine("folded", model, dtype=torch.float32)
    model = network("resnet18", "small")
    model.trunk.layer1[0] = nn.Identity()
    with pytest.raises(ValueError, match="expected BasicBlock or Bottleneck, got Identity"):
        FoldedEngine("folded", model, dtype=torch.float32)


def test_the_fused_backward_masks_each_gradient_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for each ReLU but the last, whose mask is in the head's gradient; the stem's is taken below the pool."""
    calls: list[bool] = []
    original = kernels.drelu_add_

    def spy(grad: Tensor, other: Tensor | None, out: Tensor) -> None:
        calls.append(other is not None)
        original(grad, other, out)

    monkeypatch.setattr(kernels, "drelu_add_", spy)
    model = network("resnet18", "imagenet")
    engine_of("fused", model).gradient(images(2, 32), torch.arange(2))
    # Eight blocks of two ReLUs and the stem's: inner ones alone, block inputs with their residual.
    assert calls.count(False) == 8
    assert calls.count(True) == 8


@pytest.mark.skipif(not packed.available(), reason="this torch has no packed convolutions")
def test_the_fused_engine_packs_its_weights_in_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same but for rounding, also after a refresh and for a batch of another size."""
    model = network("resnet18", "imagenet", dtype=torch.float32)
    engine = FoldedEngine("fused", model, dtype=torch.float32)
    plain = FoldedEngine("fused", model, dtype=torch.float32)
    by_hand = [module.by_hand for module in engine._net.modules() if isinstance(module, FoldedConv)]
    for num in (3, 2):
        x, y = images(num, 32, torch.float32), torch.arange(num)
        found = engine.gradient(x, y)
        with monkeypatch.context() as patched:
            patched.setattr(packed, "packs", lambda *_: False)
            expected = plain.gradient(x, y)
        # A ReLU's input that rounds to another side of 0 changes a few pixels by more.
        assert float(((found - expected).abs() <= 1e-5 * expected.abs().max()).double().mean()) > 0.999
        assert all(conv._packed for conv in by_hand[1:])  # the first is computed on squares of pixels
        move(model)
        engine.refresh_()
        plain.refresh_()
    exact = FoldedEngine("fused", model.double(), dtype=torch.float64)
    exact.gradient(images(2, 32), torch.arange(2))
    assert not any(module.by_hand._packed for module in exact._net.modules() if isinstance(module, FoldedConv))


# An image's largest activation in bytes; of five images, how many are taken at a time if two such fit, by some layer.
@pytest.mark.parametrize(
    ("stem", "largest", "at_once"),
    [("imagenet", 12 * 19 * 19 * 8, {2, 1, 5}), ("small", 8 * 32 * 32 * 8, {2, 1, 3, 5})],
)
def test_layers_with_large_activations_take_few_images_at_a_time(
    monkeypatch: pytest.MonkeyPatch, stem: str, largest: int, at_once: set[int]
) -> None:
    """As many as keep the largest activation below the limit; the gradient is the whole batch's."""
    model, x, y = network("resnet18", stem), images(5, 32), torch.tensor([0, 3, 2, 6, 1])
    whole = engine_of("fused", model).gradient(x, y)
    net = FoldedNet(model, torch.float64)
    gradient = fused.FusedGradient(net, 1.0)
    sizes: list[int] = []
    convs = [module.by_hand for module in net.modules() if isinstance(module, FoldedConv)]
    for conv in (net.stem.plan_by_hand(net.stem.layout(x)), *convs[1:]):
        forward = conv.forward

        def counted(h: torch.Tensor, *rest: Any, forward: Any = forward, **options: Any) -> torch.Tensor:
            sizes.append(len(h))
            return forward(h, *rest, **options)

        monkeypatch.setattr(conv, "forward", counted)
    for limit, expected in ((5 * largest, {5}), (2 * largest + 1, at_once), (1, {1})):
        sizes.clear()
        monkeypatch.setattr(fused, "_LARGEST_BYTES", limit)
        found = gradient(x, y)
        assert set(sizes) == expected, limit
        assert found.shape == x.shape
        assert largest_relative(found, whole) < 1e-12
    assert gradient(x[:0], y[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("arch", ARCHS)
def test_pieces_of_unequal_size_may_use_the_same_packed_weights(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    """And add to gradients that are slices of a whole batch's; in float32, which is what is packed."""
    model, x, y = network(arch, "imagenet", dtype=torch.float32), images(5, 64, torch.float32), torch.arange(5)
    gradient = fused.FusedGradient(FoldedNet(model, torch.float32), 1.0)
    whole = gradient(x, y)
    for images_at_once in (1, 2, 3):
        monkeypatch.setattr(fused, "_LARGEST_BYTES", images_at_once * 8 * 32 * 32 * 4)
        found = gradient(x, y)
        # A ReLU's input that rounds to another side of 0 changes a few pixels by more.
        assert float(((found - whole).abs() <= 1e-5 * whole.abs().max()).double().mean()) > 0.999


def test_a_network_that_has_diverged_gives_nan_and_not_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        model = network("resnet18", "imagenet", dtype=dtype)
        with torch.no_grad():
            model.trunk.layer2[0].conv1.weight[0, 0, 0, 0] = torch.nan
        assert FoldedEngine("fused", model, dtype=dtype).gradient(images(2, 32, dtype), torch.arange(2)).isnan().all()


def test_a_compiler_that_fails_is_said_once_and_the_plain_function_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._dynamo.exc import TorchDynamoException

    from fasttht.attacks.engine import _OrPlain

    tried: list[int] = []

    def compiled(x: torch.Tensor) -> torch.Tensor:
        tried.append(1)
        raise TorchDynamoException("no compiler works\nhere")

    function = _OrPlain(compiled, lambda x: x + 1)
    for _ in range(3):
        assert torch.equal(function(torch.ones(2)), torch.full((2,), 2.0))
    assert len(tried) == 1
    out = capsys.readouterr()
    assert (out.out + out.err).count("compiling failed: no compiler works") == 1
