"""The same command again continues where it stopped, bit-identical on CPU, from any step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fasttht import checkpoint, resuming, signals
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import CheckpointError, Interrupted, UsageError
from fasttht.pipelines import DataError
from fasttht.resolve import resolve
from fasttht.run_folder import RunFolder
from fasttht.subject import open_run
from fasttht.train import Trainer

# Three steps a pass, two passes; rows of metrics fall between checkpoints, so their sums must be saved too.
TINY: dict[str, Any] = {
    "width": 4, "batch_size": 400, "epochs": 2, "log_interval": 2, "eval_steps": [2], "model_ema": True,
    "model_ema_decay": 0.9, "bank_size": 700, "warmup_epochs": 1,
}  # fmt: skip
STEPS = 6
MODES: dict[str, dict[str, Any]] = {
    "standard": {"steps": 2, "targeted": True, "start_clean_prob": 0.5},
    "free": {"replay": 2, "epochs": 4, "grad_accum_steps": 2},
    "at": {"objective": "at", "steps": 1, "step_engine": "fused"},
    "dataset bank": {"steps": 1, "bank_kind": "dataset", "num_negatives": 300},
    "mixture BN": {"objective": "mbn-alp", "replay": 2, "epochs": 4},
}
# The first modes are stopped after every step; the others, whose own state is small, after one.
STOPS = {"dataset bank": [4], "mixture BN": [4]}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write the digits once, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config_of(output: Path, **options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), **TINY, **options, "output": str(output)}, where="test"))


def contents(run: Path) -> dict[str, bytes]:
    """Everything a run computes: the tensors of its last checkpoint and its rows.

    state.json is left out: it names positions in timing.jsonl, which holds wall-clock figures.
    """
    newest = checkpoint.newest(run, checkpoint.refuse)
    assert newest is not None
    files = [*sorted(newest.glob("*.safetensors")), run / "metrics.jsonl", run / "summary.csv"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("mode", MODES)
def test_resume_at_every_step_equals_the_uninterrupted_run(mode: str, tmp_path: Path) -> None:
    options = MODES[mode]
    whole = tmp_path / "whole"
    row = Trainer(config_of(whole, **options)).fit()
    assert row is not None
    expected = contents(whole)
    expected_meta = checkpoint.read_meta(checkpoint.listing(whole)[-1])
    for stop in STOPS.get(mode, range(1, STEPS + 1)):
        run = tmp_path / f"stop{stop}"
        first = Trainer(config_of(run, **options))
        assert first.fit(stop_at=stop) is None
        second = Trainer(config_of(run, **options))
        assert second.resumed
        assert second.state.step == stop
        assert second.fit() == row
        found = contents(run)
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name] == content, f"{name} differs after a stop at {stop}"
        meta = checkpoint.read_meta(checkpoint.listing(run)[-1])
        for key in ("step", "loader", "identity"):
            assert meta[key] == expected_meta[key]
        assert meta["rows"]["metrics.jsonl"] == expected_meta["rows"]["metrics.jsonl"]


@pytest.mark.changes_rng
def test_a_run_goes_on_with_the_frozen_encoder_it_started_with_and_no_other(tmp_path: Path) -> None:
    """Its weights are in no checkpoint, so a file that has changed must be noticed."""
    options = {**MODES["free"], "clean_encoder": str(tmp_path / "g.safetensors")}
    torch.manual_seed(0)
    first, other = (encoder_of(config_of(tmp_path / "run", **MODES["free"])) for _ in range(2))
    save_file(first, tmp_path / "g.safetensors")
    assert Trainer(config_of(tmp_path / "run", **options)).fit(stop_at=2) is None
    save_file(other, tmp_path / "g.safetensors")
    with pytest.raises(CheckpointError, match="expected the clean encoder that the run started with"):
        Trainer(config_of(tmp_path / "run", **options))
    save_file(first, tmp_path / "g.safetensors")
    assert Trainer(config_of(tmp_path / "run", **options)).state.step == 2


def encoder_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    """A clean encoder for that network, with other weights at each call."""
    state = build_model(config, 10, torch.device("cpu")).state_dict()
    return {
        name: torch.rand_like(tensor).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if not name.startswith("classifier.")
    }


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path / "run", **MODES["at"])
    Trainer(config).fit(stop_at=1)
    monkeypatch.setattr(resuming, "META_VERSION", resuming.META_VERSION + 1)
    with pytest.raises(CheckpointError, match="continue it with the release that wrote it"):
        Trainer(config)


def test_a_run_says_how_it_takes_its_steps(tmp_path: Path) -> None:
    assert "step engine fused: as asked" in Trainer(config_of(tmp_path / "run", **MODES["at"])).describe()


def test_momentum_and_ema_keep_their_parameters_strides_after_loading(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", **MODES["standard"])
    Trainer(config).fit(stop_at=1)
    state = Trainer(config).state
    strided, moved = 0, False
    assert state.ema is not None
    for parameter, average in zip(state.model.parameters(), state.ema.parameters(), strict=True):
        buffer = state.optimizer.state[parameter]["momentum_buffer"]
        assert buffer.stride() == parameter.stride() == average.stride()
        moved |= bool(buffer.any())
        strided += not parameter.is_contiguous()
    assert moved
    assert strided > 0, "no channels-last parameter: the test would show nothing"


def test_every_tensor_that_a_step_changes_is_in_the_checkpoint() -> None:
    """A field added to the state and forgotten in `tensors` would make a resume differ silently."""
    import numpy as np

    from fasttht.attacks.pgd import Draw
    from fasttht.build import build_state
    from fasttht.pipelines.loader import Batch
    from fasttht.pipelines.splits import open_splits
    from fasttht.steps import free_step, standard_step

    for mode, options in MODES.items():
        config = config_of(Path("unused"), **MODES[mode])
        state = build_state(config, open_splits(None), torch.device("cpu"), 3)
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
        batch = Batch(x, torch.from_numpy(rng.integers(0, 10, 400)), torch.arange(400))
        before = {id(t): (name, t.clone()) for name, t in reachable(state)}
        if "replay" in options:
            free_step(state, config, batch, Draw(0))
        else:
            standard_step(state, config, batch, Draw(0), num_classes=10)
        saved = {t.data_ptr() for group in state.tensors().values() for t in group.values()}
        for name, tensor in reachable(state):
            known = before.get(id(tensor))
            changed = known is None or not torch.equal(known[1], tensor)
            # lr follows from the update count, last_found_inf is written before it is read
            if changed and not name.endswith((".lr", "last_found_inf")):
                assert tensor.data_ptr() in saved, f"{mode}: {name} changes in a step but is not saved"


def reachable(state: Any) -> list[tuple[str, torch.Tensor]]:
    """Every tensor that hangs on the state, by walking attributes, dicts and modules."""
    found: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()

    def walk(name: str, value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append((name, value.detach() if value.requires_grad else value))
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}[{key if isinstance(key, str | int) else '.'}]", item)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(f"{name}[{i}]", item)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith(("fasttht", "torch")):
            for key, item in vars(value).items():
                walk(f"{name}.{key}", item)

    walk("state", state)
    return [(name, t) for name, t in found if "param_groups" not in name or not name.endswith("[lr]")]


def test_a_run_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(config_of(tmp_path / "run", **MODES["at"])).fit(stop_at=1)
    with pytest.raises(CheckpointError, match=r"arch resnet18 \(now resnet34\)"):
        Trainer(config_of(tmp_path / "run", **MODES["at"], arch="resnet34"))
    with pytest.raises(CheckpointError, match="--resume never"):
        Trainer(config_of(tmp_path / "run", **MODES["at"], resume="never"))


def test_other_data_under_the_same_path_are_refused(tmp_path: Path) -> None:
    from fasttht.pipelines.writer import write_dataset

    write_dataset("digits", None, tmp_path / "data", seed=0)
    config = config_of(tmp_path / "run", **MODES["at"], data=str(tmp_path / "data"))
    Trainer(config).fit(stop_at=1)
    write_dataset("digits", None, tmp_path / "data", seed=1, force=True)
    with pytest.raises(DataError, match="fingerprint"):
        Trainer(config)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", **MODES["at"], checkpoint_interval=1)
    row = Trainer(config).fit()
    whole = contents(tmp_path / "run")
    newest = checkpoint.listing(tmp_path / "run")[-1]
    damaged = newest / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(line + "\n" for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:-1])
    )
    second = Trainer(config)
    assert "damaged, trying an older one" in capsys.readouterr().out
    assert second.state.step == STEPS - 1
    assert second.fit() == row
    assert contents(tmp_path / "run")["metrics.jsonl"] == whole["metrics.jsonl"]


def test_killed_process_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """A real SIGKILL of the plain command line, as soon as a checkpoint exists."""
    words = [
        "train", "--replay", "4", "--epochs", "12", "--width", "4", "--batch-size", "128", "--checkpoint-interval",
        "1", "--log-interval", "7", "--eval-steps", "1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "fasttht", *words]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--output", str(whole)], check=True, capture_output=True, cwd=tmp_path)
    process = subprocess.Popen([*command, "--output", str(killed)], stdout=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not any((killed / "checkpoints").glob("step-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "summary.csv").exists()
    subprocess.run([*command, "--output", str(killed)], check=True, capture_output=True, cwd=tmp_path)
    rows = (killed / "metrics.jsonl").read_bytes()
    assert rows == (whole / "metrics.jsonl").read_bytes()
    assert json.loads(rows.splitlines()[-1])["kind"] == "final"
    for name in ("model", "training", "clean_encoder"):
        ours, theirs = (
            (checkpoint.newest(run, checkpoint.refuse) or run) / f"{name}.safetensors" for run in (killed, whole)
        )
        assert ours.read_bytes() == theirs.read_bytes(), name
    again = subprocess.run([*command, "--output", str(killed)], check=True, capture_output=True, cwd=tmp_path)
    assert b"is finished" in again.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", **MODES["at"])
    trainer = Trainer(config)
    step = trainer._step

    def interrupted(batch: Any) -> None:
        step(batch)
        if trainer.state.step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer, "_step", interrupted)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="step 2 of 6, saved") as caught:
        trainer.fit()
    assert caught.value.exit_code == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    row = Trainer(config).fit()
    assert row == Trainer(config_of(tmp_path / "whole", **MODES["at"])).fit()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", **MODES["at"])
    first, second = Trainer(config), Trainer(config)
    with first.folder.locked(), pytest.raises(UsageError, match="no other process"):
        second.fit()
    first.fit(stop_at=2)
    with pytest.raises(UsageError, match="run the same command again"):
        second.fit()
    rows = tmp_path / "run" / "metrics.jsonl"
    rows.write_text(rows.read_text() + '{"kind": "train"}\n{"kind": "tr')  # written after the checkpoint, and torn
    before = rows.read_bytes()
    third = Trainer(config)
    with first.folder.locked(), pytest.raises(UsageError, match="no other process"):
        third.fit()
    assert rows.read_bytes() == before, "a refused process must not touch the rows"
    assert third.fit() is not None


def test_a_folder_with_files_that_a_run_would_overwrite_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(UsageError, match=r"metrics\.jsonl"):
        Trainer(config_of(tmp_path, **MODES["at"]))
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_the_average_of_a_short_run_has_left_the_initial_weights(tmp_path: Path) -> None:
    """With a constant decay of 0.9998 it would still be them after six updates."""
    config = config_of(tmp_path / "run", **MODES["at"], model_ema_decay=0.9998)
    trainer = Trainer(config)
    initial = trainer.state.model.trunk.conv1.weight.detach().clone()
    trainer.fit(stop_at=5)
    assert trainer.state.ema is not None
    weight, average = trainer.state.model.trunk.conv1.weight, trainer.state.ema.trunk.conv1.weight
    assert (average - initial).norm() > 0.3 * (weight - initial).norm()


def test_a_named_checkpoint_is_gone_on_from_and_what_came_after_it_is_dropped(tmp_path: Path) -> None:
    options: dict[str, Any] = {**MODES["at"], "checkpoint_interval": 1, "checkpoint_hist": 9}
    row = Trainer(config_of(tmp_path / "run", **options)).fit()
    whole = contents(tmp_path / "run")
    third = checkpoint.listing(tmp_path / "run")[2]
    again = Trainer(config_of(tmp_path / "run", **options, resume=str(third)))
    assert again.state.step == 3
    assert again.fit() == row
    assert contents(tmp_path / "run") == whole
    with pytest.raises(UsageError, match="--resume: expected auto, never or a checkpoint of"):
        Trainer(config_of(tmp_path / "run", **options, resume=str(tmp_path)))


def test_the_checkpoint_with_the_best_evaluation_is_kept_and_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**MODES["at"], "epochs": 5, "eval_interval": 1, "checkpoint_hist": 1}
    config = config_of(tmp_path / "run", **options)
    accuracy = {3: 40.0, 6: 60.0, 9: 60.0, 12: 50.0, 15: 55.0}  # of equals the first is the best
    threes = [f"step-{step:08d}" for step in accuracy]

    def scored(self: Trainer, kind: str) -> dict[str, Any]:
        pgd = accuracy[self.state.step]
        return self._record(kind, {"clean": 99.0 - pgd / 9, "pgd2": pgd, "pgd2-targeted": pgd + 9, "images": 360})

    monkeypatch.setattr(Trainer, "_evaluate", scored)

    def kept(path: Path) -> list[str]:
        return [folder.name for folder in checkpoint.listing(path)]

    folder = RunFolder(tmp_path / "run")
    assert Trainer(config).fit(stop_at=2) is None
    with pytest.raises(CheckpointError, match=r"--checkpoint best: expected .* got none"):
        resuming.choose(folder, "best")
    for stop, expected in ((5, [threes[0], "step-00000005"]), (8, [threes[1], "step-00000008"]), (12, threes[1:4:2])):
        assert Trainer(config).fit(stop_at=stop) is None
        assert kept(folder.path) == expected
    assert Trainer(config).fit() is not None
    assert kept(folder.path) == [threes[1], threes[4]]
    assert resuming.choose(folder, "best").name == threes[1]
    assert resuming.choose(folder, "last").name == threes[4]
    assert resuming.choose(folder, threes[1]).name == threes[1]
    with pytest.raises(CheckpointError, match=r"--checkpoint: expected last, best or one of step-00000006, step-.*15"):
        resuming.choose(folder, "step-6")
    assert open_run(folder.path, config, which="best").checkpoint == threes[1]
    whole = config_of(tmp_path / "whole", **options)
    assert Trainer(whole).fit() is not None
    assert contents(tmp_path / "whole") == contents(folder.path)
    assert kept(tmp_path / "whole") == kept(folder.path)
    # What is gone is not the best of what is there.
    shutil.rmtree(folder.path / checkpoint.FOLDER / threes[1])
    assert resuming.choose(folder, "best").name == threes[4]
    (resuming.choose(folder, "last") / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="expected sha256"):
        resuming.choose(folder, "best")


def test_a_signal_in_an_evaluation_ends_it_midway_and_the_resumed_run_does_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**MODES["at"], "eval_interval": 1}
    config = config_of(tmp_path / "run", **options)
    trainer, calls = Trainer(config), []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        check()

    check = signals.check
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_evaluate", lambda kind: interrupted())
        with pytest.raises(Interrupted, match="step 3 of 6, saved") as caught:
            trainer.fit()
    assert caught.value.exit_code == 75
    assert "eval" not in [row["kind"] for row in trainer.folder.rows()]
    Trainer(config).fit()
    Trainer(config_of(tmp_path / "whole", **options)).fit()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
