"""Where samples come from: trees of folders, ImageNet's layouts, the embedded digits, and what is refused."""

import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.datasets import (
    DigitsSamples,
    ImageTree,
    Subset,
    digits,
    folder_splits,
    imagenet_splits,
)
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.splits import open_splits

WNIDS = ["n01440764", "n01443537", "n02102040"]


def save(path: Path, height: int = 12, width: int = 16, value: int = 0, **options: Any) -> None:
    """Save a picture of one colour, in the format that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path, **options)


def make_tree(root: Path, classes: list[str], num: int = 3) -> Path:
    for name in classes:
        for row in range(num):
            save(root / name / f"{name}_{row}.JPEG", format="JPEG")
    return root


# Trees ---------------------------------------------------------------------------------------------------


def test_a_tree_is_read_in_sorted_order_whatever_the_format(tmp_path: Path) -> None:
    names = ["dog/b.PNG", "dog/a.jpg", "cat/z.webp", "cat/deep/er/y.BMP", "cat/x.tiff", "ant/v.ppm", "ant/u.JPEG"]
    for row, name in enumerate(names):
        save(tmp_path / name, height=10 + row, width=20 + row)
    for ignored in ("dog/notes.txt", "dog/.hidden.png", ".cache/c.png", "readme.md", "preview.png"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_bytes(b"")
    tree = ImageTree(tmp_path)
    assert tree.class_names == ("ant", "cat", "dog")
    assert [tree.origin(i) for i in range(len(tree))] == sorted(names)
    assert tree.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert tree.labels.dtype == np.int64
    heights, widths = tree.sizes(np.arange(7))
    assert heights.tolist() == [10 + names.index(name) for name in sorted(names)]
    assert widths.tolist() == [20 + names.index(name) for name in sorted(names)]
    for i in range(7):
        sample = tree.sample(i)
        assert (sample.mode, sample.height, sample.width) == ("file", 0, 0)
        assert decode_rgb(sample).shape == (heights[i], widths[i], 3)
        assert not sample.data.flags.writeable
        assert tree.where(i) == str(tmp_path / tree.origin(i))


def test_a_header_behind_a_large_colour_profile_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.jpg", height=33, width=44, icc_profile=bytes(200_000))
    save(tmp_path / "b" / "x.tif", height=300, width=400)
    heights, widths = ImageTree(tmp_path).sizes(np.array([0, 1]))
    assert (heights.tolist(), widths.tolist()) == ([33, 300], [44, 400])


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make_tree(tmp_path / "store", ["a", "b"], num=1)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "b"):
        (tree / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "a" / "again").symlink_to(tmp_path / "store" / "a")
    assert [ImageTree(tree).origin(i) for i in range(2)] == ["a/a_0.JPEG", "b/b_0.JPEG"]


def test_a_fingerprint_follows_the_data_not_the_place(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", ["a", "b"])
    before = ImageTree(one).fingerprint
    moved = shutil.copytree(one, tmp_path / "two")
    assert ImageTree(moved).fingerprint == before
    os.rename(moved / "a" / "a_0.JPEG", moved / "a" / "a_9.JPEG")
    assert ImageTree(moved).fingerprint != before
    save(one / "a" / "a_0.JPEG", height=50, format="JPEG")
    assert ImageTree(one).fingerprint != before


def empty_folder(root: Path) -> None:
    root.mkdir()


def a_file(root: Path) -> None:
    root.write_bytes(b"")


def flat_folder(root: Path) -> None:
    for row in range(3):
        save(root / f"{row}.png")


def no_image(root: Path) -> None:
    (root / "cat").mkdir(parents=True)
    (root / "dog").mkdir()
    (root / "dog" / "dog.txt").write_text("woof")


def one_class(root: Path) -> None:
    make_tree(root, ["cat"])


def empty_classes(root: Path) -> None:
    make_tree(root, ["cat", "dog"])
    for name in ("eel", "fox", "gnu", "hen"):
        (root / name).mkdir()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "expected something readable, got No such file or directory; check the path"),
        (a_file, "expected something readable, got Not a directory; check the path"),
        (empty_folder, "expected one folder per class, got 0 files and no folder; "),
        (flat_folder, "expected one folder per class, got 3 files and no folder; sort the images into class"),
        (no_image, "expected images (.bmp .jpeg .jpg .png .ppm .tif .tiff .webp), got none; check"),
        (one_class, "expected at least two class folders with images, got only 'cat'; point at"),
        (empty_classes, "got none in 'eel', 'fox', 'gnu' and 1 more; remove the empty folders"),
    ],
)
def test_a_folder_that_is_no_tree_is_refused(build: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    build(root)
    with pytest.raises(DataError) as refused:
        ImageTree(root)
    assert str(refused.value).startswith(f"{root}: expected ")
    assert message in str(refused.value)


def test_a_file_that_is_no_image_or_gone_is_named(tmp_path: Path) -> None:
    tree = ImageTree(make_tree(tmp_path, ["a", "b"]))
    (tmp_path / "a" / "a_1.JPEG").write_bytes(b"<html>not found</html>")
    (tmp_path / "b" / "b_0.JPEG").unlink()
    with pytest.raises(DataError, match=r"a_1\.JPEG: expected an image"):
        tree.sizes(np.array([0, 1]))
    for read in (tree.sample, lambda i: tree.sizes(np.array([i]))):
        with pytest.raises(DataError, match=r"b_0\.JPEG: expected something readable, got No such file"):
            read(3)
    with pytest.raises(DataError, match=r"b_0\.JPEG"):
        _ = tree.fingerprint


# Splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_is_found_in_both_layouts_with_sorted_wnids(below: str, tmp_path: Path) -> None:
    make_tree(tmp_path / below / "train", WNIDS[::-1], num=2)
    make_tree(tmp_path / below / "val", WNIDS, num=1)
    splits = imagenet_splits(tmp_path)
    assert {name: len(tree) for name, tree in splits.items()} == {"train": 6, "val": 3}
    assert splits["train"].class_names == splits["val"].class_names == tuple(WNIDS)


def test_imagenet_without_its_folders_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "train", WNIDS)
    with pytest.raises(DataError, match="expected train/ and val/, here or in ILSVRC/Data/CLS-LOC"):
        imagenet_splits(tmp_path)


def test_a_flat_imagenet_val_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make_tree(tmp_path / "train", WNIDS)
    flat_folder(tmp_path / "val")
    with pytest.raises(DataError, match=r"val: expected wnid folders, got 3 files.*sort the validation images"):
        imagenet_splits(tmp_path)


def test_a_folder_that_is_no_wnid_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "train", [*WNIDS, "cat"])
    make_tree(tmp_path / "val", WNIDS)
    with pytest.raises(DataError, match=r"train: expected only wnid folders .* got 'cat'"):
        imagenet_splits(tmp_path)


@pytest.mark.parametrize(
    ("in_train", "in_val", "lacking", "missing"),
    [(WNIDS, WNIDS[::2], "val", WNIDS[1]), (WNIDS[1:], WNIDS, "train", WNIDS[0])],
)
def test_different_classes_in_the_splits_are_refused_by_name(
    in_train: list[str], in_val: list[str], lacking: str, missing: str, tmp_path: Path
) -> None:
    make_tree(tmp_path / "train", in_train)
    make_tree(tmp_path / "val", in_val)
    for opened in (imagenet_splits, folder_splits):
        with pytest.raises(DataError, match=rf"{lacking}: expected the same .* got no '{missing}' here \(1 differ"):
            opened(tmp_path)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_folder_with_splits_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    make_tree(tmp_path / "train", ["a", "b"], num=3)
    make_tree(tmp_path / name, ["a", "b"], num=1)
    splits = folder_splits(tmp_path)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 6, "val": 2}
    assert splits["val"].path == tmp_path / name


@pytest.mark.parametrize("below", [".", "train"])
def test_without_a_val_folder_every_class_gives_its_share(below: str, tmp_path: Path) -> None:
    root = make_tree(tmp_path / below, ["a"], num=20)
    make_tree(root, ["b"], num=2)
    splits = folder_splits(tmp_path, val_fraction=0.2)
    assert np.bincount(splits["train"].labels).tolist() == [16, 1]
    assert np.bincount(splits["val"].labels).tolist() == [4, 1]
    assert origins(splits["train"]) | origins(splits["val"]) == origins(ImageTree(root))
    assert not origins(splits["train"]) & origins(splits["val"])
    assert origins(folder_splits(tmp_path, val_fraction=0.2)["val"]) == origins(splits["val"])
    assert origins(folder_splits(tmp_path, val_fraction=0.2, seed=1)["val"]) != origins(splits["val"])


def test_a_held_out_share_never_empties_a_class(tmp_path: Path) -> None:
    splits = folder_splits(make_tree(tmp_path, ["a", "b"], num=2), val_fraction=0.99)
    assert np.bincount(splits["train"].labels).tolist() == [1, 1]


def origins(samples: Samples) -> set[str]:
    return {samples.origin(i) for i in range(len(samples))}


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    make_tree(tmp_path, ["bus", "train"])
    assert folder_splits(tmp_path)["train"].class_names == ("bus", "train")


def test_a_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    make_tree(tmp_path, ["a"], num=5)
    make_tree(tmp_path, ["b"], num=1)
    with pytest.raises(DataError, match="b: expected at least two images, to hold one out, got 1"):
        folder_splits(tmp_path)


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_a_val_fraction_outside_0_to_1_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"val_fraction: expected .* got {fraction}"):
        folder_splits(tmp_path, val_fraction=fraction)


def test_a_subset_is_those_rows_in_that_order(tmp_path: Path) -> None:
    tree = ImageTree(make_tree(tmp_path, ["a", "b"]))
    rows = np.array([5, 0, 3])
    subset = Subset(tree, rows)
    rows[:] = 0
    assert subset.labels.tolist() == [1, 0, 1]
    assert [subset.origin(i) for i in range(3)] == ["b/b_2.JPEG", "a/a_0.JPEG", "b/b_0.JPEG"]
    assert subset.where(0) == tree.where(5)
    assert np.array_equal(subset.sample(2).data, tree.sample(3).data)
    assert np.array_equal(subset.sizes(np.array([1])), tree.sizes(np.array([0])))
    assert len({subset.fingerprint, tree.fingerprint, Subset(tree, np.array([0, 5, 3])).fingerprint}) == 3


# Digits --------------------------------------------------------------------------------------------------


def source_rows(samples: DigitsSamples) -> list[int]:
    return [int(samples.origin(i)) for i in range(len(samples))]


def test_the_digits_are_split_into_1437_and_360_without_overlap() -> None:
    train, val = digits("train"), digits("val")
    assert (len(train), len(val)) == (1437, 360)
    assert sorted(source_rows(train) + source_rows(val)) == list(range(1797))


def test_the_held_out_digits_are_a_fifth_of_every_class() -> None:
    held_out = np.bincount(digits("val").labels, minlength=10)
    everything = held_out + np.bincount(digits("train").labels, minlength=10)
    assert np.abs(held_out - everything * 360 / 1797).max() < 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_digits_are_those_of_scikit_learn(split: Any) -> None:
    samples, source = digits(split), load_digits()
    rows = source_rows(samples)
    assert np.array_equal(samples.labels, source.target[rows])
    for i, row in enumerate(rows):
        pixels = decode_rgb(samples.sample(i))
        assert pixels.shape == (8, 8, 3)
        assert np.array_equal(pixels, np.repeat(np.round(source.images[row] * 255 / 16)[..., None], 3, axis=2))


def test_the_digits_behave_as_samples() -> None:
    samples = digits("val")
    assert samples.class_names == tuple("0123456789")
    assert [size.tolist() for size in samples.sizes(np.array([3, 1]))] == [[8, 8], [8, 8]]
    assert samples.sample(0).mode == "raw"
    assert not samples.sample(0).data.flags.writeable
    assert samples.where(2) == f"embedded digits-val, row 2 (image {samples.origin(2)} of the source)"
    assert samples.fingerprint != digits("train").fingerprint
    assert samples.fingerprint == digits("val").fingerprint


def test_another_split_of_the_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="expected split 'train' or 'val', got 'test'"):
        digits("test")  # type: ignore[arg-type]


def test_the_packaged_digits_are_small_name_their_authors_and_hold_no_pickle() -> None:
    file = resources.files("fasttht.pipelines").joinpath("digits.npz")
    assert len(file.read_bytes()) < 100_000
    with file.open("rb") as opened:
        stored = np.load(opened, allow_pickle=False)
        assert sorted(stored.files) == ["attribution", "images", "labels", "order"]
        assert (stored["images"].shape, stored["images"].dtype) == ((1797, 8, 8), np.uint8)
        assert (stored["images"].min(), stored["images"].max()) == (0, 16)
        assert stored["order"].dtype == np.uint16
    attribution = digits("train").attribution
    for words in ("Optical Recognition of Handwritten Digits", "E. Alpaydin", "C. Kaynak", "UCI", "1998", "CC BY 4.0"):
        assert words in attribution


def test_no_reader_of_the_digits_cache_ever_meets_a_file_without_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that start together share the cache: one may open what another has just moved in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, rename, moved = tmp_path / "fasttht" / "digits-v1", os.replace, list[str]()

    def noting_rename(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).parent == folder:
            moved.append(Path(target).name)
            assert all(Path(f"{beton}.json").exists() for beton in folder.glob("*.beton")), moved

    monkeypatch.setattr(os, "replace", noting_rename)
    splits = open_splits(None)
    assert len(moved) == 4
    assert all(isinstance(split, BetonFile) and split.verified for split in (splits.train, splits.val))
