"""The command line: what it accepts, and what a mistake costs: one line, the right exit code, nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg

from fasttht import cli, log
from fasttht.pipelines.datasets import digits
from fasttht.signals import Terminated

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
        (("data", "write", "digits", "--output", "o", "--workers", "-1"), ("--workers", "-1")),
        (("data", "write", "digits", "--output", "o", "--max-errors", "-1"), ("--max-errors", "-1")),
        (("data", "write", "digits", "--output", "o", "--subset", "1.5"), ("--subset", "1.5")),
        (("data", "write", "digits", "--output", "o", "--on-error", "ignore"), ("--on-error", "ignore")),
        (("data", "verify"), ("PATH",)),
        (("data", "verify", "x", "--workers", "-2"), ("--workers", "-2")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value and value[0] in ("train", "data") else "",
)
def test_wrong_words_exit_with_2(run: Run, words: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    refused(run, 2, *fragments, words=words)


HUGE = {
    "--bank-size": ("1" + "0" * 19, "1000000000"), "--feat-dim": ("1" + "0" * 19, "1048576"),
    "--seed": ("1" + "0" * 30, "9223372036854775807"), "--img-size": ("10000000000", "65535"),
    "--threads": ("1000000000000", "1024"), "--decay-milestones": ("1" + "0" * 400, "1000000000"),
    "--stall-timeout": ("1e+300", "100000000"), "--dist-timeout": ("1e+300", "100000000"), "--lr": ("1e+300", "1e+30"),
    "--epochs": ("-1" + "0" * 400, "-1000000"), "--width": ("65537", "65536"),
}  # fmt: skip


@pytest.mark.parametrize("flag", HUGE)
@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_numbers_that_no_run_needs_are_refused_with_the_bound(run: Run, command: str, flag: str) -> None:
    if command == "pretrain" and flag == "--bank-size":
        flag = "--queue-size"
        HUGE[flag] = HUGE["--bank-size"]
    number, bound = HUGE[flag]
    code, _, err = run(command, flag, number)
    assert code == 2
    words = "least" if number[0] == "-" else "most"
    assert err.startswith(f"fasttht: {flag}: expected at {words} {bound}, got {number[:6]}")
    assert err.count("\n") == 1
    assert len(err) < 120
    assert not list(Path().iterdir())


@pytest.mark.parametrize("text", ["1e999999999", "1" + "0" * 400 + "/3", "inf", "nan", "1e5/3", "1" * 5000])
def test_a_radius_that_is_no_number_of_ours_is_refused_at_once(run: Run, text: str) -> None:
    """As a fraction 1e999999999 has a billion digits."""
    code, _, err = run("train", "--eps", text)
    assert code == 2
    assert "expected a number in [0, 1] or a fraction, got" in err
    assert len(err) < 160


RUNS = {"train": ("train", "--width", "2", "--epochs", "1", "--batch-size", "700", "--eval-steps", "1", "--steps", "1")}
TORN: dict[str, Callable[[str], str | bytes]] = {
    "eps": lambda text: text.replace('eps = "0.15"', 'eps = "x0.15"'),
    "eps of digits": lambda text: text.replace('eps = "0.15"', 'eps = "1e999999999"'),
    "width": lambda text: text.replace("width = 2", 'width = "x"'),
    "a negative width": lambda text: text.replace("width = 2", "width = -2"),
    "a width beyond all": lambda text: text.replace("width = 2", "width = 1" + "0" * 30),
    "a choice": lambda text: text.replace('arch = "resnet', 'arch = "densenet'),
    "a list": lambda text: text.replace("eval_steps = [1]", "eval_steps = 1"),
    "a list of letters": lambda text: text.replace("eval_steps = [1]", 'eval_steps = ["x"]'),
    "a switch": lambda text: text.replace("nesterov = true", "nesterov = 1"),
    "half": lambda text: text[: len(text) // 2],
    "a line torn": lambda text: text[: text.index("width = ") + 7],
    "empty": lambda text: "",
    "unknown": lambda text: text + "x = 1\n",
    "no text": lambda text: b"\xff\x00",
    "nested": lambda text: "x = " + "[" * 100_000,
}


def test_a_run_whose_configuration_is_damaged_ends_every_command_with_4(run: Run) -> None:
    words = ("--objective", "at", "--output", "run")
    code, _, err = run(*RUNS["train"], *words)
    assert code == 0, err
    path = Path("run/config.toml")
    whole = path.read_text()
    for what, change in TORN.items():
        changed = change(whole)
        assert changed != whole, what
        path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        for command in ((*RUNS["train"], *words), ("eval", "run"), ("export", "run")):
            code, _, err = run(*command)
            assert code == 4, f"{what}: {command[0]}: {err}"
            assert err.startswith("fasttht: run/config.toml: expected the configuration that the run wrote"), err
            assert err.count("\n") == 1
            assert len(err) < 400
    path.write_text(whole)
    assert run("export", "run")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train",), "continues from the last checkpoint"),
        (("pretrain",), "continues from the last checkpoint"),
        (("eval", "run"), "nothing was kept but what suites keep"),
        (("plot", "steps", "run"), "points that were measured are kept"),
        (("plot", "curves", "run"), "nothing was kept; the same command begins anew"),
        (("export", "run"), "nothing was kept; the same command begins anew"),
        (("data", "verify", "x"), "nothing was kept; the same command begins anew"),
        (("data", "write", "digits"), "the same command with --resume goes on"),
        ((), "nothing was kept"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 75)])
def test_a_stop_says_what_is_true_of_the_command(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
    error: type[BaseException],
    code: int,
) -> None:
    def app(*args: object, **options: object) -> None:
        raise error

    app.config = ()  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "app", app)
    found, _, err = run(*words)
    assert (found, err.count("\n")) == (code, 1)
    assert err.startswith("fasttht: stopped; ")
    assert said in err


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("Unable to allocate 3.6 TiB"), RuntimeError("out of memory")]
)
def test_no_memory_is_one_line_and_6(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def app(*args: object, **options: object) -> None:
        raise error

    app.config = ()  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "app", app)
    code, _, err = run("train")
    assert (code, err.count("\n")) == (6, 1)
    assert err.startswith(f"fasttht: memory: expected enough, got: {str(error) or 'no room'}; lower --batch-size")


@pytest.mark.parametrize("words", [["train"], ["pretrain"], ["eval"], ["export"], ["plot", "steps"], ["doctor"], []])
def test_what_to_do_without_memory_names_options_that_the_command_has(
    words: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(*args: object, **options: object) -> None:
        raise MemoryError

    app.config = ()  # type: ignore[attr-defined]
    _, there, _ = run(*words, "--help")
    with monkeypatch.context() as patch:
        patch.setattr(cli, "app", app)
        code, _, err = run(*words)
    assert (code, err.count("\n")) == (6, 1)
    named = re.findall(r"--[a-z-]+", err)
    assert bool(named) == (words in (["train"], ["pretrain"]))
    assert [flag for flag in named if flag not in there] == []


def test_no_thread_is_one_line_and_6(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "fasttht-decode-1":  # the first of two decodes already
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    code, _, err = run("train", *SMALL, "--objective", "at", "--workers", "2", "--output", "run")
    assert (code, err.splitlines()[-1].startswith("fasttht: threads: expected room for one more")) == (6, True), err
    assert "Traceback" not in err


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
    refused(run, 4, "--resume never", words=("train", *options, "--output", "run", "--resume", "never"))
    refused(run, 6, "nowhere", words=("eval", "run", "--output", "nowhere/row.json"))
    refused(run, 2, "--eval-steps", words=("eval", "run", "--eval-steps", "-1"))
    refused(run, 2, "--clean-encoder", "momentum", words=("train", "--clean-encoder", "momentun"))
    damaged = next(Path("run/checkpoints").iterdir()) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes() + b"x")
    refused(run, 4, "model.safetensors", "sha256", words=("eval", "run"))


def test_an_output_that_cannot_be_a_folder_exits_with_6(run: Run) -> None:
    Path("file").write_text("")
    for output in ("file", "file/below"):
        words = ("train", "--epochs", "1", "--width", "4", "--output", output)
        refused(run, 6, "file", words=words)


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


def test_config_of_a_preset_leaves_the_clean_encoder_to_be_asked_for(run: Run) -> None:
    """What it prints must not train with the digits' default where `train --preset` would refuse to."""
    make_tree(Path("tree"))
    for words, expected in (
        (("--preset", "that-r50-pgd10"), False), (("--preset", "that-r152-moco"), True), ((), True),
        (("--preset", "that-r50-pgd10", "--data", "tree", "--clean-encoder", "momentum", "--batch-size", "12"), True),
    ):  # fmt: skip
        code, out, err = run("config", *words)
        assert code == 0, err
        assert ('clean_encoder = "momentum"' in out) is expected, words
    _, out, _ = run("config", "--preset", "that-r50-pgd10")
    assert out.startswith("# train asks for --data and --clean-encoder beside this\n")
    Path("p.toml").write_text(out)
    refused(run, 2, "--clean-encoder", words=("train", "--config", "p.toml", "--data", "tree"))


def test_config_prints_what_reads_back_to_itself(run: Run) -> None:
    g = ["--clean-encoder", "momentum"]
    for words in (
        [], ["--replay", "4"], ["--preset", "that-r152-pgd10", *g], ["--preset", "that-r50-free", *g, "--lr", "0.4"],
    ):  # fmt: skip
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
    Path("wrong.toml").write_text("lr = 'fast'\n")
    for command in ("train", "config", "pretrain"):  # a flag hides the value, not the mistake
        refused(run, 2, "lr", "wrong.toml", words=(command, "--config", "wrong.toml", "--lr", "0.1"))
    assert 'arch = "resnet50"' in out
    Path("bad.toml").write_text("replai = 4\n")
    refused(run, 2, "replai", "bad.toml", "--replay", words=("config", "--config", "bad.toml"))


def test_bank_of_size_zero_is_plain_adversarial_training(run: Run) -> None:
    assert 'objective = "at"' in run("config", "--bank-size", "0")[1]


def test_bad_images_are_skipped_and_listed_on_request(run: Run) -> None:
    make_tree(Path("tree"), images=20)
    truncate(Path("tree/class1/3.jpg"))
    words = ("data", "write", "folder", "--source", "tree", "--output", "out", "--workers", "2")
    refused(run, 3, "3.jpg", words=words)
    code, out, err = run(*words, "--on-error", "skip", "--max-errors", "1")
    assert code == 0, err
    assert "skipped class1/3.jpg: expected a whole JPEG" in out
    code, out, _ = run("data", "info", "out")
    assert code == 0
    for fragment in ("images", "stored as", "12 x 12", "8 MiB", "yes, with checksums", "quality 95", "passthrough"):
        assert fragment in out


def test_a_subset_is_written_and_described(run: Run) -> None:
    for amount, num in (("50", "50"), ("0.1", "144")):
        code, out, err = run("data", "write", "digits", "--output", f"out{amount}", "--subset", amount)
        assert code == 0, err
        assert num in out
        _, out, _ = run("data", "info", f"out{amount}")
        assert re.search(rf"subset {amount}\b(?!\.)", out)


def test_a_dry_run_counts_and_writes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(Path("tree"), classes=3, images=10)
    words = ("data", "write", "folder", "--source", "tree", "--output", "out")
    code, out, err = run(*words, "--dry-run")
    assert code == 0, err
    assert not Path("out").exists()
    for fragment in ("nothing is written", "27", "class2", "GB are needed"):
        assert fragment in out
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    for more in ((), ("--dry-run",)):
        refused(run, 6, "out: expected 0.03 GB of free space, got 0.00 GB", words=(*words, *more))


def test_an_interrupted_write_says_how_to_go_on_and_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: log.WriteScreen, split: str, done: int, *_: Any, **__: Any) -> None:
        if (split, done) == ("train", 1000):
            raise KeyboardInterrupt

    words = ("data", "write", "digits", "--output", "out")
    with monkeypatch.context() as patch:
        patch.setattr(log.WriteScreen, "advance", interrupt)
        code, _, err = run(*words)
        assert (code, err.count("--resume")) == (130, 1)
    refused(run, 3, "expected no unfinished write", "resume", words=words)
    refused(run, 3, "quality 95", "quality 90", words=(*words, "--resume", "--quality", "90"))
    code, out, err = run(*words, "--resume")
    assert code == 0, err
    assert "train: 512 of 1,437 images were there" in out
    assert run("data", "verify", "out")[0] == 0


def test_verify_lists_problems_and_exits_with_3(run: Run) -> None:
    assert run("data", "write", "digits", "--output", "out")[0] == 0
    code, out, err = run("data", "verify", "out")
    assert code == 0, err
    assert "all compared" in out
    counts = np.bincount(digits("val").labels).tolist()
    assert f"val.beton: images per class: {', '.join(f'{digit} {count}' for digit, count in enumerate(counts))}" in out
    path = Path("out/val.beton")
    content = bytearray(path.read_bytes())
    start = 8 << 20  # the first page
    content[start : start + 30 * 192] = bytes(30 * 192)
    path.write_bytes(content)
    code, out, err = run("data", "verify", "out")
    assert code == 3
    assert err == "fasttht: out: expected whole files, got 30 problems; write the data again\n"
    assert out.count(": expected bytes with checksum") == 20
    assert "and 10 more in val.beton" in out
    Path("out/val.beton.json").unlink()
    assert run("data", "verify", "out/val.beton")[0] == 0  # raw pixels: without checksums nobody can tell
    refused(run, 3, "expected train.beton and val.beton", words=("data", "info", "."))


def test_training_without_a_manifest_says_so_in_one_line(run: Run) -> None:
    assert run("data", "write", "digits", "--output", "out")[0] == 0
    options = ("--width", "4", "--epochs", "1", "--batch-size", "1000", "--steps", "0", "--eval-steps", "0")
    words = ("train", "--data", "out", *options, "--objective", "at", "--arch", "resnet18", "--stem", "small")
    words = (*words, "--img-size", "8")
    code, out, err = run(*words, "--output", "a")
    assert code == 0, err
    assert "no manifest" not in out
    for split in ("train", "val"):
        (Path("out") / f"{split}.beton.json").unlink()
    code, out, err = run(*words, "--output", "b")
    assert code == 0, err
    assert out.count("no manifest") == 1


def test_a_piped_write_prints_speed_and_what_is_left_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 1.0, 5.0, 6.0, 12.0])
    with log.WriteScreen(clock=lambda: next(seconds)) as screen:
        screen.advance("train", 101, 1000, 5_000_000, resumed=100)
        for done in (201, 601, 701, 1000):
            screen.advance("train", done, 1000, done * 1_000_000, counts={"raw": done})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 100 of 1,000 images were there"
    assert lines[1] == "train 601/1000 images  img/s 100  MB/s 119.2  ETA 0:00:04  raw 601"
    assert lines[2].startswith("train 1000/1000 images  img/s 75  ")
    assert len(lines) == 3


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval-steps"], "--eval-steps: expected one or more"),
        (["--stall-timeout", "inf"], "--stall-timeout: expected a finite number, got inf"),
        (["--warmup-epochs", "nan"], "--warmup-epochs: expected a finite number, got nan"),
        (["--denoise", "--width", "1"], "--width: expected at least 2 beside --denoise"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got meta"),
        (["--batch-size", "64", "--grad-accum-steps", "64"], "expected at least two images in every part"),
        (["--batch-size", "4", "--no-drop-last"], "expected at least two images in every part"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["train", *words, "--output", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_one_line_and_code_6(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: object, **options: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run(["doctor"]) == 6
    assert capsys.readouterr().err.endswith("Tried to allocate 20.00 GiB.; free some, or do less at once\n")
