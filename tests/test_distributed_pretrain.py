"""Two and four processes pre-train the encoder that one does: real processes over gloo, float64 where sums matter."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttht import checkpoint, roll_call
from fasttht.attacks.pgd import Draw
from fasttht.augment import Recipe
from fasttht.cli import main
from fasttht.config_file import PRETRAIN, read_preset
from fasttht.distributed import SOLO, World
from fasttht.errors import UsageError
from fasttht.gradients import GRADIENTS, STATISTICS
from fasttht.key_shuffle import FEATURES, IMAGES, Shuffle, draw_shuffle
from fasttht.moco import ROWS, MocoState, build_encoder, check_groups, finished, moco_step
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.splits import open_splits
from fasttht.pretrain import Pretrainer
from fasttht.pretrain_config import PretrainConfig, resolve_pretrain
from fasttht.run_folder import RunFolder
from fasttht.schedule import CosineSchedule
from tests.ranks import Ranks, commands, in_world

SIDE, BATCH, IMAGES_THERE, STEPS = 8, 32, 40, 3
RECIPE = Recipe(jitter=0.4, hue=0.1, jitter_prob=0.8, grayscale=0.2, blur=0.5, blur_sigma=(0.1, 1.0))

# How far the sums of two or four ranks may be from one process's, in float64, after three steps.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

MODES: dict[str, dict[str, Any]] = {
    "a group a rank": {"shuffle_groups": 4},
    "two groups a rank, masked": {"shuffle_groups": 8, "batch_size": 2 * BATCH, "mask_same_index": True},
}


def config_of(**options: Any) -> PretrainConfig:
    config = PretrainConfig()
    for name, value in options.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, tuple(value) if isinstance(value, list) else value)
    return resolve_pretrain(config)


def tiny_config(mode: str) -> PretrainConfig:
    defaults = {
        "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 6, "img_size": SIDE, "queue_size": 50,
        "batch_size": BATCH, "key_momentum": 0.75, "lr": 0.02, "weight_decay": 0.01,
    }  # fmt: skip
    return config_of(**{**defaults, **MODES[mode]})


def state_of(config: PretrainConfig, world: World) -> MocoState:
    encoder = build_encoder(config, torch.device("cpu")).double()
    return MocoState(config, encoder, CosineSchedule(0.02, total=10), world=world)


def views_of(step: int, size: int, rows: slice) -> tuple[Batch, Batch]:
    """A rank's rows of two views of a global batch; an image may be in it twice, as one that replaces a bad one is."""
    rng = np.random.default_rng(step)
    index, y = torch.from_numpy(rng.integers(0, IMAGES_THERE, size)), torch.zeros(size, dtype=torch.int64)
    pixels = (rng.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8) for _ in range(2))
    query, key = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in pixels)
    return Batch(query[rows], y[rows], index[rows]), Batch(key[rows], y[rows], index[rows])


def take(state: MocoState, config: PretrainConfig, step: int) -> None:
    total = config.optim.batch_size
    moco_step(
        state, config, *views_of(step, total, state.world.rows(total)), RECIPE, Draw(0, 0, step), total=total
    )  # fmt: skip


def tensors_of(files: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{file}.{name}": tensor.clone() for file, group in files.items() for name, tensor in group.items()}


def train(mode: str, world: World) -> dict[str, Any]:
    config = tiny_config(mode)
    state = state_of(config, world)
    for step in range(STEPS):
        take(state, config, step)
    calls, saved = dict(world.calls), state.to_save()
    assert (saved is None) == (not world.main)
    return {"tensors": tensors_of(state.tensors() if saved is None else saved), "calls": calls}


def all_modes(world: World) -> dict[str, Any]:
    out = {}
    for mode in MODES:
        world.calls.clear()
        out[mode] = train(mode, world)
    return out


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(roll_call, "_END_S", 8.0)
        open_splits(None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What one, two and four processes made of every mode, by world size and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    return {1: [all_modes(SOLO)]} | {size: in_world(size, folder / f"{size}", all_modes) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_train_the_encoder_of_one(mode: str, size: int, trained: Any) -> None:
    expected, found = trained[1][0][mode]["tensors"], trained[size][0][mode]["tensors"]
    assert found.keys() == expected.keys()
    kinds = ("clean_encoder.trunk.bn1.running_mean", "key_encoder.trunk.bn1.running_var", "training.queue.features",
             "training.momentum.trunk.conv1.weight", "training.meter")  # fmt: skip
    assert all(found[name].any() for name in kinds)
    for name, tensor in expected.items():
        close = {"rtol": 1e-10, "atol": 1e-10 * float(tensor.abs().max())} if tensor.is_floating_point() else CLOSE
        torch.testing.assert_close(found[name], tensor, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_hold_the_same_bits_and_the_queue_has_the_batch_s_order(mode: str, size: int, trained: Any) -> None:
    first = trained[size][0][mode]["tensors"]
    for other in trained[size][1:]:
        for name, tensor in other[mode]["tensors"].items():
            if name != "training.meter":  # its sums are of each rank's own images
                assert torch.equal(first[name], tensor), name
    total = tiny_config(mode).optim.batch_size
    rows = torch.cat([views_of(step, total, slice(None))[0].index for step in range(STEPS)])
    slots = (int(first["training.queue.ptr"]) - 1 - torch.arange(50)) % 50
    assert torch.equal(first["training.queue.index"][slots], rows.flip(0)[:50])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_exchanges_each_thing_once(mode: str, trained: Any) -> None:
    once = (GRADIENTS, STATISTICS, ROWS, IMAGES, FEATURES)  # the network is smaller than one bucket
    assert trained[2][1][mode]["calls"] == trained[4][0][mode]["calls"] == dict.fromkeys(once, STEPS)
    assert not trained[1][0][mode]["calls"], "one process exchanges nothing"


@pytest.mark.parametrize("size", [2, 3])
def test_shuffled_images_change_ranks_and_none_is_lost_or_doubled(size: int, tmp_path: Path) -> None:
    """Slices of other sizes too, and steps in which a rank has nothing for another."""
    totals = (24, 13, size, 2 * size)
    x = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1) + torch.arange(3, dtype=torch.uint8).view(3, 1, 1) * 50
    x = x.expand(24, 3, 2, 2).contiguous(memory_format=torch.channels_last)

    def work(world: World) -> list[tuple[Tensor, Tensor]]:
        found = []
        for step, total in enumerate(totals):
            for shuffle in (draw_shuffle(total, Draw(0, 0, step), world), Shuffle(world, np.arange(total))):
                dealt = shuffle.deal(x[:total][world.rows(total)])
                assert dealt.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(shuffle.at_my_places(x[:total]), dealt)
                found.append((dealt, shuffle.gather(dealt.flatten(1).double())))
        return found

    ranks = in_world(size, tmp_path, work)
    for step, total in enumerate(totals):
        order = draw_shuffle(total, Draw(0, 0, step), SOLO).order
        assert sorted(order) == list(range(total))
        assert torch.equal(torch.cat([rank[2 * step][0] for rank in ranks]), x[order])
        assert torch.equal(torch.cat([rank[2 * step + 1][0] for rank in ranks]), x[:total])
        for rank in ranks:
            assert torch.equal(rank[2 * step][1], x[:total].flatten(1).double())


@pytest.mark.parametrize("sizes", [(4, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(sizes: tuple[int, int], tmp_path: Path) -> None:
    config = tiny_config("a group a rank")

    def first(world: World) -> None:
        state = state_of(config, world)
        take(state, config, 0)
        tensors = state.to_save()
        if tensors is not None:
            checkpoint.save(tmp_path, 1, tensors, {}, keep=1)

    def second(world: World) -> dict[str, Tensor]:
        state = state_of(config, world)
        with state.to_load() as tensors:
            checkpoint.restore(checkpoint.listing(tmp_path)[0], tensors)
        take(state, config, 1)
        return tensors_of(state.to_save() or {})

    def in_world_or_alone(size: int, work: Any) -> Any:
        return work(SOLO) if size == 1 else in_world(size, tmp_path / f"ranks{size}", work)[0]

    in_world_or_alone(sizes[0], first)
    found = in_world_or_alone(sizes[1], second)
    alone = state_of(config, SOLO)
    take(alone, config, 0)
    take(alone, config, 1)
    for name, tensor in tensors_of(alone.tensors()).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (4, 3), (6, 4)])
def test_groups_that_are_no_multiple_of_the_processes_are_refused(groups: int, size: int) -> None:
    config = config_of(shuffle_groups=groups, batch_size=24)
    with pytest.raises(
        UsageError, match=f"--shuffle-groups: expected a multiple of the {size} processes.*got {groups};"
    ):
        check_groups(config, World(1, size))
    check_groups(config, World(0, groups))


# -- whole runs ----------------------------------------------------------------------------------------------------

# Three steps a pass. Groups are of 50 images.
TINY: dict[str, Any] = {
    "width": 8, "batch_size": 400, "epochs": 2, "log_interval": 1, "queue_size": 700, "shuffle_groups": 8,
    "eval_interval": 1, "knn_k": 5, "threads": 1, "workers": 1,
}  # fmt: skip
WORDS = [
    "pretrain", "--width", "8", "--batch-size", "64", "--epochs", "400", "--queue-size", "64", "--shuffle-groups", "4",
    "--threads", "1", "--workers", "1", "--log-interval", "1",
]  # fmt: skip


def run_config(output: Path) -> PretrainConfig:
    return config_of(**{**read_preset(PRETRAIN, pretrain=True), **TINY, "output": output})


def contents(run: Path) -> dict[str, bytes]:
    newest = checkpoint.newest(run, checkpoint.refuse)
    assert newest is not None
    files = [*sorted(newest.glob("*.safetensors")), run / "metrics.jsonl", run / "summary.csv"]
    return {path.name: path.read_bytes() for path in files}


def fit(output: Path, *, stop_at: int | None = None) -> Callable[[World], list[list[int]]]:
    """A piece of work: train, and return this rank's dataset rows of every step it took."""

    def work(world: World) -> list[list[int]]:
        trainer = Pretrainer(run_config(output), world=world)
        seen, plain = [], trainer._step

        def watched(item: tuple[Batch, Batch]) -> None:
            assert torch.equal(item[0].index, item[1].index)
            seen.append(item[0].index.tolist())
            plain(item)

        trainer._step = watched  # type: ignore[method-assign]
        trainer.fit(stop_at=stop_at)
        return seen

    return work


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A run of one process that nothing interrupted, and the rows of its steps."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, fit(run)(SOLO)


def test_a_run_goes_on_with_another_number_of_processes(whole: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    """The same images in the same order, none twice in a pass, and the same rows but for rounding."""
    run, found = tmp_path / "run", []
    for part, (size, stop_at) in enumerate(((4, 2), (2, 5), (1, None))):
        work = fit(run, stop_at=stop_at)
        ranks = [work(SOLO)] if size == 1 else in_world(size, tmp_path / f"part{part}", work)
        found += [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]
    assert found == whole[1]
    for steps in (found[:3], found[3:]):
        assert len({row for step in steps for row in step}) == 3 * 400
    expected, rows = RunFolder(whole[0]).rows(), RunFolder(run).rows()
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        if row["kind"] == "train":
            # float32 and steps this large: rounding grows within the six steps.
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5 if row["step"] == 1 else 0.05, abs=1e-9)
            assert row["lr"] == other["lr"]
        else:
            assert row["images"] == other["images"] == 360
            assert row["knn_top1"] == pytest.approx(other["knn_top1"], abs=5)


def test_two_processes_stopped_and_resumed_write_the_bytes_of_two_that_were_not(tmp_path: Path) -> None:
    in_world(2, tmp_path / "a", fit(tmp_path / "whole"))
    in_world(2, tmp_path / "b", fit(tmp_path / "run", stop_at=3))
    in_world(2, tmp_path / "c", fit(tmp_path / "run"))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_every_rank_has_every_neighbour_once_in_file_order(tmp_path: Path) -> None:
    """And the check of the same weights is the same for any number of ranks."""

    def work(world: World) -> list[Any]:
        trainer = Pretrainer(run_config(tmp_path / "never"), world=world)
        known, labels = trainer._neighbours(finished(trainer.state))
        trainer._record = lambda kind, scores: scores  # type: ignore[method-assign]
        return [known, labels, trainer._evaluate("final")]

    known, labels, row = work(SOLO)
    train = open_splits(None).train
    assert labels.tolist() == train.labels.tolist()
    for size in (2, 4):
        for found in in_world(size, tmp_path / f"{size}", work):
            torch.testing.assert_close(found[0], known, rtol=1e-5, atol=1e-6)
            assert torch.equal(found[1], labels)
            assert found[2] == row
    assert row["images"] == 360


def test_the_command_takes_several_processes_and_a_lost_one_ends_all(tmp_path: Path) -> None:
    plain = Pretrainer._step

    def work(rank: int) -> None:
        def step(self: Pretrainer, item: tuple[Batch, Batch]) -> None:
            if rank == 1 and self.state.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(self, item)

        Pretrainer._step = step  # type: ignore[method-assign]
        main([*WORDS, "--output", str(tmp_path / "run")])

    ranks = Ranks(2, tmp_path / "out", work)
    assert ranks.join() == [6, -signal.SIGKILL]
    assert "2 processes, each with its slice of every batch and 2 of the groups" in ranks.text(0)
    assert "rank 1 does not answer, dead or frozen" in ranks.text(0)
    assert "Traceback" not in ranks.text(0)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "train"


def test_the_command_refuses_groups_that_do_not_fit_in_one_sentence(tmp_path: Path) -> None:
    words = [*WORDS, "--shuffle-groups", "1", "--output", str(tmp_path / "run")]
    words = [word for i, word in enumerate(words) if words[i - 1 : i + 1] != ["--shuffle-groups", "4"]]
    words.remove("--shuffle-groups")  # the first of two
    ranks = commands(2, tmp_path / "out", lambda rank: words)
    assert ranks.join() == [2, 2]
    said = ranks.text(0) + ranks.text(1)
    assert said.count("fasttht:") == 1
    assert "--shuffle-groups: expected a multiple of the 2 processes" in said
    assert not (tmp_path / "run").exists()
