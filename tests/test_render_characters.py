"""The rendered characters: classes that can be told apart, held-out fonts of other families, the same files again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttht.pipelines.splits import open_splits

TOOL = Path(__file__).parent.parent / "tools" / "render_characters.py"


def render(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    few = ("--classes", "9", "--train-images", "5", "--val-images", "3")
    command = [sys.executable, TOOL, "--output", output, *few, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.png")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("characters") / "tree"
    done = render(root)
    if done.returncode and "expected fonts of two families" in done.stderr:
        pytest.skip("needs fonts of two families; on Debian: apt-get install fonts-dejavu")
    assert done.returncode == 0, done.stderr
    assert "9 characters" in done.stdout
    return root


def test_it_is_a_data_set_of_as_many_classes_as_asked_for(tree: Path) -> None:
    splits = open_splits(tree)
    assert splits.num_classes == 9
    assert (len(splits.train), len(splits.val)) == (45, 27)
    assert set(np.bincount(splits.train.labels)) == {5}


def test_no_font_is_in_both_splits(tree: Path) -> None:
    fonts = {
        split: {path.stem.split("-", 1)[1] for path in (tree / split).rglob("*.png")} for split in ("train", "val")
    }
    assert fonts["train"]
    assert fonts["val"]
    assert not fonts["train"] & fonts["val"]


def test_the_same_words_give_the_same_files_and_another_seed_others(tree: Path, tmp_path: Path) -> None:
    render(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(tree)
    render(tmp_path / "other", "--seed", "1")
    assert not set(digest(tmp_path / "other").values()) & set(digest(tree).values())


def test_images_have_the_size_and_show_something(tree: Path) -> None:
    for path in tree.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (16, 16)
            assert np.asarray(image).std() > 5, path


def test_a_folder_with_files_is_left_alone(tree: Path) -> None:
    done = render(tree)
    assert done.returncode == 1
    assert "expected a new or an empty folder" in done.stderr
