"""Decoding and cutting one sample: the right pixels, or a DataError; never gray, stale or shifted ones."""

import importlib
import io
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fasttht.pipelines import DataError
from fasttht.pipelines.decode_turbo import (
    crop_resize_into,
    decode_into,
    decode_rgb,
    image_size,
    resize_center_into,
)
from fasttht.pipelines.decoder import Cut
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.stages import Stages

Pixels = npt.NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Smooth colours, different in every channel and direction: what JPEG keeps well."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(3 * y + seed), np.cos(4 * x - seed), np.sin(3 * (x + y) + 2 * seed)]
    return np.round(np.stack(waves, axis=2) * 100 + 128).astype(np.uint8)


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image | Pixels, kind: str, **options: Any) -> Pixels:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


def decode(data: Pixels) -> Pixels:
    return decode_rgb(Sample("file", data, 0, 0))


def by_pillow(data: Pixels) -> Pixels:
    with Image.open(io.BytesIO(data.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def largest_difference(one: Pixels, two: Pixels) -> int:
    assert one.shape == two.shape
    return int(np.abs(one.astype(np.int64) - two.astype(np.int64)).max())


def inked(pixels: Pixels) -> Pixels:
    """A YCCK JPEG: four inks, written inverted, as Adobe does."""
    inks = np.ascontiguousarray(255 - np.asarray(Image.fromarray(pixels).convert("CMYK")))
    return np.frombuffer(simplejpeg.encode_jpeg(inks, 95, "CMYK", "444"), dtype=np.uint8)


JPEGS = {
    "444": encode(picture(37, 53), "JPEG", quality=95, subsampling="4:4:4"),
    "420": encode(picture(37, 53), "JPEG", quality=95, subsampling="4:2:0"),
    "progressive": encode(picture(37, 53), "JPEG", quality=95, progressive=True),
    "gray": encode(Image.fromarray(picture(37, 53)).convert("L"), "JPEG", quality=95),
    "CMYK": encode(Image.fromarray(picture(37, 53)).convert("CMYK"), "JPEG", quality=95),
    "YCCK": inked(picture(37, 53)),
}


@pytest.mark.parametrize("mode", ["jpg", "file"])
@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_of_every_kind_decode_as_pillow_decodes_them(name: str, mode: Any) -> None:
    """Within 2 levels: both use libjpeg-turbo, but maybe other versions of it, or of its colour conversion."""
    pixels = decode_rgb(Sample(mode, JPEGS[name], 37, 53))
    assert pixels.dtype == np.uint8
    assert largest_difference(pixels, by_pillow(JPEGS[name])) <= 2


@pytest.mark.parametrize("name", ["444", "420", "progressive", "CMYK", "YCCK"])
def test_jpeg_pixels_are_those_that_were_encoded(name: str) -> None:
    """Within 12 levels of 255, the loss of quality 95; swapped channels or inverted inks are off by 100."""
    assert largest_difference(decode(JPEGS[name]), picture(37, 53)) <= 12


def test_a_jpeg_of_unnamed_chroma_layout_is_decoded_as_well() -> None:
    """Sampling 2x2, 2x1, 1x1 is legal, but not among simplejpeg's layouts. Every block of a flat image is the same."""
    data = encode(np.full((32, 32, 3), 128, dtype=np.uint8), "JPEG", keep_rgb=True).copy()
    frame = data.tobytes().index(b"\xff\xc0")
    data[frame + 11], data[frame + 14] = 0x22, 0x21
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg_header(data)
    assert image_size(data) == (32, 32)
    assert np.array_equal(decode(data), np.full((32, 32, 3), 128))


def test_gray_jpeg_has_three_equal_channels() -> None:
    pixels = decode(JPEGS["gray"])
    assert pixels.shape == (37, 53, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    gray = np.asarray(Image.fromarray(picture(37, 53)).convert("L"))
    assert largest_difference(pixels[..., 0], gray) <= 4


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_decode_exactly(kind: str) -> None:
    assert np.array_equal(decode(encode(noise(9, 14), kind)), noise(9, 14))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_png_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(9, 14)).convert(mode)
    pixels = decode(encode(image, "PNG"))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    if mode == "RGBA":
        assert np.array_equal(pixels, noise(9, 14))


def test_raw_pixels_are_taken_as_they_are() -> None:
    pixels = noise(5, 7)
    assert np.array_equal(decode_rgb(Sample("raw", pixels.reshape(-1), 5, 7)), pixels)


@pytest.mark.parametrize("num_bytes", [0, 104, 106])
def test_raw_pixels_of_another_size_are_refused(num_bytes: int) -> None:
    with pytest.raises(DataError, match=rf"expected 105 raw bytes \(5x7x3\), got {num_bytes}"):
        decode_rgb(Sample("raw", np.zeros(num_bytes, dtype=np.uint8), 5, 7))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_ignored(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encode(picture(20, 30), kind, exif=exif, quality=95, subsampling="4:4:4")
    assert image_size(data) == (20, 30)
    assert largest_difference(decode(data), picture(20, 30)) <= 12


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_cut_short_anywhere_is_refused(name: str) -> None:
    """In the header, in the middle, and one byte before its end."""
    data = JPEGS[name]
    for num_bytes in sorted({0, 1, 2, 3, *range(4, len(data), 97), len(data) - 2, len(data) - 1}):
        with pytest.raises(DataError, match="expected"):
            decode(data[:num_bytes])
    assert decode(data).shape == (37, 53, 3)


def test_png_cut_short_is_refused_or_whole() -> None:
    """The last bytes of a PNG hold no pixels: without them it may be refused or be right."""
    data, whole = encode(noise(9, 14), "PNG"), 0
    for num_bytes in range(len(data)):
        try:
            pixels = decode(data[:num_bytes])
        except DataError:
            continue
        whole += 1
        assert np.array_equal(pixels, noise(9, 14))
    assert whole < 30


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_bytes_give_pixels_or_a_data_error_and_nothing_else(data: st.DataObject) -> None:
    files = [JPEGS["444"], JPEGS["CMYK"], encode(noise(9, 14), "PNG"), encode(noise(9, 14), "BMP")]
    damaged = data.draw(st.sampled_from(files), "file").copy()
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        damaged[data.draw(st.integers(0, len(damaged) - 1), "where")] = data.draw(st.integers(0, 255), "value")
    try:
        pixels = decode(damaged)
    except DataError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"not an image", b"\xff\xd8\xff\xe0" + bytes(50)], ids=str)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    for function in (decode, image_size):
        with pytest.raises(DataError, match="expected"):
            function(np.frombuffer(data, dtype=np.uint8))


def test_an_unknown_format_is_said_in_words_that_do_not_change_from_run_to_run() -> None:
    """Pillow's own words name an object by its address."""
    for function in (decode, image_size):
        with pytest.raises(DataError, match=r"^expected an image, got bytes of no known format$"):
            function(np.frombuffer(b"not an image", dtype=np.uint8))


@pytest.mark.parametrize("name", JPEGS)
def test_image_size_reads_the_header_of_a_jpeg(name: str) -> None:
    assert image_size(JPEGS[name]) == (37, 53)
    assert image_size(JPEGS[name][:-100]) == (37, 53)  # only the header is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_image_size_reads_the_header_of_other_formats(kind: str) -> None:
    assert image_size(encode(noise(9, 14), kind)) == (9, 14)


def test_image_size_agrees_with_simplejpegs_own_encoder() -> None:
    data = np.frombuffer(simplejpeg.encode_jpeg(picture(21, 8), 90), dtype=np.uint8)
    assert image_size(data) == (21, 8)
    assert decode(data).shape == (21, 8, 3)


def cut(pixels: Pixels, window: tuple[int, int, int, int], size: int, *, flip: bool = False) -> Pixels:
    out = np.full((size, size, 3), 77, dtype=np.uint8)
    crop_resize_into(pixels, window, flip, out)
    return out


@pytest.mark.parametrize("window", [(0, 0, 8, 8), (3, 5, 8, 8), (12, 22, 8, 8)])
def test_crop_without_resize_is_exact(window: tuple[int, int, int, int]) -> None:
    pixels = noise(20, 30)
    top, left, height, width = window
    expected = pixels[top : top + height, left : left + width]
    assert np.array_equal(cut(pixels, window, 8), expected)
    assert np.array_equal(cut(pixels, window, 8, flip=True), expected[:, ::-1])


@pytest.mark.parametrize("window", [(2, 1, 16, 16), (0, 0, 5, 5), (1, 2, 7, 20), (0, 3, 20, 6), (4, 4, 9, 23)])
def test_flip_mirrors_the_cut_left_to_right(window: tuple[int, int, int, int]) -> None:
    straight = cut(noise(20, 30), window, 8)
    assert not np.array_equal(straight, straight[:, ::-1])
    assert np.array_equal(cut(noise(20, 30), window, 8, flip=True), straight[:, ::-1])


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("shape", [(9, 9), (16, 16), (31, 17), (8, 50), (3, 3), (1, 1), (2, 40), (40, 2)])
def test_constant_image_stays_constant_when_shrunk_or_enlarged(shape: tuple[int, int], value: int) -> None:
    pixels = np.full((*shape, 3), value, dtype=np.uint8)
    assert set(cut(pixels, (0, 0, *shape), 8).ravel().tolist()) == {value}


@pytest.mark.parametrize("window", [(4, 6, 32, 48), (0, 0, 40, 60), (1, 2, 9, 50), (3, 3, 33, 17), (0, 0, 5, 6)])
def test_resampling_is_pillows_antialiased_bilinear(window: tuple[int, int, int, int]) -> None:
    """On noise, the hardest case, by 1 level at most; pixels outside the window have no influence."""
    pixels = noise(40, 60)
    top, left, height, width = window
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    expected = np.asarray(crop.resize((8, 8), Image.Resampling.BILINEAR)).astype(int)
    assert int(np.abs(cut(pixels, window, 8) - expected).max()) <= 1


def test_enlarging_is_bilinear_between_pixel_centres() -> None:
    """Against the closed form in float64, within 1 level: torch weighs in 15-bit fixed point."""
    pixels, size = noise(5, 6), 16
    y, x = (np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1) for side in (5, 6))
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1, x1 = np.minimum(y0 + 1, 4), np.minimum(x0 + 1, 5)
    dy, dx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    image = pixels.astype(np.float64)
    above = image[y0][:, x0] * (1 - dx) + image[y0][:, x1] * dx
    below = image[y1][:, x0] * (1 - dx) + image[y1][:, x1] * dx
    expected = above * (1 - dy) + below * dy
    assert float(np.abs(cut(pixels, (0, 0, 5, 6), size) - expected).max()) <= 1


@pytest.mark.parametrize("window", [(0, 0, 8, 8), (0, 0, 20, 30), (0, 0, 3, 3)])
def test_only_its_own_slot_of_the_batch_is_written(window: tuple[int, int, int, int]) -> None:
    batch = np.full((3, 8, 8, 3), 77, dtype=np.uint8)
    crop_resize_into(picture(20, 30), window, False, batch[1])
    assert (batch[[0, 2]] == 77).all()
    assert np.array_equal(batch[1], cut(picture(20, 30), window, 8))


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (100, 700), (64, 64), (48, 31), (47, 300)])
@pytest.mark.parametrize(("size", "short_side"), [(48, 55), (48, 48), (32, 64), (31, 47)])
def test_evaluation_is_torchvisions_resize_and_centre_crop_of_a_pillow_image(
    shape: tuple[int, int], size: int, short_side: int, torchvision: ModuleType
) -> None:
    """At most 2/255 apart on noise, 0.1/255 on average, whatever is rounded on the way."""
    transforms = importlib.import_module("torchvision.transforms")
    pixels = noise(*shape)
    image = transforms.CenterCrop(size)(transforms.Resize(short_side)(Image.fromarray(pixels)))
    out = np.full((size, size, 3), 77, dtype=np.uint8)
    resize_center_into(pixels, short_side, out)
    difference = np.abs(out.astype(int) - np.asarray(image))
    assert (int(difference.max()) <= 2, float(difference.mean()) < 0.1) == (True, True)


def test_an_output_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an output of at most 7 pixels, got 8"):
        resize_center_into(noise(20, 30), 7, np.empty((8, 8, 3), np.uint8))


def decoded(data: Pixels, window: tuple[int, int, int, int], size: int, **options: Any) -> Pixels:
    out = np.full((size, size, 3), 77, dtype=np.uint8)
    shape = options.pop("shape", image_size(data))
    decode_into(Sample("jpg", data, *shape), Cut(shape, window, **{"flip": False, **options}), out, Stages().track())
    return out


def large_photograph() -> Pixels:
    """china.jpg, enlarged to 1708x2560 pixels."""
    pixels = importlib.import_module("sklearn.datasets").load_sample_image("china.jpg")
    return np.asarray(Image.fromarray(pixels).resize((2560, 1708), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("window", "denominator"), [
    ((0, 0, 1708, 2560), 4), ((111, 333, 1025, 1027), 4), ((7, 9, 513, 514), 2), ((1001, 1900, 600, 611), 2),
    ((3, 5, 511, 800), 1), ((3, 5, 800, 511), 1), ((50, 60, 128, 128), 1),
])  # fmt: skip
def test_large_windows_are_shrunk_while_they_are_decoded_and_stay_within_a_level(
    window: tuple[int, int, int, int], denominator: int, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean difference to the full decode of the same window; 128 pixels out, so from 512 on, and from 1024 on."""
    data = np.frombuffer(simplejpeg.encode_jpeg(large_photograph(), 90, "RGB", "420"), dtype=np.uint8)
    asked: list[int] = []
    decode_jpeg = simplejpeg.decode_jpeg

    def spy(*args: Any, min_factor: int, **options: Any) -> Any:
        asked.append(min_factor)
        return decode_jpeg(*args, min_factor=min_factor, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    found = decoded(data, window, 128, flip=flip)
    assert asked == [denominator]
    expected = cut(decode(data), window, 128, flip=flip)
    difference = np.abs(found.astype(int) - expected)
    assert float(difference.mean()) <= (1 if denominator > 1 else 0)


def test_a_scaled_decode_checks_the_announced_size() -> None:
    data = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((512, 512, 3), np.uint8)), dtype=np.uint8)
    for shape in [(600, 512), (512, 600), (300, 300)]:
        with pytest.raises(DataError, match=rf"expected an image of {shape[0]}x{shape[1]} pixels, .*, got 512x512"):
            decoded(data, (0, 0, *shape), 32, shape=shape)


def test_what_cannot_be_shrunk_while_it_is_decoded_comes_in_full_size() -> None:
    pixels = picture(512, 512)
    found = decoded(inked(pixels), (0, 0, 512, 512), 32)
    assert np.array_equal(found, cut(decode(inked(pixels)), (0, 0, 512, 512), 32))


def test_evaluation_never_shrinks_while_decoding() -> None:
    pixels = large_photograph()
    data = np.frombuffer(simplejpeg.encode_jpeg(pixels, 90, "RGB", "420"), dtype=np.uint8)
    expected = np.empty((64, 64, 3), dtype=np.uint8)
    resize_center_into(decode(data), 73, expected)
    assert np.array_equal(decoded(data, (0, 0, 1708, 1708), 64, short_side=73), expected)
