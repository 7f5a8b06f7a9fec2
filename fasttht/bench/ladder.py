"""What each rung of the ladder asks of a GPU, counted on tensors without data: no GPU is needed, and nothing is timed.

ResNets are bandwidth-bound, so an attack step costs the activation bytes that its passes move. A dispatch mode sees
every operator of one input gradient and adds up the activations that it reads and writes (four-dimensional tensors;
weights, input pixels and the head are left out, as in the analytic model that the counts are compared with), the
operators that are launches, and those that would make the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttht.attacks.engine import EagerEngine
from fasttht.attacks.folded import FoldedNet
from fasttht.attacks.fused import FusedGradient
from fasttht.attacks.pgd import input_gradient
from fasttht.distributed import World
from fasttht.models.resnet import ARCHS, Stem
from fasttht.models.sync_bn import synchronise_
from fasttht.models.two_head import TwoHead

# What each rung is, from the bottom: DESIGN's names, the engine, the weight gradients, BN's statistics.
RUNGS = {
    "A0": "backward(), training-mode BN",
    "A1": "input gradient only, BN with the batch's statistics (eager, --attack-bn batch)",
    "A2": "input gradient only, evaluation-mode BN (eager)",
    "A3": "BN folded (folded)",
    "A4": "BN folded, pointwise passes fused by torch.compile (compiled)",
    "A5": "BN folded, fused forwards and ReLU backward (fused)",
}

_FOLDED = ("A3", "A5")

# What is counted without a GPU, and why the other is not.
COUNTED = tuple(rung for rung in RUNGS if rung != "A4")
NOT_COUNTED = "what torch.compile makes of the operators shows on a GPU only"

# Which rung an engine of `bench attack` is.
ENGINE_RUNGS = {
    "backward": "A0", "eager-batch": "A1", "eager": "A2", "folded": "A3", "compiled": "A4", "fused": "A5",
}  # fmt: skip

# Passes of the analytic model over: convolution outputs, outputs with a ReLU of their own, convolution inputs, block
# outputs, and the pool's input. A rung's are of one input gradient; `train` is a training step's forward and backward,
# `clean` a forward that keeps nothing, as the clean encoder's.
_PASSES: dict[str, tuple[float, float, float, float, float]] = {
    "A0": (11, 5, 3, 11, 2.75), "A1": (10, 5, 2, 11, 2.75), "A2": (6, 5, 2, 11, 2.75),
    "A3": (2, 5, 2, 11, 2.75), "A4": (2, 5, 2, 7, 2.75), "A5": (2, 3, 2, 5, 2.75),
    "train": (11, 5, 3, 11, 2.75), "clean": (3, 2, 1, 5, 1.25),
}  # fmt: skip

_VIEWS = frozenset({
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select", "detach", "alias", "as_strided",
    "unsqueeze", "squeeze", "empty", "empty_like", "new_empty_strided", "new_zeros", "_to_copy", "lift_fresh",
})  # fmt: skip
_WAITS = frozenset({"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique"})


@dataclass
class Count:
    """launches: operators with work of their own. num_bytes: activations moved. waits: of the host for the device."""

    launches: int = 0
    num_bytes: int = 0
    waits: int = 0
    by_op: dict[str, int] = field(default_factory=dict)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside it, for tensors whose first dimension is the batch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        count = self.count
        count.waits += name in _WAITS
        if name in _VIEWS:
            return out
        count.launches += 1
        moved = _traffic(name, args, kwargs or {}, out)
        count.num_bytes += moved
        count.by_op[name] = count.by_op.get(name, 0) + moved
        return out


def _traffic(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Return the activation bytes that one operator reads and writes."""
    if name == "convolution_backward":
        grad, x = args[0], args[1]
        moved = 0
        if args[-1][0]:
            moved += _size(grad) + (_size(x) if x.shape[1] > _PIXEL_CHANNELS else 0)
        if args[-1][1]:
            moved += _size(grad) + (_size(x) if x.shape[1] > _PIXEL_CHANNELS else 0)
        return moved
    if name in ("native_batch_norm", "cudnn_batch_norm"):
        return (3 if args[5] else 2) * _size(args[0])
    if name == "native_batch_norm_backward":
        training, mask = args[7], args[9]
        # Statistics and affine gradients need a pass over both first; the input's gradient writes one more.
        return (5 if training else 4 if mask[1] else 2) * _size(args[0])
    reads = {id(tensor): tensor for tensor in tree_leaves((args, kwargs)) if _is_activation(tensor)}
    writes = [tensor for tensor in tree_leaves(out) if _is_activation(tensor)]
    if not writes and name.endswith("_"):
        writes = [args[0]]
    return sum(map(_size, reads.values())) + sum(map(_size, writes))


# The images, as they are and on squares of 2x2: small beside what the network makes of them.
_PIXEL_CHANNELS = 12


def _is_activation(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] == _BATCH and value.shape[1] > _PIXEL_CHANNELS
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Images in the count; no channel count or side is equal to it.
_BATCH = 5


def count_rung(
    rung: str, arch: str = "resnet50", img_size: int = 224, *, stem: Stem = "imagenet", width: int = 64
) -> Count:
    """Count one input gradient of a rung in half precision; num_bytes is for one image."""
    counter = Counter()
    _run(rung, _network(rung, arch, stem, width), img_size, counter)
    counter.count.num_bytes //= _BATCH
    return counter.count


class _OnPaper(World):
    """A second process that sends what this one does: exchanges are counted, and none takes place."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def gather_rows(self, name: str, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        self.calls[name] += 1
        return torch.cat([tensor] * len(counts))

    def sum_(self, name: str, tensor: Tensor) -> Tensor:
        self.calls[name] += 1
        return tensor


def count_collectives(rung: str, arch: str = "resnet50", *, stem: Stem = "imagenet", width: int = 64) -> int:
    """Count the exchanges of one input gradient where several processes share their BN statistics (--sync-bn)."""
    model, world = _network(rung, arch, stem, width), _OnPaper()
    synchronise_(model, world)
    _run(rung, model, 64, nullcontext())
    return world.calls.total()


def _network(rung: str, arch: str, stem: Stem, width: int) -> TwoHead:
    with torch.random.fork_rng(devices=[]):
        model = TwoHead(arch, 1000, stem=stem, width=width, classifier="linear", feat_dim=None).half()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.trunk.to("meta")
    model.classifier.to("meta")
    if rung not in _FOLDED:  # the folded network has the mean and deviation of pixels as numbers, read once
        model.normalize.to("meta")
    return model


def _run(rung: str, model: TwoHead, img_size: int, watch: AbstractContextManager[object]) -> None:
    """Take one input gradient of a rung, watched."""
    x = torch.empty(_BATCH, 3, img_size, img_size, dtype=torch.float16, device="meta")
    y = torch.empty(_BATCH, dtype=torch.int64, device="meta")
    gradient = _gradient(rung, model)
    with watch:
        gradient(x.contiguous(memory_format=torch.channels_last), y)


def _gradient(rung: str, model: TwoHead) -> Callable[[Tensor, Tensor], object]:
    if rung in _FOLDED:
        net = FoldedNet(model, torch.float16)
        return input_gradient(net) if rung == "A3" else FusedGradient(net, 1.0)
    if rung != "A0":
        # In training mode A1 would move the running statistics and exchange: only the engine says what it does.
        return EagerEngine(model, model.logits, batch_norm="batch" if rung == "A1" else "eval").gradient
    model.train()

    def backward(x: Tensor, y: Tensor) -> None:
        leaf = x.detach().requires_grad_(True)
        torch.autograd.backward(F.cross_entropy(model.logits(leaf), y))

    return backward


def has_byte_model(stem: str) -> bool:
    """Whether predicted_bytes knows networks with this stem."""
    return stem == "imagenet"


def predicted_bytes(
    rung: str, arch: str = "resnet50", img_size: int = 224, *, width: int = 64, itemsize: int = 2
) -> int:
    """Return the analytic model's bytes for one image: passes over each kind of tensor, of `itemsize` bytes an element.

    Networks with the 7x7 stem only. A pass reads or writes a tensor once. rung: a name of _PASSES.
    """
    sizes = _sizes(arch, img_size, width)
    return round(itemsize * sum(passes * size for passes, size in zip(_PASSES[rung], sizes, strict=True)))


def _sizes(arch: str, img_size: int, stem_width: int) -> tuple[int, int, int, int, int]:
    """Return elements per image of: all convolution outputs, those with a ReLU, inputs, block outputs, pool input."""
    bottleneck, blocks = ARCHS[arch]
    expansion = 4 if bottleneck else 1
    side = math.ceil(img_size / 2)
    outputs = with_relu = pool = stem_width * side**2
    inputs, sums, channels = 0, 0, stem_width
    side = math.ceil(side / 2)
    for stage, num_blocks in enumerate(blocks):
        width = stem_width << stage
        for block in range(num_blocks):
            before, after = side**2, math.ceil(side / (2 if block == 0 and stage else 1)) ** 2
            wide = expansion * width * after
            branches = 2 if block == 0 and (stage or bottleneck) else 1  # a shortcut with a convolution of its own
            inner = width * before + width * after if bottleneck else width * after
            with_relu += inner
            outputs += inner + wide * branches
            inputs += channels * before * branches + inner
            sums += wide
            side, channels = math.isqrt(after), expansion * width
    return outputs, with_relu, inputs, sums, pool
