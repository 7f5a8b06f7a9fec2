"""`fasttht eval` over several processes: the row of one, each image once."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttht import cli, knn_bank
from fasttht.pipelines import DataError
from fasttht.subject_file import open_subject
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


def test_several_processes_share_the_work_of_a_bank_and_keep_it_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read, write = knn_bank.encoded, knn_bank._read, knn_bank._write

    def encoded(encode: Any, batches: Any, on_batch: Any) -> Any:
        found = plain(encode, batches, on_batch)
        sys.stdout.write(f"encoded {len(found[0])}\n")
        return found

    def written(*args: Any) -> None:
        sys.stdout.write("written\n")
        write(*args)

    monkeypatch.setattr(knn_bank, "encoded", encoded)
    monkeypatch.setattr(knn_bank, "_write", written)
    words = ["eval", str(run), "--eval-steps", "0", "--suites", "knn", "--knn-features", "trunk", "--limit", "130"]
    said = []
    for name in ("first", "again", "half"):
        if name == "half":  # the second rank is on a machine of its own, say, and has no bank yet
            monkeypatch.setattr(knn_bank, "_read", lambda *args: None if os.environ.get("RANK") == "1" else read(*args))
        ranks = commands(2, tmp_path / name, lambda rank: [*words, "--work-dir", str(tmp_path / "kept")])
        assert ranks.join(100) == [0, 0], ranks.text(0) + ranks.text(1)
        said.append([re.findall(r"encoded \d+|written", ranks.text(rank)) for rank in (0, 1)])
    assert said == [
        [["encoded 718", "written"], ["encoded 719"]],
        [[], []],
        [["encoded 718"], ["encoded 719"]],
    ]
    (kept,) = (tmp_path / "kept" / "knn").iterdir()
    alone = knn_bank.open_index(open_subject(run), "trunk", lambda line: None, tmp_path / "alone")
    assert torch.allclose(load_file(kept)["features"], alone.features, atol=1e-6)


def test_an_error_or_a_signal_of_one_process_in_a_bank_ends_all(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = knn_bank.encoded

    def broken(encode: Any, batches: Any, on_batch: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise DataError("image 7 is gone")
        return plain(encode, batches, on_batch)

    def told(encode: Any, batches: Any, on_batch: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(encode, batches, on_batch)

    words = ["eval", str(run), "--eval-steps", "0", "--suites", "knn", "--knn-features", "trunk", "--work-dir"]
    for name, encoded, codes in (("broken", broken, [6, 3]), ("told", told, [75, 75])):
        monkeypatch.setattr(knn_bank, "encoded", encoded)
        ranks = commands(2, tmp_path / name, lambda rank: [*words, str(tmp_path / "kept")])
        assert ranks.join(60) == codes, ranks.text(0) + ranks.text(1)
        text = ranks.text(0) + ranks.text(1)
        assert "Traceback" not in text
        assert text.count({"broken": "image 7 is gone", "told": "SIGTERM in an evaluation"}[name]) == 1, text
    assert not (tmp_path / "kept").exists()


def test_more_processes_than_images_are_refused(run: Path, tmp_path: Path) -> None:
    ranks = commands(2, tmp_path, lambda rank: ["eval", str(run), "--limit", "1"])
    assert ranks.join() == [2, 2]
    said = ranks.text(0) + ranks.text(1)  # all ranks find it, and the first one says it
    assert said.count("WORLD_SIZE: expected at most as many processes as 1 images") == 1
