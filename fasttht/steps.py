"""The two train steps: standard adversarial training and free replay (THAT, Algorithm 1; Shafahi et al.).

Neither waits for the device. The order inside a step is fixed: clean features, attack, one forward and backward,
the update, and only then the bank, so an image never meets its own feature among its negatives.

Of several ranks each takes its slice of the global batch; what it computes is weighted with its share of that, so that
sums over ranks are what one process has. No exchange lies inside an attack: the clean features go round once a
minibatch, for the bank, and gradients and running statistics once an update. Images of a momentum g change groups and
ranks first, as MoCo's keys do (key_shuffle.py): in f's own groups a feature would tell which image it is the twin of.
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
from fasttht.key_shuffle import draw_shuffle
from fasttht.models.ghost_bn import group_size_of
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


def standard_step(
    state: TrainState, config: TrainConfig, batch: Batch, draw: Draw, *, num_classes: int, total: int | None = None
) -> None:
    """Attack the batch with PGD, then take one optimizer step on the result.

    Mutates the state and nothing else; one backward per micro-batch. total: images of the global batch, of which
    `batch` is this rank's slice; None: it is all of it.
    """
    total = len(batch.index) if total is None else total
    if state.engine is not None:
        with region("attack_refresh"):
            state.engine.refresh_()
    parts = list(_parts(len(batch.index), config.optim.grad_accum_steps, total))
    features = _clean_features(state, config, batch, draw, total)

    def attacked() -> Iterator[tuple[Views, float]]:
        for part, (rows, share) in enumerate(parts):
            yield _attacked(state, config, batch, features[part], rows, share, draw, num_classes, part, total), share

    if len(parts) == 1:
        ((views, share),) = attacked()
        inputs = {name: tensor for name, tensor in vars(views).items() if tensor is not None}
        with region("train_step"):
            state.step_engine.run(partial(_update_on_whole, state, config, share), inputs)
    else:
        views_of_parts = attacked()
        if state.engine is not None and state.engine.name == "eager":
            # All attacked before the first forward moves the running statistics, as by an engine with its own copy.
            views_of_parts = iter(list(views_of_parts))
        _update_on(state, config, views_of_parts, len(batch.index), total)
    _enqueue(state, features, batch.index, total)


def free_step(state: TrainState, config: TrainConfig, batch: Batch, draw: Draw, *, total: int | None = None) -> None:
    """Replay the batch m times: each backward moves the weights and, at the same point, the perturbation.

    Mutates the state and nothing else. Clean features are computed once; the bank is written once, after the last
    replay. draw and total: as in `standard_step`; the replays themselves draw nothing.
    """
    total = len(batch.index) if total is None else total
    assert state.delta is not None, "free training needs its delta"
    parts = list(_parts(len(batch.index), config.optim.grad_accum_steps, total))
    features = _clean_features(state, config, batch, draw, total)
    inputs = {"x": batch.x, "y": batch.y, "index": batch.index}
    present = [feat for feat in features if feat is not None]
    if present:
        inputs["feat_clean"] = torch.cat(present)
    for part, ((rows, _), feat) in enumerate(zip(parts, features, strict=True)):
        for name, tensor in _everyones(state, config, feat, batch.index[rows], part, total).items():
            inputs[f"{name}_{part}"] = tensor
    with region("train_step"), state.delta.serving(total):
        state.step_engine.run(partial(_replay, state, config, total), inputs, times=config.attack.replay)
    _enqueue(state, features, batch.index, total)


def _parts(images: int, num_parts: int, total: int) -> Iterator[tuple[slice, float]]:
    """Cut a batch into at most `num_parts` equal slices (the last may be shorter), each with its share of `total`."""
    size = -(-images // num_parts)
    for start in range(0, images, size):
        rows = slice(start, min(start + size, images))
        yield rows, (rows.stop - rows.start) / total


def _clean_features(
    state: TrainState, config: TrainConfig, batch: Batch, draw: Draw, total: int
) -> list[Tensor | None]:
    """Return g's features of every part of the batch, None for each if there is no g.

    Where a momentum g's BN has several groups (ghost groups, parts, ranks), they are of other images than f's.
    """
    parts = [rows for rows, _ in _parts(len(batch.index), config.optim.grad_accum_steps, total)]
    shuffle, x = None, batch.x
    if state.clean_encoder is not None and not state.clean_encoder.frozen:
        several = config.optim.grad_accum_steps > 1 or (state.world.size > 1 and not config.model.sync_bn)
        if several or 0 < group_size_of(state.clean_encoder) < total:
            shuffle = draw_shuffle(total, draw, state.world)
            with region("clean_encoder"):
                x = shuffle.deal(x)
    found = [state.clean_features(kernels.u8_to_input(x[rows], state.dtype)) for rows in parts]
    if shuffle is None:
        return found
    with region("clean_encoder"):
        everyones = shuffle.gather(torch.cat([feat for feat in found if feat is not None]))
    own = everyones[state.world.rows(total)]
    return [own[rows] for rows in parts]


def _everyones(
    state: TrainState, config: TrainConfig, feat: Tensor | None, index: Tensor, part: int, total: int
) -> dict[str, Tensor]:
    """Return the clean features and rows of this part on all ranks, by Views' names, if they are negatives."""
    if state.world.size == 1 or feat is None or config.method.negatives == "bank":
        return {}
    counts = []
    for images in state.world.counts(total):
        rows, _ = list(_parts(images, config.optim.grad_accum_steps, total))[part]
        counts.append(rows.stop - rows.start)
    return {
        "feat_batch": state.world.gather_rows("batch negatives", feat, counts),
        "index_batch": state.world.gather_rows("batch negatives", index, counts),
    }


def _attacked(
    state: TrainState,
    config: TrainConfig,
    batch: Batch,
    feat_clean: Tensor | None,
    rows: slice,
    share: float,
    draw: Draw,
    num_classes: int,
    part: int,
    total: int,
) -> Views:
    """Return some rows of the batch, attacked if the objective says so, with their clean features."""
    x, y, index = kernels.u8_to_input(batch.x[rows], state.dtype), batch.y[rows], batch.index[rows]
    x_adv = x
    everyones = _everyones(state, config, feat_clean, index, part, total)
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
    return Views(x, x_adv, y, index, feat_clean, **everyones)


def _update_on_whole(state: TrainState, config: TrainConfig, share: float, inputs: Inputs) -> None:
    views = Views(**{"feat_clean": None, **inputs})  # type: ignore[arg-type]
    before = state.statistics()
    _backward(state, views, share, ends=share)
    state.update_(config, before)


def _update_on(
    state: TrainState, config: TrainConfig, parts: Iterable[tuple[Views, float]], images: int, total: int
) -> None:
    """Accumulate the gradients of all parts, then update. Parts are taken one by one: their attacks may be lazy."""
    before, left = state.statistics(), images
    for views, share in parts:
        left -= len(views.y)
        _backward(state, views, share, ends=None if left else images / total)
    state.update_(config, before)


def _replay(state: TrainState, config: TrainConfig, total: int, inputs: Inputs) -> None:
    """Do one replay: accumulate the gradients of all parts, then update the weights and the perturbation."""
    delta, settings = state.delta, config.attack
    assert delta is not None, "free training needs its delta"
    assert settings.eps is not None, "the config was not resolved"
    assert settings.alpha is not None, "the config was not resolved"
    leaves, before = [], state.statistics()
    feat_clean, images = inputs.get("feat_clean"), len(inputs["index"])
    for part, (rows, share) in enumerate(_parts(images, config.optim.grad_accum_steps, total)):
        x, leaf = kernels.u8_to_input(inputs["x"][rows], state.dtype), delta.leaf(rows)
        feat = None if feat_clean is None else feat_clean[rows]
        everyones = inputs.get(f"feat_batch_{part}"), inputs.get(f"index_batch_{part}")
        views = Views(x, perturbed(x, leaf), inputs["y"][rows], inputs["index"][rows], feat, *everyones)
        _backward(state, views, share, ends=None if rows.stop < images else images / total)
        leaves.append((rows, share, leaf))
    skip = state.update_(config, before)
    for rows, share, leaf in leaves:
        assert leaf.grad is not None, "the loss depends on delta"
        zero, nan = (leaf.grad == 0).float().mean(), leaf.grad.isnan().float().mean()
        state.meter.add(zero_grad=zero * share, nan_grad=nan * share)
        delta.step_(rows, leaf.grad, skip, eps=settings.eps, alpha=settings.alpha)


def _backward(state: TrainState, views: Views, share: float, *, ends: float | None) -> None:
    """Run the objective and accumulate its gradients, weighted by the part's share of the global batch.

    ends: on an update's last part, this rank's share of the global batch; its gradients then leave for the other ranks.
    """
    with region("train_forward"), state.autocast():
        terms = state.step_engine.loss(views)
    scaled: Tensor = state.scaler.scale(terms.loss * share)
    if ends is not None and state.reducer is not None:
        state.reducer.begin(ends)
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
def _enqueue(state: TrainState, features: list[Tensor | None], index: Tensor, total: int) -> None:
    """Write the clean features of the global batch into the bank, in its order: the same bits on all ranks."""
    if state.bank is not None:
        feat, counts = torch.cat([feat for feat in features if feat is not None]), state.world.counts(total)
        feat, index = (state.world.gather_rows("bank", tensor, counts) for tensor in (feat, index))
        state.bank.enqueue(feat, index)
