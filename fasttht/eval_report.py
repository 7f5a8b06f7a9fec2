"""What an evaluation leaves: a row of figures, the images behind them, a table for other programs, and its alarms."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttht import alarms
from fasttht.alarms import Alarm
from fasttht.attacks.auto_results import digest
from fasttht.attacks.threat import Threat
from fasttht.errors import UsageError
from fasttht.models.two_head import CosineClassifier
from fasttht.subject import Subject

_KNN = ("knn_k", "knn_weighting", "knn_features", "knn_search", "knn_bank")
_COLUMNS = (
    "run", "checkpoint", "weights", "seed", "norm", "eps", "eval_rule", "alpha", "restarts", "limit", "images_file",
    "images", "attack", "top1", "asr", "zero_grad_pct", *_KNN,
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Which held-out images were classified correctly: hits (N,) bool, on the CPU, by ascending dataset row."""

    hits: Tensor

    @property
    def correct(self) -> int:
        return int(self.hits.sum())

    @property
    def images(self) -> int:
        return len(self.hits)

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * self.correct / self.images


def record(scores: dict[str, Score]) -> dict[str, float | int]:
    """Return scores as a flat row: `clean_top1`, `pgd10_top1`, ... in percent, and the number of images."""
    row: dict[str, float | int] = {f"{name}_top1": round(score.top1, 4) for name, score in scores.items()}
    row["images"] = next(iter(scores.values())).images
    return row


def about(
    subject: Subject, attacks: Sequence[Threat], *, limit: int | None, images_file: Path | None
) -> dict[str, Any]:
    """Return what a row says of the network, the images and the attacks, ready for JSON.

    network: a digest of it, the same in a run and in its exports; data: the fingerprint of the held-out split; alpha:
    step sizes by attack.
    """
    config = subject.config
    return {
        "run": str(subject.path), "checkpoint": subject.checkpoint, "weights": subject.weights,
        "network": digest(subject.model)[:16], "data": subject.splits.val.fingerprint,
        "img_size": config.data.img_size, "crop_pct": config.data.crop_pct, "limit": limit,
        "images_file": None if images_file is None else str(images_file), "seed": config.run.seed,
        "norm": config.attack.norm, "eps": config.attack.eps, "eval_rule": config.evaluation.eval_rule,
        "restarts": config.evaluation.eval_restarts,
        "alpha": {threat.name: float(f"{threat.alpha:.6g}") for threat in attacks if threat.steps},
    }  # fmt: skip


def row_of(
    about: Mapping[str, Any],
    scores: dict[str, Score],
    zero_grad_pct: Mapping[str, float],
    attacks: Sequence[Threat],
    eps_sweep: Sequence[float],
) -> dict[str, Any]:
    """Return everything that was measured, by name, ready for JSON, behind what it is `about`.

    Beside what `record` returns: `worst_top1`, right as it is and under every attack on the classifier within the
    evaluation's own radius; `noise_top1`, under the random start alone, if that was among the attacks; for each attack
    on the classifier `NAME_asr`, its success in percent of the images that are right without it, and
    `NAME_zero_grad_pct`, the share of zeros in its last gradient at those that it left right.
    """
    clean = scores["clean"].hits
    wider = {threat.name for threat in attacks if threat.named_eps}
    named = [name for name in scores if not name.startswith(("clean", "knn"))]
    within = [name for name in named if not any(name == other or name.startswith(f"{other}_r") for other in wider)]
    every = dict(scores)
    for threat in attacks:
        if threat.steps == 0 and not (threat.targeted or threat.named_eps):
            every["noise"] = scores[threat.name]
    if within:
        every["worst"] = Score(torch.stack([clean, *(scores[name].hits for name in within)]).all(dim=0))
    row: dict[str, Any] = {**about, **record(every)}
    for name in [*named, "worst"]:
        if name in every and clean.any():
            flipped = int((clean & ~every[name].hits).sum())
            row[f"{name}_asr"] = round(100 * flipped / int(clean.sum()), 4)
    row |= {f"{name}_zero_grad_pct": round(share, 4) for name, share in zero_grad_pct.items()}
    if eps_sweep:
        row["eps_sweep"] = list(eps_sweep)
    return row


def write_archive(path: Path, scores: dict[str, Score]) -> None:
    """Write which images were right: one bool array (N,) for each score."""
    found: Any = {name: score.hits.numpy() for name, score in scores.items()}
    with path.open("wb") as archive:
        np.savez_compressed(archive, **found)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append the row as a JSON line."""
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def check_csv(path: Path) -> None:
    """Refuse a file with other columns. Raises: UsageError."""
    with path.open(newline="") as there:
        found = next(csv.reader(there), None)
    if found is not None and found != list(_COLUMNS):
        raise UsageError(
            f"--csv: expected a new file or one with the columns of this version, got {path}; name another"
        )


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Append one line for each score, under a header if the file is new; columns are always the same."""
    with path.open("a", newline="") as out:
        table = csv.DictWriter(out, fieldnames=_COLUMNS, extrasaction="ignore")
        if out.tell() == 0:
            table.writeheader()
        for name in (key.removesuffix("_top1") for key in row if key.endswith("_top1")):
            figures = {end: row.get(f"{name}_{end}", "") for end in ("top1", "asr", "zero_grad_pct")}
            figures["alpha"] = row["alpha"].get(_pgd_of(name), "")
            if not name.startswith("knn"):
                figures |= dict.fromkeys(_KNN, "")
            table.writerow({**row, "attack": name, **figures})


def _pgd_of(name: str) -> str:
    """Return the PGD within the name of a score: pgd10 of pgd10_r5 and of knn_pgd10_transfer."""
    return re.sub(r"^knn_(.*)_[a-z]+$|_r\d+$", r"\1", name)


def look(
    row: dict[str, Any], subject: Subject, warned: list[Alarm], *, full: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Print what does not add up in the row, and what the row has too little for; return both, ready for JSON.

    warned: alarms that are known already. Returns `alarms`, names and texts, and `not_checked`, sentences.
    """
    classifier = "cosine" if isinstance(subject.model.classifier, CosineClassifier) else "linear"
    found = warned + alarms.look(row, classifier=classifier, chance=100 / subject.splits.num_classes)
    for alarm in found:
        say(f"alarm {alarm.name}: {alarm.text}")
    missing = alarms.missing(row)
    if full:
        for sentence in missing:
            say(sentence)
    elif missing:
        say(f"{len(missing)} signs of masked gradients were not looked for; --alarms full looks for most of them")
    return {"alarms": [{"name": alarm.name, "text": alarm.text} for alarm in found], "not_checked": missing}
