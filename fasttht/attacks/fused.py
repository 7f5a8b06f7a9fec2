"""The folded network's input gradient by hand: no autograd, each ReLU mask and residual addition in one pass.

A residual block's backward under autograd makes three passes over its largest tensor where one will do: the addition
of the two branches' gradients and the mask of the ReLU below them. Here that is `kernels.drelu_add_`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.folded import FoldedBlock, FoldedConv, FoldedNet


class FusedGradient:
    """The summed cross entropy's gradient: called with pixels x (B, 3, H, W) and classes y, returns it like x.

    y is (B,) int64, or class probabilities (B, C).
    """

    def __init__(self, net: FoldedNet, loss_scale: float) -> None:
        self._net = net
        self._loss_scale = loss_scale

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        pixels, layout = self._net.pixels(x)
        grad = kernels.image_grad(self.laid_out(pixels, y, layout), layout)
        return grad.to(x.dtype) / kernels.per_channel(self._net.std, x)

    @torch.no_grad()
    def laid_out(self, pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        """Return the gradient with respect to the network's own input, laid out like it."""
        net = self._net
        weight, stride, padding = net.stem.plan(layout)
        first = kernels.conv_relu(pixels, weight, net.stem.bias, stride, padding).to(net.dtype)
        h, places = first, None
        if net.maxpool:
            h, places = F.max_pool2d(first, kernel_size=3, stride=2, padding=1, return_indices=True)
        kept: list[tuple[FoldedBlock, list[Tensor]]] = []
        for block in net.blocks:
            assert isinstance(block, FoldedBlock), "a folded network is made of them"
            inputs = [h]
            *inner, last = _convs(block)
            for conv in inner:
                inputs.append(kernels.conv_relu(inputs[-1], conv.weight, conv.bias, conv.stride, conv.padding))
            skip = h if block.shortcut is None else block.shortcut(h)
            h = kernels.conv_add_relu(inputs[-1], last.weight, last.bias, skip, last.stride, last.padding)
            kept.append((block, inputs))
        grad = self._head_gradient(h, y)
        for i in reversed(range(len(kept))):
            block, inputs = kept.pop()
            # The input of a block is the ReLU's output of the one below; the pool's output has no ReLU of its own.
            grad = _block_gradient(block, inputs, grad, masked=i > 0 or places is None)
        if places is not None:
            grad = torch.ops.aten.max_pool2d_with_indices_backward(
                grad, first, [3, 3], [2, 2], [1, 1], [1, 1], False, places
            )
            kernels.drelu_add_(grad, None, first)
        return _input_gradient(pixels, weight, grad.to(weight.dtype), stride, padding)

    def _head_gradient(self, h: Tensor, y: Tensor) -> Tensor:
        """Return the loss's gradient with respect to the sum that the last ReLU was applied to."""
        pooled = h.mean(dim=(2, 3)).requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(self._net.head(pooled), y, reduction="sum") * self._loss_scale
            (grad,) = torch.autograd.grad(loss, pooled)
        spread = (grad / (h.shape[2] * h.shape[3]))[:, :, None, None]
        return torch.where(h > 0, spread, 0)


def _block_gradient(block: FoldedBlock, inputs: list[Tensor], grad: Tensor, *, masked: bool) -> Tensor:
    """Return the gradient at a block's input, through the ReLU below it if `masked`; grad is left as it was."""
    skip = grad if block.shortcut is None else _conv_gradient(block.shortcut, inputs[0], grad)
    convs = _convs(block)
    for i in reversed(range(len(inputs))):
        grad = _conv_gradient(convs[i], inputs[i], grad)
        if i:
            kernels.drelu_add_(grad, None, inputs[i])
    if masked:
        kernels.drelu_add_(grad, skip, inputs[0])
        return grad
    return grad.add_(skip)


def _convs(block: FoldedBlock) -> list[FoldedConv]:
    return [conv for conv in block.convs if isinstance(conv, FoldedConv)]


def _conv_gradient(conv: FoldedConv, x: Tensor, grad: Tensor) -> Tensor:
    return _input_gradient(x, conv.weight, grad, conv.stride, conv.padding)


def _input_gradient(
    x: Tensor, weight: Tensor, grad: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)
    )[0]
    return found
