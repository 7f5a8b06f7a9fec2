"""Subsets: balanced, the same every time, a part of larger ones, and told by the manifest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.datasets import digits
from fasttht.pipelines.manifest import manifest_path
from fasttht.pipelines.subset import balanced_subset, is_amount
from fasttht.pipelines.writer import plan_dataset, write_dataset


class Labelled:
    """Labels and the rows' numbers, nothing else."""

    path, class_names, fingerprint = Path("labels"), (), "f"

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def origin(self, i: int) -> str:
        return str(i)


def rows_of(labels: list[int], amount: float, seed: int) -> list[int]:
    samples: Any = Labelled(labels)
    subset = balanced_subset(samples, amount, seed)
    return [int(subset.origin(i)) for i in range(len(subset))]


label_lists = st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=12, max_size=40)


@given(labels=label_lists, number=st.integers(1, 45), seed=st.integers(0, 2**63))
@settings(deadline=None)
def test_every_class_gives_as_many_as_any_other_or_all_it_has(labels: list[int], number: int, seed: int) -> None:
    rows = rows_of(labels, number, seed)
    assert len(rows) == min(number, len(labels))
    assert rows == sorted(set(rows))
    has, gives = (np.bincount(chosen, minlength=10) for chosen in (labels, np.array(labels)[rows]))
    assert all(given >= gives.max() - 1 for given, there in zip(gives, has, strict=True) if given < there)
    assert rows == rows_of(labels, number, seed)
    assert set(rows) <= set(rows_of(labels, number + 1, seed))


@given(labels=label_lists, share=st.floats(0.001, 0.999), seed=st.integers(0, 2**63))
@settings(deadline=None)
def test_a_share_is_a_number_of_images_and_never_none(labels: list[int], share: float, seed: int) -> None:
    assert rows_of(labels, share, seed) == rows_of(labels, max(1, round(share * len(labels))), seed)


def test_seeds_draw_different_images_of_different_classes() -> None:
    labels = [row % 10 for row in range(200)]
    drawn = {tuple(rows_of(labels, 5, seed)) for seed in range(20)}
    assert len(drawn) == 20
    assert {row % 10 for rows in drawn for row in rows} == set(range(10))
    assert {row for rows in drawn for row in rows if row >= 100}


@pytest.mark.parametrize("amount", [0, -1, 1.5, float("nan"), float("inf"), -0.5, 2.0**64])
def test_what_is_no_amount_is_refused(amount: float) -> None:
    assert not is_amount(amount)
    with pytest.raises(ValueError, match="subset: expected a share below 1 or a whole number of images, got"):
        balanced_subset(digits("val"), amount, 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_subset_of_a_data_set_is_written_whatever_the_workers_and_told_by_the_manifest(tmp_path: Path) -> None:
    reports = write_dataset("digits", None, tmp_path / "a", subset=50, workers=1)
    assert {split: report.num_samples for split, report in reports.items()} == {"train": 50, "val": 50}
    write_dataset("digits", None, tmp_path / "b", subset=50, workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for split in ("train", "val"):
        beton = BetonFile(tmp_path / "a" / f"{split}.beton")
        assert np.bincount(beton.labels).tolist() == [5] * 10
        assert beton.settings["subset"] == 50
        assert len(beton.class_names) == 10
    assert {split: plan.num_samples for split, plan in plan_dataset("digits", None, subset=0.1).items()} == {
        "train": 144,
        "val": 36,
    }
    write_dataset("digits", None, tmp_path / "all")
    assert b"subset" not in manifest_path(tmp_path / "all" / "val.beton").read_bytes()


def test_a_write_of_another_subset_is_not_resumed(tmp_path: Path) -> None:
    write_dataset("digits", None, tmp_path / "a", subset=50)
    before = contents(tmp_path / "a")
    write_dataset("digits", None, tmp_path / "a", subset=50, resume=True)
    for other, text in ((60, "60"), (None, "None")):
        with pytest.raises(DataError, match=rf"expected .*subset 50\), got images [0-9a-f]+, subset {text}; resume"):
            write_dataset("digits", None, tmp_path / "a", subset=other, resume=True)
    assert contents(tmp_path / "a") == before
