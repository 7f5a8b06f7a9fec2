"""The command line: what it accepts, and what a mistake costs: one line, the right exit code, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from fasttht import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; returns the exit code, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def image(rng: np.random.Generator, size: int = 12) -> bytes:
    return simplejpeg.encode_jpeg(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), 90, "RGB", "444")


def make_tree(root: Path, classes: int = 2, images: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(images):
            (root / f"class{c}" / f"{i}.jpg").write_bytes(image(rng))
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SMALL = ("--arch", "resnet18", "--stem", "small", "--width", "4", "--img-size", "8")


def refused(run: Run, code: int, *fragments: str, words: tuple[str | Path, ...]) -> None:
    """Assert that a command ends with `code` and one line holding the fragments, and leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    found, out, err = run(*words)
    assert found == code, err
    assert err.startswith("fasttht: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    for fragment in fragments:
        assert fragment in err, err
    assert sorted(Path().rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("train", "--eps", "16"), ("--eps", "[0, 1]", "16/255")),
        (("train", "--eps", "four"), ("--eps", "fraction")),
        (("train", "--eps", "1/0"), ("--eps", "fraction")),
        (("train", "--eps", "__import__('os')"), ("--eps", "fraction")),
        (("train", "--replay", "4", "--steps", "10"), ("--replay 4", "--steps 10", "drop one")),
        (("train", "--replay", "4", "--targeted"), ("--replay", "--targeted")),
        (("train", "--objective", "clean", "--replay", "4"), ("clean", "--replay")),
        (("train", "--replai", "4"), ("--replai", "--replay")),
        (("trian",), ("trian", "train")),
        (("train", "--preset", "that-r50-pgd"), ("--preset", "that-r50-pgd10")),
        (("train", "--preset", "that-r50-pgd10"), ("--data",)),
        (("train", "--arch", "resnet51"), ("--arch", "resnet50")),
        (("train", "--epochs", "many"), ("--epochs", "many")),
        (("train", "--epochs", "0"), ("--epochs", "at least 1")),
        (("train", "--config", "missing.toml"), ("--config", "missing.toml")),
        (("train", "--device", "tpu9"), ("--device",)),
        (("train", "--batch-size", "4096"), ("--batch-size", "1437", "--no-drop-last")),
        (("train", "--batch-size", "64", "--grad-accum-steps", "7"), ("--grad-accum-steps", "divisor", "64")),
        (("train", "--lr", "nan"), ("--lr", "nan")),
        (("data", "write", "folder", "--output", "o"), ("--source",)),
        (("data", "write", "digits", "--output", "o", "--quality", "0"), ("--quality",)),
        (("data", "write", "digits"), ("--output",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value and value[0] in ("train", "data") else "",
)
def test_wrong_words_exit_with_2(run: Run, words: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    refused(run, 2, *fragments, words=words)


def test_data_that_are_not_embedded_need_a_clean_encoder(run: Run) -> None:
    make_tree(Path("tree"))
    refused(run, 2, "--clean-encoder", "momentum", words=("train", "--data", "tree", *SMALL))


@pytest.mark.parametrize("command", ["train", "write"])
def test_missing_or_wrong_data_exit_with_3(run: Run, command: str) -> None:
    make_tree(Path("one"), classes=1)
    Path("empty").mkdir()
    (Path("hollow") / "class0").mkdir(parents=True)
    (Path("hollow") / "class1").mkdir()
    Path("file.txt").write_text("not data")
    cases = {"missing": "missing", "one": "two class", "empty": "empty", "hollow": "images", "file.txt": "file.txt"}
    for data, fragment in cases.items():
        words: tuple[str, ...] = ("train", "--data", data, "--objective", "at", *SMALL)
        if command == "write":
            words = ("data", "write", "folder", "--source", data, "--output", "out")
        refused(run, 3, data, fragment, words=words)


@pytest.mark.parametrize("content", [b"", b"not a beton", bytes(5000), b"\x02\x00" + b"\xff" * 6000], ids=len)
def test_a_file_that_is_not_a_beton_exits_with_3(run: Run, content: bytes) -> None:
    Path("data").mkdir()
    for split in ("train", "val"):
        (Path("data") / f"{split}.beton").write_bytes(content)
    refused(run, 3, "train.beton", words=("train", "--data", "data", "--objective", "at", *SMALL))


def test_one_split_without_the_other_exits_with_3(run: Run) -> None:
    assert run("data", "write", "digits", "--output", "data")[0] == 0
    (Path("data") / "val.beton").unlink()
    refused(run, 3, "val.beton", words=("train", "--data", "data", "--objective", "at", *SMALL))


def test_a_truncated_jpeg_exits_with_3_and_names_the_file(run: Run) -> None:
    make_tree(Path("tree/train"))
    make_tree(Path("tree/val"))
    truncate(Path("tree/train/class1/3.jpg"))
    refused(run, 3, "3.jpg", "JPEG", words=("data", "write", "folder", "--source", "tree", "--output", "out"))
    words = ("train", "--data", "tree", "--objective", "at", *SMALL, "--batch-size", "12")
    refused(run, 3, "3.jpg", "JPEG", words=words)


def test_a_checkpoint_of_another_architecture_exits_with_4(run: Run) -> None:
    options = ("--width", "4", "--epochs", "1", "--batch-size", "1000", "--steps", "0", "--eval-steps", "0")
    assert run("train", *options, "--output", "run")[0] == 0
    refused(run, 4, "resnet18", "resnet34", words=("train", *options, "--output", "run", "--arch", "resnet34"))
    words = ("train", *options, "--output", "other", "--arch", "resnet34", "--clean-encoder", "run")
    refused(run, 4, "trunk.layer", "--arch", words=words)
    Path("text.safetensors").write_text("no tensors")
    words = ("train", *options, "--output", "other", "--clean-encoder", "text.safetensors")
    refused(run, 4, "text.safetensors", words=words)
    refused(run, 4, "missing", words=("eval", "missing"))


def test_write_train_resume_and_evaluate_a_folder_of_images(run: Run) -> None:
    make_tree(Path("tree"), classes=3, images=10)
    code, out, _ = run("data", "write", "folder", "--source", "tree", "--output", "betons")
    assert code == 0
    assert "27" in out  # ten per cent of each class are held out
    options = (
        *SMALL,
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--steps",
        "1",
        "--clean-encoder",
        "momentum",
        "--bank-size",
        "8",
    )
    code, out, err = run("train", "--data", "betons", *options, "--eval-steps", "2", "--eps", "8/255", "--output", "r")
    assert code == 0, err
    assert "linf eps 8/255" in out
    code, again, _ = run("train", "--data", "betons", *options, "--eval-steps", "2", "--eps", "8/255", "--output", "r")
    assert code == 0
    assert "is finished" in again
    code, out, _ = run("eval", "r", "--eval-steps", "1", "3", "--goal", "both", "--eval-batch-size", "2")
    assert code == 0
    for name in ("clean", "pgd1", "pgd3", "pgd1 targeted", "pgd3 targeted"):
        assert name in out
    # the tree itself trains too, without being written first, and a frozen g may come from a run folder
    options = (
        *SMALL,
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--replay",
        "2",
        "--clean-encoder",
        "r",
        "--bank-size",
        "8",
    )
    code, _, err = run("train", "--data", "tree", *options, "--eval-steps", "1", "--output", "s")
    assert code == 0, err


def test_config_prints_what_reads_back_to_itself(run: Run) -> None:
    for words in ([], ["--replay", "4"], ["--preset", "that-r152-pgd10"], ["--preset", "that-r50-free", "--lr", "0.4"]):
        code, out, err = run("config", *words)
        assert code == 0, err
        Path("c.toml").write_text(out)
        assert run("config", "--config", "c.toml") == (0, out, "")
    assert run("config", "--config", "c.toml", "--lr", "0.2")[1] == out.replace("lr = 0.4\n", "lr = 0.2\n", 1)


def test_a_flag_beats_the_file_and_the_file_beats_the_preset(run: Run) -> None:
    Path("c.toml").write_text("lr = 0.3\nepochs = 7\n")
    _, out, _ = run("config", "--preset", "that-r50-pgd10", "--config", "c.toml", "--epochs", "9")
    assert "epochs = 9\n" in out
    assert "lr = 0.3\n" in out
    assert 'arch = "resnet50"' in out
    Path("bad.toml").write_text("replai = 4\n")
    refused(run, 2, "replai", "bad.toml", "--replay", words=("config", "--config", "bad.toml"))


def test_bank_of_size_zero_is_plain_adversarial_training(run: Run) -> None:
    assert 'objective = "at"' in run("config", "--bank-size", "0")[1]


def test_write_ffcv_tool_is_the_data_write_command(tmp_path: Path) -> None:
    tool = Path(__file__).parents[1] / "tools" / "write_ffcv.py"
    done = subprocess.run(
        [sys.executable, str(tool), "digits", "--output", "a"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "1,437" in done.stdout
    again = subprocess.run(
        [sys.executable, str(tool), "digits", "--output", "a"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 3
    assert "--force" in again.stderr or "force" in again.stderr
    assert os.access(tool, os.X_OK)
