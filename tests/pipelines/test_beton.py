"""The .beton format: both ways against stock FFCV, what is written is read, what is damaged is refused."""

import pickle
import signal
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttht.pipelines import DataError
from fasttht.pipelines.beton import MIN_PAGE_SIZE, BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.decode_turbo import decode_rgb
from fasttht.pipelines.manifest import Manifest, manifest_path, read_manifest, write_manifest
from fasttht.pipelines.samples import Sample

FFCV_REASON = 'stock FFCV is the other side of this test; run: pip install "fasttht[ffcv]"'
# Stock FFCV on today's Python and numba; nothing of it is ours.
ignore_ffcv_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
HEADER = struct.Struct("<HHIQQ")


def picture(row: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth colours that differ from row to row; (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(y * 3 + row * 40) % 256, (x * 2 + row * 90) % 256, (x + y + row * 17) % 256]
    return np.stack(planes, axis=2).astype(np.uint8)


def raw(row: int, height: int, width: int) -> Sample:
    return Sample("raw", picture(row, height, width).reshape(-1), height, width)


def jpg(row: int, height: int, width: int) -> Sample:
    data = simplejpeg.encode_jpeg(picture(row, height, width), 95, "RGB", "444")
    return Sample("jpg", np.frombuffer(data, np.uint8), height, width)


def write(path: Path, samples: list[Sample], **options: Any) -> str:
    return write_beton(path, [(s, 10 + row) for row, s in enumerate(samples)], len(samples), **options)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.beton"
    write(path, [jpg(0, 30, 40), raw(1, 20, 10), jpg(2, 9, 9)])
    return path


def test_what_is_written_is_read_back(good: Path) -> None:
    beton = BetonFile(good)
    assert len(beton) == 3
    assert beton.labels.tolist() == [10, 11, 12]
    assert beton.labels.dtype == np.int64
    heights, widths = beton.sizes(np.array([2, 0]))
    assert (heights.tolist(), widths.tolist()) == ([9, 30], [9, 40])
    for row, sent in enumerate([jpg(0, 30, 40), raw(1, 20, 10), jpg(2, 9, 9)]):
        found = beton.sample(row)
        assert (found.mode, found.height, found.width) == (sent.mode, sent.height, sent.width)
        assert found.data.tobytes() == sent.data.tobytes()
        assert not np.shares_memory(found.data, beton.sample(row).data)
    assert beton.class_names == ()
    assert beton.where(1) == f"{good}, row 1"


def test_the_same_rows_give_the_same_bytes(good: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.beton"
    write(again, [jpg(0, 30, 40), raw(1, 20, 10), jpg(2, 9, 9)])
    assert again.read_bytes() == good.read_bytes()


def test_the_fingerprint_is_the_writers_and_changes_with_the_data(tmp_path: Path) -> None:
    one = write(tmp_path / "one.beton", [jpg(0, 30, 40), raw(1, 20, 10)])
    two = write(tmp_path / "two.beton", [jpg(0, 30, 41), raw(1, 20, 10)])
    assert BetonFile(tmp_path / "one.beton").fingerprint == one
    assert BetonFile(tmp_path / "two.beton").fingerprint == two
    assert one != two


def test_a_pickled_file_opens_again_without_carrying_its_bytes(good: Path) -> None:
    """Loader workers may be spawned."""
    packed = pickle.dumps(BetonFile(good))
    assert len(packed) < 1000
    assert pickle.loads(packed).sample(1).data.tobytes() == raw(1, 20, 10).data.tobytes()


def test_a_large_sample_makes_the_pages_grow(tmp_path: Path) -> None:
    """Laid down before it or after it, every sample still lies within one page."""
    path = tmp_path / "grown.beton"
    sides = [(500, 900), (700, 800), (1000, 900), (700, 800), (1400, 1100), (10, 10)]
    samples = [raw(row, *side) for row, side in enumerate(sides)]
    write(path, samples, page_size=MIN_PAGE_SIZE)
    beton = BetonFile(path)
    assert beton.page_size == 4 * MIN_PAGE_SIZE
    assert_page_rules(path)
    for row, sent in enumerate(samples):
        assert np.array_equal(beton.sample(row).data, sent.data)


def assert_page_rules(path: Path) -> None:
    content = path.read_bytes()
    _, num_fields, page_size, num_samples, table_ptr = HEADER.unpack_from(content)
    assert table_ptr % page_size == 0
    table = np.frombuffer(content, "<u8", offset=table_ptr).reshape(-1, 3)
    assert len(table) == num_samples
    used = np.zeros(table_ptr, dtype=np.bool_)
    used[: HEADER.size + num_fields * 1041 + num_samples * 24] = True
    for _, ptr, size in table.tolist():
        assert ptr // page_size == (ptr + size - 1) // page_size
        assert not used[ptr : ptr + size].any()
        used[ptr : ptr + size] = True
    assert not np.frombuffer(content, np.uint8, count=table_ptr)[~used].any()


@settings(max_examples=25, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=8),
    as_jpg=st.lists(st.booleans(), min_size=8, max_size=8),
    page_size=st.sampled_from([MIN_PAGE_SIZE, 2 * MIN_PAGE_SIZE]),
)
def test_any_samples_survive_the_round_trip(
    sides: list[tuple[int, int]],
    as_jpg: list[bool],
    page_size: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.beton"
    samples = [(jpg if as_jpg[row] else raw)(row, *side) for row, side in enumerate(sides)]
    write(path, samples, page_size=page_size)
    assert_page_rules(path)
    beton = BetonFile(path)
    assert np.array_equal(np.stack(beton.sizes(np.arange(len(sides))), axis=1), sides)
    for row, sent in enumerate(samples):
        found = beton.sample(row)
        assert (found.mode, found.data.tobytes()) == (sent.mode, sent.data.tobytes())
    path.unlink()


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows() -> Any:
        yield raw(0, 5, 5), 0
        raise DataError("the second image is broken")

    with pytest.raises(DataError, match="the second image is broken"):
        write_beton(tmp_path / "x.beton", rows(), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_samples", [1, 3])
def test_another_number_of_rows_than_announced_is_refused(num_samples: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected {num_samples} rows"):
        write_beton(tmp_path / "x.beton", [(raw(0, 5, 5), 0), (raw(1, 5, 5), 0)], num_samples)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "label", "error"),
    [
        (Sample("file", np.zeros(9, np.uint8), 0, 0), 0, ValueError),
        (Sample("raw", np.zeros(9, np.uint8), 2, 2), 0, ValueError),
        (Sample("raw", np.zeros(3, np.uint8), 1, 1), -1, ValueError),
        (Sample("jpg", np.zeros(9, np.uint8), 65536, 1), 0, DataError),
        (Sample("jpg", np.zeros(0, np.uint8), 1, 1), 0, DataError),
    ],
)
def test_a_row_that_the_format_cannot_hold_is_refused(
    sample: Sample, label: int, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match="row 0"):
        write_beton(tmp_path / "x.beton", [(sample, label)], 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page_size", [0, 1 << 20, 3 << 20, 1 << 32])
def test_a_page_size_that_stock_ffcv_refuses_is_refused(page_size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="page_size"):
        write(tmp_path / "x.beton", [raw(0, 5, 5)], page_size=page_size)


# Damage --------------------------------------------------------------------------------------------------


def header_with(**changes: int) -> Callable[[bytes], bytes]:
    """Overwrite numbers of the header."""
    names = ["version", "num_fields", "page_size", "num_samples", "alloc_table_ptr"]

    def damage(content: bytes) -> bytes:
        values = dict(zip(names, HEADER.unpack_from(content), strict=True)) | changes
        return HEADER.pack(*values.values()) + content[HEADER.size :]

    return damage


def bytes_at(offset: int, new: bytes) -> Callable[[bytes], bytes]:
    """Overwrite bytes; a negative offset counts from the end."""

    def damage(content: bytes) -> bytes:
        start = offset % len(content)
        return content[:start] + new + content[start + len(new) :]

    return damage


def moved(address: int) -> Callable[[bytes], bytes]:
    """Say in both places that the last image lies at `address`."""
    new = struct.pack("<Q", address)
    return lambda content: bytes_at(-16, new)(bytes_at(METADATA + 2 * 24 + 5, new)(content))


METADATA = 24 + 2 * 1041
DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("empty", lambda _: b""),
    ("text", lambda _: b"name,label\n" * 1000),
    ("short text", lambda _: b"hello"),
    ("zeros", lambda content: bytes(len(content))),
    ("ones", lambda content: b"\xff" * len(content)),
    ("a png", lambda _: b"\x89PNG\r\n\x1a\n" + bytes(5000)),
    *((f"cut to {size}", lambda content, size=size: content[:size]) for size in (23, 24, 1000, 2106, 2120)),
    ("cut in the pages", lambda content: content[: len(content) // 2]),
    ("cut in the table", lambda content: content[:-1]),
    ("trailing bytes", lambda content: content + b"x"),
    ("version 1", header_with(version=1)),
    ("version 3", header_with(version=3)),
    ("no field", header_with(num_fields=0)),
    ("one field", header_with(num_fields=1)),
    ("65535 fields", header_with(num_fields=65535)),
    ("page size 0", header_with(page_size=0)),
    ("page size 1", header_with(page_size=1)),
    ("page size 3 MiB", header_with(page_size=3 << 20)),
    ("no samples", header_with(num_samples=0)),
    ("2**40 samples", header_with(num_samples=2**40)),
    ("2**64-1 samples", header_with(num_samples=2**64 - 1)),
    ("samples whose size wraps to 0", header_with(num_samples=2**64 // 24 + 1)),
    ("no table", header_with(alloc_table_ptr=0)),
    ("table in the header", header_with(alloc_table_ptr=8)),
    ("table far behind the end", header_with(alloc_table_ptr=2**63)),
    ("table at the end", lambda content: header_with(alloc_table_ptr=len(content))(content)),
    ("unknown field type", bytes_at(24, b"\x09")),
    ("custom field type", bytes_at(24, b"\xff")),
    ("no image field", bytes_at(24, b"\x01")),
    ("no label field", bytes_at(24 + 1041, b"\x00")),
    ("image mode 2", bytes_at(METADATA, b"\x02")),
    ("width 0", bytes_at(METADATA + 1, b"\0\0")),
    ("height 0", bytes_at(METADATA + 3, b"\0\0")),
    ("raw image of another size", bytes_at(METADATA + 24 + 1, b"\x0b\0")),
    ("image address not in the table", bytes_at(METADATA + 5, struct.pack("<Q", 12345))),
    ("image address 2**64-1", bytes_at(METADATA + 5, b"\xff" * 8)),
    ("image in the metadata", moved(2000)),
    ("image behind the end", moved(2**63)),
    ("image across the end of the pages", lambda content: moved(len(content) - 100)(content)),
    ("negative label", bytes_at(METADATA + 16, struct.pack("<q", -1))),
    ("label 2**50", bytes_at(METADATA + 16, struct.pack("<q", 2**50))),
    ("allocation in the metadata", bytes_at(-16, struct.pack("<Q", 2000))),
    ("allocation behind the end", bytes_at(-16, struct.pack("<Q", 2**63))),
    ("allocation longer than the file", bytes_at(-8, struct.pack("<Q", 2**40))),
    ("allocation whose end wraps", bytes_at(-8, struct.pack("<Q", 2**64 - 8))),
]


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in DAMAGES])
def test_a_damaged_file_is_refused_by_name_and_without_large_memory(
    damage: Callable[[bytes], bytes], good: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.beton"
    path.write_bytes(damage(good.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as refused:
            BetonFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    message = str(refused.value)
    assert message.startswith(f"{path}: expected ")
    assert ", got " in message
    assert message.endswith("; is this a .beton file?")


@pytest.mark.parametrize("name", ["missing.beton", "."])
def test_a_path_that_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a readable file"):
        BetonFile(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(where=st.integers(0, METADATA + 72 + 72), value=st.integers(0, 255))
def test_no_single_byte_of_the_index_crashes_the_reader(
    where: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any one byte of header, descriptors, metadata or table: refused, or read within the file."""
    path = tmp_path_factory.getbasetemp() / "fuzz.beton"
    write(path, [raw(row, 3, 4) for row in range(3)], page_size=MIN_PAGE_SIZE)
    content = bytearray(path.read_bytes())
    end_of_metadata = METADATA + 72
    content[where if where < end_of_metadata else where - end_of_metadata - 72] = value
    path.write_bytes(content)
    try:
        beton = BetonFile(path)
    except DataError:
        return
    for row in range(len(beton)):
        assert beton.sample(row).data.size > 0


# The manifest --------------------------------------------------------------------------------------------


def manifest_of(beton: Path, **changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "num_samples": 3,
        "fingerprint": BetonFile(beton).fingerprint,
        "class_names": tuple(f"class {i}" for i in range(13)),
        "settings": {"encode": "passthrough", "max_resolution": None},
        "sources": ("a/1.jpg", "b/\udcff.jpg", "c/3.jpg"),
    }
    return Manifest(**(facts | changes))


def test_a_manifest_names_classes_and_sources(good: Path) -> None:
    manifest = manifest_of(good)
    write_manifest(good, manifest)
    assert read_manifest(good) == manifest
    beton = BetonFile(good)
    assert beton.class_names[12] == "class 12"
    assert beton.where(2) == f"{good}, row 2 (c/3.jpg)"
    assert beton.origin(1) == "b/\udcff.jpg"


def test_a_manifest_of_another_file_is_refused(good: Path) -> None:
    write_manifest(good, manifest_of(good, fingerprint="0123456789abcdef"))
    with pytest.raises(DataError, match="got 0123456789abcdef"):
        BetonFile(good)


def test_a_manifest_with_too_few_classes_is_refused(good: Path) -> None:
    write_manifest(good, manifest_of(good, class_names=("cat", "dog")))
    with pytest.raises(DataError, match="labels below 2"):
        BetonFile(good)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"version": 2}', '{"version": 3}', '{"version": 1, "num_samples": "3"}', "\udcff"],
)
def test_a_damaged_manifest_is_refused_by_name(text: str, good: Path) -> None:
    manifest_path(good).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"good\.beton\.json: expected"):
        BetonFile(good)


def test_a_damaged_manifest_does_not_hide_the_error_it_should_explain(good: Path) -> None:
    beton = BetonFile(good)
    manifest_path(good).write_text("{")
    assert beton.where(0) == f"{good}, row 0"


# Stock FFCV ----------------------------------------------------------------------------------------------


def stock_write(path: Path, fields: dict[str, Any], rows: Any) -> None:
    """Write with FFCV's writer, rows in order. It waits for ever when its worker dies: here that is an error."""
    from ffcv.writer import DatasetWriter

    def give_up(*_: Any) -> None:
        raise TimeoutError("stock FFCV's writer: expected it to finish within a minute; its worker has failed")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        writer = DatasetWriter(str(path), fields, page_size=MIN_PAGE_SIZE, num_workers=1)
        writer.from_indexed_dataset(rows, chunksize=3, shuffle_indices=False)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@ignore_ffcv_warnings
def test_the_stock_reader_sees_our_fields_labels_and_bytes(good: Path) -> None:
    pytest.importorskip("ffcv", reason=FFCV_REASON)
    from ffcv.reader import Reader

    reader = Reader(str(good))
    assert reader.field_names == ["image", "label"]
    assert reader.num_samples == 3
    assert reader.metadata["f1"].tolist() == [10, 11, 12]
    content = good.read_bytes()
    size_at = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    for row, sent in enumerate([jpg(0, 30, 40), raw(1, 20, 10), jpg(2, 9, 9)]):
        mode, width, height, ptr = reader.metadata["f0"][row].item()
        assert (("jpg", "raw")[mode], height, width) == (sent.mode, sent.height, sent.width)
        assert content[ptr : ptr + size_at[ptr]] == sent.data.tobytes()


@ignore_ffcv_warnings
@pytest.mark.parametrize("os_cache", [True, False], ids=["whole file", "page by page"])
def test_the_stock_loader_decodes_what_we_write(os_cache: bool, tmp_path: Path) -> None:
    """Pixel for pixel, from pages that grew on the way."""
    pytest.importorskip("ffcv", reason=FFCV_REASON)
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    path = tmp_path / "ours.beton"
    small = [(jpg if row % 2 else raw)(row, 700, 800) for row in range(5)]
    filler = Sample("jpg", np.concatenate([small[1].data, np.zeros(3 << 20, np.uint8)]), 700, 800)
    samples = [*small, filler, *small]
    write(path, samples, page_size=MIN_PAGE_SIZE)
    assert BetonFile(path).page_size == 2 * MIN_PAGE_SIZE
    loader = Loader(
        str(path),
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        drop_last=False,
        seed=0,  # without one it draws from numpy's global state
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    images: list[Any] = []
    labels: list[int] = []
    for batch_images, batch_labels in loader:
        images += [np.array(image) for image in batch_images]
        labels += np.array(batch_labels).ravel().tolist()
    assert labels == list(range(10, 10 + len(samples)))
    for image, sent in zip(images, samples, strict=True):
        # FFCV asks libjpeg-turbo for the fast transform, so the JPEGs are compared under the same one.
        fast = sent.mode == "jpg" and simplejpeg.decode_jpeg(sent.data, "RGB", fastdct=True)
        assert np.array_equal(image, decode_rgb(sent) if sent.mode == "raw" else fast)


class Pictures:
    """What the stock writer takes: (image, label) by index."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return picture(row, 300 + row, 400 - row), 7 * row


@ignore_ffcv_warnings
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_we_read_what_the_stock_writer_wrote(mode: str, tmp_path: Path) -> None:
    """Over several pages."""
    pytest.importorskip("ffcv", reason=FFCV_REASON)
    from ffcv.fields import IntField, RGBImageField

    path, pictures = tmp_path / "stock.beton", Pictures(20)
    fields = {"picture": RGBImageField(write_mode=mode, jpeg_quality=95), "class": IntField()}
    stock_write(path, fields, pictures)
    beton = BetonFile(path)
    assert beton.labels.tolist() == [7 * row for row in range(20)]
    if mode == "raw":
        assert path.stat().st_size > 4 * MIN_PAGE_SIZE
    heights, widths = beton.sizes(np.arange(20))
    for row in range(20):
        sent, found = pictures[row][0], beton.sample(row)
        assert found.mode == mode
        assert (heights[row], widths[row]) == sent.shape[:2]
        difference = np.abs(decode_rgb(found).astype(int) - sent)
        assert difference.max() == 0 if mode == "raw" else difference.mean() < 4


@ignore_ffcv_warnings
def test_other_fields_around_image_and_label_are_stepped_over(tmp_path: Path) -> None:
    """Empty values among them, which have an address but no bytes."""
    pytest.importorskip("ffcv", reason=FFCV_REASON)
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, RGBImageField

    class Rows:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> tuple[Any, ...]:
            blob = np.arange(10 * (row % 2), dtype=np.uint8)
            return 0.5 * row, blob, picture(row, 30, 40), {"row": int(row)}, 3 * row, 99

    path = tmp_path / "more.beton"
    fields = {
        "weight": FloatField(),
        "blob": BytesField(),
        "image": RGBImageField(write_mode="raw"),
        "note": JSONField(),
        "label": IntField(),
        "other": IntField(),
    }
    stock_write(path, fields, Rows())
    beton = BetonFile(path)
    assert beton.labels.tolist() == [0, 3, 6, 9]
    for row in range(4):
        assert np.array_equal(decode_rgb(beton.sample(row)), picture(row, 30, 40))
