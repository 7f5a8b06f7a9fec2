"""Runs of several processes through the command line: resumed with another number of them, stopped, broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import checkpoint, roll_call
from fasttht.build import open_device
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.distributed import SOLO, World
from fasttht.errors import UsageError
from fasttht.pipelines import DataError
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.run_folder import RunFolder
from fasttht.train import Trainer
from tests.ranks import Ranks, commands, in_world

# Three steps a pass and a short fourth; slices are whole ghost groups, so that 1, 2 and 4 processes agree.
TINY: dict[str, Any] = {
    "width": 4, "batch_size": 400, "epochs": 2, "log_interval": 1, "eval_steps": [2], "bank_size": 700,
    "warmup_epochs": 1, "bn_group_size": 50, "threads": 1, "workers": 1, "steps": 1, "replay": 1,
}  # fmt: skip
FREE: dict[str, Any] = {"replay": 2, "steps": None, "epochs": 4, "drop_last": False}
WORDS = [
    "train", "--width", "4", "--batch-size", "96", "--epochs", "400", "--bank-size", "64", "--eval-steps", "1",
    "--threads", "1", "--workers", "1", "--warmup-epochs", "1", "--log-interval", "1", "--replay", "1", "--steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write the digits once, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(roll_call, "_END_S", 8.0)
        from fasttht.pipelines.splits import open_splits

        open_splits(None)
        yield


def config_of(output: Path, **options: Any) -> TrainConfig:
    chosen = {**read_preset("quickstart"), **TINY, **options, "output": str(output)}
    return resolve(from_flat({name: value for name, value in chosen.items() if value is not None}, where="test"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).rows()


def contents(run: Path) -> dict[str, bytes]:
    newest = checkpoint.newest(run, checkpoint.refuse)
    assert newest is not None
    return {path.name: path.read_bytes() for path in [*sorted(newest.glob("*.safetensors")), run / "metrics.jsonl"]}


def fit(output: Path, *, stop_at: int | None = None, **options: Any) -> Callable[[World], list[list[int]]]:
    """A piece of work: train, and return this rank's dataset rows of every step it took."""

    def work(world: World) -> list[list[int]]:
        trainer = Trainer(config_of(output, **options), world=world)
        seen, plain = [], trainer._step

        def watched(item: Batch) -> None:
            seen.append(item.index.tolist())
            plain(item)

        trainer._step = watched  # type: ignore[method-assign]
        trainer.fit(stop_at=stop_at)
        return seen

    return work


@pytest.mark.changes_rng
@pytest.mark.parametrize("options", [{}, {**FREE, "drop_last": True}], ids=["standard", "free"])
def test_a_run_goes_on_with_another_number_of_processes(options: dict[str, Any], tmp_path: Path) -> None:
    """The same images in the same order, the same rows but for rounding, and nothing of the state forgotten."""
    whole = fit(tmp_path / "whole", **options)(SOLO)
    found: list[list[int]] = []
    run = tmp_path / "run"
    for part, (size, stop_at) in enumerate(((4, 2), (2, 5), (1, None))):
        work = fit(run, stop_at=stop_at, **options)
        ranks = [work(SOLO)] if size == 1 else in_world(size, tmp_path / f"part{part}", work)
        found += [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]
    assert found == whole
    expected, rows = rows_of(tmp_path / "whole"), rows_of(run)
    assert [row["kind"] for row in rows] == [row["kind"] for row in expected]
    for row, other in zip(rows[:-1], expected[:-1], strict=True):
        # float32, signs of small gradients and steps this large: rounding grows to percents within the six steps.
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5 if row["step"] == 1 else 0.1)
        assert row["lr"] == other["lr"]
    assert rows[-1]["images"] == expected[-1]["images"] == 360
    assert sorted(rows[-1]) == sorted(expected[-1])


@pytest.mark.changes_rng
def test_two_processes_stopped_and_resumed_write_the_bytes_of_two_that_were_not(tmp_path: Path) -> None:
    in_world(2, tmp_path / "a", fit(tmp_path / "whole", **FREE))
    in_world(2, tmp_path / "b", fit(tmp_path / "run", stop_at=3, **FREE))
    in_world(2, tmp_path / "c", fit(tmp_path / "run", **FREE))
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


# -- processes that end --------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], Any], ranks: Ranks) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, ranks.text(0)
        assert all(process.is_alive() for process in ranks.processes), ranks.text(0) + ranks.text(1)
        time.sleep(0.02)


def test_a_signal_to_one_stops_all_after_the_same_step_with_one_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = commands(3, tmp_path / "out", lambda rank: [*WORDS, "--output", str(run)])
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows_of(run)) > 1, ranks)
    pid = ranks.processes[2].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert ranks.join() == [75, 75, 75]
    newest = checkpoint.listing(run)[-1]
    checkpoint.verify(newest)
    step = checkpoint.read_meta(newest)["step"]
    said = "".join(ranks.text(rank) for rank in range(3))
    assert f"SIGTERM after step {step} of" in said
    assert f"fasttht: rank {next(r for r in range(3) if 'SIGTERM' in ranks.text(r))}: SIGTERM" in said
    assert rows_of(run)[-1]["step"] == step
    assert not ranks.text(1).replace(ranks.text(1)[ranks.text(1).find("fasttht:") :], "").strip(), "rank 0 alone prints"


def broken(tmp_path: Path, at: Callable[[], None], *, size: int = 3, seconds: float = 4) -> Ranks:
    """Start a run whose rank 1 does something else in its third step."""
    plain = Trainer._step

    def work(rank: int) -> None:
        def step(self: Trainer, item: Batch) -> None:
            if rank == 1 and self.state.step == 2:
                at()
            plain(self, item)

        Trainer._step = step  # type: ignore[method-assign]
        from fasttht.cli import main

        main([*WORDS, "--output", str(tmp_path / "run"), "--dist-timeout", f"{seconds}"])

    return Ranks(size, tmp_path / "out", work)


def test_an_error_of_one_rank_ends_all_and_is_said_once(tmp_path: Path) -> None:
    def fails() -> None:
        raise DataError("val.beton: expected a whole image, got half of one; write it anew")

    ranks = broken(tmp_path, fails, seconds=600)  # the ranks end long before: nobody waits for the timeout
    assert ranks.join() == [6, 3, 6]
    assert ranks.text(1).splitlines()[-1].startswith("fasttht: rank 1: val.beton: expected a whole image")
    for rank in (0, 2):
        assert "fasttht:" not in ranks.text(rank)
        assert "Traceback" not in ranks.text(rank)


def test_a_bug_of_one_rank_ends_all_with_its_traceback(tmp_path: Path) -> None:
    def fails() -> None:
        raise ZeroDivisionError("a bug")

    ranks = broken(tmp_path, fails, seconds=60)
    assert ranks.join() == [6, 1, 6]
    assert "ZeroDivisionError: a bug" in ranks.text(1)
    assert "Traceback" in ranks.text(1)


def test_a_killed_rank_is_named_by_the_others(tmp_path: Path) -> None:
    ranks = broken(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), seconds=60)
    assert ranks.join() == [6, -signal.SIGKILL, 6]
    said = ranks.text(0) + ranks.text(2)
    assert "rank 1 does not answer, dead or frozen" in said
    assert said.count("fasttht:") == 1


def test_a_slow_rank_is_named_when_the_others_have_waited_long_enough(tmp_path: Path) -> None:
    ranks = broken(tmp_path, lambda: time.sleep(40))
    assert ranks.join(35) == [6, 6, 6]
    said = "".join(ranks.text(rank) for rank in (0, 2))
    assert "rank 1 is at step 2, in its own work" in said
    assert "for 4 s" in said


def test_a_frozen_rank_does_not_hold_the_others(tmp_path: Path) -> None:
    ranks = broken(tmp_path, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    for rank in (0, 2):
        ranks.processes[rank].join(30)
        assert ranks.processes[rank].exitcode == 6, ranks.text(rank)
    ranks.processes[1].kill()
    assert "rank 1 does not answer, dead or frozen" in ranks.text(0) + ranks.text(2)


def test_a_rank_that_never_comes_ends_the_start_within_the_timeout(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        from fasttht.cli import main

        if rank != 1:
            main([*WORDS, "--output", str(tmp_path / "run"), "--dist-timeout", "3"])

    ranks = Ranks(3, tmp_path / "out", work)
    assert ranks.join() == [6, 0, 6]
    assert "expected 3 processes within 3 s" in ranks.text(0)
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_options_are_refused(tmp_path: Path) -> None:
    ranks = commands(
        2, tmp_path / "out", lambda rank: [*WORDS, "--output", str(tmp_path / "run"), "--lr", f"0.{rank + 1}"]
    )
    assert ranks.join() == [2, 2]
    said = ranks.text(0) + ranks.text(1)
    assert "rank 1: expected the configuration of rank 0" in said
    assert said.count("fasttht:") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_by_rank_0_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    ranks = commands(2, tmp_path / "out", lambda rank: [*WORDS, "--output", str(tmp_path / "run")])
    assert ranks.join() == [2, 6]
    assert "fasttht: rank 0: --output: expected a new folder" in ranks.text(0)
    assert "fasttht" not in ranks.text(1)


@pytest.mark.parametrize(
    ("words", "environment", "text"),
    [
        (["train", "--output", "never"], {"RANK": "0"}, "expected torchrun's environment"),
        (["train", "--output", "never"], {"WORLD_SIZE": "many"}, "expected a number of processes, got many"),
        (["train", "--output", "never", "--device", "cuda:0"], {"RANK": "0"}, "--device: expected cpu or cuda beside"),
        (["train", "--dist-timeout", "0"], {}, "--dist-timeout: expected a positive number"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(
    words: list[str],
    environment: dict[str, str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fasttht.cli import run

    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    assert run(words) == 2
    assert text in capsys.readouterr().err
    assert not Path("never").exists()


def test_what_takes_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"got 2; only `fasttht train`, `pretrain` and `eval` take several"):
        open_device(TrainConfig())


def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path: Path) -> None:
    """The real thing: rank 1 is killed, torchrun starts both again, and they end with the bytes of a run unharmed."""
    words = ["train", *WORDS[1:], "--epochs", "1", "--checkpoint-interval", "2", "--output"]
    words = [word for i, word in enumerate(words) if words[i - 1 : i + 1] != ["--epochs", "400"]]
    words.remove("--epochs")  # the first of two
    script = tmp_path / "killed_once.py"
    script.write_text(
        "import os, signal, sys\n"
        "from fasttht.train import Trainer\n"
        "plain = Trainer._step\n"
        "def step(self, item):\n"
        "    first = os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "    if self.state.step == 5 and first:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(self, item)\n"
        "Trainer._step = step\n"
        "from fasttht.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
            "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            str(script), *words, str(tmp_path / "run"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 does not answer" in done.stderr
    assert "resuming" in done.stdout
    ranks = commands(2, tmp_path / "out", lambda rank: [*words, str(tmp_path / "whole")])
    assert ranks.join() == [0, 0]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "final"
    assert torch.tensor(len(rows_of(tmp_path / "run"))) > 1
