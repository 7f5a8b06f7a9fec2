"""Augmentation on the device: each op against torchvision or NumPy, and draws that follow the row."""

from __future__ import annotations

import colorsys
import dataclasses
import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht import augment
from fasttht.attacks.pgd import Draw
from fasttht.augment import Recipe
from fasttht.config import DataConfig
from fasttht.pipelines.loader import Batch

MOCO = Recipe(jitter=0.4, hue=0.1, jitter_prob=0.8, grayscale=0.2, blur=0.5)
EVERYTHING = dataclasses.replace(MOCO, lighting=0.1)


def images(count: int = 6, side: int = 20, seed: int = 0) -> Tensor:
    """Random 8-bit levels as float64 in [0, 1], with gray, black, white and pure colours among them."""
    levels = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side)) / 255
    levels[0, :, :4] = levels[0, :1, :4]
    levels[1, :, 0], levels[1, :, 1] = 0, 1
    levels[2, :, :3, 0] = np.eye(3)
    return torch.from_numpy(levels).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def functional(torchvision: ModuleType) -> Any:
    return importlib.import_module("torchvision.transforms.v2.functional")


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions(name: str, functional: Any) -> None:
    x = images()
    factors = torch.tensor([0.0, 0.6, 0.95, 1.0, 1.4, 3.0], dtype=torch.float64)
    found = getattr(augment, name)(x, factors)
    for image, factor, own in zip(x, factors.tolist(), found, strict=True):
        theirs = getattr(functional, f"adjust_{name}")(image, factor)
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[3], x[3], rtol=0, atol=1e-15)


def test_hue_is_torchvisions(functional: Any) -> None:
    x = images()
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.05, 0.3, 0.5], dtype=torch.float64)
    found = augment.hue(x, turns)
    for image, turn, own in zip(x, turns.tolist(), found, strict=True):
        torch.testing.assert_close(own, functional.adjust_hue(image, turn), rtol=0, atol=1e-6)


def test_hue_is_that_of_the_standard_library() -> None:
    x = images(side=8)[1:3]
    found = augment.hue(x, torch.full((2,), 0.2, dtype=torch.float64))
    for b, i, j in np.ndindex(2, 8, 8):
        h, s, v = colorsys.rgb_to_hsv(*x[b, :, i, j].tolist())
        np.testing.assert_allclose(found[b, :, i, j], colorsys.hsv_to_rgb((h + 0.2) % 1, s, v), atol=1e-12)


def test_luminance_is_torchvisions(functional: Any) -> None:
    x = images()
    theirs = functional.rgb_to_grayscale(x, num_output_channels=1)
    torch.testing.assert_close(augment.luma(x), theirs, rtol=0, atol=1e-3)  # they round the weights to other digits
    torch.testing.assert_close(augment.luma(torch.ones(1, 3, 1, 1)), torch.full((1, 1, 1, 1), 0.9999))


def test_blur_is_torchvisions_away_from_the_edge(functional: Any) -> None:
    x = images(3, 32)
    sigmas = [0.1, 0.9, 2.0]
    found = augment.blur(x, torch.tensor(sigmas, dtype=torch.float64), reach=8)
    for image, sigma, own in zip(x, sigmas, found, strict=True):
        theirs = functional.gaussian_blur(image, kernel_size=[17, 17], sigma=[sigma, sigma])
        torch.testing.assert_close(own[:, 8:-8, 8:-8], theirs[:, 8:-8, 8:-8], rtol=0, atol=1e-6)


def test_blur_is_a_gaussian_mean_with_the_edge_repeated_whatever_the_size() -> None:
    x, sigma, reach = images(side=5)[5:, :, :, :3], 1.3, 6  # the kernel is larger than the image
    found = augment.blur(x, torch.tensor([sigma], dtype=torch.float64), reach=reach)
    offsets = np.arange(-reach, reach + 1)
    weight = np.exp(-(offsets**2) / (2 * sigma**2))
    weight /= weight.sum()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    expected: npt.NDArray[np.float64] = np.zeros(x.shape)
    for i, j in np.ndindex(2 * reach + 1, 2 * reach + 1):
        expected += weight[i] * weight[j] * padded[:, :, i : i + 5, j : j + 3]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_lighting_adds_one_colour_along_the_principal_components() -> None:
    x, weight = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64), torch.tensor([[0.1, -0.2, 0.3], [0, 0, 0]]).double()
    found = augment.lighting(x, weight) - x
    values, vectors = np.array(augment.COLOUR_VALUES), np.array(augment.COLOUR_VECTORS)
    expected = sum(weight[0, k].item() * values[k] * vectors[:, k] for k in range(3))
    np.testing.assert_allclose(found[0], np.broadcast_to(np.asarray(expected)[:, None, None], (3, 4, 4)), atol=1e-12)
    assert torch.equal(found[1], torch.zeros(3, 4, 4, dtype=torch.float64))
    # orthonormal to the four digits that were published, so the components are what they say
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_gets_the_same_whatever_its_batch(dtype: torch.dtype, device: torch.device) -> None:
    x, index = images(12).to(device, dtype), torch.arange(100, 112, device=device)
    draw = Draw(3, 1, 7)
    whole = augment.augment(x, index, EVERYTHING, draw, view=1)
    parts = [augment.augment(x[rows], index[rows], EVERYTHING, draw, view=1) for rows in (slice(0, 5), slice(5, 12))]
    order = torch.tensor([3, 0, 7, 11, 1, 2, 4, 5, 6, 8, 9, 10], device=device)
    mixed = augment.augment(x[order], index[order], EVERYTHING, draw, view=1)
    tolerance = {"rtol": 0.0, "atol": 1e-6 if dtype == torch.float32 else 1e-14}
    torch.testing.assert_close(torch.cat(parts), whole, **tolerance)
    torch.testing.assert_close(mixed, whole[order], **tolerance)


def test_every_counter_of_a_draw_matters_and_the_global_state_does_not() -> None:
    x, index = images(), torch.arange(6)
    base = augment.augment(x, index, EVERYTHING, Draw(1, 2, 3))
    assert torch.equal(augment.augment(x, index, EVERYTHING, Draw(1, 2, 3)), base)
    others = [
        augment.augment(x, index, EVERYTHING, draw, view=view)
        for draw, view in [(Draw(0, 2, 3), 0), (Draw(1, 0, 3), 0), (Draw(1, 2, 0), 0), (Draw(1, 2, 3), 1)]
    ] + [augment.augment(x, index + 1, EVERYTHING, Draw(1, 2, 3))]
    for other in others:
        assert not torch.equal(other, base)


def test_nothing_is_changed_by_the_empty_recipe_and_the_input_never() -> None:
    x, index = images(), torch.arange(6)
    before = x.clone()
    assert torch.equal(augment.augment(x, index, Recipe(), Draw(0)), x)
    out = augment.augment(x, index, EVERYTHING, Draw(0))
    assert torch.equal(x, before)
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1 + 1e-12


def test_shares_and_ranges_are_those_of_the_recipe() -> None:
    """Seen on an image that tells the ops apart: a half-bright red, against 2,000 rows; five sigmas of room."""
    rows = 2000
    x = torch.zeros(rows, 3, 4, 4, dtype=torch.float64)
    x[:, 0], x[:, 1] = 0.5, 0.25
    index = torch.arange(rows)

    def share_changed(recipe: Recipe) -> float:
        return float((augment.augment(x, index, recipe, Draw(0)) != x).flatten(1).any(dim=1).double().mean())

    room = 5 * math.sqrt(0.25 / rows)
    assert abs(share_changed(Recipe(jitter=0.4, jitter_prob=0.8)) - 0.8) < room
    assert abs(share_changed(Recipe(hue=0.1, jitter_prob=0.3)) - 0.3) < room
    assert abs(share_changed(Recipe(grayscale=0.2)) - 0.2) < room
    assert share_changed(Recipe(lighting=0.1)) == 1
    spotted = x.clone()
    spotted[:, :, 0, 0] = 1
    blurred = augment.augment(spotted, index, Recipe(blur=0.5, blur_sigma=(0.5, 2.0)), Draw(0))
    assert abs(float((blurred != spotted).flatten(1).any(dim=1).double().mean()) - 0.5) < room
    lit = (augment.augment(torch.full_like(x, 0.5), index, Recipe(lighting=0.1), Draw(0)) - 0.5)[:, :, 0, 0].numpy()
    weights = lit @ np.linalg.inv(np.array(augment.COLOUR_VECTORS)).T / np.array(augment.COLOUR_VALUES)
    assert np.abs(weights.mean(axis=0)).max() < 5 * 0.1 / math.sqrt(rows)
    np.testing.assert_allclose(weights.std(axis=0), 0.1, rtol=5 / math.sqrt(2 * rows))
    assert np.abs(np.corrcoef(weights.T) - np.eye(3)).max() < 5 / math.sqrt(rows)


def test_jitter_factors_are_uniform_and_apart_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def op(x: Tensor, factor: Tensor) -> Tensor:
            seen[name] = factor
            return x

        monkeypatch.setattr(augment, name, op)

    for name in ("brightness", "contrast", "saturation"):
        watch(name)
    rows = 4000
    augment.augment(torch.zeros(rows, 3, 1, 1, dtype=torch.float64), torch.arange(rows), Recipe(jitter=0.4), Draw(5))
    factors = torch.stack([seen[name] for name in ("brightness", "contrast", "saturation")]).numpy()
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    for row in factors:
        counts = np.histogram(row, bins=8, range=(0.6, 1.4))[0]
        assert ((counts - rows / 8) ** 2 / (rows / 8)).sum() < 29.9  # chi squared of 7: one in 10,000
    assert np.abs(np.corrcoef(factors) - np.eye(3)).max() < 5 / math.sqrt(rows)


class CountSyncs(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_op_waits_for_the_device() -> None:
    x, index = images(), torch.arange(6)
    with CountSyncs() as counter:
        augment.augment(x, index, EVERYTHING, Draw(0))
    assert counter.found == []


@pytest.mark.gpu
def test_the_device_gives_the_hosts_images_and_never_waits() -> None:
    x, index = images(seed=3).float(), torch.arange(6)
    expected = augment.augment(x, index, EVERYTHING, Draw(1))
    on_device, rows = x.cuda(), index.cuda()
    augment.augment(on_device, rows, EVERYTHING, Draw(1))  # libraries load
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment.augment(on_device, rows, EVERYTHING, Draw(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-2 / 255)


def test_a_training_batch_stays_8_bit_and_keeps_labels_and_rows() -> None:
    levels = (images() * 255).round().to(torch.uint8)
    batch = Batch(levels, torch.arange(6), torch.arange(10, 16))
    recipe = Recipe(jitter=0.4, lighting=0.1)
    out = augment.augment_batch(batch, recipe, Draw(1))
    exact = augment.augment(levels.float() / 255, batch.index, recipe, Draw(1))
    assert out.x.dtype == torch.uint8
    assert out.x.stride() == levels.stride()
    assert float((out.x.float() / 255 - exact).abs().max()) <= 0.5 / 255 + 1e-6
    assert torch.equal(out.y, batch.y)
    assert torch.equal(out.index, batch.index)
    same = augment.augment_batch(batch, Recipe(grayscale=0.0), Draw(1))
    assert torch.equal(same.x, levels)


def test_training_options_become_a_recipe_or_nothing() -> None:
    assert augment.training_recipe(DataConfig()) is None
    assert augment.training_recipe(DataConfig(jitter=0.4, lighting=0.1)) == Recipe(jitter=0.4, lighting=0.1)
