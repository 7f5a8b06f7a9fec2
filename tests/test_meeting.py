"""Stopping at a signal where no step is under way: waits for data, evaluations, several ranks all together."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import checkpoint, cli, evaluate, signals
from fasttht.attacks import auto, losses
from fasttht.build import build_model
from fasttht.config_file import from_flat, read_preset
from fasttht.distributed import World
from fasttht.evaluate import Tally, walk
from fasttht.knn_search import encoded
from fasttht.meeting import Meeting
from fasttht.metrics import Meter
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.producer import Producer
from fasttht.preemption import MARKER
from fasttht.resolve import resolve
from fasttht.run_folder import RunFolder
from fasttht.signals import Stop, Stopped
from fasttht.train import Trainer
from tests.ranks import commands, in_world

TRAIN = [
    "train", "--objective", "at", "--width", "4", "--batch-size", "400", "--epochs", "1", "--steps", "1", "--replay",
    "1", "--eval-steps", "1", "--threads", "1", "--workers", "1", "--warmup-epochs", "0", "--log-interval", "1",
    "--eval-batch-size", "60", "--decay-milestones", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        from fasttht.pipelines.splits import open_splits

        open_splits(None)
        yield


CPU = torch.device("cpu")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def calls(work: Callable[..., Any], number: int, then: Callable[[], None]) -> Callable[..., Any]:
    """The same function, which does something else before one of its calls, counted from 1."""
    count = 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            then()
        return work(*args, **options)

    return called


# -- one process ---------------------------------------------------------------------------------------------------


def batches(number: int = 3) -> Iterator[Batch]:
    for i in range(number):
        if i == 1:
            terminate()
        yield Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2))


def test_encoding_and_an_evaluation_without_attacks_stop_between_two_batches() -> None:
    done: list[int] = []
    with signals.stop_signals() as stop, signals.interruptible(stop), pytest.raises(Stopped, match="SIGTERM"):
        encoded(lambda x: x.flatten(1), batches(), done.append)
    model = build_model(resolve(from_flat({**read_preset("quickstart"), "width": 4}, where="test")), 10, CPU)
    tally = Tally([], 360, CPU, restarts=1, branches=False)
    with signals.stop_signals() as stop, signals.interruptible(stop), pytest.raises(Stopped):
        walk(model, batches(), [], tally, seed=0, num_classes=10, on_batch=done.append)
    assert done == [2, 2]


def test_a_signal_ends_the_wait_for_data_with_the_step_before_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The producer never sends the third batch; its stall timeout is ten minutes away."""
    plain, let_go, run = Producer._finish, threading.Event(), tmp_path / "run"
    monkeypatch.setattr("fasttht.pipelines.loader._END_S", 0.2)

    def stuck() -> None:
        while len(RunFolder(run).rows()) < 2:
            time.sleep(0.05)
        time.sleep(1)
        terminate()
        let_go.wait()

    monkeypatch.setattr(Producer, "_finish", calls(plain, 3, stuck))
    assert cli.run([*TRAIN, "--output", str(run)]) == 75
    let_go.set()
    assert "SIGTERM after step 2 of 3, saved" in capsys.readouterr().err
    assert cli.run([*TRAIN, "--output", str(run)]) == 0
    assert "after step 2 of 3" in capsys.readouterr().out
    assert [row["step"] for row in RunFolder(run).rows()] == [1, 2, 3, 3]


def test_rows_of_a_run_that_was_never_saved_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run dies before its first checkpoint; the next is told to stop before its first batch."""
    plain, step, let_go, run = Producer._finish, Trainer._step, threading.Event(), tmp_path / "run"
    monkeypatch.setattr("fasttht.pipelines.loader._END_S", 0.2)

    def die() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", calls(step, 2, die))
        with pytest.raises(ZeroDivisionError):
            cli.run([*TRAIN, "--output", str(run)])
    assert [row["step"] for row in RunFolder(run).rows()] == [1]

    def stuck() -> None:
        terminate()
        let_go.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Producer, "_finish", calls(plain, 1, stuck))
        assert cli.run([*TRAIN, "--output", str(run)]) == 75
    let_go.set()
    assert not checkpoint.listing(run)
    assert cli.run([*TRAIN, "--output", str(run)]) == 0
    assert [row["step"] for row in RunFolder(run).rows()] == [1, 2, 3, 3]


def test_a_finished_run_is_not_said_to_be_preempted(tmp_path: Path) -> None:
    """A signal at its very end leaves the file; a batch script that looks for it would start the run for ever."""
    words = [*TRAIN, "--output", str(tmp_path)]
    assert cli.run(words) == 0
    (tmp_path / MARKER).write_text("another launch")
    assert cli.run(words) == 0
    assert not (tmp_path / MARKER).exists()


# -- several ranks -------------------------------------------------------------------------------------------------


def test_ranks_stop_together_whoever_is_told_and_however_far_they_are(tmp_path: Path) -> None:
    """All of them or none, and each has exchanged as often: else the next exchange would not fit."""
    parts = (6, 4)
    cases = [(lag, who, at) for lag in (0, 1, 3, 9) for who in (0, 1) for at in range(1, parts[who] + 1)]
    cases += [(lag, None, 0) for lag in (0, 3)]

    def work(world: World) -> list[list[Any]]:
        found = []
        for lag, who, at in cases:
            stop, done, told = Stop(), 0, None
            before = world.calls.total()
            try:
                with Meeting(world, stop, max(parts), lag=lag) as meeting:
                    for part in range(1, parts[world.rank] + 1):
                        if who == world.rank and part == at:
                            stop.signal = signal.SIGUSR2
                        signals.check()
                        done = part
                        meeting.meet()
            except Stopped as stopped:
                told = stopped.signal.name
            signals.check()
            asked = world.calls.total() - before
            assert world.everybodys("after", [lag, told, asked]) == [[lag, told, asked]] * 2
            found.append([told, done])
        return found

    for rank, found in enumerate(in_world(2, tmp_path, work)):
        for (lag, who, at), (told, done) in zip(cases, found, strict=True):
            assert told == (None if who is None else "SIGUSR2")
            if who is None:
                assert done == parts[rank]
            elif who == rank:
                assert done == at - 1
            else:
                assert done == min(at + lag, parts[rank])


def test_a_wait_is_for_one_part_of_another_rank_and_not_for_all_of_them(tmp_path: Path) -> None:
    def work(world: World) -> int:
        with Meeting(world, Stop(), 7, lag=8) as meeting:
            for _ in range(7):
                time.sleep(1.0 * world.rank)
                meeting.meet()
        return world.calls.total()

    assert in_world(2, tmp_path, work, timeout_s=4) == [7, 7]


def test_ranks_leave_an_evaluation_together_and_do_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes to rank 1 alone, in the first of three batches of its final evaluation."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        told = calls(losses.least_likely, 1, lambda: terminate() if os.environ["RANK"] == "1" else None)
        told = calls(told, 2, lambda: print("went on"))  # noqa: T201 -- to the rank's file
        patch.setattr(evaluate, "least_likely", told)
        ranks = commands(2, tmp_path / "a", lambda rank: [*TRAIN, "--output", str(run)])
        assert ranks.join() == [75, 75], ranks.text(0) + ranks.text(1)
    assert (ranks.text(0) + ranks.text(1)).count("SIGTERM after step 3 of 3, saved") == 1
    assert "went on" not in ranks.text(0) + ranks.text(1)
    assert RunFolder(run).final() is None
    for path in (run, whole):
        ranks = commands(2, tmp_path / path.name, lambda rank, path=path: [*TRAIN, "--output", str(path)])
        assert ranks.join() == [0, 0], ranks.text(0) + ranks.text(1)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    words = ["eval", str(run), "--eval-steps", "1", "--limit", "200"]
    places: list[tuple[Any, str, list[str]]] = [
        (evaluate, "least_likely", []), (auto, "_attack", ["--suites", "apgd"]),
        ("fasttht.knn", "confidences", ["--suites", "knn", "--knn-features", "trunk"]),
    ]  # fmt: skip
    for module, name, more in places:
        where = f"{module if isinstance(module, str) else module.__name__}.{name}"
        with monkeypatch.context() as patch:
            plain = getattr(__import__(where.rpartition(".")[0], fromlist=[name]), name)
            patch.setattr(where, calls(plain, 1, lambda: terminate() if os.environ["RANK"] == "1" else None))
            ranks = commands(2, tmp_path / name, lambda rank, more=more: [*words, *more])
            assert ranks.join(90) == [75, 75], (name, ranks.text(0), ranks.text(1))
        assert (ranks.text(0) + ranks.text(1)).count("SIGTERM in an evaluation; the same command does it again") == 1
    ranks = commands(2, tmp_path / "last", lambda rank: [*words, "--output", str(tmp_path / "row.json")])
    assert ranks.join() == [0, 0], ranks.text(0) + ranks.text(1)
    assert json.loads((tmp_path / "row.json").read_text())["images"] == 200
    slow = calls(losses.least_likely, 1, lambda: time.sleep(40 * int(os.environ["RANK"])))
    monkeypatch.setattr(evaluate, "least_likely", slow)
    ranks = commands(2, tmp_path / "slow", lambda rank: [*words, "--dist-timeout", "3"])
    assert ranks.join(38) == [6, 6]
    assert "in its own work" in ranks.text(0)
    assert "for 3 s: find what holds it, or raise --dist-timeout" in ranks.text(0)


def test_ranks_know_that_all_are_alive_before_they_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exchanged between hosts comes first: inside a device's exchange nobody would name who is missing."""
    heard: list[str] = []
    for name in ("everybodys", "sum_"):
        plain = getattr(World, name)
        monkeypatch.setattr(
            World, name, lambda self, what, *args, plain=plain: (heard.append(what), plain(self, what, *args))[1]
        )
    ask = World.ask

    def asked(self: World, name: str, value: int) -> Callable[[], int]:
        answer = ask(self, name, value)
        return lambda: (heard.append("answer"), answer())[1]

    monkeypatch.setattr(World, "ask", asked)
    read = Meter.read
    monkeypatch.setattr(Meter, "read", lambda self: (heard.append("read"), read(self))[1])

    def work(world: World) -> list[str]:
        from fasttht.train import Trainer

        options = {
            **read_preset("quickstart"), "width": 4, "batch_size": 400, "epochs": 1, "replay": 1, "steps": 1,
            "eval_steps": [1], "threads": 1, "workers": 1, "log_interval": 1, "warmup_epochs": 0, "objective": "at",
            "output": str(tmp_path / "run"),
        }  # fmt: skip
        trainer = Trainer(resolve(from_flat(options, where="test")), world=world)
        heard.clear()
        trainer.fit()
        return heard

    for found in in_world(2, tmp_path, work):
        text = " ".join(found)
        assert text.count("answer bad samples read metrics") == 3, text
        assert "evaluation hits" in text, text


def test_a_timeout_of_no_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", "nothing", "--dist-timeout", "0"]) == 2
    assert "--dist-timeout: expected a positive number of seconds, got 0" in capsys.readouterr().err
