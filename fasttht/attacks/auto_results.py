"""Results of long attacks, one file each: written whole or not at all, under a key of all they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Done:
    """One attack on one chunk: which images are right (N,) bool, and what the library warned of."""

    hits: Tensor
    warnings: tuple[str, ...]


def digest(model: nn.Module) -> str:
    """Return a digest of a network: what it is made of, and every parameter and buffer."""
    found = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Results:
    """The results kept in a folder. common: a digest of all that they depend on, but for the chunk and the attack.

    A kill leaves either a whole file or one of another name. What is read must have its own checksum and the key asked
    for; `say` is told of one that has not, and it counts as none.
    """

    folder: Path
    common: str
    say: Callable[[str], None]

    def write(self, chunk: int, attack: str, rows: Tensor, done: Done) -> None:
        """Keep one result, synced before it gets its name."""
        key, path = self._place(chunk, attack, rows)
        fields: dict[str, Any] = {
            "key": key,
            "hits": "".join("01"[int(hit)] for hit in done.hits),
            "warnings": list(done.warnings),
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with partial.open("w") as out:
            out.write(json.dumps(fields | {"sha256": _sum(fields)}) + "\n")
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)

    def read(self, chunk: int, attack: str, rows: Tensor) -> Done | None:
        """Return one result, or None if there is no whole one."""
        key, path = self._place(chunk, attack, rows)
        try:
            fields = json.loads(path.read_text())
            whole = fields.pop("sha256") == _sum(fields) and fields["key"] == key and len(fields["hits"]) == len(rows)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            self.say(f"{path}: expected a whole result, got another; {attack} is run again on its {len(rows)} images")
            return None
        return Done(torch.tensor([hit == "1" for hit in fields["hits"]]), tuple(fields["warnings"]))

    def _place(self, chunk: int, attack: str, rows: Tensor) -> tuple[str, Path]:
        """Return the key of a result and the file it is kept in."""
        key = hashlib.sha256(f"{self.common} {chunk} {attack} {rows.tolist()}".encode()).hexdigest()
        return key, self.folder / f"{chunk:06d}-{attack}-{key[:12]}.json"


def _sum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
