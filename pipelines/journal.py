"""The journal of an unfinished .beton: which images are safely in the `.partial` file beside it.

Lines of text, each with its own checksum: the settings first, then one line per commit. A line that a kill or a power
cut left incomplete is not counted, nor is anything behind it.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttht.pipelines import DataError
from fasttht.pipelines.manifest import sync

VERSION = 1

# One image, in writing order. size is in bytes, 0 for an image that was skipped; outcome and remarks are those of
# encode.py: a place in OUTCOMES, and a bit for each of REMARKS.
RECORD = np.dtype(
    [
        ("mode", "u1"),
        ("outcome", "u1"),
        ("remarks", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("size", "<u4"),
        ("checksum", "<u4"),
    ]
)
Records = npt.NDArray[np.void]


def journal_path(beton: Path) -> Path:
    """Return where the journal of an unfinished `beton` lies."""
    return beton.with_name(beton.name + ".journal")


def read_journal(path: Path, settings: Mapping[str, Any]) -> tuple[Records, list[str]]:
    """Return the records of all commits and the reasons of the skipped images among them, both in order.

    Nothing is returned where there is no journal, or one without a whole commit. An incomplete end is cut off.

    Raises: DataError naming the differences if the journal was begun with other settings.
    """
    records, reasons, end = [np.zeros(0, RECORD)], [], 0
    for number, (line, end_of_line) in enumerate(_whole_lines(path)):
        if number == 0:
            _check_same(path, line, settings)
        else:
            records.append(np.frombuffer(base64.b64decode(line["records"]), dtype=RECORD))
            reasons += line["reasons"]
        end = end_of_line
    if path.exists():
        os.truncate(path, end)
    return np.concatenate(records), reasons


def append_commit(path: Path, settings: Mapping[str, Any], records: Records, reasons: list[str]) -> None:
    """Add a commit, with the settings before the first one. It is on the disk when this returns."""
    lines: list[dict[str, Any]] = [{"records": base64.b64encode(records.tobytes()).decode("ascii"), "reasons": reasons}]
    with open(path, "ab") as file:
        begins = file.tell() == 0
        if begins:
            lines.insert(0, {"version": VERSION, "settings": dict(settings)})
        for line in lines:
            text = json.dumps(line).encode("ascii")
            file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        file.flush()
        os.fsync(file.fileno())
    if begins:
        sync(path.parent)


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the lines up to the first damaged one, each with the position where it ends."""
    end = 0
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                return
            end += len(line)
            yield json.loads(text), end


def _check_same(path: Path, head: dict[str, Any], settings: Mapping[str, Any]) -> None:
    if head["version"] != VERSION:
        raise DataError(f"{path}: expected journal version {VERSION}, got {head['version']}; add --force")
    check_settings(path, head["settings"], settings)


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a write was begun with.

    Raises: DataError naming every difference.
    """
    names = sorted({*found, *wanted})
    different = [name for name in names if found.get(name) != wanted.get(name)]
    if different:
        expected = ", ".join(f"{name} {found.get(name)}" for name in different)
        got = ", ".join(f"{name} {wanted.get(name)}" for name in different)
        raise DataError(
            f"{path}: expected the settings and images that this write began with ({expected}), got {got}; "
            "resume with those, or start anew with --force"
        )
