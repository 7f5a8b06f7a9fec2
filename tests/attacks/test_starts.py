"""Where attacks start, and attacks that move away from class probabilities, as TRADES' does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.engine import EagerEngine, Engine, FoldedEngine
from fasttht.attacks.pgd import Draw, attack, evaluating
from fasttht.attacks.threat import Norm, Threat
from fasttht.models.two_head import TwoHead

CLASSES = 7
DRAW = Draw(seed=3, epoch=2, step=9)
COUNTERS = {"seed": 3, "epoch": 2, "step": 9}
NORMS: list[Norm] = ["linf", "l2", "l2-relative"]


def never(_x: Tensor, _y: Tensor) -> Tensor:
    raise AssertionError("no gradient was needed")


def start_of(x: Tensor, index: Tensor, threat: Threat) -> Tensor:
    return attack(never, x, torch.zeros_like(index), index, threat, DRAW, num_classes=CLASSES).x_adv


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
@pytest.mark.parametrize("norm", NORMS)
def test_starts_do_not_depend_on_the_cut_of_the_batch(images: Any, norm: Norm, start: Any) -> None:
    """Bit for bit, and however much an image's own radius is."""
    x, index = images(7, 32), torch.arange(7) * 5
    threat = Threat(eps=0.1, alpha=0.1, steps=0, norm=norm, start=start)
    whole = start_of(x, index, threat)
    assert not torch.equal(whole, x)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 7)):
        assert torch.equal(start_of(x[rows], index[rows], threat), whole[rows])
    assert torch.equal(start_of(x.contiguous(), index, threat), whole)


@pytest.mark.parametrize("norm", NORMS)
def test_gaussian_starts_are_projected(images: Any, norm: Norm) -> None:
    """With a deviation far beyond the radius every image ends on the border of its ball."""
    x, index = images(5, 8, torch.float64) * 0.2 + 0.4, torch.arange(5)
    start = start_of(x, index, Threat(eps=0.01, alpha=0, steps=0, norm=norm, start="gaussian", start_std=1.0))
    delta = start - x
    if norm == "linf":
        assert float((delta.abs() > 0.01 - 1e-12).double().mean()) > 0.98
        assert float(delta.abs().max()) <= 0.01 + 1e-12
        return
    size = torch.linalg.vector_norm(x, dim=(1, 2, 3)) if norm == "l2-relative" else torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.vector_norm(delta, dim=(1, 2, 3)), 0.01 * size, rtol=1e-9, atol=0)


def test_gaussian_starts_inside_the_ball_are_trades_own(images: Any) -> None:
    x, index = images(5, 8, torch.float64) * 0.2 + 0.4, torch.arange(5)
    start = start_of(x, index, Threat(eps=0.1, alpha=0, steps=0, start="gaussian", start_std=0.001))
    expected = kernels.draw_gaussian_start(x, index, std=0.001, clean_prob=0.0, **COUNTERS)
    assert torch.equal(start, expected)
    assert float((start - x).std()) == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("norm", NORMS)
def test_clean_starts_are_copies_of_the_images(images: Any, norm: Norm, dtype: torch.dtype) -> None:
    if dtype == torch.uint8 and norm != "linf":
        return  # refused, elsewhere
    x, index = images(5, 8, dtype), torch.arange(5)
    found = start_of(x, index, Threat(eps=16 / 255, alpha=4 / 255, steps=0, norm=norm, start="clean"))
    assert torch.equal(found, kernels.u8_to_input(x) if dtype == torch.uint8 else x)
    assert found.data_ptr() != x.data_ptr()


# -- soft targets ------------------------------------------------------------------------------------------------------


def engine_of(name: str, model: TwoHead) -> Engine:
    return EagerEngine(model, model.logits) if name == "eager" else FoldedEngine(name, model, dtype=torch.float64)


def probabilities(model: TwoHead, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return torch.softmax(model.logits(x), dim=1)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("name", ["eager", "folded", "fused"])
def test_gradients_of_soft_targets_are_those_of_the_divergence(build: Any, images: Any, name: str, stem: str) -> None:
    """KL(p || q) differs from the cross entropy to p by the entropy of p, which does not depend on the image."""
    model, x = build(stem, torch.float64), images(3, 32, torch.float64)
    p = probabilities(model, images(3, 32, torch.float64, seed=1))
    leaf = x.clone().requires_grad_(True)
    with evaluating(model):
        divergence = F.kl_div(torch.log_softmax(model.logits(leaf), dim=1), p, reduction="sum")
        (expected,) = torch.autograd.grad(divergence, leaf)
    found = engine_of(name, model).gradient(x, p)
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    assert float(expected.abs().max()) > 0


@pytest.mark.parametrize("name", ["eager", "folded", "fused"])
def test_a_one_hot_soft_target_is_the_class(build: Any, images: Any, name: str) -> None:
    model, x, y = build("small", torch.float64), images(4, 8, torch.float64), torch.tensor([0, 6, 2, 2])
    engine = engine_of(name, model)
    one, other = engine.gradient(x, y), engine.gradient(x, F.one_hot(y, CLASSES).double())
    assert float((one - other).abs().max()) <= 1e-12 * float(one.abs().max())


@pytest.mark.parametrize("name", ["eager", "folded", "fused"])
def test_trades_attack_equals_a_loop_over_the_divergence(build: Any, images: Any, name: str) -> None:
    """From x + 0.001 N(0, 1), ten signed steps up KL(f(x) || f(x_adv)); the labels play no part."""
    model, x, index = build("small", torch.float64), images(4, 8, torch.float64), torch.arange(4)
    p, eps, alpha = probabilities(model, x), 8 / 255, 2 / 255
    x_adv = kernels.draw_gaussian_start(x, index, std=0.001, clean_prob=0.0, **COUNTERS).clamp(0, 1)
    for _ in range(10):
        leaf = x_adv.clone().requires_grad_(True)
        with evaluating(model):
            divergence = F.kl_div(torch.log_softmax(model.logits(leaf), dim=1), p, reduction="sum")
            (grad,) = torch.autograd.grad(divergence, leaf)
        x_adv = torch.clamp(torch.minimum(torch.maximum(x_adv + alpha * grad.sign(), x - eps), x + eps), 0, 1)
    for y, targeted in ((torch.zeros(4, dtype=torch.int64), False), (torch.arange(4), True)):
        threat = Threat(eps=eps, alpha=alpha, steps=10, start="gaussian", targeted=targeted)
        found = engine_of(name, model).attack(x, y, index, threat, DRAW, num_classes=CLASSES, soft_target=p)
        assert torch.allclose(found.x_adv, x_adv, rtol=0, atol=1e-12)
    assert float((x_adv - x).abs().mean()) > alpha


@pytest.mark.parametrize("name", ["eager", "folded", "fused"])
def test_a_soft_target_of_another_shape_is_refused(build: Any, images: Any, name: str) -> None:
    engine, x = engine_of(name, build("small", torch.float64)), images(4, 8, torch.float64)
    with pytest.raises(ValueError, match=r"attack: expected soft_target of shape \(4, 7\), got \(4, 6\)"):
        engine.attack(
            x,
            torch.arange(4),
            torch.arange(4),
            Threat(eps=0.1, alpha=0.1, steps=1),
            DRAW,
            num_classes=CLASSES,
            soft_target=torch.ones(4, 6),
        )


# -- threats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"norm": "l2"}, "pgd10_l2"),
        ({"norm": "l2-relative"}, "pgd10_l2_relative"),
        ({"norm": "l2", "targeted": True}, "pgd10_l2_targeted"),
        ({"start": "gaussian"}, "pgd10"),
    ],
)
def test_threats_are_named_after_their_norm(options: dict[str, Any], name: str) -> None:
    assert Threat(eps=0.1, alpha=0.1, steps=10, **options).name == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": float("inf"), "norm": "l2"}, "expected a finite eps of at least 0, got inf"),
        ({"eps": -1, "norm": "l2"}, "expected a finite eps of at least 0, got -1"),
        ({"eps": 2}, r"expected eps in \[0, 1\], got 2"),
        ({"eps": 0.1, "start_std": -1}, "expected a finite start_std of at least 0, got -1"),
    ],
)
def test_threats_of_other_norms_have_ranges_too(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Threat(alpha=0.1, steps=10, **options)
    assert Threat(eps=3, alpha=2, steps=1, norm="l2").eps == 3
