"""What each op takes. Called before the reference and before a kernel, by real and by fake tensors alike.

An operand of the wrong shape would be broadcast by torch and read out of bounds by a kernel, so both are refused with
the same words. Nothing here looks at data: no check waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttht.kernels.reference import Layout, input_shape

LAYOUTS: tuple[Layout, ...] = ("plain", "pad4", "s2d")


def _like(op: str, other: Tensor, name: str, tensor: Tensor) -> None:
    """Expect `tensor` to have the shape and the device of `other`."""
    if tensor.shape != other.shape:
        raise ValueError(f"{op}: expected {name} of shape {tuple(other.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != other.device:
        raise ValueError(f"{op}: expected {name} on {other.device}, got {tensor.device}")


def _dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: expected {name} of {dtype}, got {tensor.dtype}")


def _floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: expected {name} of a floating-point type, got {tensor.dtype}")


def _images(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim != 4:
        raise ValueError(f"{op}: expected {name} of shape (B, C, H, W), got {tuple(tensor.shape)}")


def _state(op: str, x_adv: Tensor, x: Tensor, eps: float, alpha: float, *, lattice: bool) -> None:
    _like(op, x_adv, "x", x)
    if not lattice:
        _floating(op, "x_adv", x_adv)
        _dtype(op, "x", x, x_adv.dtype)
        return
    _dtype(op, "x_adv", x_adv, torch.uint8)
    _dtype(op, "x", x, torch.uint8)
    _levels(op, "eps", eps, 0)
    _levels(op, "alpha", alpha, -255)


def _levels(op: str, name: str, value: float, low: int) -> None:
    if value != int(value) or not low <= value <= 255:
        raise ValueError(f"{op}: expected {name} to be a whole number of levels, {low} to 255, got {value}")


def pgd_step(op: str, x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float, *, lattice: bool) -> None:
    """Raise ValueError unless x_adv, grad and x may go into one step."""
    _state(op, x_adv, x, eps, alpha, lattice=lattice)
    _like(op, x_adv, "grad", grad)
    _floating(op, "grad", grad)


def model_input(op: str, out: Tensor, x: Tensor, mean: Sequence[float], std: Sequence[float], layout: str) -> None:
    """Raise ValueError unless `out` can take the model's input for the images x."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: expected layout to be one of {', '.join(LAYOUTS)}, got {layout}")
    _images(op, "x", x)
    if x.shape[1] != 3:
        raise ValueError(f"{op}: expected x to have 3 channels, got {x.shape[1]}")
    if layout == "s2d" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"{op}: expected an even height and width for s2d, got {x.shape[2]} x {x.shape[3]}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{op}: expected 3 means and 3 deviations, got {len(mean)} and {len(std)}")
    if min(std) <= 0:
        raise ValueError(f"{op}: expected positive deviations, got {tuple(std)}")
    if tuple(out.shape) != (shape := input_shape(x.shape, layout)):
        raise ValueError(f"{op}: expected out of shape {tuple(shape)} for {layout}, got {tuple(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"{op}: expected out on {x.device}, got {out.device}")
    _floating(op, "out", out)


def pgd_step_input(
    op: str,
    x_adv: Tensor,
    out: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float,
    alpha: float,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
    *,
    lattice: bool,
) -> None:
    """Raise ValueError unless the step may read `grad` and write `out`, both laid out as the model's input."""
    _state(op, x_adv, x, eps, alpha, lattice=lattice)
    model_input(op, out, x, mean, std, layout)
    _like(op, out, "grad", grad)
    _dtype(op, "grad", grad, out.dtype)


def draw_start(
    op: str, x: Tensor, index: Tensor, counters: Tensor | None, eps: float, *_: float, lattice: bool
) -> None:
    """Raise ValueError unless every image of x has its dataset row, and the counters are three."""
    _images(op, "x", x)
    if lattice:
        _dtype(op, "x", x, torch.uint8)
        _levels(op, "eps", eps, 0)
    else:
        _floating(op, "x", x)
    if index.shape != x.shape[:1]:
        raise ValueError(f"{op}: expected {x.shape[0]} indices, one per image, got {tuple(index.shape)}")
    for name, tensor in (("index", index), ("counters", counters)):
        if tensor is not None:
            _dtype(op, name, tensor, torch.int64)
            if tensor.device != x.device:
                raise ValueError(f"{op}: expected {name} on {x.device}, got {tensor.device}")
    if counters is not None and tuple(counters.shape) != (3,):
        raise ValueError(f"{op}: expected counters (seed, epoch, step) of shape (3,), got {tuple(counters.shape)}")


def free_delta_step(op: str, delta: Tensor, grad: Tensor, skip: Tensor, *_: float) -> None:
    """Raise ValueError unless grad is one of delta and skip is a scalar beside it."""
    _like(op, delta, "grad", grad)
    _floating(op, "delta", delta)
    _floating(op, "grad", grad)
    if skip.ndim != 0 or skip.device != delta.device:
        raise ValueError(f"{op}: expected skip of shape () on {delta.device}, got {tuple(skip.shape)} on {skip.device}")


def u8_to_input(op: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless x holds 8-bit pixels and dtype can hold fractions."""
    _dtype(op, "x", x, torch.uint8)
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: expected a floating-point type to convert to, got {dtype}")


def bank_write(op: str, features: Tensor, index: Tensor, ptr: Tensor, feat: Tensor, feat_index: Tensor) -> None:
    """Raise ValueError unless the rows fit the ring."""
    if features.ndim != 2 or features.shape[0] < 1:
        raise ValueError(f"{op}: expected features of shape (N, D) with N at least 1, got {tuple(features.shape)}")
    if feat.ndim != 2 or feat.shape[1] != features.shape[1]:
        raise ValueError(f"{op}: expected feat of shape (B, {features.shape[1]}), got {tuple(feat.shape)}")
    if index.shape != features.shape[:1]:
        raise ValueError(f"{op}: expected index of shape ({features.shape[0]},), got {tuple(index.shape)}")
    if feat_index.shape != feat.shape[:1]:
        raise ValueError(f"{op}: expected feat_index of shape ({feat.shape[0]},), got {tuple(feat_index.shape)}")
    if ptr.ndim != 0:
        raise ValueError(f"{op}: expected ptr of shape (), got {tuple(ptr.shape)}")
    for name, tensor in (("index", index), ("ptr", ptr), ("feat_index", feat_index)):
        _dtype(op, name, tensor, torch.int64)
    for name, tensor in (("index", index), ("ptr", ptr), ("feat", feat), ("feat_index", feat_index)):
        if tensor.device != features.device:
            raise ValueError(f"{op}: expected {name} on {features.device}, got {tensor.device}")


def drelu_add(op: str, grad: Tensor, other: Tensor | None, out: Tensor) -> None:
    """Raise ValueError unless both gradients and the ReLU's output are alike."""
    _floating(op, "grad", grad)
    for name, tensor in (("other", other), ("out", out)):
        if tensor is not None:
            _like(op, grad, name, tensor)
            _dtype(op, name, tensor, grad.dtype)
