"""The two train steps: standard adversarial training and free replay (THAT, Algorithm 1; Shafahi et al.).

Neither waits for the device. The order inside a step is fixed: clean features, attack, one forward and backward,
the update, and only then the bank, so an image never meets its own feature among its negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.free import perturbed
from fasttht.attacks.pgd import Draw
from fasttht.attacks.threat import Threat
from fasttht.config import TrainConfig
from fasttht.objectives import OBJECTIVES, Views
from fasttht.pipelines.loader import Batch
from fasttht.state import TrainState
from fasttht.traits import TRAITS


@dataclass(frozen=True)
class Part:
    """One micro-batch: its rows of the global batch, and its share of the loss."""

    rows: slice
    share: float
    y: Tensor
    index: Tensor


def train_threat(config: TrainConfig) -> Threat:
    """Return the attack that standard training runs, as the objective prescribes it. Expects a resolved config."""
    settings = config.attack
    assert settings.eps is not None, "the config was not resolved"
    assert settings.alpha is not None, "the config was not resolved"
    assert settings.start_clean_prob is not None, "the config was not resolved"
    return Threat(
        eps=settings.eps,
        alpha=settings.alpha,
        steps=settings.steps or 0,
        targeted=bool(settings.targeted),
        clean_prob=settings.start_clean_prob,
        norm=settings.norm,
        start=TRAITS[config.method.objective].attack.start,
    )


def standard_step(state: TrainState, config: TrainConfig, batch: Batch, draw: Draw, *, num_classes: int) -> None:
    """Attack the batch with PGD, then take one optimizer step on the result.

    Mutates the state and nothing else; one backward per micro-batch.
    """
    threat, prescribed = train_threat(config), TRAITS[config.method.objective].attack
    before = state.statistics()
    if state.engine is not None:
        state.engine.refresh_()
    features = []
    for part in _parts(batch, config.optim.grad_accum_steps):
        x = kernels.u8_to_input(batch.x[part.rows], state.dtype)
        feat_clean = state.clean_features(x)
        x_adv = x
        if state.engine is not None:
            subject = batch.x[part.rows] if config.attack.attack_start == "lattice" else x
            attacked = state.engine.attack(
                subject, part.y, part.index, threat, draw, num_classes=num_classes,
                soft_target=state.engine.probabilities(x) if prescribed.loss == "kl" else None,
            )  # fmt: skip
            x_adv = attacked.x_adv.to(state.dtype)
            state.meter.add(zero_grad=attacked.zero_grad * part.share, nan_grad=attacked.nan_grad * part.share)
        _backward(state, config, Views(x, x_adv, part.y, part.index, feat_clean), part.share)
        features.append(feat_clean)
    state.update_(config, before)
    _enqueue(state, features, batch.index)


def free_step(state: TrainState, config: TrainConfig, batch: Batch) -> None:
    """Replay the batch m times: each backward moves the weights and, at the same point, the perturbation.

    Mutates the state and nothing else. Clean features are computed once; the bank is written once, after the last
    replay.
    """
    delta, settings = state.delta, config.attack
    assert delta is not None, "free training needs its delta"
    assert settings.eps is not None, "the config was not resolved"
    assert settings.alpha is not None, "the config was not resolved"
    parts = list(_parts(batch, config.optim.grad_accum_steps))
    features = [state.clean_features(kernels.u8_to_input(batch.x[part.rows], state.dtype)) for part in parts]
    for _ in range(settings.replay):
        leaves, before = [], state.statistics()
        for part, feat_clean in zip(parts, features, strict=True):
            x = kernels.u8_to_input(batch.x[part.rows], state.dtype)
            leaf = delta.leaf(part.rows)
            _backward(state, config, Views(x, perturbed(x, leaf), part.y, part.index, feat_clean), part.share)
            leaves.append(leaf)
        skip = state.update_(config, before)
        for part, leaf in zip(parts, leaves, strict=True):
            assert leaf.grad is not None, "the loss depends on delta"
            zero, nan = (leaf.grad == 0).float().mean(), leaf.grad.isnan().float().mean()
            state.meter.add(zero_grad=zero * part.share, nan_grad=nan * part.share)
            delta.step_(part.rows, leaf.grad, skip, eps=settings.eps, alpha=settings.alpha)
    _enqueue(state, features, batch.index)


def _parts(batch: Batch, num_parts: int) -> Iterator[Part]:
    """Cut a global batch into at most `num_parts` equal slices (the last may be shorter)."""
    images = len(batch.index)
    size = -(-images // num_parts)
    for start in range(0, images, size):
        rows = slice(start, min(start + size, images))
        yield Part(rows, (rows.stop - rows.start) / images, batch.y[rows], batch.index[rows])


def _backward(state: TrainState, config: TrainConfig, views: Views, share: float) -> None:
    """Run the objective and accumulate its gradients, weighted by the part's share of the global batch."""
    objective = OBJECTIVES[config.method.objective]
    with state.autocast():
        terms = objective(state.model, views, state.bank, config.method, smoothing=config.optim.smoothing)
    scaled: Tensor = state.scaler.scale(terms.loss * share)
    torch.autograd.backward(scaled)
    images = len(views.y)
    state.meter.add(
        loss=terms.loss.detach() * images,
        correct=(terms.logits.detach().argmax(dim=1) == views.y).sum(),
        images=images,
        **{name: value.detach() * images for name, value in terms.parts.items()},
    )


def _enqueue(state: TrainState, features: list[Tensor | None], index: Tensor) -> None:
    if state.bank is not None:
        state.bank.enqueue(torch.cat([feat for feat in features if feat is not None]), index)
