"""Convolution with ReLU, and with addition and ReLU: the same as in passes of their own, on every kind of tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.kernels import convs


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    convs._plain.clear()
    yield
    convs._plain.clear()


def operands(device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (6, 4, 3, 3), (6,), (2, 6, 5, 4)]
    x, weight, bias, other = (torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last), weight, bias, other


def test_both_equal_their_parts() -> None:
    x, weight, bias, other = operands()
    conv = F.conv2d(x, weight, bias, 2, 1)
    assert torch.equal(kernels.conv_relu(x, weight, bias, (2, 2), (1, 1)), conv.relu())
    assert torch.equal(kernels.conv_add_relu(x, weight, bias, other, (2, 2), (1, 1)), (conv + other).relu())
    assert (conv < 0).any()


def test_tensors_without_data_have_the_right_shape() -> None:
    x, weight, bias, other = operands("meta")
    assert kernels.conv_relu(x, weight, bias, (2, 2), (1, 1)).shape == other.shape
    assert kernels.conv_add_relu(x, weight, bias, other, (2, 2), (1, 1)).shape == other.shape


def test_the_registered_ops_keep_their_contract() -> None:
    x, weight, bias, other = operands()
    torch.library.opcheck(convs._relu_op, (x, weight, bias, [2, 2], [1, 1]))
    torch.library.opcheck(convs._add_relu_op, (x, weight, bias, other, [2, 2], [1, 1]))


def test_a_shape_that_cudnn_refuses_is_tried_once() -> None:
    tried: list[str] = []

    def fused() -> Tensor:
        tried.append("fused")
        raise RuntimeError("no kernel")

    def plain() -> Tensor:
        tried.append("plain")
        return torch.ones(1)

    for _ in range(3):
        assert convs._fused_or_plain(("key",), fused, plain).item() == 1
    assert tried == ["fused", "plain", "plain", "plain"]
    assert convs._fused_or_plain(("another",), lambda: torch.zeros(1), plain).item() == 0


def test_an_error_that_is_not_cudnns_is_raised() -> None:
    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        convs._fused_or_plain(("key",), fail, fail)
    assert not convs._plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    x, weight, bias, other = operands("cuda", dtype)
    own = [tensor.double().cpu() for tensor in (x, weight, bias, other)]
    found = kernels.conv_add_relu(x, weight, bias, other, (2, 2), (1, 1))
    expected = kernels.conv_add_relu(*own, (2, 2), (1, 1))
    assert torch.allclose(found.double().cpu(), expected, rtol=0, atol=0.05)
    assert torch.allclose(
        kernels.conv_relu(x, weight, bias, (2, 2), (1, 1)).double().cpu(),
        kernels.conv_relu(*own[:3], (2, 2), (1, 1)),
        rtol=0,
        atol=0.05,
    )
