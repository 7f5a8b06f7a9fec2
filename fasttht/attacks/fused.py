"""The folded network's input gradient by hand: no autograd, each ReLU mask and residual addition in one pass.

A residual block's backward under autograd makes three passes over its largest tensor where one will do: the addition
of the two branches' gradients and the mask of the ReLU below them. Here that is `kernels.drelu_add_`; on a CPU the
addition is done by the convolution (`kernels.PackedConv`) and the mask alone is left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.folded import FoldedBlock, FoldedConv, FoldedNet
from fasttht.regions import region

# glibc gives memory in larger pieces than this back to the kernel at once, and the next such piece is all page faults.
# That limit is 32 MiB; with half of it the heap is seldom trimmed either, also when other work runs in between.
_LARGEST_BYTES = 16 << 20


class FusedGradient:
    """The summed cross entropy's gradient: called with pixels x (B, 3, H, W) and classes y, returns it like x.

    y is (B,) int64, or class probabilities (B, C).
    """

    def __init__(self, net: FoldedNet, loss_scale: float) -> None:
        self._net = net
        self._loss_scale = loss_scale

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        pixels, layout = self._net.pixels(x)
        grad = kernels.image_grad(self.laid_out(pixels, y, layout), layout)
        return grad.to(x.dtype) / kernels.per_channel(self._net.std, x)

    def laid_out(self, pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        """Return the gradient with respect to the network's own input, laid out like it."""
        pieces = math.ceil(len(pixels) / _images_at_once(self._net, pixels, layout))
        if pieces <= 1:
            return self._gradient(pixels, y, layout)
        cut = zip(pixels.chunk(pieces), y.chunk(pieces), strict=True)
        return torch.cat([self._gradient(*piece, layout) for piece in cut])

    @torch.no_grad()
    def _gradient(self, pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        net = self._net
        stem = net.stem.plan_by_hand(layout)
        kept: list[tuple[FoldedBlock, list[Tensor]]] = []
        with region("attack_forward"):
            first = stem.forward(pixels).to(net.dtype)
            h, places = first, None
            if net.maxpool:
                h, places = F.max_pool2d(first, kernel_size=3, stride=2, padding=1, return_indices=True)
            for block in net.blocks:
                assert isinstance(block, FoldedBlock), "a folded network is made of them"
                inputs = [h]
                *inner, last = _convs(block)
                for conv in inner:
                    inputs.append(conv.by_hand.forward(inputs[-1]))
                skip = h if block.shortcut is None else block.shortcut.by_hand.forward(h, relu=False)
                h = last.by_hand.forward(inputs[-1], skip)
                kept.append((block, inputs))
        grad = self._head_gradient(h, y)
        while kept:
            grad = _block_gradient(*kept.pop(), grad)
        with region("attack_backward"):
            if places is not None:
                grad = torch.ops.aten.max_pool2d_with_indices_backward(
                    grad, first, [3, 3], [2, 2], [1, 1], [1, 1], False, places
                )
            grad, _ = stem.input_gradient(grad.to(pixels.dtype), pixels)
        return grad

    @region("attack_backward")
    def _head_gradient(self, h: Tensor, y: Tensor) -> Tensor:
        """Return the loss's gradient with respect to the sum that the last ReLU was applied to."""
        pooled = h.mean(dim=(2, 3)).requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(self._net.head(pooled), y, reduction="sum") * self._loss_scale
            (grad,) = torch.autograd.grad(loss, pooled)
        spread = (grad / (h.shape[2] * h.shape[3]))[:, :, None, None]
        return torch.where(h > 0, spread, 0)


def _images_at_once(net: FoldedNet, pixels: Tensor, layout: kernels.Layout) -> int:
    """Return how many images are taken at a time: all of them, or so many on a CPU that no activation is too large.

    One image's gradient does not depend on the others. The largest activations are the stem's and the first block's.
    """
    block = net.blocks[0]
    assert isinstance(block, FoldedBlock), "a folded network is made of them"
    if not pixels.is_cpu:
        return max(1, len(pixels))
    weight, stride, padding = net.stem.plan(layout)
    sides = zip(pixels.shape[2:], weight.shape[2:], stride, padding, strict=True)
    places = math.prod((side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides)
    below_pool = _convs(block)[-1].weight.shape[0] / (4 if net.maxpool else 1)
    size = max(len(weight), below_pool) * places * weight.element_size()
    return max(1, int(_LARGEST_BYTES / size))


@region("attack_backward")
def _block_gradient(block: FoldedBlock, inputs: list[Tensor], grad: Tensor) -> Tensor:
    """Return the gradient before the ReLU below a block, whose output is the block's input; grad may be overwritten.

    A max-pool between the two changes nothing: where its output is 0, so is the place that it was taken from.
    """
    convs = _convs(block)
    inner = grad
    for i in reversed(range(1, len(inputs))):
        inner, _ = convs[i].by_hand.input_gradient(inner, inputs[i])
        kernels.drelu_add_(inner, None, inputs[i])
    if block.shortcut is None:
        found, rest = convs[0].by_hand.input_gradient(inner, inputs[0], grad)
    else:
        found, _ = convs[0].by_hand.input_gradient(inner, inputs[0])
        found, rest = block.shortcut.by_hand.input_gradient(grad, inputs[0], found)
    kernels.drelu_add_(found, rest, inputs[0])
    return found


def _convs(block: FoldedBlock) -> list[FoldedConv]:
    return [conv for conv in block.convs if isinstance(conv, FoldedConv)]
