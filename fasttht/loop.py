"""What every kind of run does the same: passes of steps, rows of metrics, signals, checkpoints, resuming.

Of several processes (ranks) only rank 0 reads what is in the run folder and writes there; a checkpoint is that of one
process, whatever their number, and every rank reads it, so on several machines the run folder is on a shared disk.

A `Loop` holds one run. Everything the next step depends on is in its state, its loader's position and the sizes of its
row files; a checkpoint is exactly these, so a run may be stopped after any step and continued. What a step is, what a
row holds and how a run ends is the kind's own: `train.Trainer`, `pretrain.Pretrainer`.
"""

from __future__ import annotations

import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import fasttht
from fasttht import checkpoint, log, preemption
from fasttht.board import Board
from fasttht.build import open_device
from fasttht.config_file import AnyConfig, identity
from fasttht.distributed import SOLO, World
from fasttht.errors import Interrupted
from fasttht.guards import FiniteGuard
from fasttht.memory import Watch, at_once, eval_advice, step_advice
from fasttht.metrics import Clock
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.splits import Splits, open_splits
from fasttht.precision import fastest_kernels
from fasttht.protocols import Feed, State
from fasttht.regions import waited_for
from fasttht.resuming import META_VERSION, digest_of, find_checkpoint, read_meta, take_over
from fasttht.run_folder import METRICS, TIMING, RunFolder
from fasttht.signals import Stop, Stopped, interruptible, stop_signals

Item = TypeVar("Item")


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
    updates_per_step = 1

    def __init__(self, config: AnyConfig, output: Path, splits: Splits | None = None, world: World = SOLO) -> None:
        self._board = Board(output, wanted=config.run.tensorboard)
        self._config, self.world = config, world
        self.device = open_device(config) if world.device is None else world.device
        world.agree("configuration", json.dumps([fasttht.__version__, str(output), identity(config)]))
        self.splits = open_splits(config.data.data) if splits is None else splits
        self.folder = RunFolder(output)
        self._seen = checkpoint.listing(self.folder.path)
        found = world.on_main("the checkpoint", lambda: find_checkpoint(self.folder, config, self._seen))
        self._newest = None if found is None else self.folder.path / checkpoint.FOLDER / found
        world.agree("data", f"{self.splits.train.fingerprint} {self.splits.val.fingerprint}")
        self.resumed = self._newest is not None
        self._begun = self.resumed
        self._rows: dict[str, int] = {}
        self._evaluation_due = False
        self._saved_at = time.monotonic()
        self._guard, self._stop = FiniteGuard(), Stop()
        self._memory, self._at_once = Watch(self.device), at_once(config, world)

    def _begin(self) -> None:
        """Continue from the newest checkpoint, if there is one; what the kind's constructor ends with."""
        self.clock = Clock(self.loader)
        if self._newest is not None:
            self._restore(self._newest)
        if self.world.size > 1:
            self.world.agree("state", digest_of(self.state, self.loader))

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
        with closing(self.loader), closing(self.eval_loader), self._taken_over(), stop_signals() as self._stop:
            row = self._finish() if self._train(self._stop, stop_at) else None
            if row is not None and self.world.main:
                self.folder.note_resume("auto")
            return row

    @fastest_kernels()
    def _train(self, stop: Stop, stop_at: int | None) -> bool:
        """Take the steps that are left; return whether the run's last one is among them."""
        with log.Screen(self.title, self.total_steps, "steps", done=self.state.step) as screen:
            if self._evaluation_due:
                self._maybe_evaluate()
            self.clock.restart()
            while self.loader.epoch < self.num_passes:
                for item in self._items():
                    if not self._begun:  # only now: data that cannot be read leave no run folder behind
                        self._create()
                        self._begun = True
                    self.world.at(self.state.step)
                    # Several ranks must stop after the same step. Asked before it and answered after it, this costs no
                    # time; a signal that comes in between stops them one step later.
                    asked = self.world.ask("stop signals", self._question(stop)) if self.world.size > 1 else None
                    with self._memory.over(f"step {self.state.step + 1}", self._at_once, self._memory_advice):
                        self._step(item)
                    screen.advance(self.state.step)
                    # All ranks are alive, or this says so: later a missing one would be waited for inside the device.
                    told = None if asked is None else _answer(asked())
                    at_end = self.loader.step == self.steps_per_pass
                    if self.state.step % self._config.run.log_interval == 0 or self.state.step == self.total_steps:
                        screen.figures(self._log_row())
                    if at_end:
                        self._maybe_evaluate()
                    interval = self._config.run.checkpoint_interval
                    heard, late = (stop.signal, self._late()) if told is None else told
                    stops = self.state.step == stop_at or heard is not None
                    if at_end or stops or late or (interval and self.state.step % interval == 0):
                        self.save()
                        if told is None:
                            heard = stop.signal  # one that came while saving counts too
                    if heard is not None:
                        raise self._interrupted(heard)
                    if stops:
                        return False
        return True

    def _memory_advice(self, fits: int) -> str:
        return step_advice(self._config, self.world, len(self.splits.train), self.folder.path, fits)

    def _late(self) -> bool:
        """Whether the last checkpoint is older than --checkpoint-minutes."""
        minutes = self._config.run.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _question(self, stop: Stop) -> int:
        return 2 * int(stop.signal or 0) + self._late()

    def _items(self) -> Iterator[Item]:
        """Yield the rest of the pass. A signal ends the wait for data, with a checkpoint of the step before.

        Of several ranks the others are in the step already, and need this one's data.
        """
        items = waited_for(self.loader)
        while True:
            try:
                with self._interruptible():
                    found = list(islice(items, 1))
            except Stopped as stopped:
                if self._begun:  # else nothing was trained yet, and rows there are those of a run before
                    self.save()
                raise self._interrupted(stopped.signal) from None
            if not found:
                return
            yield found.pop()  # and nothing of it is kept while the next is waited for

    def _maybe_evaluate(self) -> None:
        """Evaluate if it is time. A signal ends it midway, with a checkpoint from which it is done again, whole."""
        interval = self._config.evaluation.eval_interval
        done = self.loader.epoch + 1
        if not (interval and done % interval == 0 and done < self.num_passes):
            return
        self._evaluation_due = True
        try:
            self._evaluated("eval")
        except Stopped as stopped:
            self.save()
            raise self._interrupted(stopped.signal) from None
        self._evaluation_due = False
        self.clock.restart()

    def _finish(self) -> dict[str, Any]:
        final = self.world.on_main("the final row", self.folder.final)
        if final is not None:
            return final
        try:
            return self._evaluated("final")
        except Stopped as stopped:
            raise self._interrupted(stopped.signal) from None

    def _evaluated(self, kind: str) -> dict[str, Any]:
        images = self._config.evaluation.eval_batch_size
        with Watch(self.device).over("evaluation", images, eval_advice), self._interruptible():
            return self._evaluate(kind)

    def _interruptible(self) -> AbstractContextManager[None]:
        """Let a signal break off what is done inside; several ranks agree to that in a `Meeting`."""
        return interruptible(self._stop) if self.world.size == 1 else nullcontext()

    def _interrupted(self, number: signal.Signals) -> Interrupted:
        """Return the error that ends the run, once rank 0 has saved: when one rank goes, torchrun ends the others."""
        self.world.on_main("the last checkpoint", lambda: preemption.mark(self.folder.path, number))
        return self._saved(number)

    def _saved(self, number: signal.Signals) -> Interrupted:
        where = f"step {self.state.step} of {self.total_steps}"
        return Interrupted(number, f"after {where}, saved; the same command continues from there")

    # -- rows ------------------------------------------------------------------------------------------------------

    def _log_row(self) -> dict[str, str]:
        """Write one row of metrics; the only place in the loop that waits for the device."""
        state = self.state
        bad = self._share_bad_rows()  # first: all ranks are alive then
        sums = state.meter.read()
        row: dict[str, Any] = {"kind": "train", "epoch": self.loader.epoch, "step": state.step}
        row |= self._means(sums)
        row |= {"lr": float(state.lr), "loss_scale": state.scaler.get_scale()}
        if bad:
            row["bad_samples"] = len(bad)
        kept = checkpoint.listing(self.folder.path)
        updates = self.updates_per_step
        self._guard.check(state.step, row["loss"], sums, row["loss_scale"], state.amp_dtype, kept, updates=updates)
        timing = self.clock.row(sums["images"])
        if self.world.main:
            self.folder.append(METRICS, row)
            self.folder.append(TIMING, {"step": state.step, **timing})
            self._board.add({**row, **timing}, state.step)
        return {"pass": f"{self.loader.epoch + 1}/{self.num_passes}", **self._figures(row, timing)}

    def _record(self, kind: str, scores: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the summary, append an evaluation's row, and return the row."""
        row = {"kind": kind, "epoch": self.loader.epoch, "step": self.state.step, **scores}
        if self.world.main:
            self.folder.write_summary(row)
            self.folder.append(METRICS, row)
            self._board.add(row, self.state.step)
        return row

    def _share_bad_rows(self) -> set[int]:
        """Return the bad rows that any rank has met; afterwards every rank knows them, and counts them."""
        for rows in self.world.everybodys("bad samples", sorted(self.loader.bad_rows)):
            self.loader.bad_rows.update(rows)
        return self.loader.bad_rows

    def _report_bad(self, sentence: str) -> None:
        """Say that a sample was replaced, on the rank that met it."""
        log.say(sentence if self.world.size == 1 else f"rank {self.world.rank}: {sentence}", anywhere=True)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of this moment and return its folder; None on ranks that write none."""
        self._share_bad_rows()
        self._saved_at = time.monotonic()
        tensors = self.state.to_save()
        if tensors is None:
            return None
        meta = {
            "version": META_VERSION,
            "step": self.state.step,
            "evaluation_due": self._evaluation_due,
            "loader": self.loader.state_dict(),
            "rows": self.folder.positions(),
            "guard": self._guard.rows,
            "identity": identity(self._config),
            "depends_on": self.state.depends_on(),
            "num_classes": self.splits.num_classes,
            "class_names": list(self.splits.train.class_names),
        }
        there = [checkpoint.step_of(path) for path in checkpoint.listing(self.folder.path)]
        return checkpoint.save(
            self.folder.path,
            self.state.step,
            tensors,
            meta,
            keep=self._config.run.checkpoint_hist,
            spare=self.folder.best_step([*there, self.state.step]),
        )

    def _restore(self, folder: Path) -> None:
        meta = read_meta(folder, self.state.depends_on(), (self.num_passes, self.steps_per_pass))
        with self.state.to_load() as tensors:
            checkpoint.restore(folder, tensors)
        self.state.step = int(meta["step"])
        self.loader.load_state_dict(meta["loader"])
        self._evaluation_due = bool(meta["evaluation_due"])
        self._guard.rows = meta["guard"]
        self._rows = meta["rows"]

    def _create(self) -> None:
        if self.world.main:
            self.folder.create(self._config, self.device)
            self.folder.note_resume(self._config.run.resume)

    @contextmanager
    def _taken_over(self) -> Iterator[None]:
        """Hold the run folder while inside, on rank 0 for all."""
        with ExitStack() as stack:

            def take() -> bool:
                stack.enter_context(self.folder.locked())
                take_over(self.folder, self._newest, self._seen, self._rows, self._config.run.resume)
                return preemption.again(self.folder.path)

            if self.world.on_main("the run folder", take):
                raise self._saved(signal.SIGTERM)
            yield


def _answer(value: int) -> tuple[signal.Signals | None, bool]:
    """Return the largest `Loop._question` of all ranks taken apart: who is told of a signal saves anyway."""
    return signal.Signals(value >> 1) if value > 1 else None, bool(value & 1)
