"""The two train steps: standard adversarial training and free replay (THAT, Algorithm 1; Shafahi et al.).

Neither waits for the device. The order inside a step is fixed: clean features, attack, one forward and backward,
the update, and only then the bank, so an image never meets its own feature among its negatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.free import perturbed
from fasttht.attacks.pgd import Draw
from fasttht.attacks.threat import Threat
from fasttht.config import TrainConfig
from fasttht.objectives import Views
from fasttht.pipelines.loader import Batch
from fasttht.regions import region
from fasttht.state import TrainState
from fasttht.step_engine import Inputs
from fasttht.traits import TRAITS


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
    if state.engine is not None:
        with region("attack_refresh"):
            state.engine.refresh_()
    parts = list(_parts(len(batch.index), config.optim.grad_accum_steps))
    features: list[Tensor | None] = []

    def attacked() -> Iterator[tuple[Views, float]]:
        for rows, share in parts:
            views = _attacked(state, config, batch, rows, share, draw, num_classes)
            features.append(views.feat_clean)
            yield views, share

    if len(parts) == 1:
        ((views, _),) = attacked()
        inputs = {name: tensor for name, tensor in vars(views).items() if tensor is not None}
        with region("train_step"):
            state.step_engine.run(partial(_update_on_whole, state, config), inputs)
    else:
        views_of_parts = attacked()
        if state.engine is not None and state.engine.name == "eager":
            # All attacked before the first forward moves the running statistics, as by an engine with its own copy.
            views_of_parts = iter(list(views_of_parts))
        _update_on(state, config, views_of_parts)
    _enqueue(state, features, batch.index)


def free_step(state: TrainState, config: TrainConfig, batch: Batch) -> None:
    """Replay the batch m times: each backward moves the weights and, at the same point, the perturbation.

    Mutates the state and nothing else. Clean features are computed once; the bank is written once, after the last
    replay.
    """
    parts = _parts(len(batch.index), config.optim.grad_accum_steps)
    features = [state.clean_features(kernels.u8_to_input(batch.x[rows], state.dtype)) for rows, _ in parts]
    inputs = {"x": batch.x, "y": batch.y, "index": batch.index}
    present = [feat for feat in features if feat is not None]
    if present:
        inputs["feat_clean"] = torch.cat(present)
    with region("train_step"):
        state.step_engine.run(partial(_replay, state, config), inputs, times=config.attack.replay)
    _enqueue(state, features, batch.index)


def _parts(images: int, num_parts: int) -> Iterator[tuple[slice, float]]:
    """Cut a global batch into at most `num_parts` equal slices (the last may be shorter), each with its share."""
    size = -(-images // num_parts)
    for start in range(0, images, size):
        rows = slice(start, min(start + size, images))
        yield rows, (rows.stop - rows.start) / images


def _attacked(
    state: TrainState, config: TrainConfig, batch: Batch, rows: slice, share: float, draw: Draw, num_classes: int
) -> Views:
    """Return some rows of the batch, attacked if the objective says so, with their clean features."""
    x, y, index = kernels.u8_to_input(batch.x[rows], state.dtype), batch.y[rows], batch.index[rows]
    feat_clean, x_adv = state.clean_features(x), x
    if state.engine is not None:
        subject = batch.x[rows] if config.attack.attack_start == "lattice" else x
        ascends_kl = TRAITS[config.method.objective].attack.loss == "kl"
        with region("attack"):
            found = state.engine.attack(
                subject, y, index, train_threat(config), draw, num_classes=num_classes,
                soft_target=state.engine.probabilities(x) if ascends_kl else None,
            )  # fmt: skip
        x_adv = found.x_adv.to(state.dtype)
        state.meter.add(zero_grad=found.zero_grad * share, nan_grad=found.nan_grad * share)
    return Views(x, x_adv, y, index, feat_clean)


def _update_on_whole(state: TrainState, config: TrainConfig, inputs: Inputs) -> None:
    _update_on(state, config, [(Views(**{"feat_clean": None, **inputs}), 1.0)])  # type: ignore[arg-type]


def _update_on(state: TrainState, config: TrainConfig, parts: Iterable[tuple[Views, float]]) -> None:
    """Accumulate the gradients of all parts, then update. Parts are taken one by one: their attacks may be lazy."""
    before = state.statistics()
    for views, share in parts:
        _backward(state, views, share)
    state.update_(config, before)


def _replay(state: TrainState, config: TrainConfig, inputs: Inputs) -> None:
    """Do one replay: accumulate the gradients of all parts, then update the weights and the perturbation."""
    delta, settings = state.delta, config.attack
    assert delta is not None, "free training needs its delta"
    assert settings.eps is not None, "the config was not resolved"
    assert settings.alpha is not None, "the config was not resolved"
    leaves, before = [], state.statistics()
    feat_clean = inputs.get("feat_clean")
    for rows, share in _parts(len(inputs["index"]), config.optim.grad_accum_steps):
        x, leaf = kernels.u8_to_input(inputs["x"][rows], state.dtype), delta.leaf(rows)
        feat = None if feat_clean is None else feat_clean[rows]
        _backward(state, Views(x, perturbed(x, leaf), inputs["y"][rows], inputs["index"][rows], feat), share)
        leaves.append((rows, share, leaf))
    skip = state.update_(config, before)
    for rows, share, leaf in leaves:
        assert leaf.grad is not None, "the loss depends on delta"
        zero, nan = (leaf.grad == 0).float().mean(), leaf.grad.isnan().float().mean()
        state.meter.add(zero_grad=zero * share, nan_grad=nan * share)
        delta.step_(rows, leaf.grad, skip, eps=settings.eps, alpha=settings.alpha)


def _backward(state: TrainState, views: Views, share: float) -> None:
    """Run the objective and accumulate its gradients, weighted by the part's share of the global batch."""
    with region("train_forward"), state.autocast():
        terms = state.step_engine.loss(views)
    scaled: Tensor = state.scaler.scale(terms.loss * share)
    with region("train_backward"):
        torch.autograd.backward(scaled)
    images = len(views.y)
    state.meter.add(
        loss=terms.loss.detach() * images,
        correct=(terms.logits.detach().argmax(dim=1) == views.y).sum(),
        images=images,
        **{name: value.detach() * images for name, value in terms.parts.items()},
    )


@region("bank")
def _enqueue(state: TrainState, features: list[Tensor | None], index: Tensor) -> None:
    if state.bank is not None:
        state.bank.enqueue(torch.cat([feat for feat in features if feat is not None]), index)
