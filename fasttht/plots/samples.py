"""Single held-out images for a picture: attacked, and with their nearest training images (Figure 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.pgd import Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.eval_rows import shuffled
from fasttht.knn_search import confidences
from fasttht.plots.landscape import check_rows
from fasttht.precision import full_precision
from fasttht.subject import Subject, images

Shown = np.ndarray[Any, np.dtype[np.uint8]]
Neighbours = Callable[[Subject, Tensor, int], tuple[Tensor, Tensor]]

# Neighbours that vote (the paper's k), however few are shown.
VOTERS = 50


@dataclass(frozen=True)
class Attacked:
    """A held-out image before and after the attack on the classifier, as (H, W, 3) uint8, with what it is taken for.

    noise shows 0.5 + factor x (attacked - clean). predicted and confidence (a share): clean, attacked.
    """

    row: int
    label: int
    clean: Shown
    attacked: Shown
    noise: Shown
    predicted: tuple[int, int]
    confidence: tuple[float, float]

    def data(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "row": self.row, "label": self.label, "predicted": self.predicted,
            "confidence": [round(share, 6) for share in self.confidence],
        }  # fmt: skip


@dataclass(frozen=True)
class Retrieved:
    """An attacked query and its nearest training images, nearest first; predicted: by the vote of `VOTERS` (Eq. 8)."""

    query: Attacked
    predicted: int
    rows: tuple[int, ...]
    labels: tuple[int, ...]
    similarities: tuple[float, ...]
    pictures: tuple[Shown, ...]

    @property
    def success(self) -> bool:
        return self.predicted == self.query.label

    def data(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            **self.query.data(), "knn_predicted": self.predicted, "train_rows": self.rows, "train_labels": self.labels,
            "similarities": [round(value, 6) for value in self.similarities],
        }  # fmt: skip


def noise_factor(threat: Threat, largest: float) -> float:
    """Return what perturbations are multiplied by: the largest one shown, in linf the radius, becomes full contrast."""
    reach = threat.eps if threat.norm == "linf" else largest
    return 0.5 / reach if reach > 0 else 1.0


def examples(subject: Subject, threat: Threat, rows: list[int], flag: str = "--images") -> tuple[list[Attacked], float]:
    """Attack held-out images; return them, and the factor that their perturbations are shown with.

    Raises: UsageError for a row outside the data.
    """
    chosen = check_rows(flag, rows, len(subject.splits.val))
    found = list(_attacked(subject, threat, chosen))
    reach = max(float((x_adv - x).abs().max()) for _, x, x_adv, _ in found)
    factor = noise_factor(threat, reach)
    return [one for batch in found for one in _describe(subject, batch, factor)], factor


def pick(subject: Subject, threat: Threat, num: int, among: int = 256) -> list[int]:
    """Return rows to show: half of them the first that the attack flips, half the first that it does not.

    In `shuffled` order among that many images; where there are too few of one kind, more of the other.
    """
    order = _order(subject)[:among]
    flipped: dict[bool, list[int]] = {True: [], False: []}
    for places, _, _, logits in _attacked(subject, threat, order):
        clean, attacked = (part == places[:, 1] for part in logits.argmax(dim=2))
        for (row, _), was, stays in zip(places.tolist(), clean.tolist(), attacked.tolist(), strict=True):
            flipped[was and not stays].append(row)
    num_flipped = min(len(flipped[True]), max(num - num // 2, num - len(flipped[False])))
    return flipped[True][:num_flipped] + flipped[False][: num - num_flipped]


def retrieve(
    subject: Subject,
    threat: Threat,
    neighbours: Neighbours,
    *,
    shown: int,
    successes: int,
    failures: int,
    limit: int,
) -> tuple[list[Retrieved], int]:
    """Return the first queries that the vote of neighbours gets right, and the first that it gets wrong, and how many
    were tried.

    Held-out images in `shuffled` order, so none is picked by hand, attacked on the classifier, until there are enough
    of both or `limit` were tried; successes come first. neighbours: (subject, x (B, 3, H, W) in [0, 1], k) -> training
    rows and similarities, both (B, k), nearest first.
    """
    labels = torch.from_numpy(np.array(subject.splits.train.labels))
    k = min(max(VOTERS, shown), len(labels))
    found: dict[bool, list[Retrieved]] = {True: [], False: []}
    wanted = {True: successes, False: failures}
    tried = 0
    for batch in _attacked(subject, threat, _order(subject)[:limit]):
        rows, similarities = (part.cpu() for part in neighbours(subject, batch[2], k))
        voted = confidences(similarities, labels[rows], subject.splits.num_classes).argmax(dim=1)
        queries = _describe(subject, batch, noise_factor(threat, 0.0))
        for i, query in enumerate(queries):
            tried += 1
            predicted = int(voted[i])
            kind = predicted == query.label
            if len(found[kind]) < wanted[kind]:
                near = rows[i, :shown]
                found[kind].append(
                    Retrieved(
                        query, predicted, tuple(near.tolist()), tuple(labels[near].tolist()),
                        tuple(similarities[i, :shown].tolist()), tuple(_training_images(subject, near)),
                    )
                )  # fmt: skip
        if all(len(found[kind]) >= wanted[kind] for kind in found):
            break
    return found[True] + found[False], tried


_Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def _attacked(subject: Subject, threat: Threat, rows: Tensor) -> Iterator[_Batch]:
    """Yield (row and label (B, 2), x, x_adv) and the logits of both (2, B, C), as evaluation attacks them."""
    model, config = subject.model, subject.config
    gradient = input_gradient(model.logits)
    for batch in images(subject, "val", rows):
        x = kernels.u8_to_input(batch.x)
        with evaluating(model), full_precision():
            x_adv = attack(
                gradient, x, batch.y, batch.index, threat, Draw(config.run.seed), num_classes=subject.splits.num_classes
            ).x_adv
            with torch.no_grad():
                logits = torch.stack([model.logits(x), model.logits(x_adv)])
        yield torch.stack([batch.index, batch.y], dim=1), x, x_adv, logits


def _describe(subject: Subject, batch: _Batch, factor: float) -> list[Attacked]:
    places, x, x_adv, logits = batch
    confidence, predicted = (part.cpu() for part in logits.double().softmax(dim=2).max(dim=2))
    clean, attacked, noise = (_pictures(part) for part in (x, x_adv, 0.5 + factor * (x_adv - x)))
    return [
        Attacked(
            row, label, clean[i], attacked[i], noise[i],
            (int(predicted[0, i]), int(predicted[1, i])), (float(confidence[0, i]), float(confidence[1, i])),
        )
        for i, (row, label) in enumerate(places.tolist())
    ]  # fmt: skip


def _training_images(subject: Subject, rows: Tensor) -> list[Shown]:
    return [one for batch in images(subject, "train", rows) for one in batch.x.permute(0, 2, 3, 1).cpu().numpy()]


def _pictures(x: Tensor) -> Shown:
    """Return images in [0, 1] as (B, H, W, 3) uint8."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def class_name(subject: Subject, label: int) -> str:
    """Return a class's name, or its number where the data have no names."""
    names = subject.splits.train.class_names
    return names[label] if label < len(names) else str(label)


def _order(subject: Subject) -> Tensor:
    """Return all held-out rows in `shuffled` order."""
    return torch.from_numpy(shuffled(np.arange(len(subject.splits.val)), subject.config.run.seed))
