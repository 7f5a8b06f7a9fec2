"""What an evaluation keeps in a run folder: rows that a report and an export read, whatever the folder is like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fasttht import cli
from fasttht.eval_files import keep, kept_rows, work_folder

pytestmark = pytest.mark.changes_rng

TRAIN = ["train", "--objective", "that", "--width", "8", "--epochs", "12", "--replay", "4", "--eval-steps", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `that` run whose classifier is of cosines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        path = tmp_path_factory.mktemp("runs") / "that"
        assert cli.run([*TRAIN, "--output", str(path)]) == 0
        yield path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for _, row in kept_rows(run)]


def test_a_half_line_is_cut_off_before_the_next_row(tmp_path: Path) -> None:
    rows = [{"clean_top1": 1.0 * i, "text": "x" * 20000} for i in range(3)]
    for row in rows[:2]:
        keep(tmp_path, row, pytest.fail)
    file = tmp_path / "eval" / "evaluations.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    assert rows_of(tmp_path) == rows[:1]
    keep(tmp_path, rows[2], pytest.fail)
    assert rows_of(tmp_path) == [rows[0], rows[2]]


def test_work_goes_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()
    assert work_folder(tmp_path / "run", is_run=True, given=None, say=pytest.fail) == tmp_path / "run" / "eval"
    assert not list((tmp_path / "run" / "eval").iterdir())
    beside = work_folder(tmp_path / "w.safetensors", is_run=False, given=None, say=pytest.fail)
    assert beside == tmp_path / "w-eval"
    assert work_folder(tmp_path, is_run=True, given=tmp_path / "a" / "b", say=pytest.fail) == tmp_path / "a" / "b"
    said: list[str] = []
    beside.rmdir()
    beside.write_text("in the way")
    found = work_folder(tmp_path / "w.safetensors", is_run=False, given=None, say=said.append)
    assert found == tmp_path / "cache" / "fasttht" / "eval"
    assert found.is_dir()
    assert str(beside) in said[0]
    assert str(found) in said[0]


@pytest.mark.slow
def test_an_honest_network_of_cosines_raises_at_most_the_alarm_of_the_losses(copied: Path, tmp_path: Path) -> None:
    """By the command itself, and what it kept is what it wrote."""
    words = ["eval", str(copied), "--eval-steps", "10", "--losses", "ce", "margin", "dlr", "--goal", "both", "--suites",
             "knn", "--alarms", "full", "--output", str(tmp_path / "row.json")]  # fmt: skip
    assert cli.run(words) == 0
    row = json.loads((tmp_path / "row.json").read_text())
    assert rows_of(copied) == [row]
    assert row["clean_top1"] > 60
    assert row["pgd10_top1"] < row["clean_top1"] - 10
    assert {alarm["name"] for alarm in row["alarms"]} <= {"ce_above_dlr"}
    assert len(row["not_checked"]) == 2, "all is looked for but what AutoAttack would show"
    assert row["knn_bank"] == "momentum g"
    for name in ("knn_pgd10", "knn_pgd10_targeted"):
        assert row[f"{name}_worst_top1"] <= min(
            row[f"{name}_{kind}_top1"] for kind in ("transfer", "feature", "adaptive")
        )


def test_every_evaluation_is_kept_and_the_report_shows_it_with_its_alarms(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A radius so small that the attack takes no more than noise does."""
    words = ["eval", str(copied), "--eval-steps", "0", "10", "--limit", "150"]
    assert cli.run([*words, "--eps", "0.0005"]) == 0
    assert cli.run([*words, "--alarms", "off"]) == 0
    tiny, plain = rows_of(copied)
    (alarm,) = tiny["alarms"]
    assert alarm["name"] == "noise_as_strong"
    assert "alarms" not in plain
    assert cli.run(["plot", "report", str(copied)]) == 0
    page = (copied / "plots" / "report.html").read_text()
    assert page.count("evaluations.jsonl: checkpoint step-") == 2
    assert "limit 150" in page
    assert "attack success (%)" in page
    assert f'<td class="number">{plain["pgd10_asr"]:.2f}</td>' in page
    assert "noise_as_strong" in page
    assert "Either the radius is too small to matter, or the gradient leads nowhere (Carlini et al. 2019)." in page
    assert "not checked: AutoAttack against PGD; --suites autoattack would" in page
    assert page.count("Alarms:") == 1


def test_a_run_folder_that_cannot_be_written_is_evaluated_all_the_same(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "eval").write_text("in the way")
    words = ["eval", str(copied), "--eval-steps", "1", "--limit", "20", "--alarms", "off"]
    assert cli.run([*words, "--suites", "apgd", "knn", "--output", str(tmp_path / "row.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{copied / 'eval' / 'evaluations.jsonl'}: expected to keep the row here, got" in out
    assert f"{copied / 'eval'}: expected a folder to keep results in, got" in out
    assert "apgd_top1" in json.loads((tmp_path / "row.json").read_text())


def test_only_a_run_keeps_its_rows_and_an_export_gets_nothing_beside_what_was_exported(
    copied: Path, tmp_path: Path
) -> None:
    """The same network is recognised, and its bank is its own, of a `that` run too."""
    export = tmp_path / "to" / "publish"
    assert cli.run(["export", str(copied), "--output", str(export), "--limit", "5"]) == 0
    before = sorted(export.rglob("*"))
    words = ["--eval-steps", "1", "--limit", "20", "--alarms", "off", "--suites", "knn", "--output"]
    for path in (copied, export, export / "model.safetensors"):
        assert cli.run(["eval", str(path), *words, str(tmp_path / "rows.json")]) == 0
    assert sorted(export.rglob("*")) == before
    assert list(export.parent.iterdir()) == [export]
    run, folder, file = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert len(rows_of(copied)) == 1
    assert [row["knn_bank"] for row in (run, folder, file)] == ["momentum g", "f", "f"]
    assert run["network"] == folder["network"] == file["network"]
