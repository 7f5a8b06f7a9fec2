"""F14: files made to run code, to read elsewhere or to fill the memory. Nothing is run, one line says what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttht import checkpoint
from fasttht.loop import Loop
from tests.faults import runs
from tests.faults.case import Context, Kind
from tests.faults.mismatch import edited

MARK = "executed"


class Payload:
    """Makes a file when it is unpickled by whoever does so."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _legacy(mark: Path) -> bytes:
    return pickle.dumps({"state_dict": Payload(mark)})


def _zipped(mark: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": {"conv1.weight": Payload(mark)}}, out)
    return out.getvalue()


def _stacked(mark: Path) -> bytes:
    """A PyTorch file whose payload is in a second pickle of the archive."""
    out = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(1)}, out)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/evil.pkl", pickle.dumps(Payload(mark)))
    return out.getvalue()


def _header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _entry(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return _header(json.dumps({"trunk.conv1.weight": entry}).encode(), data=bytes(8))


FILES: list[tuple[str, Callable[[Path], bytes]]] = [
    ("pickle", _legacy),
    ("PyTorch file", _zipped),
    ("PyTorch file with a second pickle", _stacked),
    ("header of 2^63 bytes", lambda mark: _header(b"{}", 2**63 - 1)),
    ("header longer than the file", lambda mark: _header(b"{}", 10**6)),
    ("header that is no JSON", lambda mark: _header(b"\x80\x04" + b"x" * 40)),
    ("header nested 50,000 deep", lambda mark: _header(b"[" * 50_000)),
    ("offsets beyond the file", lambda mark: _entry(data_offsets=[0, 10**12])),
    ("negative offsets", lambda mark: _entry(data_offsets=[-8, 0])),
    ("a shape of 2^62", lambda mark: _entry(shape=[2**31, 2**31])),
    ("a shape that does not fit", lambda mark: _entry(shape=[7])),
    ("another type", lambda mark: _entry(dtype="OBJECT")),
]
NAMES = ("weights.safetensors", "weights.pth")
FIRST = 2 * len(FILES) + 3 + 3
CONFIGS = [
    ("tag", "objective: !!python/object/apply:os.mkdir [executed]"),
    ("expression", "eps = \"__import__('os').mkdir('executed')\""),
    ("path", 'preset = "../../../etc/passwd"'),
]


def malicious(number: int, at: Context) -> str:
    """Weights for --init and --clean-encoder (24), checkpoints, configurations, presets, what lies elsewhere."""
    if number >= FIRST:
        return _elsewhere(number - FIRST, at)
    mark = at.folder / MARK
    words = ["train", *runs.TINY, *runs.STANDARD, "--output", str(at.folder / "run")]

    def no_training() -> None:
        def accepted(self: object, **_: object) -> None:
            sys.stderr.write("accepted\n")
            sys.stderr.flush()
            os._exit(77)

        Loop.fit = accepted  # type: ignore[method-assign,assignment]

    if number < 2 * len(FILES):
        what, make = FILES[number // 2]
        path = at.folder / NAMES[number // 2 % 2]
        path.write_bytes(make(mark))
        flag = ("--init", "--clean-encoder")[number % 2]
        line = runs.one_line(runs.call([*words, flag, str(path)], at.folder, no_training), 2, 4)
        what = f"{flag}: {what}"
    elif number < 2 * len(FILES) + 3:
        base = runs.baseline("standard fp32", at.shared)
        run = at.folder / "run"
        runs.begin_from(base, 40, run)
        which = number - 2 * len(FILES)

        def change(folder: Path) -> None:
            if which == 2:
                (folder / "state.json").write_text("[" * 100_000)
            else:
                name = ("model", "training")[which]
                (folder / f"{name}.safetensors").write_bytes((_zipped, _legacy)[which](mark))

        for folder in checkpoint.listing(run):
            edited(folder, change)
        line = runs.one_line(runs.call(runs.command("standard fp32", run), at.folder), 4)
        what = f"a checkpoint's {('model', 'training', 'state')[which]}"
    else:
        what, text = CONFIGS[number - 2 * len(FILES) - 3]
        path = at.folder / "options.toml"
        path.write_text(text)
        line = runs.one_line(runs.call([*words, "--config", str(path)], at.folder, no_training), 2)
    assert not mark.exists(), f"{what}: code was executed"
    assert not list(Path().glob(f"**/{MARK}")), f"{what}: code was executed"
    return f"{what}: {line[:140]}"


# state.json of a checkpoint, changed by another program: what it is to hold, by (part, key), and the right exit codes.
METAS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("rows name ../victim", {"rows": {"../victim": 0}}, (4,)),
    ("rows name ../victim beside their own", {"rows": {"metrics.jsonl": 0, "timing.jsonl": 0, "../victim": 3}}, (4,)),
    ("rows name config.toml", {"rows": {"metrics.jsonl": 0, "timing.jsonl": 0, "config.toml": 0}}, (4,)),
    ("rows of an absolute path", {"rows": {"ABSOLUTE": 0}}, (4,)),
    ("rows of a negative size", {"rows": {"metrics.jsonl": -1, "timing.jsonl": 0}}, (4,)),
    ("rows of 10**30 bytes", {"rows": {"metrics.jsonl": 10**30, "timing.jsonl": 0}}, (4,)),
    ("rows that are a list", {"rows": ["metrics.jsonl"]}, (4,)),
    ("a negative epoch", {"loader": {"epoch": -1}}, (3, 4)),
    ("an epoch of 10**19", {"loader": {"epoch": 10**19}}, (3, 4)),
    ("an epoch that is a word", {"loader": {"epoch": "first"}}, (3, 4)),
    ("a negative step of the pass", {"loader": {"step": -5}}, (3, 4)),
    ("a step beyond the pass", {"loader": {"step": 10**6}}, (3, 4)),
    ("bad samples that are no rows", {"loader": {"bad_rows": [-1, 10**19]}}, (3, 4)),
]
PRESETS = ("../presets/quickstart", "../../victim", "ABSOLUTE", "quickstart.toml", "..%2fquickstart")
LINKS = ("step-best", "step-00000999.old", ".partial-step-00000045", "step-00000099")


def contents_of(folder: Path) -> dict[str, str]:
    """Return a digest of every file and link below a folder, but for those that the runner writes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in ("out.txt", "err.txt", "said.txt", "trace.txt"):
            continue
        if path.is_symlink():
            found[str(path)] = f"to {path.readlink()}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _elsewhere(number: int, at: Context) -> str:
    """Nothing outside of the run's own files may be changed, and nothing of it taken for a preset."""
    victim, run = at.folder / "victim", at.folder / "run"
    victim.write_text("a user's own file\n")
    words = runs.command("standard fp32", run)
    base = runs.baseline("standard fp32", at.shared)
    if number < len(METAS):
        what, changes, codes = METAS[number]
        changes = json.loads(json.dumps(changes).replace("ABSOLUTE", str(victim)))
        runs.begin_from(base, 40, run)
        for folder in checkpoint.listing(run):
            edited(folder, lambda folder: _changed(folder / "state.json", changes))
        before = contents_of(at.folder)
        line = runs.one_line(runs.call(words, at.folder), *codes)
        assert contents_of(at.folder) == before, f"{what}: a file was changed"
        return f"{what}: {line[:140]}"
    if number < len(METAS) + len(PRESETS):
        name = PRESETS[number - len(METAS)].replace("ABSOLUTE", str(at.folder / "victim"))
        (at.folder / "victim.toml").write_text("epochs = 1\n")
        before = contents_of(at.folder)
        line = runs.one_line(runs.call(["config", "--preset", name], at.folder), 2)
        assert contents_of(at.folder) == before
        return f"--preset {name}: {line[:100]}"
    name = LINKS[number - len(METAS) - len(PRESETS)]
    place = run / "checkpoints" / name
    runs.begin_from(base, 40, run)
    outside = at.folder / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("a user's own file\n")
    if name.startswith("step-b") or name.endswith(".old"):
        shutil.copytree(outside, place)  # a user's folder among the checkpoints
    else:
        place.symlink_to(outside)
    before = contents_of(at.folder)
    said = runs.call([*words, "--checkpoint-hist", "1"], at.folder)
    if place.is_symlink() and said[0]:
        runs.one_line(said, 2, 4, 6)
    else:
        assert said[0] == 0, said[2][-600:]
    after = contents_of(at.folder)
    kept = {path for path in before if "outside" in path or (not place.is_symlink() and path.startswith(str(place)))}
    assert all(after.get(path) == before[path] for path in kept), f"{name}: {sorted(kept - after.keys())} is gone"
    return f"checkpoints/{name} of a user's own: kept, exit {said[0]}"


def _changed(path: Path, changes: dict[str, Any]) -> None:
    meta = json.loads(path.read_text())
    for key, value in changes.items():
        meta[key] = meta[key] | value if key == "loader" else value
    path.write_text(json.dumps(meta))


KIND = Kind(
    "malicious",
    FIRST + len(METAS) + len(PRESETS) + len(LINKS),
    "nothing executed, nothing changed outside the run's own files; exit 2, 3 or 4 in one line",
    "weights for --init and --clean-encoder, configuration files, and checkpoints of the standard fp32 run of kill",
    malicious,
)
