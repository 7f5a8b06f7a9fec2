"""Our ResNets against torchvision's: the same keys, the same shapes, the same features."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht.models.resnet import ARCHS, BasicBlock, Bottleneck, NarrowShortcut, ResNet

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
NUM_FEATURES = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}


@pytest.fixture(autouse=True)
def _keep_rng() -> Iterator[None]:
    """Initial weights come from the global generator: it is seeded here and restored behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def on_meta(build: Any, *args: Any, **options: Any) -> Any:
    """Build without storage: for keys and shapes, in no time."""
    with torch.device("meta"):
        return build(*args, **options)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights and BN statistics under which every layer matters and no activation explodes."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(512 * 512 * 9, generator=generator)  # the largest convolution; each takes its first values
    values = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            values[name] = torch.tensor(3)
        elif tensor.ndim == 4:
            values[name] = pool[: tensor.numel()].view(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        else:
            low, high = (-0.2, 0.2) if name.endswith(("bias", "mean")) else (0.4, 1.2)
            values[name] = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
    return values


def test_every_architecture_is_listed() -> None:
    assert list(ARCHS) == NAMES


@pytest.mark.parametrize("arch", NAMES)
def test_keys_and_shapes_are_torchvisions_without_the_classifier(torchvision: ModuleType, arch: str) -> None:
    ours, theirs = on_meta(ResNet, arch), on_meta(getattr(torchvision.models, arch))
    expected = {name: shape for name, shape in shapes(theirs).items() if not name.startswith("fc.")}
    assert shapes(ours) == expected
    assert list(shapes(ours)) == list(expected)
    assert ours.num_features == theirs.fc.in_features == NUM_FEATURES[arch]


@pytest.mark.parametrize("arch", NAMES)
def test_same_weights_give_torchvisions_features_and_statistics(torchvision: ModuleType, arch: str) -> None:
    """An odd image size, in evaluation mode and then one forward in training mode.

    Float32: the same operations in the same order, so the tolerance only allows for other conv algorithms.
    """
    ours, theirs = on_meta(ResNet, arch), on_meta(getattr(torchvision.models, arch))
    theirs.fc = nn.Identity()
    weights = random_weights(ours)
    for model in (ours, theirs):
        shared = {name: value if value.ndim == 4 else value.clone() for name, value in weights.items()}
        model.load_state_dict(shared, assign=True)
        model.eval()
    x = torch.rand(2, 3, 37, 37, generator=torch.Generator().manual_seed(2)) - 0.5
    with torch.no_grad():
        feat = ours(x)
        assert feat.shape == (2, NUM_FEATURES[arch])
        assert float((feat[0] - feat[1]).abs().max()) > 1e-3 * float(feat.abs().max())
        torch.testing.assert_close(feat, theirs(x), rtol=1e-4, atol=1e-5)
        ours.train()
        theirs.train()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for (name, one), two in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        if one.is_floating_point():
            assert not torch.equal(one, weights[name]), f"{name} was not updated"
        else:
            assert int(one) == 4


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", 224, [112, 56, 56, 28, 14, 7]),
        ("small", 32, [32, 32, 32, 16, 8, 4]),
        ("small", 8, [8, 8, 8, 4, 2, 1]),
    ],
)
def test_stems_keep_the_resolution_they_promise(arch: str, stem: Any, size: int, sides: list[int]) -> None:
    model = on_meta(ResNet, arch, stem=stem, width=16)
    found: list[int] = []
    layers = [model.conv1, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4]
    for layer in layers:
        layer.register_forward_hook(lambda _module, _args, out: found.append(out.shape[-1]))
    feat = model(torch.empty(2, 3, size, size, device="meta"))
    assert found == sides
    assert feat.shape == (2, model.num_features) == (2, NUM_FEATURES[arch] // 4)
    assert model.conv1.kernel_size == ((7, 7) if stem == "imagenet" else (3, 3))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_blocks_start_as_their_shortcut(arch: str) -> None:
    """Gamma of each block's last BN, and of no other, is zero."""
    model = ResNet(arch, stem="small", width=8)
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]
    assert len(blocks) == sum(ARCHS[arch][1])
    last = {id(block.bn3 if isinstance(block, Bottleneck) else block.bn2) for block in blocks}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert set(module.weight.tolist()) == {0.0 if id(module) in last else 1.0}
            assert not module.bias.any()
    x = torch.randn(2, model.num_features, 4, 4)
    assert torch.equal(model.layer4[1](x), x.relu())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_convolutions_start_with_he_fan_out(arch: str) -> None:
    """The standard deviation of n normal values is off by more than 5 / sqrt(2 n) once in a million times."""
    for module in ResNet(arch, width=32).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            std = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            error = abs(float(module.weight.detach().std()) / std - 1)
            assert error < 5 / (2 * module.weight.numel()) ** 0.5


class WeightGradients(TorchDispatchMode):
    """Notes (input channels, kernel, stride) of every convolution whose weight gradient is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append((args[2].shape[1], args[2].shape[2], args[4][0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [1, 3, 4, 7, 8])
def test_no_weight_gradient_is_taken_where_it_would_corrupt_the_heap(width: int) -> None:
    """Of 1x1 convolutions with a stride, on fewer than eight channels: oneDNN writes past its memory there."""
    model = ResNet("resnet18", stem="small", width=width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with WeightGradients() as found:
        model(torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    shortcuts = [(channels, stride) for channels, kernel, stride in found.seen if kernel == 1]
    assert [channels for channels, _ in reversed(shortcuts)] == [width, 2 * width, 4 * width]
    assert [stride for _, stride in reversed(shortcuts)] == [1 if c < 8 else 2 for c in (width, 2 * width, 4 * width)]


@pytest.mark.parametrize("side", [8, 7])
def test_a_narrow_shortcut_is_the_convolution_that_it_stands_for(side: int) -> None:
    narrow, plain = NarrowShortcut(4, 6, 1, stride=2, bias=False), nn.Conv2d(4, 6, 1, stride=2, bias=False)
    plain.load_state_dict(narrow.state_dict())
    x, other = torch.randn(3, 4, side, side, requires_grad=True), torch.randn(3, 6, 4, 4)
    for layer in (narrow.double(), plain.double()):  # float64 is not oneDNN's
        (layer(x.double()) * other).sum().backward()
        if layer is narrow:
            expected, x.grad = x.grad, None
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(plain.weight.grad, narrow.weight.grad)


def test_unknown_architectures_and_stems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arch: expected one of resnet18, .*, got resnet20"):
        ResNet("resnet20")
    with pytest.raises(ValueError, match="stem: expected imagenet or small, got tiny"):
        ResNet("resnet18", stem="tiny")  # type: ignore[arg-type]
