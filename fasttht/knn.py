"""The nearest-neighbour defence (THAT, Eq. 8 and Tables 3, 4): f's feature of an image asks a bank of clean features.

Every figure says which attack it is under, as they differ by much:

    knn_clean               no attack
    knn_pgd10_transfer      made on the classifier head, then shown to the neighbours: what the paper reports
    knn_pgd10_feature       made on the features: away from the image's own clean feature
    knn_pgd10_adaptive      made on the defence, through a soft kNN: see attacks/feature.neighbour_margin
    knn_pgd10_worst         right under all three of them: what should be quoted as the defence's accuracy

All start, project and draw as `evaluate` does, so `transfer` scores the very images of `pgd10`. One start each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fasttht import kernels, log
from fasttht.attacks.feature import away_from, feature_gradient, neighbour_margin
from fasttht.attacks.losses import least_likely
from fasttht.attacks.pgd import Draw, InputGradient, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.distributed import SOLO, World
from fasttht.knn_bank import Kind, encoder_of, open_index
from fasttht.knn_search import TEMPERATURE, Search, Weighting, check_k, confidences, finder, nearest
from fasttht.pipelines.loader import Batch
from fasttht.precision import full_precision
from fasttht.signals import Stop
from fasttht.subject import Subject, images

_KINDS = ("transfer", "feature", "adaptive")


class Defence:
    """f and its bank as a classifier, and the attacks that it is scored under.

    threats: on the cross entropy, from which `transfer` is made; each gives the figures of this file under its name. A
    targeted one pulls to a drawn other class, or to the one that the classifier finds least likely; on features, to the
    mean of that class's clean ones. folder, world, stop: where the bank is kept, and who builds it, see
    `knn_bank.open_index`.

    Raises: UsageError for a k outside 1 to the number of training images, for features that f does not have, or for
    faiss without its package; ValueError for a threat of another loss; what `knn_bank.open_index` raises.
    """

    def __init__(
        self,
        subject: Subject,
        threats: Sequence[Threat],
        *,
        k: int = 50,
        weighting: Weighting = "similarity",
        features: Kind = "head",
        search: Search = "exact",
        folder: Path | None = None,
        say: Callable[[str], None] = log.say,
        world: World = SOLO,
        stop: Stop | None = None,
    ) -> None:
        check_k(k, len(subject.splits.train))
        for threat in threats:
            if threat.loss != "ce":
                raise ValueError(f"knn: expected threats on the cross entropy, got {threat.name}; leave the others out")
        self._subject, self._threats, self._k, self._weighting = subject, list(threats), k, weighting
        self._index = open_index(subject, features, say, folder, world=world, stop=stop)
        self._query, self._find = encoder_of(subject.model, features), finder(self._index.features, search=search)
        self._prototypes = self._index.prototypes(subject.splits.num_classes)
        temperature = TEMPERATURE if weighting == "exponential" else math.inf
        self._margin = neighbour_margin(self._index.features, self._index.labels, k=k, temperature=temperature)
        self._transferred: dict[Threat, Tensor] = {}

    @property
    def _distinct(self) -> list[Threat]:
        """The threats without the names of their radii: a sweep's radius may be the evaluation's own."""
        return list(dict.fromkeys(replace(threat, named_eps=False) for threat in self._threats))

    def saw(self, threat: Threat, batch: Batch, x_adv: Tensor) -> None:
        """Vote on what an attack on the classifier made of a batch, so that `evaluate` need not make it again.

        Within the evaluation's arithmetic and modes; other threats than the defence's own are passed over.
        """
        if threat in self._distinct:
            if threat not in self._transferred:
                self._transferred[threat] = torch.zeros(len(self._subject.splits.val), dtype=torch.bool)
            self._transferred[threat][batch.index.cpu()] = self._right(x_adv, batch.y).cpu()

    def evaluate(self, rows: Tensor, on_batch: Callable[[int], None] = lambda images: None) -> dict[str, Tensor]:
        """Return which held-out images the neighbours name rightly, hits (len(rows),) bool by name, on the CPU.

        rows: (N,) int64 of the held-out split; hits are by position in it. What `saw` has voted on must hold all of
        them. Attacks end with the last iterate, in float32 without TF32; their random numbers depend on the run's seed
        and the row alone, so not on the batch size. The modes of both networks are restored. on_batch: told of every
        batch's images when they are done.
        """
        distinct, count, done = self._distinct, len(rows), 0
        hits = {"knn_clean": torch.zeros(count, dtype=torch.bool)}
        for threat in self._threats:
            hits |= {f"knn_{threat.name}_{kind}": torch.zeros(count, dtype=torch.bool) for kind in (*_KINDS, "worst")}

        def so_far() -> dict[str, str]:
            return {name: f"{100 * float(found[:done].float().mean()):.2f} %" for name, found in hits.items() if done}

        with (
            log.EvalScreen(count * (2 + sum(map(self._passes, distinct))), so_far, title="knn") as screen,
            evaluating(self._subject.model),
            evaluating(self._index.network),
            full_precision(),
        ):
            for batch in images(self._subject, "val", rows):
                x, place = kernels.u8_to_input(batch.x), slice(done, done + len(batch.y))
                with torch.no_grad():
                    own = self._index.encode(x)
                hits["knn_clean"][place] = self._right(x, batch.y).cpu()
                screen.advance(2 * len(x))
                found: dict[Threat, dict[str, Tensor]] = {}
                for threat in distinct:
                    found[threat] = self._attacked(threat, x, batch, own, screen.advance)
                    found[threat]["worst"] = torch.stack(list(found[threat].values())).all(dim=0)
                for threat in self._threats:
                    for kind, right in found[replace(threat, named_eps=False)].items():
                        hits[f"knn_{threat.name}_{kind}"][place] = right
                done = place.stop
                on_batch(len(batch.y))
        return hits

    def _passes(self, threat: Threat) -> int:
        """Return how many passes an image takes under a threat: the gradients, and the vote."""
        return sum(threat.steps + 1 for kind in _KINDS if kind != "transfer" or threat not in self._transferred)

    def _attacked(
        self, threat: Threat, x: Tensor, batch: Batch, own: Tensor, on_step: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """Return what is right under each attack, (B,) bool on the CPU. own: clean features by the bank's network."""
        subject, found = self._subject, dict[str, Tensor]()
        anchors = self._prototypes.__getitem__ if threat.targeted else lambda y: own
        crafted: dict[str, InputGradient] = {
            "transfer": input_gradient(subject.model.logits),
            "feature": feature_gradient(self._query, away_from(anchors)),
            "adaptive": feature_gradient(self._query, self._margin),
        }
        aim = None
        if threat.targeted and threat.target == "least-likely":
            with torch.no_grad():
                aim = least_likely(subject.model.logits(x), batch.y)

        def counted(gradient: InputGradient) -> InputGradient:
            def count(x: Tensor, y: Tensor) -> Tensor:
                on_step(len(x))
                return gradient(x, y)

            return count

        for kind, gradient in crafted.items():
            if kind == "transfer" and threat in self._transferred:
                found[kind] = self._transferred[threat][batch.index.cpu()]
                continue
            attacked = attack(
                counted(gradient), x, batch.y, batch.index, threat, Draw(subject.config.run.seed),
                num_classes=subject.splits.num_classes, target=aim,
            )  # fmt: skip
            found[kind] = self._right(attacked.x_adv, batch.y).cpu()
            on_step(len(x))
        return found

    @torch.no_grad()
    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        similarity, found = self._find(self._query(x), self._k)
        votes = confidences(similarity, self._index.labels[found], self._subject.splits.num_classes, self._weighting)
        return (votes.argmax(dim=1) == y) & votes.isfinite().all(dim=1)


def neighbours(
    subject: Subject, x: Tensor, k: int, *, features: Kind | None = None, say: Callable[[str], None] = log.say
) -> tuple[Tensor, Tensor]:
    """Return the training rows nearest to each image and their similarities, both (B, k), on the CPU, nearest first.

    x (B, 3, H, W) float in [0, 1], clean or attacked; give all at once, as the bank is opened anew by each call.
    features: by default those of the feature head, of the trunk where f has none.

    Raises: as `Defence`.
    """
    check_k(k, len(subject.splits.train))
    kind: Kind = features or ("trunk" if subject.model.feature_head is None else "head")
    index, query = open_index(subject, kind, say), encoder_of(subject.model, kind)
    found = []
    with evaluating(subject.model), full_precision(), torch.no_grad():
        for part in torch.split(x, subject.config.evaluation.eval_batch_size):
            found.append(nearest(query(part.to(subject.device)), index.features, k))
    return torch.cat([rows for _, rows in found]).cpu(), torch.cat([products for products, _ in found]).cpu()
