"""The README is true: its commands parse, its files exist, its flags are real, its numbers are where it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fasttht import cli
from fasttht.bench.ladder import COUNTED, RUNGS, count_collectives, count_rung
from fasttht.config_file import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = {"tools/write_ffcv.py": ["data", "write"], "tools/compare_runs.py": ["compare"]}

TORCHRUN = ("--nproc-per-node", "--max-restarts")


def commands() -> list[list[str]]:
    """Every indented command line of the README, without its comment."""
    lines = re.findall(r"^    ((?:fasttht|tools/\w+\.py|bash) .*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Resolve a command without running it: `train` as `config`, most others up to their first check."""
    name, *rest = words
    if name == "bench":  # to a file that cannot be, which is looked at when all words are understood
        assert cli.run([*words, "--output", "missing/folder/file.json"]) == 2
        assert "--output: expected a file in an existing folder" in capsys.readouterr().err
        return
    if name == "compare":  # to the first thing that is looked at when all words are understood
        assert cli.run([*words, "--jobs", "0"]) == 2
        assert "--jobs and --eval-restarts: expected at least 1" in capsys.readouterr().err
        return
    if name == "train":
        assert cli.run(["config", *rest]) == 0, capsys.readouterr().err
    elif name == "pretrain":
        assert cli.run([*words, "--print-config"]) == 0, capsys.readouterr().err
    elif name in ("config", "doctor"):
        assert cli.run(words) == 0
    else:
        code = cli.run(words)
        assert code in (3, 4), "expected the missing data or run to be what stops it"
    assert "Traceback" not in capsys.readouterr().err


def test_every_command_parses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) >= 8
    for program, *words in found:
        if program == "bash":
            assert (ROOT / words[0]).exists()
        elif program.startswith("tools/"):
            assert (ROOT / program).exists()
            parses([*SCRIPTS[program], *words], capsys)
        else:
            parses(words, capsys)


def test_every_flag_and_file_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helps = ""
    benches = (["bench", name] for name in ("load", "attack", "step", "kernels", "zeros", "scale"))
    for words in (["train"], ["pretrain"], ["eval"], ["compare"], ["export"], ["data", "write"], *benches):
        assert cli.run([*words, "--help"]) == 0
        helps += capsys.readouterr().out
    helps += (ROOT / "tools" / "render_characters.py").read_text()  # a script of its own
    flags = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README)) - {"--help", *TORCHRUN}
    assert flags
    for flag in flags:
        assert flag in helps, f"{flag} is no option"
    for path in re.findall(r"`((?:tools|examples|fasttht|kernels|pipelines|tests|docs)/[\w./-]*)", README):
        assert (ROOT / path).exists(), path
    for preset in re.findall(r"--preset (\S+?)[`\s]", README):
        assert preset in (*preset_names(), *preset_names(pretrain=True))


@pytest.mark.changes_rng
def test_the_ladders_table_is_what_is_counted() -> None:
    rows = dict(re.findall(r"^\| (A\d) \|.*\| ([\w .]+ \| [\w .]+) \|$", README, re.MULTILINE))
    assert list(rows) == list(RUNGS)
    for rung, figures in rows.items():
        count = count_rung(rung) if rung in COUNTED else None
        assert figures == (
            "not counted | not counted" if count is None else f"{count.num_bytes / 1e6:.1f} | {count.launches}"
        )
    exchanges = count_collectives("A0")
    assert re.search(rf"A0 exchanges\s+{exchanges}\s+messages", README)


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
    assert "TODO" not in README


def test_every_preset_says_what_it_is_and_resolves(capsys: pytest.CaptureFixture[str]) -> None:
    for name in preset_names():
        assert cli.run(["config", "--preset", name]) == 0, capsys.readouterr().err
        text = (ROOT / "fasttht" / "presets" / f"{name}.toml").read_text()
        assert "fasttht train" in text.split("\n")[1]
        if name != "quickstart":
            assert "not measured" in text
            assert "Paper" in text


def test_the_specification_fits_in_one_look_and_imports_nothing_of_ours() -> None:
    source = (ROOT / "examples" / "that_minimal.py").read_text()
    assert len(source.splitlines()) <= 120
    imported = re.findall(r"^(?:import|from) ([\w.]+)", source, re.MULTILINE)
    assert {name.split(".")[0] for name in imported} == {"copy", "torch"}
