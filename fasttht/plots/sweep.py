"""Accuracy against the number of PGD steps, or against the radius (Figures 3 and 4): points, measured once and kept.

A point is a flat dict: everything that decides it (checkpoint, data, threat, seed, images) and the counts. It is looked
up by all of that, so one file serves several sweeps, and one that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttht import checkpoint
from fasttht.attacks.threat import Threat
from fasttht.config_file import length_text
from fasttht.errors import UsageError
from fasttht.eval_rows import choose_rows
from fasttht.evaluate import evaluate, step_size
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.samples import Samples
from fasttht.run_folder import write_whole
from fasttht.subject import Subject, images

FILE = "points.json"
Point = dict[str, Any]

# The standard normal's 97.5 % quantile.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Line:
    """One run's points in the order of x: x[i] is a number of steps, or a radius."""

    name: str
    x: tuple[float, ...]
    points: tuple[Point, ...]


def wilson(correct: int, images: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, in percent."""
    share, scale = correct / images, 1 + _Z**2 / images
    centre = (share + _Z**2 / (2 * images)) / scale
    half = _Z / scale * (share * (1 - share) / images + _Z**2 / (4 * images**2)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


@dataclass(frozen=True)
class _Walk:
    """Some held-out images as evaluation walks over them: a batch's index is the row in the whole split."""

    subject: Subject
    rows: torch.Tensor

    @property
    def samples(self) -> Samples:
        return self.subject.splits.val

    def __iter__(self) -> Iterator[Batch]:
        return images(self.subject, "val", self.rows)


def threat_of(subject: Subject, *, steps: int, eps: float, targeted: bool) -> Threat:
    """Return what `fasttht eval` of this run would attack with at these steps and this radius."""
    norm = subject.config.attack.norm
    alpha = step_size(eps, steps, subject.config.evaluation.eval_rule, norm)
    return Threat(eps=eps, alpha=alpha, steps=steps, targeted=targeted, norm=norm)


def load(path: Path) -> list[Point]:
    """Read a file of points; none if there is no file.

    Raises: UsageError if it is something else.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (ValueError, UnicodeDecodeError):
        found = None
    if not isinstance(found, list) or not all(isinstance(point, dict) and "correct" in point for point in found):
        raise UsageError(f"{path}: expected measured points as JSON, got something else; remove it to measure again")
    return found


def save(path: Path, points: Sequence[Point]) -> None:
    """Replace the file of points, one to a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "[\n" + ",\n".join(json.dumps(point) for point in points) + "\n]\n", shared=True)


def measure(
    subject: Subject,
    asked: Iterable[Threat],
    file: Path,
    *,
    limit: int | None = None,
    on_point: Callable[[Point, bool], None] | None = None,
) -> list[Point]:
    """Return a point for each threat, in order; those that `file` does not have are measured and written to it.

    limit: that many held-out images, chosen at random by the run's seed. on_point is called with each point and whether
    it was measured now.
    """
    config = subject.config
    chosen = choose_rows(subject.splits.val, limit=limit, images_file=None, seed=config.run.seed)
    walk: Any = _Walk(subject, chosen)
    basis = {
        "checkpoint": subject.checkpoint,
        "digest": digest(subject),
        "weights": subject.weights,
        "data": subject.splits.val.fingerprint,
        "crop": [config.data.img_size, config.data.crop_pct],
        "seed": config.run.seed,
        "images": len(chosen),
    }
    kept, found = load(file), []
    for threat in asked:
        key = {**basis, **dataclasses.asdict(threat)}
        point = next((p for p in kept if all(p.get(name) == value for name, value in key.items())), None)
        fresh = point is None
        if point is None:
            scores = evaluate(
                subject.model, walk, [threat], seed=config.run.seed, num_classes=subject.splits.num_classes
            )
            point = {**key, "clean_correct": scores["clean"].correct, "correct": scores[threat.name].correct}
            kept.append(point)
            save(file, kept)
        found.append(point)
        if on_point is not None:
            on_point(point, fresh)
    return found


def digest(subject: Subject) -> str:
    """Return a hash that is the checkpoint's alone: another training of the same name has another."""
    manifest = subject.path / checkpoint.FOLDER / subject.checkpoint / "MANIFEST.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]


def top1(point: Point, which: str = "correct") -> float:
    """Return a point's accuracy in percent; which: `correct` under attack, or `clean_correct`."""
    return 100 * int(point[which]) / int(point["images"])


def bars(points: Sequence[Point]) -> Any:
    """Return how far the 95 % interval reaches below and above each point, (2, N) in points of percent."""
    ends = [(top1(p), *wilson(int(p["correct"]), int(p["images"]))) for p in points]
    return np.array([[y - low for y, low, _ in ends], [high - y for y, _, high in ends]])


def one_of(name: str, values: Iterable[Any], advice: str) -> Any:
    """Return what all lines of a plot must share.

    Raises: UsageError if they do not.
    """
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise UsageError(f"plot: expected runs of one {name}, got {' and '.join(map(str, found))}; {advice}")
    return found[0]


def threat_text(point: Point) -> str:
    """Return norm, goal and number of images, as a title says them; the radius too."""
    goal = "targeted" if point["targeted"] else "untargeted"
    radius = length_text(point["norm"], point["eps"])
    return f"{point['norm']} eps {radius}, {goal}, {point['images']:,} images"
