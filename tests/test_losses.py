"""Equations 5 and 6 against their closed forms in numpy, and what they promise at the edges."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fasttht.losses import contrastive, kl_divergence, logit_pairing, normalized_cross_entropy

Array = npt.NDArray[np.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(rows, size, generator=generator(seed), dtype=torch.float64), dim=1).to(dtype)


def equation_5(u: Array, v: Array, negatives: Array, tau: float, mask: npt.NDArray[np.bool_] | None = None) -> float:
    """As the paper writes it, row by row, with plain exponentials."""
    losses = []
    for i in range(len(u)):
        taken = [j for j in range(len(negatives)) if mask is None or mask[i, j]]
        positive = np.exp(u[i] @ v[i] / tau)
        others = sum(np.exp(u[i] @ negatives[j] / tau) for j in taken)
        losses.append(-np.log(positive / (positive + others)))
    return float(np.mean(losses))


def equation_6(logits: Array, y: npt.NDArray[np.int64], smoothing: float = 0.0) -> float:
    """Cross entropy with a target of 1 - smoothing on the label and smoothing spread over all classes."""
    rows, classes = logits.shape
    target = np.full((rows, classes), smoothing / classes)
    target[np.arange(rows), y] += 1 - smoothing
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(target * log_p).sum(axis=1).mean())


@given(rows=st.integers(1, 7), classes=st.integers(2, 9), smoothing=st.floats(0, 1), seed=st.integers(0, 999))
@settings(deadline=None)
def test_cross_entropy_equals_the_closed_form(rows: int, classes: int, smoothing: float, seed: int) -> None:
    logits = torch.randn(rows, classes, generator=generator(seed), dtype=torch.float64) * 5
    y = torch.randint(classes, (rows,), generator=generator(seed))
    loss = normalized_cross_entropy(logits, y, smoothing=smoothing)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(equation_6(logits.numpy(), y.numpy(), smoothing), rel=1e-10, abs=1e-12)


def test_cross_entropy_does_not_smooth_unless_told_to() -> None:
    logits, y = torch.tensor([[30.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    assert float(normalized_cross_entropy(logits, y)) == pytest.approx(np.exp(-30), rel=1e-3)


@given(
    rows=st.integers(1, 6), num=st.integers(0, 9), size=st.integers(1, 8), tau=st.floats(0.05, 5),
    masked=st.sampled_from(["no", "rows", "slots"]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_contrastive_equals_equation_5(rows: int, num: int, size: int, tau: float, masked: str, seed: int) -> None:
    """With any number of negatives, none included, and any of them masked, all included."""
    u, v, negatives = (unit(count, size, 3 * seed + i) for i, count in enumerate((rows, rows, num)))
    shape = {"no": None, "rows": (rows, num), "slots": (num,)}[masked]
    mask = None if shape is None else torch.rand(shape, generator=generator(seed)) < 0.6
    loss = contrastive(u, v, negatives, tau=tau, mask=mask)
    full = None if mask is None else mask.expand(rows, num).numpy()
    expected = equation_5(u.numpy(), v.numpy(), negatives.numpy(), tau, full)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_contrastive_without_negatives_is_zero_with_a_zero_gradient() -> None:
    u, v = unit(3, 4).requires_grad_(True), unit(3, 4, 1)
    nothing = {
        "N = 0": contrastive(u, v, u.new_zeros(0, 4), tau=0.2),
        "all masked": contrastive(u, v, unit(5, 4, 2), tau=0.2, mask=torch.zeros(3, 5, dtype=torch.bool)),
    }
    for name, loss in nothing.items():
        assert float(loss.detach()) == 0, name
        (grad,) = torch.autograd.grad(loss, u)
        assert not grad.any(), name


def test_a_fully_masked_row_counts_as_zero_beside_others() -> None:
    u, v, negatives = (unit(rows, 4, rows).requires_grad_(True) for rows in (3, 3, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    loss = contrastive(u, v, negatives, tau=0.2, mask=mask)
    others = contrastive(u[[0, 2]], v[[0, 2]], negatives, tau=0.2)
    assert float(loss.detach()) == pytest.approx(float(others.detach()) * 2 / 3, rel=1e-12)
    grad_u, grad_v = torch.autograd.grad(loss, (u, v))
    assert grad_u[1].tolist() == grad_v[1].tolist() == [0.0] * 4
    assert bool(grad_u[[0, 2]].any())
    assert bool(grad_u.isfinite().all())


def test_masked_negatives_do_not_count_even_where_they_are_not_finite() -> None:
    """An empty slot of the bank may hold anything."""
    u, v, negatives = unit(3, 4), unit(3, 4, 1), unit(5, 4, 2)
    mask = torch.tensor([True, True, False, True, False])
    expected = contrastive(u, v, negatives[mask], tau=0.2)
    negatives[~mask] = float("nan")
    assert float(contrastive(u, v, negatives, tau=0.2, mask=mask)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool)], ids=["all", "masked"])
def test_gradient_of_the_contrastive_loss_is_the_numeric_one(mask: Tensor | None) -> None:
    u, v, negatives = (unit(rows, 4, seed).requires_grad_(True) for seed, rows in enumerate((2, 2, 3)))

    def function(u: Tensor, v: Tensor, negatives: Tensor) -> Tensor:
        return contrastive(u, v, negatives, tau=0.3, mask=mask)

    assert torch.autograd.gradcheck(function, (u, v, negatives))
    (grad,) = torch.autograd.grad(function(u, v, negatives), u)
    assert bool(grad[0].any())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_the_cross_entropy_is_the_numeric_one(smoothing: float) -> None:
    logits = (torch.randn(3, 5, generator=generator(), dtype=torch.float64) * 3).requires_grad_(True)
    y = torch.tensor([0, 4, 2])

    def function(logits: Tensor) -> Tensor:
        return normalized_cross_entropy(logits, y, smoothing=smoothing)

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("tau", [0.0, -0.2])
def test_a_temperature_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=rf"expected tau > 0, got {tau}"):
        contrastive(unit(2, 4), unit(2, 4), unit(3, 4), tau=tau)


@pytest.mark.parametrize("sizes", [(5, 4, 4), (4, 5, 4), (4, 4, 5), (1, 4, 4)])
def test_features_of_different_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    """One of size 1 would otherwise be broadcast."""
    u, v, negatives = (unit(rows, size) for rows, size in zip((2, 2, 3), sizes, strict=True))
    with pytest.raises(ValueError, match=f"expected features of one size, got {sizes[0]}, {sizes[1]} and {sizes[2]}"):
        contrastive(u, v, negatives, tau=0.2)


@pytest.mark.parametrize("how", ["bfloat16 inputs", "float32 inputs under autocast"])
def test_contrastive_is_computed_in_float32(device: torch.device, how: str) -> None:
    """Taken in bfloat16, similarities over tau would be off by up to 0.03 at tau 0.07; float32 is within 1e-5."""
    dtype = torch.bfloat16 if how == "bfloat16 inputs" else torch.float32
    u, v, negatives = (unit(rows, 64, rows, dtype) for rows in (6, 7, 40))
    v = v[:6]
    expected = equation_5(u.double().numpy(), v.double().numpy(), negatives.double().numpy(), 0.07)
    with torch.autocast(device.type, torch.bfloat16):
        loss = contrastive(u.to(device), v.to(device), negatives.to(device), tau=0.07)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_negatives_in_bfloat16_beside_float32_features_are_read_as_they_are() -> None:
    u, v, negatives = unit(4, 16, 1, torch.float32), unit(4, 16, 2, torch.float32), unit(9, 16, 3, torch.bfloat16)
    expected = equation_5(u.double().numpy(), v.double().numpy(), negatives.double().numpy(), 0.2)
    assert float(contrastive(u, v, negatives, tau=0.2)) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits = (torch.randn(8, 50, generator=generator()) * 10).bfloat16()
    y = torch.arange(8)
    loss = normalized_cross_entropy(logits, y, smoothing=0.1)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(equation_6(logits.double().numpy(), y.numpy(), 0.1), rel=1e-5)


@pytest.mark.parametrize("tau", [0.01, 0.001])
def test_small_temperatures_do_not_overflow(tau: float) -> None:
    """exp(1/tau) is beyond float32; with every similarity equal the loss is log(1 + N)."""
    u = unit(3, 8, dtype=torch.float32)
    same: Any = u[:1].expand(3, -1)
    loss = contrastive(same, same, u[:1].expand(20, -1), tau=tau)
    assert float(loss) == pytest.approx(np.log(21), rel=1e-3)


# -- the baselines' terms ----------------------------------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


@given(rows=st.integers(1, 6), classes=st.integers(2, 40), spread=st.floats(0.1, 8), seed=st.integers(0, 999))
@settings(deadline=None)
def test_kl_and_its_tail_equal_equation_4(rows: int, classes: int, spread: float, seed: int) -> None:
    z, z_adv = (torch.randn(rows, classes, generator=generator(2 * seed + i)).double() * spread for i in (0, 1))
    found = kl_divergence(z, z_adv)
    p, q = softmax(z.numpy()), softmax(z_adv.numpy())
    terms = p * np.log(p / q)
    assert float(found.kl) == pytest.approx(terms.sum() / rows, rel=1e-9, abs=1e-12)
    assert float(found.tail) == pytest.approx(terms[p < 0.01].sum() / rows, rel=1e-9, abs=1e-12)


def test_kl_is_finite_where_probabilities_underflow_to_zero() -> None:
    """p log(p/q) of the probabilities would be 0 x log(0/0); exact zeros made a public TRADES return NaN."""
    z = torch.tensor([[0.0, -500.0, -900.0], [300.0, 0.0, 0.0]], requires_grad=True)
    z_adv = torch.tensor([[-700.0, 0.0, -900.0], [300.0, 0.0, 0.0]], requires_grad=True)
    found = kl_divergence(z, z_adv)
    assert float(found.kl.detach()) == pytest.approx(700 / 2)
    for grad in torch.autograd.grad(found.kl, (z, z_adv)):
        assert bool(grad.isfinite().all())


def test_kl_has_gradient_on_both_sides_and_none_in_its_tail() -> None:
    def kl(z: Tensor, z_adv: Tensor) -> Tensor:
        return kl_divergence(z, z_adv).kl

    z, z_adv = (torch.randn(3, 4, generator=generator(i)).double().requires_grad_(True) for i in (0, 1))
    assert torch.autograd.gradcheck(kl, (z, z_adv))
    assert all(bool(grad.any()) for grad in torch.autograd.grad(kl(z, z_adv), (z, z_adv)))
    assert not kl_divergence(z, z_adv).tail.requires_grad


def test_gradient_of_the_kl_in_its_second_side_is_that_of_the_soft_cross_entropy() -> None:
    """Which is why an attack on the KL can be run as one on the cross entropy with p(x) as classes."""
    z, z_adv = (torch.randn(3, 4, generator=generator(i)).double().requires_grad_(True) for i in (0, 1))
    (one,) = torch.autograd.grad(kl_divergence(z, z_adv).kl, z_adv)
    (two,) = torch.autograd.grad(F.cross_entropy(z_adv, z.detach().softmax(dim=1)), z_adv)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def test_logit_pairing_is_the_mean_square_over_images_and_classes() -> None:
    z, z_adv = (torch.randn(3, 4, generator=generator(i)).double().requires_grad_(True) for i in (0, 1))
    loss = logit_pairing(z, z_adv)
    assert float(loss.detach()) == pytest.approx(float(np.mean((z - z_adv).detach().numpy() ** 2)), rel=1e-12)
    grads = torch.autograd.grad(loss, (z, z_adv))
    torch.testing.assert_close(grads[0], -grads[1])
    assert bool(grads[0].any())


def test_terms_of_half_types_are_taken_in_float32() -> None:
    z, z_adv = (torch.randn(3, 40, generator=generator(i)).to(torch.bfloat16) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        kl, pairing = kl_divergence(z, z_adv).kl, logit_pairing(z, z_adv)
    assert kl.dtype == pairing.dtype == torch.float32
    assert float(kl) == pytest.approx(float(kl_divergence(z.double(), z_adv.double()).kl), rel=1e-5)
    assert float(pairing) == pytest.approx(float(logit_pairing(z.double(), z_adv.double())), rel=1e-5)
