"""The training loop: passes of steps, rows of metrics, checkpoints, and the final evaluation.

A `Trainer` holds one run. Everything the next step depends on is in its TrainState, its loader's position and the
sizes of its row files; a checkpoint is exactly these, so a run may be stopped after any step and continued.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fasttht import checkpoint, log
from fasttht.attacks.pgd import Draw
from fasttht.build import build_loader, build_state, describe_loader, open_device
from fasttht.config import TrainConfig
from fasttht.config_file import digest, identity, length_text, radius_text
from fasttht.errors import CheckpointError, Interrupted, NonFiniteError, UsageError
from fasttht.evaluate import evaluate, record, threats
from fasttht.metrics import Clock, figures, means
from fasttht.models.two_head import CosineClassifier
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import passes
from fasttht.run_folder import METRICS, TIMING, RunFolder
from fasttht.signals import stop_signals
from fasttht.steps import free_step, standard_step
from fasttht.traits import TRAITS

META_VERSION = 1


def default_output(config: TrainConfig) -> Path:
    """Return the run folder of a configuration: a readable name and a hash, the same for the same run."""
    settings = config.attack
    kind = f"free{settings.replay}" if settings.replay > 1 else f"pgd{settings.steps}"
    if not TRAITS[config.method.objective].attacked:
        kind = "natural"
    return Path("runs") / f"{config.method.objective}-{config.model.arch}-{kind}-{digest(config)}"


class Trainer:
    """One run, from its start or its newest checkpoint.

    Raises (on construction, before anything is written): DataError, UsageError, CheckpointError.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.optim.epochs is not None, "the config was not resolved"
        if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                '--tensorboard: expected the tensorboard package, got none; run: pip install "fasttht[tensorboard]"'
            )
        self.config = config
        self.device = open_device(config)
        self.splits = open_splits(config.data.data)
        self.folder = RunFolder(config.run.output or default_output(config))
        self._seen = checkpoint.listing(self.folder.path)
        resumes_from = self._find_checkpoint()
        self.loader = build_loader(config, self.splits, self.device, train=True, report=log.say)
        self.eval_loader = build_loader(config, self.splits, self.device, train=False)
        self.steps_per_pass = self.loader.plan.num_steps
        self.num_passes = passes(config, config.optim.epochs)
        self.state = build_state(config, self.splits, self.device, self.steps_per_pass, report=log.say)
        self.traits = TRAITS[config.method.objective]
        self.clock = Clock(self.loader)
        self.resumed = resumes_from is not None
        self._rows: dict[str, int] = {}
        if resumes_from is not None:
            self._restore(resumes_from)
        self._writer: Any = None

    @property
    def total_steps(self) -> int:
        """Minibatches in the whole run."""
        return self.num_passes * self.steps_per_pass

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
        lines.append(describe_loader(config, self.splits, self.device))
        if self.state.engine is not None:
            lines.append(f"attack engine {self.state.engine.name}: {self.state.engine.reason}")
        lines.append(f"step engine {self.state.step_engine.name}: {self.state.step_engine.reason}")
        if self.traits.has_clean_encoder:
            method = config.method
            bank = f"bank {method.bank_size}"
            if method.bank_kind == "dataset":
                bank = f"bank of every training image, {method.num_negatives} drawn as negatives"
            lines.append(f"clean encoder {method.clean_encoder}, {bank}")
        if self.resumed:
            lines.append(f"resuming {self.folder.path} after step {self.state.step} of {self.total_steps}")
        return "\n".join(lines)

    def fit(self, *, stop_at: int | None = None) -> dict[str, Any] | None:
        """Train to the end and evaluate, or stop after `stop_at` steps of the whole run with a checkpoint.

        Returns the final evaluation's row, or None if it was stopped before the end.

        Raises: NonFiniteError, with the last checkpoint kept; Interrupted after SIGINT or SIGTERM, with one of the
        step that it finished; UsageError if another process trains in the same folder.
        """
        with closing(self.loader), closing(self.eval_loader):
            return self._finish() if self._train(stop_at) else None

    def _train(self, stop_at: int | None) -> bool:
        """Take the steps that are left; return whether the run's last one is among them."""
        begun = self.resumed
        with (
            self.folder.locked(),
            stop_signals() as stop,
            log.Screen("train", self.total_steps, "steps", done=self.state.step) as screen,
        ):
            self._take_over()
            self.clock.restart()
            while self.loader.epoch < self.num_passes:
                for batch in self.loader:
                    if not begun:  # only now: data that cannot be read leave no run folder behind
                        self.folder.create(self.config, self.device)
                        begun = True
                    self._step(batch)
                    screen.advance(self.state.step)
                    at_end = self.loader.step == self.steps_per_pass
                    if self.state.step % self.config.run.log_interval == 0 or self.state.step == self.total_steps:
                        screen.figures(self._log_row())
                    if at_end:
                        self._maybe_evaluate()
                    interval = self.config.run.checkpoint_interval
                    stops = self.state.step == stop_at or stop.signal is not None
                    if at_end or stops or (interval and self.state.step % interval == 0):
                        self.save()
                    if stop.signal is not None:
                        raise Interrupted(stop.signal, f"step {self.state.step} of {self.total_steps}")
                    if stops:
                        return False
        return True

    def _step(self, batch: Batch) -> None:
        draw = Draw(self.config.run.seed, self.loader.epoch, self.state.step)
        if self.config.attack.replay > 1:
            free_step(self.state, self.config, batch)
        else:
            standard_step(self.state, self.config, batch, draw, num_classes=self.splits.num_classes)
        self.state.step += 1

    # -- rows ------------------------------------------------------------------------------------------------------

    def _log_row(self) -> dict[str, str]:
        """Write one row of metrics; the only place in the loop that waits for the device."""
        state = self.state
        sums = state.meter.read()
        row: dict[str, Any] = {"kind": "train", "epoch": self.loader.epoch, "step": state.step}
        row |= means(sums, attacked=self.traits.attacked, parts=self.traits.parts)
        row |= {"lr": float(state.lr), "loss_scale": state.scaler.get_scale()}
        if isinstance(state.model.classifier, CosineClassifier):
            row["logit_scale"] = float(state.model.classifier.scale.detach())
        if self.loader.bad_rows:
            row["bad_samples"] = len(self.loader.bad_rows)
        overflowed = sums["skipped"] > 0 and state.amp_dtype != torch.float16
        if not math.isfinite(row["loss"]) or overflowed:
            kept = checkpoint.listing(self.folder.path)
            raise NonFiniteError(
                f"step {state.step}: expected a finite loss and gradient, got loss {row['loss']:g} and "
                f"{row['skipped_steps']} steps with a non-finite gradient; "
                + (f"{kept[-1]} is kept; " if kept else "no checkpoint was written yet; ")
                + ("lower --lr" if state.amp_dtype == torch.float32 else "lower --lr, or try --amp-dtype fp32")
            )
        timing = self.clock.row(sums["images"])
        self.folder.append(METRICS, row)
        self.folder.append(TIMING, {"step": state.step, **timing})
        self._tensorboard({**row, **timing})
        return {"pass": f"{self.loader.epoch + 1}/{self.num_passes}", **figures(row, timing)}

    def _maybe_evaluate(self) -> None:
        interval = self.config.evaluation.eval_interval
        done = self.loader.epoch + 1
        if interval and done % interval == 0 and done < self.num_passes:
            self._evaluate("eval")
            self.clock.restart()

    def _evaluate(self, kind: str) -> dict[str, Any]:
        attacks = threats(self.config)
        model = self.state.ema if self.state.ema is not None else self.state.model
        with log.Screen("evaluate", len(self.splits.val), "images") as screen:
            scores = evaluate(
                model, self.eval_loader, attacks, seed=self.config.run.seed, num_classes=self.splits.num_classes,
                restarts=self.config.evaluation.eval_restarts, on_batch=screen.advance,
            )  # fmt: skip
        row = {"kind": kind, "epoch": self.loader.epoch, "step": self.state.step, **record(scores)}
        self.folder.append(METRICS, row)
        self._tensorboard(row)
        self.folder.write_summary()
        return row

    def _finish(self) -> dict[str, Any]:
        final = self.folder.final()
        return final if final is not None else self._evaluate("final")

    def _tensorboard(self, row: dict[str, Any]) -> None:
        if not self.config.run.tensorboard:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder.path / "tb"))
        for name, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, self.state.step)
        self._writer.flush()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this moment and return its folder."""
        meta = {
            "version": META_VERSION,
            "step": self.state.step,
            "loader": self.loader.state_dict(),
            "rows": self.folder.positions(),
            "identity": identity(self.config),
            "num_classes": self.splits.num_classes,
            "class_names": list(self.splits.train.class_names),
        }
        return checkpoint.save(
            self.folder.path,
            self.state.step,
            self.state.tensors(),
            meta,
            keep=self.config.run.checkpoint_hist,
        )

    def _find_checkpoint(self) -> Path | None:
        if not self.folder.exists():
            self.folder.check_free()
            return None
        self.folder.check_same(self.config)
        found = checkpoint.newest(self.folder.path, lambda error: log.say(f"damaged, trying an older one: {error}"))
        if found is not None and self.config.run.resume == "never":
            raise CheckpointError(
                f"{self.folder.path}: expected a folder without a run (--resume never), got one with {found.name}; "
                "give another --output"
            )
        return found

    def _restore(self, folder: Path) -> None:
        meta = checkpoint.read_meta(folder)
        checkpoint.restore(folder, self.state.tensors())
        self.state.step = int(meta["step"])
        self.loader.load_state_dict(meta["loader"])
        self._rows = meta["rows"]

    def _take_over(self) -> None:
        """Cut the rows back to the checkpoint's, now that the folder is locked and nobody else writes them."""
        if checkpoint.listing(self.folder.path) != self._seen:
            raise UsageError(
                f"--output: expected {self.folder.path} as it was a moment ago, got checkpoints of another process; "
                "run the same command again"
            )
        if self.folder.final() is None:  # the final row comes after the last checkpoint: a finished run keeps it
            self.folder.rewind(self._rows)
