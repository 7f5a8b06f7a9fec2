"""`fasttht eval` over several processes: the row of one, each image once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fasttht import cli
from tests.ranks import commands

WORDS = [
    "--eval-steps", "2", "3", "--losses", "ce", "dlr", "--eval-restarts", "2", "--suites", "apgd", "knn",
    "--knn-features", "trunk", "--limit", "130",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        path = tmp_path_factory.mktemp("eval") / "r"
        words = "train --objective at --width 4 --epochs 8 --replay 4 --eval-steps 1".split()  # noqa: SIM905
        assert cli.run([*words, "--output", str(path)]) == 0
        yield path


def test_several_processes_find_what_one_finds(run: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    words = ["eval", str(run), *WORDS, "--work-dir"]
    assert cli.run([*words, str(tmp_path / "a"), "--output", str(alone)]) == 0
    ranks = commands(2, tmp_path, lambda rank: [*words, str(tmp_path / "b"), "--output", str(together)])
    assert ranks.join(100) == [0, 0], ranks.text(0) + ranks.text(1)
    (row,), (expected,) = ([json.loads(line) for line in file.read_text().splitlines()] for file in (together, alone))
    assert {"apgd_top1", "knn_pgd2_worst_top1", "worst_top1", "pgd3_dlr_r2_top1"} <= row.keys()
    assert row["images"] == 130
    assert row == expected
    assert "held-out images" in ranks.text(0)
    assert "held-out images" not in ranks.text(1)


def test_more_processes_than_images_are_refused(run: Path, tmp_path: Path) -> None:
    ranks = commands(2, tmp_path, lambda rank: ["eval", str(run), "--limit", "1"])
    assert ranks.join() == [2, 2]
    said = ranks.text(0) + ranks.text(1)  # all ranks find it, and the first one says it
    assert said.count("WORLD_SIZE: expected at most as many processes as 1 images") == 1
