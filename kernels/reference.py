"""Every op in plain torch: the specification that any other implementation must equal. Draws are in draws.py.

Pixels are float in [0, 1], or uint8 levels on the lattice that 8-bit images lie on. There eps and alpha are integers
and every step is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# How the model's input is laid out in memory; see model_input.
Layout = Literal["plain", "pad4", "s2d"]

# The convolution (stride, padding) that equals a 7x7 one of stride 2 and padding 3, given stem_weight(weight, layout).
STEM_CONV: dict[Layout, tuple[int, int]] = {"plain": (2, 3), "pad4": (2, 3), "s2d": (1, 0)}


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


def pgd_lattice_step_(x_adv: Tensor, grad: Tensor, x: Tensor, *, eps: int, alpha: int) -> None:
    """Take one linf ascent step along `grad` on the lattice and project, in place. A negative alpha descends.

    Shapes: all (B, C, H, W); x_adv, x uint8, grad float. eps and alpha are in levels (1/255 of the range).
    """
    clean = x.to(torch.int16)
    moved = x_adv.to(torch.int16) + sign(grad).to(torch.int16) * alpha
    x_adv.copy_(moved.clamp_(min=(clean - eps).clamp_(min=0), max=(clean + eps).clamp_(max=255)))


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


def drelu_add_(grad: Tensor, other: Tensor | None, out: Tensor) -> None:
    """Run relu(a + b) backward, in place: grad = grad + other where the output is positive, else 0.

    Shapes: all the same; `other` is the gradient that comes in beside `grad`, if any, and `out` the ReLU's output.
    As in torch's threshold_backward, what is tested is out <= 0: a NaN in `out` lets the gradient through, and a NaN
    or infinite gradient is exactly 0 where the output is not positive.
    """
    if other is not None:
        grad.add_(other)
    torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad)  # one pass, and no mask in memory


def input_shape(shape: Sequence[int], layout: Layout) -> tuple[int, int, int, int]:
    """Return the shape of the model's input for images of this shape (B, 3, H, W)."""
    batch, channels, height, width = shape
    if layout == "s2d":
        return batch, 4 * channels, height // 2 + 3, width // 2 + 3
    return batch, 4 if layout == "pad4" else channels, height, width


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one number per channel, (1, C, 1, 1), in the type and on the device of `like`.

    Written there by fills: torch.tensor would copy from the host, which waits and cannot be captured.
    """
    return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)


def model_input(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, layout: Layout) -> Tensor:
    """Normalise images, round them to `dtype` and lay them out for the first convolution; channels last.

    - plain: (B, 3, H, W).
    - pad4: (B, 4, H, W), the fourth channel zero.
    - s2d: (B, 12, H/2 + 3, W/2 + 3), H and W even. Each 2x2 square becomes one position: pixel (2i + dy, 2j + dx)
      of channel c is at (i + 2, j + 2) of channel (2*dy + dx)*3 + c. The border is zero, two before and one after:
      the padding of the 7x7 convolution, which torch's symmetric padding cannot express.

    Shapes: x (B, 3, H, W), float in [0, 1] or uint8 levels. Computed in float32 (float64 where x is).
    """
    x = u8_to_input(x) if x.dtype == torch.uint8 else x
    unit = ((x - per_channel(mean, x)) / per_channel(std, x)).to(dtype)
    if layout == "pad4":
        unit = F.pad(unit, (0, 0, 0, 0, 0, 1))
    elif layout == "s2d":
        unit = F.pad(_space_to_depth(unit), (2, 1, 2, 1))
    return unit.contiguous(memory_format=torch.channels_last)


def image_grad(grad: Tensor, layout: Layout) -> Tensor:
    """Bring a gradient with respect to the model's input back to (B, 3, H, W), one element per pixel and channel.

    Its sign is that of the gradient with respect to the image, because every std is positive.
    """
    if layout == "pad4":
        return grad[:, :3]
    if layout == "s2d":
        inner = grad[:, :, 2:-1, 2:-1]
        batch, _, height, width = inner.shape
        pixels = inner.reshape(batch, 2, 2, 3, height, width).permute(0, 3, 4, 1, 5, 2)
        return pixels.reshape(batch, 3, 2 * height, 2 * width)
    return grad


def _space_to_depth(x: Tensor) -> Tensor:
    """Turn (N, 3, 2i, 2j) into (N, 12, i, j), channel (2*dy + dx)*3 + c."""
    rows, channels, height, width = x.shape
    squares = x.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return squares.reshape(rows, 4 * channels, height // 2, width // 2)


def stem_weight(weight: Tensor, layout: Layout) -> Tensor:
    """Rewrite the weight of a 7x7 convolution of stride 2 and padding 3 for inputs in this layout.

    Convolving model_input(..., layout) with the result, at STEM_CONV[layout], gives the same output. For s2d the tap
    (ky, kx) of channel c moves to ((ky + 1) // 2, (kx + 1) // 2) of channel (2*dy + dx)*3 + c, with dy = (ky + 1) % 2
    and dx = (kx + 1) % 2: a zero row and column in front make the 7x7 kernel 8x8, which then splits as the image does.

    Shapes: weight (O, 3, 7, 7); returns (O, 3, 7, 7), (O, 4, 7, 7) or (O, 12, 4, 4). Differentiable.
    """
    if layout == "pad4":
        return F.pad(weight, (0, 0, 0, 0, 0, 1))
    if layout == "s2d":
        return _space_to_depth(F.pad(weight, (1, 0, 1, 0)))
    return weight


def model_input_(out: Tensor, x: Tensor, mean: Sequence[float], std: Sequence[float], layout: Layout) -> None:
    """Write model_input(x, ...) over the whole of `out`, zeros included."""
    out.copy_(model_input(x, mean, std, out.dtype, layout))


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
    """Take a step along the gradient with respect to the model's input, then write the next input to `out`."""
    pgd_linf_step_(x_adv, image_grad(grad, layout), x, eps=eps, alpha=alpha)
    model_input_(out, x_adv, mean, std, layout)


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
    """Do the same on the lattice."""
    pgd_lattice_step_(x_adv, image_grad(grad, layout), x, eps=eps, alpha=alpha)
    model_input_(out, x_adv, mean, std, layout)
