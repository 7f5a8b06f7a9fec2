"""Verify and info, and a seeded campaign of damage: refused or harmless, never a crash, a hang or a wrong picture."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.datasets import digits
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.manifest import manifest_path, read_manifest
from fasttht.pipelines.plan import Augment, EpochPlan
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.split_writer import write_split
from fasttht.pipelines.verify import SHOWN_PROBLEMS, describe_beton, find_betons, verify_beton
from fasttht.pipelines.writer import write_dataset


class Pictures:
    """Eight pictures, JPEG and raw in turn, of different sizes; smooth, so that damage decodes without an error."""

    path = Path("pictures")
    class_names = ("even", "odd")
    fingerprint = "0123456789abcdef"
    labels = np.arange(8) % 2

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def __len__(self) -> int:
        return 8

    def sample(self, i: int) -> Sample:
        height, width = 40 + 3 * i, 50 - 2 * i
        y, x = np.mgrid[0:height, 0:width]
        planes = [(y * 3 + i * 40 + self.shift) % 256, (x * 2 + i * 90) % 256, (x + y + i * 17) % 256]
        pixels = np.stack(planes, axis=2).astype(np.uint8)
        if i % 2:
            return Sample("raw", pixels.reshape(-1), height, width)
        data = simplejpeg.encode_jpeg(pixels, 90, "RGB", "444")
        return Sample("jpg", np.frombuffer(data, np.uint8), height, width)

    def where(self, i: int) -> str:
        return f"picture {i}"

    def origin(self, i: int) -> str:
        return f"pictures/{i}"

    def sizes(self, index: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.beton"
    write_split(Pictures(), path, shuffle=False)
    return path


def overwrite(path: Path, at: int, new: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(new)


def address(path: Path, row: int) -> int:
    """Where an image lies: the only place in the file where its bytes are."""
    content = path.read_bytes()
    at = content.index(BetonFile(path).sample(row).data.tobytes())
    assert content.count(BetonFile(path).sample(row).data.tobytes()) == 1
    return at


# Reading -------------------------------------------------------------------------------------------------


def test_a_changed_byte_of_an_image_is_refused_by_its_checksum(good: Path) -> None:
    """A raw one: no decoder could have noticed."""
    at = address(good, 3)
    overwrite(good, at + 10, bytes([good.read_bytes()[at + 10] ^ 1]))
    beton = BetonFile(good)
    with pytest.raises(
        DataError, match=r"row 3: expected bytes with checksum [0-9a-f]{8}, got [0-9a-f]{8}; the file is"
    ):
        beton.sample(3)
    assert beton.sample(2).mode == "jpg"


def test_without_a_manifest_the_size_in_a_jpeg_must_be_the_one_in_the_index(good: Path) -> None:
    manifest_path(good).unlink()
    at = address(good, 2) + good.read_bytes()[address(good, 2) :].index(b"\xff\xc0")
    overwrite(good, at + 5, b"\0\x50\0\x51")
    beton = BetonFile(good)
    assert (beton.has_manifest, beton.verified) == (False, False)
    with pytest.raises(DataError, match="row 2: expected an image of 46x46, as the index says, got 80x81"):
        beton.sample(2)
    overwrite(good, at + 5, b"\xff\xff\xff\xff")  # 12 GB of pixels
    with pytest.raises(DataError, match="row 2: expected "):
        beton.sample(2)
    overwrite(good, address(good, 4), bytes(30))
    with pytest.raises(DataError, match="row 4: expected an image, got bytes of no known format"):
        beton.sample(4)


def test_a_manifest_with_checksums_of_another_number_of_images_is_refused(good: Path) -> None:
    text = manifest_path(good).read_text()
    for changed in (
        text.replace('"checksums": "', '"checksums": "AAAA'),
        text.replace('"checksums": "', '"checksums": "?'),
    ):
        manifest_path(good).write_text(changed)
        with pytest.raises(DataError, match=r"good\.beton\.json: expected .*checksums"):
            BetonFile(good)
    manifest_path(good).write_text(text.replace("pictures/0", "pictures/0\\npictures/0"))
    with pytest.raises(DataError, match=r"good\.beton\.json: expected 8 sources, got 9"):
        read_manifest(good)


def test_names_with_line_breaks_survive_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pictures, "origin", lambda self, i: f"line\nbreak/{i}")
    write_split(Pictures(), tmp_path / "x.beton", shuffle=False)
    assert BetonFile(tmp_path / "x.beton").origin(7) == "line\nbreak/7"


def test_a_manifest_of_version_1_is_still_read(good: Path) -> None:
    fingerprint = BetonFile(good).fingerprint
    sources = ", ".join(f'"{i}.jpg"' for i in range(8))
    manifest_path(good).write_text(
        f'{{"version": 1, "num_samples": 8, "fingerprint": "{fingerprint}", "class_names": ["even", "odd"],'
        f' "settings": {{"seed": 3}}, "sources": [{sources}]}}'
    )
    beton = BetonFile(good)
    assert (beton.has_manifest, beton.verified, beton.settings) == (True, False, {"seed": 3})
    assert (beton.class_names, beton.origin(7)) == (("even", "odd"), "7.jpg")
    assert verify_beton(good).num_problems == 0


# Verify and info -----------------------------------------------------------------------------------------


def test_a_whole_file_has_no_problems(good: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    verdict = verify_beton(good, workers=2, progress=lambda *done: calls.append(done))
    assert (verdict.num_problems, verdict.problems, verdict.num_samples) == (0, (), 8)
    assert (verdict.histogram, verdict.checksums) == ((4, 4), True)
    assert [done for done, *_ in calls] == list(range(1, 9))
    assert calls[-1][2] == sum(BetonFile(good).sample(i).data.size for i in range(8))
    manifest_path(good).unlink()
    verdict = verify_beton(good)
    assert (verdict.num_problems, verdict.checksums, verdict.histogram) == (0, False, (4, 4))


def test_a_histogram_lists_few_classes_and_summarises_many(good: Path) -> None:
    verdict = verify_beton(good)
    assert verdict.describe_histogram() == "even 4, odd 4"
    assert replace(verdict, histogram=(4, 1500, 0)).describe_histogram() == "even 4, odd 1,500, 2 0"
    many = replace(verdict, histogram=(9, *range(1000, 1099), 2000), class_names=tuple(f"n{i}" for i in range(101)))
    assert many.describe_histogram() == (
        "fewest n0 9, n1 1,000, n2 1,001; 5 % 1,004, median 1,049, 95 % 1,094; most n100 2,000, n99 1,098, n98 1,097"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stock_ffcv_is_asked_and_its_complaint_is_a_problem(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ffcv", reason='stock FFCV is what this asks; run: pip install "fasttht[ffcv]"')
    assert verify_beton(good).stock == "reads it"

    def complain(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("ffcv.reader.Reader", complain)
    verdict = verify_beton(good)
    assert (verdict.num_problems, verdict.stock) == (1, "RuntimeError: no")
    assert "expected stock FFCV to read it, got RuntimeError: no" in verdict.problems[0]


def test_a_machine_without_ffcv_skips_that_part(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("fasttht.pipelines.verify.importlib.import_module", fail)
    verdict = verify_beton(good)
    assert verdict.num_problems == 0
    assert verdict.stock == "skipped, FFCV does not import (No module named 'ffcv.reader')"


def test_every_problem_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_split(digits("val"), path)
    beton = BetonFile(path)
    start = path.read_bytes().index(beton.sample(0).data.tobytes())
    overwrite(path, start, b"\x01" * 192 * 50)
    verdict = verify_beton(path, workers=3)
    assert verdict.num_problems == 50
    assert len(verdict.problems) == SHOWN_PROBLEMS
    for row, problem in enumerate(verdict.problems):
        assert problem.startswith(f"{path}, row {row} ({beton.origin(row)}): expected bytes with checksum ")


def test_a_jpeg_that_decodes_to_another_size_or_not_at_all_is_a_problem(good: Path) -> None:
    manifest_path(good).unlink()
    at = address(good, 2)
    size = BetonFile(good).sample(2).data.size
    overwrite(good, at + size // 2, bytes(size - size // 2))
    verdict = verify_beton(good)
    assert verdict.num_problems == 1
    assert verdict.problems[0].startswith(f"{good}, row 2: expected a whole JPEG, got ")


def test_a_damaged_index_is_one_problem(good: Path) -> None:
    good.write_bytes(good.read_bytes()[:-1])
    verdict = verify_beton(good)
    assert (verdict.num_problems, verdict.num_samples, verdict.histogram) == (1, 0, ())
    assert "expected an allocation table" in verdict.problems[0]


def test_a_folder_means_both_files(tmp_path: Path) -> None:
    write_dataset("digits", None, tmp_path)
    assert [path.name for path in find_betons(tmp_path)] == ["train.beton", "val.beton"]
    assert find_betons(tmp_path / "val.beton") == [tmp_path / "val.beton"]
    (tmp_path / "val.beton").unlink()
    with pytest.raises(DataError, match=r"expected train\.beton and val\.beton, got no val\.beton"):
        find_betons(tmp_path)


def test_info_tells_what_index_and_manifest_say_without_decoding(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BetonFile, "sample", None)
    info = describe_beton(good)
    assert (info.num_samples, info.num_classes, info.modes) == (8, 2, {"jpg": 4, "raw": 4})
    assert (info.num_bytes, info.page_size) == (good.stat().st_size, 8 << 20)
    assert info.sides[0] == (0, 36, 46)
    assert info.sides[-1] == (100, 46, 61)
    assert (info.has_manifest, info.checksums, info.num_skipped) == (True, True, 0)
    assert (info.settings["encode"], info.counts) == ("passthrough", {"raw": 4, "passthrough": 4})
    manifest_path(good).unlink()
    info = describe_beton(good)
    assert (info.has_manifest, info.checksums, info.settings, info.num_classes) == (False, False, {}, 2)


# The campaign --------------------------------------------------------------------------------------------

Damage = Callable[[bytearray], None]


def flips(rng: np.random.Generator, start: int, end: int, num: int) -> Damage:
    places = rng.integers(start, end, num).tolist()
    bits = rng.integers(0, 8, num).tolist()

    def damage(content: bytearray) -> None:
        for place, bit in zip(places, bits, strict=True):
            content[place] ^= 1 << bit

    return damage


def put(start: int, new: bytes) -> Damage:
    def damage(content: bytearray) -> None:
        content[start : start + len(new)] = new[: max(0, len(content) - start)]

    return damage


def cut(end: int) -> Damage:
    def damage(content: bytearray) -> None:
        del content[end:]

    return damage


def campaign(size: int, table: int, images: tuple[int, int]) -> Iterator[tuple[str, Damage]]:
    """Yield named damages to a file of `size` bytes with its table at `table` and its pictures in `images`."""
    rng = np.random.default_rng(20261123)
    index_end = 24 + 2 * 1041 + 8 * 24
    for region, start, end in (
        ("header", 0, 24), ("descriptors", 24, 2106), ("metadata", 2106, index_end), ("images", *images),
        ("table", table, size),
    ):  # fmt: skip
        for number in range(40):
            yield f"flip {number} in {region}", flips(rng, start, end, 1 + 7 * (number % 2))
        for number in range(12):
            first = int(rng.integers(start, end))
            length = min(end - first, int(rng.integers(1, 400)))
            yield f"zeros {number} in {region}", put(first, bytes(length))
            yield f"noise {number} in {region}", put(first, rng.bytes(length))
    for percent in range(100):
        yield f"cut to {percent} %", cut(size * percent // 100)
    for value in (0, 1, 3, 255, 65535):
        yield f"version {value}", put(0, value.to_bytes(2, "little"))
        yield f"{value} fields", put(2, value.to_bytes(2, "little"))
    for exponent in (0, 10, 31, 32, 40, 62, 63):
        yield f"2**{exponent} samples", put(8, (1 << exponent).to_bytes(8, "little"))
        yield f"table at 2**{exponent}", put(16, (1 << exponent).to_bytes(8, "little"))
    yield "empty", cut(0)


def pictures_of(path: Path) -> dict[int, tuple[int, bytes] | None]:
    """Return label and pixels of every row that reads; None for one that is refused."""
    beton = BetonFile(path)
    found: dict[int, tuple[int, bytes] | None] = {}
    for row in range(len(beton)):
        try:
            found[row] = int(beton.labels[row]), decode_rgb(beton.sample(row)).tobytes()
        except DataError:
            found[row] = None
    return found


def shown_by(path: Path) -> dict[int, tuple[int, bytes]]:
    """Return label and pixels of every row that the loader shows in one pass, bad ones replaced by others."""
    beton = BetonFile(path)
    plan = EpochPlan(num_samples=len(beton), batch_size=3, seed=1, augment=Augment())
    found: dict[int, tuple[int, bytes]] = {}
    with closing(Loader(beton, plan, img_size=6, on_bad="replace", stall_s=20)) as loader:
        for batch in loader:
            for row, label, image in zip(batch.index.tolist(), batch.y.tolist(), batch.x, strict=True):
                found[row] = label, image.numpy().tobytes()
    return found


@pytest.mark.parametrize("with_manifest", [True, False])
def test_damage_is_refused_or_harmless(
    with_manifest: bool, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a manifest every picture and label that is read is the right one; without, nothing but DataError comes."""
    monkeypatch.setattr("fasttht.pipelines.verify._ask_stock_reader", lambda _: ("not asked", True))
    content, pristine, shown = good.read_bytes(), pictures_of(good), shown_by(good)
    samples = [BetonFile(good).sample(row).data.tobytes() for row in range(8)]
    start = content.index(samples[0])
    images = (start, content.index(samples[-1]) + len(samples[-1]))
    table = len(content) - 8 * 24
    path, outcomes = tmp_path / "bad.beton", {"refused": 0, "row refused": 0, "harmless": 0, "wrong": 0}
    if with_manifest:
        manifest_path(path).write_bytes(manifest_path(good).read_bytes())
    for name, damage in campaign(len(content), table, images):
        damaged = bytearray(content)
        damage(damaged)
        path.write_bytes(damaged)
        verdict = verify_beton(path)
        try:
            found = pictures_of(path)
        except DataError:
            outcomes["refused"] += 1
            assert verdict.num_problems == 1, name
            continue
        bad_rows = [row for row, picture in found.items() if picture is None]
        wrong = [row for row, picture in found.items() if picture is not None and picture != pristine.get(row)]
        outcomes["wrong" if wrong else "row refused" if bad_rows else "harmless"] += 1
        assert verdict.num_problems == len(bad_rows), name
        assert not (with_manifest and wrong), name
        assert not with_manifest or len(found) == 8, name
        if len(bad_rows) <= len(found) / 2 and len(found) >= 3:
            now = shown_by(path)
            assert not now.keys() & set(bad_rows), name
            assert not with_manifest or now.items() <= shown.items(), name
    assert sum(outcomes.values()) >= 300, outcomes
    # Every kind of outcome was met: the campaign reaches what it is meant to reach.
    assert min(outcomes["refused"], outcomes["row refused"]) >= (50 if with_manifest else 5), outcomes
    assert (outcomes["wrong"] > 0) == (not with_manifest), outcomes


def test_the_manifest_of_another_file_is_refused_even_when_only_the_pictures_differ(good: Path, tmp_path: Path) -> None:
    """Same sizes, same labels, so the same index: the checksums tell them apart."""
    twin = tmp_path / "twin.beton"
    rows = [(Sample("raw", np.full(3 * 64, value, np.uint8), 8, 8), 0) for value in (1, 2)]
    write_beton(twin, rows, 2)
    other = tmp_path / "other.beton"
    write_split(digits("val"), other)
    for manifest in (manifest_path(other), manifest_path(good)):
        manifest_path(twin).write_bytes(manifest.read_bytes())
        with pytest.raises(DataError, match="expected the fingerprint"):
            BetonFile(twin)
        assert verify_beton(twin).num_problems == 1
    raws = [tmp_path / f"{shift}.beton" for shift in (0, 1)]
    for shift, path in enumerate(raws):
        write_split(Pictures(shift), path, shuffle=False, encode="raw")
    manifest_path(raws[0]).replace(manifest_path(raws[1]))
    swapped = BetonFile(raws[1])
    for row in range(8):
        with pytest.raises(DataError, match=f"row {row}: expected bytes with checksum"):
            swapped.sample(row)
