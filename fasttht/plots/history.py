"""What a run wrote while it trained: its rows, and curves through them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fasttht.errors import CheckpointError, UsageError
from fasttht.run_folder import CONFIG, METRICS, RunFolder

Row = dict[str, Any]

# What is drawn unless others are asked for, each where a run has it; a run has one of the two accuracies.
DEFAULT = ("loss", "adv_top1", "clean_top1", "lr", "zero_grad_pct", "grad_norm")

# Not figures of the training: where a row stands.
_PLACES = ("kind", "epoch", "step")


def rows_of(path: Path) -> list[Row]:
    """Return a run's rows.

    Raises: CheckpointError if the folder is no run, has no rows yet, or has a broken one.
    """
    folder = RunFolder(path)
    if not folder.exists():
        raise CheckpointError(f"{path}: expected a run folder with {CONFIG}, got none")
    rows = folder.rows()
    if not rows:
        raise CheckpointError(f"{path}: expected a run with rows in {METRICS}, got none yet; let it train on")
    return rows


def metrics_of(runs: Iterable[Sequence[Row]]) -> list[str]:
    """Return the names of the figures that training rows of any of the runs have, in their order."""
    names: dict[str, None] = {}
    for rows in runs:
        for row in rows:
            if row["kind"] == "train":
                names |= dict.fromkeys(
                    name for name, value in row.items() if name not in _PLACES and isinstance(value, int | float)
                )
    return list(names)


def chosen_metrics(runs: Sequence[Sequence[Row]], asked: Sequence[str] | None) -> list[str]:
    """Return the figures to draw: those asked for, or the usual ones that are there.

    Raises: UsageError for one that no run has, with those that there are.
    """
    there = metrics_of(runs)
    if asked is None:
        return [name for name in DEFAULT if name in there]
    if not asked or len(set(asked)) < len(asked):
        raise UsageError(f"--metrics: expected one or more, each once, got {' '.join(asked) or 'none'}")
    for name in asked:
        if name not in there:
            raise UsageError(f"--metrics: expected figures of these runs, got {name}; there are {', '.join(there)}")
    return list(asked)


def curve(rows: Sequence[Row], metric: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a figure of the training rows; what is not finite is a gap (NaN)."""
    found = [(row["step"], float(row[metric])) for row in rows if row["kind"] == "train" and metric in row]
    return [step for step, _ in found], [value if math.isfinite(value) else math.nan for _, value in found]


def evaluations(rows: Sequence[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and percent of each score of the evaluations, by its name without `_top1`."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row["kind"] in ("eval", "final"):
            for name, value in row.items():
                if name.endswith("_top1"):
                    steps, values = found.setdefault(name.removesuffix("_top1"), ([], []))
                    if steps[-1:] == [row["step"]]:  # the last pass's evaluation and the final one
                        values[-1] = value
                    else:
                        steps.append(row["step"])
                        values.append(value)
    return found
