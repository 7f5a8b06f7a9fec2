"""Pre-training end to end: the same bytes after any stop, and a folder that `train --clean-encoder` takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fasttht import checkpoint, cli, pretrain, train
from fasttht.attacks.pgd import Draw
from fasttht.augment import Recipe, augment_batch
from fasttht.config_file import PRETRAIN, preset_names, read_preset
from fasttht.errors import Interrupted
from fasttht.moco import MocoState, build_encoder, moco_step
from fasttht.pipelines.loader import Batch
from fasttht.pretrain import Pretrainer
from fasttht.pretrain_config import PretrainConfig, resolve_pretrain
from fasttht.schedule import CosineSchedule

TINY: dict[str, Any] = {
    "width": 4, "batch_size": 400, "epochs": 2, "log_interval": 2, "queue_size": 700, "shuffle_groups": 2,
    "eval_interval": 1, "knn_k": 5,
}  # fmt: skip
STEPS = 6
WORDS = [
    "--width", "4", "--batch-size", "400", "--epochs", "2", "--queue-size", "700", "--shuffle-groups", "2",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write the digits once, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config_of(output: Path, **options: Any) -> PretrainConfig:
    config = PretrainConfig()
    for name, value in {**read_preset(PRETRAIN, pretrain=True), **TINY, **options, "output": output}.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, tuple(value) if isinstance(value, list) else value)
    return resolve_pretrain(config)


def contents(run: Path) -> dict[str, bytes]:
    """Everything a run computes: the tensors of its last checkpoint and its rows."""
    newest = checkpoint.newest(run, checkpoint.refuse)
    assert newest is not None
    files = [*sorted(newest.glob("*.safetensors")), run / "metrics.jsonl", run / "summary.csv"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert Pretrainer(config_of(run)).fit() is not None
    return run


def test_cudnn_searches_in_steps_and_never_in_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    for name in ("moco_step", "encoded"):
        function = getattr(pretrain, name)

        def watched(*args: Any, _name: str = name, _function: Any = function, **options: Any) -> Any:
            seen.append((_name, torch.backends.cudnn.benchmark))
            return _function(*args, **options)

        monkeypatch.setattr(pretrain, name, watched)
    Pretrainer(config_of(tmp_path / "run")).fit()
    assert set(seen) == {("moco_step", True), ("encoded", False)}


def test_resume_at_every_step_equals_the_uninterrupted_run(whole: Path, tmp_path: Path) -> None:
    expected = contents(whole)
    assert set(expected) == {
        "clean_encoder.safetensors", "key_encoder.safetensors", "training.safetensors", "metrics.jsonl", "summary.csv",
    }  # fmt: skip
    for stop in range(1, STEPS + 1):
        run = tmp_path / f"stop{stop}"
        assert Pretrainer(config_of(run)).fit(stop_at=stop) is None
        second = Pretrainer(config_of(run))
        assert second.resumed
        assert second.state.step == stop
        assert second.fit() is not None
        found = contents(run)
        for name, content in expected.items():
            assert found[name] == content, f"{name} differs after a stop at {stop}"


def test_rows_say_what_was_trained_and_how_good_the_features_are(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "eval", "train", "train", "final"]
    assert rows[-1]["images"] == 360
    assert rows[-1]["knn_top1"] > 20, "a tenth is chance"
    trained = [row for row in rows if row["kind"] == "train"]
    assert {"loss", "twin_top1", "grad_norm", "lr", "skipped_steps"} <= trained[0].keys()
    assert trained[0]["lr"] > trained[1]["lr"] > trained[2]["lr"] > 0
    assert all(row["skipped_steps"] == 0 for row in trained)


def test_every_tensor_that_a_step_changes_is_in_the_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path, batch_size=8)
    state = MocoState(config, build_encoder(config, torch.device("cpu")), CosineSchedule(0.1, total=4))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    batch = Batch(x, torch.zeros(8, dtype=torch.int64), torch.arange(8))

    def tensors() -> dict[str, torch.Tensor]:
        found = {f"query.{n}": t for n, t in state.encoder.state_dict().items()}
        found |= {f"key.{n}": t for n, t in state.key_encoder.state_dict().items()}
        found |= {n: t for n, t in vars(state).items() if isinstance(t, torch.Tensor)}
        for part in (state.queue, state.meter, state.scaler):
            found |= {f"{type(part).__name__}.{n}": t for n, t in vars(part).items() if isinstance(t, torch.Tensor)}
        for i, slots in enumerate(state.optimizer.state.values()):
            found |= {f"optimizer.{i}.{n}": t for n, t in slots.items()}
        return found

    before = {name: tensor.clone() for name, tensor in tensors().items()}
    for step in range(2):
        moco_step(state, config, batch, batch, Recipe(), Draw(0, 0, step))
    saved = {t.data_ptr() for group in state.tensors().values() for t in group.values()}
    changed = {name for name, tensor in tensors().items() if not torch.equal(tensor, before[name])}
    assert len(changed) > 100
    assert {name for name in changed if tensors()[name].data_ptr() not in saved} <= {"lr"}  # follows from the updates


def test_killed_process_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """A real SIGKILL of the plain command line, as soon as a checkpoint exists."""
    command = [sys.executable, "-m", "fasttht", "pretrain", *WORDS, "--checkpoint-interval", "1", "--log-interval", "4"]
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
    assert contents(killed) == contents(whole)


def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Pretrainer(config_of(tmp_path / "run"))
    step = trainer._step

    def interrupted(item: Any) -> None:
        step(item)
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "_step", interrupted)
    with pytest.raises(Interrupted, match="step 2 of 6, saved") as caught:
        trainer.fit()
    assert caught.value.exit_code == 75
    Pretrainer(config_of(tmp_path / "run")).fit()
    assert contents(tmp_path / "run") == contents(whole)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; returns the exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


TRAIN = ("--width", "4", "--batch-size", "700", "--epochs", "1", "--warmup-epochs", "0", "--steps", "1",
         "--bank-size", "50", "--eval-steps", "1")  # fmt: skip


def test_its_folder_is_what_training_takes_as_clean_encoder(run: Run) -> None:
    code, out, err = run("pretrain", *WORDS, "--output", "g")
    assert code == 0, err
    assert "fasttht train --clean-encoder g" in out
    code, again, _ = run("pretrain", *WORDS, "--output", "g")
    assert code == 0
    assert again.splitlines() == out.splitlines()[-2:], "a finished run is not trained again, its result is printed"
    code, out, err = run("train", *TRAIN, "--clean-encoder", "g", "--output", "f")
    assert code == 0, err
    newest = checkpoint.newest(Path("f"), checkpoint.refuse)
    assert newest is not None
    assert not (newest / "clean_encoder.safetensors").exists(), "a frozen encoder is not trained, so not saved"
    bank = load_file(newest / "training.safetensors")["bank.features"]
    assert torch.allclose(bank.norm(dim=1), torch.ones(50), atol=1e-5), "two steps have filled the bank with g's"
    encoder = load_file(checkpoint.listing(Path("g"))[-1] / "clean_encoder.safetensors")
    names = {name: name.removeprefix("trunk.").replace("feature_head.", "fc.") for name in encoder}
    state = {f"module.encoder_q.{names[name]}": tensor for name, tensor in encoder.items()}
    torch.save({"arch": "resnet18", "epoch": 2, "state_dict": state}, "moco.pth.tar")
    code, out, err = run("train", *TRAIN, "--clean-encoder", "moco.pth.tar", "--output", "published")
    assert code == 0, err
    assert contents(Path("published")) == contents(Path("f")), "the same g by another road"
    code, _, err = run("train", *TRAIN, "--arch", "resnet34", "--clean-encoder", "moco.pth.tar", "--output", "other")
    assert code == 4
    assert "--arch resnet34, got one of resnet18" in err
    code, _, err = run("train", *TRAIN, "--feat-dim", "64", "--clean-encoder", "g", "--output", "other")
    assert code == 4
    assert "the clean encoder needs the same --arch, --stem and --width" in err


def test_folders_of_the_two_commands_are_not_confused(run: Run) -> None:
    assert run("pretrain", *WORDS, "--output", "g")[0] == 0
    assert run("train", *TRAIN, "--objective", "at", "--output", "f")[0] == 0
    for words, fragment in (
        (("eval", "g"), "got one of `fasttht pretrain`"),
        (("train", *TRAIN, "--output", "g"), "got one of another"),
        (("pretrain", *WORDS, "--output", "f"), "got one of another"),
        (("pretrain", *WORDS, "--tau", "0.3", "--output", "g"), "tau 0.2 (now 0.3)"),
    ):
        code, out, err = run(*words)
        assert code == 4, err
        assert fragment in err
        assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--queue-siz", "4"), ("--queue-siz", "--queue-size")),
        (("--batch-size", "64", "--shuffle-groups", "33"), ("--shuffle-groups", "two images")),
        (("--batch-size", "100", "--shuffle-groups", "8"), ("--batch-size", "multiple of the 8 --shuffle-groups")),
        (("--dist-timeout", "0"), ("--dist-timeout", "positive")),
        (("--tau", "0"), ("--tau", "more than 0")),
        (("--hue", "0.6"), ("--hue", "half the colour circle")),
        (("--jitter", "-1"), ("--jitter", "at least 0")),
        (("--grayscale", "1.5"), ("--grayscale", "[0, 1]")),
        (("--blur-sigma", "2", "1"), ("--blur-sigma", "low <= high")),
        (("--decay-milestones", "3"), ("--decay-milestones", "--sched step")),
        (("--knn-k", "1438"), ("--knn-k", "1437")),
        (("--preset", "pretrain-r5"), ("--preset", "pretrain-r50")),
        (("--preset", "that-r50-free"), ("--preset", "that-r50-free")),
        (("--preset", "pretrain-r50"), ("--data",)),
        (("--batch-size", "2000"), ("--batch-size", "1437")),
    ],
)
def test_wrong_words_exit_with_2(run: Run, words: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    code, out, err = run("pretrain", *words)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    for fragment in fragments:
        assert fragment in err, err
    assert not list(Path().rglob("*")), "something was written"


def test_every_preset_says_what_it_is_and_resolves(run: Run) -> None:
    for name in preset_names(pretrain=True):
        code, out, err = run("pretrain", "--preset", name, "--print-config")
        assert code == 0, err
        assert "queue_size" in out
        file = Path("../resolved.toml")
        file.write_text(out)
        code, again, err = run("pretrain", "--config", file, "--print-config")
        assert code == 0, err
        assert again == out, "the printed file is the same run"
        text = (Path(cli.__file__).parent / "presets" / f"{name}.toml").read_text()
        assert "fasttht pretrain" in text.split("\n")[1]
    assert not set(preset_names(pretrain=True)) & set(preset_names())
    assert not list(Path().rglob("*"))


def test_jitter_and_lighting_reach_every_part_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The step itself gets the augmented images, so f, g and the attack all do."""
    seen: list[tuple[Batch, int]] = []
    step = train.standard_step

    def watched(state: Any, config: Any, batch: Batch, draw: Draw, **rest: Any) -> None:
        seen.append((batch, draw.step))
        step(state, config, batch, draw, **rest)

    monkeypatch.setattr(train, "standard_step", watched)
    assert run("train", *TRAIN, "--output", "plain")[0] == 0
    code, _, err = run("train", *TRAIN, "--jitter", "0.4", "--lighting", "0.1", "--output", "f")
    assert code == 0, err
    assert len(seen) == 4
    for (plain, number), (own, _) in zip(seen[:2], seen[2:], strict=True):
        expected = augment_batch(plain, Recipe(jitter=0.4, lighting=0.1), Draw(0, 0, number))
        assert torch.equal(own.x, expected.x)
        assert not torch.equal(own.x, plain.x)
        assert own.x.dtype == torch.uint8
    code, _, err = run("train", "--jitter", "-0.1")
    assert code == 2
    assert "--jitter" in err


def test_a_damaged_or_missing_run_is_refused_as_clean_encoder(run: Run, whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    file = checkpoint.listing(copy)[-1] / "clean_encoder.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    code, _, err = run("train", *TRAIN, "--clean-encoder", copy)
    assert code == 4
    assert "sha256" in err
    code, _, err = run("train", *TRAIN, "--clean-encoder", "nowhere")
    assert code == 2
    assert "a MoCo v2 checkpoint or a run folder" in err
