"""What is evaluated, drawn or exported: a trained network on its data, with the settings of the run it comes from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fasttht import checkpoint, signals
from fasttht.build import build_model, open_device
from fasttht.config import TrainConfig
from fasttht.errors import CheckpointError
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.datasets import Subset
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.plan import EpochPlan
from fasttht.pipelines.splits import Splits, open_splits
from fasttht.resuming import choose
from fasttht.run_folder import RunFolder

Origin = Literal["run", "export", "file"]


@dataclass(frozen=True)
class Subject:
    """A network, where it came from, and how.

    path: a run folder, an exported folder or a file of weights. config is resolved and its own to change: options of
    one evaluation are written into it; of a file it says what the network and its images are, nothing of its training.
    weights: `model` or `ema`; checkpoint: the name of the one they were read from, or of an export's file, else empty.
    origin: what path is; only a run folder is ours to write into, and only it knows of a clean encoder.
    """

    path: Path
    model: TwoHead
    config: TrainConfig
    splits: Splits
    device: torch.device
    weights: str
    checkpoint: str
    origin: Origin = "run"

    @property
    def title(self) -> str:
        """What people read above figures."""
        average = ", moving average of the weights" if self.weights == "ema" else ""
        where = f" at {self.checkpoint}" if self.checkpoint else ""
        return f"{self.path}{where}{average}"


def open_run(
    path: Path, config: TrainConfig, *, which: str = "last", device: str = "auto", several: bool = False
) -> Subject:
    """Read a checkpoint of a run folder; the moving average of the weights, if the run keeps one.

    config: the run's (`RunFolder.config`), or that with options of the evaluation changed.
    which: `last`, `best` or a checkpoint's name, as `resuming.choose` has it.

    several: whether the caller can be one of several processes.

    Raises: CheckpointError if that is missing or damaged, or if the data have other classes; DataError if the data
    are gone.
    """
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, device=device))
    found = choose(RunFolder(path), which)
    meta = checkpoint.read_meta(found)
    target, splits = open_device(config, several=several), open_splits(config.data.data)
    if splits.num_classes != meta.get("num_classes"):
        raise CheckpointError(
            f"{path}: expected data of {meta.get('num_classes')} classes, as the run was trained on, "
            f"got {splits.num_classes}"
        )
    model = build_model(config, splits.num_classes, target)
    name = "ema" if config.optim.model_ema else "model"
    checkpoint.restore(found, {name: dict(model.state_dict())})
    return Subject(path, model, config, splits, target, name, found.name)


def images(
    subject: Subject, split: Literal["train", "val"] = "val", rows: Tensor | None = None, batch_size: int | None = None
) -> Iterator[Batch]:
    """Yield images as evaluation shows them (centre crop, no flip) in batches, in the order of `rows`.

    rows: (N,) int64 rows of the split, all of them by default; a batch's `index` holds these.
    batch_size: by default that of the configuration's evaluation.

    Raises: DataError for an image that cannot be read.
    """
    samples = getattr(subject.splits, split)
    chosen = torch.arange(len(samples)) if rows is None else rows.cpu()
    settings = subject.config
    plan = EpochPlan(
        num_samples=len(chosen),
        batch_size=batch_size or settings.evaluation.eval_batch_size,
        seed=settings.run.seed,
        crop_pct=settings.data.crop_pct,
    )
    with closing(
        Loader(
            Subset(samples, chosen.numpy()),
            plan,
            img_size=settings.data.img_size,
            device=subject.device,
            workers=settings.data.workers or len(os.sched_getaffinity(0)),
            stall_s=settings.data.stall_timeout,
            waiting=signals.check,
        )
    ) as loader:
        for batch in loader:
            yield dataclasses.replace(batch, index=chosen.to(batch.index.device)[batch.index])
