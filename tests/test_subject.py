"""What is evaluated: its images in any order, by their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fasttht.errors import CheckpointError
from fasttht.pipelines.datasets import Subset
from fasttht.pipelines.splits import open_splits
from fasttht.run_folder import RunFolder
from fasttht.subject import Subject, images, open_run


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from fasttht import cli

    path = tmp_path_factory.mktemp("subject") / "r"
    words = "train --objective at --width 8 --epochs 1 --eval-steps 1 --model-ema --output"
    assert cli.run([*words.split(), str(path), "--steps", "1"]) == 0
    return open_run(path, RunFolder(path).config())


def test_subject_is_the_moving_average_of_the_newest_checkpoint(subject: Subject) -> None:
    assert subject.weights == "ema"
    assert "moving average" in subject.title
    assert subject.checkpoint in subject.title


def test_images_come_in_the_order_asked_for_and_keep_their_rows(subject: Subject) -> None:
    whole = list(images(subject, batch_size=100))
    x, y = torch.cat([b.x for b in whole]), torch.cat([b.y for b in whole])
    assert torch.equal(torch.cat([b.index for b in whole]), torch.arange(len(subject.splits.val)))
    rows = torch.tensor([7, 3, 359, 0])
    some = list(images(subject, rows=rows, batch_size=3))
    assert [len(b.y) for b in some] == [3, 1]
    assert torch.equal(torch.cat([b.index for b in some]), rows)
    assert torch.equal(torch.cat([b.x for b in some]), x[rows])
    assert torch.equal(torch.cat([b.y for b in some]), y[rows])


def test_training_images_are_shown_without_augmentation(subject: Subject) -> None:
    rows = torch.arange(5)
    first, again = (next(images(subject, "train", rows)).x for _ in range(2))
    assert torch.equal(first, again)


def test_a_subset_answers_by_its_own_rows() -> None:
    whole = open_splits(None).val
    rows = np.array([5, 2], dtype=np.int64)
    subset = Subset(whole, rows)
    assert len(subset) == 2
    assert subset.labels.tolist() == whole.labels[[5, 2]].tolist()
    assert bytes(subset.sample(1).data) == bytes(whole.sample(2).data)
    assert subset.where(0) == whole.where(5)
    assert subset.origin(0) == whole.origin(5)
    assert subset.fingerprint != Subset(whole, rows[::-1].copy()).fingerprint
    heights, _ = subset.sizes(np.array([1]))
    assert heights.tolist() == whole.sizes(np.array([2]))[0].tolist()


def test_a_folder_without_a_checkpoint_is_refused(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a run with a checkpoint, got none yet"):
        open_run(tmp_path, subject.config)
