"""The reference functions themselves: what the layouts, the lattice and the fused backward mean."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from fasttht.kernels import draws, reference
from fasttht.kernels.reference import STEM_CONV, Layout

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
COUNTERS = {"seed": 7, "epoch": 3, "step": 11}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def whole(shape: tuple[int, ...], seed: int) -> Tensor:
    """Small whole numbers in float64: sums of their products are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (10, 14), (32, 8)])
def test_stem_convolution_is_the_same_in_every_layout(layout: Layout, size: tuple[int, int]) -> None:
    """Exactly, with the input's and the weight's gradient."""
    x, weight = whole((2, 3, *size), 0), whole((5, 3, 7, 7), 1).requires_grad_(True)
    plain = x.clone().requires_grad_(True)
    expected = F.conv2d(plain, weight, stride=2, padding=3)
    cotangent = whole(tuple(expected.shape), 2)
    expected_grads = torch.autograd.grad(expected, (plain, weight), cotangent)

    laid = reference.model_input(x, (0, 0, 0), (1, 1, 1), torch.float64, layout).requires_grad_(True)
    stride, padding = STEM_CONV[layout]
    found = F.conv2d(laid, reference.stem_weight(weight, layout), stride=stride, padding=padding)
    assert torch.equal(found, expected)
    grad, weight_grad = torch.autograd.grad(found, (laid, weight), cotangent)
    assert torch.equal(reference.image_grad(grad, layout), expected_grads[0])
    assert torch.equal(weight_grad, expected_grads[1])


def test_space_to_depth_puts_each_pixel_and_tap_where_it_says() -> None:
    x, weight = whole((2, 3, 6, 4), 0), whole((4, 3, 7, 7), 1)
    laid = reference.model_input(x, (0, 0, 0), (1, 1, 1), torch.float64, "s2d")
    assert laid.shape == (2, 12, 3 + 3, 2 + 3)
    rest = laid.clone()
    for c, row, column in torch.cartesian_prod(torch.arange(3), torch.arange(6), torch.arange(4)).tolist():
        at = (slice(None), (2 * (row % 2) + column % 2) * 3 + c, row // 2 + 2, column // 2 + 2)
        assert torch.equal(laid[at], x[:, c, row, column])
        rest[at] = 0
    assert not rest.any()  # the border
    taps = reference.stem_weight(weight, "s2d")
    assert taps.shape == (4, 12, 4, 4)
    rest = taps.clone()
    for c, ky, kx in torch.cartesian_prod(torch.arange(3), torch.arange(7), torch.arange(7)).tolist():
        channel = (2 * ((ky + 1) % 2) + (kx + 1) % 2) * 3 + c
        assert torch.equal(taps[:, channel, (ky + 1) // 2, (kx + 1) // 2], weight[:, c, ky, kx])
        rest[:, channel, (ky + 1) // 2, (kx + 1) // 2] = 0
    assert not rest.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_input_is_normalised_in_float32_and_then_rounded(layout: Layout, dtype: torch.dtype) -> None:
    levels = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    shape = (1, 3, 1, 1)
    unit = ((levels / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)).to(dtype)
    for x in (levels, levels / 255):
        laid = reference.model_input(x, MEAN, STD, dtype, layout)
        assert laid.dtype == dtype
        assert laid.shape == reference.input_shape(x.shape, layout)
        assert laid.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(reference.image_grad(laid, layout), unit)
    assert int((laid != 0).sum()) == int((unit != 0).sum())  # what is not a pixel is zero


def test_a_fused_step_is_the_step_and_then_the_input() -> None:
    x = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    x_adv = x.clone()
    grad = whole((2, 12, 5, 6), 3)
    out = torch.full_like(grad, float("nan"))
    args = {"eps": 0.1, "alpha": 0.04}
    reference.pgd_linf_step_input_(x_adv, out, grad, x, **args, mean=MEAN, std=STD, layout="s2d")
    expected = x.clone()
    image_grad = F.pixel_shuffle(grad[:, :, 2:-1, 2:-1].reshape(2, 4, 3, 2, 3).transpose(1, 2).reshape(2, 12, 2, 3), 2)
    reference.pgd_linf_step_(expected, image_grad, x, **args)
    assert torch.equal(x_adv, expected)
    assert not torch.equal(x_adv, x)
    assert torch.equal(out, reference.model_input(x_adv, MEAN, STD, torch.float64, "s2d"))


# ---- the lattice -------------------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_lattice_steps_are_the_float_ones_rounded(data: st.DataObject) -> None:
    """Ten steps from a lattice start: the float32 iterate lies within rounding of the level, at every step."""
    eps = data.draw(st.integers(0, 255), "eps")
    alpha = data.draw(st.integers(-255, 255), "alpha")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "values"))
    x = torch.randint(256, (2, 3, 5, 5), generator=generator).to(torch.uint8)
    state = draws.draw_lattice_start(x, torch.tensor([1, 2]), eps=eps, clean_prob=0, **COUNTERS)
    unit, unit_x = reference.u8_to_input(state, torch.float64), reference.u8_to_input(x, torch.float64)
    for _ in range(10):
        grad = torch.randn(x.shape, generator=generator)
        grad[0, 0, 0] = float("nan")
        reference.pgd_lattice_step_(state, grad, x, eps=eps, alpha=alpha)
        reference.pgd_linf_step_(unit, grad, unit_x, eps=eps / 255, alpha=alpha / 255)
        assert torch.allclose(unit * 255, state.double(), rtol=0, atol=1e-9)
        assert int((state.int() - x.int()).abs().max()) <= eps


def test_lattice_start_is_uniform_over_the_offsets() -> None:
    x = torch.full((40, 3, 16, 16), 128, dtype=torch.uint8)
    start = draws.draw_lattice_start(x, torch.arange(40), eps=4, clean_prob=0, **COUNTERS)
    offset = start.int() - 128
    assert (int(offset.min()), int(offset.max())) == (-4, 4)
    assert stats.chisquare(torch.bincount((offset + 4).flatten(), minlength=9).numpy()).pvalue > 1e-3
    assert torch.equal(x, torch.full_like(x, 128))


def test_lattice_start_reads_the_top_half_of_the_published_bits() -> None:
    """By Python integers: bits >> 32, times 2 eps + 1, the upper word."""
    x, index, eps = torch.full((3, 3, 2, 5), 100, dtype=torch.uint8), torch.tensor([5, 2**40, -1]), 16
    keys = draws.row_keys(draws.STREAM_START, **COUNTERS, index=index)
    bits = draws.draw_bits(keys[:, None], torch.arange(30))
    expected = [[100 + (((word % 2**64) >> 32) * 33 >> 32) - 16 for word in row] for row in bits.tolist()]
    for form in (torch.contiguous_format, torch.channels_last):
        start = draws.draw_lattice_start(x.contiguous(memory_format=form), index, eps=eps, clean_prob=0, **COUNTERS)
        assert start.dtype == torch.uint8
        assert start.reshape(3, 30).tolist() == expected


def test_lattice_start_is_clipped_and_moves_as_a_batch_or_not_at_all() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).repeat(300).view(2, 3, 10, 10)
    arguments: dict[str, Any] = {"eps": 200, "seed": 1, "epoch": 2}
    shares = []
    for step in range(100):
        start = draws.draw_lattice_start(ends, torch.tensor([3, 4]), clean_prob=0.3, step=step, **arguments)
        moved = (start != ends).flatten(1).any(dim=1).tolist()
        assert moved in ([True, True], [False, False])
        unit = draws.draw_start(ends / 255, torch.tensor([3, 4]), eps=0.5, clean_prob=0.3, step=step, seed=1, epoch=2)
        assert moved[0] == (not torch.equal(unit, ends / 255))  # the same coin as the continuous start's
        shares.append(moved[0])
    assert 50 < sum(shares) < 90


@pytest.mark.parametrize("draw", [draws.draw_start, draws.draw_lattice_start])
def test_counters_in_a_tensor_draw_as_integers_do(draw: Any) -> None:
    lattice = draw is draws.draw_lattice_start
    x = torch.full((2, 3, 4, 4), 128, dtype=torch.uint8) if lattice else torch.full((2, 3, 4, 4), 0.5)
    eps = 16 if lattice else 0.1
    for seed, epoch, step in [(0, 0, 0), (2**63 - 1, 5, 2**40), (-(2**63), -1, 3)]:
        key = torch.tensor([seed, epoch, step]).unbind()
        options = {"eps": eps, "clean_prob": 0.5}
        index = torch.tensor([4, 9])
        one = draw(x, index, **options, seed=key[0], epoch=key[1], step=key[2])
        assert torch.equal(one, draw(x, index, **options, seed=seed, epoch=epoch, step=step))
    y = torch.tensor([0, 3])
    targets = draws.draw_target(y, index, 10, seed=key[0], epoch=key[1], step=key[2])
    assert torch.equal(targets, draws.draw_target(y, index, 10, seed=seed, epoch=epoch, step=step))


# ---- the fused backward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("second", [True, False])
def test_drelu_add_is_autograds_backward(dtype: torch.dtype, second: bool, samples: Any) -> None:
    """Of relu whose output feeds two branches; special values of all three tensors among them."""
    grad, other, out = (samples.wild((50, 40), dtype, seed) for seed in (1, 50, 100))
    total = grad + other if second else grad
    expected = torch.ops.aten.threshold_backward(total, out, 0)
    reference.drelu_add_(grad, other if second else None, out)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
    assert not bool(grad[out <= 0].any())
    assert bool(grad.isnan().any())  # a NaN goes through where the output is positive
