"""F4: damaged checkpoints. The newest is cut, flipped, swapped or incomplete: said, and the one before is used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from fasttht import checkpoint
from tests.faults import runs
from tests.faults.case import Context, Kind

CUTS, FLIPS = 100, 200
AT, UNTIL = 40, 45


def flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}: bit {bit} of byte {place} flipped"


def _empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swap(a: Path, b: Path) -> None:
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def _manifest(text: str) -> Callable[[Path, Path], object]:
    return lambda new, old: (new / "MANIFEST.json").write_text(text)


def _traverse(new: Path, old: Path) -> None:
    sums = json.loads((new / "MANIFEST.json").read_text())
    path = new / "MANIFEST.json"
    path.write_text(json.dumps(sums | {"../../config.toml": checkpoint._sha256(new.parent.parent / "config.toml")}))


def _unlisted(new: Path, old: Path) -> None:
    sums = json.loads((new / "MANIFEST.json").read_text())
    del sums["training.safetensors"]
    (new / "MANIFEST.json").write_text(json.dumps(sums))


def _rename(new: Path, old: Path) -> None:
    shutil.copytree(old, new.with_name("step-00000099"))


OTHERS: list[tuple[str, Callable[[Path, Path], object]]] = [
    *((f"no {name}", lambda new, old, name=name: (new / name).unlink()) for name in
      ("model.safetensors", "training.safetensors", "ema.safetensors", "clean_encoder.safetensors", "state.json",
       "MANIFEST.json")),
    *((f"{name} swapped with the older one's", lambda new, old, name=name: _swap(new / name, old / name)) for name in
      ("model.safetensors", "training.safetensors", "state.json", "MANIFEST.json")),
    ("the older one's manifest", lambda new, old: shutil.copy(old / "MANIFEST.json", new)),
    ("an older one under a newer name", _rename),
    ("an empty folder", lambda new, old: _empty(new)),
    ("a folder in place of a file", lambda new, old: _as_folder(new / "model.safetensors")),
    ("a manifest that lists nothing", _manifest("{}")),
    ("a manifest that is a list", _manifest('["model.safetensors"]')),
    ("a manifest nested 100,000 deep", _manifest("[" * 100_000)),
    ("a manifest of numbers", _manifest('{"model.safetensors": 1, "state.json": null}')),
    ("a manifest that names a file elsewhere", _traverse),
    ("a manifest without one of the files", _unlisted),
]  # fmt: skip


def damage(number: int, at: Context) -> str:
    mode = list(runs.MODES)[number % 2]
    base = runs.baseline(mode, at.shared)
    run = at.folder / "run"
    runs.begin_from(base, AT, run)
    *_, old, new = there = checkpoint.listing(run)  # the best one is kept too
    draw = random.Random(number)
    files = sorted(new.iterdir())
    if number < CUTS:
        path = files[number // 2 % len(files)]
        keep = path.stat().st_size * number // CUTS
        path.write_bytes(path.read_bytes()[:keep])
        what = f"{path.name} cut to {number} %"
    elif number < CUTS + FLIPS:
        what = flip(files[number // 2 % len(files)], draw)
    else:
        what, change = OTHERS[number - CUTS - FLIPS]
        change(new, old)
    both = number % 10 == 7 and number < CUTS + FLIPS
    if both:
        for older in there[:-1]:
            flip(older / "state.json", draw)
    both |= "swapped" in what and len(there) == 2  # where the newest is the best one too, the two are all there are
    words = runs.command(mode, run)
    if both:
        line = runs.one_line(runs.call(words, at.folder), 4)
        return f"{what}, and the older ones: {line[:80]}"
    return older_one_used(what, words, base, run, at, UNTIL)


def older_one_used(what: str, words: list[str], base: runs.Baseline, run: Path, at: Context, until: int) -> str:
    """Resume a run whose newest checkpoint is damaged: that is said, and the bytes are an uninterrupted run's."""
    code = runs.train(words, run, until=until)
    said = runs.tail(at.folder / "said.txt", 5000)
    assert code == 0, f"{what}: exit {code}: {said}"
    assert "damaged, trying an older one" in said, f"{what}: nothing was said: {said}"
    runs.same(run, base.snapshot(until))
    return f"{what}: said, older one used"


KIND = Kind(
    "damage",
    CUTS + FLIPS + len(OTHERS),
    "damage to the newest checkpoint is found and said, the older one gives the same bytes; exit 4 if all are damaged",
    "the runs of kill in fp32, stopped at step 40 and resumed to step 45",
    damage,
)
