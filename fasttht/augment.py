"""Colour, blur and lighting of a batch on its device, without a host sync: what is done to the pixels of a cut image.

Random numbers are counter-based: an image's depend on (seed, epoch, step, dataset row, view, purpose) alone, so any
split of a batch gives the same. The order is fixed, where torchvision and the reference recipes shuffle it: brightness,
contrast, saturation, hue, lighting, grayscale, blur. Images are float in [0, 1] and nothing is rounded on the way.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.pgd import Draw
from fasttht.config import DataConfig
from fasttht.kernels.draws import draw_uniform, row_keys
from fasttht.pipelines.loader import Batch

STREAM_AUGMENT = 0x4155

# What each element of an image's row of draws decides. Box-Muller takes two uniforms for each pair of normals.
BRIGHTNESS, CONTRAST, SATURATION, HUE, JITTER, GRAYSCALE, BLUR, SIGMA = range(8)
LIGHTING = 8
DRAWS = 12

# Shares of red, green and blue in the luminance (ITU-R 601-2), rounded as torchvision rounds them.
LUMA = (0.2989, 0.587, 0.114)

# Principal components of the colours of ImageNet's [0, 1] pixels (Krizhevsky et al. 2012): an eigenvector a column.
COLOUR_VALUES = (0.2175, 0.0188, 0.0045)
COLOUR_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

# The blur's kernel ends at this many times the largest sigma; beyond lies 1/16,000 of a Gaussian.
BLUR_REACH = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What may happen to an image; the defaults do nothing.

    jitter: brightness, contrast and saturation each by a factor from U(1 - jitter, 1 + jitter); hue: turned by a share
    of the circle from U(-hue, hue); both together with probability jitter_prob. lighting: standard deviation of the
    noise along the principal components of colour. grayscale, blur: probabilities; the blur's sigma, in pixels, is
    from U(blur_sigma).
    """

    jitter: float = 0.0
    hue: float = 0.0
    jitter_prob: float = 1.0
    lighting: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)


def training_recipe(data: DataConfig) -> Recipe | None:
    """Return what `--jitter` and `--lighting` ask for, or None if both are off."""
    recipe = Recipe(jitter=data.jitter, lighting=data.lighting)
    return None if recipe == Recipe() else recipe


def augment_batch(batch: Batch, recipe: Recipe, draw: Draw) -> Batch:
    """Augment a batch and round it back to 8 bits, as reference recipes do: every consumer then sees the same images.

    So the attack's lattice stays one, and nothing behind the loader must know of this.
    """
    x = augment(kernels.u8_to_input(batch.x), batch.index, recipe, draw)
    return dataclasses.replace(batch, x=x.mul(255).round_().to(torch.uint8))


@torch.no_grad()
def augment(x: Tensor, index: Tensor, recipe: Recipe, draw: Draw, *, view: int = 0) -> Tensor:
    """Apply a recipe to images.

    Shapes: x (B, 3, H, W) float in [0, 1], index (B,) int64 dataset rows; returns a new tensor like x. `view` gives the
    same rows other draws in the same step.
    """
    keys = row_keys(STREAM_AUGMENT, draw.seed, draw.epoch, draw.step, index)
    elements = torch.arange(DRAWS * view, DRAWS * (view + 1), device=x.device)
    u = draw_uniform(keys[:, None], elements).to(x.dtype)
    if recipe.jitter or recipe.hue:
        jitters = u[:, JITTER] < recipe.jitter_prob
    if recipe.jitter:
        low = max(0.0, 1 - recipe.jitter)
        factors = torch.where(jitters[:, None], low + (1 + recipe.jitter - low) * u[:, :3], 1.0)
        x = brightness(x, factors[:, BRIGHTNESS])
        x = contrast(x, factors[:, CONTRAST])
        x = saturation(x, factors[:, SATURATION])
    if recipe.hue:
        x = torch.where(_rows(jitters), hue(x, recipe.hue * (2 * u[:, HUE] - 1)), x)
    if recipe.lighting:
        x = lighting(x, recipe.lighting * _normals(u[:, LIGHTING:DRAWS]))
    if recipe.grayscale:
        x = torch.where(_rows(u[:, GRAYSCALE] < recipe.grayscale), luma(x), x)
    if recipe.blur:
        low, high = recipe.blur_sigma
        blurred = blur(x, low + (high - low) * u[:, SIGMA], reach=math.ceil(BLUR_REACH * high))
        x = torch.where(_rows(u[:, BLUR] < recipe.blur), blurred, x)
    return x.contiguous(memory_format=torch.channels_last)


def luma(x: Tensor) -> Tensor:
    """Return the luminance 0.2989 R + 0.587 G + 0.114 B, (B, 1, H, W)."""
    red, green, blue = x.unbind(dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Return clip(factor x); factor (B,)."""
    return (_rows(factor) * x).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Return clip(factor x + (1 - factor) m), m the mean luminance of the image; factor (B,)."""
    mean = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    return (_rows(factor) * x + (1 - _rows(factor)) * mean).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Return clip(factor x + (1 - factor) l), l the luminance of the pixel; factor (B,)."""
    return (_rows(factor) * x + (1 - _rows(factor)) * luma(x)).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of every pixel by a share of the colour circle, keeping HSV's saturation and value; turn (B,)."""
    high, low = x.amax(dim=1), x.amin(dim=1)
    spread = high - low
    safe = torch.where(spread > 0, spread, 1.0)
    red, green, blue = x.unbind(dim=1)
    # in sixths of the circle: red at 0, green at 2, blue at 4
    sixths = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turn[:, None, None]
    # A channel is at the value within a sixth of its own place, at the minimum beyond two, and linear between.
    out = []
    for place in (0, 2, 4):
        away = (sixths - place + 3).remainder(6).sub_(3).abs_()
        out.append(low + spread * (2 - away).clamp_(0, 1))
    return torch.stack(out, dim=1)


def lighting(x: Tensor, weight: Tensor) -> Tensor:
    """Return clip(x + V (weight * d)), one colour per image; V, d the principal components; weight (B, 3)."""
    # Python numbers: a tensor of constants would be copied to the device, and the host would wait for that.
    one, two, three = (weight[:, k] * COLOUR_VALUES[k] for k in range(3))
    shift = torch.stack([row[0] * one + row[1] * two + row[2] * three for row in COLOUR_VECTORS], dim=1)
    return (x + shift[:, :, None, None]).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor, *, reach: int) -> Tensor:
    """Convolve with a Gaussian of each image's own sigma, cut off after `reach` pixels, edge pixels repeated outwards.

    Both directions are products with a banded matrix, one per image: no convolution with as many groups as images.
    """
    height, width = x.shape[2:]
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    weight = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weight = weight / weight.sum(dim=1, keepdim=True)
    out = _band(weight, offsets, height)[:, None] @ x
    return out @ _band(weight, offsets, width)[:, None].transpose(2, 3)


def _band(weight: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Return (B, size, size): row i holds the weights of the pixels that position i is a mean of."""
    position = torch.arange(size, device=weight.device)
    source = (position + offsets[:, None]).clamp_(0, size - 1)
    picks = (source[:, :, None] == position).to(weight.dtype)
    return (weight @ picks.flatten(1)).view(-1, size, size)


def _normals(u: Tensor) -> Tensor:
    """Turn four uniforms an image, (B, 4), into three normals, (B, 3), by Box and Muller."""
    radius = torch.sqrt(-2 * torch.log1p(-u[:, 0::2]))
    angle = 2 * math.pi * u[:, 1::2]
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pairs[:, :3]


def _rows(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
