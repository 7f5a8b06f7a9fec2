"""`fasttht pretrain`: MoCo v2 on two views of every image; the run folder is what `train --clean-encoder` takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels, log
from fasttht.attacks.pgd import Draw
from fasttht.build import amp_dtype_of, build_loader, describe_loader
from fasttht.config_file import digest
from fasttht.errors import UsageError
from fasttht.loop import Loop
from fasttht.moco import MocoState, build_encoder, finished, moco_step, recipe_of
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.splits import Splits
from fasttht.pretrain_config import PretrainConfig
from fasttht.schedule import CosineSchedule, LearningRate, Schedule


class TwoViews:
    """Two loaders in lockstep: the same rows in the same order, cut and flipped by independent draws.

    Each view decodes by itself, so a step decodes twice its images; neither holds what the other has decoded.
    """

    def __init__(self, query: Loader, key: Loader) -> None:
        self.query, self.key = query, key

    @property
    def step(self) -> int:
        return self.query.step

    @property
    def epoch(self) -> int:
        return self.query.epoch

    @property
    def wait_s(self) -> float:
        return self.query.wait_s + self.key.wait_s

    @property
    def bad_rows(self) -> set[int]:
        return self.query.bad_rows

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        """Yield the rest of the current epoch, then move both to the start of the next."""
        yield from zip(self.query, self.key, strict=True)

    def state_dict(self) -> dict[str, Any]:
        return self.query.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for loader in (self.query, self.key):
            loader.load_state_dict(state)

    def close(self) -> None:
        for loader in (self.query, self.key):
            loader.close()


def default_output(config: PretrainConfig) -> Path:
    """Return the run folder of a configuration: a readable name and a hash, the same for the same run."""
    return Path("runs") / f"moco-{config.model.arch}-{digest(config)}"


def build_schedule(config: PretrainConfig, steps_per_pass: int) -> LearningRate:
    """Return the learning rate as a function of updates."""
    optim = config.optim
    assert optim.lr is not None, "the config was not resolved"
    if optim.sched == "cosine":
        return CosineSchedule(optim.lr, total=optim.epochs * steps_per_pass)
    assert optim.decay_milestones is not None, "the config was not resolved"
    milestones = [epoch * steps_per_pass for epoch in optim.decay_milestones]
    return Schedule(optim.lr, milestones=milestones, rate=optim.decay_rate)


class Pretrainer(Loop[tuple[Batch, Batch]]):
    """One run of `fasttht pretrain`, from its start or its newest checkpoint.

    Raises (on construction, before anything is written): DataError, UsageError, CheckpointError.
    """

    title = "pretrain"
    loader: TwoViews
    state: MocoState

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config, config.run.output or default_output(config))
        self.config = config
        self.loader = TwoViews(
            build_loader(config, self.splits, self.device, train=True, report=log.say),
            build_loader(config, self.splits, self.device, train=True, view=1),
        )
        self.eval_loader = build_loader(config, self.splits, self.device, train=False)
        # The neighbours are training images as evaluation shows them: whole, in file order.
        both = Splits(self.splits.train, self.splits.train)
        self.neighbour_loader = build_loader(config, both, self.device, train=False)
        if config.evaluation.knn_k > len(self.splits.train):
            raise UsageError(
                f"--knn-k: expected at most the {len(self.splits.train)} training images, got {config.evaluation.knn_k}"
            )
        self.steps_per_pass = self.loader.query.plan.num_steps
        self.num_passes = config.optim.epochs
        schedule = build_schedule(config, self.steps_per_pass)
        encoder = build_encoder(config, self.device)
        self.state = MocoState(config, encoder, schedule, amp_dtype=amp_dtype_of(config, self.device))
        self.recipe = recipe_of(config)
        self._begin()

    def describe(self) -> str:
        """Return the lines that open a run: what is trained, on what, for how long."""
        config, optim, moco = self.config, self.config.optim, self.config.moco
        lines = [
            f"MoCo v2, {config.model.arch} on {self.device}, queue {moco.queue_size}, momentum {moco.key_momentum:g}, "
            f"tau {moco.tau:g}, BN in {moco.shuffle_groups} shuffled groups",
            f"data {config.data.data or 'embedded digits'}: {len(self.splits.train):,} training and "
            f"{len(self.splits.val):,} held-out images; no label is used but by the check at the end",
            f"{self.num_passes} passes of {self.steps_per_pass} steps, batch {optim.batch_size}, lr {optim.lr:g}",
            describe_loader(config, self.splits, self.device),
        ]
        if self.resumed:
            lines.append(f"resuming {self.folder.path} after step {self.state.step} of {self.total_steps}")
        return "\n".join(lines)

    def _step(self, item: tuple[Batch, Batch]) -> None:
        draw = Draw(self.config.run.seed, self.loader.epoch, self.state.step)
        moco_step(self.state, self.config, *item, self.recipe, draw)
        self.state.step += 1

    def _means(self, sums: dict[str, float]) -> dict[str, Any]:
        images, steps = max(sums["images"], 1), max(sums["steps"], 1)
        return {
            "loss": sums["loss"] / images,
            "twin_top1": 100 * sums["correct"] / images,
            "grad_norm": sums["grad_norm"] / steps,
            "skipped_steps": int(sums["skipped"]),
        }

    def _figures(self, row: dict[str, Any], timing: dict[str, float]) -> dict[str, str]:
        return {
            "loss": f"{row['loss']:.3f}",
            "twin top-1": f"{row['twin_top1']:.1f}%",
            "img/s": f"{timing['img_per_s']:.0f}",
            "wait": f"{timing['data_wait_pct']:.0f}%",
        }

    def _evaluate(self, kind: str) -> dict[str, Any]:
        encoder = finished(self.state)
        try:
            known, labels = features(encoder, self.neighbour_loader)
        finally:
            self.neighbour_loader.close()
        feat, y = features(encoder, self.eval_loader)
        found = vote(feat, known, labels, k=self.config.evaluation.knn_k, num_classes=self.splits.num_classes)
        top1 = 100 * int((found == y).sum()) / len(y)
        return self._record(kind, {"knn_top1": round(top1, 4), "images": len(y)})


@torch.no_grad()
def features(encoder: CleanEncoder, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return the unit features (N, D) and labels (N,) of every image of an evaluation loader, in file order."""
    found = [(encoder(kernels.u8_to_input(batch.x)), batch.y) for batch in loader]
    return torch.cat([feat for feat, _ in found]), torch.cat([y for _, y in found])


@torch.no_grad()
def vote(feat: Tensor, known: Tensor, labels: Tensor, *, k: int, num_classes: int, rows: int = 256) -> Tensor:
    """Return the class of each feature by its k nearest known ones, each voting with its cosine, (B,) int64.

    Shapes: feat (B, D), known (N, D), unit norm; labels (N,). `rows` features are compared at a time.
    """
    out = []
    for part in torch.split(feat, rows):
        similarity, nearest = (part @ known.t()).topk(k, dim=1)
        votes = F.one_hot(labels[nearest], num_classes).to(similarity.dtype)
        out.append((votes * similarity[:, :, None]).sum(dim=1).argmax(dim=1))
    return torch.cat(out)
