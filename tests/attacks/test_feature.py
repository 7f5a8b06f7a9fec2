"""Attacks on features: gradients against finite differences and NumPy sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.attacks.feature import away_from, feature_gradient, neighbour_margin
from fasttht.attacks.pgd import Draw, attack
from fasttht.attacks.threat import Threat

DIM, CLASSES = 5, 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KNOWN = F.normalize(draw(60, DIM, seed=0), dim=1)
LABELS = torch.randint(0, CLASSES, (60,), generator=torch.Generator().manual_seed(0))
WEIGHT = draw(DIM, 3 * 4 * 4, seed=1)
X = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y = torch.tensor([0, 1, 2])


def encode(x: Tensor) -> Tensor:
    return F.normalize(torch.tanh(x.flatten(1) @ WEIGHT.t()), dim=1)


def margin(feat: Tensor, y: Tensor, k: int, temperature: float) -> Tensor:
    """The loss itself, summed over the batch, one image and one side at a time."""
    losses = []
    for u, label in zip(feat, y.tolist(), strict=True):
        sides = []
        for side in (label != LABELS, label == LABELS):
            best = (KNOWN[side] @ u).sort(descending=True).values[:k]
            sides.append(best.mean() if math.isinf(temperature) else temperature * (best / temperature).logsumexp(0))
        losses.append(sides[0] - sides[1])
    return torch.stack(losses).sum()


def differences(loss: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        moved = torch.zeros_like(x).view(-1)
        moved[i] = step
        moved = moved.view_as(x)
        out.view(-1)[i] = (loss(x + moved) - loss(x - moved)) / (2 * step)
    return out


@pytest.mark.parametrize("known_rows", [65536, 7])
@pytest.mark.parametrize("temperature", [math.inf, 0.07])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_the_margins_gradient_is_that_of_finite_differences(k: int, temperature: float, known_rows: int) -> None:
    ascent = neighbour_margin(KNOWN, LABELS, k=k, temperature=temperature, known_rows=known_rows)
    found = feature_gradient(encode, ascent)(X, Y)
    expected = differences(lambda x: margin(encode(x), Y, k, temperature), X)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_the_gradient_away_from_an_anchor_is_that_of_half_the_squared_distance() -> None:
    anchor = F.normalize(draw(3, DIM, seed=3), dim=1)
    found = feature_gradient(encode, away_from(lambda y: anchor))(X, Y)
    expected = differences(lambda x: 0.5 * (encode(x) - anchor).square().sum(), X)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_class_without_known_features_leaves_the_pull_of_the_others() -> None:
    ascent = neighbour_margin(KNOWN, LABELS, k=4)
    u = F.normalize(draw(1, DIM, seed=4), dim=1)
    nearest = (KNOWN @ u[0]).numpy().argsort()[::-1][:4].copy()
    np.testing.assert_allclose(ascent(u, torch.tensor([CLASSES]))[0].numpy(), KNOWN.numpy()[nearest].mean(axis=0))
    one_class = neighbour_margin(KNOWN, torch.zeros_like(LABELS), k=4, temperature=0.07)
    assert one_class(u, torch.tensor([0])).isfinite().all()


def test_the_attack_raises_the_margin_inside_the_ball_and_leaves_parameters_alone() -> None:
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 48, DIM, dtype=torch.float64)
    layer.weight.data.copy_(WEIGHT)
    layer.bias.data.zero_()

    def of(x: Tensor) -> Tensor:
        return F.normalize(layer(x.flatten(1)), dim=1)

    gradient = feature_gradient(of, neighbour_margin(KNOWN, LABELS, k=5))
    index = torch.arange(3)

    def attacked(steps: int, targeted: bool, num_classes: int) -> Tensor:
        threat = Threat(eps=0.05, alpha=0.0125, steps=steps, targeted=targeted)
        found = attack(gradient, X, Y % num_classes, index, threat, Draw(0), num_classes=num_classes).x_adv
        assert (found - X).abs().max() <= 0.05 + 1e-12
        return found

    with torch.no_grad():
        made, start = (margin(of(attacked(steps, False, CLASSES)), Y, 5, math.inf) for steps in (10, 0))
        assert made > start + 0.1
        # Of two classes the target is the other one: its margin is to fall.
        made, start = (margin(of(attacked(steps, True, 2)), 1 - Y % 2, 5, math.inf) for steps in (10, 0))
        assert made < start - 0.1
    assert layer.weight.grad is None
