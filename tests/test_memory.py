"""Memory that runs out in a step or an evaluation: what is said, what is proposed, and that the proposal fits."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import checkpoint, cli, memory
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.distributed import SOLO, World
from fasttht.errors import MemoryShortError, is_shortage
from fasttht.memory import Usage, Watch, at_once, eval_advice, step_advice
from fasttht.pipelines.loader import Batch
from fasttht.pretrain import Pretrainer
from fasttht.pretrain_config import PretrainConfig, resolve_pretrain
from fasttht.resolve import resolve
from fasttht.train import Trainer
from tests.ranks import Ranks

GIB = 2**30
CPU = torch.device("cpu")
ON_CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.00 GiB of which"
TRAIN = [
    "train", "--objective", "at", "--width", "4", "--batch-size", "400", "--epochs", "2", "--steps", "1", "--replay",
    "1", "--eval-steps", "1", "--threads", "1", "--workers", "1", "--warmup-epochs", "0", "--decay-milestones", "1",
    "--checkpoint-interval", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        from fasttht.pipelines.splits import open_splits

        open_splits(None)
        yield


def device_of(monkeypatch: pytest.MonkeyPatch, *seen: Usage) -> None:
    """A device that holds this, asked for the first time, the second time, and from then on."""
    left = list(seen)
    monkeypatch.setattr(memory, "usage", lambda device: left.pop(0) if len(left) > 1 else left[0])


def config_of(**options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), "width": 4, **options}, where="test"))


@pytest.mark.parametrize(
    ("peak", "room", "images", "fits"),
    [
        # 1 GiB before, 9 at most and 2 more asked for by 100 images: 0.1 GiB each.
        (9, 10, 100, 50),  # by the room 85; but memory ran out before the peak was reached
        (9, 4.2, 100, 29),  # (4.2 x 0.95 - 1) / 0.1
        (9, 1, 100, 0),
        (9, 10, 1, 0),
    ],
)
def test_what_fits_follows_from_the_measured_peak(
    peak: int, room: float, images: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_of(monkeypatch, Usage(GIB, GIB, 10 * GIB), Usage(8 * GIB, peak * GIB, int(room * GIB)))
    with (
        pytest.raises(MemoryShortError, match=f"step 7: expected memory for {images} images.*fits {fits}$") as caught,
        Watch(CPU).over("step 7", images, lambda fits: f"fits {fits}"),
    ):
        raise torch.OutOfMemoryError(ON_CUDA)
    said = str(caught.value)
    assert "got none for 2.00 GiB more: 9.00 GiB were in use at most" in said
    assert f"of {room:.2f} GiB that this process can have on cpu" in said


def test_other_errors_pass_as_they_are() -> None:
    for error in (RuntimeError("shapes"), ValueError("out of memory")):
        with pytest.raises(type(error), match=str(error)), Watch(CPU).over("step 1", 2, lambda fits: ""):
            raise error
    for error in (MemoryError(), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError(ON_CUDA)):
        assert is_shortage(error)


def test_the_parts_that_are_proposed_are_as_few_as_fit_and_a_run_takes_them(tmp_path: Path) -> None:
    for world, batch, now, fits in ((SOLO, 256, 1, 100), (SOLO, 256, 2, 64), (World(0, 4), 1024, 1, 60)):
        config = config_of(batch_size=batch, grad_accum_steps=now)
        own = batch // world.size
        assert at_once(config, world) == -(-own // now)
        said = step_advice(config, world, 1437, tmp_path, fits)
        found = re.match(r"--grad-accum-steps (\d+) is expected to fit, (\d+) images at once; no checkpoint", said)
        assert found is not None, said
        parts, size = int(found[1]), int(found[2])
        assert parts > now
        assert size == -(-own // parts) <= fits
        assert at_once(config_of(batch_size=batch, grad_accum_steps=parts), world) == size
        assert not [fewer for fewer in range(now + 1, parts) if batch % fewer == 0 and -(-own // fewer) <= fits]
    free = config_of(batch_size=256, replay=4)
    assert step_advice(free, SOLO, 1437, tmp_path, 64).startswith("--grad-accum-steps 4 is expected to fit")
    for fits, said in ((8, "--grad-accum-steps 3 "), (3, "--grad-accum-steps 3 "), (2, "lower --batch-size")):
        assert step_advice(config_of(batch_size=9), SOLO, 1437, tmp_path, fits).startswith(said)
    assert step_advice(config_of(batch_size=256), SOLO, 1437, tmp_path, 1).startswith("lower --batch-size")
    assert [eval_advice(fits).rpartition("--eval-batch-size ")[2][:2] for fits in (1, 63, 64)] == ["1 ", "32", "64"]
    assert "eval-batch-size" not in eval_advice(0)
    pretrain = resolve_pretrain(PretrainConfig())
    groups = pretrain.moco.shuffle_groups
    said = step_advice(pretrain, SOLO, 1437, tmp_path, 5 * groups + 1)
    assert said.startswith(f"a run with --batch-size {5 * groups} is expected to fit")


def test_a_step_without_memory_ends_with_a_proposal_and_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plain = tmp_path / "run", Trainer._step

    def step(self: Trainer, item: Batch) -> None:
        if self.state.step == 2:
            raise torch.OutOfMemoryError(ON_CUDA)
        plain(self, item)

    monkeypatch.setattr(Trainer, "_step", step)
    with monkeypatch.context() as patch:
        device_of(patch, Usage(GIB, GIB, 10 * GIB), Usage(8 * GIB, 9 * GIB, 6 * GIB))
        assert cli.run([*TRAIN, "--output", str(run)]) == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "step 3: expected memory for 400 images at once, got none for 2.00 GiB more" in err
    assert "--grad-accum-steps 4 is expected to fit, 100 images at once" in err
    newest = checkpoint.listing(run)[-1]
    assert f"{newest} is kept" in err
    assert checkpoint.read_meta(newest)["step"] == 2
    checkpoint.verify(newest)
    monkeypatch.setattr(Trainer, "_step", plain)
    assert cli.run([*TRAIN, "--grad-accum-steps", "4", "--init", str(run), "--output", str(tmp_path / "next")]) == 0


@pytest.mark.parametrize("name", ["train", "eval"])
def test_an_evaluation_without_memory_proposes_smaller_batches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = {"train": [*TRAIN, "--output", str(run)], "eval": ["eval", str(run), "--eval-steps", "1"]}
    if name == "eval":
        assert cli.run(words["train"]) == 0

    def fail(*args: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr("fasttht.evaluate.least_likely", fail)
        assert cli.run(words[name]) == 6
    said = capsys.readouterr().err
    assert re.search(r"evaluation: expected memory for \d+ images at once, got none for 0.0 MiB more", said), said
    found = re.search(r"the same command with --eval-batch-size (\d+) is expected to fit", said)
    assert found is not None, said
    assert cli.run([*words[name], "--eval-batch-size", found[1]]) == 0


@pytest.mark.parametrize("where", ["fasttht.knn_bank.encoded", "fasttht.knn.neighbour_margin", "fasttht.knn.away_from"])
def test_the_nearest_neighbours_propose_smaller_batches_as_well(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run([*TRAIN, "--output", str(run)]) == 0
    words = ["eval", str(run), "--eval-steps", "1", "--suites", "knn", "--knn-features", "trunk", "--limit", "20"]

    def fail(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError(ON_CUDA)

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        assert cli.run(words) == 6
    said = capsys.readouterr().err
    assert re.search(r"evaluation: expected memory for \d+ images at once, got none for 2.00 GiB more", said), said
    found = re.search(r"the same command with --eval-batch-size (\d+) is expected to fit", said)
    assert found is not None, said
    assert cli.run([*words, "--eval-batch-size", found[1]]) == 0


def test_a_real_allocation_that_fails_is_explained(tmp_path: Path) -> None:
    """A process that may have 64 MiB more, and whose step wants a gibibyte."""
    run, plain = tmp_path / "run", Trainer._step

    def work(rank: int) -> None:
        def step(self: Trainer, item: Batch) -> None:
            if self.state.step == 2:
                addresses = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (addresses + 2**26, resource.RLIM_INFINITY))
                torch.empty(2**30, dtype=torch.uint8)
            plain(self, item)

        Trainer._step = step  # type: ignore[method-assign]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        cli.main([*TRAIN, "--output", str(run)])

    ranks = Ranks(1, tmp_path / "out", work)
    assert ranks.join() == [6], ranks.text(0)
    said = ranks.text(0)
    assert "step 3: expected memory for 400 images at once, got none for 1.00 GiB more" in said
    found = re.search(r"of ([\d.]+) (MiB|GiB) that this process can have on cpu", said)
    assert found is not None, said
    assert "Traceback" not in said
    checkpoint.verify(checkpoint.listing(run)[-1])
    assert checkpoint.read_meta(checkpoint.listing(run)[-1])["step"] == 2


def test_pretraining_is_watched_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Pretrainer, item: Any) -> None:
        raise torch.OutOfMemoryError(ON_CUDA)

    monkeypatch.setattr(Pretrainer, "_step", fail)
    device_of(monkeypatch, Usage(GIB, GIB, 10 * GIB), Usage(8 * GIB, 9 * GIB, 6 * GIB))
    assert cli.run(["pretrain", "--width", "4", "--threads", "1", "--output", str(tmp_path / "run")]) == 6
    assert re.search(r"a run with --batch-size \d+ is expected to fit; no checkpoint", capsys.readouterr().err)
