"""The calls that `bench kernels` times: for each op its operands, its plain-torch reference and the bytes it must move.

Operands are as training makes them, channels-last: a batch of images, a stage's activations, the bank. The declared
traffic is what any implementation has to read and write once; one that makes more passes reaches fewer GB/s by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.kernels import convs, cuda, draws, reference
from fasttht.models.two_head import MEAN, STD

Operands = tuple[Tensor, ...]

EPS, ALPHA = 4 / 255, 1 / 255
LEVELS = 4
_COUNTERS: dict[str, Any] = {"seed": 0, "epoch": 1, "step": 2}
_BANK, _FEAT_DIM = 32768, 128


@dataclass(frozen=True)
class Shapes:
    """How large the operands are. half: the type of activations and gradients; channels: of the widest activation."""

    batch_size: int
    img_size: int
    channels: int
    device: torch.device
    half: torch.dtype

    @property
    def side(self) -> int:
        """Side of a first stage's activations."""
        return max(self.img_size // 4, 1)


@dataclass(frozen=True)
class Case:
    """One op. make: a fresh set of operands; op and reference take them; moved: the bytes of a call."""

    make: Callable[[Shapes], Operands]
    op: Callable[..., object]
    reference: Callable[..., object]
    moved: Callable[[Operands], int]


def which_ran(name: str, call: Callable[[], object]) -> str:
    """Make one call of an op and say which implementation took it: `cuda`, `cudnn` or `torch`."""
    before = cuda.ran[name, "cuda"]
    out = call()
    if cuda.ran[name, "cuda"] > before:
        return "cuda"
    kind = name.removeprefix("conv_")
    fused = isinstance(out, Tensor) and out.is_cuda and name.startswith("conv_")
    return "cudnn" if fused and not any(key[0] == kind for key in convs._plain) else "torch"


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers in [0, 1), channels-last where there are channels; the global random state stays as it is."""
    generator = torch.Generator(device=device).manual_seed(0)
    found = torch.rand(shape, generator=generator, device=device).to(dtype)
    return found.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else found


def _floats(s: Shapes, dtype: torch.dtype = torch.float32) -> Tensor:
    return _random((s.batch_size, 3, s.img_size, s.img_size), s.device, dtype)


def _levels(s: Shapes) -> Tensor:
    return (_floats(s) * 256).to(torch.uint8)


def _grad(s: Shapes) -> Tensor:
    return _floats(s, s.half) - 0.5


def _index(s: Shapes) -> Tensor:
    return torch.arange(s.batch_size, device=s.device)


def _counters(s: Shapes) -> Tensor:
    return torch.tensor(list(_COUNTERS.values()), device=s.device)


def _activations(s: Shapes, channels: int) -> Tensor:
    return _random((s.batch_size, channels, s.side, s.side), s.device, s.half) - 0.5


def _model_input(s: Shapes) -> Tensor:
    return kernels.empty_model_input(_floats(s), s.half, _layout(s)).fill_(0.5)


def _layout(s: Shapes) -> kernels.Layout:
    return "s2d" if s.img_size % 2 == 0 else "plain"


def _layout_of(out: Tensor) -> kernels.Layout:
    return "s2d" if out.shape[1] == 12 else "plain"


def _bank(s: Shapes) -> Operands:
    return (
        torch.zeros(_BANK, _FEAT_DIM, device=s.device),
        torch.full((_BANK,), -1, device=s.device),
        torch.zeros((), dtype=torch.int64, device=s.device),
        _random((s.batch_size, _FEAT_DIM), s.device, torch.float32),
        _index(s),
    )


def _batch_norm(s: Shapes) -> Operands:
    affine_and_statistics = (torch.ones(s.channels, device=s.device) for _ in range(4))
    return _activations(s, s.channels), _activations(s, s.channels), *affine_and_statistics


def _batch_norm_plain(
    x: Tensor, other: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    """Normalise with the batch's statistics, add and clip, by three calls; the first reads x twice."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training=True, momentum=0.1, eps=1e-5)
    return out.add_(other).relu_()


def _conv(s: Shapes, kernel: int, channels: int, channels_out: int) -> Operands:
    weight = _random((channels_out, channels, kernel, kernel), s.device, s.half) - 0.5
    return _activations(s, channels), weight, torch.zeros(channels_out, device=s.device, dtype=s.half)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _conv_bytes(o: Operands) -> int:
    x, weight, bias, *other = o
    out = x.numel() // x.shape[1] * weight.shape[0] * x.element_size()
    return _bytes(x, weight, bias, *other) + out


def _step_input(step: Callable[..., object], eps: float, alpha: float) -> Callable[..., object]:
    def call(x_adv: Tensor, out: Tensor, grad: Tensor, x: Tensor) -> None:
        step(x_adv, out, grad, x, eps=eps, alpha=alpha, mean=MEAN, std=STD, layout=_layout_of(out))

    return call


_LINF: dict[str, Any] = {"eps": EPS, "alpha": ALPHA}
_LATTICE: dict[str, Any] = {"eps": LEVELS, "alpha": 1}
_START: dict[str, Any] = {"clean_prob": 0.2}

CASES: dict[str, Case] = {
    "pgd_linf_step_": Case(
        lambda s: (_floats(s), _grad(s), _floats(s)),
        partial(kernels.pgd_linf_step_, **_LINF),
        partial(reference.pgd_linf_step_, **_LINF),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "pgd_lattice_step_": Case(
        lambda s: (_levels(s), _grad(s), _levels(s)),
        partial(kernels.pgd_lattice_step_, **_LATTICE),
        partial(reference.pgd_lattice_step_, **_LATTICE),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "pgd_linf_step_input_": Case(
        lambda s: (_floats(s), _model_input(s), _model_input(s), _floats(s)),
        _step_input(kernels.pgd_linf_step_input_, EPS, ALPHA),
        _step_input(reference.pgd_linf_step_input_, EPS, ALPHA),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "pgd_lattice_step_input_": Case(
        lambda s: (_levels(s), _model_input(s), _model_input(s), _levels(s)),
        _step_input(kernels.pgd_lattice_step_input_, LEVELS, 1),
        _step_input(reference.pgd_lattice_step_input_, LEVELS, 1),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "free_delta_step_": Case(
        lambda s: (_floats(s) * 0, _grad(s).float(), torch.zeros((), device=s.device)),
        partial(kernels.free_delta_step_, **_LINF),
        partial(reference.free_delta_step_, **_LINF),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "model_input_": Case(
        lambda s: (_model_input(s), _floats(s)),
        lambda out, x: kernels.model_input_(out, x, mean=MEAN, std=STD, layout=_layout_of(out)),
        lambda out, x: reference.model_input_(out, x, MEAN, STD, _layout_of(out)),
        lambda o: _bytes(*o),
    ),
    "u8_to_input": Case(
        lambda s: (_levels(s),),
        kernels.u8_to_input,
        reference.u8_to_input,
        lambda o: 5 * _bytes(*o),
    ),
    "draw_start": Case(
        lambda s: (_floats(s), _index(s)),
        partial(kernels.draw_start, eps=EPS, **_START, **_COUNTERS),
        partial(draws.draw_start, eps=EPS, **_START, **_COUNTERS),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "draw_start_at": Case(
        lambda s: (_floats(s), _index(s), _counters(s)),
        partial(kernels.draw_start_at, eps=EPS, **_START),
        lambda x, index, counters: draws.draw_start(
            x, index, eps=EPS, **_START, seed=counters[0], epoch=counters[1], step=counters[2]
        ),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "draw_lattice_start": Case(
        lambda s: (_levels(s), _index(s)),
        partial(kernels.draw_lattice_start, eps=LEVELS, **_START, **_COUNTERS),
        partial(draws.draw_lattice_start, eps=LEVELS, **_START, **_COUNTERS),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "draw_lattice_start_at": Case(
        lambda s: (_levels(s), _index(s), _counters(s)),
        partial(kernels.draw_lattice_start_at, eps=LEVELS, **_START),
        lambda x, index, counters: draws.draw_lattice_start(
            x, index, eps=LEVELS, **_START, seed=counters[0], epoch=counters[1], step=counters[2]
        ),
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "bank_write_": Case(
        _bank,
        kernels.bank_write_,
        reference.bank_write_,
        lambda o: 2 * _bytes(o[3], o[4]) + 2 * _bytes(o[2]),
    ),
    "drelu_add_": Case(
        lambda s: tuple(_activations(s, s.channels) for _ in range(3)),
        kernels.drelu_add_,
        reference.drelu_add_,
        lambda o: _bytes(*o) + _bytes(o[0]),
    ),
    "bn_relu": Case(
        _batch_norm,
        partial(kernels.bn_relu, momentum=0.1, eps=1e-5),
        _batch_norm_plain,
        lambda o: 2 * _bytes(o[0]) + 2 * _bytes(o[1]),
    ),
    "conv_relu": Case(
        lambda s: _conv(s, 3, s.channels // 4, s.channels // 4),
        lambda x, weight, bias: kernels.conv_relu(x, weight, bias, (1, 1), (1, 1)),
        lambda x, weight, bias: F.conv2d(x, weight, bias, 1, 1).relu_(),
        _conv_bytes,
    ),
    "conv_add_relu": Case(
        lambda s: (*_conv(s, 1, s.channels // 4, s.channels), _activations(s, s.channels)),
        lambda x, weight, bias, other: kernels.conv_add_relu(x, weight, bias, other, (1, 1), (0, 0)),
        lambda x, weight, bias, other: F.conv2d(x, weight, bias).add_(other).relu_(),
        _conv_bytes,
    ),
}


def without_case() -> list[str]:
    """Return the ops of fasttht.kernels that nothing here times; there should be none."""
    registered = set(dir(torch.ops.fasttht))
    return sorted(name for name in kernels.__all__ if name in registered and name not in CASES)
