"""Long writes: any number of workers, kills and resumes give the same bytes; bad images are left out and listed."""

import base64
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasttht.pipelines import DataError, ResourceError, split_writer
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.datasets import ImageTree, digits
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.encode import Encoding, encode_sample, find_remarks
from fasttht.pipelines.estimate import check_space, estimate_split
from fasttht.pipelines.journal import journal_path, read_journal
from fasttht.pipelines.manifest import manifest_path, read_manifest
from fasttht.pipelines.ordered import map_ordered
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.split_writer import Tally, write_split
from fasttht.pipelines.writer import plan_dataset, write_dataset


def encoded(image: Image.Image, fmt: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def picture(row: int, side: int = 24) -> Image.Image:
    y, x = np.mgrid[0:side, 0 : side + row % 7]
    return Image.fromarray(np.stack([y * 5 + row, x * 3, x + y + 2 * row], axis=2).astype(np.uint8))


BAD = ("cat/003.jpg", "dog/007.jpg", "dog/011.jpg")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of 30 images, three of them damaged, some to be encoded anew."""
    for row in range(60):
        file = tmp_path / "tree" / ("cat" if row < 30 else "dog") / f"{row % 30:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(row), "PNG" if row % 10 == 5 else "JPEG"))
    for name, length in zip(BAD, (300, 3, 0), strict=True):  # each is refused in other words
        file = tmp_path / "tree" / name
        file.write_bytes(file.read_bytes()[:length])
    return tmp_path / "tree"


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_writer, "COMMIT_ROWS", 8)


def both_files(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), manifest_path(path).read_bytes()


def stop_at(done: int, error: BaseException) -> Any:
    def stop(tally: Tally) -> None:
        if tally.done == done:
            raise error

    return stop


# Workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", ["passthrough", "jpeg", "raw"])
def test_the_number_of_workers_does_not_change_a_byte(encode: Any, tree: Path, tmp_path: Path) -> None:
    written = []
    for workers in (1, 4, 0):
        path = tmp_path / f"{workers}.beton"
        write_split(ImageTree(tree), path, encode=encode, max_resolution=26, workers=workers, on_error="skip")
        written.append(both_files(path))
    assert written[0] == written[1] == written[2]


def test_work_is_spread_over_threads_in_order_and_within_a_window() -> None:
    barrier, started = threading.Barrier(4, timeout=20), []

    def work(item: int) -> int:
        started.append(item)
        if item < 4:
            barrier.wait()  # passes only where four are at it together
        return item * item

    results = map_ordered(work, range(1000), 4)
    assert next(results) == 0
    assert len(started) <= 16 + 1
    assert list(results) == [i * i for i in range(1, 1000)]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_failure_in_order_is_the_one_that_is_raised(workers: int) -> None:
    def work(item: int) -> int:
        if item in (5, 6):
            raise DataError(f"item {item}")
        return item

    results = map_ordered(work, range(100), workers)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="item 5"):
        next(results)
    assert not [thread for thread in threading.enumerate() if "fasttht-write" in thread.name]


def test_an_impossible_number_of_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"workers: expected 0 .* got -1"):
        write_split(digits("val"), tmp_path / "x.beton", workers=-1)


# Kills and resumes ---------------------------------------------------------------------------------------


def test_a_writer_killed_anywhere_resumes_to_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    script = Path(__file__).with_name("kill_writer.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tree), str(tmp_path / "work")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20


def test_the_disk_has_each_step_of_the_publication_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a .beton without its manifest, or neither the old files nor the staged ones."""
    out, events = tmp_path / "out", list[str]()
    fsync, rename, remove = os.fsync, os.replace, shutil.rmtree

    def note(what: str, path: Any) -> None:
        events.append(f"{what} {re.sub('.fasttht-partial-[^/]*', 'staging', str(Path(path).relative_to(tmp_path)))}")

    def noting_fsync(descriptor: int) -> None:
        note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noting_rename(source: Any, target: Any) -> None:
        note("rename", target)
        rename(source, target)

    def noting_remove(folder: Any, **options: Any) -> None:
        note("remove", folder)
        remove(folder, **options)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_rename)
    monkeypatch.setattr(shutil, "rmtree", noting_remove)
    write_dataset("digits", None, out)
    expected = ["sync out/staging/val.beton.partial", "sync out/staging/val.beton.json.partial",
                "rename out/staging/val.beton.json", "sync out/staging",
                "rename out/staging/val.beton", "sync out/staging"]  # fmt: skip
    for split in ("train", "val"):
        expected += ["sync out/staging/manifest", f"rename out/{split}.beton.json", "sync out",
                     f"rename out/{split}.beton", "sync out", "sync out/staging"]  # fmt: skip
    assert events[-len(expected) - 1 :] == [*expected, "remove out/staging"]
    assert events[:2] == ["sync out", "sync ."]  # the new folders' names


@pytest.mark.usefixtures("small_commits")
def test_a_new_journal_is_on_the_disk_under_its_name(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, fsync = list[str](), os.fsync

    def noting_fsync(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    write_split(ImageTree(tree), tmp_path / "a.beton", on_error="skip")
    first = names.index("a.beton.journal")
    assert names[first - 1 : first + 2] == ["a.beton.partial", "a.beton.journal", tmp_path.name]
    assert names.count("a.beton.journal") > 1


@pytest.mark.usefixtures("small_commits")
def test_resuming_does_not_do_again_what_was_done(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, samples = tmp_path / "x.beton", ImageTree(tree)
    with pytest.raises(KeyboardInterrupt):
        write_split(samples, path, on_error="skip", progress=stop_at(43, KeyboardInterrupt()))
    assert sorted(file.name for file in tmp_path.glob("x.*")) == ["x.beton.journal", "x.beton.partial"]
    read: list[int] = []
    original = ImageTree.sample
    monkeypatch.setattr(ImageTree, "sample", lambda self, i: read.append(i) or original(self, i))
    tallies: list[tuple[int, int]] = []
    report = write_split(
        samples, path, on_error="skip", resume=True, progress=lambda tally: tallies.append((tally.resumed, tally.done))
    )
    assert len(read) == 60 - 40
    assert tallies[0] == (40, 41)
    assert sorted(file.name for file in tmp_path.glob("x.*")) == ["x.beton", "x.beton.json"]
    assert report == write_split(samples, tmp_path / "y.beton", on_error="skip")
    assert both_files(path) == both_files(tmp_path / "y.beton")
    assert write_split(samples, path, on_error="skip", resume=True) == report  # finished: left alone


@pytest.mark.usefixtures("small_commits")
def test_a_journal_cut_or_damaged_anywhere_costs_work_but_no_byte(tree: Path, tmp_path: Path) -> None:
    path, samples = tmp_path / "x.beton", ImageTree(tree)
    write_split(samples, tmp_path / "whole.beton", on_error="skip")
    with pytest.raises(KeyboardInterrupt):
        write_split(samples, path, on_error="skip", progress=stop_at(41, KeyboardInterrupt()))
    journal, partial = journal_path(path).read_bytes(), path.with_name("x.beton.partial").read_bytes()
    identity = json.loads(journal.splitlines()[0].partition(b" ")[2])["settings"]
    rng = np.random.default_rng(0)
    for cut in [0, 1, *rng.integers(0, len(journal), 10).tolist(), len(journal) - 1]:
        for damaged in (journal[:cut], journal[:cut] + bytes([journal[cut] ^ 0x10]) + journal[cut + 1 :]):
            journal_path(path).write_bytes(damaged)
            path.with_name("x.beton.partial").write_bytes(partial + b"\xff" * 100_000)
            if cut % 2:  # a journal that is gone on with must stay readable
                with pytest.raises(KeyboardInterrupt):
                    write_split(samples, path, on_error="skip", resume=True, progress=stop_at(56, KeyboardInterrupt()))
                assert len(read_journal(journal_path(path), identity)[0]) == 56
            write_split(samples, path, on_error="skip", resume=True)
            assert both_files(path) == both_files(tmp_path / "whole.beton")
            path.unlink()


@pytest.mark.usefixtures("small_commits")
def test_an_unfinished_write_is_reported_and_goes_by_force(tree: Path, tmp_path: Path) -> None:
    path, samples = tmp_path / "x.beton", ImageTree(tree)
    with pytest.raises(DataError, match=r"got input stopping.* 24 of 60 images are kept, resume to go on"):
        write_split(
            samples, path, on_error="skip", progress=stop_at(30, DataError("expected peace, got input stopping"))
        )
    with pytest.raises(DataError, match=r"x\.beton: expected no unfinished write, got one; add --resume, or --force"):
        write_split(samples, path, on_error="skip")
    write_split(samples, path, on_error="skip", force=True)
    write_split(samples, tmp_path / "y.beton", on_error="skip")
    assert both_files(path) == both_files(tmp_path / "y.beton")
    assert not journal_path(path).exists()


@pytest.mark.usefixtures("small_commits")
def test_resuming_with_other_settings_or_images_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    with pytest.raises(KeyboardInterrupt):
        write_split(ImageTree(tree), path, on_error="skip", progress=stop_at(30, KeyboardInterrupt()))
    kept = {file: file.read_bytes() for file in tmp_path.glob("x.*")}
    with pytest.raises(DataError, match=r"journal: expected .* \(quality 95, seed 0\), got quality 90, seed 3; resume"):
        write_split(ImageTree(tree), path, on_error="skip", resume=True, quality=90, seed=3)
    (tree / "cat" / "000.jpg").write_bytes(b"another size")
    with pytest.raises(DataError, match=r"journal: expected .* \(images [0-9a-f]{16}\), got images"):
        write_split(ImageTree(tree), path, on_error="skip", resume=True)
    assert {file: file.read_bytes() for file in tmp_path.glob("x.*")} == kept


@pytest.mark.usefixtures("small_commits")
@pytest.mark.parametrize("damage", ["removed", "cut", "zeroed"])
def test_resuming_on_other_bytes_than_the_journal_lists_is_refused(damage: str, tree: Path, tmp_path: Path) -> None:
    path, samples = tmp_path / "x.beton", ImageTree(tree)
    with pytest.raises(KeyboardInterrupt):
        write_split(samples, path, on_error="skip", progress=stop_at(30, KeyboardInterrupt()))
    partial = path.with_name("x.beton.partial")
    content = partial.read_bytes()
    if damage == "removed":
        partial.unlink()
    else:
        partial.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    with pytest.raises(DataError, match=r"partial: expected the .* that its journal lists.*force") as refused:
        write_split(samples, path, on_error="skip", resume=True)
    assert "resume" not in str(refused.value)


@pytest.mark.usefixtures("small_commits")
def test_a_write_that_aborted_on_a_bad_image_may_go_on_without_it(tree: Path, tmp_path: Path) -> None:
    path, samples = tmp_path / "x.beton", ImageTree(tree)
    last = write_split(samples, tmp_path / "y.beton", on_error="skip").skipped[-1][0]
    for name in BAD:
        if name != last:
            (tree / name).write_bytes(encoded(picture(1)))
    samples = ImageTree(tree)
    with pytest.raises(DataError, match=rf"{last}: expected .*images are kept, resume to go on"):
        write_split(samples, path)
    report = write_split(samples, path, resume=True, on_error="skip")
    assert [name for name, _ in report.skipped] == [last]
    write_split(samples, tmp_path / "z.beton", on_error="skip")
    assert both_files(path) == both_files(tmp_path / "z.beton")


def test_a_full_disk_is_a_resource_error_and_keeps_what_is_noted(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_writer, "COMMIT_ROWS", 8)
    path, samples = tmp_path / "x.beton", ImageTree(tree)
    full = stop_at(30, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ResourceError, match="expected room on the disk, got a full one; 24 of 60 images are kept"):
        write_split(samples, path, on_error="skip", progress=full)
    write_split(samples, path, on_error="skip", resume=True)
    assert len(BetonFile(path)) == 57


def test_a_data_set_resumes_under_force_and_refuses_other_settings(tmp_path: Path) -> None:
    def stop(split: str, tally: Tally) -> None:
        if (split, tally.done) == ("val", 100):
            raise KeyboardInterrupt

    write_dataset("digits", None, tmp_path / "whole", seed=1)
    write_dataset("digits", None, tmp_path / "out", seed=2)
    with pytest.raises(KeyboardInterrupt):
        write_dataset("digits", None, tmp_path / "out", seed=1, force=True, progress=stop)
    with pytest.raises(DataError, match=r"expected the settings and images .*seed 2.*, got seed 1"):
        write_dataset("digits", None, tmp_path / "out", seed=1, resume=True)
    with pytest.raises(DataError, match=r"expected the settings and images .*seed 1.*, got seed 3"):
        write_dataset("digits", None, tmp_path / "out", seed=3, force=True, resume=True)
    seen: list[str] = []
    write_dataset(
        "digits", None, tmp_path / "out", seed=1, force=True, resume=True, progress=lambda split, _: seen.append(split)
    )
    assert set(seen) == {"val"}  # train was whole
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Images that cannot be stored ----------------------------------------------------------------------------


def test_bad_images_are_skipped_listed_and_change_nothing_else(tree: Path, tmp_path: Path) -> None:
    report = write_split(ImageTree(tree), tmp_path / "x.beton", on_error="skip", seed=4)
    assert {name for name, _ in report.skipped} == set(BAD)
    assert all(reason.startswith("expected ") and str(tree) not in reason for _, reason in report.skipped)
    assert (report.num_samples, sum(report.counts.values())) == (57, 57)
    manifest = read_manifest(tmp_path / "x.beton")
    assert manifest is not None
    assert manifest.skipped == report.skipped
    for name in BAD:
        (tree / name).write_bytes(encoded(picture(1)))
    write_split(ImageTree(tree), tmp_path / "y.beton", seed=4)
    whole = read_manifest(tmp_path / "y.beton")
    assert whole is not None
    assert manifest.sources == tuple(name for name in whole.sources if name not in BAD)
    beton = BetonFile(tmp_path / "x.beton")
    for row, name in enumerate(manifest.sources):
        assert beton.class_names[beton.labels[row]] == name.split("/")[0]


@pytest.mark.parametrize(("max_errors", "passes"), [(2, False), (3, True), (0, True)])
def test_more_bad_images_than_allowed_end_the_write(max_errors: int, passes: bool, tree: Path, tmp_path: Path) -> None:
    if passes:
        write_split(ImageTree(tree), tmp_path / "x.beton", on_error="skip", max_errors=max_errors)
        return
    with pytest.raises(DataError, match="expected at most 2 images to skip, got another: expected "):
        write_split(ImageTree(tree), tmp_path / "x.beton", on_error="skip", max_errors=max_errors)
    assert list(tmp_path.glob("x.*")) == []


def test_a_file_that_vanishes_is_skipped_too_and_nothing_at_all_is_an_error(tree: Path, tmp_path: Path) -> None:
    samples = ImageTree(tree)
    assert samples.fingerprint
    (tree / "dog" / "020.jpg").unlink()
    report = write_split(samples, tmp_path / "x.beton", on_error="skip")
    assert (
        dict(report.skipped)["dog/020.jpg"]
        == "expected something readable, got No such file or directory; check the path"
    )
    for file in tree.glob("*/*"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="expected at least one image that can be stored, got none"):
        write_split(ImageTree(tree), tmp_path / "y.beton", on_error="skip")


def test_an_unknown_way_to_meet_errors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_error: expected one of"):
        write_split(digits("val"), tmp_path / "x.beton", on_error="ignore")  # type: ignore[arg-type]


# ImageNet's oddities -------------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x112] = orientation
    return block.tobytes()


def broken_exif() -> bytes:
    """Its directory ends before the four bytes that say where the next one is, as in ImageNet."""
    return exif(1)[:-4]


ODDITIES = [
    ("a.JPEG", encoded(picture(1), "PNG"), "reencoded", ("not a JPEG", "JPEG by name only")),
    ("a.png", encoded(picture(1), "PNG"), "reencoded", ("not a JPEG",)),
    ("cmyk.JPEG", encoded(picture(2).convert("CMYK")), "reencoded", ("CMYK",)),
    ("rgb.jpg", encoded(picture(2), keep_rgb=True), "reencoded", ("unusual JPEG layout",)),
    ("broken.JPEG", encoded(picture(3), exif=broken_exif()), "passthrough", ("broken EXIF",)),
    ("garbage.JPEG", encoded(picture(3), exif=b"Exif\0\0" + b"\xff" * 40), "passthrough", ("broken EXIF",)),
    ("turned.JPEG", encoded(picture(4), exif=exif(6)), "passthrough", ("EXIF rotation ignored",)),
    ("upright.JPEG", encoded(picture(4), exif=exif(1)), "passthrough", ()),
    ("gray.JPEG", encoded(picture(5).convert("L")), "passthrough", ()),
    ("large.JPEG", encoded(picture(6, side=64)), "resized", ("larger than max_resolution",)),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's words, which are also what ImageNet's blocks bring
@pytest.mark.parametrize(("name", "data", "outcome", "remarks"), ODDITIES, ids=[row[0] for row in ODDITIES])
def test_oddities_are_told_and_the_pixels_are_pillows(
    name: str, data: bytes, outcome: str, remarks: tuple[str, ...]
) -> None:
    sample = Sample("file", np.frombuffer(data, np.uint8), 0, 0)
    stored, found = encode_sample(sample, Encoding(max_resolution=40))
    assert found == outcome
    assert find_remarks(sample, name, found) == remarks
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB")).astype(int)
    pixels = decode_rgb(stored)
    if outcome == "passthrough":
        assert stored.data.tobytes() == data
    if outcome != "resized":  # re-encoded at quality 95, or another decoder's rounding
        assert pixels.shape == wanted.shape
        assert np.abs(pixels - wanted).mean() < 3


def test_oddities_are_counted_in_report_and_manifest(tmp_path: Path) -> None:
    for label in ("x", "y"):
        for name, data, *_ in ODDITIES:
            (tmp_path / "tree" / label / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / label / name).write_bytes(data)
    report = write_split(ImageTree(tmp_path / "tree"), tmp_path / "x.beton", max_resolution=40, workers=2)
    assert report.counts == {"passthrough": 10, "reencoded": 8, "resized": 2}
    assert report.remarks == {
        "not a JPEG": 4,
        "JPEG by name only": 2,
        "CMYK": 2,
        "unusual JPEG layout": 2,
        "larger than max_resolution": 2,
        "broken EXIF": 4,
        "EXIF rotation ignored": 2,
    }
    manifest = read_manifest(tmp_path / "x.beton")
    assert manifest is not None
    assert (manifest.counts, manifest.remarks) == (report.counts, report.remarks)


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_no_exif_block_however_cut_stops_the_writer(cut: int) -> None:
    rng = np.random.default_rng(cut)
    for block in (exif(6)[: 6 + cut], b"Exif\0\0" + rng.bytes(cut), b"Exif\0\0II*\0\x08\0\0\0" + rng.bytes(cut)):
        data = encoded(picture(3), exif=block)
        sample = Sample("file", np.frombuffer(data, np.uint8), 0, 0)
        find_remarks(sample, "x.jpg", "passthrough")
        find_remarks(Sample("file", sample.data[: 30 + cut], 0, 0), "x.jpg", "passthrough")


# What it would be ----------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_an_estimate_of_what_passes_through_is_the_sum_of_the_files(tree: Path) -> None:
    for name in BAD:
        (tree / name).write_bytes(encoded(picture(1)))
    samples = ImageTree(tree)
    estimate = estimate_split(samples, Encoding(encode="passthrough"))
    assert (estimate.num_samples, estimate.num_sampled, estimate.num_failed) == (60, 60, 0)
    assert estimate.class_counts == {"cat": 30, "dog": 30}
    assert estimate.num_bytes == 2 * (8 << 20) + 60 * 84  # a page of metadata, one of images, table and manifest


@pytest.mark.parametrize("encode", ["passthrough", "jpeg", "raw"])
def test_an_estimate_from_a_sample_is_near_the_size_of_the_file(
    encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for row in range(80):
        noise = Image.fromarray(rng.integers(0, 256, (int(rng.integers(200, 400)), 300, 3), dtype=np.uint8))
        file = tmp_path / "tree" / str(row % 2) / f"{row}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(noise, quality=60))
    monkeypatch.setattr("fasttht.pipelines.estimate._LEAST", 20)
    monkeypatch.setattr("fasttht.pipelines.estimate._round_up", math.ceil)  # pages would hide an error of megabytes
    samples = ImageTree(tmp_path / "tree")
    estimate = estimate_split(samples, Encoding(encode=encode), workers=2)
    assert estimate.num_sampled == 20
    write_split(samples, tmp_path / "x.beton", encode=encode)
    stored = BetonFile(tmp_path / "x.beton").stored()[1].sum()
    assert abs(estimate.num_bytes / stored - 1) < 0.1


def test_a_plan_counts_bad_images_and_writes_nothing(tree: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan = plan_dataset("folder", tree)
    assert {split: estimate.num_samples for split, estimate in plan.items()} == {"train": 54, "val": 6}
    assert sum(estimate.num_failed for estimate in plan.values()) == 3
    assert plan_dataset("digits", None)["val"].num_samples == 360
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_space(tmp_path / "not" / "there" / "yet", 1) > 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 10**12, 5_000_000))
    with pytest.raises(
        ResourceError, match=r"out: expected 0\.03 GB of free space, got 0\.01 GB; make room"
    ) as refused:
        write_dataset("digits", None, tmp_path / "out")
    assert isinstance(refused.value, DataError)
    assert list(tmp_path.iterdir()) == []


# Checksums -----------------------------------------------------------------------------------------------


def test_the_manifest_holds_the_crc32_of_every_stored_image(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_split(ImageTree(tree), path, on_error="skip", workers=2)
    beton = BetonFile(path)
    stored = json.loads(manifest_path(path).read_text())
    found = np.frombuffer(base64.b64decode(stored["checksums"]), "<u4").tolist()
    assert found == [zlib.crc32(beton.sample(i).data.tobytes()) for i in range(57)]
    assert stored["source_fingerprint"] == ImageTree(tree).fingerprint
    assert beton.verified
    assert beton.has_manifest
