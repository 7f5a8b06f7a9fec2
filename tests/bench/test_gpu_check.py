"""tools/gpu_check.sh on a machine without a GPU: it skips and says why; with parts that fail it keeps the others'."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"

# Stands for a Python on a machine with a GPU, or without: tests find nothing to run, one benchmark breaks, the others
# report. The script's own report is written by a real one, which finds no torch: importing it takes seconds.
PRETENDER = """#!/bin/sh
case "$*" in
  -c*sched_getaffinity*) echo 8 ;;
  -c*is_available*) exit {blind} ;;
  -c*) exit 0 ;;
  "- "*) PYTHONPATH={stub} exec {python} "$@" ;;
  *pytest*) exit 5 ;;
  *"{slow}"*) while [ $# -gt 1 ]; do shift; done; echo '{{"bench": "made up in part"}}' >"$1.partial"; exit 124 ;;
  *"bench attack"*) echo "the attack broke"; exit 1 ;;
  *) while [ $# -gt 1 ]; do shift; done; echo '{{"bench": "made up"}}' >"$1" ;;
esac
"""


def check(out: Path, python: Path | str, *words: str) -> tuple[int, str, dict[str, Any]]:
    """Run the script; returns its exit code, what it said, and its report."""
    env = {**os.environ, "OUT": str(out), "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    which = words[0] if words else "all"
    report: dict[str, Any] = json.loads((out / f"gpu-{which}.json").read_text())
    return done.returncode, done.stdout + done.stderr, report


def pretender(folder: Path, *, gpu: bool, slow: str = "none is") -> Path:
    (folder / "torch.py").write_text("raise ImportError('no torch')")
    path = folder / "python"
    path.write_text(PRETENDER.format(python=sys.executable, stub=folder, blind=int(not gpu), slow=slow))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("words", [(), ("core",), ("loader",)])
def test_without_a_gpu_every_part_is_skipped_with_its_reason(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, said, report = check(tmp_path / "out", pretender(tmp_path, gpu=False), *words)
    assert code == 0, said
    assert report["machine"]["gpu"] is None
    assert [part["name"] for part in report["parts"]] == (list(words) or ["core", "loader"])
    for part in report["parts"]:
        assert part["skipped"] == "torch finds no CUDA device"
        assert f"skipped: {part['name']}; torch finds no CUDA device" in said


def test_a_part_that_fails_leaves_the_others_results_and_shows_in_the_exit_code(tmp_path: Path) -> None:
    code, said, report = check(tmp_path / "out", pretender(tmp_path, gpu=True), "core")
    assert code == 1
    parts = {part["name"]: part for part in report["parts"]}
    assert parts["tests: attacks, kernels"]["skipped"] == "no test of it is marked gpu"
    assert parts["attack, batch 128"]["exit"] == 1
    assert parts["attack, batch 128"]["words"] == ["the attack broke"]
    assert "attack, batch 128: ended with 1" in said
    for name in ("kernels", "step", "zeros"):
        assert parts[name]["exit"] == 0
        assert parts[name]["report"] == {"bench": "made up"}
    assert next(iter(parts)) == "kernels"


def test_parts_that_all_run_end_with_0(tmp_path: Path) -> None:
    code, said, report = check(tmp_path / "out", pretender(tmp_path, gpu=True), "loader")
    assert code == 0, said
    assert [part.get("report") for part in report["parts"]] == [None, {"bench": "made up"}]


def test_a_part_out_of_time_leaves_what_it_had_measured(tmp_path: Path) -> None:
    code, _, report = check(tmp_path / "out", pretender(tmp_path, gpu=True, slow="bench load"), "loader")
    assert code == 1
    load = next(part for part in report["parts"] if part["name"] == "load")
    assert load["exit"] == 124
    assert load["partial_report"] == {"bench": "made up in part"}


def test_the_limits_of_the_parts_fit_nine_minutes() -> None:
    text = SCRIPT.read_text()
    budget = int(text.split("BUDGET=")[1].split("\n")[0])
    assert budget + 10 < 540  # and the seconds in which a part that ran out of time may end


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
