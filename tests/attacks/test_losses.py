"""Attack losses: against loops over images, their signs on a linear model, independence of scale and of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttht.attacks.losses import cross_entropy, dlr, dlr_targeted, least_likely, loss_of, margin
from fasttht.attacks.pgd import Draw, attack, input_gradient
from fasttht.attacks.threat import Loss, Threat

CLASSES = 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_logits(rows: int = 24, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels that are right for some rows, and targets that are other classes."""
    logits = torch.randn(rows, classes, generator=generator(1), dtype=torch.float64)
    y = torch.randint(0, classes, (rows,), generator=generator(2))
    y[::3] = logits[::3].argmax(dim=1)
    return logits, y, (y + torch.randint(1, classes, (rows,), generator=generator(3))) % classes


def naive(name: str, z: Any, y: int, t: int) -> float:
    """One image's loss, from the papers' formulas, by sorting."""
    ranked = np.sort(z)[::-1]
    others = [z[c] for c in range(len(z)) if c != y]
    if name == "margin":
        return float(max(others) - z[y])
    if name == "dlr":
        return float(-(z[y] - max(others)) / (ranked[0] - ranked[2] + 1e-12))
    return float((z[y] - z[t]) / (ranked[0] - (ranked[2] + ranked[3]) / 2 + 1e-12))


def test_losses_are_sums_of_the_papers_formulas() -> None:
    logits, y, t = some_logits()
    rows = [(z, int(a), int(b)) for z, a, b in zip(logits.numpy(), y, t, strict=True)]
    for name, found in (
        ("margin", margin(logits, y)), ("dlr", dlr(logits, y)), ("dlr targeted", dlr_targeted(logits, t, label=y)),
    ):  # fmt: skip
        assert float(found) == pytest.approx(sum(naive(name, *row) for row in rows), abs=1e-12)
    assert (logits.argmax(dim=1) == y).any()
    assert (logits.argmax(dim=1) != y).any()


@pytest.mark.parametrize("num", [2, 3, 4])
def test_dlr_needs_the_classes_of_its_denominator(num: int) -> None:
    logits, y, t = some_logits(classes=num)
    assert margin(logits, y).isfinite()
    if num < 3:
        with pytest.raises(ValueError, match="dlr: expected at least 3 classes, got 2"):
            dlr(logits, y)
    if num < 4:
        with pytest.raises(ValueError, match=f"dlr: expected at least 4 classes, got {num}"):
            dlr_targeted(logits, t, label=y)


def test_dlr_does_not_know_the_scale_of_the_logits_and_equal_ones_give_no_nan() -> None:
    logits, y, t = some_logits()
    for scale in (1e-3, 1e4):
        assert float(dlr(scale * logits, y)) == pytest.approx(float(dlr(logits, y)), rel=1e-7)
        assert float(dlr_targeted(scale * logits, t, label=y)) == pytest.approx(
            float(dlr_targeted(logits, t, label=y)), rel=1e-7
        )
    same = torch.zeros(3, CLASSES, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(dlr(same, y[:3]), same)
    assert grad.isfinite().all()


def test_the_least_likely_class_is_the_lowest_that_is_not_the_label() -> None:
    logits, y, _ = some_logits(200)
    found = least_likely(logits, y)
    for z, label, target in zip(logits.numpy(), y.tolist(), found.tolist(), strict=True):
        assert target == min((c for c in range(CLASSES) if c != label), key=lambda c: z[c])
    assert (logits.argmin(dim=1) == y).any()


LOSSES: tuple[Loss, ...] = ("ce", "margin", "dlr")


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_small_step_takes_the_label_down_or_the_target_up(loss: Loss, targeted: bool) -> None:
    """On the logits themselves, up the loss, or with a target down it.

    DLR's denominator pulls too: where the label is no longer first, and where the target is first, third or fourth.
    """
    logits, y, t = some_logits()
    threat = Threat(eps=0.1, alpha=0.1, steps=1, loss=loss, targeted=targeted)
    leaf = logits.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss_of(threat, y)(leaf, t if targeted else y), leaf)
    moved = logits + (-1e-6 if targeted else 1e-6) * grad
    if targeted:
        rises = moved.gather(1, t[:, None])[:, 0] > logits.gather(1, t[:, None])[:, 0]
        middle = (logits.topk(4, dim=1).indices[:, [0, 2, 3]] == t[:, None]).any(dim=1)
        assert rises[~middle].all() if loss == "dlr" else rises.all()
        assert 0 < int(middle.sum()) < len(y)
    else:
        lead, after = (
            z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1) for z in (logits, moved)
        )
        first = logits.argmax(dim=1) == y
        assert (after < lead)[first].all() if loss == "dlr" else (after < lead).all()
        assert 0 < int(first.sum()) < len(y)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_images_gradient_does_not_depend_on_the_others(build: Any, images: Any, loss: Loss, targeted: bool) -> None:
    model, x = build("small", torch.float64).eval(), images(5, 8, torch.float64)
    y, t = torch.arange(5), torch.arange(1, 6)
    threat = Threat(eps=0.1, alpha=0.1, steps=1, loss=loss, targeted=targeted)
    whole = input_gradient(model.logits, loss=loss_of(threat, y))(x, t if targeted else y)
    for i in range(5):
        one = slice(i, i + 1)
        alone = input_gradient(model.logits, loss=loss_of(threat, y[one]))(x[one], (t if targeted else y)[one])
        torch.testing.assert_close(alone, whole[one], rtol=1e-9, atol=1e-14)
        assert alone.any()


def test_cross_entropy_stalls_where_the_others_do_not() -> None:
    """Logits of +-1e4 saturate float32's softmax: the very gradient that masks an attack."""
    weight = torch.randn(CLASSES, 3 * 4 * 4, generator=generator(5))
    x = torch.rand(8, 3, 4, 4, generator=generator(6))

    def logits(pixels: Tensor) -> Tensor:
        return 1e4 * pixels.flatten(1) @ weight.t()

    y = logits(x).argmax(dim=1)
    still = [
        float((input_gradient(logits, loss=loss)(x, y) == 0).float().mean()) for loss in (cross_entropy, margin, dlr)
    ]
    assert still == [1.0, 0.0, 0.0]


def test_an_attack_at_the_least_likely_class_moves_to_the_one_it_is_given(images: Any) -> None:
    """On linear logits the gradient's sign is constant, so the corner of the ball tells which class was wanted."""
    weight = torch.randn(CLASSES, 192, generator=generator(7), dtype=torch.float64)
    x, index = images(6, 8, torch.float64) * 0.2 + 0.4, torch.arange(6)

    def logits(pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ weight.t()

    y = torch.arange(6) % CLASSES
    target = least_likely(logits(x), y)
    threat = Threat(eps=0.01, alpha=0.02, steps=1, targeted=True, target="least-likely", loss="margin")
    gradient = input_gradient(logits, loss=loss_of(threat, y))
    found = attack(gradient, x, y, index, threat, Draw(0), num_classes=CLASSES, target=target).x_adv
    rival = logits(x).scatter(1, target[:, None], -torch.inf).argmax(dim=1)
    expected = x + 0.01 * (weight[target] - weight[rival]).sign().view_as(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="expected a target beside pgd1_least_likely_margin, got none"):
        attack(gradient, x, y, index, threat, Draw(0), num_classes=CLASSES)
