"""`--compare old.json`: this run beside an older report of the same benchmark, settings and machine, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fasttht.bench.env import environment
from fasttht.errors import UsageError

# What must be equal for figures to be comparable. Versions may differ: that is what one compares for.
_MACHINE = ("cpu", "cores", "gpu", "threads")
# Settings that say how long was measured and not what.
_FREE_SETTINGS = ("windows", "window_s")


def open_report(path: Path | None, bench: str, settings: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return the report to compare a run with these settings on this machine with, None for no file.

    Raises: UsageError if there is none in the file that can be compared, before anything is measured.
    """
    old = read_report(path, bench)
    if old is None:
        return None
    # The loaders' benchmark takes one thread for itself, and does not say so.
    threads = {"threads": torch.get_num_threads()} if "threads" in old["env"] else {}
    check_same(old, environment(device) | threads, settings)
    return old


def read_report(path: Path | None, bench: str) -> dict[str, Any] | None:
    """Return the newest report of this benchmark in a file of JSON lines, None for no file.

    Raises: UsageError if there is none in it.
    """
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--compare: expected a report that can be read, got {path}: {error}") from None
    found: dict[str, Any] | None = None
    others = set()
    for line in lines:
        try:
            report = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(report, dict) and report.get("bench") == bench:
            found = report
        elif isinstance(report, dict) and "bench" in report:
            others.add(f"bench {report['bench']}")
    if found is None:
        got = " and ".join(sorted(others)) or "no report at all"
        raise UsageError(f"--compare: expected a report of bench {bench} in {path}, got {got}; give its --output")
    return found


def check_same(old: dict[str, Any], env: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse an older report whose figures would say nothing about this run's. Raises: UsageError naming why."""
    same = json.loads(json.dumps({"env": env, "settings": settings}))
    for part, names in (("env", _MACHINE), ("settings", sorted({*old["settings"], *same["settings"]}))):
        for name in names:
            before, now = old[part].get(name), same[part].get(name)
            if name not in _FREE_SETTINGS and before != now:
                what = "the same machine" if part == "env" else "the same settings"
                raise UsageError(
                    f"--compare: expected a report of {what}, got {name} {before} where this run has {now}; "
                    "measure both the same way"
                )


def compare(old: dict[str, Any] | None, report: dict[str, Any]) -> None:
    """Add to `report` how much faster each row is than the row of that name in `old`: `compare`, ready for JSON.

    ratio: new speed / old speed. ratio_quartiles: the new run's lower quartile over the old one's upper, and the other
    way round: the widest that the two spreads allow, because the runs were not measured in turn.
    """
    if old is None:
        return
    images = [part["data"].get("fingerprint") for part in (old, report) if "data" in part]
    if len(set(images)) > 1:
        report["compare"] = {"not_run": "the older report is of other images"}
        return
    before, now = _all_speeds(old), _all_speeds(report)
    rows = []
    for key in [key for key in now if key in before]:
        (low, mid, high), (old_low, old_mid, old_high) = now[key], before[key]
        rows.append({"name": key, "ratio": mid / old_mid, "ratio_quartiles": [low / old_high, high / old_low]})
    report["compare"] = {
        "date": old["env"].get("date"),
        "changed": {
            name: [old["env"].get(name), value]
            for name, value in report["env"].items()
            if name not in ("date", "load_1min") and old["env"].get(name) != value
        },
        "rows": rows,
        "only_new": [key for key in now if key not in before],
        "only_old": [key for key in before if key not in now],
    }


def show(report: dict[str, Any]) -> None:
    """Print the comparison, if there is one."""
    from fasttht import log

    found = report.get("compare")
    if found is None:
        return
    if "not_run" in found:
        log.say(f"not compared: {found['not_run']}")
        return
    log.table(
        f"speed beside the report of {found['date']}",
        ("row", "new / old", "quartiles"),
        (
            (row["name"], f"{row['ratio']:.3f}", "{:.3f} to {:.3f}".format(*row["ratio_quartiles"]))
            for row in found["rows"]
        ),
    )
    for name, (before, now) in found["changed"].items():
        log.say(f"{name}: {before} then, {now} now")
    for what in ("only_new", "only_old"):
        if found[what]:
            log.say(f"{what.replace('_', ' in the ')} report: {', '.join(found[what])}")


def _all_speeds(report: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    return {_key(row): speeds for row in report["rows"] if (speeds := _speeds(row)) is not None}


def _key(row: dict[str, Any]) -> str:
    """Name a row: by its workers or its implementation too, where it has them."""
    parts = [row["name"], row.get("implementation"), f"{row['workers']} workers" if "workers" in row else None]
    return ", ".join(part for part in parts if part)


def _speeds(row: dict[str, Any]) -> tuple[float, float, float] | None:
    """Return lower quartile, median and upper quartile of a row's speed, in a unit of its own; None if it did not run.

    Rows have milliseconds or microseconds of a call with quartiles_ms or quartiles_us, or img/s with quartiles.
    """
    for name, spread in (("ms", "quartiles_ms"), ("us", "quartiles_us")):
        if name in row and spread in row:
            low, high = row[spread]
            return 1 / high, 1 / row[name], 1 / low
    if "img_per_s" in row and "quartiles" in row:
        low, high = row["quartiles"]
        return low, row["img_per_s"], high
    return None
