"""What an evaluation keeps by itself: its row, where `plot report` and `export` look for it, and unfinished work.

RUN/eval/evaluations.jsonl     a row per evaluation, appended
RUN/eval/*.json                finished parts of AutoAttack, to go on after a stop
"""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fasttht.errors import UsageError
from fasttht.pipelines.cache import cache_folder

FOLDER, ROWS = "eval", "evaluations.jsonl"

Say = Callable[[str], None]


def keep(run: Path, row: dict[str, Any], say: Say) -> None:
    """Append a row to the run's; where the folder does not take it, say so and leave it at that.

    A line that a kill or a full disk left without its end is cut off first. Evaluations at once wait for each other.
    """
    file = run / FOLDER / ROWS
    line = (json.dumps(row) + "\n").encode()
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open("a+b") as rows:
            fcntl.flock(rows, fcntl.LOCK_EX)
            rows.seek(0)
            whole = rows.read().rfind(b"\n") + 1
            rows.truncate(whole)
            rows.write(line)
    except OSError as error:
        say(f"{file}: expected to keep the row here, got {error.strerror or error}; --output keeps it elsewhere")


def kept_rows(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the file's name and each row of RUN/eval/*.jsonl that has scores; a last line without its end is none.

    Raises: UsageError for a file that cannot be read, or is something else.
    """
    for path in sorted((run / FOLDER).glob("*.jsonl")):
        try:
            lines = path.read_text().split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: expected a readable text file, got {error}; remove it, or restore it") from None
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UsageError(f"{path}: expected an evaluation as JSON in each line, got something else in {number}")
            if any(key.endswith("_top1") for key in row):
                yield path.name, row


def work_folder(path: Path, *, is_run: bool, given: Path | None, say: Say) -> Path:
    """Return the folder where suites keep what they have, made if it is not there.

    That is the one given; else `eval` in a run folder, a folder beside anything else, and a cache folder where that
    cannot be written. What lies in it has names of its own, so evaluations may share one.

    Raises: OSError if the folder given cannot be made.
    """
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        return given
    own = path / FOLDER if is_run else path.absolute().with_name(f"{path.stem}-eval")
    try:
        own.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=own):
            return own
    except OSError as error:
        other = cache_folder(FOLDER)
        say(f"{own}: expected a folder to keep results in, got {error.strerror or error}; they are kept in {other}")
        return other
