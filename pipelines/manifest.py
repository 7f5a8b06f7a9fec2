"""The side file `<name>.beton.json`: what a .beton cannot say about itself (names, sources, settings).

The reader of a .beton takes everything up to the end of the file as its allocation table, so nothing can be
appended there. A manifest belongs to one .beton and carries that file's fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fasttht.pipelines import DataError

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Facts about one .beton.

    class_names are in label order, empty if unknown; settings say how the file was written; sources has the
    original relative path of every row, or is empty.
    """

    num_samples: int
    fingerprint: str
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    sources: tuple[str, ...]


def manifest_path(beton: Path) -> Path:
    """Return where the manifest of `beton` lies: beside it, with .json after its whole name."""
    return beton.with_name(beton.name + ".json")


def write_manifest(beton: Path, manifest: Manifest) -> None:
    """Write the manifest of `beton`, whole or not at all. The same manifest gives the same bytes."""
    # ASCII escapes carry file names that are not valid UTF-8 (Python's surrogates) there and back.
    text = json.dumps({"version": VERSION, **asdict(manifest)}, indent=1, ensure_ascii=True)
    with replacing(manifest_path(beton)) as file:
        file.write(text.encode("ascii") + b"\n")


def read_manifest(beton: Path, *, fingerprint: str | None = None) -> Manifest | None:
    """Read the manifest of `beton`; None if there is none.

    With `fingerprint` (the .beton's own), a manifest that was written for another file is refused.

    Raises: DataError if it cannot be read, is no manifest, or belongs to another file.
    """
    path = manifest_path(beton)
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: expected a readable manifest, got {error.strerror}; check the file") from None
    except ValueError as error:
        raise _refusal(path, "JSON", str(error)) from None
    if not isinstance(stored, dict) or stored.get("version") != VERSION:
        version = stored.get("version") if isinstance(stored, dict) else type(stored).__name__
        raise _refusal(path, f"manifest version {VERSION}", repr(version))
    manifest = Manifest(
        num_samples=_field(path, stored, "num_samples", int),
        fingerprint=_field(path, stored, "fingerprint", str),
        class_names=_names(path, stored, "class_names"),
        settings=_field(path, stored, "settings", dict),
        sources=_names(path, stored, "sources"),
    )
    if len(manifest.sources) not in (0, manifest.num_samples):
        raise _refusal(path, f"{manifest.num_samples} sources", str(len(manifest.sources)))
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise _refusal(path, f"the fingerprint {fingerprint} of {beton.name}", manifest.fingerprint)
    return manifest


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; `path` appears, or is replaced, once the block has ended and the disk has it.

    Until then the bytes lie in `<path>.partial`, which is removed if the block raises.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _field(path: Path, stored: dict[str, Any], name: str, kind: type) -> Any:
    value = stored.get(name)
    if not isinstance(value, kind):
        raise _refusal(path, f"{name} to be {kind.__name__}", type(value).__name__)
    return value


def _names(path: Path, stored: dict[str, Any], name: str) -> tuple[str, ...]:
    values = _field(path, stored, name, list)
    if not all(isinstance(value, str) for value in values):
        raise _refusal(path, f"{name} to be strings", "something else among them")
    return tuple(values)


def _refusal(path: Path, expected: str, got: str) -> DataError:
    return DataError(
        f"{path}: expected {expected}, got {got}; write the data again, or remove this file and go without"
    )
