"""The folded network's input gradient by hand: no autograd, each ReLU mask and residual addition in one pass.

A residual block's backward under autograd makes three passes over its largest tensor where one will do: the addition
of the two branches' gradients and the mask of the ReLU below them. Here that is `kernels.drelu_add_`; on a CPU the
addition is done by the convolution (`kernels.PackedConv`) and the mask alone is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.folded import FoldedBlock, FoldedConv, FoldedNet
from fasttht.regions import region

# On a CPU so many images are taken at a time that a layer's activation is not larger: then it is still in the cache
# when the next layer reads it, and malloc does not give it back to the kernel (whose limit is 32 MiB) and take page
# faults for it again. Deep layers, of small activations and large weights, are taken with all images; between the two
# all images' activations lie side by side once.
_LARGEST_BYTES = 7 << 20


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

    @torch.no_grad()
    def laid_out(self, pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        """Return the gradient with respect to the network's own input, laid out like it."""
        h, done = pixels, list[tuple[_Section, list[list[_Saved]]]]()
        for section in _sections(self._net, pixels, layout):
            h, saved = section.forward(h)
            done.append((section, saved))
        grad = self._head_gradient(h, y)
        while done:
            section, saved = done.pop()
            grad = section.gradient(saved, grad)
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


# What a part keeps of its forward for its gradient.
_Saved = list[Tensor]


class _Part(Protocol):
    """The stem or a block. Its gradient is with respect to what the ReLU or max-pool below it was applied to."""

    def forward(self, h: Tensor) -> tuple[Tensor, _Saved]: ...

    def gradient(self, saved: _Saved, grad: Tensor) -> Tensor:
        """May overwrite grad, and empties `saved`."""
        ...

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Return the shapes of one image's activations, (C, H, W), from the input's on; the last is the output's."""
        ...


@dataclass(frozen=True)
class _Section:
    """Parts that take equally many images at a time. One image's gradient does not depend on the others."""

    parts: list[_Part]
    images: int

    @region("attack_forward")
    def forward(self, h: Tensor) -> tuple[Tensor, list[list[_Saved]]]:
        """Return the output for all images, and what each piece of them saved in each part."""
        outputs, saved = [], []
        for piece in self._cut(h):
            out, own = piece, list[_Saved]()
            for part in self.parts:
                out, kept = part.forward(out)
                own.append(kept)
            outputs.append(out)
            saved.append(own)
        return _joined(outputs), saved

    @region("attack_backward")
    def gradient(self, saved: list[list[_Saved]], grad: Tensor) -> Tensor:
        """Return the gradient at the input of `forward`; may overwrite grad, and empties `saved`."""
        found = []
        for piece, own in zip(self._cut(grad), saved, strict=True):
            out = piece
            for part in reversed(self.parts):
                out = part.gradient(own.pop(), out)
            found.append(out)
        return _joined(found)

    def _cut(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.chunk(math.ceil(len(whole) / self.images)) if len(whole) > self.images else (whole,)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _sections(net: FoldedNet, pixels: Tensor, layout: kernels.Layout) -> list[_Section]:
    """Cut the network into sections: one, or on a CPU as many as let no activation be larger than the limit."""
    parts: list[_Part] = [_Stem(net, layout)]
    for block in net.blocks:
        assert isinstance(block, FoldedBlock), "a folded network is made of them"
        parts.append(_Block(block))
    if not pixels.is_cpu:
        return [_Section(parts, max(1, len(pixels)))]
    sections: list[_Section] = []
    shape = pixels.shape[1:]
    for part in parts:
        seen = part.shapes(shape)
        size = max(map(math.prod, seen)) * pixels.element_size()
        images = min(max(1, len(pixels)), max(1, _LARGEST_BYTES // size))
        if not sections or sections[-1].images != images:
            sections.append(_Section([], images))
        sections[-1].parts.append(part)
        shape = torch.Size(seen[-1])
    return sections


class _Stem:
    """The first convolution with its ReLU, and the max-pool if there is one."""

    def __init__(self, net: FoldedNet, layout: kernels.Layout) -> None:
        self._conv = net.stem.plan_by_hand(layout)
        self._plan = net.stem.plan(layout)
        self._maxpool, self._dtype = net.maxpool, net.dtype

    def forward(self, h: Tensor) -> tuple[Tensor, _Saved]:
        first = self._conv.forward(h).to(self._dtype)
        if not self._maxpool:
            return first, [h]
        out, places = F.max_pool2d(first, kernel_size=3, stride=2, padding=1, return_indices=True)
        return out, [h, first, places]

    def gradient(self, saved: _Saved, grad: Tensor) -> Tensor:
        pixels, *pooled = saved
        saved.clear()
        if pooled:
            grad = torch.ops.aten.max_pool2d_with_indices_backward(
                grad, pooled[0], [3, 3], [2, 2], [1, 1], [1, 1], False, pooled[1]
            )
        found, _ = self._conv.input_gradient(grad.to(pixels.dtype), pixels)
        return found

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        first = _out_shape(shape, *self._plan)
        pooled = (first[0], *((side + 1) // 2 for side in first[1:]))
        return [tuple(shape), first, pooled] if self._maxpool else [tuple(shape), first]


def _out_shape(shape: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, ...]:
    """Return (O, H', W') of a convolution of an image (I, H, W)."""
    sides = zip(shape[1:], weight.shape[2:], stride, padding, strict=True)
    return (len(weight), *((side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides))


class _Block:
    """A residual block."""

    def __init__(self, block: FoldedBlock) -> None:
        self._convs = [conv for conv in block.convs if isinstance(conv, FoldedConv)]
        self._shortcut = block.shortcut

    def forward(self, h: Tensor) -> tuple[Tensor, _Saved]:
        inputs = [h]
        *inner, last = self._convs
        for conv in inner:
            inputs.append(conv.by_hand.forward(inputs[-1]))
        skip = h if self._shortcut is None else self._shortcut.by_hand.forward(h, relu=False)
        return last.by_hand.forward(inputs[-1], skip), inputs

    def gradient(self, saved: _Saved, grad: Tensor) -> Tensor:
        """Return the gradient before the ReLU below, whose output is the block's input.

        A max-pool between the two changes nothing: where its output is 0, so is the place that it was taken from.
        """
        inner = grad
        while len(saved) > 1:
            inner, _ = self._convs[len(saved) - 1].by_hand.input_gradient(inner, saved[-1])
            kernels.drelu_add_(inner, None, saved.pop())
        first, h = self._convs[0].by_hand, saved.pop()
        if self._shortcut is None:
            found, rest = first.input_gradient(inner, h, grad)
        else:
            found, _ = first.input_gradient(inner, h)
            found, rest = self._shortcut.by_hand.input_gradient(grad, h, found)
        kernels.drelu_add_(found, rest, h)
        return found

    def shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        found = [tuple(shape)]
        for conv in self._convs:
            found.append(_out_shape(found[-1], conv.weight, conv.stride, conv.padding))
        return found
