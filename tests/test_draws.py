"""Every random number of a run: one hash, stated three times (numpy, torch, and Python integers here)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from fasttht.kernels import draws
from fasttht.kernels.draws import draw_rows, draw_start, draw_target
from fasttht.pipelines import plan

WORD = 2**64 - 1
COUNTERS: dict[str, int] = {"seed": 7, "epoch": 3, "step": 11}
words = st.integers(-(2**63), 2**64 - 1)
indices = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)


class SplitMix64:
    """The published generator, on unbounded Python integers."""

    def __init__(self, seed: int) -> None:
        self.state = seed & WORD

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & WORD
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)


def python_key(*counters: int) -> int:
    key = 0
    for word in counters:
        key = SplitMix64(key ^ (word & WORD)).next()
    return key


def unsigned(words: Tensor) -> list[int]:
    return [word & WORD for word in words.flatten().tolist()]


def images(rows: int, channels: int = 3, height: int = 9, width: int = 5, **options: Any) -> Tensor:
    return torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(rows), **options)


def fixed(value: float, rows: int, side: int) -> Tensor:
    return torch.full((rows, 3, side, side), value, dtype=torch.float64)


def test_elements_are_the_published_outputs_of_splitmix64() -> None:
    """The outputs for seed 1234567 are Rosetta Code's."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    bits = draws.draw_bits(torch.tensor([1234567]), torch.arange(5))
    assert unsigned(bits) == published
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(5)] == published


@given(stream=words, seed=words, epoch=words, step=words, index=indices, num_elements=st.integers(1, 6))
@settings(deadline=None)
def test_numpy_and_torch_and_python_integers_hash_alike(
    stream: int, seed: int, epoch: int, step: int, index: list[int], num_elements: int
) -> None:
    counters = (stream, seed, epoch, step)
    keys = [python_key(*counters, i) for i in index]
    of_numpy = plan.hash_rows(*counters, np.array(index, dtype=np.int64))
    of_torch = draws.row_keys(*counters, torch.tensor(index))
    assert of_numpy.tolist() == keys
    assert unsigned(of_torch) == keys
    expected = []
    for key in keys:
        generator = SplitMix64(key)
        expected.append([(generator.next() >> 40) / 2**24 for _ in range(num_elements)])
    uniforms = draws.draw_uniform(of_torch[:, None], torch.arange(num_elements))
    assert uniforms.dtype == torch.float32
    assert uniforms.tolist() == expected  # float32 to float is exact, so these are the bits
    assert plan.uniforms(of_numpy, num_elements).tolist() == expected


def test_every_counter_changes_the_key() -> None:
    base = [1, 2, 3, 4, 5]
    changed = [[value + (i == j) for j, value in enumerate(base)] for i in range(5)]
    swapped = [[2, 1, 3, 4, 5], [1, 2, 3, 5, 4]]  # the hash is a chain, not a sum
    keys = [
        plan.hash_rows(stream, seed, epoch, step, np.array([row])).item()
        for stream, seed, epoch, step, row in [base, *changed, *swapped]
    ]
    assert len(set(keys)) == len(keys)


def test_streams_of_all_purposes_differ() -> None:
    streams = [getattr(module, name) for module in (plan, draws) for name in dir(module) if "STREAM_" in name]
    assert len(streams) == 9
    assert len(set(streams)) == 9


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start_is_the_image_plus_the_noise_of_its_row(
    device: torch.device, dtype: torch.dtype, channels_last: bool
) -> None:
    """The same bits on every device and in both layouts: an odd shape against numpy."""
    eps, x = 16 / 255, images(3, 3, 17, 23, dtype=dtype)
    index = [5, 2**40, 0]
    keys = plan.hash_rows(draws.STREAM_START, **COUNTERS, index=np.array(index))
    noise = plan.uniforms(keys, 3 * 17 * 23).reshape(3, 3, 17, 23) * 2 - 1
    clean, radius = x.numpy(), np.array(eps).astype(x.numpy().dtype)
    low, high = np.maximum(clean - radius, 0), np.minimum(clean + radius, 1)
    expected = np.clip(clean + noise.astype(clean.dtype) * radius, low, high)
    sent = x.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    start = draw_start(sent, torch.tensor(index, device=device), eps=eps, clean_prob=0, **COUNTERS)
    assert start.dtype == dtype
    assert start.stride() == sent.stride()
    assert np.array_equal(start.cpu().numpy(), expected)
    assert np.array_equal(sent.cpu().numpy(), clean)  # a new tensor


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_start_and_target_are_the_same_bits_however_the_batch_is_cut(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 9), "rows")
    x, y = images(rows), torch.arange(rows) % 4
    index = torch.tensor(data.draw(st.lists(st.integers(0, 2**31), min_size=rows, max_size=rows), "index"))
    order = torch.tensor(data.draw(st.permutations(range(rows)), "order"))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=3), "cuts"))
    counters = {**COUNTERS, "step": data.draw(st.integers(0, 9), "step")}
    whole = draw_start(x, index, eps=0.1, clean_prob=0.5, **counters)
    targets = draw_target(y, index, 4, **counters)
    for part in torch.tensor_split(order, cuts):
        assert torch.equal(draw_start(x[part], index[part], eps=0.1, clean_prob=0.5, **counters), whole[part])
        assert torch.equal(draw_target(y[part], index[part], 4, **counters), targets[part])


@pytest.mark.parametrize("eps", [0.0, 4 / 255, 16 / 255, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_start_is_inside_the_ball_and_the_image_range(dtype: torch.dtype, eps: float) -> None:
    x = images(8).to(dtype)
    x[0], x[1] = 0, 1
    start = draw_start(x, torch.arange(8), eps=eps, clean_prob=0, **COUNTERS)
    # In the interval form: |start - x| <= eps fails by rounding after a correct projection.
    assert bool(((start >= x - eps) & (start <= x + eps) & (start >= 0) & (start <= 1)).all())
    assert torch.equal(start, x) == (eps == 0)


def test_noise_is_uniform_in_the_ball() -> None:
    x = fixed(0.5, 64, 16)
    noise = ((draw_start(x, torch.arange(64), eps=0.25, clean_prob=0, **COUNTERS) - x) / 0.25).numpy()
    assert stats.kstest(noise.ravel(), "uniform", args=(-1, 2)).pvalue > 1e-3
    counts = np.histogram(noise, bins=256, range=(-1, 1))[0]
    assert counts.sum() == noise.size
    assert stats.chisquare(counts).pvalue > 1e-3


def test_noise_of_one_pixel_is_uniform_over_rows_and_steps() -> None:
    """Along the other two axes of the counters: many images, few elements; many steps, one image."""
    x = fixed(0.5, 20_000, 1)
    over_rows = draw_start(x, torch.arange(20_000), eps=0.5, clean_prob=0, **COUNTERS)[:, 0, 0, 0]
    assert stats.kstest(over_rows.numpy(), "uniform").pvalue > 1e-3
    keys = [plan.hash_rows(draws.STREAM_START, 7, 3, step, np.zeros(1, np.int64)) for step in range(4000)]
    assert stats.kstest(plan.uniforms(np.concatenate(keys), 1)[:, 0], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("changed", ["seed", "epoch", "step", "index", "element", "stream"])
def test_neighbouring_draws_are_uncorrelated(changed: str) -> None:
    """|r| of n independent pairs exceeds 4 / sqrt(n) in 6 of 100,000 cases."""
    num = 20_000
    stream, index, element = draws.STREAM_START, torch.arange(num) * 2, torch.zeros(num, dtype=torch.int64)
    one = draws.draw_uniform(draws.row_keys(stream, **COUNTERS, index=index), element)
    other = {**COUNTERS, changed: COUNTERS[changed] + 1} if changed in COUNTERS else COUNTERS
    stream = draws.STREAM_TARGET if changed == "stream" else stream
    index, element = index + (changed == "index"), element + (changed == "element")
    two = draws.draw_uniform(draws.row_keys(stream, **other, index=index), element)
    assert abs(np.corrcoef(one.numpy(), two.numpy())[0, 1]) < 4 / num**0.5


def clean_steps(clean_prob: float, num_steps: int, index: list[int]) -> list[bool]:
    """Which steps start from the clean batch; a batch does so as a whole or not at all."""
    x = fixed(0.5, len(index), 2)
    found = []
    for step in range(num_steps):
        start = draw_start(x, torch.tensor(index), eps=0.1, clean_prob=clean_prob, seed=1, epoch=2, step=step)
        same = (start == x).flatten(1).all(dim=1).tolist()
        assert same in ([True] * len(index), [False] * len(index))
        found.append(same[0])
    return found


def test_share_of_clean_starts_is_the_probability_asked_for() -> None:
    num = 600
    share = clean_steps(0.2, num, [3, 8])
    low, high = stats.binom.interval(0.9999, num, 0.2)
    assert low <= sum(share) <= high
    assert clean_steps(0.2, 200, [90, 4, 1]) == share[:200]  # of the step, whatever images are in the batch


def test_clean_start_probabilities_of_zero_and_one_are_exact() -> None:
    assert not any(clean_steps(0.0, 200, [0]))
    assert all(clean_steps(1.0, 200, [0]))
    # Exact to the last bit of the draw: at u itself the start is noise, so at 0 it always is.
    u = plan.uniforms(plan.hash_rows(draws.STREAM_CLEAN_START, 1, 2, 0, np.zeros(1, np.int64)), 1).item()
    assert clean_steps(u, 1, [0]) == [False]
    assert clean_steps(u + 2**-24, 1, [0]) == [True]


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_target_is_never_the_label_and_uniform_over_the_others(device: torch.device, num_classes: int) -> None:
    num = 200 * num_classes
    y = (torch.arange(num) * 7919 % num_classes).to(device)
    target = draw_target(y, torch.arange(num, device=device), num_classes, **COUNTERS)
    assert target.dtype == torch.int64
    assert not bool((target == y).any())
    assert (int(target.min()), int(target.max())) == (0, num_classes - 1)
    offsets = torch.bincount((target - y) % num_classes, minlength=num_classes).tolist()
    assert offsets[0] == 0
    if num_classes > 2:
        assert stats.chisquare(offsets[1:]).pvalue > 1e-3


@pytest.mark.parametrize("counter", ["seed", "epoch", "step"])
def test_target_of_an_image_changes_with_each_counter(counter: str) -> None:
    y, index = torch.zeros(400, dtype=torch.int64), torch.arange(400)
    one = draw_target(y, index, 1000, **COUNTERS)
    two = draw_target(y, index, 1000, **{**COUNTERS, counter: COUNTERS[counter] + 1})
    assert int((one == two).sum()) < 10  # 0.4 expected by chance


@pytest.mark.parametrize("num_rows", [1, 7, 1_281_167, 2**31])
def test_drawn_rows_are_the_scaled_bits_of_their_position(device: torch.device, num_rows: int) -> None:
    """Against numpy's wider integers; every row is in range, and a tensor counter draws as its number does."""
    step = torch.tensor(5, device=device)
    rows = draw_rows(num_rows, 300, seed=3, step=step)
    keys = draws.row_keys(draws.STREAM_ROWS, 3, 0, 5, torch.arange(300))
    bits = draws.draw_bits(keys, torch.zeros(300, dtype=torch.int64)).numpy().view(np.uint64)
    assert rows.tolist() == [(int(word) >> 32) * num_rows >> 32 for word in bits]
    assert max(rows.tolist()) < num_rows
    assert torch.equal(rows, draw_rows(num_rows, 300, seed=torch.tensor(3, device=device), step=step))
    assert torch.equal(rows[:10], draw_rows(num_rows, 10, seed=3, step=step))
