"""Every op in plain torch: the specification that any other implementation must equal.

Draws are counter-based. A row key hashes (stream, seed, epoch, step, dataset index); element e of that row is
SplitMix64's e-th output from the key. The bits are the same on CPU and GPU, for any batch split, world size or
order of evaluation, and the global RNG is never touched. `pipelines/plan.py` states the same hash in numpy;
tests/test_draws.py holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Streams keep draws of different purposes independent even where the other counters agree.
STREAM_START = 0x5354
STREAM_TARGET = 0x5447
STREAM_CLEAN_START = 0x4353


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


def row_keys(stream: int, seed: int, epoch: int, step: int, index: Tensor) -> Tensor:
    """Hash the counters of a draw to one key per row.

    Shapes: index (B,) int64; returns (B,) int64.
    """
    key = torch.zeros((), dtype=torch.int64, device=index.device)
    for word in (stream, seed, epoch, step):
        key = mix64((key ^ _signed(word & (2**64 - 1))) + GOLDEN)
    return mix64((key ^ index) + GOLDEN)


def draw_bits(keys: Tensor, element: Tensor) -> Tensor:
    """Return 64 random bits (int64) for every (key, element) pair; the arguments broadcast."""
    return mix64(keys + (element + 1) * GOLDEN)


def draw_uniform(keys: Tensor, element: Tensor) -> Tensor:
    """Return float32 uniforms in [0, 1): the top 24 bits, so that every value is exact."""
    return _shift_right(draw_bits(keys, element), 40).to(torch.float32) * 2.0**-24


def draw_start(x: Tensor, index: Tensor, *, eps: float, clean_prob: float, seed: int, epoch: int, step: int) -> Tensor:
    """Draw the attack's starting point: x plus uniform noise, inside the ball and the image range.

    With probability `clean_prob` the whole batch starts from x itself (one draw per step, not per image).

    Shapes: x (B, C, H, W) in [0, 1]; index (B,) int64 dataset rows; returns a new tensor like x.
    The element counter is the logical (c, h, w) position, so the memory format does not change the draw.
    """
    channels, height, width = x.shape[1:]
    element = torch.arange(channels * height * width, device=x.device).view(1, channels, height, width)
    if x.is_contiguous(memory_format=torch.channels_last):
        element = element.contiguous(memory_format=torch.channels_last)
    keys = row_keys(STREAM_START, seed, epoch, step, index)
    noise = draw_uniform(keys.view(-1, 1, 1, 1), element).mul_(2).sub_(1).to(x.dtype)
    batch_key = row_keys(STREAM_CLEAN_START, seed, epoch, step, index.new_zeros(1))
    moves = draw_uniform(batch_key, index.new_zeros(1)) >= clean_prob
    return clip_to_ball_(x + noise * (eps * moves.to(x.dtype)), x, eps)


def draw_target(y: Tensor, index: Tensor, num_classes: int, *, seed: int, epoch: int, step: int) -> Tensor:
    """Draw a target class for every image, uniform over the classes that are not its label.

    Shapes: y (B,), index (B,) int64; returns (B,) int64.
    """
    keys = row_keys(STREAM_TARGET, seed, epoch, step, index)
    # Multiply-shift: 32 random bits scaled to 0 .. num_classes-2; the bias is below 2**-22 for 1000 classes.
    offset = _shift_right(_shift_right(draw_bits(keys, torch.zeros_like(index)), 32) * (num_classes - 1), 32)
    return (y + 1 + offset) % num_classes


def clip_to_ball_(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Project x_adv in place onto x - eps <= x_adv <= x + eps and [0, 1]; return it."""
    return x_adv.clamp_(min=(x - eps).clamp_(min=0), max=(x + eps).clamp_(max=1))


def sign(grad: Tensor) -> Tensor:
    """Return the sign of every element; of a NaN, 0 (a NaN step would poison the pixel for good)."""
    return torch.sign(grad).nan_to_num_(nan=0.0)


def pgd_linf_step_(x_adv: Tensor, grad: Tensor, x: Tensor, *, eps: float, alpha: float) -> None:
    """Take one linf ascent step along `grad` and project, in place. A negative alpha descends.

    Shapes: all (B, C, H, W); x in [0, 1].
    """
    x_adv.add_(sign(grad), alpha=alpha)
    clip_to_ball_(x_adv, x, eps)


def free_delta_step_(delta: Tensor, grad: Tensor, skip: Tensor, *, eps: float, alpha: float) -> None:
    """Ascend the persistent perturbation of free training and clip it to +-eps, in place.

    Shapes: delta, grad (B, C, H, W); skip () float, 1 where the optimizer skipped this step: delta then stays.
    """
    delta.add_(sign(grad) * (alpha * (1 - skip).to(delta.dtype))).clamp_(-eps, eps)


def u8_to_input(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 pixels to [0, 1]; the memory format is kept.

    Division, not multiplication by 1/255: every k/255 is then correctly rounded.
    """
    return x.to(dtype).div_(255)


def bank_write_(features: Tensor, index: Tensor, ptr: Tensor, feat: Tensor, feat_index: Tensor) -> None:
    """Write rows into the ring at `ptr` and advance it, all in place and without a host sync.

    Shapes: features (N, D), index (N,) int64, ptr () int64; feat (B, D), feat_index (B,). B may exceed N: only
    the last N rows survive, where a one-by-one writer would have left them.
    """
    size, rows = features.shape[0], feat.shape[0]
    skipped = max(rows - size, 0)
    slots = (ptr + torch.arange(skipped, rows, device=features.device)) % size
    features.index_copy_(0, slots, feat[skipped:].to(features.dtype))
    index.index_copy_(0, slots, feat_index[skipped:])
    ptr.add_(rows).remainder_(size)
