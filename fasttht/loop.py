"""What every kind of run does the same: passes of steps, rows of metrics, signals, checkpoints, resuming.

A `Loop` holds one run. Everything the next step depends on is in its state, its loader's position and the sizes of its
row files; a checkpoint is exactly these, so a run may be stopped after any step and continued. What a step is, what a
row holds and how a run ends is the kind's own: `train.Trainer`, `pretrain.Pretrainer`.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fasttht import checkpoint, log
from fasttht.build import open_device
from fasttht.config_file import AnyConfig, identity
from fasttht.errors import CheckpointError, Interrupted, NonFiniteError, UsageError
from fasttht.metrics import Clock, Meter
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.splits import Splits, open_splits
from fasttht.run_folder import METRICS, TIMING, RunFolder
from fasttht.signals import stop_signals

# Raised with any change to what a checkpoint holds.
META_VERSION = 2

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Feed(Protocol[Item_co]):
    """What a loop needs of its loader; see pipelines/loader.py."""

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def wait_s(self) -> float: ...
    @property
    def bad_rows(self) -> set[int]: ...
    def __iter__(self) -> Iterator[Item_co]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class State(Protocol):
    """What a loop needs of the state that its steps change."""

    step: int
    meter: Meter
    lr: Tensor
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype

    def tensors(self) -> dict[str, dict[str, Tensor]]: ...

    def depends_on(self) -> dict[str, str]:
        """Return digests, by name, of what the steps read and no checkpoint holds."""
        ...


class Loop(ABC, Generic[Item]):
    """One run, from its start or its newest checkpoint.

    A kind's constructor calls this one, sets loader, eval_loader, state, steps_per_pass and num_passes, and ends with
    `_begin`.

    Raises (on construction, before anything is written): DataError, UsageError, CheckpointError.
    """

    title: str
    loader: Feed[Item]
    eval_loader: Loader
    state: State
    steps_per_pass: int
    num_passes: int

    def __init__(self, config: AnyConfig, output: Path, splits: Splits | None = None) -> None:
        if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError(
                '--tensorboard: expected the tensorboard package, got none; run: pip install "fasttht[tensorboard]"'
            )
        self._config = config
        self.device = open_device(config)
        self.splits = open_splits(config.data.data) if splits is None else splits
        self.folder = RunFolder(output)
        self._seen = checkpoint.listing(self.folder.path)
        self._newest = self._find_checkpoint()
        self.resumed = self._newest is not None
        self._rows: dict[str, int] = {}
        self._writer: Any = None

    def _begin(self) -> None:
        """Continue from the newest checkpoint, if there is one; what the kind's constructor ends with."""
        self.clock = Clock(self.loader)
        if self._newest is not None:
            self._restore(self._newest)

    @abstractmethod
    def _step(self, item: Item) -> None:
        """Take one step; the state's step count is one higher afterwards."""

    @abstractmethod
    def _means(self, sums: dict[str, float]) -> dict[str, Any]:
        """Return the figures of a row, `loss` and `skipped_steps` among them, from the meter's sums."""

    @abstractmethod
    def _figures(self, row: dict[str, Any], timing: dict[str, float]) -> dict[str, str]:
        """Return the few figures of a row that people watch, as text."""

    @abstractmethod
    def _evaluate(self, kind: str) -> dict[str, Any]:
        """Evaluate, append the row of this kind (`eval` or `final`), and return it."""

    @property
    def total_steps(self) -> int:
        """Minibatches in the whole run."""
        return self.num_passes * self.steps_per_pass

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
            log.Screen(self.title, self.total_steps, "steps", done=self.state.step) as screen,
        ):
            self._take_over()
            self.clock.restart()
            while self.loader.epoch < self.num_passes:
                for item in self.loader:
                    if not begun:  # only now: data that cannot be read leave no run folder behind
                        self.folder.create(self._config, self.device)
                        begun = True
                    self._step(item)
                    screen.advance(self.state.step)
                    at_end = self.loader.step == self.steps_per_pass
                    if self.state.step % self._config.run.log_interval == 0 or self.state.step == self.total_steps:
                        screen.figures(self._log_row())
                    if at_end:
                        self._maybe_evaluate()
                    interval = self._config.run.checkpoint_interval
                    stops = self.state.step == stop_at or stop.signal is not None
                    if at_end or stops or (interval and self.state.step % interval == 0):
                        self.save()
                    if stop.signal is not None:
                        raise Interrupted(stop.signal, f"step {self.state.step} of {self.total_steps}")
                    if stops:
                        return False
        return True

    def _maybe_evaluate(self) -> None:
        interval = self._config.evaluation.eval_interval
        done = self.loader.epoch + 1
        if interval and done % interval == 0 and done < self.num_passes:
            self._evaluate("eval")
            self.clock.restart()

    def _finish(self) -> dict[str, Any]:
        final = self.folder.final()
        return final if final is not None else self._evaluate("final")

    # -- rows ------------------------------------------------------------------------------------------------------

    def _log_row(self) -> dict[str, str]:
        """Write one row of metrics; the only place in the loop that waits for the device."""
        state = self.state
        sums = state.meter.read()
        row: dict[str, Any] = {"kind": "train", "epoch": self.loader.epoch, "step": state.step}
        row |= self._means(sums)
        row |= {"lr": float(state.lr), "loss_scale": state.scaler.get_scale()}
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
        return {"pass": f"{self.loader.epoch + 1}/{self.num_passes}", **self._figures(row, timing)}

    def _record(self, kind: str, scores: dict[str, Any]) -> dict[str, Any]:
        """Append an evaluation's row, rewrite the summary, and return the row."""
        row = {"kind": kind, "epoch": self.loader.epoch, "step": self.state.step, **scores}
        self.folder.append(METRICS, row)
        self._tensorboard(row)
        self.folder.write_summary()
        return row

    def _tensorboard(self, row: dict[str, Any]) -> None:
        if not self._config.run.tensorboard:
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
            "identity": identity(self._config),
            "depends_on": self.state.depends_on(),
            "num_classes": self.splits.num_classes,
            "class_names": list(self.splits.train.class_names),
        }
        return checkpoint.save(
            self.folder.path,
            self.state.step,
            self.state.tensors(),
            meta,
            keep=self._config.run.checkpoint_hist,
        )

    def _find_checkpoint(self) -> Path | None:
        if not self.folder.exists():
            self.folder.check_free()
            return None
        self.folder.check_same(self._config)
        found = checkpoint.newest(self.folder.path, lambda error: log.say(f"damaged, trying an older one: {error}"))
        if found is not None and self._config.run.resume == "never":
            raise CheckpointError(
                f"{self.folder.path}: expected a folder without a run (--resume never), got one with {found.name}; "
                "give another --output"
            )
        return found

    def _restore(self, folder: Path) -> None:
        meta = checkpoint.read_meta(folder)
        if meta["version"] != META_VERSION:
            raise CheckpointError(
                f"{folder}: expected a checkpoint of version {META_VERSION}, got {meta['version']}; "
                "continue it with the release that wrote it, or give another --output"
            )
        for what, digest in self.state.depends_on().items():
            if meta["depends_on"].get(what) != digest:
                raise CheckpointError(
                    f"{folder}: expected the {what} that the run started with, got other weights; "
                    "restore its file, or give another --output"
                )
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
