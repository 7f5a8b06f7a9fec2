"""What is in a run folder may be damaged, or meant to do harm; and the same command goes on, whatever --resume says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht import checkpoint, run_folder
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import CheckpointError, Interrupted, NonFiniteError, UsageError
from fasttht.resolve import resolve
from fasttht.run_folder import RunFolder
from fasttht.train import Trainer

# Three steps a pass, two passes.
TINY: dict[str, Any] = {
    "objective": "at", "steps": 1, "width": 2, "batch_size": 400, "epochs": 2, "log_interval": 2, "eval_steps": [1],
    "warmup_epochs": 1, "checkpoint_interval": 1, "checkpoint_hist": 9,
}  # fmt: skip
TAILS = {"NUL": b"\0" * 90, "bytes": b"\xff\xfe\n", "a list": b"[1]\n", "half": b'{"kind": "tr', "a number": b"7\n"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write the digits once, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config_of(output: Path, **options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), **TINY, **options, "output": str(output)}, where="test"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's state.json, and its manifest with it."""
    meta = checkpoint.read_meta(folder)
    change(meta)
    (folder / "state.json").write_text(json.dumps(meta))
    sums = json.loads((folder / "MANIFEST.json").read_text())
    sums["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(sums))


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "no version": lambda meta: meta.pop("version"),
    "no loader": lambda meta: meta.pop("loader"),
    "a loader that is none": lambda meta: meta.update(loader=[]),
    "no rows": lambda meta: meta.pop("rows"),
    "a row file elsewhere": lambda meta: meta["rows"].update({"../victim": 0}),
    "a row file less": lambda meta: meta["rows"].pop("timing.jsonl"),
    "a negative size": lambda meta: meta["rows"].update({"metrics.jsonl": -1}),
    "a size that is true": lambda meta: meta["rows"].update({"metrics.jsonl": True}),
    "an epoch of letters": lambda meta: meta["loader"].update(epoch="x"),
    "a negative epoch": lambda meta: meta["loader"].update(epoch=-5),
    "an epoch beyond the run": lambda meta: meta["loader"].update(epoch=7),
    "another step": lambda meta: meta["loader"].update(step=meta["loader"]["step"] + 1),
    "bad rows of letters": lambda meta: meta["loader"].update(bad_rows=["x"]),
    "no guard": lambda meta: meta.pop("guard"),
    "a guard that is none": lambda meta: meta.update(guard=[1, 2]),
    "depends on a list": lambda meta: meta.update(depends_on=[]),
    "evaluation due": lambda meta: meta.update(evaluation_due="x"),
}


def test_a_state_that_no_run_writes_is_refused_and_nothing_beside_the_run_is_touched(tmp_path: Path) -> None:
    config, victim = config_of(tmp_path / "run"), tmp_path / "victim"
    Trainer(config).fit(stop_at=2)
    victim.write_text("precious")
    newest = checkpoint.listing(tmp_path / "run")[-1]
    state, manifest = ((newest / name).read_text() for name in ("state.json", "MANIFEST.json"))
    for what, change in WRONG.items():
        edit(newest, change)
        with pytest.raises(CheckpointError, match=r"state\.json: expected \w+ as|of version 4, got None") as error:
            Trainer(config).fit(stop_at=3)
        assert "\n" not in str(error.value), what
        (newest / "state.json").write_text(state)
        (newest / "MANIFEST.json").write_text(manifest)
    assert victim.read_text() == "precious"
    assert Trainer(config).fit(stop_at=3) is None
    with pytest.raises(CheckpointError, match="restore it"):
        RunFolder(tmp_path / "run").rewind({"metrics.jsonl": 10**9})


def test_rewinding_cuts_our_two_files_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for name in ("run/metrics.jsonl", "run/timing.jsonl", "victim"):
        (tmp_path / name).write_text("precious\n")
    folder.rewind({"metrics.jsonl": 0, "timing.jsonl": 3, "../victim": 0})
    assert [(tmp_path / name).stat().st_size for name in ("run/metrics.jsonl", "run/timing.jsonl", "victim")] == [
        0,
        3,
        9,
    ]


@pytest.mark.parametrize("tail", TAILS)
def test_rows_that_are_damaged_behind_the_checkpoint_do_not_matter_and_before_it_are_named(
    tail: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path / "run")
    Trainer(config).fit(stop_at=4)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + TAILS[tail])
    folder = RunFolder(tmp_path / "run")
    assert folder.final() is None
    assert [row["step"] for row in folder.rows()] == [2, 4]
    assert Trainer(config).fit(stop_at=5) is None
    assert path.read_bytes() == whole
    damaged = TAILS[tail][: whole.index(b"\n")].removesuffix(b"\n")
    path.write_bytes(damaged + b" " * (whole.index(b"\n") - len(damaged)) + whole[whole.index(b"\n") :])
    assert folder.final() is None
    trainer = Trainer(config)
    for read in (folder.rows, trainer.fit):
        with pytest.raises(
            CheckpointError, match=r"metrics\.jsonl: expected a line of JSON .* in line 1; restore the file"
        ):
            read()
    assert trainer.state.step == 5, "it is said before a step is taken"


def test_a_final_row_without_figures_is_none(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"kind": "final", "step": 3}, {"kind": "final", "step": 3, "images": 9},
        {"kind": "final", "step": 3, "images": 9, "clean_top1": "x"}, {"kind": "final", "clean_top1": 1.0, "images": 9},
    ]  # fmt: skip
    for row in rows:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        assert RunFolder(tmp_path).final() is None, row
    (tmp_path / "metrics.jsonl").write_text('{"kind": "final", "step": 3, "images": 9, "clean_top1": 50.0}\n')
    assert RunFolder(tmp_path).final() is not None


def test_a_signal_after_the_decision_not_to_save_waits_for_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", checkpoint_interval=0)
    trainer = Trainer(config)

    def late() -> bool:  # asked just after the signal was looked for
        if trainer.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr(trainer, "_late", late)
    with pytest.raises(Interrupted, match="after step 2 of 6, saved"):
        trainer.fit()
    assert [path.name for path in checkpoint.listing(tmp_path / "run")] == ["step-00000002"]


def test_a_command_that_goes_back_continues_when_it_is_started_again_and_goes_back_anew_once_it_has_ended(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    row = Trainer(config_of(run)).fit()
    second, *_ = (path for path in checkpoint.listing(run) if path.name == "step-00000002")
    back = config_of(run, resume=str(second), checkpoint_hist=1, checkpoint_interval=0)
    trainer = Trainer(back)
    assert trainer.state.step == 2
    monitor: list[int] = []

    def killed(item: Any) -> None:
        monitor.append(trainer.state.step)
        raise KeyboardInterrupt

    trainer._step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert checkpoint.listing(run)[-1] == second, "what it has gone back behind cannot be continued from"
    assert Trainer(back).state.step == 2
    assert Trainer(back).fit(stop_at=4) is None
    assert checkpoint.listing(run)[-1].name == "step-00000004"
    assert not second.exists(), "rotated"
    assert Trainer(back).state.step == 4
    assert Trainer(back).fit() == row
    with pytest.raises(UsageError, match="--resume: expected auto, never or a checkpoint of"):
        Trainer(back)
    last = config_of(run, resume=str(checkpoint.listing(run)[-1]))
    assert Trainer(last).fit() == row


def test_another_resume_ends_what_one_has_begun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(config_of(run)).fit(stop_at=3)
    back = config_of(run, resume=str(run / "checkpoints" / "step-00000001"))
    Trainer(back).fit(stop_at=3)
    assert Trainer(back).state.step == 3
    Trainer(config_of(run)).fit(stop_at=4)
    assert Trainer(back).state.step == 1
    elsewhere = tmp_path / "other" / "checkpoints" / "step-00000001"
    Trainer(back).fit(stop_at=2)
    with pytest.raises(UsageError, match="--resume"):
        Trainer(config_of(run, resume=str(elsewhere)))


def test_a_new_run_continues_when_its_command_is_started_again_and_others_are_refused(tmp_path: Path) -> None:
    new = config_of(tmp_path / "run", resume="never")
    Trainer(new).fit(stop_at=2)
    assert Trainer(new).state.step == 2
    row = Trainer(new).fit()
    with pytest.raises(CheckpointError, match="--resume never"):
        Trainer(new)
    Trainer(config_of(tmp_path / "other")).fit(stop_at=2)
    with pytest.raises(CheckpointError, match="--resume never"):
        Trainer(config_of(tmp_path / "other", resume="never"))
    assert row == Trainer(config_of(tmp_path / "other")).fit()
    with pytest.raises(UsageError, match=r"--resume: expected .* there are none"):
        Trainer(config_of(tmp_path / "none", resume=str(tmp_path / "run" / "checkpoints" / "step-00000006")))
    assert not (tmp_path / "none").exists()


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Make the gradients of these steps infinite."""
    take = trainer._step

    def bad(item: Any) -> None:
        handle: Any = None
        if trainer.state.step + 1 in steps:
            parameter = list(trainer.state.model.parameters())[3]
            handle = parameter.register_hook(lambda grad: torch.full_like(grad, float("inf")))
        take(item)
        if handle is not None:
            handle.remove()

    trainer._step = bad  # type: ignore[method-assign]


@pytest.mark.parametrize("options", [{}, {"replay": 2, "steps": None, "epochs": 8}], ids=["standard", "free"])
def test_a_non_finite_gradient_is_said_with_its_own_step(options: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", **{"log_interval": 5, "checkpoint_interval": 0, "epochs": 4, **options})
    trainer = Trainer(config)
    poison(trainer, {7, 9})
    with pytest.raises(NonFiniteError, match=r"^step 7: .* (2|4) steps with a non-finite gradient up to step 10"):
        trainer.fit()


def test_a_storm_is_seen_by_a_run_that_is_stopped_more_often_than_it_lasts(tmp_path: Path) -> None:
    options = {"log_interval": 4, "checkpoint_interval": 0, "checkpoint_hist": 1, "epochs": 40}
    config = config_of(tmp_path / "run", amp_dtype="fp16", **options)
    for stop in (10, 20, 30, 40, 50, 60):
        trainer = Trainer(config)
        poison(trainer, set(range(3, 120)))
        if stop < 60:
            assert trainer.fit(stop_at=stop) is None
    with pytest.raises(NonFiniteError, match=r"^step 52: .*, got 50 of the last 52 steps without one"):
        trainer.fit()


def test_a_file_is_written_whole_or_not_at_all_and_its_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(run_folder.checkpoint, "sync", synced.append)
    run_folder.write_whole(tmp_path / "a.txt", "one")
    assert synced == [tmp_path]

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_folder.write_whole(tmp_path / "a.txt", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "one"
