"""A momentum g normalises other groups of images than f's, and its features come back to the images they are of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fasttht.attacks.pgd import Draw
from fasttht.config import TrainConfig
from fasttht.distributed import SOLO
from fasttht.kernels import u8_to_input
from fasttht.key_shuffle import draw_shuffle
from fasttht.pipelines.loader import Batch
from fasttht.state import TrainState
from fasttht.steps import _clean_features, free_step, standard_step
from tests.test_distributed import BATCH, batch_of, config_of, state_of

pytestmark = pytest.mark.changes_rng
DRAW = Draw(3, 1, 2)


def features(state: TrainState, config: TrainConfig, batch: Batch, draw: Draw = DRAW) -> torch.Tensor:
    found = _clean_features(copy.copy(state), config, batch, draw, len(batch.index))
    return torch.cat([feat for feat in found if feat is not None])


def made(**options: Any) -> tuple[TrainConfig, TrainState, Batch]:
    config = config_of(**{"objective": "that", "steps": 1, **options})
    return config, state_of(config, SOLO), batch_of(0, BATCH)


@pytest.mark.parametrize(
    ("options", "size"),
    [({"bn_group_size": 4}, 4), ({"bn_group_size": 0, "grad_accum_steps": 2}, BATCH // 2)],
    ids=["ghost groups", "parts"],
)
def test_groups_are_of_shuffled_images(options: dict[str, Any], size: int) -> None:
    config, state, batch = made(**options)
    g, x = copy.deepcopy(state.clean_encoder), u8_to_input(batch.x, state.dtype)
    assert g is not None
    order = draw_shuffle(BATCH, DRAW, SOLO).order.tolist()
    assert sorted(order) == list(range(BATCH)) != order
    expected = torch.zeros(BATCH, config.model.feat_dim, dtype=torch.float64)
    for start in range(0, BATCH, size):  # each group as a batch of its own, which no layer cuts any further
        rows = order[start : start + size]
        expected[rows] = copy.deepcopy(g)(x[rows])
    found = features(state, config, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    in_order = torch.cat([copy.deepcopy(g)(part) for part in x.split(size)])
    assert not torch.allclose(found, in_order, atol=1e-3)
    assert not torch.equal(features(state, config, batch, Draw(3, 1, 3)), found), "another step has another order"


@pytest.mark.parametrize("options", [{"bn_group_size": 0}, {"bn_group_size": BATCH}])
def test_a_single_group_keeps_its_order_bit_for_bit(options: dict[str, Any]) -> None:
    config, state, batch = made(**options)
    expected = copy.copy(state).clean_features(u8_to_input(batch.x, state.dtype))
    assert expected is not None
    assert torch.equal(features(state, config, batch), expected)


@pytest.mark.parametrize("replay", [1, 2])
def test_a_step_trains_on_the_shuffled_groups(replay: int) -> None:
    """What a step writes into the bank are the features that `_clean_features` gives under the step's own draw."""
    config, state, batch = made(replay=replay, steps=None if replay > 1 else 1, bank_size=BATCH)
    expected = features(copy.deepcopy(state), config, batch)
    if replay > 1:
        free_step(state, config, batch, DRAW)
    else:
        standard_step(state, config, batch, DRAW, num_classes=5)
    assert state.bank is not None
    torch.testing.assert_close(state.bank.features[:BATCH], expected, rtol=1e-12, atol=1e-14)
    assert state.bank.index[:BATCH].tolist() == batch.index.tolist()
