"""Accuracy on clean and attacked held-out images: exact counts, draws keyed by image.

Every image counts once. The attack always starts from noise and returns its last iterate; float32, no TF32, no
autocast. Random numbers depend on (seed, dataset row) alone, so they are the same for any batch size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttht import checkpoint, kernels, log
from fasttht.attacks.pgd import Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Norm, Threat
from fasttht.build import build_loader, build_model, open_device
from fasttht.config import TrainConfig
from fasttht.config_file import radius_text
from fasttht.errors import CheckpointError
from fasttht.models.mixture_bn import has_mixture_bn, through
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import check_ranges, default_eps
from fasttht.run_folder import RunFolder

# What `--goal` means as values of Threat.targeted; None leaves it to the run.
GOALS: dict[str, tuple[bool, ...] | None] = {
    "run": None, "untargeted": (False,), "targeted": (True,), "both": (False, True),
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Which held-out images were classified correctly: hits (N,) bool, on the CPU, by dataset row."""

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


def step_size(eps: float, steps: int, rule: str, norm: str = "linf") -> float:
    """Return the evaluation's alpha: 2.5 eps/K (`ratio`), or max(1/255, eps/K) (`paper`; in l2 without the floor)."""
    if rule == "paper":
        return max(1 / 255 if norm == "linf" else 0.0, eps / max(steps, 1))
    return 2.5 * eps / max(steps, 1)


def threats(config: TrainConfig, goals: Sequence[bool] | None = None) -> list[Threat]:
    """Return the attacks that a configuration asks to evaluate.

    goals lists values of `targeted`; by default untargeted, and targeted too if the run trained against that.
    """
    evaluation, eps, norm = config.evaluation, config.attack.eps, config.attack.norm
    assert eps is not None, "the config was not resolved"
    if goals is None:
        goals = (False, True) if config.attack.targeted else (False,)
    return [
        Threat(
            eps=eps,
            alpha=step_size(eps, steps, evaluation.eval_rule, norm),
            steps=steps,
            targeted=targeted,
            norm=norm,
        )
        for targeted in goals
        for steps in evaluation.eval_steps
    ]


def evaluate(
    model: TwoHead,
    loader: Loader,
    attacks: Sequence[Threat],
    *,
    seed: int,
    num_classes: int,
    restarts: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Classify clean images and those of each attack; the model's mode is restored.

    The loader must be an evaluation loader; it is walked once. Returns a Score by name: `clean`, `pgd10`, ..., and
    with R > 1 restarts also `pgd10_r5`, ...: right only under every one of R attacks from other random starts (and, if
    targeted, at other random classes), the first of which is the one of `pgd10`. A network with mixture BN is
    evaluated through its adversarial branch, clean images too: a defender does not know which images were attacked.
    What those get through the clean branch (Xie et al.'s AdvProp) is `clean_branch_clean`. on_batch is called with the
    number of images done.
    """
    device = next(model.parameters()).device
    branches = has_mixture_bn(model)
    names = ["clean"]
    for threat in attacks:
        names += [threat.name] if restarts == 1 else [threat.name, f"{threat.name}_r{restarts}"]
    names += ["clean_branch_clean"] if branches else []
    hits = {name: torch.zeros(len(loader.samples), dtype=torch.bool, device=device) for name in names}
    images, gradient = 0, input_gradient(model.logits)

    @torch.no_grad()
    def right(x: Tensor) -> Tensor:
        return model.logits(x).argmax(dim=1) == batch.y

    with evaluating(model), _full_precision():
        for batch in loader:
            x = kernels.u8_to_input(batch.x)
            hits["clean"][batch.index] = right(x)
            if branches:
                with through(model, "clean"):
                    hits["clean_branch_clean"][batch.index] = right(x)
            for threat in attacks:
                worst = torch.ones_like(batch.y, dtype=torch.bool)
                for restart in range(restarts):
                    draw = Draw(seed, epoch=restart)
                    attacked = attack(gradient, x, batch.y, batch.index, threat, draw, num_classes=num_classes)
                    worst &= right(attacked.x_adv)
                    if restart == 0:
                        hits[threat.name][batch.index] = worst
                if restarts > 1:
                    hits[f"{threat.name}_r{restarts}"][batch.index] = worst
            images += len(batch.y)
            if on_batch is not None:
                on_batch(images)
    return {name: Score(found.cpu()) for name, found in hits.items()}


def evaluate_run(
    path: Path,
    *,
    changes: dict[str, Any],
    goal: str,
    eps: float | None = None,
    norm: Norm | None = None,
    output: Path | None = None,
    per_image: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a run folder's newest checkpoint, print the table, and return the row.

    changes are options of the evaluation section that differ from the run's, eps another radius, norm another norm (its
    default radius, unless eps is given). output gets the row as one more JSON line, per_image a NumPy archive of which
    images were right: one bool array (N,) by dataset row for each score. The moving average of the weights is what is
    evaluated, if the run keeps one. Nothing in the run folder is changed.

    Raises: CheckpointError if there is no whole checkpoint; DataError if the run's data are gone.
    """
    folder = RunFolder(path)
    config = folder.config()
    config.evaluation = dataclasses.replace(config.evaluation, **changes)
    config.run = dataclasses.replace(config.run, device=device)
    if norm is not None and norm != config.attack.norm:
        config.attack.norm, config.attack.alpha = norm, None
        config.attack.eps = default_eps(norm, free=config.attack.replay > 1) if eps is None else eps
    elif eps is not None:
        config.attack.eps = eps
    check_ranges(config)
    for file in (output, per_image):
        if file is not None:
            file.open("a").close()  # now, not after hours of attacks
    found = checkpoint.newest(path, checkpoint.refuse)
    if found is None:
        raise CheckpointError(f"{path}: expected a run with a checkpoint, got none yet")
    meta = checkpoint.read_meta(found)
    target, splits = open_device(config), open_splits(config.data.data)
    if splits.num_classes != meta["num_classes"]:
        raise CheckpointError(
            f"{path}: expected data of {meta['num_classes']} classes, as the run was trained on, "
            f"got {splits.num_classes}"
        )
    model = build_model(config, splits.num_classes, target)
    name = "ema" if config.optim.model_ema else "model"
    checkpoint.restore(found, {name: dict(model.state_dict())})
    loader = build_loader(config, splits, target, train=False)
    attacks = threats(config, GOALS[goal])
    with log.Screen("evaluate", len(splits.val), "images") as screen:
        scores = evaluate(
            model,
            loader,
            attacks,
            seed=config.run.seed,
            num_classes=splits.num_classes,
            restarts=config.evaluation.eval_restarts,
            on_batch=screen.advance,
        )
    assert config.attack.eps is not None, "the config was not resolved"
    row = {
        "run": str(path), "checkpoint": found.name, "weights": name, "seed": config.run.seed,
        "norm": config.attack.norm, "eps": config.attack.eps, "eval_rule": config.evaluation.eval_rule,
        **record(scores),
    }  # fmt: skip
    average = ", moving average of the weights" if name == "ema" else ""
    log.scores(f"{path} at {found.name}{average}: {row['images']} held-out images, {radius_text(config)}", row)
    if per_image is not None:
        with per_image.open("wb") as archive:
            found_hits: Any = {name: score.hits.numpy() for name, score in scores.items()}
            np.savez_compressed(archive, **found_hits)
    if output is not None:
        with output.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    return row


def record(scores: dict[str, Score]) -> dict[str, float | int]:
    """Return scores as a flat row: `clean_top1`, `pgd10_top1`, ... in percent, and the number of images."""
    row: dict[str, float | int] = {f"{name}_top1": round(score.top1, 4) for name, score in scores.items()}
    row["images"] = next(iter(scores.values())).images
    return row


@contextmanager
def _full_precision() -> Iterator[None]:
    """Turn TF32 off: its 10-bit mantissa moves logits by more than a late PGD step does."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
