"""python -m tests.faults: run cases of injected faults, remember which are done, print a table.

    python -m tests.faults --output faults                                 everything that is planned
    python -m tests.faults --cases kill=60,fuzz=200 --short --output out   a slice, spread over what is planned
    python -m tests.faults --shard 1/4 --output faults                     a quarter; the table counts all shards

A finished case is a line of OUTPUT/cases-*.jsonl and is not run again by the same command, unless it failed and
--again is given. One of another commit counts as not run, unless --any-commit is given: docs/ aside, whose changes
change no case. Ends with 1 if a case failed. Run it from the repository root; two processes may share an output folder
if their shards differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults import runs
from tests.faults.case import Kind, Result, run_case

KINDS = (
    "kill", "signal", "damage", "disk", "data", "loader", "fuzz", "mismatch", "nan", "malicious", "host", "pretrain",
    "rank", "rank-signal", "elastic", "soak",
)  # fmt: skip
_MODULES = {"signal": "signals", "data": "bad_data", "rank-signal": "rank_signals"}


def load(name: str) -> Kind:
    """Return a kind; its file imports what its cases need."""
    kind = importlib.import_module(f"tests.faults.{_MODULES.get(name, name)}").KIND
    assert isinstance(kind, Kind)
    return kind


def chosen(planned: int, wanted: int) -> list[int]:
    """Return `wanted` case numbers spread over what is planned, by the golden ratio: in step with no pattern of it."""
    return sorted(sorted(range(planned), key=lambda number: number * 0.6180339887498949 % 1)[:wanted])


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def this_commit() -> str:
    """Return what this code is called: a commit, and a digest of what was changed since."""
    name = git("describe", "--always") or "unknown"
    changes = git("diff", "HEAD", "--", ".", ":(exclude)docs")
    return f"{name}-dirty.{hashlib.sha256(changes.encode()).hexdigest()[:7]}" if changes else name


def journal(output: Path, commit: str | None) -> tuple[dict[tuple[str, int], Result], Counter[str]]:
    """Return the finished cases of a commit, or of any, and how many lines are of which other ones.

    The last word on each case counts. A line that a kill has torn is none; one without a commit is of no known one.
    """
    found, others = {}, Counter[str]()
    for path in sorted(output.glob("cases-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                result = Result(**{"commit": "unknown", "date": "unknown", **json.loads(line)})
            except (ValueError, TypeError):
                continue
            if commit in (None, result.commit):
                found[result.kind, result.number] = result
            else:
                others[result.commit] += 1
    return found, others


def table(kinds: list[Kind], done: dict[tuple[str, int], Result]) -> list[str]:
    """Return the lines of a Markdown table; what was not run says so."""
    lines = [
        "| kind | planned | run | passed | failed | not run | cases/min | a case that passes has shown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = [result for (name, number), result in done.items() if name == kind.name and number < kind.planned]
        own = [result for result in own if not (result.short and kind.name == "soak")]
        passed = sum(result.passed for result in own)
        spent = sum(result.seconds for result in own)
        pace = f"{60 * len(own) / spent:.0f}" if len(own) > 1 else "not measured" if not own else f"{60 / spent:.2g}"
        missing = kind.planned - len(own)
        shortened = " (--short)" if kind.name in ("kill", "signal") and any(r.short for r in own) else ""
        lines.append(
            f"| {kind.name}{shortened} | {kind.planned} | {len(own)} | {passed} | {len(own) - passed} "
            f"| {missing or 'none'} | {pace} | {kind.criterion} |"
        )
    return lines


# Of the faults that users of such trainers report, those that no case injects.
NOT_INJECTED = (
    "a GPU that runs out of memory or falls off the bus, and anything else of CUDA or NCCL",
    "more than one machine, and a network between processes that is slow or parts them",
    "a full /dev/shm: decoding is in threads, which share no memory through it",
    "a machine that loses power: what was written and not synced stays in its page cache under a SIGKILL",
    "a network disk; the decoders ffcv and dali; the commands bench, compare, eval, export and plot",
)


def counted(values: Counter[str]) -> str:
    return ", ".join(f"{name} ({count} cases)" for name, count in sorted(values.items())) or "none"


def write_doc(path: Path, lines: list[str], kinds: list[Kind], done: dict[tuple[str, int], Result]) -> None:
    """Write docs/reliability.md: the table, what the cases ran on, what failed."""
    import torch

    results = list(done.values())
    failed = [result for result in results if not result.passed]
    text = [
        "# Injected faults",
        "",
        "Written by `python -m tests.faults --write-doc`; nothing here is typed by hand. Every case is a process of "
        "its own, which starts others; it runs on the CPU. A kill is a SIGKILL.",
        "",
        f"Cases ran at commit {counted(Counter(result.commit for result in results))}; "
        f"on {counted(Counter(result.date for result in results))}. "
        f"Written on {time.strftime('%Y-%m-%d')} with torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"{os.cpu_count()} cores.",
        "",
        *lines,
        "",
        "## What the cases ran on",
        "",
        *(f"- {kind.name}: {kind.setting}" for kind in kinds),
        "",
        "## What they reached",
        "",
        *reached(kinds, done),
        "",
        "## Not injected",
        "",
        *(f"- {what}" for what in NOT_INJECTED),
        "",
        *(["## Failed", ""] if failed else ["No case that was run failed."]),
        *(f"- {result.kind} {result.number}: {' '.join(result.said.split())[:400]}" for result in failed),
    ]
    path.write_text("\n".join(text) + "\n")


def reached(kinds: list[Kind], done: dict[tuple[str, int], Result]) -> list[str]:
    """Return what the kinds' own summaries say of the cases that passed."""
    found = []
    for kind in kinds:
        own = [result for (name, _), result in sorted(done.items()) if name == kind.name and result.passed]
        found += [f"- {kind.name}: {line}" for line in kind.summary(own)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Inject faults, and count.")
    parser.add_argument("--cases", default="", help="how many: 100 of each kind, or kill=60,fuzz=200; default: all")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {','.join(KINDS)}; default: all")
    parser.add_argument("--number", type=int, help="one case, by its number, said in full")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case, from the i-th; i counts from 0")
    parser.add_argument("--output", type=Path, required=True, help="folder of the journal")
    parser.add_argument("--short", action="store_true", help="kill and signal: begin and end near the fault")
    parser.add_argument("--again", action="store_true", help="run cases again that have failed")
    parser.add_argument("--any-commit", action="store_true", help="take finished cases of other commits too")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--write-doc", action="store_true", help="write docs/reliability.md as well")
    asked = parser.parse_args()
    wanted = asked.kinds.split(",")
    numbers: dict[str, int] = {}
    for part in filter(None, asked.cases.split(",")):
        name, _, count = part.rpartition("=")
        numbers |= {name: int(count)} if name else dict.fromkeys(wanted, int(count))
        wanted = [*numbers] if name else wanted
    if unknown := [name for name in wanted if name not in KINDS]:
        parser.error(f"--kinds: expected some of {','.join(KINDS)}, got {','.join(unknown)}")
    try:
        shard, shards = (int(word) for word in asked.shard.split("/"))
    except ValueError:
        parser.error(f"--shard: expected i/n, got {asked.shard}")
    if not 0 <= shard < shards:
        parser.error(f"--shard: expected i/n with 0 <= i < n, got {asked.shard}")
    asked.output.mkdir(parents=True, exist_ok=True)
    failed, commit = 0, this_commit()
    if not asked.table:
        failed = run(asked, wanted, numbers, (shard, shards), commit)
    done, others = journal(asked.output, None if asked.any_commit else commit)
    kinds = [load(name) for name in KINDS]
    lines = table(kinds, done)
    sys.stdout.write("\n".join([*lines, "", *reached(kinds, done)]) + "\n")
    if others:
        sys.stdout.write(f"not counted, of other commits than {commit}: {counted(others)}; --any-commit takes them\n")
    if asked.write_doc:
        write_doc(Path(__file__).parents[2] / "docs" / "reliability.md", lines, kinds, done)
    return 1 if failed else 0


def run(
    asked: argparse.Namespace, wanted: list[str], numbers: dict[str, int], part: tuple[int, int], commit: str
) -> int:
    """Run what is left of what is asked for; return how many failed, earlier ones among them."""
    (shard, shards), failed = part, 0
    done, _ = journal(asked.output, None if asked.any_commit else commit)
    shared = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
    (shared / "cache").mkdir()
    runs.warm()
    out = asked.output / f"cases-{shard}of{shards}.jsonl"
    try:
        for kind in map(load, wanted):
            kind.prepare()
            cases = chosen(kind.planned, numbers.get(kind.name, kind.planned))
            for number in [asked.number] if asked.number is not None else cases[shard::shards]:
                before = done.get((kind.name, number))
                if before is not None and before.short and not asked.short:
                    before = None  # a slice's case does not stand for the whole one
                if before is None or (asked.again and not before.passed) or asked.number is not None:
                    result = run_case(kind, number, shared, short=asked.short, commit=commit)
                    with out.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
                else:
                    result = before
                failed += not result.passed
                if not result.passed or asked.number is not None:
                    word = "passed" if result.passed else "FAILED"
                    sys.stdout.write(f"{word} {kind.name} {number}: {result.said}\n")
                    sys.stdout.flush()
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    return failed


sys.exit(main())
