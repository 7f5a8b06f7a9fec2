"""The memory bank against a Python deque, and what a train step asks of it."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht.bank import EMPTY, FeatureBank

DIM = 3
aten = torch.ops.aten


class NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fail on the ops whose result the host has to wait for."""

    SYNCS = (
        aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
        aten.is_nonzero.default, aten.index.Tensor,
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.SYNCS, f"host sync: {func}"
        return func(*args, **(kwargs or {}))


def batch(first: int, rows: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Features that are not of unit norm, all different, and the rows first, first + 1, ..."""
    rng = np.random.default_rng(first)
    feat = torch.from_numpy(rng.normal(size=(rows, dim)) * rng.uniform(0.1, 10, size=(rows, 1)))
    return feat, torch.arange(first, first + rows)


def filled(size: int, *batches: int) -> FeatureBank:
    """A float64 bank after batches of these sizes, with rows 0, 1, 2, ... in turn."""
    bank = FeatureBank(size, DIM, dtype=torch.float64)
    for i, rows in enumerate(batches):
        bank.enqueue(*batch(sum(batches[:i]), rows))
    return bank


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 25), max_size=12))
@settings(deadline=None, max_examples=200)
def test_bank_holds_what_a_deque_holds(size: int, batches: list[int]) -> None:
    """Any size, any batches: larger than the ring, not dividing it, empty, many in turn."""
    bank = FeatureBank(size, DIM, dtype=torch.float64)
    ring: deque[tuple[list[float], int]] = deque(maxlen=size)
    num_written = 0
    for rows in batches:
        feat, index = batch(1000 + num_written, rows)
        bank.enqueue(feat, index)
        unit = (feat / feat.norm(dim=1, keepdim=True)).tolist()
        ring.extend(zip(unit, index.tolist(), strict=True))
        num_written += rows
        assert int(bank.ptr) == num_written % size
        # From the oldest to the newest: slot ptr, ptr + 1, ... once full, else from slot 0.
        first = num_written % size if len(ring) == size else 0
        order = [(first + k) % size for k in range(len(ring))]
        assert bank.index[order].tolist() == [row for _, row in ring]
        np.testing.assert_allclose(
            bank.features[order].numpy(), np.array([feat for feat, _ in ring]).reshape(-1, DIM), rtol=1e-12
        )
        assert int((bank.index != EMPTY).sum()) == len(ring)
        # Feature number k sits in slot k mod size until feature k + size replaces it.
        for slot in order:
            assert (int(bank.index[slot]) - 1000) % size == slot


def test_bank_starts_empty() -> None:
    bank = FeatureBank(4, DIM)
    assert bank.index.tolist() == [EMPTY] * 4
    assert int(bank.ptr) == 0
    assert bank.features.dtype == torch.float32
    for same in (True, False):
        mask = bank.mask(torch.tensor([0, 7]), mask_same_index=same)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[False] * 4] * 2


def test_empty_slots_are_never_negatives() -> None:
    bank = filled(5, 3)
    for same in (True, False):
        assert bank.mask(torch.tensor([100]), mask_same_index=same).tolist() == [[True, True, True, False, False]]
    # Not even for the anchor whose row is the mark of an empty slot.
    assert bank.mask(torch.tensor([EMPTY])).tolist() == [[True, True, True, False, False]]


def test_an_images_own_older_features_are_not_its_negatives() -> None:
    bank = filled(4, 3)
    bank.enqueue(batch(9, 1)[0], torch.tensor([1]))  # row 1 again: in slots 1 and 3
    index = torch.tensor([1, 0, 8])
    assert bank.mask(index).tolist() == [[True, False, True, False], [False, True, True, True], [True] * 4]
    assert bank.mask(index, mask_same_index=False).tolist() == [[True] * 4] * 3


def test_overwritten_features_are_forgotten() -> None:
    bank = filled(4, 4, 2)
    assert bank.index.tolist() == [4, 5, 2, 3]
    assert bank.mask(torch.tensor([0, 2])).tolist() == [[True] * 4, [True, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_are_stored_with_unit_norm_in_the_banks_type(dtype: torch.dtype) -> None:
    bank = FeatureBank(4, 16, dtype=dtype)
    feat, index = batch(0, 3, 16)
    bank.enqueue(feat.float(), index)
    assert bank.features.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(bank.features[:3].double().norm(dim=1), torch.ones(3).double(), rtol=tolerance, atol=0)
    assert not bank.features[3].any()


def test_enqueueing_keeps_no_graph_and_leaves_its_arguments() -> None:
    feat, index = batch(0, 3)
    feat.requires_grad_(True)
    before = feat.detach().clone()
    bank = FeatureBank(2, DIM, dtype=torch.float64)
    bank.enqueue(feat * 1, index)
    assert not bank.features.requires_grad
    assert torch.equal(feat, before)
    assert index.tolist() == [0, 1, 2]


def test_state_is_the_banks_own_tensors() -> None:
    bank = filled(4)
    state = bank.state()
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    bank.enqueue(*batch(0, 3))
    assert state["index"].tolist() == [0, 1, 2, EMPTY]
    assert int(state["ptr"]) == 3
    assert bool(state["features"][:3].any(dim=1).all())
    assert {name: tensor.data_ptr() for name, tensor in bank.state().items()} == addresses


def test_a_bank_restored_from_its_state_goes_on_as_the_other_would_have() -> None:
    one, two = filled(5, 3, 4), FeatureBank(5, DIM, dtype=torch.float64)
    for name, tensor in two.state().items():
        tensor.copy_(one.state()[name])
    for bank in (one, two):
        bank.enqueue(*batch(50, 3))
    for name, tensor in two.state().items():
        assert torch.equal(tensor, one.state()[name])


@pytest.mark.parametrize("shape", [(4, DIM + 1), (DIM,), (4, DIM, 1)], ids=str)
def test_features_of_another_shape_are_refused_and_nothing_is_written(shape: tuple[int, ...]) -> None:
    bank = filled(5, 2)
    before = {name: tensor.clone() for name, tensor in bank.state().items()}
    words = rf"expected feat_clean of shape \(B, {DIM}\), got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=words):
        bank.enqueue(torch.ones(shape), torch.arange(4))
    for name, tensor in bank.state().items():
        assert torch.equal(tensor, before[name])


def test_a_bank_of_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a size of at least 1, got 0"):
        FeatureBank(0, DIM)


class UniqueSlots(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fail where one write names a slot twice: which of the two rows stays is then up to the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_writes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.index_copy_.default:
            assert len(set(args[2].tolist())) == len(args[2])
            self.num_writes += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_no_write_names_a_slot_twice(rows: int) -> None:
    bank = FeatureBank(8, DIM)
    with UniqueSlots() as slots:
        for i in range(3):
            bank.enqueue(*batch(i, rows))
    assert slots.num_writes == 6


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_enqueue_and_mask_do_not_wait_for_the_device(device: torch.device, rows: int) -> None:
    bank = FeatureBank(8, DIM, device=device)
    feat, index = (tensor.to(device) for tensor in batch(0, rows))
    with NoHostSync():  # type: ignore[no-untyped-call]
        with pytest.raises(AssertionError, match="host sync"):
            float(feat[0, 0])  # the guard sees a sync where there is one
        for _ in range(3):
            bank.enqueue(feat, index)
            for same in (True, False):
                bank.mask(index, mask_same_index=same)
    assert int(bank.ptr) == 3 * rows % 8
