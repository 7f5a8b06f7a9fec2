"""Which images are evaluated: a subset that depends on the seed alone, lists of rows and paths, and bad lists."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasttht.errors import UsageError
from fasttht.eval_rows import choose_rows

ORIGINS = ["val/cat/1.jpg", "val/cat/2.jpg", "val/dog/1.jpg", "val/dog/3.jpg", "", "val/7"]


class Named:
    """Images with paths, and nothing else."""

    path = Path("photos")

    def __len__(self) -> int:
        return len(ORIGINS)

    def origin(self, i: int) -> str:
        return ORIGINS[i]


def rows(samples: Any, **options: Any) -> list[int]:
    settings = {"limit": None, "images_file": None, "seed": 0} | options
    found = choose_rows(samples, **settings)
    assert found.dtype == torch.int64
    return found.tolist()


def numbered(num: int) -> Any:
    class Rows(SimpleNamespace):
        def __len__(self) -> int:
            return num

    return Rows(path=Path("rows"))


def listed(tmp_path: Path, text: str) -> Path:
    (tmp_path / "list.txt").write_text(text)
    return tmp_path / "list.txt"


def test_all_images_by_default_and_never_more_than_there_are() -> None:
    assert rows(numbered(7)) == list(range(7))
    assert rows(numbered(7), limit=100) == list(range(7))


def test_a_subset_depends_on_the_seed_alone_and_is_part_of_every_larger_one() -> None:
    found = {limit: rows(numbered(2000), limit=limit) for limit in (1, 50, 700)}
    assert [len(found[limit]) for limit in (1, 50, 700)] == [1, 50, 700]
    assert set(found[1]) < set(found[50]) < set(found[700])
    assert found[50] == sorted(found[50]) == rows(numbered(2000), limit=50)
    other = rows(numbered(2000), limit=700, seed=1)
    both = len(set(other) & set(found[700]))
    assert abs(both - 700 * 700 / 2000) < 60  # independent draws share a third of their images, give or take 10
    assert abs(np.mean(found[700]) - 1000) < 75


def test_lists_hold_rows_paths_and_ends_of_paths(tmp_path: Path) -> None:
    text = "# a comment\n\n3\n  val/cat/1.jpg \ncat/2.jpg\n7\n4\n"
    assert rows(Named(), images_file=listed(tmp_path, text)) == [0, 1, 3, 4, 5]
    assert len(rows(Named(), images_file=listed(tmp_path, text), limit=2)) == 2
    assert set(rows(Named(), images_file=listed(tmp_path, text), limit=2)) < {0, 1, 3, 4, 5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\n6\n", r"expected rows below 6 or paths of photos, got no image of line 2 of .*list.txt, 6"),
        ("bird/1.jpg\n", "got no image of line 1"),
        ("at/1.jpg\n", "got no image of line 1"),
        ("-1\n", "got no image of line 1"),
        ("1.jpg\n", "got several images of line 1"),
        ("0\n\ncat/1.jpg\n", r"expected each image once, got that of line 1 of .* in line 3 too"),
        ("# nothing\n", "expected one or more images, got none"),
    ],
)
def test_bad_lists_are_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"--images-file: .*{words}|--images-file: {words}"):
        rows(Named(), images_file=listed(tmp_path, text))


def test_lists_that_cannot_be_read_and_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--images-file: expected a readable text file"):
        rows(Named(), images_file=tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="--images-file: expected a readable text file"):
        rows(Named(), images_file=tmp_path / "binary")
    with pytest.raises(UsageError, match="--limit: expected at least 1 image, got 0"):
        rows(Named(), limit=0)
