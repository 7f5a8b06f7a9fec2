"""Pictures made of lines hold the numbers that they are given, name their axes, and come out the same every time."""

from __future__ import annotations

import errno
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fasttht.errors import CheckpointError, UsageError
from fasttht.plots import lines, place, sweep
from fasttht.plots.history import chosen_metrics, curve, evaluations, rows_of
from fasttht.plots.style import png, run_names, short, styled


def rows(offset: float = 0.0) -> list[dict[str, Any]]:
    """A run of three training rows and two evaluations, the last of them final."""
    train = [
        {"kind": "train", "epoch": i, "step": 10 * i + 10, "loss": 2.0 / (i + 1) + offset, "adv_top1": 20.0 * i,
         "lr": 0.1 * 0.1**i, "zero_grad_pct": 1.5, "grad_norm": 3.0, "loss_cl": math.nan if i == 1 else 4.0}
        for i in range(3)
    ]  # fmt: skip
    final = {"kind": "final", "epoch": 3, "step": 30, "clean_top1": 90.0, "pgd10_top1": 61.5, "images": 200}
    return [*train[:2], {**final, "kind": "eval", "step": 20, "pgd10_top1": 50.0}, train[2], final]


def point(correct: int, images: int = 200, **fields: Any) -> sweep.Point:
    base = {"norm": "linf", "eps": 8 / 255, "steps": 10, "targeted": False, "clean_correct": 190}
    return {**base, "correct": correct, "images": images, **fields}


def sweep_lines(num: int = 2) -> list[sweep.Line]:
    return [
        sweep.Line(f"run {i}", (1.0, 10.0, 100.0), (point(150 - i), point(120), point(100 + i))) for i in range(num)
    ]


def test_curves_draw_a_line_for_each_run_through_its_rows() -> None:
    runs = [rows(), rows(1.0), rows(2.0)]
    metrics = chosen_metrics(runs, None)
    assert metrics == ["loss", "adv_top1", "lr", "zero_grad_pct", "grad_norm"]
    with styled():
        fig, words = lines.curves(["a", "b", "c"], runs, metrics)
        fig.canvas.draw()
        panels = fig.axes
        assert len(panels) == len(metrics) + 1
        for panel, metric in zip(panels, metrics, strict=False):
            assert panel.get_xlabel() == "optimizer steps"
            assert panel.get_ylabel()
            assert len(panel.lines) == len(runs)
            for line, run in zip(panel.lines, runs, strict=True):
                assert list(line.get_xdata()) == [10, 20, 30]
                assert list(line.get_ydata()) == [row[metric] for row in run if row["kind"] == "train"]
        assert "%" in panels[-1].get_ylabel()
        drawn = {
            (tuple(line.get_xdata()), tuple(line.get_ydata())) for line in panels[-1].lines if len(line.get_xdata())
        }
        assert drawn == {((20, 30), (90.0, 90.0)), ((20, 30), (50.0, 61.5))}
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in panels[0].lines}
        assert len({one[0] for one in looks}) == len({one[1] for one in looks}) == len({one[2] for one in looks}) == 3
    assert "pgd10 at 61.50 %" in words


def test_a_run_without_a_metric_has_no_line_for_it_and_what_is_not_finite_is_a_gap() -> None:
    other = [{key: value for key, value in row.items() if key != "loss_cl"} for row in rows()]
    with styled():
        fig, _ = lines.curves(["a", "b"], [rows(), other], ["loss_cl"])
    (line,) = fig.axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [4.0, math.nan, 4.0])
    assert curve([{"kind": "train", "step": 1, "loss": math.inf}], "loss")[1] != [math.inf]


def test_an_evaluation_after_the_last_pass_counts_once() -> None:
    again = [*rows()[:-1], {"kind": "eval", "step": 30, "clean_top1": 89.0}, rows()[-1]]
    assert evaluations(again)["clean"] == ([20, 30], [90.0, 90.0])


def test_the_learning_rate_has_plain_numbers_on_a_logarithmic_axis() -> None:
    with styled():
        fig, _ = lines.curves(["a"], [rows()], ["lr"])
        fig.canvas.draw()
        texts = [label.get_text() for label in fig.axes[0].get_yticklabels()]
        assert fig.axes[0].get_yscale() == "log"
    assert {"0.1", "0.01", "0.001"} <= set(texts)


@pytest.mark.parametrize(("draw", "label"), [(lines.steps, "PGD steps"), (lines.eps, "eps (1/255)")])
def test_sweeps_draw_accuracy_with_wilson_bars(draw: Any, label: str) -> None:
    found = sweep_lines()
    if draw is lines.eps:
        found = [sweep.Line(line.name, (0.0, 4 / 255, 8 / 255), line.points) for line in found]
    with styled():
        fig, words = draw(found)
        fig.canvas.draw()
        (ax,) = fig.axes
        assert (ax.get_xlabel(), ax.get_ylabel()) == (label, "held-out images, top-1 (%)")
        assert len(ax.containers) == len(found)
        scale = 255 if draw is lines.eps else 1
        for container, line in zip(ax.containers, found, strict=True):
            drawn, _, (bars,) = container
            assert list(drawn.get_xdata()) == pytest.approx([x * scale for x in line.x])
            assert list(drawn.get_ydata()) == [100 * p["correct"] / p["images"] for p in line.points]
            for (low, high), p in zip(bars.get_segments(), line.points, strict=True):
                assert (low[1], high[1]) == pytest.approx(sweep.wilson(p["correct"], p["images"]))
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["run 0", "run 1"]
    assert "75.00 %" in words


def test_zero_steps_have_a_place_on_the_axis() -> None:
    with styled():
        fig, _ = lines.steps([sweep.Line("a", (0.0, 1.0, 10.0), (point(3), point(2), point(1)))])
        fig.canvas.draw()
        assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["0", "1", "10"]


def test_the_same_data_give_the_same_bytes_and_words_stay_with_them() -> None:
    pictures = []
    for _ in range(2):
        with styled():
            fig, words = lines.steps(sweep_lines())
            pictures.append(png(fig, words))
    assert pictures[0] == pictures[1]
    with Image.open(io.BytesIO(pictures[0])) as image:
        assert image.info["Description"] == words
        assert set(image.info) <= {"Description", "dpi"}
        assert image.width == 1000


def test_the_readers_matplotlib_settings_are_neither_used_nor_changed() -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 30.0, "font.size": 4.0}):
        with styled():
            ours = png(*lines.steps(sweep_lines()))
        assert matplotlib.rcParams["lines.linewidth"] == 30.0
    with styled():
        assert ours == png(*lines.steps(sweep_lines()))


@pytest.mark.parametrize("name", ["$x^{$", "_hidden", "<b>&", "\n\x00", "字" * 90])
def test_any_folder_name_can_be_drawn(name: str) -> None:
    found = [sweep.Line(short(name), line.x, line.points) for line in sweep_lines()]
    with styled():
        fig, words = lines.steps(found)
        assert len(png(fig, words)) > 1000
        assert len(fig.axes[0].get_legend().get_texts()) == 2
        curves, words = lines.curves([short(name), "b"], [rows(), rows()], ["loss"])
        assert len(png(curves, words)) > 1000
    assert len(short(name)) <= 41


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "x" / "run", tmp_path / "y" / "run"
    assert run_names([a]) == ["run"]
    assert run_names([a, b]) == ["x/run", "y/run"]


@given(st.integers(1, 100000), st.data())
def test_wilson_is_scipys(images: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, images))
    expected = scipy.stats.binomtest(correct, images).proportion_ci(0.95, method="wilson")
    assert sweep.wilson(correct, images) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_rows_that_cannot_be_drawn_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a run folder with config\.toml"):
        rows_of(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match="expected a run with rows"):
        rows_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"\n')
    with pytest.raises(CheckpointError, match="expected a line of JSON"):
        rows_of(tmp_path)
    with pytest.raises(UsageError, match="got speed; there are loss, adv_top1"):
        chosen_metrics([rows()], ["speed"])
    for metrics in ([], ["loss", "loss"]):
        with pytest.raises(UsageError, match="expected one or more, each once"):
            chosen_metrics([rows()], metrics)


def test_points_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / sweep.FILE
    assert sweep.load(file) == []
    sweep.save(file, [point(1), point(2)])
    assert sweep.load(file) == [point(1), point(2)]
    assert [path.name for path in file.parent.iterdir()] == [sweep.FILE]
    for damaged in ("[", '{"correct": 1}', "[1]", json.dumps([{"images": 2}])):
        file.write_text(damaged)
        with pytest.raises(UsageError, match="expected measured points"):
            sweep.load(file)


def test_a_full_disk_leaves_the_old_points_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / sweep.FILE
    sweep.save(file, [point(1)])
    plain = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        out = plain(path, mode, **options)
        if "w" in mode:
            out.write(b"half")
            out.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return out

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{file}'")):
        sweep.save(file, [point(1), point(2)])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [sweep.FILE]
    assert sweep.load(file) == [point(1)]


def test_a_picture_of_several_runs_does_not_replace_that_of_one() -> None:
    assert place.file_name("curves", [Path("a")]) != place.file_name("curves", [Path("a"), Path("b")])
