"""A slice of the fault campaign, in a process that may fork: `python -m tests.faults`; and what the runner notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Two halves of a slice, which run side by side. The plain command lines among the kills take most of the time; these
# are the rest, spread.
KILLS = {"kill": 60}
OTHERS = {
    "signal": 4, "damage": 6, "disk": 5, "data": 10, "loader": 2, "fuzz": 30, "mismatch": 8, "nan": 4, "malicious": 10,
    "host": 3, "pretrain": 6, "rank": 1, "rank-signal": 1, "elastic": 1, "soak": 1,
}  # fmt: skip
SLICE = {**KILLS, **OTHERS}


def start(output: Path, *words: str, code: str = "") -> subprocess.Popen[bytes]:
    """Start the runner, with some code before it that may break the product; what it says goes to said.txt."""
    program = f"import sys; sys.argv = {['tests.faults', '--output', str(output), *words]!r}\n{code}\n"
    program += "import runpy; runpy.run_module('tests.faults', run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output.mkdir(exist_ok=True)
    with (output / "said.txt").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip


def campaign(output: Path, *words: str, code: str = "") -> tuple[int | None, str]:
    """Run the runner; return its exit code and what it said."""
    process = start(output, *words, code=code)
    code = process.wait(timeout=1800)
    return code, (output / "said.txt").read_text()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, subprocess.Popen[bytes]]]]:
    """Start the slice's two halves, whose cases share uninterrupted runs; give folder and process by kind."""
    found = {}
    for kinds in (KILLS, OTHERS):
        output = tmp_path_factory.mktemp("slice")
        words = ",".join(f"{kind}={cases}" for kind, cases in kinds.items())
        found |= dict.fromkeys(kinds, (output, start(output, "--cases", words, "--short")))
    yield found
    for _, process in found.values():
        process.kill()
        process.wait()


# A test waits for some cases, not for all: one that takes minutes is taken for a hang.
WAITS = [*OTHERS.items(), ("kill", 20), ("kill", 40), ("kill", KILLS["kill"])]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cases"), WAITS, ids=lambda value: str(value))
def test_a_slice_of_every_kind_passes(
    kind: str, cases: int, halves: dict[str, tuple[Path, subprocess.Popen[bytes]]]
) -> None:
    output, process = halves[kind]
    found: list[dict[str, Any]] = []
    while len(found) < cases:
        ended = process.poll() is not None  # asked first: what it had written by then is read
        lines = [line for path in output.glob("cases-*.jsonl") for line in path.read_text().split("\n")[:-1]]
        found = [line for line in map(json.loads, lines) if line["kind"] == kind]
        assert len(found) >= cases or not ended, (output / "said.txt").read_text()[-3000:]
        time.sleep(0.2)
    assert all(line["passed"] for line in found[:cases]), [line["said"] for line in found if not line["passed"]]


BREAKS = {
    # A part that is not restored, a save that is not whole when its name says so, a position that is not kept.
    "kill": "import fasttht.bank\nfasttht.bank.FeatureBank.state = lambda self: {}",
    "damage": "from fasttht import checkpoint\ncheckpoint.verify = lambda folder: None",
    "disk": "import fasttht.checkpoint as c, shutil\nshutil.rmtree = lambda *a, **k: None",
    "fuzz": "from fasttht import log\nlog.fail = lambda text: print('Traceback', text)",
    "pretrain": "import fasttht.bank\nfasttht.bank.FeatureBank.state = lambda self: {}",
    "nan": "import fasttht.state as s\ns.GuardedSGD.step = s.torch.optim.SGD.step",
    "loader": "import fasttht.pipelines.loader as l\nl.ResourceError = ZeroDivisionError",
    "signal": "from fasttht import loop\nloop.Loop._interrupted = lambda *a: ZeroDivisionError()",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BREAKS)
def test_the_runner_notices_a_product_that_is_broken(kind: str, tmp_path: Path) -> None:
    """Else a campaign without a failure would mean nothing."""
    code, said = campaign(tmp_path, "--cases", f"{kind}=5", "--short", code=BREAKS[kind])
    assert code == 1, said[-3000:]
    assert "FAILED" in said


def test_the_table_says_what_was_not_run_and_a_finished_case_is_not_run_again(tmp_path: Path) -> None:
    code, said = campaign(tmp_path, "--cases", "fuzz=3", "--shard", "0/2")
    assert code == 0, said
    path = tmp_path / "cases-0of2.jsonl"
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text() + '{"kind": "fuzz", "num')  # a line that a kill has torn
    code, said = campaign(tmp_path, "--cases", "fuzz=3", "--shard", "0/2")
    assert code == 0, said
    assert len(path.read_text().splitlines()) == 3
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in said.splitlines()}
    assert {name for name in rows if name.replace("-", "").isalpha()} - {"kind"} == {*SLICE}, "a kind is in no slice"
    assert "| 2000 | 2 | 2 | 0 | 1998 |" in rows["fuzz"]
    assert "| 0 | 0 | 0 | 520 | not measured |" in rows["kill"]


def test_cases_of_another_commit_count_as_not_run_unless_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "cases-0of1.jsonl"
    assert campaign(tmp_path, "--cases", "fuzz=2")[0] == 0
    older = [json.loads(line) | {"commit": "0123abc"} for line in path.read_text().splitlines()]
    assert all("-" in line.pop("date") for line in older)
    path.write_text("".join(json.dumps(line) + "\n" for line in older))
    _, said = campaign(tmp_path, "--table")
    assert "| fuzz | 2000 | 0 | 0 | 0 | 2000 |" in said
    assert "not counted, of other commits than" in said
    assert "0123abc (2 cases)" in said
    assert "| fuzz | 2000 | 2 | 2 | 0 | 1998 |" in campaign(tmp_path, "--table", "--any-commit")[1]
    assert campaign(tmp_path, "--cases", "fuzz=2")[0] == 0
    assert len(path.read_text().splitlines()) == 4, "what was of another commit is run again"
