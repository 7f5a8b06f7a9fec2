"""`train`'s options for its data: which decoder, which order, what a bad image does, and what each of them says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image

from fasttht import cli
from fasttht.config import DataConfig
from fasttht.pipelines import backends
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.plan import Augment, EpochPlan
from fasttht.pipelines.splits import open_splits
from fasttht.pipelines.writer import write_dataset

Run = Callable[..., tuple[int, str, str]]

SHORT = {
    "--epochs": "1", "--objective": "at", "--steps": "1", "--width": "4", "--eval-steps": "0", "--arch": "resnet18",
    "--stem": "small", "--img-size": "8", "--crop-pct": "1", "--batch-size": "64", "--threads": "1",
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset("digits", None, tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def run(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Train on the digits in an empty folder, into run/, but for what the words (flag, value, ...) say.

    Returns exit code, stdout and stderr.
    """
    (data.parent / "here").mkdir()
    monkeypatch.chdir(data.parent / "here")

    def call(*words: str) -> tuple[int, str, str]:
        said = dict(zip(words[::2], words[1::2], strict=True))
        options = {"--data": str(data), "--output": "run", **SHORT, **said}
        code = cli.run(["train", *(word for option in options.items() for word in option)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def train_rows(folder: Path = Path("run")) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def damage(path: Path, row: int) -> str:
    """Change one byte of a stored image; return how errors call it."""
    beton = BetonFile(path)
    data, content = beton.sample(row).data.tobytes(), bytearray(path.read_bytes())
    start = content.index(data)
    content[start + len(data) // 2] ^= 0xFF
    path.write_bytes(content)
    return f"{path}, row {row}"


def test_the_loaders_on_the_command_line_are_those_there_are() -> None:
    assert get_args(get_type_hints(DataConfig)["loader"]) == ("auto", *backends.DECODERS)


@pytest.mark.changes_rng
@pytest.mark.slow
def test_the_choice_of_a_loader_is_printed_with_its_reason(run: Run) -> None:
    code, out, _ = run("--workers", "2")
    assert code == 0
    assert "loader turbo, 2 threads: no GPU to decode on" in out


@pytest.mark.changes_rng
@pytest.mark.slow
def test_synthetic_data_train_and_say_that_they_train_nothing(run: Run) -> None:
    code, out, _ = run("--loader", "synthetic")
    assert code == 0
    assert "its images are noise, so this run measures speed and trains nothing" in out
    assert "360 held-out images" in out  # which are real


def test_a_loader_that_cannot_run_here_is_a_usage_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_installed", lambda module: False)
    for name, what in (("ffcv", "ffcv package is not installed"), ("dali-cpu", "NVIDIA DALI is not installed")):
        code, _, err = run("--loader", name)
        assert code == 2
        assert f"--loader: expected a decoder that can run here, got {name}; " in err
        assert what in err
    monkeypatch.setattr(backends, "_installed", lambda module: True)
    code, _, err = run("--loader", "dali-gpu", "--device", "cpu")
    assert code == 2
    assert "it decodes on a CUDA device and this run is on cpu" in err
    monkeypatch.setattr(backends, "_what_breaks", lambda name, device: "expected a library, got none; install it")
    for name in ("ffcv", "dali-cpu"):
        code, _, err = run("--loader", name)
        assert code == 2
        assert err.endswith(f"got {name}; expected a library, got none; install it\n")
    assert not Path("run").exists()


@pytest.mark.changes_rng
@pytest.mark.slow
def test_a_bad_image_ends_the_run_or_is_replaced_as_asked(run: Run, data: Path) -> None:
    num = len(open_splits(data).train)
    order = EpochPlan(num_samples=num, batch_size=64, augment=Augment()).order()
    where = damage(data / "train.beton", int(order[100]))  # in the second batch
    code, _, err = run()
    assert code == 3
    assert err.startswith(f"fasttht: {where} ")
    assert err.count("\n") == 1
    code, out, _ = run("--output", "mended", "--on-bad-sample", "replace", "--log-interval", "1")
    assert code == 0
    assert out.count(where) == 1
    assert [row.get("bad_samples", 0) for row in train_rows(Path("mended"))] == [0] + [1] * (num // 64 - 1)
    code, _, err = run("--output", "strict", "--on-bad-sample", "replace", "--max-bad-samples", "0")
    assert code == 3
    assert "expected at most 0 bad samples, got one more" in err


@pytest.mark.changes_rng
@pytest.mark.slow
def test_an_attack_on_the_lattice_trains(run: Run) -> None:
    code, _, err = run("--attack-start", "lattice", "--eps", "16/255", "--alpha", "4/255")
    assert code == 0, err
    assert train_rows()[-1]["zero_grad_pct"] < 100


@pytest.mark.changes_rng
@pytest.mark.slow
def test_the_paged_order_trains_a_file_and_is_refused_for_a_tree(run: Run, data: Path) -> None:
    code, _, _ = run("--order", "paged")
    assert code == 0
    tree = data.parent / "tree"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tree / split / label).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tree / split / label / "0.png")
    code, _, err = run("--data", str(tree), "--order", "paged", "--output", "other", "--batch-size", "2")
    assert code == 2
    assert "--order: expected random for an image tree, got paged" in err


def test_a_file_larger_than_memory_gets_the_hint(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttht import build
    from fasttht.config import TrainConfig

    config, splits = TrainConfig(), open_splits(data)
    assert "paged" not in build.describe_loader(config, splits, torch.device("cpu"))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2}.__getitem__)
    hint = f"{data / 'train.beton'} is larger than memory: --order paged reads each part of it once per pass"
    assert hint in build.describe_loader(config, splits, torch.device("cpu"))
    config.data.order = "paged"
    assert "larger than memory" not in build.describe_loader(config, splits, torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--stall-timeout", "0"), "--stall-timeout: expected a positive number of seconds, got 0"),
        (("--max-bad-samples", "-1"), "--max-bad-samples: expected at least 0, got -1"),
        (("--crop-pct", "0"), "--crop-pct: expected more than 0, got 0"),
        (("--loader", "jpeg"), "jpeg"),
        (
            ("--attack-start", "lattice", "--eps", "0.15"),
            "--eps: expected a whole number of 255ths in standard training",
        ),
        (("--attack-start", "lattice", "--eps", "4/255", "--alpha", "1/510"), "--alpha: expected a whole number"),
        (("--attack-bn", "batch", "--attack-engine", "fused"), "--attack-engine: expected eager beside --attack-bn"),
    ],
)
def test_numbers_outside_their_ranges_exit_with_2(words: tuple[str, ...], said: str, run: Run) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
