"""Adversarial training: the two train steps, their rows, and the final evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasttht import log
from fasttht.attacks.pgd import Draw
from fasttht.augment import augment_batch, training_recipe
from fasttht.build import build_loader, build_state, describe_kernels, describe_loader, progressive_size
from fasttht.config import TrainConfig
from fasttht.config_file import digest, length_text, radius_text
from fasttht.distributed import SOLO, World
from fasttht.evaluate import Score, evaluate, record, threats
from fasttht.loop import Loop
from fasttht.meeting import Meeting
from fasttht.metrics import figures, means
from fasttht.models.two_head import CosineClassifier
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.splits import Splits
from fasttht.resolve import passes
from fasttht.state import TrainState
from fasttht.steps import free_step, standard_step
from fasttht.traits import TRAITS


def default_output(config: TrainConfig) -> Path:
    """Return the run folder of a configuration: a readable name and a hash, the same for the same run."""
    settings = config.attack
    kind = f"free{settings.replay}" if settings.replay > 1 else f"pgd{settings.steps}"
    if config.method.objective == "clean":
        kind = "natural"
    return Path("runs") / f"{config.method.objective}-{config.model.arch}-{kind}-{digest(config)}"


class Trainer(Loop[Batch]):
    """One run of `fasttht train`, from its start or its newest checkpoint.

    splits: data sets of one's own (`pipelines.samples.Samples`), in place of what `--data` names; a resume needs the
    same ones.
    world: the processes that train together; see `distributed.open_world`.

    Raises (on construction, before anything is written): DataError, UsageError, CheckpointError.
    """

    title = "train"
    loader: Loader
    state: TrainState

    def __init__(self, config: TrainConfig, splits: Splits | None = None, *, world: World = SOLO) -> None:
        assert config.optim.epochs is not None, "the config was not resolved"
        super().__init__(config, config.run.output or default_output(config), splits, world)
        self.config = config
        self.loader = build_loader(config, self.splits, self.device, train=True, report=self._report_bad, world=world)
        self.eval_loader = build_loader(config, self.splits, self.device, train=False, world=world)
        self.steps_per_pass = self.loader.plan.num_steps
        self.num_passes = passes(config, config.optim.epochs)
        self.state = build_state(
            config, self.splits, self.device, self.steps_per_pass, resumed=self.resumed, world=world, report=log.say
        )
        self.img_size = progressive_size(config)
        self.updates_per_step = config.attack.replay
        self.traits = TRAITS[config.method.objective]
        self.recipe = training_recipe(config.data)
        self._begin()

    def describe(self) -> str:
        """Return the lines that open a run: what is trained, on what, for how long."""
        config, settings, optim = self.config, self.config.attack, self.config.optim
        assert settings.alpha is not None, "the config was not resolved"
        how = f"free, {settings.replay} replays" if settings.replay > 1 else f"PGD-{settings.steps}"
        threat = f"{how}, {radius_text(config)}, alpha {length_text(settings.norm, settings.alpha)}"
        lines = [
            f"objective {config.method.objective}, {config.model.arch} on {self.device}, "
            + (threat if self.traits.attacked else "no attack"),
            f"data {config.data.data or 'embedded digits'}: {len(self.splits.train):,} training and "
            f"{len(self.splits.val):,} held-out images, {self.splits.num_classes} classes",
            f"{self.num_passes} passes ({optim.epochs} epochs at replay {settings.replay}) of {self.steps_per_pass} "
            f"steps, batch {optim.batch_size}, lr {optim.lr:g}",
        ]
        if self.img_size is not None:
            size = self.img_size
            lines.append(f"images of {size.first} pixels, growing to {size.full} in passes {size.begin} to {size.end}")
        lines.append(describe_loader(config, self.splits, self.device))
        if self.state.engine is not None:
            lines.append(f"attack engine {self.state.engine.name}: {self.state.engine.reason}")
        lines.append(describe_kernels(self.device))
        lines.append(f"step engine {self.state.step_engine.name}: {self.state.step_engine.reason}")
        if self.traits.has_clean_encoder:
            method = config.method
            bank = f"bank {method.bank_size}"
            if method.bank_kind == "dataset":
                bank = f"bank of every training image, {method.num_negatives} drawn as negatives"
            lines.append(f"clean encoder {method.clean_encoder}, {bank}")
        if self.world.size > 1:
            bn = "over all of them" if config.model.sync_bn else "in each"
            lines.append(f"{self.world.size} processes, each with its slice of every batch; BN statistics {bn}")
        if self.resumed:
            lines.append(f"resuming {self.folder.path} after step {self.state.step} of {self.total_steps}")
        return "\n".join(lines)

    def _step(self, item: Batch) -> None:
        draw = Draw(self.config.run.seed, self.loader.epoch, self.state.step)
        if self.recipe is not None:
            item = augment_batch(item, self.recipe, draw)
        total = self.loader.plan.images(self.loader.step - 1)  # its step is that of the batch to come
        if self.config.attack.replay > 1:
            free_step(self.state, self.config, item, draw, total=total)
        else:
            standard_step(self.state, self.config, item, draw, num_classes=self.splits.num_classes, total=total)
        self.state.step += 1

    def _means(self, sums: dict[str, float]) -> dict[str, Any]:
        row: dict[str, Any] = means(sums, attacked=self.traits.attacked, parts=self.traits.parts)
        if isinstance(self.state.model.classifier, CosineClassifier):
            row["logit_scale"] = float(self.state.model.classifier.scale.detach())
        if self.img_size is not None:
            row["img_size"] = self.img_size(self.loader.epoch)
        return row

    def _figures(self, row: dict[str, Any], timing: dict[str, float]) -> dict[str, str]:
        return figures(row, timing)

    def _evaluate(self, kind: str) -> dict[str, Any]:
        attacks = threats(self.config)
        model = self.state.ema if self.state.ema is not None else self.state.model
        mine = -(-len(self.splits.val) // self.world.size)
        meeting = Meeting(self.world, self._stop, self.eval_loader.plan.num_steps)
        with log.Screen("evaluate", mine, "images") as screen, meeting:

            def done(images: int) -> None:
                screen.advance(images)
                meeting.meet()

            scores = evaluate(
                model, self.eval_loader, attacks, seed=self.config.run.seed, num_classes=self.splits.num_classes,
                restarts=self.config.evaluation.eval_restarts, on_batch=done,
            )  # fmt: skip
        if self.world.size > 1:  # each rank has the hits of its own rows, and none elsewhere
            self.world.barrier("evaluation")  # all are alive: a missing one would be waited for inside the device
            hits = torch.stack([score.hits for score in scores.values()]).to(self.device, torch.int32)
            scores = dict(zip(scores, map(Score, (self.world.sum_("hits", hits) > 0).cpu()), strict=True))
        return self._record(kind, record(scores))
