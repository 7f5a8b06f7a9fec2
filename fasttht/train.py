"""The training loop: passes of steps, rows of metrics, checkpoints, and the final evaluation.

A `Trainer` holds one run. Everything the next step depends on is in its TrainState, its loader's position and the
sizes of its row files; a checkpoint is exactly these, so a run may be stopped after any step and continued.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from fasttht import checkpoint, log
from fasttht.attacks.pgd import Draw
from fasttht.build import build_loader, build_state, open_device
from fasttht.config import TrainConfig, passes
from fasttht.config_file import digest, identity
from fasttht.errors import CheckpointError, NonFiniteError
from fasttht.evaluate import evaluate, record, threats
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.splits import open_splits
from fasttht.run_folder import METRICS, TIMING, RunFolder
from fasttht.steps import free_step, standard_step

META_VERSION = 1


def default_output(config: TrainConfig) -> Path:
    """Return the run folder of a configuration: a readable name and a hash, the same for the same run."""
    settings = config.attack
    kind = f"free{settings.replay}" if settings.replay > 1 else f"pgd{settings.steps}"
    if config.method.objective == "clean":
        kind = "natural"
    return Path("runs") / f"{config.method.objective}-{config.model.arch}-{kind}-{digest(config)}"


class Trainer:
    """One run, from its start or its newest checkpoint.

    Raises (on construction, before anything is written): DataError, UsageError, CheckpointError.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.optim.epochs is not None, "the config was not resolved"
        self.config = config
        self.device = open_device(config)
        self.splits = open_splits(config.data.data)
        self.folder = RunFolder(config.run.output or default_output(config))
        resumes_from = self._find_checkpoint()
        self.loader = build_loader(config, self.splits, self.device, train=True)
        self.eval_loader = build_loader(config, self.splits, self.device, train=False)
        self.steps_per_pass = self.loader.plan.num_steps
        self.num_passes = passes(config, config.optim.epochs)
        self.state = build_state(config, self.splits, self.device, self.steps_per_pass)
        self.resumed = resumes_from is not None
        if resumes_from is not None:
            self._restore(resumes_from)
        self._writer: Any = None

    @property
    def total_steps(self) -> int:
        """Minibatches in the whole run."""
        return self.num_passes * self.steps_per_pass

    def fit(self, *, stop_at: int | None = None) -> dict[str, Any] | None:
        """Train to the end and evaluate, or stop after `stop_at` steps of the whole run with a checkpoint.

        Returns the final evaluation's row, or None if it was stopped before the end.

        Raises: NonFiniteError; the last checkpoint is kept.
        """
        begun = self.resumed
        with log.Screen("train", self.total_steps, "steps", done=self.state.step) as screen:
            clock = _Clock(self)
            while self.loader.epoch < self.num_passes:
                for batch in self.loader:
                    if not begun:  # only now: data that cannot be read leave no run folder behind
                        self.folder.create(self.config, self.device)
                        begun = True
                    self._step(batch)
                    screen.advance(self.state.step)
                    at_end = self.loader.step == self.steps_per_pass
                    if self.state.step % self.config.run.log_interval == 0 or self.state.step == self.total_steps:
                        screen.figures(self._log_row(clock))
                    if at_end:
                        self._maybe_evaluate()
                    interval = self.config.run.checkpoint_interval
                    stops = self.state.step == stop_at
                    if at_end or stops or (interval and self.state.step % interval == 0):
                        self.save()
                    if stops:
                        return None
        return self._finish()

    def _step(self, batch: Batch) -> None:
        draw = Draw(self.config.run.seed, self.loader.epoch, self.state.step)
        if self.config.attack.replay > 1:
            free_step(self.state, self.config, batch)
        else:
            standard_step(self.state, self.config, batch, draw, num_classes=self.splits.num_classes)
        self.state.step += 1

    # -- rows ------------------------------------------------------------------------------------------------------

    def _log_row(self, clock: _Clock) -> dict[str, str]:
        """Write one row of metrics; the only place in the loop that waits for the device."""
        sums = self.state.meter.read()
        images, steps = max(sums["images"], 1), max(sums["steps"], 1)
        row: dict[str, Any] = {"kind": "train", "epoch": self.loader.epoch, "step": self.state.step}
        row |= {name: sums[name] / images for name in ("loss", "loss_cls")}
        if self.state.clean_encoder is not None:
            row["loss_cl"] = sums["loss_cl"] / images
        row["adv_top1" if self.config.method.objective != "clean" else "clean_top1"] = (
            100 * sums["adv_correct"] / images
        )
        row |= {
            "lr": float(self.state.lr),
            "grad_norm": sums["grad_norm"] / steps,
            "zero_grad_pct": 100 * sums["zero_grad"] / steps,
            "nan_grad_pct": 100 * sums["nan_grad"] / steps,
            "skipped_steps": int(sums["skipped"]),
            "loss_scale": self.state.scaler.get_scale(),
        }
        scale = getattr(self.state.model.classifier, "scale", None)
        if scale is not None:
            row["logit_scale"] = float(scale.detach())
        overflowed = sums["skipped"] > 0 and self.state.amp_dtype != torch.float16
        if not math.isfinite(row["loss"]) or overflowed:
            raise NonFiniteError(
                f"step {self.state.step}: expected a finite loss and gradient, got loss {row['loss']:g} and "
                f"{row['skipped_steps']} steps with a non-finite gradient; the last checkpoint is kept in "
                f"{self.folder.path}: lower --lr, or try --amp-dtype fp32"
            )
        self.folder.append(METRICS, row)
        timing = clock.row(images)
        self.folder.append(TIMING, {"step": self.state.step, **timing})
        self._tensorboard({**row, **timing})
        figures = {
            "pass": f"{self.loader.epoch + 1}/{self.num_passes}",
            "loss": f"{row['loss']:.3f}",
            "cls": f"{row['loss_cls']:.3f}",
        }
        if "loss_cl" in row:
            figures["cl"] = f"{row['loss_cl']:.3f}"
        name = "adv" if "adv_top1" in row else "clean"
        figures[f"{name} top-1"] = f"{row[f'{name}_top1']:.1f}%"
        figures |= {"img/s": f"{timing['img_per_s']:.0f}", "data wait": f"{timing['data_wait_pct']:.0f}%"}
        return figures

    def _maybe_evaluate(self) -> None:
        interval = self.config.evaluation.eval_interval
        done = self.loader.epoch + 1
        if interval and done % interval == 0 and done < self.num_passes:
            self._evaluate("eval")

    def _evaluate(self, kind: str) -> dict[str, Any]:
        attacks = threats(self.config)
        model = self.state.ema if self.state.ema is not None else self.state.model
        with log.Screen("evaluate", len(self.splits.val), "images") as screen:
            scores = evaluate(
                model, self.eval_loader, attacks, seed=self.config.run.seed, num_classes=self.splits.num_classes,
                on_batch=screen.advance,
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
            return None
        self.folder.check_same(self.config)
        found = checkpoint.newest(self.folder.path)
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
        if self.folder.final() is None:  # the final row comes after the last checkpoint: a finished run keeps it
            self.folder.rewind(meta["rows"])


class _Clock:
    """Images per second and the share of time spent waiting for data, since the last row."""

    def __init__(self, trainer: Trainer) -> None:
        self.loader = trainer.loader
        self.start, self.wait_s = time.perf_counter(), self.loader.wait_s

    def row(self, images: float) -> dict[str, float]:
        now, wait_s = time.perf_counter(), self.loader.wait_s
        seconds = now - self.start
        row = {
            "img_per_s": round(images / seconds, 1),
            "data_wait_pct": round(100 * (wait_s - self.wait_s) / seconds, 1),
            "seconds": round(seconds, 3),
        }
        self.start, self.wait_s = now, wait_s
        return row
