"""A loader that survives: bad samples, stalls, kills at any step on any rank, and hundreds of openings."""

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from fasttht.pipelines import DataError, ResourceError
from fasttht.pipelines.backends import why_not
from fasttht.pipelines.beton import MIN_PAGE_SIZE, BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.plan import Augment, EpochPlan, Index
from fasttht.pipelines.samples import Paged, Sample

SIZE = 9


class Colours:
    """One plain colour per row, so that an image says which row it is; some rows can be made bad."""

    class_names: tuple[str, ...] = ()
    fingerprint = "colours"
    path = Path("colours")

    def __init__(self, num: int = 30, bad: tuple[int, ...] = ()) -> None:
        self.labels: Index = np.arange(num) % 7
        self.bad = bad

    def __len__(self) -> int:
        return len(self.labels)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        return 10 + index % 5, 12 + index % 3

    def sample(self, i: int) -> Sample:
        if i in self.bad:
            raise DataError("expected bytes, got none")
        height, width = 10 + i % 5, 12 + i % 3
        return Sample("raw", np.full(height * width * 3, i, dtype=np.uint8), height, width)

    def where(self, i: int) -> str:
        return f"colours, row {i}"

    def origin(self, i: int) -> str:
        return str(i)


def loader_of(samples: Any, batch_size: int = 4, **options: Any) -> Loader:
    plan = {name: options.pop(name) for name in list(options) if name in EpochPlan.__dataclass_fields__}
    defaults = {"num_samples": len(samples), "batch_size": batch_size, "augment": Augment(), "seed": 3}
    return Loader(samples, EpochPlan(**{**defaults, **plan}), img_size=SIZE, **options)


def rows(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.index.tolist()]


# -- bad samples -------------------------------------------------------------------------------------------------------


def test_an_image_matches_its_row_and_label_also_where_it_stands_for_a_bad_one() -> None:
    reports: list[str] = []
    samples = Colours(bad=(2, 11, 29))
    with closing(loader_of(samples, on_bad="replace", report=reports.append, workers=2)) as loader:
        batches = list(loader)
    for batch in batches:
        for row, label, image in zip(batch.index.tolist(), batch.y.tolist(), batch.x, strict=True):
            assert (image == row).all()
            assert label == samples.labels[row]
    order = loader_of(samples).plan.order().tolist()
    shown = rows(batches)
    assert len(shown) == 30
    changed = [position for position in range(30) if shown[position] != order[position]]
    assert sorted(order[position] for position in changed) == [2, 11, 29]
    assert not {2, 11, 29} & set(shown)
    for position in changed:
        said = f"row {order[position]}: expected bytes, got none; row {shown[position]} is shown in its place"
        assert any(said in report for report in reports)
    assert len(reports) == 3
    assert loader.bad_rows == {2, 11, 29}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_replacements_do_not_depend_on_ranks_or_workers(world: int, workers: int) -> None:
    samples = Colours(bad=(2, 11, 29))
    whole = list(loader_of(samples, on_bad="replace"))
    ranks = [list(loader_of(samples, on_bad="replace", rank=r, world=world, workers=workers)) for r in range(world)]
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in ranks]
        assert torch.cat([part.index for part in parts]).tolist() == batch.index.tolist()
        assert torch.equal(torch.cat([part.x for part in parts]), batch.x)


def test_another_epoch_shows_another_replacement() -> None:
    samples = Colours(bad=(2,))
    shown = set()
    for epoch in range(6):
        order = loader_of(samples, epoch=epoch).plan.order().tolist()
        shown.add(rows(list(loader_of(samples, epoch=epoch, on_bad="replace")))[order.index(2)])
    assert len(shown) > 1


def test_more_bad_samples_than_allowed_are_an_error_and_each_is_reported_once() -> None:
    reports: list[str] = []
    loader = loader_of(Colours(bad=(2, 11, 29)), on_bad="replace", max_bad=2, report=reports.append)
    with pytest.raises(DataError, match=r"row \d+: .*; expected at most 2 bad samples, got one more"):
        list(loader)
    assert len(reports) == 2
    loader = loader_of(Colours(bad=(2, 11, 29)), on_bad="replace", max_bad=3, report=reports.append)
    for _ in range(3):
        list(loader)
    assert len(reports) == 2 + 3


def test_a_set_with_hardly_a_good_sample_left_is_an_error() -> None:
    loader = loader_of(Colours(bad=tuple(range(1, 30))), on_bad="replace")
    with pytest.raises(DataError, match=r"expected a good sample to show in its place, got 16 bad ones"):
        list(loader)


def test_evaluation_never_replaces() -> None:
    loader = loader_of(Colours(bad=(5,)), on_bad="replace", augment=None)
    with pytest.raises(DataError, match=r"colours, row 5: .*; remove or repair it"):
        list(loader)


def test_what_was_bad_survives_a_resume() -> None:
    samples = Colours(bad=(2, 11, 29))
    whole = loader_of(samples, on_bad="replace")
    expected = list(whole)
    for num_taken in range(len(expected)):
        reports: list[str] = []
        first = loader_of(samples, on_bad="replace")
        batches = iter(first)
        for _ in range(num_taken):
            next(batches)
        state = json.loads(json.dumps(first.state_dict()))
        assert state["bad_rows"] == sorted(set(samples.bad) & set(first.plan.order()[: 4 * num_taken].tolist()))
        second = loader_of(samples, on_bad="replace", report=reports.append)
        second.load_state_dict(state)
        assert rows(list(second)) == rows(expected[num_taken:])
        assert second.bad_rows == whole.bad_rows
        assert len(reports) == 3 - len(state["bad_rows"])


# -- stalls ------------------------------------------------------------------------------------------------------------


class Stuck(Colours):
    """One row whose read never returns, until the test lets it."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.let_go = threading.Event()

    def sizes(self, index: Index) -> tuple[Index, Index]:
        if self.stage == "plan" and 13 in index:
            self.let_go.wait()
        return super().sizes(index)

    def sample(self, i: int) -> Sample:
        if self.stage == "read" and i == 13:
            self.let_go.wait()
        return super().sample(i)


@pytest.mark.parametrize(
    ("stage", "said"),
    [("read", r"in read of colours, row 13 \(fasttht-decode-\d\)"), ("plan", r"in plan \(fasttht-loader\)")],
)
def test_a_stall_names_the_stage_and_the_sample_and_ends(
    stage: str, said: str, monkeypatch: pytest.MonkeyPatch, no_loader_threads: Callable[[], None]
) -> None:
    monkeypatch.setattr("fasttht.pipelines.loader._END_S", 0.2)
    samples = Stuck(stage)
    loader = loader_of(samples, workers=2, stall_s=0.5)
    found = []
    with pytest.raises(ResourceError, match=rf"expected a batch within 0.5 s, got none; stuck for \d s {said}"):
        found.extend(list(loader))
    assert 13 not in rows(found)
    samples.let_go.set()
    loader.close()
    no_loader_threads()


def test_the_watchdog_does_not_wait_for_the_disk_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a row may have to be read from there."""
    monkeypatch.setattr("fasttht.pipelines.loader._END_S", 0.2)
    samples = Stuck("read")
    monkeypatch.setattr(Stuck, "where", lambda self, row: self.let_go.wait() and "late")
    rescue = threading.Timer(20, samples.let_go.set)
    rescue.start()
    with (
        closing(loader_of(samples, stall_s=0.5)) as loader,
        pytest.raises(ResourceError, match=r"in read of colours, row 13 \(fasttht-decode-0\)"),
    ):
        list(loader)
    assert not samples.let_go.is_set()
    rescue.cancel()
    samples.let_go.set()


@pytest.mark.parametrize("how", ["close", "another"])
def test_an_iterator_that_was_closed_or_replaced_says_so_at_once(how: str) -> None:
    loader = loader_of(Colours(), stall_s=20)
    first = iter(loader)
    next(first)
    if how == "close":
        loader.close()
        second = iter(loader)
    else:
        second = iter(loader)
    shown = rows([next(second)])
    with pytest.raises(ValueError, match="expected an iterator in use, got one that was closed or replaced"):
        next(first)
    assert shown + rows(list(second)) == loader_of(Colours()).plan.order().tolist()[4:]
    loader.close()


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"prefetch": 0}])
def test_no_worker_and_no_bound_on_the_batches_ahead_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least one worker and one batch ahead"):
        loader_of(Colours(), **wrong)


# -- files that change -------------------------------------------------------------------------------------------------

CUT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_loader_faults as shared
from fasttht.pipelines import DataError
loader = shared.loader_of(shared.BetonFile(Path(sys.argv[1])), 4, decoder=sys.argv[3], on_bad=sys.argv[4])
batches = iter(loader)
next(batches)
os.truncate(sys.argv[1], int(sys.argv[2]))
try:
    list(batches)
    list(loader)
except DataError as error:
    print(error)
else:
    print(loader.bad_rows and "the file was cut: " + loader.samples.where(0))
"""


@pytest.mark.parametrize(
    ("size", "on_bad", "decoder"),
    [(0, "error", "turbo"), (5_000_000, "replace", "turbo"), (5_000_000, "error", "dali-cpu")],
)
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(
    size: int, on_bad: str, decoder: str, tmp_path: Path
) -> None:
    """A mapped page that is no longer there would end the process with SIGBUS."""
    if (reason := why_not(decoder, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    path = large_file(tmp_path / "large.beton")
    done = subprocess.run(
        [sys.executable, "-c", CUT.format(folder=str(Path(__file__).parent)), path, str(size), decoder, on_bad],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert "the file was cut" in done.stdout


def test_a_disk_that_fails_makes_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = BetonFile(write_photos(tmp_path / "set.beton", 24))

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with closing(loader_of(samples)) as loader, pytest.raises(DataError, match=r"row \d+: .* got Input/output error"):
        list(loader)
    with pytest.raises(DataError, match=r"set\.beton: expected .* got Input/output error; check the disk"):
        BetonFile(samples.path)


# -- many openings -----------------------------------------------------------------------------------------------------


def resources() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("how", ["to the end", "left early", "forgotten"])
def test_two_hundred_openings_leave_threads_files_and_memory_flat(
    how: str, tmp_path: Path, no_loader_threads: Callable[[], None]
) -> None:
    path = write_photos(tmp_path / "set.beton", 24)

    def once() -> None:
        loader = loader_of(BetonFile(path), 8, workers=2)
        batches = iter(loader)
        next(batches)
        if how == "to the end":
            list(batches)
        if how != "forgotten":
            loader.close()

    def settled() -> tuple[int, int]:
        gc.collect()
        no_loader_threads()
        return resources()

    for _ in range(5):
        once()
    before = settled()
    tracemalloc.start()
    try:
        once()
        first = settled() and tracemalloc.get_traced_memory()[0]
        for _ in range(194):
            once()
        last = settled() and tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert resources() == before
    # numpy tells tracemalloc of its buffers: one batch kept per opening would be 1.9 kB x 8 x 194, three megabytes.
    assert last - first < 100_000


def write_photos(path: Path, num: int, *, page_size: int = MIN_PAGE_SIZE, side: int = 20) -> Path:
    samples = []
    for row in range(num):
        pixels = np.full((side, side, 3), row % 256, dtype=np.uint8)
        data = np.frombuffer(simplejpeg.encode_jpeg(pixels), dtype=np.uint8)
        samples.append((Sample("jpg", data, side, side), row % 3))
    write_beton(path, samples, num, page_size=page_size)
    return path


def test_memory_is_used_again_only_when_the_last_view_of_it_is_gone() -> None:
    memory = HostMemory(SIZE, pinned=False)
    first = memory.take(4)
    address, view = first.data_ptr(), first.permute(0, 3, 1, 2)[2:3]
    del first
    second = memory.take(4)
    assert second.data_ptr() != address
    view.fill_(7)
    assert second.shape == (4, SIZE, SIZE, 3)
    del view
    third = memory.take(3)  # a shorter batch fits as well
    assert third.data_ptr() == address
    assert third.is_contiguous()
    larger = memory.take(9)
    assert larger.data_ptr() not in (address, second.data_ptr())


def test_a_running_loader_uses_few_slots() -> None:
    """Delivered, queued, waited for and under way: 1 + 2 + 2; and each thread may hold one that it has finished."""
    addresses = set()
    for batch in loader_of(Colours(), 1, prefetch=2, workers=2):
        addresses.add(batch.x.data_ptr())
        del batch
    assert len(addresses) <= 1 + 2 + 2 + 2


def test_a_forgotten_loader_dies(no_loader_threads: Callable[[], None]) -> None:
    loader = loader_of(Colours())
    next(iter(loader))
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
    no_loader_threads()


# -- ranks and orders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_resume_at_every_step_on_every_rank_continues_the_one_global_order(world: int, drop_last: bool) -> None:
    samples = Colours(23)
    whole = list(loader_of(samples, 5, drop_last=drop_last))
    assert len(set(rows(whole))) == len(rows(whole)) == (20 if drop_last else 23)
    for num_taken in range(len(whole) + 1):
        shown: list[list[Batch]] = []
        for rank in range(world):
            options: dict[str, Any] = {"rank": rank, "world": world, "drop_last": drop_last}
            first = loader_of(samples, 5, **options)
            batches = iter(first)
            begun = [next(batches) for _ in range(num_taken)]
            second = loader_of(samples, 5, **options)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            first.close()
            shown.append(begun + list(second))
        for step, batch in enumerate(whole):
            parts = [batches[step] for batches in shown]
            assert rows(parts) == batch.index.tolist()
            assert torch.equal(torch.cat([part.x for part in parts]), batch.x)


def test_a_change_of_the_world_size_in_the_middle_of_an_epoch_keeps_the_order() -> None:
    samples = Colours(23)
    whole = list(loader_of(samples, 5))
    first = loader_of(samples, 5, rank=1, world=2)
    next(iter(first))
    parts = []
    for rank in range(3):
        loader = loader_of(samples, 5, rank=rank, world=3)
        loader.load_state_dict(first.state_dict())
        parts.append(list(loader))
    for step, batch in enumerate(whole[1:]):
        assert rows([batches[step] for batches in parts]) == batch.index.tolist()


class Watched(BetonFile):
    """A file that notes which pages are asked for, and when."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[int] = []
        self.late: list[int] = []

    def read_ahead(self, pages: Any) -> None:
        wanted = list(pages)
        self.asked += wanted
        super().read_ahead(wanted)

    def sample(self, i: int) -> Sample:
        if int(self.pages[i]) not in self.asked:
            self.late.append(i)
        return super().sample(i)


def test_the_paged_order_asks_for_every_page_once_before_it_is_read(tmp_path: Path) -> None:
    samples = Watched(large_file(tmp_path / "large.beton"))
    assert isinstance(samples, Paged)
    assert len(set(samples.pages.tolist())) > 3
    loader = loader_of(samples, 4, pages=samples.pages)
    assert sorted(rows(list(loader))) == list(range(len(samples)))
    assert sorted(samples.asked) == sorted(set(samples.pages.tolist()))
    assert samples.late == []
    samples.asked.clear()
    loader_of(samples, 4)
    assert samples.asked == []


def test_pages_say_where_in_the_file_a_row_lies(tmp_path: Path) -> None:
    samples = BetonFile(large_file(tmp_path / "large.beton"))
    content = samples.path.read_bytes()
    for row, page in enumerate(samples.pages.tolist()):
        inside = content[page * samples.page_size : (page + 1) * samples.page_size]
        assert samples.sample(row).data.tobytes() in inside


def large_file(path: Path) -> Path:
    """Raw images of 480 kB, four to a page."""
    rng = np.random.default_rng(0)

    def images() -> Iterator[tuple[Sample, int]]:
        for row in range(18):
            yield Sample("raw", rng.integers(0, 256, 400 * 400 * 3, dtype=np.uint8), 400, 400), row

    write_beton(path, images(), 18, page_size=MIN_PAGE_SIZE)
    return path


def test_resume_in_the_paged_order(tmp_path: Path) -> None:
    samples = BetonFile(large_file(tmp_path / "large.beton"))
    whole = list(loader_of(samples, 5, pages=samples.pages))
    for num_taken in range(len(whole) + 1):
        loader = loader_of(samples, 5, pages=samples.pages)
        loader.load_state_dict(loader.state_dict() | {"step": num_taken})
        assert rows(list(loader)) == rows(whole[num_taken:])
    assert rows(list(replace_epoch(loader_of(samples, 5, pages=samples.pages), 1))) != rows(whole)


def test_a_position_in_another_order_is_refused(tmp_path: Path) -> None:
    samples = BetonFile(large_file(tmp_path / "large.beton"))
    paged, shuffled = loader_of(samples, 5, pages=samples.pages), loader_of(samples, 5)
    with pytest.raises(DataError, match="loader state: expected order random, got paged"):
        shuffled.load_state_dict(paged.state_dict())
    older = {key: value for key, value in paged.state_dict().items() if key != "order"}
    paged.load_state_dict(older)


def replace_epoch(loader: Loader, epoch: int) -> Loader:
    loader.plan = replace(loader.plan, epoch=epoch)
    return loader
