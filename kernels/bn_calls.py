"""What the batch-norm ops take, and which launches a call of them needs."""

from __future__ import annotations

import math
from ctypes import c_int64

import torch
from torch import Tensor

from fasttht.kernels.checks import _dtype, _floating, _images, _like
from fasttht.kernels.launches import CTYPES, FLOATS, WIDEST, Launch, Plan, _channels_last, _refusal

# Threads that keep the memory of a large GPU busy: for a pass that only moves data, and for one whose threads each
# leave sums behind that have to be added up.
PASS_THREADS, SUM_THREADS = 2**18, 2**16


def _channels(op: str, x: Tensor, **vectors: Tensor) -> None:
    """Expect one number per channel of x, in the type that statistics of such tensors have."""
    _images(op, "x", x)
    _floating(op, "x", x)
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    for name, vector in vectors.items():
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{op}: expected {name} of shape ({x.shape[1]},), got {tuple(vector.shape)}")
        if vector.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {vector.device}")
        _dtype(op, name, vector, dtype)


def _alike(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Expect every tensor that is there to have the shape, device and type of x."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _like(op, x, name, tensor)
            _dtype(op, name, tensor, x.dtype)


def check_forward(
    op: str, x: Tensor, other: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Raise ValueError unless x and other are alike and the rest is per channel."""
    _channels(op, x, mean=mean, invstd=invstd, weight=weight, bias=bias)
    _alike(op, x, other=other)


def check_sums(op: str, grad: Tensor, out: Tensor, x: Tensor, mean: Tensor) -> None:
    """Raise ValueError unless grad, out and x are alike and mean is per channel."""
    _channels(op, x, mean=mean)
    _alike(op, x, grad=grad, out=out)


def check_grad(
    op: str,
    dx: Tensor,
    dother: Tensor | None,
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sums: Tensor,
) -> None:
    """Raise ValueError unless all images are alike, and the sums are two per channel."""
    _channels(op, x, mean=mean, invstd=invstd, weight=weight)
    _alike(op, x, dx=dx, dother=dother, grad=grad, out=out)
    if tuple(sums.shape) != (2, x.shape[1]):
        raise ValueError(f"{op}: expected sums of shape (2, {x.shape[1]}), got {tuple(sums.shape)}")
    _dtype(op, "sums", sums, mean.dtype)


def _rows(x: Tensor, threads: int) -> tuple[int, int, tuple[object, ...]]:
    """Return slices of rows, work items, and (rows, channels, slices) as the kernels take them."""
    channels = x.shape[1]
    rows = x.numel() // channels
    vectors = max(channels * x.element_size() // WIDEST, 1)
    slices = max(1, min(rows, threads // vectors))
    return slices, vectors * slices, (c_int64(rows), c_int64(channels), c_int64(slices))


def _bn_refusal(x: Tensor, images: dict[str, Tensor], vectors: dict[str, Tensor]) -> str | None:
    float32 = (torch.float32,)
    why = _refusal({"x": (x, FLOATS)} | {name: (vector, float32) for name, vector in vectors.items()})
    why = why or _channels_last(x=x, **images)
    return why or next((f"{name} is strided" for name, vector in vectors.items() if not vector.is_contiguous()), None)


def plan_forward(
    out: Tensor, x: Tensor, other: Tensor | None, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor
) -> Plan:
    """Normalise, add and clip, into `out`."""
    images = {"out": out} if other is None else {"out": out, "other": other}
    vectors = {"mean": mean, "invstd": invstd, "weight": weight, "bias": bias}
    if why := _bn_refusal(x, images, vectors):
        return why
    if x.numel() == 0:
        return []
    _, items, shape = _rows(x, PASS_THREADS)
    pointers = (out.data_ptr(), x.data_ptr(), 0 if other is None else other.data_ptr())
    args = (*pointers, *(vector.data_ptr() for vector in vectors.values()), *shape)
    return [Launch("bn_relu", "bn_relu", (("VALUE", CTYPES[x.dtype]),), items, args)]


def plan_sums(sums: Tensor, grad: Tensor, out: Tensor, x: Tensor, mean: Tensor) -> Plan:
    """Sum slices of rows, then add the slices up in two rounds of about as many each."""
    if why := _bn_refusal(x, {"grad": grad, "out": out}, {"mean": mean}):
        return why
    if x.numel() == 0:
        return []
    slices, items, shape = _rows(x, SUM_THREADS)
    each = math.isqrt(slices - 1) + 1
    groups, width = -(-slices // each), 2 * x.shape[1]
    partial = torch.empty(slices + groups, width, dtype=torch.float32, device=x.device)
    between = partial[slices:].data_ptr()
    defines = (("VALUE", CTYPES[x.dtype]),)
    args = (partial.data_ptr(), grad.data_ptr(), out.data_ptr(), x.data_ptr(), mean.data_ptr(), *shape)

    def fold(to: int, source: int, count: int, each: int) -> Launch:
        args = (to, source, c_int64(width), c_int64(count), c_int64(each))
        return Launch("bn_relu_sums", "bn_relu_fold", defines, -(-count // each) * width, args, partial)

    return [
        Launch("bn_relu_sums", "bn_relu_sums", defines, items, args, partial),
        fold(between, partial.data_ptr(), slices, each),
        fold(sums.data_ptr(), between, groups, groups),
    ]


def plan_grad(
    dx: Tensor,
    dother: Tensor | None,
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    sums: Tensor,
) -> Plan:
    """Both gradients in one pass."""
    images = {"dx": dx, "grad": grad, "out": out} | ({} if dother is None else {"dother": dother})
    vectors = {"mean": mean, "invstd": invstd, "weight": weight, "sums": sums}
    if why := _bn_refusal(x, images, vectors):
        return why
    if x.numel() == 0:
        return []
    _, items, shape = _rows(x, PASS_THREADS)
    pointers = (dx.data_ptr(), 0 if dother is None else dother.data_ptr(), grad.data_ptr(), out.data_ptr())
    args = (*pointers, x.data_ptr(), *(vector.data_ptr() for vector in vectors.values()), *shape)
    return [Launch("bn_relu_grad", "bn_relu_grad", (("VALUE", CTYPES[x.dtype]),), items, args)]
