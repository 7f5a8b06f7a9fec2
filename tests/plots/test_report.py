"""The report opens offline: nothing is fetched or executed, whatever a run, its files or its folder are called."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fasttht import cli
from fasttht.errors import CheckpointError, UsageError
from fasttht.plots import sweep
from fasttht.plots.report import write_report

HOSTILE = "<script>alert(1)<&\"'$x"


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(path: Path) -> Page:
    page = Page(path.read_text())
    assert page.open == []
    return page


def test_a_report_is_one_file_that_fetches_and_executes_nothing(run: Path) -> None:
    hostile = run.with_name(HOSTILE)
    run.rename(hostile)
    (hostile / "eval").mkdir()
    row = {"checkpoint": "step-1", "eps": "<b>", "clean_top1": 99.5, "pgd<i>_top1": 50.0, "images": 200, "url": HOSTILE}
    (hostile / "eval" / "a<b>.jsonl").write_text(json.dumps(row) + "\n" + '{"half": ')
    alarms = hostile / "alarms.txt"
    alarms.write_text("<img src=http://example.org/x onerror=alert(1)>\nmore steps are not stronger")
    path = write_report(hostile, hostile / "plots", alarms)
    page = page_of(path)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "table", "caption", "tr", "th",
        "td", "pre", "figure", "img", "figcaption", "details", "summary",
    }  # fmt: skip
    addresses = [value for _, given in page.tags for key, value in given.items() if key in ("src", "href", "srcset")]
    assert addresses
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in addresses)
    assert not [key for _, given in page.tags for key in given if key.startswith("on")]
    assert all(given.keys() == {"alt", "src"} for given in page.of("img"))
    assert HOSTILE in str(page.of("img")[0]["alt"])
    assert "url(" not in path.read_text()
    assert "@import" not in path.read_text()
    text = "".join(page.text)
    assert HOSTILE in text
    assert "<img src=http://example.org/x onerror=alert(1)>\nmore steps" in text
    assert "pgd<i>" in text


def test_a_report_says_what_was_measured(run: Path) -> None:
    page = page_of(write_report(run, run / "plots"))
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    low, high = sweep.wilson(round(final["pgd2_top1"] * 3.6), 360)
    cells = [cell.strip() for cell in page.text if cell.strip()]
    assert f"{final['pgd2_top1']:.2f} [{low:.2f}, {high:.2f}]" in cells
    assert f"{round(final['clean_top1'] * 3.6)}/360" in cells
    assert {"batch_size", "700", "objective", "torch"} <= set(cells)
    assert page.of("html") == [{"lang": "en"}]
    assert page.of("title")
    for image in page.of("img"):
        assert len(image["alt"] or "") > 20
    assert all(head.get("scope") in ("col", "row") for head in page.of("th"))


def test_a_report_holds_the_pictures_that_exist_with_their_words(run: Path) -> None:
    assert cli.run(["plot", "examples", str(run), "--images", "1", "2"]) == 0
    assert cli.run(["plot", "report", str(run)]) == 0
    images = page_of(run / "plots" / "report.html").of("img")
    assert len(images) == 2  # curves are drawn anew
    assert "row 1 of class" in str(images[1]["alt"])
    content = base64.b64decode(str(images[1]["src"]).removeprefix("data:image/png;base64,"))
    assert content == (run / "plots" / "examples.png").read_bytes()


def test_the_same_run_gives_the_same_report(run: Path) -> None:
    pages = [write_report(run, run / "plots").read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_a_run_that_trains_on_is_reported_as_such(run: Path) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(row for row in rows if '"train"' in row))
    text = "".join(page_of(write_report(run, run / "plots")).text)
    assert "Not finished" in text
    assert "Not measured." in text


def test_what_cannot_be_read_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--alarms: expected a readable text file"):
        write_report(run, run / "plots", tmp_path / "none.txt")
    (run / "eval").mkdir()
    (run / "eval" / "x.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match=r"x\.jsonl: expected an evaluation as JSON"):
        write_report(run, run / "plots")
    shutil.rmtree(run / "eval")
    (run / "plots").mkdir()
    (run / "plots" / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(UsageError, match=r"a\.png: expected a PNG picture"):
        write_report(run, run / "plots")
    with pytest.raises(CheckpointError, match="expected a run folder"):
        write_report(tmp_path, tmp_path)
