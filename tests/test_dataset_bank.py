"""The bank with a slot for every training image, against a dict, and the draw of its negatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht import kernels
from fasttht.bank import DatasetBank, FeatureBank, build_bank
from fasttht.config import MethodConfig

DIM = 3
aten = torch.ops.aten
CPU = torch.device("cpu")


def features(seed: int, rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, DIM)))


def bank_of(num_images: int = 10, num_negatives: int = 6, seed: int = 0, **options: Any) -> DatasetBank:
    return DatasetBank(num_images, DIM, num_negatives=num_negatives, seed=seed, **{"dtype": torch.float64, **options})


@given(batches=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), max_size=8))
@settings(deadline=None, max_examples=100)
def test_bank_holds_the_newest_feature_of_every_image(batches: list[list[int]]) -> None:
    """Also where a batch names an image twice: the later one stays."""
    bank, newest = bank_of(9), {}
    for number, rows in enumerate(batches):
        feat = features(number, len(rows))
        bank.enqueue(feat, torch.tensor(rows))
        newest |= {row: feat[i] / feat[i].norm() for i, row in enumerate(rows)}
        assert int(bank.count) == number + 1
    assert bank.written.tolist() == [row in newest for row in range(9)]
    for row, feat in newest.items():
        torch.testing.assert_close(bank.features[row], feat, rtol=1e-12, atol=0)


def test_negatives_are_stored_features_and_never_ones_own_or_unwritten() -> None:
    bank = bank_of(10, 400)
    bank.enqueue(features(0, 4), torch.tensor([7, 2, 5, 0]))
    index = torch.tensor([2, 9, 0])
    found, mask = bank.negatives(index)
    rows = kernels.draw_rows(10, 400, seed=0, step=bank.count)
    assert torch.equal(found, bank.features[rows])
    for anchor, row_mask in zip(index.tolist(), mask, strict=True):
        assert set(rows[row_mask].tolist()) == {7, 2, 5, 0} - {anchor}
    _, all_mask = bank.negatives(index, mask_same_index=False)
    assert set(rows[all_mask[0]].tolist()) == {7, 2, 5, 0}
    assert torch.equal(all_mask[0], all_mask[1])


def test_an_empty_bank_has_no_negatives() -> None:
    assert not bank_of().negatives(torch.arange(3))[1].any()


@pytest.mark.parametrize("num_rows", [3, 50])
def test_negatives_are_uniform_over_the_other_images_and_independent(num_rows: int) -> None:
    """Counts of each row, and of neighbouring pairs of draws, by chi-square."""
    bank = bank_of(num_rows, 20_000)
    bank.written.fill_(True)
    drawn = kernels.draw_rows(num_rows, 20_000, seed=0, step=bank.count)
    own = 1
    kept = drawn[bank.negatives(torch.tensor([own]))[1][0]]
    counts = torch.bincount(kept, minlength=num_rows).tolist()
    assert counts.pop(own) == 0
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = torch.bincount((drawn[:-1:2] * num_rows + drawn[1::2]), minlength=num_rows**2)
    assert stats.chisquare(pairs.tolist()).pvalue > 1e-3


def test_draw_changes_with_every_minibatch_and_seed_and_only_with_them() -> None:
    one, two = bank_of(1000, 64, seed=3), bank_of(1000, 64, seed=4)
    index = torch.arange(4)
    for bank in (one, two):
        bank.features.copy_(torch.arange(1000.0)[:, None].expand(-1, DIM))  # a feature names its row
    first = one.negatives(index)[0]
    assert torch.equal(one.negatives(torch.tensor([9]))[0], first)  # other micro-batches and replays share it
    assert not torch.equal(two.negatives(index)[0], first)
    one.count += 1
    assert not torch.equal(one.negatives(index)[0], first)


def test_a_bank_restored_from_its_state_goes_on_as_the_other_would_have() -> None:
    one, two = bank_of(), bank_of()
    for number in range(3):
        one.enqueue(features(number, 2), torch.tensor([number, 5]))
    for name, tensor in two.state().items():
        tensor.copy_(one.state()[name])
    for bank in (one, two):
        bank.enqueue(features(9, 2), torch.tensor([1, 8]))
    for found, expected in zip(two.negatives(torch.arange(2)), one.negatives(torch.arange(2)), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(tensor, one.state()[name]) for name, tensor in two.state().items())


class NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    SYNCS = (
        aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
        aten.is_nonzero.default,
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.SYNCS, f"host sync: {func}"
        return func(*args, **(kwargs or {}))


def test_enqueue_and_negatives_do_not_wait_for_the_device(device: torch.device) -> None:
    bank = bank_of(device=device)
    feat, index = features(0, 4).to(device), torch.tensor([1, 1, 9, 0], device=device)
    with NoHostSync():  # type: ignore[no-untyped-call]
        with pytest.raises(AssertionError, match="host sync"):
            float(feat[0, 0])  # the guard sees a sync where there is one
        bank.enqueue(feat, index)
        bank.negatives(index)
    assert bank.written.sum() == 3


def test_wrong_shapes_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected feat_clean of shape \(B, 3\)"):
        bank_of().enqueue(torch.ones(2, DIM + 1), torch.arange(2))
    with pytest.raises(ValueError, match="expected 2 indices"):
        bank_of().enqueue(torch.ones(2, DIM), torch.arange(3))
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="expected images and negatives"):
            bank_of(*sizes)


def test_the_bank_that_is_built_is_the_one_asked_for() -> None:
    def build(num_images: int | None = 40, **options: Any) -> Any:
        return build_bank(MethodConfig(**options), DIM, num_images, seed=5, device=CPU, dtype=torch.float32)

    queue = build(bank_size=7)
    assert isinstance(queue, FeatureBank)
    assert len(queue.features) == 7
    whole = build(bank_kind="dataset", num_negatives=9)
    assert isinstance(whole, DatasetBank)
    assert whole.features.shape == (40, DIM)
    assert len(whole.negatives(torch.arange(2))[0]) == 9
    assert build(negatives="batch") is None
    assert build(bank_size=0, negatives="both") is None
    with pytest.raises(ValueError, match="number of training images"):
        build(None, bank_kind="dataset", num_negatives=9)
