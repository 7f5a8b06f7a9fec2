"""DALI behind the Decoder contract: the plan's windows, the embedded pixels, no row lost for another's sake."""

import gc
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fasttht.pipelines import DataError, ResourceError, dali_graph, decode_dali
from fasttht.pipelines.backends import open_decoder, why_not
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.decode_dali import DaliDecoder, make_graph
from fasttht.pipelines.decode_turbo import crop_resize_into, decode_into, decode_rgb
from fasttht.pipelines.decoder import Decoded, Request
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.manifest import Manifest, write_manifest
from fasttht.pipelines.plan import Augment, EpochPlan, Index
from fasttht.pipelines.samples import Sample
from fasttht.pipelines.stages import Stages

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(why_not("dali-cpu", CPU) is not None, reason=f"DALI: {why_not('dali-cpu', CPU)}")

SIZE = 16
Pixels = npt.NDArray[np.uint8]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def raw(pixels: Pixels) -> Sample:
    return Sample("raw", pixels.reshape(-1), *pixels.shape[:2])


def jpg(pixels: Pixels, quality: int = 90, subsampling: str = "420") -> Sample:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling=subsampling)
    return Sample("jpg", np.frombuffer(data, np.uint8), *pixels.shape[:2])


def encoded(image: Image.Image, kind: str, **options: Any) -> Sample:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Sample("file", np.frombuffer(file.getvalue(), np.uint8), image.height, image.width)


def changed(sample: Sample, data: Pixels) -> Sample:
    return Sample(sample.mode, data, sample.height, sample.width)


class Listed:
    """Samples in a list; an exception in the list is raised when its row is read."""

    class_names: tuple[str, ...] = ()
    fingerprint = "listed"
    path = Path("listed")

    def __init__(self, rows: list[Sample | DataError], sizes: list[tuple[int, int]] | None = None) -> None:
        self.rows = rows
        self.labels: Index = np.arange(len(rows), dtype=np.int64)
        self._sizes = sizes or [(0, 0) if isinstance(row, DataError) else (row.height, row.width) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        found = np.array(self._sizes, dtype=np.int64)[index]
        return found[:, 0], found[:, 1]

    def sample(self, i: int) -> Sample:
        row = self.rows[i]
        if isinstance(row, DataError):
            raise row
        return row

    def where(self, i: int) -> str:
        return f"row {i}"

    def origin(self, i: int) -> str:
        return ""


Open = Callable[..., DaliDecoder]


@pytest.fixture
def open_dali() -> Iterator[Open]:
    """Open decoders that are closed when the test ends."""
    opened: list[DaliDecoder] = []

    def open_one(samples: Any, size: int = SIZE, workers: int = 2, stages: Stages | None = None) -> DaliDecoder:
        memory = HostMemory(size, pinned=False)
        decoder = DaliDecoder(samples, memory, stages or Stages(), img_size=size, workers=workers, device=None)
        opened.append(decoder)
        return decoder

    yield open_one
    for decoder in opened:
        decoder.close()


def whole(samples: Listed, index: list[int]) -> Request:
    """A request for whole images, not mirrored."""
    shapes = np.stack(samples.sizes(np.array(index, dtype=np.int64)), axis=1)
    windows = np.concatenate([np.zeros_like(shapes), shapes], axis=1)
    return Request(np.array(index, dtype=np.int64), shapes, windows, np.zeros(len(index), np.bool_))


def planned(samples: Listed, plan: EpochPlan, size: int) -> Request:
    """All rows of `samples`, as the plan cuts them."""
    index = np.arange(len(samples), dtype=np.int64)
    heights, widths = samples.sizes(index)
    short_side = None if plan.augment is not None else round(size / plan.crop_pct)
    windows = plan.windows(index, heights, widths)
    return Request(index, np.stack([heights, widths], axis=1), windows, plan.flips(index), short_side)


def by_turbo(samples: Listed, request: Request, size: int) -> Tensor:
    """The embedded decoder's pixels, but of a full decode: it shrinks large windows while it decodes them."""
    pixels = torch.empty(len(request.index), size, size, 3, dtype=torch.uint8)
    for position, row in enumerate(request.index.tolist()):
        out, cut = pixels[position].numpy(), request.cut(position)
        if cut.short_side is None:
            crop_resize_into(decode_rgb(samples.sample(row)), cut.window, cut.flip, out)
        else:
            decode_into(samples.sample(row), cut, out, Stages().track())
    return pixels


def distance(one: Tensor, two: Tensor) -> Tensor:
    """Absolute differences, (B, S, S, 3) int16."""
    assert one.shape == two.shape
    return (one.to(torch.int16) - two.to(torch.int16)).abs()


def assert_close(found: Decoded, samples: Listed, request: Request) -> None:
    """Pixels as stated in the module: within 1 but for the outermost ring, which may be off by more."""
    size = found.pixels.shape[1]
    good = [i for i in range(len(request.index)) if i not in dict(found.bad)]
    parts = request.index[good], request.shapes[good], request.windows[good], request.flips[good]
    expected = by_turbo(samples, Request(*parts, request.short_side), size)
    off = distance(found.pixels[good], expected)
    assert off[:, 1:-1, 1:-1].max() <= 1
    assert off.max() <= 40


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.index.tolist() for batch in found] == [batch.index.tolist() for batch in expected]
    assert [batch.y.tolist() for batch in found] == [batch.y.tolist() for batch in expected]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.x, two.x)


def without_huffman_table(sample: Sample) -> Sample:
    """A JPEG with a readable header and a code that cannot be: DALI finds out when it decodes, and breaks."""
    data = sample.data.copy()
    table = data.tobytes().index(b"\xff\xc4") + 5
    num_codes = data[table : table + 16].sum()
    data[table : table + 16] = 0
    data[table] = num_codes  # more codes of one bit than there are
    return changed(sample, data)


GOOD = jpg(noise(40, 50))
BREAKS = without_huffman_table(GOOD)


# -- windows, flips and pixels -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    places=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 37), st.booleans()), min_size=1, max_size=6),
    kind=st.sampled_from(["jpg", "raw"]),
)
def test_windows_are_cut_to_the_pixel(places: list[tuple[int, int, bool]], kind: str) -> None:
    """Windows of the output's own size, out of noise: within the JPEG's loss of 4; one pixel beside is off by 85."""
    pixels = noise(40, 53)
    samples = Listed([raw(pixels) if kind == "raw" else jpg(pixels, 100, "444")])
    windows = np.array([(top, left, SIZE, SIZE) for top, left, _ in places], dtype=np.int64)
    flips = np.array([flip for _, _, flip in places])
    shapes = np.full((len(places), 2), (40, 53))
    found = SHARED.decode(samples, Request(np.zeros(len(places), np.int64), shapes, windows, flips))
    assert found.bad == ()
    for image, (top, left, flip) in zip(found.pixels, places, strict=True):
        window = torch.from_numpy(pixels[top : top + SIZE, left : left + SIZE].copy())
        expected = window.flip(1) if flip else window
        off = distance(image, expected)
        assert off.max() <= (0 if kind == "raw" else 4)
        assert distance(image, expected.roll(1, 0)).float().mean() > 50
        assert distance(image, expected.roll(1, 1)).float().mean() > 50
        assert distance(image, expected.flip(1)).float().mean() > 50


class Shared:
    """One decoder for all examples of a property: building one takes longer than using it."""

    def __init__(self) -> None:
        self._decoder: DaliDecoder | None = None
        self._samples = Listed([])

    def decode(self, samples: Listed, request: Request) -> Decoded:
        self._samples.rows = samples.rows
        if self._decoder is None:
            memory = HostMemory(SIZE, pinned=False)
            self._decoder = DaliDecoder(self._samples, memory, Stages(), img_size=SIZE, workers=1, device=None)
        return self._decoder.start(request).result()

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


SHARED = Shared()


@pytest.fixture(scope="module", autouse=True)
def _close_shared() -> Iterator[None]:
    yield
    SHARED.close()


@pytest.fixture(scope="module")
def photographs() -> list[Pixels]:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's photographs")
    return [np.ascontiguousarray(image) for image in datasets.load_sample_images().images]


@pytest.mark.parametrize("subsampling", ["444", "420"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_photographs_are_within_the_stated_tolerance_in_training(
    size: int, subsampling: str, photographs: list[Pixels], open_dali: Open
) -> None:
    """Random-resized-crops, shrunken and enlarged. Measured: 0.39 on average at worst, 1 inside, 27 on the ring."""
    samples = Listed([jpg(image, 90, subsampling) for image in photographs for _ in range(16)])
    request = planned(samples, EpochPlan(num_samples=32, batch_size=32, augment=Augment()), size)
    assert (request.windows[:, 2:] < size).any() or size < 224
    assert (request.windows[:, 2:] > size).any()
    assert request.flips.any()
    assert not request.flips.all()
    found = open_dali(samples, size).start(request).result()
    off = distance(found.pixels, by_turbo(samples, request, size))
    assert found.bad == ()
    assert off.float().mean((1, 2, 3)).max() < 0.5
    assert off[:, 1:-1, 1:-1].max() <= 1
    assert off.max() <= 40


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_photographs_are_within_one_level_of_pillows_in_evaluation(
    size: int, crop_pct: float, photographs: list[Pixels], open_dali: Open
) -> None:
    """Resize and CenterCrop: what is taken has fractions of pixels; the nearest whole window would be off by 100.

    With crop_pct 1 it reaches the image's own edge, and then its outermost ring is as in training.
    """
    images = [*photographs, photographs[0][:, :301], photographs[1][:299]]
    samples = Listed([jpg(image) for image in images])
    plan = EpochPlan(num_samples=len(images), batch_size=8, augment=None, crop_pct=crop_pct)
    request = planned(samples, plan, size)
    found = open_dali(samples, size).start(request).result()
    off = distance(found.pixels, by_turbo(samples, request, size))
    assert off[:, 1:-1, 1:-1].max() <= 1
    assert off.max() <= (1 if crop_pct < 1 else 40)
    assert off.float().mean() < 0.25


def test_noise_is_within_the_stated_tolerance(open_dali: Open) -> None:
    samples = Listed([jpg(noise(200, 300, seed), subsampling=kind) for seed, kind in enumerate(["444", "420"] * 8)])
    request = planned(samples, EpochPlan(num_samples=16, batch_size=16, augment=Augment()), 64)
    found = open_dali(samples, 64).start(request).result()
    assert_close(found, samples, request)


def test_images_of_every_kind_decode_as_the_embedded_decoder_decodes_them(open_dali: Open) -> None:
    """JPEGs go to DALI, in all their chroma layouts; the rest never does, and is then the same to the bit."""
    smooth = np.stack([np.add.outer(np.arange(48), np.arange(60)) * k % 256 for k in (1, 2, 1)], 2).astype(np.uint8)
    image = Image.fromarray(smooth)
    behind, rotated = encoded(image, "JPEG"), Image.Exif()
    rotated[0x0112] = 6  # turn by 90 degrees, says EXIF
    kinds = {
        "444": jpg(smooth, 95, "444"), "raw": raw(smooth), "420": jpg(smooth, 95, "420"), "422": jpg(smooth, 95, "422"),
        "440": jpg(smooth, 95, "440"), "411": jpg(smooth, 95, "411"), "PNG": encoded(image, "PNG"),
        "gray": encoded(image.convert("L"), "JPEG"), "progressive": encoded(image, "JPEG", progressive=True),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"), "rgb": encoded(image, "JPEG", keep_rgb=True),
        "rotated": encoded(image, "JPEG", exif=rotated),
        "bytes behind": changed(behind, np.concatenate([behind.data, np.zeros(9, np.uint8)])),
    }  # fmt: skip
    samples = Listed(list(kinds.values()))
    request = planned(samples, EpochPlan(num_samples=len(kinds), batch_size=99, augment=Augment()), SIZE)
    decoder = open_dali(samples)
    job = decoder.start(request)
    embedded = {"raw", "PNG", "CMYK", "bytes behind"}
    assert {list(kinds)[position] for position in job.embedded} == embedded
    assert {list(kinds)[position] for position in job.encoded} == set(kinds) - embedded
    found = job.result()
    assert found.bad == ()
    assert_close(found, samples, request)
    for position, name in enumerate(kinds):
        if name in embedded:
            assert distance(found.pixels[position], by_turbo(samples, request, SIZE)[position]).max() == 0


def test_result_has_the_form_of_its_contract(open_dali: Open) -> None:
    samples = Listed([GOOD, raw(noise(9, 9))])
    decoder = open_dali(samples)
    for index in ([0, 1, 0], [0], [1], []):
        found = decoder.start(whole(samples, index)).result()
        assert found.pixels.shape == (len(index), SIZE, SIZE, 3)
        assert found.pixels.dtype == torch.uint8
        assert found.pixels.is_contiguous()
        assert found.bad == ()


# -- bad rows ----------------------------------------------------------------------------------------------------------

BAD = {
    "truncated": (changed(GOOD, GOOD.data[: GOOD.data.size // 2]), "whole JPEG, got Premature end"),
    "without its end": (changed(GOOD, GOOD.data[:-2]), "whole JPEG, got Premature end"),
    "zeroed": (changed(GOOD, np.zeros_like(GOOD.data)), "expected an image, got bytes of no known format"),
    "end zeroed": (changed(GOOD, np.where(np.arange(GOOD.data.size) < 900, GOOD.data, 0)), "expected a whole JPEG"),
    "garbage": (changed(GOOD, noise(10, 10).reshape(-1)), "expected an image, got bytes of no known format"),
    "nothing": (changed(GOOD, GOOD.data[:0]), "expected an image, got bytes of no known format"),
    "header only": (changed(GOOD, GOOD.data[:400]), "expected a"),
    "breaks": (BREAKS, "expected a whole JPEG, got Bogus Huffman table definition"),
    "larger": (jpg(noise(41, 50)), "expected an image of 40x50 pixels, as announced, got 41x50"),
    "smaller": (jpg(noise(8, 8)), "expected an image of 40x50 pixels, as announced, got 8x8"),
    "short raw": (Sample("raw", noise(39, 50).reshape(-1), 40, 50), "expected 6000 raw bytes"),
    "unreadable": (DataError("row 3: expected bytes with checksum 1, got 2"), "checksum 1, got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_and_costs_no_other_row(name: str, open_dali: Open) -> None:
    broken, reason = BAD[name]
    good = [jpg(noise(40, 50, seed)) for seed in range(3)]
    samples = Listed([good[0], good[1], raw(noise(40, 50, 9)), broken, good[2]], [(40, 50)] * 5)
    decoder = open_dali(samples)
    clean = decoder.start(whole(samples, [0, 1, 2, 4])).result()
    assert clean.bad == ()
    found = decoder.start(whole(samples, [0, 3, 1, 2, 3, 4])).result()
    assert [position for position, _ in found.bad] == [1, 4]
    for _, words in found.bad:
        assert reason in words
    assert torch.equal(found.pixels[[0, 2, 3, 5]], clean.pixels)
    again = decoder.start(whole(samples, [0, 1, 2, 4])).result()
    assert again.bad == ()
    assert torch.equal(again.pixels, clean.pixels)


def test_a_request_of_bad_rows_alone_is_answered(open_dali: Open) -> None:
    samples = Listed([BREAKS, GOOD])
    decoder = open_dali(samples)
    assert [position for position, _ in decoder.start(whole(samples, [0, 0])).result().bad] == [0, 1]
    assert decoder.start(whole(samples, [1])).result().bad == ()


def test_what_dali_alone_refuses_is_bad_in_its_words(open_dali: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_dali, "decode_rgb", lambda sample: None)
    samples = Listed([GOOD, BREAKS])
    found = open_dali(samples).start(whole(samples, [1, 0, 0, 1])).result()
    assert [position for position, _ in found.bad] == [0, 3]
    assert all("expected an image that DALI decodes, got 'Failed to decode'" in reason for _, reason in found.bad)


def test_an_error_that_no_sample_causes_is_raised(open_dali: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    take = decode_dali._Pipe.take
    messages: list[str] = []

    def run_out(self: Any, out: Tensor | None) -> None:
        take(self, out)
        if out is not None and len(out) > 1:  # each image by itself is fine
            raise RuntimeError("Critical error in pipeline:\n" + messages[0])

    samples = Listed([GOOD])
    decoder = open_dali(samples)
    with monkeypatch.context() as patch:
        patch.setattr(decode_dali._Pipe, "take", run_out)
        messages.append("out of memory")
        with pytest.raises(ResourceError, match="got 'out of memory' from DALI and no sample that causes it"):
            decoder.start(whole(samples, [0, 0])).result()
    assert decoder.start(whole(samples, [0, 0])).result().bad == ()


def test_the_samples_of_a_dropped_job_outlive_the_pipeline_that_reads_them(
    open_dali: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI was given their memory, not a copy; after an error its threads may still be at it."""
    samples = Listed([GOOD])
    decoder = open_dali(samples)
    dropped, wanted = (decoder.start(whole(samples, [0, 0])) for _ in range(2))
    take, close, kept = decode_dali._Pipe.take, decode_dali._Pipe.close, list[bool]()

    def fail_to_drop(self: Any, out: Tensor | None) -> None:
        if out is None and not kept:
            self._error = RuntimeError("failed")
            raise self._error
        take(self, out)

    def noting_close(self: Any) -> None:
        kept.append(dropped in decoder._jobs)
        close(self)

    monkeypatch.setattr(decode_dali._Pipe, "take", fail_to_drop)
    monkeypatch.setattr(decode_dali._Pipe, "close", noting_close)
    found = wanted.result()
    assert kept[0]
    assert found.bad == ()


def test_a_dali_that_does_not_work_is_an_error_and_no_bad_row(open_dali: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no driver\nand more words")

    monkeypatch.setattr(decode_dali, "make_graph", refuse)
    samples = Listed([GOOD])
    with pytest.raises(
        ResourceError, match=r"loader dali: expected a pipeline for 1 images of 16 pixels, got 'no driver'"
    ):
        open_dali(samples).start(whole(samples, [0]))


def test_damage_that_dali_lets_through_is_found_by_its_checksum(tmp_path: Path, open_dali: Open) -> None:
    """Zeros inside the image data are legal to DALI: why a file should keep its manifest."""
    path = tmp_path / "three.beton"
    rows = [jpg(noise(40, 50, seed)) for seed in range(3)]
    fingerprint = write_beton(path, [(row, 0) for row in rows], 3)
    sums = b"".join(zlib.crc32(row.data.tobytes()).to_bytes(4, "little") for row in rows)
    content = bytearray(path.read_bytes())
    at = content.index(rows[1].data.tobytes()) + rows[1].data.size // 2
    content[at : at + 100] = bytes(100)
    path.write_bytes(content)
    request = Request(np.arange(3), np.full((3, 2), (40, 50)), np.full((3, 4), (0, 0, 40, 50)), np.zeros(3, np.bool_))
    assert open_dali(BetonFile(path)).start(request).result().bad == ()
    write_manifest(
        path, Manifest(num_samples=3, fingerprint=fingerprint, class_names=(), settings={}, sources=(), checksums=sums)
    )
    found = open_dali(BetonFile(path)).start(request).result()
    assert [position for position, _ in found.bad] == [1]
    assert "expected bytes with checksum" in found.bad[0][1]


# -- several requests at once ------------------------------------------------------------------------------------------


def numbered(num: int) -> Listed:
    """Flat images of another gray each: row i shows the level 5 i."""
    return Listed([jpg(np.full((40, 50, 3), 5 * row, np.uint8)) for row in range(num)])


def levels(found: Decoded) -> list[float]:
    return (found.pixels.float().mean((1, 2, 3)) / 5).round().tolist()


def test_requests_in_flight_keep_their_order_and_growing_ones_start_a_larger_pipeline(open_dali: Open) -> None:
    samples = numbered(40)
    decoder = open_dali(samples)
    shares = [[0], [1, 2], list(range(3, 20)), [20], list(range(2, 40)), [7, 7]]
    jobs = [decoder.start(whole(samples, share)) for share in shares]
    assert [levels(job.result()) for job in jobs] == shares


@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_a_broken_request_costs_none_of_those_around_it(broken: int, open_dali: Open) -> None:
    samples = numbered(8)
    samples.rows[7] = BREAKS
    decoder = open_dali(samples)
    shares = [[0, 1], [2, 3], [4, 5], [6]]
    shares[broken] = [7, *shares[broken]]
    jobs = [decoder.start(whole(samples, share)) for share in shares]
    for number, (share, job) in enumerate(zip(shares, jobs, strict=True)):
        found = job.result()
        assert [position for position, _ in found.bad] == ([0] if number == broken else [])
        skip = int(number == broken)
        assert levels(found)[skip:] == share[skip:]


@pytest.mark.parametrize("kind", ["good", "broken"])
@pytest.mark.parametrize("num_abandoned", [1, 2, 5])
def test_an_abandoned_request_leaves_later_ones_their_own_pixels(
    num_abandoned: int, kind: str, open_dali: Open
) -> None:
    """As when a loader is left early: its producer ends with requests in flight, the next one goes on."""
    samples = numbered(8)
    samples.rows[7] = BREAKS
    decoder = open_dali(samples)
    for _ in range(num_abandoned):
        decoder.start(whole(samples, [1, 7 if kind == "broken" else 2]))
    jobs = [decoder.start(whole(samples, share)) for share in ([3], [4, 5])]
    assert levels(jobs[0].result()) == [3]
    assert levels(jobs[1].result()) == [4, 5]
    assert levels(decoder.start(whole(samples, [6])).result()) == [6]


def test_a_result_can_be_taken_once(open_dali: Open) -> None:
    samples = numbered(2)
    decoder = open_dali(samples)
    job, late = decoder.start(whole(samples, [0])), decoder.start(whole(samples, [1]))
    late.result()
    for taken in (job, late):
        with pytest.raises(ValueError, match="expected a job in flight"):
            taken.result()


def test_the_same_request_gives_the_same_pixels_whatever_was_decoded_before(open_dali: Open) -> None:
    samples = Listed([jpg(noise(40, 50, seed)) for seed in range(6)] + [BREAKS])
    decoder, fresh = open_dali(samples, workers=2), open_dali(samples, workers=1)
    for index in ([0], [6], [5, 4, 3], [1, 2]):
        decoder.start(whole(samples, index)).result()
    request = whole(samples, [0, 3, 1])
    assert torch.equal(decoder.start(request).result().pixels, fresh.start(request).result().pixels)


# -- the loader, and the end -------------------------------------------------------------------------------------------


def mixed_samples() -> Listed:
    rng = np.random.default_rng(4)
    rows: list[Sample | DataError] = []
    for seed in range(30):
        pixels = noise(*(int(side) for side in rng.integers(20, 60, 2)), seed)
        rows.append(raw(pixels) if seed % 5 == 0 else jpg(pixels))
    return Listed(rows)


def loader_of(samples: Listed, **options: Any) -> Loader:
    plan = EpochPlan(num_samples=len(samples), batch_size=7, seed=1, augment=options.pop("augment", Augment()))
    return Loader(samples, plan, img_size=SIZE, decoder="dali-cpu", workers=2, **options)


@pytest.mark.parametrize("num_taken", [0, 1, 3, 4, 5])
def test_resume_through_the_loader_is_bit_identical(num_taken: int) -> None:
    samples = mixed_samples()
    first, second = loader_of(samples), loader_of(samples)
    expected = list(first)
    batches = iter(second)
    for _ in range(num_taken):
        next(batches)
    state = second.state_dict()
    third = loader_of(samples)
    third.load_state_dict(state)
    assert_same(list(third) if num_taken < 5 else [], expected[num_taken:])
    del batches
    for loader in (first, second, third):
        loader.close()


def test_a_loader_left_early_continues_with_its_own_pixels() -> None:
    samples = mixed_samples()
    loader = loader_of(samples)
    expected = list(loader)
    other = loader_of(samples)
    found = []
    while other.epoch == 0:
        for batch in other:
            found.append(batch)
            break
    assert_same(found[:5], expected)
    loader.close()
    other.close()


def test_bad_rows_are_replaced_through_the_loader() -> None:
    samples = mixed_samples()
    reported: list[str] = []
    row = 11
    samples.rows[row] = changed(samples.sample(row), without_huffman_table(samples.sample(row)).data)
    loader = loader_of(samples, on_bad="replace", report=reported.append)
    shown = [i for batch in loader for i in batch.index.tolist()]
    loader.close()
    assert loader.bad_rows == {row}
    assert row not in shown
    assert len(shown) == 30
    assert len(reported) == 1
    assert reported[0].startswith("row 11: expected a whole JPEG, got Bogus Huffman table definition")


def test_stages_are_told_while_dali_decodes(open_dali: Open) -> None:
    stages, samples = Stages(), numbered(3)
    open_dali(samples, stages=stages).start(whole(samples, [0, 1, 2])).result()
    assert set(stages.seconds()) == {"read", "decode"}
    assert stages.busiest() is None


def open_files_and_threads() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc, which only Linux has")
def test_opening_and_closing_leaves_no_thread_and_no_file(open_dali: Open) -> None:
    """Also with requests in flight, and after a broken one. DALI's threads are not Python's: counted by the system."""
    samples = numbered(4)
    samples.rows[3] = BREAKS

    def use() -> None:
        decoder = open_dali(samples)
        decoder.start(whole(samples, [0, 3])).result()
        decoder.start(whole(samples, [1, 3]))
        decoder.start(whole(samples, [2]))
        assert open_files_and_threads()[1] > before[1] or before == (0, 0)
        decoder.close()
        decoder.close()

    before = (0, 0)
    use()  # what is loaded or started once for the process
    before = open_files_and_threads()
    for _ in range(20):
        use()
    assert open_files_and_threads() == before


def test_a_closed_decoder_is_refused(open_dali: Open) -> None:
    samples = numbered(2)
    decoder = open_dali(samples)
    job = decoder.start(whole(samples, [0]))
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.start(whole(samples, [1]))
    with pytest.raises(ValueError, match="closed"):
        job.result()


# -- the GPU's graph ---------------------------------------------------------------------------------------------------


def test_the_gpus_graph_is_the_cpus_with_another_decoder() -> None:
    """Serialising makes DALI check every operator's arguments and devices; it needs no driver. Building would."""
    cpu = make_graph("cpu", None, workers=1, max_batch=4, img_size=SIZE).serialize()
    mixed = make_graph("mixed", None, workers=1, max_batch=4, img_size=SIZE).serialize()
    for text in (cpu, mixed):
        assert all(name in text for name in (b"decoders__ImageSlice", b"Resize", b"Flip", b"jpeg", b"begin", b"end"))
    assert b"gpu" not in cpu
    assert b"mixed" not in cpu
    assert mixed.count(b"mixed") == 1
    assert mixed.count(b"gpu") >= 2  # resize and flip


def test_gpu_decoding_is_refused_without_a_gpu() -> None:
    assert why_not("dali-cpu", CPU) is None
    assert why_not("dali-gpu", CPU) == "it decodes on a CUDA device and this run is on cpu; take dali-cpu or turbo"
    with pytest.raises(ValueError, match="dali-gpu: expected a CUDA device, got cpu"):
        open_decoder("dali-gpu", Listed([GOOD]), img_size=SIZE, workers=1, device=CPU, stages=Stages())


def test_without_dali_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(dali_graph, "import_module", missing)
    with pytest.raises(
        ImportError, match=r'expected NVIDIA DALI, got No module .*; run: pip install "fasttht\[dali\]"'
    ):
        open_decoder("dali-cpu", Listed([GOOD]), img_size=SIZE, workers=1, device=CPU, stages=Stages())


@pytest.mark.gpu
def test_the_gpu_decodes_what_the_cpu_decodes() -> None:
    """nvJPEG's own arithmetic: 2 on average is a bound for a wrong window or colour order, not a measurement."""
    samples = mixed_samples()
    samples.rows[11] = BREAKS
    device = torch.device("cuda")
    request = planned(samples, EpochPlan(num_samples=30, batch_size=30, augment=Augment()), SIZE)
    decoder = open_decoder("dali-gpu", samples, img_size=SIZE, workers=2, device=device, stages=Stages())
    with torch.cuda.stream(torch.cuda.Stream(device)):
        jobs = [decoder.start(request), decoder.start(request)]
        for job in jobs:
            found = job.result()
            good = [i for i in range(30) if i not in dict(found.bad)]
            assert found.pixels.device.type == "cuda"
            assert [position for position, _ in found.bad] == [11]
            samples.rows[11] = GOOD
            expected = by_turbo(samples, request, SIZE)
            assert distance(found.pixels.cpu()[good], expected[good]).float().mean() < 2
            samples.rows[11] = BREAKS
    decoder.close()
