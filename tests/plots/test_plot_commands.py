"""`fasttht plot`: pictures where they should lie, and one line and an exit code for what cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

from fasttht import cli
from fasttht.evaluate import evaluate
from fasttht.plots import sweep
from fasttht.subject import Subject


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".png")


def test_curves_of_one_and_of_several_runs(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "second"))
    assert cli.run(["plot", "curves", str(run)]) == 0
    assert cli.run(["plot", "curves", str(run), str(other), "--metrics", "loss", "lr"]) == 0
    assert cli.run(["plot", "curves", str(run), "--output", str(tmp_path / "elsewhere")]) == 0
    assert pictures(run / "plots") == ["curves-2-runs.png", "curves.png"]
    assert pictures(tmp_path / "elsewhere") == ["curves.png"]
    assert not (other / "plots").exists()


def test_a_second_drawing_measures_only_what_is_new(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def counted(*args: object, **kwargs: object) -> object:
        measured.append(args[2][0].steps)  # type: ignore[index]
        return evaluate(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "evaluate", counted)
    words = ["plot", "steps", str(run), "--limit", "40", "--steps"]
    assert cli.run([*words, "2", "1"]) == 0
    first = (run / "plots" / "steps.png").read_bytes()
    assert cli.run([*words, "1", "2"]) == 0
    assert (run / "plots" / "steps.png").read_bytes() == first
    assert measured == [1, 2]
    assert cli.run([*words, "1", "2", "3"]) == 0
    assert cli.run(["plot", "eps", str(run), "--eps", "0", "8/255", "0.15", "--steps", "2", "--limit", "40"]) == 0
    assert measured == [1, 2, 3, 2, 2]  # eps 0.15 at two steps is there
    points = json.loads((run / "plots" / "points.json").read_text())
    assert [(p["steps"], p["eps"], p["images"]) for p in points] == [
        (1, 0.15, 40), (2, 0.15, 40), (3, 0.15, 40), (2, 0.0, 40), (2, 8 / 255, 40),
    ]  # fmt: skip
    assert points[3]["correct"] == points[3]["clean_correct"]  # no radius, no attack
    assert pictures(run / "plots") == ["eps.png", "steps.png"]


def test_points_of_another_training_are_not_taken_for_this_ones(run: Path, tmp_path: Path) -> None:
    words = ["--steps", "1", "--limit", "20", "--output", str(tmp_path / "out")]
    assert cli.run(["plot", "steps", str(run), *words]) == 0
    other = Path(shutil.copytree(run, tmp_path / "second"))
    (manifest,) = other.glob("checkpoints/*/MANIFEST.json")
    manifest.write_text(manifest.read_text() + "\n")
    assert cli.run(["plot", "steps", str(other), *words]) == 0
    points = json.loads((tmp_path / "out" / "points.json").read_text())
    assert len(points) == 2
    assert points[0]["digest"] != points[1]["digest"]


def test_surface_and_examples_keep_their_figures_beside_the_picture(run: Path) -> None:
    assert cli.run(["plot", "surface", str(run), "--image", "5", "--points", "5"]) == 0
    assert cli.run(["plot", "examples", str(run), "--steps", "1"]) == 0
    assert pictures(run / "plots") == ["examples.png", "surface-5.png"]
    (surface,) = json.loads((run / "plots" / "surface-5.json").read_text())
    assert (surface["row"], len(surface["adversarial"]), len(surface["random"][0])) == (5, 5, 5)
    assert len(json.loads((run / "plots" / "examples.json").read_text())["images"]) == 6
    for name in pictures(run / "plots"):
        with Image.open(run / "plots" / name) as image:
            assert image.width == 1000
        assert (run / "plots" / name).stat().st_size < 150_000


def test_retrieval_asks_the_search_once_for_a_batch_of_attacked_queries(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def neighbours(subject: Subject, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        asked.append((len(x), k))
        rows = torch.arange(k).repeat(len(x), 1)
        return rows, torch.linspace(1, 0.5, k).repeat(len(x), 1)

    knn = ModuleType("fasttht.knn")
    knn.neighbours = neighbours  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fasttht.knn", knn)
    assert cli.run(["plot", "retrieval", str(run), "--limit", "30", "--successes", "1", "--failures", "2"]) == 0
    assert asked == [(30, 50)]
    found = json.loads((run / "plots" / "retrieval.json").read_text())
    assert [query["train_rows"] for query in found["queries"]] == [[0, 1, 2, 3, 4]] * 3
    assert (run / "plots" / "retrieval.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["curves"], "expected one or more run folders, got none", 2),
        (["curves", "RUN", "RUN"], "expected each run once", 2),
        (["curves", "missing"], "expected a run folder", 4),
        (["curves", "RUN", "--metrics", "speed"], "--metrics: expected figures of these runs, got speed", 2),
        (["steps", "missing"], "expected a run folder", 4),
        (["steps", "RUN", "--steps", "3", "3"], "--steps: expected one or more, each once", 2),
        (["steps", "RUN", "--steps", "-1"], "--steps: expected at least 0, got -1", 2),
        (["steps", "RUN", "--limit", "0"], "--limit: expected at least 1, got 0", 2),
        (["eps", "RUN", "--eps", "8"], "--eps: expected radii of at most 1 in linf", 2),
        (["eps", "RUN", "--eps", "x"], '--eps: unable to convert "x"', 2),
        (["eps", "RUN", "--steps", "-2"], "--steps: expected at least 0", 2),
        (["surface", "RUN", "--image", "360"], "--image: expected rows of the held-out images, 0 to 359, got 360", 2),
        (["surface", "RUN", "--image", "-1"], "0 to 359, got -1", 2),
        (["surface", "RUN", "--points", "1"], "--points: expected at least 3", 2),
        (["surface", "RUN", "--eps", "0"], "--eps: expected a radius above 0", 2),
        (["examples", "RUN", "--images", "1", "400"], "--images: expected rows of the held-out images", 2),
        (["examples", "RUN", "--images", *map(str, range(9))], "--images: expected at most 8, got 9", 2),
        (["retrieval", "RUN", "--neighbours", "0"], "--neighbours: expected at least 1", 2),
        (["retrieval", "RUN", "--neighbours", "11"], "at most 10 neighbours", 2),
        (
            ["retrieval", "RUN", "--successes", "0", "--failures", "0"],
            "--successes + --failures: expected at least 1",
            2,
        ),
        (["report", "missing"], "expected a run folder", 4),
        (["report", "RUN", "--alarms", "missing.txt"], "--alarms: expected a readable text file", 2),
        (["colours", "RUN"], "colours", 2),
    ],
)
def test_what_cannot_be_drawn_ends_in_a_line_and_a_code(
    words: list[str], sentence: str, code: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["plot", *(str(run) if word == "RUN" else word for word in words)]) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (run / "plots").exists()


@pytest.mark.parametrize("flag", ["--steps", "--metrics", "--eps", "--images"])
def test_an_empty_list_is_refused(flag: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"--steps": "steps", "--metrics": "curves", "--eps": "eps", "--images": "examples"}[flag]
    assert cli.run(["plot", kind, str(run), flag]) == 2
    assert flag in capsys.readouterr().err


def test_runs_that_do_not_compare_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "second"))
    text = (other / "config.toml").read_text()
    assert 'eps = "0.15"' in text
    (other / "config.toml").write_text(text.replace('eps = "0.15"', 'eps = "0.1"'))
    assert cli.run(["plot", "steps", str(run), str(other), "--steps", "1", "--limit", "10"]) == 2
    assert "expected runs of one radius, got 0.15 and 0.1; give --eps" in capsys.readouterr().err
    assert cli.run(["plot", "steps", str(run), str(other), "--steps", "1", "--limit", "10", "--eps", "0.1"]) == 0
    (other / "config.toml").write_text(text.replace('norm = "linf"', 'norm = "l2"'))
    assert cli.run(["plot", "eps", str(run), str(other), "--steps", "1", "--limit", "10", "--eps", "0.1"]) == 2
    assert "expected runs of one norm, got linf and l2" in capsys.readouterr().err


def test_without_matplotlib_the_command_to_install_it_is_given(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("curves", "steps", "eps", "surface", "retrieval", "examples", "report"):
        assert cli.run(["plot", kind, str(run)]) == 2
        assert 'pip install "fasttht[plots]"' in capsys.readouterr().err
    assert not (run / "plots").exists()
