"""Normal deviates and the starts made of them: against Python integers, their distribution, and the cut of a batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from fasttht.kernels import draw_gaussian_start, draw_l2_start, draws, noise

WORD = 2**64 - 1
COUNTERS: dict[str, int] = {"seed": 7, "epoch": 3, "step": 11}


def images(num: int, side: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(num), dtype=dtype)


def radii(num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0.2, 1.5, num, dtype=dtype).view(-1, 1, 1, 1)


def test_a_deviate_is_box_and_mullers_of_the_two_halves_of_a_word() -> None:
    keys = draws.row_keys(draws.STREAM_START, **COUNTERS, index=torch.arange(20))[:, None]
    element = torch.arange(30)
    words = draws.draw_bits(keys, element).flatten().tolist()
    expected = []
    for word in words:
        high, low = (word & WORD) >> 32, word & 0xFFFFFFFF
        exact = math.sqrt(-2 * math.log((high + 1) / 2**32)) * math.cos(2 * math.pi * low / 2**32)
        expected.append(round(exact * 2**16) / 2**16)
    found = noise.draw_normal(keys, element)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == expected


def test_deviates_are_normal() -> None:
    keys = draws.row_keys(draws.STREAM_START, **COUNTERS, index=torch.arange(400))[:, None]
    found = noise.draw_normal(keys, torch.arange(200)).double()
    assert stats.kstest(found.flatten().numpy(), "norm").pvalue > 1e-3
    # Neighbours share nothing: rows and columns of a table of independent normals are uncorrelated.
    assert abs(float((found[:, 1:] * found[:, :-1]).mean())) < 4 / found.numel() ** 0.5
    assert abs(float((found[1:] * found[:-1]).mean())) < 4 / found.numel() ** 0.5


def l2_noise(num: int, side: int) -> np.ndarray[Any, Any]:
    """Offsets of unit radius in 3 * side**2 dimensions, far from the image range."""
    x = torch.full((num, 3, side, side), 0.5, dtype=torch.float64)
    small = torch.full((num, 1, 1, 1), 2.0**-10, dtype=torch.float64)
    start = draw_l2_start(x, torch.arange(num), radius=small, clean_prob=0.0, **COUNTERS)
    return ((start - x) * 2**10).flatten(1).numpy()


@pytest.mark.parametrize("side", [1, 4])
def test_l2_starts_are_uniform_in_the_ball(side: int) -> None:
    """The length's d-th power is uniform, a coordinate of the direction squared is Beta(1/2, (d - 1)/2)."""
    found, size = l2_noise(5000, side), 3 * side**2
    lengths = np.linalg.norm(found, axis=1)
    assert lengths.max() <= 1 + 1e-6
    assert stats.kstest(lengths**size, "uniform").pvalue > 1e-3
    unit = found / lengths[:, None]
    for coordinate in (0, size - 1):
        assert stats.kstest(unit[:, coordinate] ** 2, "beta", args=(0.5, (size - 1) / 2)).pvalue > 1e-3
        assert stats.binomtest(int((unit[:, coordinate] > 0).sum()), 5000).pvalue > 1e-3
    assert abs(np.corrcoef(lengths, unit[:, 0])[0, 1]) < 4 / 5000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_starts_are_inside_ball_and_image_range(dtype: torch.dtype) -> None:
    x = images(6, 9, dtype)
    x[0], x[1] = 0, 1
    start = draw_l2_start(x, torch.arange(6), radius=radii(6, dtype), clean_prob=0.0, **COUNTERS)
    assert start.dtype == dtype
    assert bool(((start >= 0) & (start <= 1)).all())
    lengths = torch.linalg.vector_norm(start.double() - x.double(), dim=(1, 2, 3))
    assert bool((lengths <= radii(6).flatten() * (1 + 1e-6)).all())
    assert bool((lengths > 0).all())


@pytest.mark.parametrize("name", ["l2", "gaussian"])
def test_starts_are_the_same_bits_however_the_batch_is_cut_or_laid_out(name: str) -> None:
    x, index = images(7, 33), torch.arange(7) * 11 + 5

    def draw(at: Tensor, rows: Tensor) -> Tensor:
        if name == "gaussian":
            return draw_gaussian_start(at, index[rows], std=0.01, clean_prob=0.0, **COUNTERS)
        return draw_l2_start(at, index[rows], radius=radii(7)[rows], clean_prob=0.0, **COUNTERS)

    everything = torch.arange(7)
    whole = draw(x, everything)
    assert not torch.equal(whole, x)
    for rows in (everything[:1], everything[2:5], everything.flip(0)):
        assert torch.equal(draw(x[rows], rows), whole[rows])
    last = draw(x.contiguous(memory_format=torch.channels_last), everything)
    assert torch.equal(last, whole)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_gaussian_starts_are_the_image_plus_deviates() -> None:
    x, index = images(4), torch.tensor([3, 2**40, 0, 8])
    keys = draws.row_keys(draws.STREAM_START, **COUNTERS, index=index)[:, None]
    normal = noise.draw_normal(keys, torch.arange(75)).view(4, 3, 5, 5)
    found = draw_gaussian_start(x, index, std=0.25, clean_prob=0.0, **COUNTERS)
    assert torch.equal(found, x + normal * 0.25)


@pytest.mark.parametrize("counter", ["seed", "epoch", "step"])
def test_every_counter_changes_both_starts_and_may_be_a_tensor(counter: str) -> None:
    x, index = images(2), torch.arange(2)
    changed = {**COUNTERS, counter: COUNTERS[counter] + 1}
    for draw in (
        lambda **at: draw_gaussian_start(x, index, std=0.1, clean_prob=0.0, **at),
        lambda **at: draw_l2_start(x, index, radius=radii(2), clean_prob=0.0, **at),
    ):
        assert not torch.equal(draw(**COUNTERS), draw(**changed))
        assert torch.equal(draw(**changed), draw(**{name: torch.tensor(value) for name, value in changed.items()}))


def test_clean_starts_are_exact() -> None:
    x, index = images(3), torch.arange(3)
    assert torch.equal(draw_gaussian_start(x, index, std=0.1, clean_prob=1.0, **COUNTERS), x)
    assert torch.equal(draw_l2_start(x, index, radius=radii(3), clean_prob=1.0, **COUNTERS), x)


def test_images_without_their_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="draw_l2_start: expected 3 indices, one per image, got"):
        draw_l2_start(images(3), torch.arange(2), radius=radii(3), clean_prob=0.0, **COUNTERS)
    with pytest.raises(ValueError, match="draw_gaussian_start: expected x of a floating-point type"):
        draw_gaussian_start(images(3).to(torch.uint8), torch.arange(3), std=0.1, clean_prob=0.0, **COUNTERS)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_but_for_the_last_step_of_a_few() -> None:
    x, index = images(8, 32), torch.arange(8)
    starts = [
        draw_gaussian_start(x.to(device), index.to(device), std=1.0, clean_prob=0.0, **COUNTERS).cpu()
        for device in ("cpu", "cuda")
    ]
    assert float((starts[0] == starts[1]).float().mean()) > 0.9999
    torch.testing.assert_close(starts[0], starts[1], rtol=0, atol=2.0**-15)
