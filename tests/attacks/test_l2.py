"""l2 attacks: closed forms on a linear model, the projection's geometry, ten steps against NumPy, odd gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks import l2
from fasttht.attacks.engine import EagerEngine, FoldedEngine
from fasttht.attacks.pgd import Draw, attack, input_gradient, pgd_l2
from fasttht.attacks.threat import Norm, Threat

CLASSES = 7
DRAW = Draw(seed=3, epoch=2, step=9)
COUNTERS = {"seed": 3, "epoch": 2, "step": 9}
NORMS: list[Norm] = ["l2", "l2-relative"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def middle(num: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images far from black and white, so that only the ball limits an attack."""
    return torch.rand(num, 3, 6, 6, generator=generator(num), dtype=dtype) * 0.2 + 0.4


def along(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits (0, w.x): the gradient for class 0 is a positive multiple of w, for class 1 a negative one."""

    def logits(x: Tensor) -> Tensor:
        score = (x * weight).flatten(1).sum(dim=1, keepdim=True)
        return torch.cat([torch.zeros_like(score), score], dim=1)

    return logits


def norms_of(x: Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.sqrt((x.double().numpy() ** 2).sum(axis=(1, 2, 3)))
    return found


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_on_a_linear_model_the_attack_walks_straight_to_the_sphere(norm: Norm, steps: int, targeted: bool) -> None:
    eps, alpha = (0.5, 0.15) if norm == "l2" else (0.1, 0.03)
    x, weight, y = (
        middle(4),
        torch.randn(3, 6, 6, generator=generator(9), dtype=torch.float64),
        torch.tensor([0, 1, 0, 1]),
    )
    threat = Threat(eps=eps, alpha=alpha, steps=steps, norm=norm, targeted=targeted, start="clean")
    found = attack(input_gradient(along(weight)), x, y, torch.arange(4), threat, DRAW, num_classes=2)
    sign = np.where(y.numpy() == 0, 1.0, -1.0)  # of two classes the target is the other: the way is the same
    unit = weight.numpy() / np.linalg.norm(weight.numpy())
    length = sign * min(steps * alpha, eps) * (norms_of(x) if norm == "l2-relative" else 1.0)
    expected = x.numpy() + length.reshape(-1, 1, 1, 1) * unit
    np.testing.assert_allclose(found.x_adv.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", NORMS)
def test_ten_steps_equal_a_loop_in_numpy(build: Any, images: Any, norm: Norm, targeted: bool) -> None:
    """The loop is given the gradients alone; images touch black and white, so both projections do something."""
    model, x, index, y = build("small", torch.float64), images(5, 8, torch.float64), torch.arange(5), torch.arange(5)
    eps, alpha = (2.0, 0.5) if norm == "l2" else (0.3, 0.1)
    gradients: list[Tensor] = []
    engine = EagerEngine(model, model.logits)

    def gradient(at: Tensor, labels: Tensor) -> Tensor:
        gradients.append(engine.gradient(at, labels))
        return gradients[-1]

    threat = Threat(eps=eps, alpha=alpha, steps=10, norm=norm, targeted=targeted)
    found = attack(gradient, x, y, index, threat, DRAW, num_classes=CLASSES).x_adv.numpy()
    assert len(gradients) == 10
    unit = norms_of(x) if norm == "l2-relative" else np.ones(5)
    start = kernels.draw_l2_start(
        x, index, radius=torch.from_numpy(eps * unit).view(-1, 1, 1, 1), clean_prob=0.0, **COUNTERS
    )
    state, clipped = start.numpy().copy(), 0
    for grad in gradients:
        for i in range(5):
            g = grad[i].numpy()
            state[i] += (-alpha if targeted else alpha) * unit[i] * g / np.linalg.norm(g)
            delta = state[i] - x[i].numpy()
            if np.linalg.norm(delta) > eps * unit[i]:
                delta *= eps * unit[i] / np.linalg.norm(delta)
            moved = x[i].numpy() + delta
            state[i] = np.clip(moved, 0, 1)
            clipped += int((state[i] != moved).sum())
    np.testing.assert_allclose(found, state, rtol=0, atol=1e-11)
    assert clipped > 0
    assert (norms_of(torch.from_numpy(found) - x) <= eps * unit * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", ["folded", "fused"])
@pytest.mark.parametrize("norm", NORMS)
def test_engines_end_where_the_eager_one_does(build: Any, images: Any, name: str, norm: Norm) -> None:
    """Which they do only if each channel's deviation is divided by."""
    model, x = build(dtype=torch.float64), images(4, 32, torch.float64)
    threat = Threat(eps=1.0 if norm == "l2" else 0.05, alpha=0.3 if norm == "l2" else 0.02, steps=4, norm=norm)
    one, other = (
        engine.attack(x, torch.arange(4), torch.arange(4), threat, DRAW, num_classes=CLASSES).x_adv
        for engine in (EagerEngine(model, model.logits), FoldedEngine(name, model, dtype=torch.float64))
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-10)


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_projection_is_the_nearest_point_of_the_ball(dtype: torch.dtype) -> None:
    x, radius = middle(8, dtype), torch.linspace(0.05, 0.4, 8, dtype=dtype).view(-1, 1, 1, 1)
    step = torch.randn(x.shape, generator=generator(1), dtype=dtype)
    step = step * torch.linspace(0.01, 0.02, 8, dtype=dtype).flip(0).view(-1, 1, 1, 1)
    point = x + step
    found = l2.project_(point.clone(), x, radius)
    inside = norms_of(step) <= radius.flatten().numpy()
    assert inside.any()
    assert not inside.all()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found[torch.from_numpy(inside)], point[torch.from_numpy(inside)], rtol=0, atol=tolerance)
    lengths = norms_of(found - x)
    np.testing.assert_allclose(lengths, np.minimum(norms_of(step), radius.flatten().numpy()), rtol=1e-5)
    torch.testing.assert_close(l2.project_(found.clone(), x, radius), found, rtol=0, atol=tolerance)
    # Every other point of the ball lies behind the plane through the projection: the sign of convexity.
    other = torch.randn((50, *x.shape), generator=generator(2), dtype=dtype)
    other = x + radius * other / torch.linalg.vector_norm(other, dim=(2, 3, 4), keepdim=True)
    products = ((point - found) * (other - found)).sum(dim=(2, 3, 4))
    assert float(products.max()) <= 1e-6


def test_the_clip_to_the_image_range_does_not_leave_the_ball(images: Any) -> None:
    x, radius = images(6, 8, torch.float64), torch.full((6, 1, 1, 1), 2.0, dtype=torch.float64)
    found = l2.project_(x + 3 * torch.randn(x.shape, generator=generator(), dtype=torch.float64), x, radius)
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    assert (norms_of(found - x) <= 2 + 1e-12).all()


def test_a_radius_of_zero_gives_the_image_itself(build: Any, images: Any) -> None:
    """Also for a black image, whose relative radius is zero."""
    model, x = build("small", torch.float64), images(3, 8, torch.float64)
    x[0] = 0
    gradient = EagerEngine(model, model.logits).gradient
    for threat in (
        Threat(eps=0, alpha=0.3, steps=2, norm="l2"),
        Threat(eps=0.1, alpha=0.1, steps=2, norm="l2-relative"),
    ):
        found = attack(gradient, x, torch.arange(3), torch.arange(3), threat, DRAW, num_classes=CLASSES).x_adv
        same = (found == x).flatten(1).all(dim=1).tolist()
        assert same == [True, threat.eps == 0, threat.eps == 0]


# -- gradients that are not as they should be --------------------------------------------------------------------------


def given(grad: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _x, _y: grad.clone()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_gradient_of_any_size_has_a_direction(scale: float) -> None:
    grad = torch.randn(2, 3, 6, 6, generator=generator())
    x = middle(2, torch.float32)
    threat = Threat(eps=1, alpha=0.25, steps=1, norm="l2")
    found = pgd_l2(given(grad * scale), x, torch.zeros(2, dtype=torch.int64), threat, x).x_adv
    expected = x + 0.25 * grad / torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_gradient_of_zero_moves_nothing_and_others_are_not_held_back() -> None:
    grad, x = torch.randn(3, 3, 6, 6, generator=generator(), dtype=torch.float64), middle(3)
    grad[1] = 0
    found = pgd_l2(given(grad), x, torch.zeros(3, dtype=torch.int64), Threat(eps=1, alpha=0.3, steps=1, norm="l2"), x)
    assert torch.equal(found.x_adv[1], x[1])
    np.testing.assert_allclose(norms_of(found.x_adv - x), [0.3, 0, 0.3], atol=1e-12)
    assert float(found.zero_grad) == pytest.approx(1 / 3)


def test_nan_elements_count_as_zero_and_are_counted() -> None:
    grad, x = torch.randn(2, 3, 6, 6, generator=generator(), dtype=torch.float64), middle(2)
    where = torch.rand(grad.shape, generator=generator(1)) < 0.2
    threat, y = Threat(eps=1, alpha=0.3, steps=1, norm="l2"), torch.zeros(2, dtype=torch.int64)
    found = pgd_l2(given(grad.masked_fill(where, float("nan"))), x, y, threat, x)
    expected = pgd_l2(given(grad.masked_fill(where, 0.0)), x, y, threat, x)
    assert torch.equal(found.x_adv, expected.x_adv)
    assert float(found.nan_grad) == pytest.approx(float(where.double().mean()))
    everywhere = pgd_l2(given(torch.full_like(grad, float("nan"))), x, y, threat, x)
    assert torch.equal(everywhere.x_adv, x)
    assert float(everywhere.nan_grad) == 1


def test_infinite_elements_outweigh_the_finite_ones() -> None:
    grad, x = torch.ones(1, 3, 6, 6, dtype=torch.float64), middle(1)
    grad[0, 0, 0, 0], grad[0, 1, 2, 3] = float("inf"), float("-inf")
    threat = Threat(eps=1, alpha=0.3, steps=1, norm="l2")
    moved = pgd_l2(given(grad), x, torch.zeros(1, dtype=torch.int64), threat, x).x_adv - x
    expected = torch.zeros_like(x)
    expected[0, 0, 0, 0], expected[0, 1, 2, 3] = 0.3 / 2**0.5, -0.3 / 2**0.5
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
