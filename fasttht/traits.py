"""What must be known of an objective to parse, check and build a run; the losses are in objectives.py. No torch here.

To add an objective: write a class in objectives.py (or reuse one), and name it in OBJECTIVES there, in TRAITS here and
in `MethodConfig.objective`. tests/test_objectives.py holds the three together.

Under --replay one backward serves the weights and delta, so delta ascends the whole objective and not the
classification loss alone, as in free THAT. That is an attack on the classifier where the cross entropy of the
attacked images is a part of the objective; the others refuse --replay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ClassifierName = Literal["cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class Prescription:
    """The attack that standard training runs.

    loss: `label` ascends the classification loss (or descends to a target's); `kl` ascends KL(p(x) || p(x_adv)), which
    has no target. steps None: as asked; alpha_ratio: default step size over eps; targeted: the default goal;
    start: `uniform` noise in the ball, or `gaussian` of deviation 0.001; clean_prob: default share of batches that
    start from the clean image instead.
    """

    loss: Literal["label", "kl"] = "label"
    steps: int | None = None
    alpha_ratio: float = 0.25
    targeted: bool = True
    start: Literal["uniform", "gaussian"] = "uniform"
    clean_prob: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One objective.

    attacked: whether it trains on adversarial images; attack: on which. has_feature_head: whether f has one; without
    use none is built. has_clean_encoder: whether it reads g's features, and with them the bank. mixture_bn: whether f
    has a clean and an adversarial BN branch. classifier: the default; other: the objective that it would be with the
    other classifier, if that has a name. without_bank: what it is with a bank of size 0. no_replay: why it cannot be
    replayed, or nothing. parts: names of its summands beside loss_cls, as in metrics.jsonl.
    """

    attacked: bool = True
    attack: Prescription = field(default_factory=Prescription)
    has_feature_head: bool = False
    has_clean_encoder: bool = False
    mixture_bn: bool = False
    classifier: ClassifierName = "linear"
    other: str | None = None
    without_bank: str | None = None
    no_replay: str = ""
    parts: tuple[str, ...] = ()


_UNATTACKED = "clean training has no attack"

TRAITS: dict[str, Traits] = {
    "that": Traits(
        has_feature_head=True, has_clean_encoder=True, classifier="cosine", without_bank="at", parts=("loss_cl",)
    ),
    "that-no-cl": Traits(classifier="cosine", other="at"),
    "that-no-nce": Traits(
        has_feature_head=True, has_clean_encoder=True, other="that", without_bank="at", parts=("loss_cl",)
    ),
    "at": Traits(),
    "at-kl": Traits(parts=("loss_kl",)),
    "alp": Traits(parts=("loss_alp",)),
    "mbn": Traits(mixture_bn=True),
    "mbn-alp": Traits(mixture_bn=True, parts=("loss_alp",)),
    "trades": Traits(
        attack=Prescription(loss="kl", targeted=False, start="gaussian", clean_prob=0.0),
        no_replay="its cross entropy sees clean images only, so delta would ascend nothing but the KL",
        parts=("loss_kl",),
    ),
    "fast": Traits(
        attack=Prescription(steps=1, alpha_ratio=1.25, targeted=False, clean_prob=0.0),
        no_replay="its attack is one step from fresh noise, and free training keeps its own delta",
    ),
    "clean": Traits(attacked=False, no_replay=_UNATTACKED),
    "clean-con": Traits(
        attacked=False, has_feature_head=True, has_clean_encoder=True, classifier="cosine", without_bank="clean",
        no_replay=_UNATTACKED, parts=("loss_cl",),
    ),
}  # fmt: skip
