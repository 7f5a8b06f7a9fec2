"""`--compare`: rows beside rows of their names, the newest report in a file, and no comparison of unlike things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttht.bench.compare import check_same, compare, open_report, read_report
from fasttht.errors import UsageError

ENV = {"cpu": "c", "cores": 2, "gpu": None, "threads": 1, "torch": "1", "date": "then", "load_1min": 1.0}
SETTINGS = {"arch": "resnet18", "windows": 3, "workers": [1, 2]}


def report(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"bench": "attack", "env": ENV, "settings": SETTINGS, "rows": list(rows)} | changes


def timed(name: str, ms: float) -> dict[str, Any]:
    return {"name": name, "img_per_s": 8000 / ms, "ms": ms, "quartiles_ms": [0.8 * ms, 1.25 * ms]}


def test_rows_are_matched_by_name_and_the_ratio_is_of_speeds() -> None:
    old = report(timed("a", 10), timed("gone", 1), {"name": "b", "not_run": "then not"})
    new = report(timed("b", 3), timed("a", 5), env=ENV | {"torch": "2", "date": "now"})
    compare(old, new)
    found = new["compare"]
    assert [row["name"] for row in found["rows"]] == ["a"]
    assert found["rows"][0]["ratio"] == pytest.approx(2)
    assert found["rows"][0]["ratio_quartiles"] == pytest.approx([2 * 0.8 * 0.8, 2 * 1.25 * 1.25])
    assert (found["only_new"], found["only_old"]) == (["b"], ["gone"])
    assert found["changed"] == {"torch": ["1", "2"]}
    assert found["date"] == "then"


def test_rows_of_loaders_and_of_ops_have_more_to_their_names() -> None:
    speeds = {"img_per_s": 10.0, "quartiles": [9.0, 11.0]}
    one, two = ({"name": "turbo", "workers": workers, **speeds} for workers in (1, 2))
    op = {"name": "op", "implementation": "compiled", "us": 4.0, "quartiles_us": [3.0, 5.0]}
    new = report(one, two, op)
    compare(report(two, op), new)
    assert [row["name"] for row in new["compare"]["rows"]] == ["turbo, 2 workers", "op, compiled"]
    assert [row["ratio"] for row in new["compare"]["rows"]] == [1, 1]
    assert new["compare"]["rows"][1]["ratio_quartiles"] == pytest.approx([3 / 5, 5 / 3])
    assert new["compare"]["only_new"] == ["turbo, 1 workers"]


def test_other_images_are_not_compared_and_it_is_said() -> None:
    new = report(timed("a", 1), data={"fingerprint": "x"})
    compare(report(timed("a", 1), data={"fingerprint": "y"}), new)
    assert new["compare"] == {"not_run": "the older report is of other images"}


def test_without_an_older_report_nothing_is_added() -> None:
    new = report(timed("a", 1))
    compare(None, new)
    assert "compare" not in new
    assert read_report(None, "attack") is None
    assert open_report(None, "attack", {}, torch.device("cpu")) is None


def test_the_newest_report_of_the_bench_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    lines = [report(number=1), report(number=2), report(bench="step")]
    path.write_text("not JSON\n" + "".join(json.dumps(line) + "\n" for line in lines))
    found = read_report(path, "attack")
    assert found is not None
    assert found["number"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"bench": "step"}), "expected a report of bench attack .* got bench step"),
        ("[1]\nwords", "got no report at all"),
        (None, "expected a report that can be read"),
    ],
)
def test_a_file_without_one_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=f"--compare: .*{said}|--compare: {said}"):
        read_report(path, "attack")


@pytest.mark.parametrize(
    ("env", "settings", "said"),
    [
        ({"cpu": "d"}, {}, "the same machine, got cpu c where this run has d"),
        ({"gpu": "g"}, {}, "the same machine, got gpu None where this run has g"),
        ({"threads": 4}, {}, "the same machine, got threads 1 where this run has 4"),
        ({}, {"arch": "resnet50"}, "the same settings, got arch resnet18 where this run has resnet50"),
        ({}, {"new": 1}, "the same settings, got new None where this run has 1"),
    ],
)
def test_unlike_runs_are_refused(env: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_same(report(), ENV | env, SETTINGS | settings)


def test_versions_the_day_and_the_number_of_windows_may_differ() -> None:
    check_same(report(), ENV | {"torch": "3", "date": "now", "load_1min": 9.0}, SETTINGS | {"windows": 9})
    check_same(report(), ENV, SETTINGS | {"workers": (1, 2)})  # a tuple here, a list in JSON
