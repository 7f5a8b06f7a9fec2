"""Two and four processes train the network that one trains: real processes over gloo, in float64 where sums matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht import checkpoint
from fasttht.attacks.pgd import Draw
from fasttht.build import build_loader, build_model
from fasttht.config import TrainConfig
from fasttht.distributed import SOLO, World
from fasttht.errors import PeerError, UsageError
from fasttht.gradients import GRADIENTS, STATISTICS, Reducer
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.models.ghost_bn import GhostBatchNorm2d
from fasttht.models.sync_bn import STATISTICS as SYNCHRONISED
from fasttht.models.sync_bn import SyncBatchNorm2d, _Fused, synchronise_
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import resolve
from fasttht.schedule import Schedule
from fasttht.state import TrainState
from fasttht.step_engine import choose_step_engine
from fasttht.steps import free_step, standard_step
from tests.ranks import in_world

CLASSES, SIDE, BATCH, IMAGES = 5, 8, 32, 40

# The short one is cut into slices of 4, 4, 4 and 5 by four ranks, of 8 and 9 by two: ghost groups of 4 straddle none.
# (In groups of 2 the last stage, one pixel large, would normalise to -1 and 1, whose gradients are rounding errors.)
SIZES = (BATCH, 17)

# How far the sums of two or four ranks may be from one process's, in float64, after two or three steps.
CLOSE = {"rtol": 1e-8, "atol": 1e-10}

THAT: dict[str, Any] = {"objective": "that", "steps": 2, "targeted": True, "start_clean_prob": 0.5}
MODES: dict[str, dict[str, Any]] = {
    "that": THAT,
    "that, free": {"objective": "that", "replay": 2},
    "at": {"objective": "at", "steps": 2, "model_ema": True, "step_engine": "fused"},
    "dataset bank": {**THAT, "bank_kind": "dataset", "num_negatives": 12, "negatives": "both"},
    "batch negatives, free": {"objective": "that", "replay": 2, "negatives": "batch"},
    "parts, free": {"objective": "at", "replay": 2, "grad_accum_steps": 2},
    "trades": {"objective": "trades", "steps": 1},
    "mixture BN": {"objective": "mbn-alp", "replay": 2},
    "sync BN": {"objective": "that", "steps": 1, "sync_bn": True},
    "sync BN, free": {"objective": "at", "replay": 2, "sync_bn": True},
}
SIZES_OF = {
    "that, free": (BATCH, 17, BATCH),  # delta after a short batch
    "parts, free": (BATCH, BATCH),  # a slice of 5 images is not cut into two parts that ghost groups fit
}


def config_of(**options: Any) -> TrainConfig:
    config = TrainConfig()
    defaults: dict[str, Any] = {
        "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 8, "img_size": SIDE, "bank_size": 20,
        "batch_size": BATCH, "epochs": 1, "smoothing": 0.0, "warmup_epochs": 0.0, "eps": 0.1, "alpha": 0.03125,
        "encoder_momentum": 0.9, "lr": 0.01, "start_clean_prob": 0.0, "scale_init": 4.0,
        "bn_group_size": 0 if "sync_bn" in options else 4,
    }  # fmt: skip
    for name, value in {**defaults, **options}.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, value)
    return resolve(config)


def state_of(config: TrainConfig, world: World) -> TrainState:
    """A fresh float64 state. Blocks are not born as identities, so every weight matters."""
    model = build_model(config, CLASSES, torch.device("cpu")).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    if config.model.sync_bn and world.size > 1:
        assert synchronise_(model, world) > 0
    encoder = CleanEncoder(model, frozen=False) if model.feature_head is not None else None
    schedule = Schedule(0.01, milestones=[])
    return TrainState(config, model, encoder, schedule, img_size=SIDE, num_images=IMAGES, world=world)


def batch_of(step: int, size: int) -> Batch:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    return Batch(x, torch.from_numpy(rng.integers(0, CLASSES, size)), torch.from_numpy(rng.choice(IMAGES, size, False)))


class Exchanges(TorchDispatchMode):
    """Counts torch's own collective operations while inside."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def train(mode: str, world: World) -> dict[str, Any]:
    """Take the steps of a mode; return all that they changed, and what was exchanged where."""
    config = config_of(**MODES[mode])
    state = state_of(config, world)
    inside: list[int] = []
    adversarial: list[Tensor] = []
    if state.engine is not None:
        plain = state.engine.attack

        def watched(*args: Any, **options: Any) -> Any:
            with Exchanges() as exchanges:
                found = plain(*args, **options)
            inside.append(exchanges.number)
            adversarial.append(found.x_adv)
            return found

        state.engine.attack = watched  # type: ignore[method-assign]
    with Exchanges() as all_exchanges:
        for step, size in enumerate(SIZES_OF.get(mode, SIZES)):
            whole, rows = batch_of(step, size), world.rows(size)
            batch = Batch(whole.x[rows], whole.y[rows], whole.index[rows])
            if config.attack.replay > 1:
                free_step(state, config, batch, Draw(0, 0, step), total=size)
            else:
                standard_step(state, config, batch, Draw(0, 0, step), num_classes=CLASSES, total=size)
    meter = state.meter.total()
    calls = dict(world.calls)
    saved = state.to_save()
    files = state.tensors() if saved is None else saved
    tensors = {f"{file}.{name}": tensor.clone() for file, group in files.items() for name, tensor in group.items()} | {
        "training.meter": meter
    }
    return {
        "tensors": tensors, "inside": inside, "exchanges": all_exchanges.number, "calls": calls,
        "adversarial": adversarial, "updates": len(SIZES_OF.get(mode, SIZES)) * config.attack.replay,
    }  # fmt: skip


def all_modes(world: World) -> dict[str, Any]:
    out = {}
    for mode in MODES:
        world.calls.clear()
        out[mode] = train(mode, world)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What one, two and four processes made of every mode, by world size and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    return {1: [all_modes(SOLO)]} | {size: in_world(size, folder / f"{size}", all_modes) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_train_the_network_of_one(mode: str, size: int, trained: Any) -> None:
    expected, found = trained[1][0][mode]["tensors"], trained[size][0][mode]["tensors"]
    assert found.keys() == expected.keys()
    assert any(name.startswith("training.momentum") and tensor.any() for name, tensor in found.items())
    for name, tensor in expected.items():
        if mode == "parts, free" and "running_" in name:
            continue  # two parts in a row move the running statistics in another order: no attack uses them here
        close = {"rtol": 1e-6, "atol": 1e-6} if name == "training.meter" else CLOSE  # shares are taken in float32
        torch.testing.assert_close(found[name], tensor, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_hold_the_same_bits(mode: str, size: int, trained: Any) -> None:
    first = trained[size][0][mode]["tensors"]
    for other in trained[size][1:]:
        for name, tensor in other[mode]["tensors"].items():
            if name != "training.delta":  # each has its own rows of it
                assert torch.equal(first[name], tensor), name


@pytest.mark.parametrize("size", [2, 4])
def test_every_row_of_delta_stands_at_its_place_in_the_global_batch(size: int, trained: Any) -> None:
    whole = trained[size][0]["sync BN, free"]["tensors"]["training.delta"]
    assert whole.shape == (BATCH, 3, SIDE, SIDE)
    assert (whole.flatten(1).abs().amax(dim=1) > 0).all()
    start = 0
    for rank in range(1, size):
        own = trained[size][rank]["sync BN, free"]["tensors"]["training.delta"]
        start = BATCH * rank // size
        assert torch.equal(whole[start : start + len(own)], own)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["that", "at", "dataset bank", "trades"])
def test_attacked_images_are_those_of_one_process(mode: str, size: int, trained: Any) -> None:
    """The first step's: the same start and targets, row by row, and the same steps but for rounding."""
    whole = trained[1][0][mode]["adversarial"][0]
    parts = torch.cat([trained[size][rank][mode]["adversarial"][0] for rank in range(size)])
    torch.testing.assert_close(parts, whole, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_exchanged_inside_an_attack(mode: str, trained: Any) -> None:
    for size in (2, 4):
        for rank in range(size):
            found = trained[size][rank][mode]
            assert found["exchanges"] > 0, "the counter counts"
            assert not any(found["inside"])
            assert (not found["inside"]) == ("free" in mode or mode == "mixture BN")


@pytest.mark.parametrize("mode", MODES)
def test_an_update_exchanges_gradients_and_statistics_once_and_a_minibatch_its_features(
    mode: str, trained: Any
) -> None:
    calls, updates = trained[2][1][mode]["calls"], trained[2][1][mode]["updates"]
    assert calls[GRADIENTS] == calls[STATISTICS] == updates  # the network is smaller than one bucket
    has_bank = "training.bank.features" in trained[1][0][mode]["tensors"]
    assert calls.get("bank", 0) == (2 * len(SIZES_OF.get(mode, SIZES)) if has_bank else 0)
    others = {"metrics", "delta", "BN batch statistics", "batch negatives", "key images", "key features"}
    assert calls.keys() - {GRADIENTS, STATISTICS, "bank"} <= others
    assert not trained[1][0][mode]["calls"], "one process exchanges nothing"


@pytest.mark.parametrize("sizes", [(2, 4), (4, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(sizes: tuple[int, int], tmp_path: Path) -> None:
    config = config_of(**MODES["that, free"])

    def take(state: TrainState, step: int) -> None:
        whole, rows = batch_of(step, BATCH), state.world.rows(BATCH)
        free_step(state, config, Batch(whole.x[rows], whole.y[rows], whole.index[rows]), Draw(0, 0, step), total=BATCH)

    def first(world: World) -> None:
        state = state_of(config, world)
        take(state, 0)
        tensors = state.to_save()
        assert (tensors is None) == (not world.main)
        if tensors is not None:
            checkpoint.save(tmp_path, 1, tensors, {}, keep=1)

    def second(world: World) -> dict[str, Tensor]:
        state = state_of(config, world)
        with state.to_load() as tensors:
            checkpoint.restore(checkpoint.listing(tmp_path)[0], tensors)
        take(state, 1)
        files = state.to_save() or {}
        return {f"{file}.{name}": tensor for file, group in files.items() for name, tensor in group.items()}

    def in_world_or_alone(size: int, work: Any) -> Any:
        return work(SOLO) if size == 1 else in_world(size, tmp_path / f"ranks{size}", work)[0]

    in_world_or_alone(sizes[0], first)
    found = in_world_or_alone(sizes[1], second)
    alone = state_of(config, SOLO)
    take(alone, 0)
    take(alone, 1)
    for file, group in alone.tensors().items():
        for name, tensor in group.items():
            close = {"rtol": 1e-6, "atol": 1e-6} if name == "meter" else CLOSE
            torch.testing.assert_close(found[f"{file}.{name}"], tensor, **close)


# -- parts ---------------------------------------------------------------------------------------------------------


def test_gradients_leave_in_buckets_and_come_back_as_sums(tmp_path: Path) -> None:
    def work(world: World) -> dict[str, Any]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), torch.nn.Flatten(), torch.nn.Linear(16, 5)
        ).double()
        unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        buffer = torch.full((3,), float(world.rank), dtype=torch.float64)
        reducer = Reducer(world, [*network.parameters(), unused], [buffer], bytes_=200)
        x = torch.arange(96, dtype=torch.float64).reshape(2, 3, 4, 4) / 96
        torch.autograd.backward(network(x[world.rank :][:1]).square().sum() / 2)  # a part before: stays at home
        own = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        assert not world.calls
        reducer.begin(0.25 if world.rank == 0 else 0.75)
        torch.autograd.backward(network(x[world.rank :][:1]).square().sum() / 2)
        reducer.finish_()
        reducer.finish_()  # nothing is under way: nothing happens
        return {
            "own": own, "sums": [p.grad for p in network.parameters()], "buffer": buffer, "unused": unused.grad,
            "buckets": world.calls[GRADIENTS], "strides": [p.grad.stride() == p.stride() for p in network.parameters()],
        }  # fmt: skip

    found = in_world(2, tmp_path, work)
    assert found[0]["buckets"] > 1
    for first, second, *sums in zip(*(rank["own"] for rank in found), *(rank["sums"] for rank in found), strict=True):
        for total in sums:
            torch.testing.assert_close(total, 2 * (first + second))
    for rank in found:
        assert rank["buffer"].tolist() == [0.75] * 3
        assert rank["unused"].tolist() == [0, 0]
        assert all(rank["strides"])


def test_synchronised_norms_are_one_norm_over_all_images(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 4, 3, 3, dtype=torch.float64, generator=generator) * 3 + 5
    target = torch.randn(7, 4, 3, 3, dtype=torch.float64, generator=generator)

    def run(layer: torch.nn.Module, rows: slice) -> dict[str, Any]:
        leaf = x[rows].clone().requires_grad_(True)
        out = layer(leaf)
        torch.autograd.backward((out * target[rows]).square().sum())
        grads = {name: p.grad for name, p in layer.named_parameters()}
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        return {"out": out.detach(), "x": leaf.grad, "grads": grads, "state": state, "eval": layer.eval()(x[rows])}

    plain = torch.nn.BatchNorm2d(4).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        plain.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    bounds = [0, 2, 3, 7]  # unequal, and one image alone
    found = in_world(3, tmp_path, lambda w: run(SyncBatchNorm2d(plain, w), slice(*bounds[w.rank : w.rank + 2])))
    expected = run(plain, slice(None))
    for name in ("out", "x", "eval"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in found]), expected[name])
    for name, grad in expected["grads"].items():
        torch.testing.assert_close(sum(rank["grads"][name] for rank in found), grad)
    for rank in found:
        torch.testing.assert_close(rank["state"], expected["state"])


def test_rows_come_together_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    def work(world: World) -> list[Any]:
        counts = world.counts(5)
        own = torch.arange(5)[world.rows(5)]
        together = world.gather_rows("rows", own, counts)
        collected = world.collect_rows("rows", own.double()[:, None], counts)
        said = world.everybodys("words", {"rank": world.rank, "text": "ü" * world.rank})
        largest = world.ask("largest", world.rank * 3)
        return [counts, together.tolist(), None if collected is None else collected.tolist(), said, largest()]

    found = in_world(3, tmp_path, work)
    said = [{"rank": rank, "text": "ü" * rank} for rank in range(3)]
    for rank, result in enumerate(found):
        collected = [[0.0], [1.0], [2.0], [3.0], [4.0]] if rank == 0 else None
        assert result == [[1, 2, 2], [0, 1, 2, 3, 4], collected, said, 6]


def test_ranks_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    def work(world: World) -> str:
        world.agree("options", "same")
        with pytest.raises(UsageError) as caught:
            world.agree("options", "lr 0.2" if world.rank == 1 else "lr 0.1")
        return str(caught.value)

    text = in_world(3, tmp_path, work)[2]
    assert text.startswith("rank 1: expected the options of rank 0, lr 0.1, got lr 0.2")


@pytest.mark.parametrize("images", [9, 12, 13, 360])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 256])
def test_evaluation_gives_every_rank_images_of_every_batch_and_each_image_once(
    images: int, size: int, batch: int
) -> None:
    from fasttht.pipelines.datasets import Subset
    from fasttht.pipelines.splits import Splits

    splits = open_splits(None)
    few = Splits(splits.train, Subset(splits.val, np.arange(images)))
    config = config_of(eval_batch_size=batch)
    rows: list[int] = []
    for rank in range(size):
        plan = build_loader(config, few, torch.device("cpu"), train=False, world=World(rank, size)).plan
        own = [plan.batch(plan.order(), step).tolist() for step in range(plan.num_steps)]
        assert all(own)
        assert max(map(len, own)) <= batch + 1 + size
        rows += [row for part in own for row in part]
    assert sorted(rows) == list(range(images))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 6}, "least two images"),
        ({"batch_size": 16, "grad_accum_steps": 4}, "least two images"),
        ({"batch_size": 36, "grad_accum_steps": 4, "drop_last": False}, "as many parts"),
    ],
)
def test_a_batch_too_small_for_the_ranks_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_loader(config_of(**options), open_splits(None), torch.device("cpu"), train=True, world=World(1, 4))


def test_more_ranks_than_held_out_images_are_refused() -> None:
    with pytest.raises(UsageError, match="at most as many processes as the 360 held-out images, got 361"):
        build_loader(config_of(), open_splits(None), torch.device("cpu"), train=False, world=World(0, 361))


@pytest.mark.parametrize("other", [{"bn_group_size": 4}, {"attack_bn": "batch"}])
def test_synchronised_norms_exclude_groups_and_attacks_with_batch_statistics(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--sync-bn: expected it without"):
        config_of(sync_bn=True, **other)


def test_what_several_processes_exchange_is_not_recorded() -> None:
    name, reason = choose_step_engine(config_of(step_engine="captured"), torch.device("cpu"), processes=2)
    assert name == "fused"
    assert "not recorded" in reason


def test_ghost_groups_are_what_makes_ranks_and_one_process_equal() -> None:
    model = build_model(config_of(), CLASSES, torch.device("cpu"))
    assert any(isinstance(layer, GhostBatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_group_that_breaks_in_the_devices_own_norm_names_who_is_missing(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's kernels need CUDA; their place is taken by what gives the input back, and breaks one way."""

    class Asked:
        doing = ""

        def take(self, name: str, cause: Exception) -> PeerError:
            return PeerError(f"{name}: rank 1 is gone ({cause})")

    def work(name: str, *found: Any) -> Any:
        if name == way:
            raise RuntimeError("NCCL")
        return found[0] * 1 if len(found) == 1 else found

    monkeypatch.setattr(SyncBatchNorm, "forward", lambda ctx, x, *rest: work("forward", x))
    monkeypatch.setattr(SyncBatchNorm, "backward", lambda ctx, grad: work("backward", grad, *[None] * 8))
    world = World(0, 2, roll_call=Asked())  # type: ignore[arg-type]
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(PeerError, match=r"BN batch statistics: rank 1 is gone \(NCCL\)"):
        torch.autograd.backward(_Fused.apply(x, *[None] * 8, world).sum())
    assert world.calls[SYNCHRONISED] == (1 if way == "forward" else 2)
