"""Where pictures go and what they are called; opening the runs that are drawn. No torch when imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttht.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fasttht.subject import Subject

FOLDER = "plots"


def check_runs(runs: Sequence[Path], most: int = 12) -> None:
    """Raises: UsageError for no run, one given twice, or more than a picture can hold."""
    if not runs:
        raise UsageError("plot: expected one or more run folders, got none")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError(f"plot: expected each run once, got {' '.join(map(str, runs))}")
    if len(runs) > most:
        raise UsageError(f"plot: expected at most {most} runs in this picture, got {len(runs)}")


def check_list(flag: str, values: Sequence[Any]) -> None:
    """Raises: UsageError for an empty list, or a value given twice."""
    if not values or len(set(values)) < len(values):
        raise UsageError(f"{flag}: expected one or more, each once, got {' '.join(map(str, values)) or 'none'}")


def check_least(flag: str, value: int, least: int = 1) -> None:
    """Raises: UsageError for a number below the least."""
    if value < least:
        raise UsageError(f"{flag}: expected at least {least}, got {value}")


def folder_of(run: Path, output: Path | None) -> Path:
    """Return the folder that a run's pictures and data go to."""
    return run / FOLDER if output is None else output


def file_name(kind: str, runs: Sequence[Path]) -> str:
    """Return a picture's name without its ending; one of several runs does not replace that of one."""
    return kind if len(runs) == 1 else f"{kind}-{len(runs)}-runs"


def open_subject(run: Path, device: str) -> Subject:
    """Open a run of `fasttht train`.

    Raises: CheckpointError if it is none or has no checkpoint; DataError if its data are gone.
    """
    from fasttht.run_folder import RunFolder
    from fasttht.subject import open_run

    return open_run(run, RunFolder(run).config(), device=device)


def write_picture(draw: Callable[[], tuple[Figure, str]], folder: Path, name: str, data: Any = None) -> Path:
    """Draw, write NAME.png and, if there are data, NAME.json beside it; say where, and return the picture's path."""
    from fasttht import log
    from fasttht.plots.style import png, styled
    from fasttht.run_folder import write_whole

    with styled():
        fig, words = draw()
        content = png(fig, words)
    folder.mkdir(parents=True, exist_ok=True)
    if data is not None:
        write_whole(folder / f"{name}.json", json.dumps(data) + "\n", shared=True)
    write_whole(folder / f"{name}.png", content, shared=True)
    log.say(f"picture: {folder / f'{name}.png'}")
    return folder / f"{name}.png"
