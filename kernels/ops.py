"""The public ops, each put together from its check, its kernel launches and its reference.

Ops whose name ends in `_` change their first argument (and `out`, and the bank's three), return nothing and wait for
nothing, so a CUDA graph can capture them; each must have run once before, because loading a kernel cannot be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttht.kernels import checks, draws, launches, reference
from fasttht.kernels.draws import int64
from fasttht.kernels.reference import Layout, input_shape
from fasttht.kernels.registered import InPlaceOp, NewTensorOp

# ---- signed steps ------------------------------------------------------------------------------------------------

_linf = InPlaceOp(
    "pgd_linf_step_",
    "(Tensor(a!) x_adv, Tensor grad, Tensor x, float eps, float alpha)",
    partial(checks.pgd_step, lattice=False),
    launches.pgd_step,
    lambda x_adv, grad, x, eps, alpha: reference.pgd_linf_step_(x_adv, grad, x, eps=eps, alpha=alpha),
)


def pgd_linf_step_(x_adv: Tensor, grad: Tensor, x: Tensor, *, eps: float, alpha: float) -> None:
    """Take one linf ascent step along `grad` and project, in place. A negative alpha descends.

    Shapes: all (B, C, H, W); x_adv, x of one float type, in [0, 1], sharing no memory; grad of any float type.
    """
    _linf(x_adv, grad, x, eps, alpha)


_lattice = InPlaceOp(
    "pgd_lattice_step_",
    "(Tensor(a!) x_adv, Tensor grad, Tensor x, int eps, int alpha)",
    partial(checks.pgd_step, lattice=True),
    launches.pgd_step,
    lambda x_adv, grad, x, eps, alpha: reference.pgd_lattice_step_(x_adv, grad, x, eps=eps, alpha=alpha),
)


def pgd_lattice_step_(x_adv: Tensor, grad: Tensor, x: Tensor, *, eps: int, alpha: int) -> None:
    """Take one linf ascent step on the 8-bit lattice and project, in place and exactly.

    Shapes: all (B, C, H, W); x_adv, x uint8, sharing no memory; grad float. eps (0 to 255) and alpha (-255 to 255)
    are in levels, 1/255 of the range.
    """
    _lattice(x_adv, grad, x, eps, alpha)


_free = InPlaceOp(
    "free_delta_step_",
    "(Tensor(a!) delta, Tensor grad, Tensor skip, float eps, float alpha)",
    checks.free_delta_step,
    launches.free_delta_step,
    lambda delta, grad, skip, eps, alpha: reference.free_delta_step_(delta, grad, skip, eps=eps, alpha=alpha),
)


def free_delta_step_(delta: Tensor, grad: Tensor, skip: Tensor, *, eps: float, alpha: float) -> None:
    """Ascend the persistent perturbation of free training and clip it to +-eps, in place.

    Shapes: delta, grad (B, C, H, W); skip () float, 1 where the optimizer skipped this step: delta then stays.
    """
    _free(delta, grad, skip, eps, alpha)


# ---- the model's input -------------------------------------------------------------------------------------------

_input = InPlaceOp(
    "model_input_",
    "(Tensor(a!) out, Tensor x, float[] mean, float[] std, str layout)",
    checks.model_input,
    launches.model_input,
    reference.model_input_,
)


def model_input_(out: Tensor, x: Tensor, *, mean: Sequence[float], std: Sequence[float], layout: Layout) -> None:
    """Normalise images and write them, as the first convolution wants them, over the whole of `out`.

    Shapes: x (B, 3, H, W), float in [0, 1] or uint8 levels; out as made by empty_model_input. The layouts are
    described at reference.model_input.
    """
    _input(out, x, mean, std, layout)


def empty_model_input(x: Tensor, dtype: torch.dtype, layout: Layout) -> Tensor:
    """Allocate what model_input_ fills for images like x (B, 3, H, W): channels last, not initialised."""
    shape = input_shape(x.shape, layout)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


_STEP_INPUT = "(Tensor(a!) x_adv, Tensor(b!) out, Tensor grad, Tensor x, {0} eps, {0} alpha, {1})"
_INPUT = "float[] mean, float[] std, str layout"

_linf_input = InPlaceOp(
    "pgd_linf_step_input_",
    _STEP_INPUT.format("float", _INPUT),
    partial(checks.pgd_step_input, lattice=False),
    launches.pgd_step_input,
    lambda x_adv, out, grad, x, eps, alpha, mean, std, layout: reference.pgd_linf_step_input_(
        x_adv, out, grad, x, eps=eps, alpha=alpha, mean=mean, std=std, layout=layout
    ),
)


def pgd_linf_step_input_(
    x_adv: Tensor,
    out: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: float,
    alpha: float,
    mean: Sequence[float],
    std: Sequence[float],
    layout: Layout,
) -> None:
    """Do pgd_linf_step_ and write the model's next input to `out` in the same pass.

    Shapes: x_adv, x (B, 3, H, W) float in [0, 1]; out as made by empty_model_input, and grad like it: the gradient
    with respect to the model's input, not to the image (their signs agree). grad and out may be one tensor.
    """
    _linf_input(x_adv, out, grad, x, eps, alpha, mean, std, layout)


_lattice_input = InPlaceOp(
    "pgd_lattice_step_input_",
    _STEP_INPUT.format("int", _INPUT),
    partial(checks.pgd_step_input, lattice=True),
    launches.pgd_step_input,
    lambda x_adv, out, grad, x, eps, alpha, mean, std, layout: reference.pgd_lattice_step_input_(
        x_adv, out, grad, x, eps=eps, alpha=alpha, mean=mean, std=std, layout=layout
    ),
)


def pgd_lattice_step_input_(
    x_adv: Tensor,
    out: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    eps: int,
    alpha: int,
    mean: Sequence[float],
    std: Sequence[float],
    layout: Layout,
) -> None:
    """Do pgd_lattice_step_ and write the model's next input to `out` in the same pass; see pgd_linf_step_input_."""
    _lattice_input(x_adv, out, grad, x, eps, alpha, mean, std, layout)


_u8 = NewTensorOp(
    "u8_to_input",
    "(Tensor x, ScalarType dtype)",
    checks.u8_to_input,
    launches.u8_to_input,
    reference.u8_to_input,
    lambda x, dtype: torch.empty_like(x, dtype=dtype),
)


def u8_to_input(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 pixels to [0, 1], every k/255 correctly rounded; the memory format is kept."""
    return _u8(x, dtype)


# ---- starting points ---------------------------------------------------------------------------------------------


def _start_op(name: str, number: str, run: Callable[..., Tensor]) -> NewTensorOp:
    def at(x: Tensor, index: Tensor, counters: Tensor | None, eps: Any, clean_prob: float, *key: int) -> Tensor:
        seed, epoch, step = key if counters is None else counters.unbind()
        return run(x, index, eps=eps, clean_prob=clean_prob, seed=seed, epoch=epoch, step=step)

    schema = "(Tensor x, Tensor index, Tensor? counters, {} eps, float clean_prob, int seed, int epoch, int step)"
    check = partial(checks.draw_start, lattice=number == "int")
    return NewTensorOp(name, schema.format(number), check, launches.draw_start, at, lambda x, *_: torch.empty_like(x))


_start = _start_op("draw_start", "float", draws.draw_start)
_lattice_start = _start_op("draw_lattice_start", "int", draws.draw_lattice_start)


def draw_start(x: Tensor, index: Tensor, *, eps: float, clean_prob: float, seed: int, epoch: int, step: int) -> Tensor:
    """Draw the attack's starting point: x plus uniform noise, inside the ball and the image range.

    With probability `clean_prob` the whole batch starts from x itself (one draw per step, not per image).

    Shapes: x (B, C, H, W) in [0, 1]; index (B,) int64 dataset rows; returns a new tensor like x. The same bits on
    every device, in every memory format and however the batch is cut.
    """
    return _start(x, index, None, eps, clean_prob, int64(seed), int64(epoch), int64(step))


def draw_start_at(x: Tensor, index: Tensor, counters: Tensor, *, eps: float, clean_prob: float) -> Tensor:
    """Do draw_start with the counters in device memory, (seed, epoch, step) int64: a captured graph draws anew."""
    return _start(x, index, counters, eps, clean_prob, 0, 0, 0)


def draw_lattice_start(
    x: Tensor, index: Tensor, *, eps: int, clean_prob: float, seed: int, epoch: int, step: int
) -> Tensor:
    """Draw the attack's starting point on the 8-bit lattice: x plus integer offsets uniform in -eps .. eps, clipped.

    Shapes: x (B, C, H, W) uint8; index (B,) int64 dataset rows; returns a new tensor like x. eps is in levels.
    """
    return _lattice_start(x, index, None, eps, clean_prob, int64(seed), int64(epoch), int64(step))


def draw_lattice_start_at(x: Tensor, index: Tensor, counters: Tensor, *, eps: int, clean_prob: float) -> Tensor:
    """Do draw_lattice_start with the counters in device memory, (seed, epoch, step) int64."""
    return _lattice_start(x, index, counters, eps, clean_prob, 0, 0, 0)


# ---- the bank, and the network's backward ------------------------------------------------------------------------

_bank = InPlaceOp(
    "bank_write_",
    "(Tensor(a!) features, Tensor(b!) index, Tensor(c!) ptr, Tensor feat, Tensor feat_index)",
    checks.bank_write,
    launches.bank_write,
    reference.bank_write_,
)


def bank_write_(features: Tensor, index: Tensor, ptr: Tensor, feat: Tensor, feat_index: Tensor) -> None:
    """Write rows into the ring at `ptr` and advance it, all in place and without a host sync.

    Shapes: features (N, D), index (N,) int64, ptr () int64; feat (B, D) of any float type, feat_index (B,) int64. B
    may exceed N: only the last N rows survive, where a one-by-one writer would have left them. Rows are cast and not
    normalised, which is torch's before: kernels equal their references bit for bit, and the bits of a norm depend on
    the order of its sum.
    """
    _bank(features, index, ptr, feat, feat_index)


_drelu = InPlaceOp(
    "drelu_add_",
    "(Tensor(a!) grad, Tensor? other, Tensor out)",
    checks.drelu_add,
    launches.drelu_add,
    reference.drelu_add_,
)


def drelu_add_(grad: Tensor, other: Tensor | None, out: Tensor) -> None:
    """Run relu(a + b) backward, in place: grad = grad + other where the output is positive, else 0.

    Shapes: all the same, and of one float type; `other` is the gradient that comes in beside `grad`, or None; `out`
    is the ReLU's output. As in torch's threshold_backward a NaN in `out` lets the gradient through.
    """
    _drelu(grad, other, out)
