"""Random numbers in plain torch, counted and not drawn from a state: targets, starts, rows.

A row key hashes (stream, seed, epoch, step, dataset index); element e of that row is SplitMix64's e-th output from the
key. The bits are the same on CPU and GPU, for any batch split, world size or order of evaluation, and the global RNG
is never touched. `pipelines/plan.py` states the same hash in numpy; tests/test_draws.py holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttht.kernels.reference import clip_to_ball_

# Streams keep draws of different purposes independent even where the other counters agree.
STREAM_START = 0x5354
STREAM_TARGET = 0x5447
STREAM_CLEAN_START = 0x4353
STREAM_ROWS = 0x5257


def _signed(value: int) -> int:
    """Reinterpret a uint64 constant as the int64 that torch can hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix64(z: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64 words; multiplication wraps modulo 2**64."""
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def int64(word: int) -> int:
    """Wrap an integer to 64 bits, as the int64 that torch can hold."""
    return _signed(word & (2**64 - 1))


def row_keys(stream: int, seed: int | Tensor, epoch: int | Tensor, step: int | Tensor, index: Tensor) -> Tensor:
    """Hash the counters of a draw to one key per row.

    Shapes: index (B,) int64; counters that are tensors () int64 on its device; returns (B,) int64.
    """
    key = torch.zeros((), dtype=torch.int64, device=index.device)
    for word in (stream, seed, epoch, step):
        key = mix64((key ^ (word if isinstance(word, Tensor) else int64(word))) + GOLDEN)
    return mix64((key ^ index) + GOLDEN)


def draw_bits(keys: Tensor, element: Tensor) -> Tensor:
    """Return 64 random bits (int64) for every (key, element) pair; the arguments broadcast."""
    return mix64(keys + (element + 1) * GOLDEN)


def draw_uniform(keys: Tensor, element: Tensor) -> Tensor:
    """Return float32 uniforms in [0, 1): the top 24 bits, so that every value is exact."""
    return _shift_right(draw_bits(keys, element), 40).to(torch.float32) * 2.0**-24


def draw_start(
    x: Tensor,
    index: Tensor,
    *,
    eps: float,
    clean_prob: float,
    seed: int | Tensor,
    epoch: int | Tensor,
    step: int | Tensor,
) -> Tensor:
    """Draw the attack's starting point: x plus uniform noise, inside the ball and the image range.

    With probability `clean_prob` the whole batch starts from x itself (one draw per step, not per image).

    Shapes: x (B, C, H, W) in [0, 1]; index (B,) int64 dataset rows; returns a new tensor like x.
    The element counter is the logical (c, h, w) position, so the memory format does not change the draw.
    """
    noise = draw_uniform(row_keys(STREAM_START, seed, epoch, step, index).view(-1, 1, 1, 1), _element(x))
    noise = noise.mul_(2).sub_(1).to(x.dtype)
    moves = _moves(index, clean_prob, seed, epoch, step)
    return clip_to_ball_(x + noise * (eps * moves.to(x.dtype)), x, eps)


def draw_lattice_start(
    x: Tensor,
    index: Tensor,
    *,
    eps: int,
    clean_prob: float,
    seed: int | Tensor,
    epoch: int | Tensor,
    step: int | Tensor,
) -> Tensor:
    """Draw the attack's starting point on the lattice: x plus integer offsets uniform in -eps .. eps, clipped.

    It reads the bits of draw_start (a run uses one or the other): the top 32, scaled to 0 .. 2*eps by multiply-shift,
    so that an offset's probability is off by less than 2**-32.

    Shapes: x (B, C, H, W) uint8; index (B,) int64 dataset rows; returns a new tensor like x.
    """
    bits = draw_bits(row_keys(STREAM_START, seed, epoch, step, index).view(-1, 1, 1, 1), _element(x))
    offset = _shift_right(_shift_right(bits, 32) * (2 * eps + 1), 32) - eps
    moves = _moves(index, clean_prob, seed, epoch, step)
    return (x + offset * moves).clamp_(0, 255).to(torch.uint8)


def _element(x: Tensor) -> Tensor:
    """Number the elements of an image by logical position, in the memory format of x: (1, C, H, W) int64."""
    channels, height, width = x.shape[1:]
    element = torch.arange(channels * height * width, device=x.device).view(1, channels, height, width)
    if x.is_contiguous(memory_format=torch.channels_last):
        element = element.contiguous(memory_format=torch.channels_last)
    return element


def _moves(index: Tensor, clean_prob: float, seed: int | Tensor, epoch: int | Tensor, step: int | Tensor) -> Tensor:
    """Return (1,) bool: whether this step's batch leaves the clean images at all."""
    batch_key = row_keys(STREAM_CLEAN_START, seed, epoch, step, index.new_zeros(1))
    return draw_uniform(batch_key, index.new_zeros(1)) >= clean_prob


def draw_target(
    y: Tensor,
    index: Tensor,
    num_classes: int,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    step: int | Tensor,
) -> Tensor:
    """Draw a target class for every image, uniform over the classes that are not its label.

    Shapes: y (B,), index (B,) int64; returns (B,) int64.
    """
    keys = row_keys(STREAM_TARGET, seed, epoch, step, index)
    # Multiply-shift: 32 random bits scaled to 0 .. num_classes-2; the bias is below 2**-22 for 1000 classes.
    offset = _shift_right(_shift_right(draw_bits(keys, torch.zeros_like(index)), 32) * (num_classes - 1), 32)
    return (y + 1 + offset) % num_classes


def draw_rows(num_rows: int, num: int, *, seed: int | Tensor, step: Tensor) -> Tensor:
    """Draw `num` independent rows, uniform over 0 .. num_rows-1, with a bias below 2**-11 for 2**21 rows.

    Shapes: step () int64, whose device the draw is made on; returns (num,) int64.
    """
    position = torch.arange(num, device=step.device)
    bits = draw_bits(row_keys(STREAM_ROWS, seed, 0, step, position), torch.zeros_like(position))
    return _shift_right(_shift_right(bits, 32) * num_rows, 32)
