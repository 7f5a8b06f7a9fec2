"""One HTML file about a run: settings, scores, curves and pictures; nothing in it is fetched or executed."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fasttht.config_file import stored
from fasttht.errors import UsageError
from fasttht.eval_files import kept_rows
from fasttht.plots import lines
from fasttht.plots.history import Row, chosen_metrics, rows_of
from fasttht.plots.style import png, run_names, styled
from fasttht.plots.sweep import wilson
from fasttht.run_folder import CONFIG, write_whole

NAME = "report.html"

# What a row of an evaluation is about, in the order of its heading; everything else that is not a score is left out.
_ABOUT = (
    "checkpoint", "weights", "norm", "eps", "eval_rule", "restarts", "seed", "limit", "images_file", "knn_k",
    "knn_weighting", "knn_features", "knn_bank",
)  # fmt: skip

_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
caption { text-align: left; font-weight: bold; padding: 0.25rem 0; overflow-wrap: anywhere; }
th, td { border: 1px solid #767676; padding: 0.25rem 0.6rem; text-align: left; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th { background: #f0f0f0; }
figure { margin: 0 0 2rem; }
img { max-width: 100%; height: auto; border: 1px solid #c4c4c4; }
figcaption { color: #404040; font-size: 0.9rem; overflow-wrap: anywhere; }
pre { background: #f5f5f5; border-left: 4px solid #8a3b00; padding: 0.75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: bold; }
""".strip()


def write_report(run: Path, folder: Path, alarms: Path | None = None) -> Path:
    """Write NAME into folder, with the pictures that lie there, and return its path.

    alarms: a text file, shown as it is. Curves are drawn anew; everything else is read.

    Raises: CheckpointError if the run is none, or has no rows; UsageError for a file that cannot be read.
    """
    rows = rows_of(run)
    body = "\n".join(_body(run, rows, folder, alarms))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(run.resolve().name)}: fasttht report</title>
<style>
{_STYLE}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / NAME, page.encode("utf-8", "replace"), shared=True)
    return folder / NAME


def _body(run: Path, rows: Sequence[Row], folder: Path, alarms: Path | None) -> Iterator[str]:
    yield f"<h1>{escape(run.resolve().name)}</h1>"
    final = rows[-1] if rows[-1]["kind"] == "final" else None
    last = rows[-1].get("step", 0)
    yield f"<p>{f'Finished after {last:,} steps.' if final else f'Not finished: {last:,} steps so far.'}</p>"
    yield "<h2>Scores</h2>"
    yield "<p>Held-out images; in brackets Wilson's 95 % interval.</p>"
    evaluations = list(kept_rows(run))
    if final is not None:
        yield _scores("Final evaluation", final)
    for where, row in evaluations:
        about = ", ".join(f"{key} {row[key]}" for key in _ABOUT if row.get(key) is not None)
        yield _scores(f"{where}: {about}" if about else where, row)
        yield from _alarms(row)
    if final is None and not evaluations:
        yield "<p>Not measured.</p>"
    if alarms is not None:
        yield f"<h2>Alarms</h2>\n<pre>{escape(_text(alarms, '--alarms'))}</pre>"
    yield "<h2>Training</h2>"
    with styled():
        fig, words = lines.curves(run_names([run]), [rows], chosen_metrics([rows], None))
        yield _figure(png(fig, words), words)
    found = [path for path in sorted(folder.glob("*.png")) if not path.name.startswith((".", "curves."))]
    if found:
        yield "<h2>Pictures</h2>"
    for path in found:
        yield _figure(path.read_bytes(), _description(path))
    yield "<h2>Settings</h2>"
    config = stored(run / CONFIG)
    for section in dataclasses.fields(config):
        values = dataclasses.asdict(getattr(config, section.name))
        yield f"<details>\n<summary>{escape(section.name)}</summary>"
        yield _table("", ("option", "value"), ((key, _value(value)) for key, value in values.items()))
        yield "</details>"
    yield from _environment(run / "env.json")


def _scores(title: str, row: Row) -> str:
    """Return an evaluation as a table: percent, interval and count where the number of images is known; success."""
    images, cells = int(row.get("images", 0)), []
    measured = any(key.endswith("_asr") for key in row)
    for key, value in row.items():
        if not key.endswith("_top1") or not isinstance(value, int | float):
            continue
        shown, count = f"{value:.2f}", "not known"
        if images:
            correct = round(value * images / 100)
            low, high = wilson(correct, images)
            shown, count = f"{value:.2f} [{low:.2f}, {high:.2f}]", f"{correct:,}/{images:,}"
        name = key.removesuffix("_top1")
        success = row.get(f"{name}_asr")
        flipped = (f"{success:.2f}" if isinstance(success, int | float) else "",) if measured else ()
        cells.append((name.replace("_", " "), shown, count, *flipped))
    heads = ("images", "top-1 (%)", "correct", *(("attack success (%)",) if measured else ()))
    return _table(title, heads, cells, numbers=True)


def _alarms(row: Row) -> Iterator[str]:
    """Yield what an evaluation's alarms said, and what was not looked for; nothing where alarms were off."""
    found, unseen = row.get("alarms"), row.get("not_checked")
    if not isinstance(found, list):
        return
    texts = [one if isinstance(one, dict) else {"name": one} for one in found]
    if texts:
        cells = ((str(one.get("name", "")), str(one.get("text", "not kept"))) for one in texts)
        yield _table("Alarms: what does not add up here", ("alarm", "why"), cells)
    else:
        yield "<p>No alarms.</p>"
    if isinstance(unseen, list) and unseen:
        yield f"<p>{escape('. '.join(map(str, unseen)))}.</p>"


def _environment(path: Path) -> Iterator[str]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        raise UsageError(f"{path}: expected JSON, got something else; remove it, or restore it") from None
    yield "<details>\n<summary>machine</summary>"
    yield _table("", ("what", "value"), ((str(key), str(value)) for key, value in found.items()))
    yield "</details>"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table; the first cell of a row is its head, the others are right-aligned if they are numbers."""
    kind = ' class="number"' if numbers else ""
    lines_ = ["<table>"]
    if caption:
        lines_.append(f"<caption>{escape(caption)}</caption>")
    lines_.append("<tr>" + "".join(f'<th scope="col">{escape(head)}</th>' for head in heads) + "</tr>")
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell in others)
        lines_.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "\n".join([*lines_, "</table>"])


def _figure(content: bytes, words: str) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<figure>\n<img alt="{escape(words)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(words)}</figcaption>\n</figure>"
    )


def _description(path: Path) -> str:
    """Return what a picture says it shows, or its name.

    Raises: UsageError if it is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return str(image.info.get("Description") or path.stem.replace("-", " "))
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise UsageError(f"{path}: expected a PNG picture, got something else; remove it, or draw it again") from None


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag}: expected a readable text file, got {path}: {error}") from None


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
