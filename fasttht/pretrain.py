"""`fasttht pretrain`: MoCo v2 on two views of every image; the run folder is what `train --clean-encoder` takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttht.attacks.pgd import Draw
from fasttht.build import amp_dtype_of, build_loader, describe_loader
from fasttht.config_file import digest
from fasttht.distributed import SOLO, World
from fasttht.knn_search import check_k, encoded, vote
from fasttht.loop import Loop
from fasttht.meeting import Meeting
from fasttht.moco import MocoState, build_encoder, check_groups, finished, moco_step, recipe_of
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.splits import Splits
from fasttht.precision import full_precision
from fasttht.pretrain_config import PretrainConfig
from fasttht.schedule import CosineSchedule, LearningRate, Schedule

NEIGHBOURS = "neighbours"


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

    world: the processes that train together; see `distributed.open_world`.

    Raises (on construction, before anything is written): DataError, UsageError, CheckpointError.
    """

    title = "pretrain"
    loader: TwoViews
    state: MocoState

    def __init__(self, config: PretrainConfig, *, world: World = SOLO) -> None:
        super().__init__(config, config.run.output or default_output(config), world=world)
        self.config = config
        check_groups(config, world)
        self.loader = TwoViews(
            build_loader(config, self.splits, self.device, train=True, report=self._report_bad, world=world),
            build_loader(config, self.splits, self.device, train=True, view=1, world=world),
        )
        self.eval_loader = build_loader(config, self.splits, self.device, train=False, world=world)
        # The neighbours are training images as evaluation shows them: whole, in file order.
        both = Splits(self.splits.train, self.splits.train)
        self.neighbour_loader = build_loader(config, both, self.device, train=False, world=world)
        check_k(config.evaluation.knn_k, len(self.splits.train))
        self.steps_per_pass = self.loader.query.plan.num_steps
        self.num_passes = config.optim.epochs
        schedule = build_schedule(config, self.steps_per_pass)
        encoder = build_encoder(config, self.device)
        self.state = MocoState(config, encoder, schedule, amp_dtype=amp_dtype_of(config, self.device), world=world)
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
        if self.world.size > 1:
            lines.append(
                f"{self.world.size} processes, each with its slice of every batch and "
                f"{moco.shuffle_groups // self.world.size} of the groups; keys are shuffled over all of them"
            )
        if self.resumed:
            lines.append(f"resuming {self.folder.path} after step {self.state.step} of {self.total_steps}")
        return "\n".join(lines)

    def _step(self, item: tuple[Batch, Batch]) -> None:
        draw = Draw(self.config.run.seed, self.loader.epoch, self.state.step)
        moco_step(self.state, self.config, *item, self.recipe, draw, total=self.config.optim.batch_size)
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

    @full_precision()
    def _evaluate(self, kind: str) -> dict[str, Any]:
        encoder = finished(self.state)
        try:
            known, labels = self._neighbours(encoder)
        finally:
            self.neighbour_loader.close()
        feat, y = self._encoded(encoder, self.eval_loader)
        found = vote(feat, known, labels, k=self.config.evaluation.knn_k, num_classes=self.splits.num_classes)
        counted = torch.stack([(found == y).sum(), y.new_full((), len(y))])
        correct, images = self.world.sum_("hits", counted).tolist()  # each rank has its rows of every batch
        return self._record(kind, {"knn_top1": round(100 * correct / images, 4), "images": images})

    def _encoded(self, encoder: CleanEncoder, loader: Loader) -> tuple[Tensor, Tensor]:
        """Return the features and labels of this rank's images; all ranks leave together at a signal."""
        with Meeting(self.world, self._stop, loader.plan.num_steps) as meeting:
            return encoded(encoder, loader, on_batch=lambda images: meeting.meet())

    def _neighbours(self, encoder: CleanEncoder) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and labels (N,) of the training images in file order; each rank encodes its own."""
        plan = self.neighbour_loader.plan
        feat, y = self._encoded(encoder, self.neighbour_loader)
        if self.world.size == 1:
            return feat, y
        order = plan.order()
        rows = np.concatenate([plan.batch(order, step) for step in range(plan.num_steps)])
        whole = []
        for own in (feat, y):
            all_rows = own.new_zeros(plan.num_samples, *own.shape[1:])
            all_rows[torch.from_numpy(rows).to(own.device)] = own
            whole.append(self.world.sum_(NEIGHBOURS, all_rows))
        return whole[0], whole[1]
