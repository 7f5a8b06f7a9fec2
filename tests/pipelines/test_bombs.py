"""Images whose headers claim more than they may: bad samples, for every decoder, before anything is allocated."""

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from fasttht.pipelines import DataError
from fasttht.pipelines.backends import DECODERS, open_decoder, why_not
from fasttht.pipelines.datasets import ImageTree
from fasttht.pipelines.decode_turbo import check_pixels, decode_rgb, image_size
from fasttht.pipelines.decoder import Request
from fasttht.pipelines.encode import Encoding, encode_sample
from fasttht.pipelines.samples import MAX_PIXELS, Pixels, Sample
from fasttht.pipelines.stages import Stages

CLAIM = (10_000, 9_000)  # just above the limit: a decoder that does not look survives, and the test fails
TOO_MANY = r"expected an image of at most 89,478,485 pixels, got 10000x9000"
ALL = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                why_not(name, torch.device("cuda")) is not None, reason=f"{name}: package not installed"
            ),
            *([pytest.mark.gpu] if name == "dali-gpu" else []),
        ],
    )
    for name in DECODERS
    if name != "synthetic"
]


def jpeg(height: int = 8, width: int = 8) -> Pixels:
    return np.frombuffer(simplejpeg.encode_jpeg(np.full((height, width, 3), 99, np.uint8), 90), np.uint8)


def bomb() -> Pixels:
    """A few hundred bytes whose header claims CLAIM."""
    data = bytearray(jpeg().tobytes())
    at = data.index(b"\xff\xc0") + 5  # start of frame: length, precision, then height and width
    data[at : at + 4] = b"".join(side.to_bytes(2, "big") for side in CLAIM)
    return np.frombuffer(bytes(data), np.uint8)


def png_bomb() -> Pixels:
    file = io.BytesIO()
    Image.new("1", CLAIM[::-1]).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


class Rows:
    """Whole samples, with the sizes that the file announces."""

    class_names: tuple[str, ...] = ()
    fingerprint = path = "rows"

    def __init__(self, *rows: Sample) -> None:
        self.rows = rows
        self.labels = np.zeros(len(rows), np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, i: int) -> Sample:
        return self.rows[i]

    def where(self, i: int) -> str:
        return f"row {i}"


@pytest.mark.parametrize("name", ALL)
def test_every_decoder_takes_it_for_a_bad_sample_and_decodes_the_others(name: str) -> None:
    samples = Rows(Sample("jpg", jpeg(), 8, 8), Sample("jpg", bomb(), *CLAIM), Sample("file", png_bomb(), *CLAIM))
    device = torch.device("cuda" if name == "dali-gpu" else "cpu")
    decoder = open_decoder(name, samples, img_size=8, workers=1, device=device, stages=Stages())  # type: ignore[arg-type]
    shapes = np.array([[8, 8], CLAIM, CLAIM])
    windows = np.concatenate([np.zeros_like(shapes), shapes], axis=1)
    try:
        found = decoder.start(Request(np.arange(3), shapes, windows, np.zeros(3, np.bool_))).result()
    finally:
        decoder.close()
    assert [position for position, _ in found.bad] == [1, 2]
    assert "at most 89,478,485 pixels, got 10000x9000" in found.bad[0][1]
    assert "89478485 pixels" in found.bad[1][1], "Pillow's own words"
    assert (found.pixels[0].cpu().int() - 99).abs().max() <= 1


def test_it_is_never_handed_to_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: object, **options: object) -> None:
        raise AssertionError("it is decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    sample = Sample("file", bomb(), 0, 0)
    for read in (decode_rgb, lambda sample: image_size(sample.data), lambda s: encode_sample(s, Encoding())):
        with pytest.raises(DataError, match=TOO_MANY):
            read(sample)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bomb().tofile(tmp_path / name / "x.jpg")
    with pytest.raises(DataError, match=TOO_MANY):
        ImageTree(tmp_path).sizes(np.array([0]))


def test_the_limit_is_one_number_for_jpegs_and_all_other_formats() -> None:
    check_pixels(1, MAX_PIXELS)
    with pytest.raises(DataError, match="got 1x89478486; shrink it"):
        check_pixels(1, MAX_PIXELS + 1)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_pillow_is_held_to_it_whatever_it_is_told_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match=TOO_MANY):
        decode_rgb(Sample("file", png_bomb(), 0, 0))


@pytest.mark.parametrize("name", [each for each in ALL if each.values[0] in ("turbo", "ffcv")])
def test_a_line_of_pixels_is_not_blown_up_by_the_evaluation(name: str) -> None:
    """1 x 60,000 pixels would be 12 GB with 256 on the short side; these would be 295 MB."""
    samples = Rows(Sample("raw", np.zeros(3 * 1500, np.uint8), 1, 1500))
    decoder = open_decoder(name, samples, img_size=224, workers=1, device=torch.device("cpu"), stages=Stages())  # type: ignore[arg-type]
    request = Request(np.arange(1), np.array([[1, 1500]]), np.array([[0, 0, 1, 1500]]), np.zeros(1, np.bool_), 256)
    try:
        ((_, reason),) = decoder.start(request).result().bad
    finally:
        decoder.close()
    assert reason.startswith(
        "expected an image with 256 on its short side of at most 89,478,485 pixels, got 256x384000"
    )


def test_no_memory_for_an_image_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    with pytest.raises(DataError, match="expected an image that memory has room for"):
        decode_rgb(Sample("jpg", jpeg(), 8, 8))
