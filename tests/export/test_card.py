"""Foreign text in a model card shows and does nothing; what nobody measured is said to be that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttht import cli
from fasttht import export_run as export_run_module
from fasttht.export_card import escaped
from fasttht.export_run import export_run
from fasttht.subject import open_run

NAMES = [
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "`rm -rf ~`", "a\n\n# A heading", "| cell | cell |",
    "---\nlicense: mit\n---", "\x1b[2J\u202eevil", "http://evil.example", '"; drop', "n" * 5000,
]  # fmt: skip


def test_hostile_class_names_are_escaped(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def renamed(*args: Any, **options: Any) -> Any:
        subject = open_run(*args, **options)
        subject.splits.train.class_names = tuple(NAMES)  # type: ignore[misc]
        return subject

    monkeypatch.setattr(export_run_module, "open_run", renamed)
    export_run(make_run(), output=tmp_path / "e", limit=2)
    text = (tmp_path / "e" / "model.json").read_text(encoding="ascii")
    assert json.loads(text)["class_names"] == NAMES
    card = (tmp_path / "e" / "README.md").read_text()
    listed = card.split("## Classes\n\n")[1].split("\n\n## Source")[0].splitlines()
    assert len(listed) == len(NAMES), "one line each"
    for i, line in enumerate(listed):
        assert re.fullmatch(rf"- {i} [\w &#;/()+%,-]*\.?\.?\.?", line, re.ASCII), line
    assert len(listed[-1]) < 80
    assert "\x1b" not in capsys.readouterr().out


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_escaped_text_has_nothing_that_markdown_or_html_reads(text: str) -> None:
    out = escaped(text)
    assert "\n" not in out
    assert out.isprintable()
    out.encode()
    without = re.sub(r"&#\d+;", "", out)
    assert not set(without) & set("\\`*_{}[]<>|~&$^=:@!\"'#")


@pytest.mark.parametrize("options", [{"norm": "l2", "eps": 0.5}, {"objective": "clean"}, {"norm": "l2-relative"}])
def test_cards_name_the_norm_and_what_was_trained(make_run: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    run = make_run(**options)
    assert cli.run(["export", str(run), "--output", str(tmp_path / "e"), "--limit", "4"]) == 0
    card = (tmp_path / "e" / "README.md").read_text()
    header = json.loads((tmp_path / "e" / "model.json").read_text())
    (pgd,) = [key for key in header["scores"] if key.startswith("pgd10")]
    assert f"| {header['scores'][pgd]:.2f} | 4 |" in card
    assert "4 of 360 held-out images" in card
    if options.get("objective") == "clean":
        assert "trained without attack" in card
    else:
        assert "L2" in card
        assert pgd == f"pgd10_{options['norm'].replace('-', '_')}_top1"


def test_the_card_tells_autoattack_only_of_this_very_network_images_and_radius(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    assert cli.run(["eval", str(run), "--eval-steps", "1", "--alarms", "off"]) == 0
    kept = run / "eval" / "evaluations.jsonl"
    row = json.loads(kept.read_text())
    others = [
        {**row, "autoattack_top1": 99.0, key: value}
        for key, value in (
            ("network", "0" * 16), ("data", "0"), ("eps", 0.1), ("norm", "l2"), ("img_size", 9), ("crop_pct", 0.5),
        )
    ]  # fmt: skip

    def exported(*rows: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        kept.write_text("".join(json.dumps(one) + "\n" for one in rows))
        assert cli.run(["export", str(run), "--output", str(tmp_path / "e"), "--force", "--limit", "4"]) == 0
        info = json.loads((tmp_path / "e" / "resnet18-at.json").read_text())
        return (tmp_path / "e" / "README.md").read_text(), info

    card, info = exported(row, *others)
    assert "| APGD and AutoAttack | not measured |" in card
    assert info["autoattack_acc"] is None
    assert "AutoAttack: not measured." in info["footnote"]
    few = {**row, "autoattack_top1": 25.0, "images": 40}
    card, info = exported(few, {**row, "apgd_top1": 31.25}, *others)
    assert "| AutoAttack, standard, Linf, eps 0.15 | 25.00 | 40 | the run's evaluation |" in card
    assert "| APGD (CE and DLR, the worse), Linf, eps 0.15 | 31.25 | 360 |" in card
    assert "AutoAttack | not measured" not in card
    assert info["autoattack_acc"] is None, "of a part of the images only"
    assert "AutoAttack: 25.00 % of 40 images" in info["footnote"]
    card, info = exported({**row, "autoattack_top1": 20.0}, few)
    assert "| 20.00 | 360 | the run's evaluation |" in card
    assert info["autoattack_acc"] == "20.00"
    card, info = exported({**row, "apgd_top1": 31.25})
    assert "| AutoAttack | not measured |" in card
    kept.write_text("[1]\n")
    assert cli.run(["export", str(run), "--output", str(tmp_path / "e"), "--force", "--limit", "4"]) == 0
    assert "| APGD and AutoAttack | not measured |" in (tmp_path / "e" / "README.md").read_text()
