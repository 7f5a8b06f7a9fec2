"""Convolution with ReLU, and with addition and ReLU: the same as in passes of their own, on every kind of tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.kernels import convs


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    for known in (convs._plain, convs.ran):
        known.clear()
    yield
    for known in (convs._plain, convs.ran):
        known.clear()


def operands(
    device: str = "cpu", dtype: torch.dtype = torch.float64, channels: tuple[int, int] = (4, 6)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    of, to = channels
    shapes = [(2, of, 9, 8), (to, of, 3, 3), (to,), (2, to, 5, 4)]
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
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        convs._fused_or_plain(("key",), fail, fail)
    assert not convs._plain


def test_no_memory_for_once_costs_a_shape_nothing_later() -> None:
    def fail(error: Exception) -> Callable[[], Tensor]:
        def fused() -> Tensor:
            raise error

        return fused

    def plain() -> Tensor:
        return torch.ones(1)

    with pytest.raises(torch.OutOfMemoryError):
        convs._fused_or_plain(("key",), fail(torch.OutOfMemoryError("2 GiB")), plain)
    no_room = fail(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert convs._fused_or_plain(("key",), no_room, plain).item() == 1
    assert convs._fused_or_plain(("key",), lambda: torch.zeros(1), plain).item() == 0


def test_what_ran_is_counted_for_each_shape() -> None:
    def refuse() -> Tensor:
        raise RuntimeError("no kernel")

    for key, fused in (("a", refuse), ("a", refuse), ("b", lambda: torch.ones(1))):
        convs._fused_or_plain((key,), fused, lambda: torch.ones(1))
    assert convs.ran == {(("a",), "plain"): 2, (("b",), "cudnn"): 1}
    assert convs.shapes_run() == {"cudnn": 1, "plain": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [(4, 6), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype, channels: tuple[int, int]) -> None:
    """And by cuDNN's own kernel where the network's convolutions must have one: half precision, whole vectors."""
    x, weight, bias, other = operands("cuda", dtype, channels)
    weight = weight / channels[0] ** 0.5
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
    assert convs.ran.total() == 2
    if dtype == torch.float16 and channels == (64, 64):
        assert convs.shapes_run() == {"cudnn": 2, "plain": 0}
