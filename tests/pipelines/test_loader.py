"""The loader: the plan's batches, bit for bit, whatever the threads; errors end it and nothing hangs it."""

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
import torch

from fasttht.pipelines import DataError
from fasttht.pipelines.decode_turbo import crop_resize_into, decode_rgb, resize_center_into
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.plan import Augment, EpochPlan, Index
from fasttht.pipelines.samples import Sample

SIZE = 12
NUM = 41
T = TypeVar("T")


class MemorySamples:
    """Images in memory, raw and JPEG in turn, every one of another size; some rows can be broken."""

    class_names: tuple[str, ...] = ()

    def __init__(self, num: int = NUM, fingerprint: str = "abc") -> None:
        rng = np.random.default_rng(num)
        self.path = Path("memory")
        self.labels: Index = rng.integers(0, 1000, num)
        self.fingerprint = fingerprint
        self.broken: dict[int, Sample | Exception] = {}
        self.num_read = 0
        self._samples = [self._make(rng, row) for row in range(num)]

    @staticmethod
    def _make(rng: np.random.Generator, row: int) -> Sample:
        height, width = (int(side) for side in rng.integers(5, 40, 2))
        pixels: npt.NDArray[np.uint8] = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if row % 2:
            return Sample("raw", pixels.reshape(-1), height, width)
        data = simplejpeg.encode_jpeg(pixels, 90)
        return Sample("jpg", np.frombuffer(data, np.uint8), height, width)

    def __len__(self) -> int:
        return len(self._samples)

    def sizes(self, index: Index) -> tuple[Index, Index]:
        found = np.array([(self._samples[i].height, self._samples[i].width) for i in index], dtype=np.int64)
        return found.reshape(-1, 2)[:, 0], found.reshape(-1, 2)[:, 1]

    def sample(self, i: int) -> Sample:
        self.num_read += 1
        found = self.broken.get(i, self._samples[i])
        if isinstance(found, Exception):
            raise found
        return found

    def where(self, i: int) -> str:
        return f"memory, row {i}"

    def origin(self, i: int) -> str:
        return str(i)


def plan_of(samples: MemorySamples, batch_size: int = 8, **options: Any) -> EpochPlan:
    defaults: dict[str, Any] = {"seed": 3, "augment": Augment()}
    return EpochPlan(num_samples=len(samples), batch_size=batch_size, **{**defaults, **options})


def make_loader(samples: MemorySamples, plan: EpochPlan | None = None, **options: Any) -> Loader:
    return Loader(samples, plan or plan_of(samples), img_size=SIZE, **options)


def naive_epoch(samples: MemorySamples, plan: EpochPlan) -> Iterator[Batch]:
    """What the loader must yield: one image after the other, in one thread."""
    for step in range(plan.num_steps):
        index = plan.batch(plan.order(), step)
        windows, flips = plan.windows(index, *samples.sizes(index)), plan.flips(index)
        x = torch.empty(len(index), SIZE, SIZE, 3, dtype=torch.uint8)
        for i, row in enumerate(index.tolist()):
            top, left, height, width = windows[i].tolist()
            pixels = decode_rgb(samples.sample(row))
            if plan.augment is None:
                resize_center_into(pixels, round(SIZE / plan.crop_pct), x[i].numpy())
            else:
                crop_resize_into(pixels, (top, left, height, width), bool(flips[i]), x[i].numpy())
        yield Batch(x.permute(0, 3, 1, 2), torch.tensor(samples.labels[index]), torch.tensor(index))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.index.tolist() for batch in found] == [batch.index.tolist() for batch in expected]
    assert [batch.y.tolist() for batch in found] == [batch.y.tolist() for batch in expected]
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.x, two.x)


def rest(loader: Loader, num_epochs: int) -> Generator[Batch, None, None]:
    while loader.epoch < num_epochs:
        yield from loader


def within(seconds: float, function: Callable[[], T]) -> T:
    """Run in a thread, so that a hang fails the test instead of stopping the suite."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"hung for {seconds} s"
    if errors:
        raise errors[0]
    return results[0]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fasttht")]


@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 8, 17, 41])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_equal_a_naive_loop_bit_for_bit(workers: int, batch_size: int, prefetch: int) -> None:
    """17 and 41 are more than one task's share of a batch; both epochs, because the second starts by itself."""
    samples = MemorySamples()
    plan = plan_of(samples, batch_size)
    loader = make_loader(samples, plan, workers=workers, prefetch=prefetch)
    for epoch in range(2):
        found = within(30, lambda: list(loader))
        assert_same(found, list(naive_epoch(samples, replace(plan, epoch=epoch))))
        assert loader.epoch == epoch + 1
        assert loader.step == 0
        if epoch == 0:
            first = found
    assert [batch.index.tolist() for batch in first] != [batch.index.tolist() for batch in found]


@pytest.mark.parametrize("options", [{"drop_last": True}, {"rank": 1, "world": 3}, {"augment": None}], ids=str)
def test_other_plans_equal_a_naive_loop_as_well(options: dict[str, Any]) -> None:
    samples = MemorySamples()
    plan = plan_of(samples, **options)
    assert_same(list(make_loader(samples, plan, workers=2)), list(naive_epoch(samples, plan)))


def test_batch_has_the_types_and_strides_of_its_contract() -> None:
    samples = MemorySamples()
    batches = list(make_loader(samples))
    assert [len(batch.index) for batch in batches] == [8, 8, 8, 8, 8, 1]  # the last one is short
    for batch in batches:
        assert batch.x.shape == (len(batch.index), 3, SIZE, SIZE)
        assert batch.x.dtype == torch.uint8
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert batch.x.stride()[1:] == (1, SIZE * 3, 3)
        assert (batch.y.dtype, batch.index.dtype) == (torch.int64, torch.int64)
        assert batch.y.shape == batch.index.shape
        assert batch.y.tolist() == samples.labels[batch.index.numpy()].tolist()


def test_a_batch_is_the_consumers_to_keep_and_to_change() -> None:
    samples = MemorySamples()
    loader = make_loader(samples, prefetch=1)
    for batch, expected in zip(loader, naive_epoch(samples, loader.plan), strict=True):
        assert torch.equal(batch.x, expected.x)
        for tensor in (batch.x, batch.y, batch.index):
            tensor.zero_()
    assert samples.labels.any()
    assert_same(list(loader), list(naive_epoch(samples, replace(plan_of(samples), epoch=1))))


@pytest.mark.parametrize("batch_size", [1, 8, 40, 41, 100])
def test_evaluation_counts_every_image_once(batch_size: int) -> None:
    samples = MemorySamples()
    loader = make_loader(samples, plan_of(samples, batch_size, augment=None), workers=2)
    for _ in range(2):  # every pass is the same
        assert [row for batch in loader for row in batch.index.tolist()] == list(range(NUM))


@pytest.mark.parametrize("drop_last", [False, True])
def test_resume_at_every_step_equals_the_uninterrupted_run(drop_last: bool) -> None:
    samples = MemorySamples(23)
    plan = plan_of(samples, 5, drop_last=drop_last)
    whole = list(rest(make_loader(samples, plan), 2))
    assert len(whole) == 2 * plan.num_steps
    for num_taken in range(len(whole) + 1):
        first = make_loader(samples, plan, prefetch=3)
        batches = rest(first, 2)
        for _ in range(num_taken):
            next(batches)
        # Taken while the producer is ahead; through JSON, as a checkpoint would.
        state = json.loads(json.dumps(first.state_dict()))
        batches.close()
        second = make_loader(samples, plan)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert_same(list(rest(second, 2)), whole[num_taken:])


def test_position_at_the_end_of_an_epoch_is_the_same_before_and_after_the_loop_ends() -> None:
    """Saved inside the loop, at the last batch, or behind it: the next batch is the next epoch's first."""
    samples = MemorySamples(23)
    inside, behind = make_loader(samples), make_loader(samples)
    for _ in inside:
        if inside.step == inside.plan.num_steps:
            state_inside = inside.state_dict()
    list(behind)
    assert (state_inside["epoch"], state_inside["step"]) == (0, 3)
    assert (behind.state_dict()["epoch"], behind.state_dict()["step"]) == (1, 0)
    expected = list(naive_epoch(samples, plan_of(samples, epoch=1)))
    for state in (state_inside, behind.state_dict()):
        loader = make_loader(samples)
        loader.load_state_dict(state)
        assert_same(list(rest(loader, 2)), expected)


def test_an_epoch_left_early_is_continued_where_it_was_left() -> None:
    samples = MemorySamples()
    loader = make_loader(samples, workers=2)
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == 2:
            break
    assert (loader.epoch, loader.step) == (0, 2)
    assert_same([*found, *loader], list(naive_epoch(samples, plan_of(samples))))


@pytest.mark.parametrize("key", ["version", "seed", "batch_size", "fingerprint"])
def test_a_position_of_another_run_is_refused(key: str) -> None:
    samples = MemorySamples()
    others = {
        "seed": make_loader(samples, plan_of(samples, seed=4)),
        "batch_size": make_loader(samples, plan_of(samples, 9)),
        "fingerprint": make_loader(MemorySamples(fingerprint="other")),
    }
    state = others.get(key, make_loader(samples)).state_dict() | {"epoch": 1, "step": 2}
    if key == "version":
        state["version"] += 1
    loader = make_loader(samples)
    before = loader.state_dict()
    with pytest.raises(DataError, match=rf"expected {key} {before[key]}, got {state[key]}"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before
    with pytest.raises(DataError, match=f"expected {key}"):
        loader.load_state_dict({name: value for name, value in before.items() if name != key})


TRUNCATED = Sample("jpg", np.frombuffer(simplejpeg.encode_jpeg(np.zeros((30, 30, 3), np.uint8)), np.uint8)[:-9], 30, 30)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_corrupt_sample_is_an_error_in_the_consumer_that_names_it(
    workers: int, prefetch: int, no_loader_threads: Callable[[], None]
) -> None:
    samples = MemorySamples()
    loader = make_loader(samples, workers=workers, prefetch=prefetch)
    row = int(loader.plan.order()[3 * 8 + 5])  # in the fourth batch
    samples.broken[row] = TRUNCATED
    found: list[Batch] = []
    with pytest.raises(DataError, match=rf"memory, row {row}: expected a whole JPEG, got .*; remove or repair it"):
        within(30, lambda: found.extend(loader))
    samples.broken.clear()
    assert_same(found, list(naive_epoch(samples, loader.plan))[:3])
    loader.close()
    no_loader_threads()
    assert_same(within(30, lambda: list(loader)), list(naive_epoch(samples, plan_of(samples)))[3:])  # repaired


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyError("a bug"), MemoryError()], ids=repr)
def test_any_exception_in_a_thread_reaches_the_consumer(
    error: Exception, no_loader_threads: Callable[[], None]
) -> None:
    samples = MemorySamples()
    samples.broken[7] = error
    loader = make_loader(samples, workers=2)
    with pytest.raises(type(error)) as caught:
        within(30, lambda: list(loader))
    assert caught.value is error
    loader.close()
    no_loader_threads()


def test_an_error_in_the_plan_reaches_the_consumer() -> None:
    samples = MemorySamples()
    loader = make_loader(samples, EpochPlan(num_samples=NUM + 1, batch_size=8, augment=Augment()))
    with pytest.raises(IndexError):
        within(30, lambda: list(loader))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_leaving_the_loop_early_leaves_no_thread(
    workers: int, prefetch: int, no_loader_threads: Callable[[], None]
) -> None:
    """Left while the producer waits for room in a full queue, which is where it would stay."""
    samples = MemorySamples()
    loader = make_loader(samples, workers=workers, prefetch=prefetch)

    def leave() -> None:
        for _ in loader:
            deadline = time.monotonic() + 20
            # Delivered, queued, and the two that the producer holds in its hands.
            while samples.num_read < min(8 * (prefetch + 3), NUM) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert loader_threads() != []
            break

    within(30, leave)
    assert samples.num_read >= min(8 * (prefetch + 3), NUM)
    assert samples.num_read < NUM or prefetch == 3
    loader.close()
    no_loader_threads()


def test_the_producer_stays_within_its_prefetch() -> None:
    samples = MemorySamples()
    batches = iter(make_loader(samples, plan_of(samples, 1), prefetch=2))
    next(batches)
    time.sleep(0.2)  # an idle producer would by now have read everything
    assert samples.num_read <= 1 + 2 + 2  # delivered, queued, in the producer's hands
    assert [len(batch.index) for batch in batches] == [1] * (NUM - 1)


def test_an_unused_iterator_starts_nothing(no_loader_threads: Callable[[], None]) -> None:
    no_loader_threads()  # those of the tests before have ended
    iter(make_loader(MemorySamples()))
    assert loader_threads() == []


@pytest.mark.parametrize("shape", [(1, 1), (60, 60)])
def test_a_sample_of_another_size_than_announced_is_an_error_that_names_it(shape: tuple[int, int]) -> None:
    samples = MemorySamples()
    row = int(plan_of(samples).order()[0])
    data = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((*shape, 3), np.uint8)), np.uint8)
    samples.broken[row] = Sample("jpg", data, *shape)
    with pytest.raises(DataError, match=f"memory, row {row}"):
        within(30, lambda: list(make_loader(samples)))
