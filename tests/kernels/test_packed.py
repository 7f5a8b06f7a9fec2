"""Packed convolutions give what plain ones and autograd give, and are plain ones where packing does not apply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.kernels import packed

needs_packing = pytest.mark.skipif(not packed.available(), reason="this torch has no packed convolutions")

# Input channels, output channels, kernel, stride, padding, height, width: a ResNet's, odd sides, and both stems.
GEOMETRIES = [
    (16, 32, 1, 1, 0, 9, 8),
    (5, 7, 3, 1, 1, 9, 8),
    (16, 16, 3, 2, 1, 9, 8),
    (16, 16, 3, 2, 1, 8, 9),
    (16, 24, 1, 2, 0, 9, 8),
    (16, 24, 1, 2, 0, 8, 8),
    (12, 16, 4, 1, 0, 11, 12),
    (3, 16, 7, 2, 3, 15, 16),
    (3, 8, 3, 1, 1, 8, 8),
    (8, 8, 3, 1, 3, 6, 7),
]


@pytest.fixture
def untried() -> Iterator[None]:
    packed.available.cache_clear()
    yield
    packed.available.cache_clear()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found


def build(
    geometry: tuple[int, ...], num: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[kernels.PackedConv, Tensor, Tensor, Tensor, Tensor]:
    """Return a convolution, its weight and bias, an input, and a tensor like its output."""
    inputs, outputs, kernel, stride, padding, height, width = geometry
    weight, bias = draw(outputs, inputs, kernel, kernel, dtype=dtype), draw(outputs, dtype=dtype)
    x = draw(num, inputs, height, width, dtype=dtype)
    like = F.conv2d(x, weight, bias, stride, padding)
    conv = kernels.PackedConv(weight, bias, (stride, stride), (padding, padding))
    return conv, weight, bias, x, draw(*like.shape, dtype=dtype)


def expected_forward(geometry: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), geometry[3], geometry[4])


def expected_gradient(geometry: tuple[int, ...], x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """By autograd, in float64."""
    leaf = x.detach().double().clone().requires_grad_(True)
    out = F.conv2d(leaf, weight.double(), None, geometry[3], geometry[4])
    return torch.autograd.grad(out, leaf, grad.double())[0]


def largest_relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forwards_equal_convolution_addition_and_relu(geometry: tuple[int, ...], dtype: torch.dtype) -> None:
    conv, weight, bias, x, other = build(geometry, dtype=dtype)
    kept = other.clone()
    plain = expected_forward(geometry, x, weight, bias)
    assert largest_relative(conv.forward(x), plain.relu()) < 1e-5
    assert largest_relative(conv.forward(x, relu=False), plain) < 1e-5
    assert largest_relative(conv.forward(x, other), (plain + other).relu()) < 1e-5
    assert largest_relative(conv.forward(x, other, relu=False), plain + other) < 1e-5
    assert torch.equal(other, kept)
    assert (plain < 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_input_gradients_are_autograds(geometry: tuple[int, ...], dtype: torch.dtype) -> None:
    conv, weight, _, x, grad = build(geometry, dtype=dtype)
    kept, other = grad.clone(), draw(*x.shape, dtype=dtype)
    expected = expected_gradient(geometry, x, weight, grad)
    found, rest = conv.input_gradient(grad, x)
    assert rest is None
    assert largest_relative(found, expected) < 1e-5
    expected += other
    found, rest = conv.input_gradient(grad, x, other)
    assert largest_relative(found if rest is None else found + rest, expected) < 1e-5
    assert torch.equal(grad, kept)


@needs_packing
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32_on_a_cpu_is_packed_once(geometry: tuple[int, ...]) -> None:
    conv, _, _, x, grad = build(geometry)
    for _ in range(2):
        conv.forward(x)
        conv.input_gradient(grad, x)
    _, _, kernel, stride, padding, _, _ = geometry
    plain_gradient = (kernel > 1 and stride > 1) or padding >= kernel
    assert [key[0] for key in conv._packed] == (["forward"] if plain_gradient else ["forward", "gradient"])
    first = dict(conv._packed)
    conv.forward(x)
    assert all(conv._packed[key] is tensor for key, tensor in first.items())


@needs_packing
def test_tensors_in_another_memory_format_give_the_same() -> None:
    geometry = GEOMETRIES[1]
    conv, weight, bias, x, grad = build(geometry)
    other, outer = draw(*x.shape), draw(*grad.shape)
    plain = expected_forward(geometry, x, weight, bias)
    assert largest_relative(conv.forward(x.contiguous(), outer.contiguous()), (plain + outer).relu()) < 1e-5
    expected = expected_gradient(geometry, x, weight, grad) + other
    found, rest = conv.input_gradient(grad.contiguous(), x, other.contiguous())
    assert largest_relative(found if rest is None else found + rest, expected) < 1e-5


def test_weights_are_read_again_after_a_refresh() -> None:
    geometry = GEOMETRIES[1]
    conv, weight, bias, x, grad = build(geometry)
    conv.forward(x)
    conv.input_gradient(grad, x)
    weight.mul_(-2).add_(0.1)
    bias.add_(1)
    conv.refresh_()
    assert largest_relative(conv.forward(x), expected_forward(geometry, x, weight, bias).relu()) < 1e-5
    assert largest_relative(conv.input_gradient(grad, x)[0], expected_gradient(geometry, x, weight, grad)) < 1e-5


@needs_packing
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_packed_once_any_batch_is_right(geometry: tuple[int, ...]) -> None:
    conv, weight, bias, x, grad = build(geometry)
    conv.forward(x)
    conv.input_gradient(grad, x)
    packed_first = list(conv._packed)
    for num in (1, 2, 17):
        x, grad = draw(num, *x.shape[1:]), draw(num, *grad.shape[1:])
        assert largest_relative(conv.forward(x), expected_forward(geometry, x, weight, bias).relu()) < 1e-5
        assert largest_relative(conv.input_gradient(grad, x)[0], expected_gradient(geometry, x, weight, grad)) < 1e-5
    assert list(conv._packed) == packed_first
    assert conv.forward(x[:0]).shape == (0, *grad.shape[1:])


@needs_packing
def test_few_sizes_are_kept_and_any_is_right() -> None:
    geometry = GEOMETRIES[0]
    conv, weight, bias, _, _ = build(geometry)
    for side in (4, 5, 6, 7, 4):
        x = draw(2, 16, 9, side)
        expected = expected_forward(geometry, x, weight, bias).relu()
        assert largest_relative(conv.forward(x), expected) < 1e-5
        conv.input_gradient(draw(*expected.shape), x)
        assert len(conv._packed) <= 2 * packed._KEPT_SIZES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_not_hidden_by_a_relu(dtype: torch.dtype) -> None:
    conv, _, _, x, other = build(GEOMETRIES[0], dtype=dtype)
    x[1, 2, 3, 4] = torch.nan
    assert conv.forward(x)[1, :, 3, 4].isnan().all()
    assert conv.forward(x, other)[1, :, 3, 4].isnan().all()


def test_other_types_and_a_torch_without_onednn_are_computed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        conv, _, _, x, grad = build(GEOMETRIES[0], dtype=dtype)
        assert conv.forward(x).dtype == dtype
        assert conv.input_gradient(grad, x)[0].dtype == dtype
        assert not conv._packed
    conv, weight, bias, x, grad = build(GEOMETRIES[0])
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "enabled", False)
        assert largest_relative(conv.forward(x), expected_forward(GEOMETRIES[0], x, weight, bias).relu()) < 1e-5
    assert not conv._packed
    weights = weight.to("meta")
    assert kernels.PackedConv(weights, bias.to("meta"), (1, 1), (0, 0)).forward(x.to("meta")).shape == grad.shape


def _raises(*args: object, **more: object) -> Tensor:
    raise RuntimeError("no such operator")


def _differs(x: Tensor, *args: object, **more: object) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("operator", ["_pack", "_conv", "_conv_add", "_conv_add_"])
@pytest.mark.parametrize("fault", [_raises, _differs])
def test_operators_that_fail_or_differ_are_not_taken(
    untried: None, monkeypatch: pytest.MonkeyPatch, operator: str, fault: object
) -> None:
    monkeypatch.setattr(packed, operator, fault)
    assert not packed.available()
    conv, weight, bias, x, _ = build(GEOMETRIES[1])
    assert largest_relative(conv.forward(x), expected_forward(GEOMETRIES[1], x, weight, bias).relu()) < 1e-5
    assert not conv._packed
