"""How every benchmark's command ends: one line of JSON, on stdout and in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fasttht.errors import UsageError


def check_output(output: Path | None, flag: str = "--output") -> None:
    """Refuse a file that could not be written at the end. Raises: UsageError."""
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"{flag}: expected a file in an existing folder, got {output}; make the folder first")


def check_positive(values: dict[str, int]) -> None:
    """Refuse counts below 1, by their flags. Raises: UsageError."""
    for flag, value in values.items():
        if value < 1:
            raise UsageError(f"{flag}: expected 1 or more, got {value}; drop it for the default")


def machine(report: dict[str, Any]) -> str:
    """Return what ran a report, in words for a table's title."""
    env = report["env"]
    return env["gpu"] or f"{env['cpu']}, {env['threads']} threads"


def figure(value: float | None, form: str = "{:.1f}") -> str:
    """Return a table's cell, empty where there is no figure."""
    return "" if value is None else form.format(value)


def keep_part(report: dict[str, Any], output: Path | None) -> None:
    """Write what is known of a report so far beside its file: what is left if the command does not come to its end."""
    if output is not None:
        _part(output).write_text(json.dumps(report) + "\n", encoding="utf-8")


def kept_part(output: Path | None) -> Path | None:
    """Return where that is, or None if there is none."""
    return None if output is None or not _part(output).exists() else _part(output)


def drop_part(output: Path | None) -> None:
    """Delete what an earlier run may have left there: it is not this one's."""
    if output is not None:
        _part(output).unlink(missing_ok=True)


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def finish(report: dict[str, Any], output: Path | None) -> None:
    """Write the report as the last line of stdout, and append it to the file."""
    line = json.dumps(report) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(line)
        drop_part(output)
