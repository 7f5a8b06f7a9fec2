"""Faults in a run of `fasttht pretrain`: kills, signals and damaged checkpoints."""

from __future__ import annotations

import random

from fasttht import checkpoint
from tests.faults import damage, kill, runs, signals
from tests.faults.case import Context, Kind

KILLS, SIGNALS, DAMAGES = 20, 10, 10
AT, UNTIL = 20, 25


def pretrain(number: int, at: Context) -> str:
    if number < KILLS:
        return _killed(number, at)
    if number < KILLS + SIGNALS:  # half of them at a time, not at a moment
        return signals.signalled(runs.PRETRAIN, number, at, timed=number >= KILLS + SIGNALS // 2)
    return _damaged(number - KILLS - SIGNALS, at)


def _killed(number: int, at: Context) -> str:
    """Kill at moments spread over all labels and steps, a quarter of them twice."""
    base = runs.baseline(runs.PRETRAIN, at.shared)
    labels = sorted({label for _, label in base.moments})
    label = labels[number * len(labels) // KILLS]
    wanted = number * 7 % base.steps + 1
    moment = min((found for found in base.moments if found[1] == label), key=lambda m: abs(m[0] - wanted))
    words = runs.command(runs.PRETRAIN, at.folder / "run")
    return kill.killed(moment, 1 + (number % 4 == 3), words, base, random.Random(number), at)


def _damaged(number: int, at: Context) -> str:
    base = runs.baseline(runs.PRETRAIN, at.shared)
    run, draw = at.folder / "run", random.Random(number)
    runs.begin_from(base, AT, run)
    new = checkpoint.listing(run)[-1]
    path = sorted(new.iterdir())[number // 2 % len(list(new.iterdir()))]
    if number % 2:
        what = damage.flip(path, draw)
    else:
        keep = draw.randrange(path.stat().st_size)
        path.write_bytes(path.read_bytes()[:keep])
        what = f"{path.name} cut to {keep} bytes"
    return damage.older_one_used(what, runs.command(runs.PRETRAIN, run), base, run, at, UNTIL)


KIND = Kind(
    "pretrain",
    KILLS + SIGNALS + DAMAGES,
    "`fasttht pretrain` killed, signalled or with a damaged checkpoint: as kill, signal and damage, its queue among it",
    "30 steps of MoCo v2 with a width-4 ResNet-18 on the digits, in two shuffled groups",
    pretrain,
)
