"""Convolutions by hand with weights that stay the same for many calls: on a CPU they are reordered once for oneDNN.

A plain call reorders its weights every time. The packed one does not, adds and applies the ReLU while the output is in
registers, and computes a stride-1 input gradient as a forward convolution: weights flipped, channels exchanged.

The operators behind it are torch's own for compiled code and not documented. They are tried once, on small tensors,
and not taken if they raise or differ; nor for other types than float32, on other devices or without oneDNN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.kernels.convs import conv_add_relu, conv_relu

# oneDNN's ReLU turns NaN into 0, which would make a network that has diverged look healthy; its leaky one does not.
# Negative values times this do not matter in any sum, and the ReLU's backward tests for out <= 0.
_LEAK = 1e-30

# Packed weights are made for one size of image, of which a run has few. Any number of images is right, but the layout
# is the best for the first call's: eight of 14 x 14 pixels took 1.6 times as long with weights packed for one image.
_KEPT_SIZES = 2

Pair = tuple[int, int]


class PackedConv:
    """One convolution without groups or dilation, and its input gradient; neither is seen by autograd.

    weight (O, I, kh, kw) and bias (O,) are kept, not copied; whoever changes them calls `refresh_`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair) -> None:
        self._weight, self._bias = weight, bias
        self._stride, self._padding = stride, padding
        self._packed: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    def refresh_(self) -> None:
        """Take note that weight or bias have changed: what was packed is packed again when it is next needed."""
        self._packed.clear()

    def forward(self, x: Tensor, other: Tensor | None = None, *, relu: bool = True) -> Tensor:
        """Return relu(conv2d(x, weight) + bias + other), or without the ReLU, for x (B, I, H, W).

        Packed, a negative value may come out as -1e-30 times its size in place of 0.
        """
        weight, bias, stride, padding = self._weight, self._bias, self._stride, self._padding
        if not packs(x, weight):
            if not relu:
                out = F.conv2d(x, weight, bias, stride, padding)
                return out if other is None else out.add_(other)
            if other is None:
                return conv_relu(x, weight, bias, stride, padding)
            return conv_add_relu(x, weight, bias, other, stride, padding)
        packed = self._kept("forward", x, lambda: _pack(weight, x, stride, padding))
        if other is None:
            return _conv(x, packed, bias, stride, padding, leak=relu)
        out = _conv_add(x, packed, bias, other, stride, padding)
        return out.relu_() if relu else out

    def input_gradient(self, grad: Tensor, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the gradient at x, and what is still to be added to it: `other`, or None where that has been done.

        Shapes: grad (B, O, H', W'), x and other (B, I, H, W). `other` may be overwritten.
        """
        weight, stride = self._weight, self._stride
        kernel = (weight.shape[2], weight.shape[3])
        if packs(grad, weight):
            flipped = (kernel[0] - 1 - self._padding[0], kernel[1] - 1 - self._padding[1])
            if stride == (1, 1) and min(flipped) >= 0:
                packed = self._kept("gradient", grad, lambda: _pack(_transposed(weight), grad, stride, flipped))
                if other is None:
                    return _conv(grad, packed, None, stride, flipped, leak=False), None
                return _conv_add_(other, grad, packed, flipped), None
            if kernel == (1, 1) and self._padding == (0, 0):
                packed = self._kept("gradient", grad, lambda: _pack(_transposed(weight), grad, (1, 1), (0, 0)))
                if other is None:
                    other = torch.zeros_like(x)
                seen = other[:, :, :: stride[0], :: stride[1]]  # by a kernel of one position; others have no gradient
                seen.add_(_conv(grad, packed, None, (1, 1), (0, 0), leak=False))
                return other, None
        found: Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, self._padding, (1, 1), False, (0, 0), 1, (True, False, False)
        )[0]
        return found, other

    def _kept(self, direction: str, x: Tensor, pack: Callable[[], Tensor]) -> Tensor:
        key = (direction, x.shape[1:])
        if key not in self._packed:
            while len(self._packed) >= 2 * _KEPT_SIZES:
                self._packed.popitem(last=False)
            self._packed[key] = pack()
        return self._packed[key]


def packs(x: Tensor, weight: Tensor) -> bool:
    """Return whether a convolution of these is computed with packed weights."""
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and available()
    )


@cache
def available() -> bool:
    """Return whether this torch has the packed operators, and they give what the plain ones do: tried once."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return _agrees()
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


@torch.no_grad()
def _agrees() -> bool:
    """Compare each operator with plain ones, on numbers small and whole enough for every sum to be exact."""
    steps = torch.arange(2 * 16 * 6 * 6, dtype=torch.float32)
    x = (steps % 7 - 3).view(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = (torch.arange(16 * 16 * 9, dtype=torch.float32) % 5 - 2).view(16, 16, 3, 3)
    bias = torch.arange(16, dtype=torch.float32) - 8
    unit: Pair = (1, 1)
    packed = _pack(weight, x, unit, unit)
    plain = F.conv2d(x, weight, bias, 1, 1)
    lost = x.clone()
    lost[0, 0, 0, 0] = torch.nan
    return (
        torch.equal(_conv(x, packed, bias, unit, unit, leak=False), plain)
        and torch.equal(_conv(x, packed, bias, unit, unit, leak=True).clamp_min_(0), plain.relu())
        and torch.equal(_conv_add(x, packed, bias, x, unit, unit), plain + x)
        and torch.equal(_conv_add_(x.clone(), x, packed, unit), F.conv2d(x, weight, None, 1, 1) + x)
        and bool(_conv(lost, packed, bias, unit, unit, leak=True)[0, :, 0, 0].isnan().all())
    )


def _transposed(weight: Tensor) -> Tensor:
    """Return the weights (I, O, kh, kw) of the convolution that is the stride-1 input gradient of this one."""
    return weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)


def _pack(weight: Tensor, x: Tensor, stride: Pair, padding: Pair) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, x.shape)
    return found


def _conv(x: Tensor, packed: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, *, leak: bool) -> Tensor:
    attr, scalars = ("leaky_relu", [_LEAK]) if leak else ("none", [])
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, (1, 1), 1, attr, scalars, ""
    )
    return found


def _conv_add(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor, stride: Pair, padding: Pair) -> Tensor:
    found: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
        x, other, packed, bias, padding, stride, (1, 1), 1, "add", 1.0, None, [], ""
    )
    return found


def _conv_add_(other: Tensor, x: Tensor, packed: Tensor, padding: Pair) -> Tensor:
    found: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
        other, x, packed, None, padding, (1, 1), (1, 1), 1, "add", 1.0, None, [], ""
    )
    return found
