"""Which kernel a call needs and with what arguments: everything about a launch but the launch.

Each function returns the launches of one op, in order, or in one clause why no kernel takes these tensors. Arguments
are in the order of the kernel's parameters. A Python int is a pointer; scalars carry their C type, because cuda.core
passes a bare int as a pointer-sized integer and a bare float as a double (ParamHolder in cuda/core's
_kernel_arg_handler.pyx).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

CTYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.uint8: "Byte"}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STATES = (torch.float32, torch.uint8)
WIDEST = 16  # bytes that one memory instruction moves


class Launch(NamedTuple):
    """One kernel launch. `items` is how many loop turns there are to share among threads."""

    source: str  # src/<source>.cu
    kernel: str  # its entry point
    defines: tuple[tuple[str, str], ...]  # macros that make one variant of the source
    items: int
    args: tuple[object, ...]
    keep: Tensor | None = None  # memory that the arguments point to and nobody else holds until it is launched


Plan = list[Launch] | str


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides that mean something: those of dimensions longer than one."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _refusal(dtypes: dict[str, tuple[Tensor, tuple[torch.dtype, ...]]]) -> str | None:
    """Name the first tensor that is not of a type it may have."""
    for name, (tensor, allowed) in dtypes.items():
        if tensor.dtype not in allowed:
            return f"{name} is {tensor.dtype}"
    return None


def _layout_refusal(first: Tensor, *others: Tensor) -> str | None:
    if not _dense(first):
        return "the tensor to be written is not dense"
    if any(_strides(other) != _strides(first) for other in others):
        return "the tensors' memory layouts differ"
    return None


def _channels_last(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not channels-last"
    return None


def _runs(tensor: Tensor, *dtypes: torch.dtype) -> int:
    """How many vector accesses cover the tensor, when the widest of the types fills one."""
    width = WIDEST // max(dtype.itemsize for dtype in dtypes)
    return -(-tensor.numel() // width)


def _distances(state: Tensor, *values: float) -> tuple[object, ...]:
    """Return eps and alpha as the kernel takes them: levels for 8-bit pixels, else fractions of the range."""
    if state.dtype == torch.uint8:
        return tuple(c_int32(int(value)) for value in values)
    return tuple(c_float(value) for value in values)


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float) -> Plan:
    """One step on the state alone."""
    if why := _refusal({"x_adv": (x_adv, STATES), "grad": (grad, FLOATS)}) or _layout_refusal(x_adv, grad, x):
        return why
    if x_adv.numel() == 0:
        return []
    defines = (("STATE", CTYPES[x_adv.dtype]), ("GRAD", CTYPES[grad.dtype]))
    args = (x_adv.data_ptr(), grad.data_ptr(), x.data_ptr(), *_distances(x_adv, eps, alpha), c_int64(x_adv.numel()))
    return [Launch("pgd_step", "pgd_step", defines, _runs(x_adv, x_adv.dtype, grad.dtype), args)]


def _images(x: Tensor) -> tuple[object, ...]:
    return c_int64(x.shape[0]), c_int64(x.shape[2]), c_int64(x.shape[3])


def _statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[object, ...]:
    return tuple(c_float(value) for value in (*mean, *std))


def _cells(out: Tensor, layout: str) -> int:
    """How many groups of four pixels there are, with the border of s2d."""
    batch, _, height, width = out.shape
    pixels = batch * height * width
    return pixels if layout == "s2d" else -(-pixels // 4)


def model_input(out: Tensor, x: Tensor, mean: Sequence[float], std: Sequence[float], layout: str) -> Plan:
    """The model's input from the state."""
    if why := _refusal({"x": (x, STATES), "out": (out, FLOATS)}) or _channels_last(out=out, x=x):
        return why
    if out.numel() == 0:
        return []
    defines = (("STATE", CTYPES[x.dtype]), ("LAID", CTYPES[out.dtype]), ("LAYOUT", layout.upper()))
    args = (out.data_ptr(), x.data_ptr(), *_images(x), *_statistics(mean, std))
    return [Launch("model_input", "model_input", defines, _cells(out, layout), args)]


def pgd_step_input(
    x_adv: Tensor,
    out: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
) -> Plan:
    """One step on the state, and the model's next input."""
    why = _refusal({"x_adv": (x_adv, STATES), "out": (out, FLOATS)})
    if why := why or _channels_last(x_adv=x_adv, out=out, grad=grad, x=x):
        return why
    if out.numel() == 0:
        return []
    defines = (("STATE", CTYPES[x.dtype]), ("LAID", CTYPES[out.dtype]), ("LAYOUT", layout.upper()))
    pointers = (x_adv.data_ptr(), grad.data_ptr(), x.data_ptr(), out.data_ptr())
    args = (*pointers, *_images(x), *_distances(x_adv, eps, alpha), *_statistics(mean, std))
    return [Launch("pgd_step_input", "pgd_step_input", defines, _cells(out, layout), args)]


def draw_start(
    out: Tensor,
    x: Tensor,
    index: Tensor,
    counters: Tensor | None,
    eps: float,
    clean_prob: float,
    seed: int,
    epoch: int,
    step: int,
) -> Plan:
    """The starting point, into `out`; the counters are the tensor's, or the three integers if there is none."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    if why := _refusal({"x": (x, STATES)}) or _layout_refusal(out, x):
        return why
    if not last and not x.is_contiguous():
        return "x is neither contiguous nor channels-last"
    if not index.is_contiguous() or (counters is not None and not counters.is_contiguous()):
        return "index or counters is strided"
    if x.numel() == 0:
        return []
    pointers = (out.data_ptr(), x.data_ptr(), index.data_ptr(), 0 if counters is None else counters.data_ptr())
    _, channels, height, width = x.shape
    shape = (c_int64(x.numel()), c_int64(channels), c_int64(height * width), c_int32(last))
    key = (c_int64(seed), c_int64(epoch), c_int64(step))
    args = (*pointers, *key, *_distances(x, eps), c_float(clean_prob), *shape)
    return [Launch("draw_start", "draw_start", (("STATE", CTYPES[x.dtype]),), _runs(x, torch.float32), args)]


def free_delta_step(delta: Tensor, grad: Tensor, skip: Tensor, eps: float, alpha: float) -> Plan:
    """The perturbation of free training."""
    # Of a half-precision gradient torch rounds the step to that precision, so only float32 has the same result.
    float32 = (torch.float32,)
    why = _refusal({"delta": (delta, float32), "grad": (grad, float32), "skip": (skip, float32)})
    if why := why or _layout_refusal(delta, grad):
        return why
    if delta.numel() == 0:
        return []
    pointers = (delta.data_ptr(), grad.data_ptr(), skip.data_ptr())
    args = (*pointers, c_float(eps), c_float(alpha), c_int64(delta.numel()))
    return [Launch("free_step", "free_step", (), _runs(delta, torch.float32), args)]


def u8_to_input(out: Tensor, x: Tensor, dtype: torch.dtype) -> Plan:
    """Pixels of [0, 1], into `out`."""
    if why := _refusal({"out": (out, FLOATS)}) or _layout_refusal(out, x):
        return why
    if x.numel() == 0:
        return []
    args = (out.data_ptr(), x.data_ptr(), c_int64(x.numel()))
    return [Launch("u8_to_input", "u8_to_input", (("OUT", CTYPES[dtype]),), _runs(x, dtype), args)]


def bank_write(features: Tensor, index: Tensor, ptr: Tensor, feat: Tensor, feat_index: Tensor) -> Plan:
    """Rows into the ring, then its cursor."""
    if why := _refusal({"features": (features, FLOATS), "feat": (feat, FLOATS)}):
        return why
    if not all(tensor.is_contiguous() for tensor in (features, index, feat, feat_index)):
        return "a tensor is strided"
    (size, dim), rows = features.shape, feat.shape[0]
    if rows == 0:
        return []
    skipped = max(rows - size, 0)
    defines = (("FEATURE", CTYPES[features.dtype]), ("FEAT", CTYPES[feat.dtype]))
    pointers = (features.data_ptr(), index.data_ptr(), ptr.data_ptr(), feat.data_ptr(), feat_index.data_ptr())
    args = (*pointers, c_int64(size), c_int64(dim), c_int64(rows), c_int64(skipped))
    return [
        Launch("bank_write", "bank_write", defines, (rows - skipped) * dim, args),
        Launch("bank_write", "bank_advance", defines, 1, (ptr.data_ptr(), c_int64(size), c_int64(rows))),
    ]


def drelu_add(grad: Tensor, other: Tensor | None, out: Tensor) -> Plan:
    """The mask, and the sum if there is something to add."""
    tensors = (grad, out) if other is None else (grad, out, other)
    if why := _refusal({"grad": (grad, FLOATS)}) or _layout_refusal(*tensors):
        return why
    if grad.numel() == 0:
        return []
    pointers = (grad.data_ptr(), 0 if other is None else other.data_ptr(), out.data_ptr())
    defines = (("VALUE", CTYPES[grad.dtype]),)
    return [Launch("drelu_add", "drelu_add", defines, _runs(grad, grad.dtype), (*pointers, c_int64(grad.numel())))]
