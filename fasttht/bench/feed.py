"""Images that are loaded while steps are watched: what a step waits for them is what it would wait in training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from fasttht.errors import UsageError
from fasttht.pipelines import backends
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.plan import Augment, EpochPlan
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.splits import open_splits
from fasttht.regions import waited_for

# Steps before one that is watched. A loader has up to six batches under way or ready, which steps of another kind may
# have left it the time for.
LEAD = 6

_NUM_CLASSES = 1000


def training_images(data: Path, device: torch.device, batch_size: int, *, decoder: str) -> Samples:
    """Open the training images of `data`, which `decoder` shall load in batches.

    Raises: DataError for the data; UsageError for fewer images than a batch, more classes than the network has, or a
    decoder that cannot run here.
    """
    splits = open_splits(data)
    if splits.num_classes > _NUM_CLASSES:
        raise UsageError(
            f"--data: expected at most {_NUM_CLASSES} classes, got {splits.num_classes}; take a part of it"
        )
    if len(splits.train) < batch_size:
        raise UsageError(f"--batch-size: expected at most the {len(splits.train)} training images, got {batch_size}")
    obstacle = backends.why_not(decoder, device)
    if obstacle is not None:
        raise UsageError(f"--loader: expected a decoder that can run here, got {decoder}; {obstacle}")
    return splits.train


@contextmanager
def fed(
    samples: Samples, device: torch.device, batch_size: int, img_size: int, *, decoder: str, workers: int
) -> Iterator[Iterator[Batch]]:
    """Yield batches without end, as `train` loads them; each is waited for in the region `data_wait`."""
    plan = EpochPlan(num_samples=len(samples), batch_size=batch_size, augment=Augment(), drop_last=True)
    workers = workers or len(os.sched_getaffinity(0))
    loader = Loader(samples, plan, img_size=img_size, device=device, decoder=decoder, workers=workers)
    with closing(loader):
        yield waited_for(_without_end(loader))


def _without_end(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader
