"""How every benchmark's command ends: one line of JSON, on stdout and in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fasttht.errors import UsageError


def check_output(output: Path | None) -> None:
    """Refuse a file that could not be written at the end. Raises: UsageError."""
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output: expected a file in an existing folder, got {output}; make the folder first")


def finish(report: dict[str, Any], output: Path | None) -> None:
    """Write the report as the last line of stdout, and append it to the file."""
    line = json.dumps(report) + "\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(line)
