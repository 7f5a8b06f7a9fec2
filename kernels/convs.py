"""Convolutions with what follows them in one pass: cuDNN's fused forwards on CUDA, two passes elsewhere.

Only for gradients taken by hand: autograd does not differentiate through these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.kernels.registered import register

Key = tuple[object, ...]

# Calls that cuDNN has no fused kernel for, by shapes and type: tried once each.
_plain: set[Key] = set()

# (shapes and type, "cudnn" or "plain") -> calls on CUDA, so that a fallback cannot go unseen.
ran: Counter[tuple[Key, str]] = Counter()


def shapes_run() -> dict[str, int]:
    """Return for how many shapes and types cuDNN's fused kernel ran in this process, and for how many two passes."""
    return {name: len({key for key, by in ran if by == name}) for name in ("cudnn", "plain")}


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


def _fused_or_plain(key: Key, fused: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
    """Run cuDNN's kernel if it has one for these shapes and this type, found out by trying once.

    Raises: torch.OutOfMemoryError, which says nothing of the shape.
    """
    if key not in _plain:
        try:
            found = fused()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            lacks_kernel = "ALLOC_FAILED" not in str(error)  # cuDNN's own words for no memory
        else:
            ran[key, "cudnn"] += 1
            return found
        found = plain()  # an error of another kind comes again here and is raised
        if lacks_kernel:
            _plain.add(key)
    else:
        found = plain()
    ran[key, "plain"] += 1
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
