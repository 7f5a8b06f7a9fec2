"""The writer: what passes through, what is encoded anew, the order, and that failures leave nothing behind."""

import fcntl
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.datasets import ImageTree, digits
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.encode import Encoding, encode_sample
from fasttht.pipelines.manifest import read_manifest
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.split_writer import Tally, write_split
from fasttht.pipelines.writer import write_dataset


def picture(height: int, width: int, shift: int = 0) -> Image.Image:
    """A smooth picture, as photographs are: JPEG keeps it closely."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(y + shift) % 256, (x + 2 * shift) % 256, ((x + y) // 2 + shift) % 256]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def encoded(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def file_sample(data: bytes) -> Sample:
    return Sample("file", np.frombuffer(data, np.uint8), 0, 0)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes: JPEGs that pass, and one of each kind that does not."""
    root = tmp_path / "tree"
    plain = encoded(picture(60, 80), "JPEG", quality=90)
    files = {
        "cat/plain.jpg": plain,
        "cat/gray.JPEG": encoded(picture(60, 80, 5).convert("L"), "JPEG"),
        "cat/progressive.jpg": encoded(picture(50, 50, 9), "JPEG", progressive=True),
        "cat/odd.jpg": encoded(picture(33, 17, 3), "JPEG", subsampling=2),
        "dog/really_a_png.JPEG": encoded(picture(40, 30, 1), "PNG"),
        "dog/cmyk.jpg": encoded(picture(40, 30, 2).convert("CMYK"), "JPEG"),
        "dog/large.jpg": encoded(picture(200, 100, 4), "JPEG", quality=95),
        "dog/palette.png": encoded(picture(20, 20).convert("P"), "PNG"),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def stored_by_source(path: Path) -> dict[str, Sample]:
    beton = BetonFile(path)
    return {beton.origin(i): beton.sample(i) for i in range(len(beton))}


# One image -----------------------------------------------------------------------------------------------


def test_a_plain_jpeg_is_stored_byte_for_byte_and_the_rest_encoded_anew(tree: Path, tmp_path: Path) -> None:
    samples, path = ImageTree(tree), tmp_path / "x.beton"
    report = write_split(samples, path, max_resolution=100)
    assert report.counts == {"passthrough": 4, "reencoded": 3, "resized": 1}
    assert (report.num_samples, report.num_bytes) == (8, path.stat().st_size)
    stored = stored_by_source(path)
    assert sorted(stored) == [samples.origin(i) for i in range(8)]
    for name in ("cat/plain.jpg", "cat/gray.JPEG", "cat/progressive.jpg", "cat/odd.jpg"):
        assert stored[name].data.tobytes() == (tree / name).read_bytes()
    for name in ("dog/really_a_png.JPEG", "dog/cmyk.jpg", "dog/palette.png"):
        assert simplejpeg.decode_jpeg_header(stored[name].data)[2:] == ("YCbCr", "444")
        with Image.open(tree / name) as image:
            original = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(decode_rgb(stored[name]) - original).mean() < 3
    assert (stored["dog/large.jpg"].height, stored["dog/large.jpg"].width) == (100, 50)


def test_heights_widths_and_labels_are_those_of_the_pixels(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_split(ImageTree(tree), path, max_resolution=100)
    beton = BetonFile(path)
    heights, widths = beton.sizes(np.arange(len(beton)))
    for i in range(len(beton)):
        assert decode_rgb(beton.sample(i)).shape == (heights[i], widths[i], 3)
        assert beton.class_names[beton.labels[i]] == beton.origin(i).split("/")[0]


@pytest.mark.parametrize(
    ("side", "limit", "expected"),
    [((100, 200), 50, (25, 50)), ((200, 100), 50, (50, 25)), ((3, 1000), 10, (1, 10)), ((50, 50), 50, (50, 50))],
)
def test_shrinking_keeps_the_shape_and_never_enlarges(
    side: tuple[int, int], limit: int, expected: tuple[int, int]
) -> None:
    sample, outcome = encode_sample(
        file_sample(encoded(picture(*side), "PNG")), Encoding(encode="raw", max_resolution=limit)
    )
    assert (sample.height, sample.width) == expected
    assert outcome == ("raw" if side == expected else "resized")


def test_shrinking_averages_areas() -> None:
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8))
    sample, _ = encode_sample(file_sample(encoded(image, "PNG")), Encoding(encode="raw", max_resolution=32))
    assert set(sample.data.tolist()) <= {127, 128}


def test_the_jpeg_encoding_encodes_everything_and_quality_matters(tree: Path) -> None:
    plain = file_sample((tree / "cat/plain.jpg").read_bytes())
    sizes = []
    for quality in (50, 95):
        sample, outcome = encode_sample(plain, Encoding(encode="jpeg", quality=quality))
        assert outcome == "reencoded"
        sizes.append(sample.data.size)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("encode", "mode", "outcome"),
    [("passthrough", "raw", "raw"), ("raw", "raw", "raw"), ("jpeg", "jpg", "reencoded")],
)
def test_raw_pixels_stay_raw_unless_jpeg_is_asked_for(encode: Any, mode: str, outcome: str) -> None:
    sent = digits("val").sample(0)
    stored, found = encode_sample(sent, Encoding(encode=encode))
    assert (stored.mode, found) == (mode, outcome)
    if mode == "raw":
        assert np.array_equal(stored.data, sent.data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data[:-2], id="without its end marker"),
        pytest.param(lambda data: data[:100], id="header only"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"GIF89a???", id="no image"),
        pytest.param(lambda data: data[:2] + bytes(len(data) - 2), id="zeroed"),
    ],
)
def test_a_damaged_image_is_refused_by_name_and_nothing_is_left(damage: Any, tree: Path, tmp_path: Path) -> None:
    file = tree / "cat" / "plain.jpg"
    file.write_bytes(damage(file.read_bytes()))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as refused:
        write_split(ImageTree(tree), tmp_path / "x.beton")
    assert str(refused.value).startswith(f"{file}: expected ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_jpeg_of_unnamed_chroma_sampling_does_not_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """2x1 for one chroma plane and none for the other: legal, but not among libjpeg-turbo's layouts."""
    data = bytearray(encoded(picture(32, 32), "JPEG", subsampling=0))
    frame = data.index(b"\xff\xc0")
    data[frame + 11], data[frame + 14] = 0x22, 0x21
    # The pixels do not matter here, and this decoder may not read them.
    monkeypatch.setattr("fasttht.pipelines.encode.decode_rgb", lambda _: np.zeros((32, 32, 3), np.uint8))
    assert encode_sample(file_sample(bytes(data)), Encoding())[1] == "reencoded"


def test_an_image_too_large_for_the_format_is_refused_with_the_remedy() -> None:
    wide = file_sample(encoded(Image.new("RGB", (70_000, 1)), "PNG"))
    for encode in ("passthrough", "jpeg"):
        with pytest.raises(DataError, match="at most 65535 pixels a side, got 1x70000; write with a maximum"):
            encode_sample(wide, Encoding(encode=encode))  # type: ignore[arg-type]
    assert encode_sample(wide, Encoding(max_resolution=500))[0].width == 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": "png"}, "encode: expected one of"),
        ({"max_resolution": 0}, "max_resolution: expected at least 1"),
        ({"quality": 0}, "quality: expected 1 to 100, got 0"),
        ({"quality": 101}, "quality: expected 1 to 100, got 101"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_split(digits("val"), tmp_path / "x.beton", **options)
    with pytest.raises(ValueError, match=message):
        write_dataset("digits", None, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


# One split -----------------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_bytes_and_another_seed_another_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.beton" for i in range(3)]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        write_split(digits("val"), path, seed=seed)
    contents = [path.read_bytes() for path in paths]
    manifests = [path.with_name(path.name + ".json").read_bytes() for path in paths]
    assert contents[0] == contents[1]
    assert manifests[0] == manifests[1]
    assert contents[0] != contents[2]
    orders = [[BetonFile(path).origin(i) for i in range(20)] for path in paths[1:]]
    assert orders[0] != orders[1]


def test_rows_are_shuffled_or_in_source_order(tmp_path: Path) -> None:
    samples = digits("train")
    write_split(samples, tmp_path / "shuffled.beton")
    write_split(samples, tmp_path / "plain.beton", shuffle=False)
    shuffled, plain = BetonFile(tmp_path / "shuffled.beton"), BetonFile(tmp_path / "plain.beton")
    assert plain.labels.tolist() == samples.labels.tolist()
    assert shuffled.labels.tolist() != samples.labels.tolist()
    assert Counter(shuffled.labels.tolist()) == Counter(samples.labels.tolist())
    for i in (0, 700, 1436):
        assert np.array_equal(plain.sample(i).data, samples.sample(i).data)


def test_the_manifest_says_how_and_from_what_the_file_was_made(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_split(ImageTree(tree), path, max_resolution=64, quality=80, seed=5)
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.class_names == ("cat", "dog")
    assert manifest.num_samples == len(manifest.sources) == 8
    expected = {"encode": "passthrough", "max_resolution": 64, "quality": 80, "seed": 5, "shuffle": True}
    assert manifest.settings == expected
    assert str(tmp_path) not in path.with_name("x.beton.json").read_text()


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_split(digits("val"), tmp_path / "x.beton", progress=lambda tally: calls.append((tally.done, tally.total)))
    assert calls == [(done, 360) for done in range(1, 361)]


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_split(digits("val"), path, seed=1)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"x\.beton: expected no such file, got one"):
        write_split(digits("val"), path, seed=2)
    assert path.read_bytes() == before
    write_split(digits("val"), path, seed=2, force=True)
    assert path.read_bytes() != before
    assert BetonFile(path).class_names == tuple("0123456789")


def test_a_failed_forced_write_keeps_the_older_file(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_split(digits("val"), path)
    before = {file: file.read_bytes() for file in tmp_path.glob("x.*")}
    (tree / "cat" / "plain.jpg").write_bytes(b"")
    with pytest.raises(DataError):
        write_split(ImageTree(tree), path, force=True)
    assert {file: file.read_bytes() for file in tmp_path.glob("x.*")} == before


def test_a_file_whose_manifest_cannot_be_written_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fasttht.pipelines.split_writer.write_manifest", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_split(digits("val"), tmp_path / "x.beton")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.beton: expected an existing folder"):
        write_split(digits("val"), tmp_path / "missing" / "x.beton")


# A whole data set ----------------------------------------------------------------------------------------


def test_the_digits_become_two_files_with_exact_pixels(tmp_path: Path) -> None:
    calls: Counter[tuple[str, int]] = Counter()
    reports = write_dataset(
        "digits", None, tmp_path / "new" / "out", progress=lambda split, tally: calls.update([(split, tally.total)])
    )
    assert calls == {("train", 1437): 1437, ("val", 360): 360}
    assert {split: report.counts for split, report in reports.items()} == {"train": {"raw": 1437}, "val": {"raw": 360}}
    names = ["train.beton", "train.beton.json", "val.beton", "val.beton.json"]
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == names
    source, beton = digits("val"), BetonFile(tmp_path / "new" / "out" / "val.beton")
    row_of = {source.origin(i): i for i in range(360)}
    for i in range(360):
        row = row_of[beton.origin(i)]
        assert beton.labels[i] == source.labels[row]
        assert np.array_equal(beton.sample(i).data, source.sample(row).data)


def make_imagenet(root: Path) -> Path:
    for split, num in (("train", 3), ("val", 1)):
        for wnid in ("n01440764", "n01443537"):
            for row in range(num):
                file = root / split / wnid / f"{wnid}_{row}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded(picture(375, 500 + 20 * (row == 2)), "JPEG"))
    return root


def test_imagenet_keeps_at_most_500_pixels_a_side_unless_told(tmp_path: Path) -> None:
    source = make_imagenet(tmp_path / "imagenet")
    reports = write_dataset("imagenet", source, tmp_path / "a")
    assert reports["train"].counts == {"passthrough": 4, "resized": 2}
    reports = write_dataset("imagenet", source, tmp_path / "b", max_resolution=None)
    assert reports["train"].counts == {"passthrough": 6}
    settings = json.loads((tmp_path / "a" / "train.beton.json").read_text())["settings"]
    assert (settings["kind"], settings["split"], settings["max_resolution"]) == ("imagenet", "train", 500)
    assert BetonFile(tmp_path / "a" / "val.beton").class_names == ("n01440764", "n01443537")


def test_a_folder_without_splits_gives_both_files(tree: Path, tmp_path: Path) -> None:
    reports = write_dataset("folder", tree, tmp_path / "out", val_fraction=0.25)
    assert {split: report.num_samples for split, report in reports.items()} == {"train": 6, "val": 2}
    stored = [stored_by_source(tmp_path / "out" / f"{split}.beton") for split in ("train", "val")]
    assert len(stored[0] | stored[1]) == 8


@pytest.mark.parametrize("made_before", [True, False])
def test_a_failure_in_the_second_split_shows_no_first_one(made_before: bool, tmp_path: Path) -> None:
    source, output = make_imagenet(tmp_path / "imagenet"), tmp_path / "out"
    bad = source / "val" / "n01443537" / "n01443537_0.JPEG"
    bad.write_bytes(bad.read_bytes()[:-500])
    if made_before:
        output.mkdir()
    with pytest.raises(DataError, match="n01443537_0"):
        write_dataset("imagenet", source, output)
    assert list(output.glob("*.beton*")) == []
    with pytest.raises(DataError, match="expected no unfinished write, got one; add --resume, or --force"):
        write_dataset("imagenet", source, output)
    reports = write_dataset("imagenet", source, output, resume=True, on_error="skip")
    assert (reports["train"].num_samples, reports["val"].num_samples) == (6, 1)
    assert len(list(output.iterdir())) == 4


def interrupted(at_split: str, at: int) -> Any:
    def interrupt(split: str, tally: Tally) -> None:
        if (split, tally.done) == (at_split, at):
            raise KeyboardInterrupt

    return interrupt


def test_a_write_interrupted_before_the_first_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset("digits", None, tmp_path / "out", progress=interrupted("train", 511))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_data_set_is_kept_unless_forced(tmp_path: Path) -> None:
    write_dataset("digits", None, tmp_path, seed=1)
    before = (tmp_path / "val.beton").read_bytes()
    (tmp_path / "train.beton").unlink()
    (tmp_path / "train.beton.json").unlink()
    with pytest.raises(DataError, match=r"val\.beton: expected no such file"):
        write_dataset("digits", None, tmp_path, seed=2)
    assert (tmp_path / "val.beton").read_bytes() == before
    write_dataset("digits", None, tmp_path, seed=2, force=True)
    assert BetonFile(tmp_path / "val.beton").labels.size == 360
    assert (tmp_path / "val.beton").read_bytes() != before


def test_what_killed_runs_left_is_cleared_away_but_not_what_others_are_writing(tmp_path: Path) -> None:
    for name in ("killed", "held"):
        (tmp_path / f".fasttht-partial-{name}-1").mkdir()
        (tmp_path / f".fasttht-partial-{name}-1" / "train.beton.partial").write_bytes(b"half")
    held = os.open(tmp_path / ".fasttht-partial-held-1" / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    write_dataset("digits", None, tmp_path)
    assert [file.name for file in tmp_path.glob(".*")] == [".fasttht-partial-held-1"]
    with pytest.raises(DataError, match="got one that another process is at"):
        write_dataset("digits", None, tmp_path, resume=True, seed=1, force=True)
    os.close(held)


def test_processes_that_start_together_may_write_the_same_data_set(tmp_path: Path) -> None:
    write = f"write_dataset('digits', None, {str(tmp_path / 'out')!r}, force=True)"
    code = f"from fasttht.pipelines.writer import write_dataset; {write}"
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(list((tmp_path / "out").iterdir())) == 4
    for split, num in (("train", 1437), ("val", 360)):
        beton = BetonFile(tmp_path / "out" / f"{split}.beton")
        assert (len(beton), len(beton.class_names)) == (num, 10)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="out: expected a folder to write to, got Not a directory"):
        write_dataset("digits", None, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("cifar", "x", "kind: expected one of"),
        ("digits", "x", "source: expected a folder, or None for the embedded digits, got x"),
        ("folder", None, "source: expected a folder, or None for the embedded digits, got None for 'folder'"),
    ],
)
def test_a_kind_without_its_source_is_refused(kind: Any, source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(kind, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
