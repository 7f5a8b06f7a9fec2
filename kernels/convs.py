"""Convolutions with what follows them in one pass: cuDNN's fused forwards on CUDA, two passes elsewhere.

Only for gradients taken by hand: autograd does not differentiate through these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.kernels.registered import register

# Calls that cuDNN has no fused kernel for, by shapes and type: tried once each.
_plain: set[tuple[object, ...]] = set()


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Return relu(conv2d(x, weight) + bias), (B, O, H', W'); groups and dilation are 1."""
    return (
        _conv_relu_plain(x, weight, bias, stride, padding) if x.is_cpu else _relu_op(x, weight, bias, stride, padding)
    )


def conv_add_relu(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Return relu(conv2d(x, weight) + bias + other); `other` has the output's shape."""
    if x.is_cpu:
        return _conv_add_relu_plain(x, weight, bias, other, stride, padding)
    found: Tensor = _add_relu_op(x, weight, bias, other, stride, padding)
    return found


def _conv_relu_plain(x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return F.conv2d(x, weight, bias, list(stride), list(padding)).relu_()


def _conv_add_relu_plain(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    return F.conv2d(x, weight, bias, list(stride), list(padding)).add_(other).relu_()


def _fused_or_plain(key: tuple[object, ...], fused: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
    """Run cuDNN's kernel if it has one for these shapes and this type, found out by trying once."""
    if key in _plain:
        return plain()
    try:
        return fused()
    except RuntimeError:
        found = plain()  # an error of another kind, memory say, comes again here and is raised
        _plain.add(key)
        return found


def _relu_body(x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    def plain() -> Tensor:
        return _conv_relu_plain(x, weight, bias, stride, padding)

    if not x.is_cuda:
        return plain()
    key = ("relu", x.shape, weight.shape, x.dtype, *stride, *padding)
    return _fused_or_plain(
        key, lambda: torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1), plain
    )


def _add_relu_body(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    def plain() -> Tensor:
        return _conv_add_relu_plain(x, weight, bias, other, stride, padding)

    if not x.is_cuda:
        return plain()
    key = ("add_relu", x.shape, weight.shape, x.dtype, *stride, *padding)
    return _fused_or_plain(
        key, lambda: torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, stride, padding, (1, 1), 1), plain
    )


_SCHEMA = "(Tensor x, Tensor weight, Tensor bias, {}int[] stride, int[] padding) -> Tensor"
_relu_op = register("conv_relu", _SCHEMA.format(""), _relu_body, _conv_relu_plain)
_add_relu_op = register("conv_add_relu", _SCHEMA.format("Tensor other, "), _add_relu_body, _conv_add_relu_plain)
