"""F6: data sets that are cut, overwritten or strange: said by exit 3 or handled, never shown as other images."""

from __future__ import annotations

import importlib
import io
import json
import random
import resource
import shutil
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fasttht.pipelines.writer import write_dataset
from tests.faults import runs
from tests.faults.case import Context, Kind

CUTS, OVERWRITTEN, HEADERS, REPLACED, FOREIGN, ODD = 100, 100, 30, 20, 50, 20
SMALL = [
    "--arch",
    "resnet18",
    "--stem",
    "small",
    "--width",
    "4",
    "--img-size",
    "8",
    "--epochs",
    "1",
    "--batch-size",
    "12",
    "--objective",
    "at",
    "--steps",
    "1",
    "--eval-steps",
    "0",
    "--threads",
    "1",
    "--workers",
    "1",
    "--device",
    "cpu",
]


def prepare() -> None:
    """Import the reader that `data verify` asks: it compiles itself, for seconds."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        importlib.import_module("ffcv.reader")


def pictures(folder: Path, per_class: int = 12, side: int = 16) -> Path:
    """Make an image tree of two classes of noise, split in two."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(2):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(per_class):
                noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / split / f"class{c}" / f"{i}.jpg"), noise)
    return folder


def written(shared: Path) -> Path:
    """Return a whole data set of two .beton files, made at the first call."""

    def make(home: Path) -> None:
        write_dataset("folder", pictures(home / "tree"), home / "beton")

    return runs.made(shared / "data", make) / "beton"


def data(number: int, at: Context) -> str:
    for count, work in (
        (CUTS, _cut), (OVERWRITTEN, _overwritten), (HEADERS, _header), (REPLACED, _replaced), (FOREIGN, _foreign),
        (ODD, _odd),
    ):  # fmt: skip
        if number < count:
            return work(number, at)
        number -= count
    raise ValueError(number)


def _copy(at: Context) -> Path:
    folder = at.folder / "data"
    shutil.copytree(written(at.shared), folder)
    return folder


def _both_say(folder: Path, at: Context, *, train: tuple[int, ...]) -> str:
    """Check that verify finds it (exit 3) and that training does not crash; returns the line of verify."""
    code, out, err = runs.call(["data", "verify", str(folder)], at.folder)
    assert code == 3, f"verify: exit {code}: {out[-200:]} {err[-400:]}"
    assert "Traceback" not in out + err, err[-400:]
    words = ["train", *SMALL, "--data", str(folder), "--output", str(at.folder / "run")]
    trained, out2, err2 = runs.call(words, at.folder)
    assert trained in train, f"train: exit {trained}: {err2[-400:]}"
    assert "Traceback" not in out2 + err2, err2[-400:]
    return f"verify: {err.strip()[:140]}; train: exit {trained}"


def _cut(number: int, at: Context) -> str:
    folder = _copy(at)
    path = folder / ("train.beton" if number % 4 else "val.beton")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * number // CUTS])
    return f"{path.name} cut to {number} %: " + _both_say(folder, at, train=(3,))


def _overwritten(number: int, at: Context) -> str:
    """Flip a bit, or overwrite a stretch with zeros or noise, anywhere that a byte counts."""
    folder, draw = _copy(at), random.Random(number)
    path = folder / "train.beton"
    content = bytearray(path.read_bytes())
    length = (1, 1, 60, 500)[number % 4]
    # Pages end in padding, which nothing reads; a place that is not zero is used.
    used = np.flatnonzero(np.frombuffer(bytes(content), dtype=np.uint8))
    place = int(used[draw.randrange(len(used))])
    before = bytes(content)
    if length == 1:
        content[place] ^= 1 << draw.randrange(8)
    else:
        filling = bytes(length) if number % 8 < 4 else draw.randbytes(length)
        content[place : place + length] = filling[: len(content) - place]
    assert bytes(content) != before, "the case changes nothing"
    path.write_bytes(content)
    # Training checks each sample as it reads it: an image that is bad ends it, unless the header says so at once.
    return f"{length} bytes at {place}: " + _both_say(folder, at, train=(3,))


def _header(number: int, at: Context) -> str:
    """Put numbers that cannot be into the header's integers; nothing may be allocated for them."""
    folder, draw = _copy(at), random.Random(number)
    path = folder / "train.beton"
    content = bytearray(path.read_bytes())
    place = number * 4 % 64
    content[place : place + 4] = draw.choice(
        [b"\xff" * 4, b"\x7f" * 4, bytes(4) if any(content[place : place + 4]) else b"\xff" * 4]
    )
    path.write_bytes(content)
    return f"header bytes {place} to {place + 4}: " + _both_say(folder, at, train=(3,))


def _replaced(number: int, at: Context) -> str:
    """Some images are bad and others take their place, the same ones twice; one more than allowed is an error."""
    tree = pictures(at.folder / "tree")
    draw = random.Random(number)
    bad = draw.sample(sorted((tree / "train").rglob("*.jpg")), 1 + number % 5)
    for path in bad:
        path.write_bytes(path.read_bytes()[: draw.randrange(1, 300)])
    words = ["train", *SMALL, "--data", str(tree), "--on-bad-sample", "replace"]
    rows = []
    for name in ("a", "b"):
        code, out, err = runs.call([*words, "--output", str(at.folder / name), "--log-interval", "1"], at.folder)
        assert code == 0, f"{len(bad)} bad: exit {code}: {err[-400:]}"
        assert out.count("is shown in its place") == len(bad), out[-600:]
        rows.append((at.folder / name / "metrics.jsonl").read_bytes())
    assert rows[0] == rows[1], "two runs with the same bad images differ"
    assert json.loads(rows[0].splitlines()[-2])["bad_samples"] == len(bad)
    strict = [*words, "--output", str(at.folder / "c"), "--max-bad-samples", str(len(bad) - 1)]
    line = runs.one_line(runs.call(strict, at.folder), 3)
    return f"{len(bad)} bad of 24: {line[:120]}"


def _image(kind: str, good: bytes, draw: random.Random) -> bytes:
    noise = np.random.default_rng(draw.randrange(1000)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    makers: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "text": lambda: b"<html>404 not found</html>",
        "cut": lambda: good[: draw.randrange(3, len(good) - 30)],
        "zeros": lambda: bytes(len(good)),
        "noise": lambda: draw.randbytes(500),
        "PNG": lambda: cv2.imencode(".png", noise)[1].tobytes(),
        "gray": lambda: cv2.imencode(".jpg", noise[:, :, 0])[1].tobytes(),
        "16 bits": lambda: cv2.imencode(".png", noise.astype(np.uint16) * 257)[1].tobytes(),
        "alpha": lambda: cv2.imencode(".png", np.dstack([noise, noise[:, :, :1]]))[1].tobytes(),
        "one pixel": lambda: cv2.imencode(".jpg", noise[:1, :1])[1].tobytes(),
    }
    return makers[kind]()


BROKEN, STRANGE = ("empty", "text", "cut", "zeros", "noise"), ("PNG", "gray", "16 bits", "alpha", "one pixel")


def _foreign(number: int, at: Context) -> str:
    """A file in an image tree that is no image ends writing and training with its name; a strange one is an image."""
    tree, draw = pictures(at.folder / "tree"), random.Random(number)
    kind = (BROKEN + STRANGE)[number % 10]
    path = draw.choice(sorted((tree / "train").rglob("*.jpg")))
    path.write_bytes(_image(kind, path.read_bytes(), draw))
    write = ["data", "write", "folder", "--source", str(tree), "--output", str(at.folder / "beton"), "--workers", "1"]
    said = runs.call(write, at.folder)
    train = ["train", *SMALL, "--data", str(tree), "--output", str(at.folder / "run")]
    trained = runs.call(train, at.folder)
    if kind in BROKEN:
        for each in (said, trained):
            assert path.name in runs.one_line(each, 3), each[2]
        assert not list((at.folder / "beton").glob("*.beton")), "a data set was left"
        return f"{kind}: {said[2].strip()[:140]}"
    for each in (said, trained):
        assert each[0] == 0, f"{kind}: exit {each[0]}: {each[2][-400:]}"
    return f"{kind}: taken"


def _png_bomb() -> bytes:
    """16,000 x 16,000 pixels in 32 KB, 768 MB once decoded."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + check

    side = 16_000
    size = side.to_bytes(4, "big")
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = chunk(b"IHDR", size + size + bytes((1, 0, 0, 0, 0)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _jpeg_bomb() -> bytes:
    """A small JPEG whose header says 40,000 x 40,000 pixels, 4.8 GB once decoded."""
    content = bytearray(_saved("RGB", "JPEG"))
    place = content.index(b"\xff\xc0") + 5  # behind the marker: length, bits, height, width
    content[place : place + 4] = (40_000).to_bytes(2, "big") * 2
    return bytes(content)


def _saved(mode: str, form: str, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, form, **options)
    return out.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6  # the orientation of a camera held upright
    return exif


TAKEN: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: _saved("CMYK", "JPEG"),
    "EXIF of a turned camera": lambda: _saved("RGB", "JPEG", exif=_turned()),
    "EXIF that is none": lambda: _saved("RGB", "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "progressive JPEG": lambda: _saved("RGB", "JPEG", progressive=True),
    "palette": lambda: _saved("P", "GIF"),
    "50 million pixels": lambda: cv2.imencode(".png", np.full((7100, 7100), 9, np.uint8))[1].tobytes(),
}
BOMBS: dict[str, Callable[[], bytes]] = {"PNG bomb": _png_bomb, "JPEG bomb": _jpeg_bomb}
# Over what a process of this kind takes anyway; a bomb that is decoded takes 768 MB.
ALLOWED_MB = 400


def _small_memory() -> None:
    """Let a bomb that goes off end its own process and no other."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, resource.RLIM_INFINITY))


def _odd(number: int, at: Context) -> str:
    """Images of other colours, with tags or too large: taken, or if they would fill the memory counted as bad."""
    tree = pictures(at.folder / "tree")
    kinds = [*TAKEN, *BOMBS, *BOMBS]
    kind, draw = kinds[number % len(kinds)], random.Random(number)
    path = draw.choice(sorted((tree / "train").rglob("*.jpg")))
    path.write_bytes((TAKEN | BOMBS)[kind]())
    train = ["train", *SMALL, "--data", str(tree), "--log-interval", "1"]
    write = ["data", "write", "folder", "--source", str(tree), "--output", str(at.folder / "beton"), "--workers", "1"]
    if kind in TAKEN:
        for words in (write, [*train, "--output", str(at.folder / "run")]):
            code, out, err = runs.call(words, at.folder, _small_memory)
            assert code == 0, f"{kind}: exit {code}: {err[-400:]}"
        return f"{kind}: taken"
    for words in (write, [*train, "--output", str(at.folder / "run")]):
        line = runs.one_line(runs.call(words, at.folder, _small_memory), 3)
        assert path.name in line, f"{kind}: {line}"
    replaced = [*train, "--output", str(at.folder / "c"), "--on-bad-sample", "replace"]
    code, out, err = runs.call(replaced, at.folder, _small_memory)
    assert code == 0, f"{kind}, replaced: exit {code}: {err[-400:]}"
    assert out.count("is shown in its place") == 1, out[-600:]
    rows = [json.loads(row) for row in (at.folder / "c" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("bad_samples") for row in rows if row["kind"] == "train"][-1] == 1
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    assert most < own + ALLOWED_MB, f"{kind}: a process took {most:.0f} MB, this one has {own:.0f}"
    return f"{kind}: {line[:120]}; replaced and counted, at most {most:.0f} MB"


KIND = Kind(
    "data",
    CUTS + OVERWRITTEN + HEADERS + REPLACED + FOREIGN + ODD,
    "`data verify` and training say it (exit 3); replaced images are counted, the same in every run; odd images are "
    "taken; a decompression bomb is a bad image and fills no memory",
    "48 images of noise in two classes, as .beton files and as an image tree; one pass of a width-4 ResNet-18",
    data,
    prepare=prepare,
)
