"""Which checkpoint a run continues from or is read at, and whether it can."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from fasttht import checkpoint, log
from fasttht.config_file import AnyConfig
from fasttht.errors import CheckpointError, UsageError
from fasttht.protocols import Feed, State
from fasttht.run_folder import METRICS, TIMING, RunFolder

# Raised with any change to what a checkpoint holds.
META_VERSION = 4


def find_checkpoint(folder: RunFolder, config: AnyConfig, there: list[Path]) -> str | None:
    """Return the name of the checkpoint to continue from as --resume says, None for a run that starts.

    there: the folder's checkpoints. Damaged ones are passed over, with a line for each.

    Raises: CheckpointError for another run's folder, or where no checkpoint is whole; UsageError for a folder that is
    not a run's, or a --resume that is none of its checkpoints.
    """
    resume = config.run.resume
    if not folder.exists():
        folder.check_free()
        return None if resume in ("auto", "never") else _named(Path(resume), folder, []).name
    folder.check_same(config)
    if resume not in ("auto", "never") and not goes_on(folder, resume):
        return _named(Path(resume), folder, there).name
    found = checkpoint.newest(folder.path, lambda error: log.say(f"damaged, trying an older one: {error}"))
    if found is None:
        log.say(f"{folder.path}: the run there has no checkpoint yet; it starts again")
        return None
    if resume == "never" and not goes_on(folder, resume):
        raise CheckpointError(
            f"{folder.path}: expected a folder without a run (--resume never), got one with {found.name}; "
            "give another --output"
        )
    return found.name


def goes_on(folder: RunFolder, resume: str) -> bool:
    """Whether the newest checkpoint is the one to continue from.

    By --resume auto; and by another one too, once a command with it has begun: a batch system that starts the same
    command again means the run as it is now. That ends with the run, or with a command that has another --resume.
    """
    begun = folder.begun_with()
    if resume in ("auto", "never"):
        return resume in ("auto", begun)
    return Path(resume).resolve() == (folder.path / checkpoint.FOLDER / begun).resolve()


def take_over(folder: RunFolder, newest: Path | None, seen: list[Path], rows: dict[str, int], resume: str) -> None:
    """Cut the rows back to the checkpoint's, now that the folder is locked and nobody else writes them.

    newest: the checkpoint that is continued from; seen: all that there were before the lock; rows: what `newest` says
    of the rows at its time. Raises: UsageError if another process has been here since; CheckpointError.
    """
    if checkpoint.listing(folder.path) != seen:
        raise UsageError(
            f"--output: expected {folder.path} as it was a moment ago, got checkpoints of another process; "
            "run the same command again"
        )
    if newest is None:
        return
    asked = not goes_on(folder, resume)
    # The final row comes after the last checkpoint: a finished run keeps it, unless an older one was asked for.
    if asked or folder.final() is None:
        folder.check_rows(rows)
        if asked:
            checkpoint.forget_later(newest)
        folder.rewind(rows)
    folder.note_resume(resume)


def digest_of(state: State, loader: Feed[Any]) -> str:
    """Return a digest of what all ranks have alike: the position, weights, momentum, bank, and a frozen g."""
    digest = hashlib.sha256()
    for group in state.tensors().values():
        for name, tensor in group.items():
            if name not in ("delta", "meter"):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    position = [state.step, loader.epoch, loader.step]
    return f"{position} {state.depends_on()} {digest.hexdigest()[:16]}"


def _named(wanted: Path, folder: RunFolder, there: list[Path]) -> Path:
    """Return the checkpoint that --resume names; it must be this run's, and what came after it is then dropped."""
    if wanted.resolve() not in [each.resolve() for each in there]:
        raise UsageError(
            f"--resume: expected auto, never or a checkpoint of {folder.path}, got {wanted}; there are "
            + (", ".join(each.name for each in there) or "none")
        )
    checkpoint.verify(wanted)
    return wanted


def choose(folder: RunFolder, which: str) -> Path:
    """Return the checkpoint of a run that `last`, `best` (`RunFolder.best_step`) or its name says.

    Raises: CheckpointError if there is none such, or if it is damaged; another does not do in its place.
    """
    there = checkpoint.listing(folder.path)
    if not there:
        raise CheckpointError(f"{folder.path}: expected a run with a checkpoint, got none yet")
    found = there[-1]
    if which == "best":
        step = folder.best_step([checkpoint.step_of(path) for path in there])
        if step is None:
            raise CheckpointError(
                f"--checkpoint best: expected {folder.path} with a checkpoint that was evaluated, got none; an "
                "evaluation comes at the end, and with --eval-interval before it"
            )
        found = [path for path in there if checkpoint.step_of(path) == step][-1]
    elif which != "last":
        named = [path for path in there if path.name == which]
        if not named:
            names = ", ".join(path.name for path in there)
            raise CheckpointError(f"--checkpoint: expected last, best or one of {names}, got {which}")
        found = named[0]
    checkpoint.verify(found)
    return found


def read_meta(folder: Path, depends_on: dict[str, str], length: tuple[int, int]) -> dict[str, Any]:
    """Return a checkpoint's state.json.

    depends_on: digests of what the run reads and no checkpoint holds. length: the run's passes, and the steps of each.

    Raises: CheckpointError for a checkpoint of another version, of a run with other digests, or whose state.json is
    not one that such a run writes.
    """
    meta = checkpoint.read_meta(folder)
    if meta.get("version") != META_VERSION:
        raise CheckpointError(
            f"{folder}: expected a checkpoint of version {META_VERSION}, got {meta.get('version')}; "
            "continue it with the release that wrote it, or give another --output"
        )
    wrong = next((key for key, right in _checks(meta, *length).items() if not right), None)
    if wrong is not None:
        got = ascii(meta.get(wrong))
        raise CheckpointError(
            f"{folder / 'state.json'}: expected {wrong} as a run of {length[0]} passes of {length[1]} steps "
            f"writes it, got {got if len(got) <= 80 else got[:77] + '...'}; give another --output, or an older "
            "checkpoint as --resume"
        )
    for what, digest in depends_on.items():
        if meta["depends_on"].get(what) != digest:
            raise CheckpointError(
                f"{folder}: expected the {what} that the run started with, got other weights; "
                "restore its file, or give another --output"
            )
    return meta


def _checks(meta: dict[str, Any], num_passes: int, steps_per_pass: int) -> dict[str, bool]:
    """Return what of a state.json is as it should be, by its key."""
    step, rows, loader, guard = (meta.get(key) for key in ("step", "rows", "loader", "guard"))
    inside = False
    if isinstance(loader, dict) and _counts(loader.get("epoch"), loader.get("step")):
        epoch, done, bad = loader["epoch"], loader["step"], loader.get("bad_rows")
        inside = epoch <= num_passes and done <= steps_per_pass and epoch * steps_per_pass + done == step
        inside = inside and isinstance(bad, list) and _counts(*bad)
    return {
        "step": _counts(step),
        "loader": inside,
        # Nothing but our own two files: they are cut to these sizes.
        "rows": isinstance(rows, dict) and rows.keys() == {METRICS, TIMING} and _counts(*rows.values()),
        "evaluation_due": isinstance(meta.get("evaluation_due"), bool),
        "guard": isinstance(guard, list)
        and all(isinstance(row, list) and len(row) == 2 and _counts(*row) for row in guard),
        "depends_on": isinstance(meta.get("depends_on"), dict),
    }


def _counts(*values: object) -> bool:
    """Whether all are whole numbers of at least 0."""
    return all(type(value) is int and value >= 0 for value in values)
