"""Several methods over several seeds: train each, evaluate all alike, and say which differences the images separate.

Each run is the ordinary command in a process of its own, in a folder of its own; what is finished is not done again,
so a stopped comparison goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from fasttht.errors import CheckpointError, UsageError

# What a method's name stands for, as options of `fasttht train`; `-free` behind any of them adds the replay.
FREE = "-free"
REPLAY = ("--replay", "4")

Hits = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Plan:
    """What to compare; the first method is the one that others are tested against. train: options for all runs.

    metrics of every run: clean, and untargeted PGD of each length in eval_steps, once and as the worst of `restarts`.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    eval_steps: tuple[int, ...]
    restarts: int
    train: tuple[str, ...] = ()
    jobs: int = 1


@dataclass(frozen=True)
class Paired:
    """One method beside the baseline under one attack, image by image, all seeds together.

    gain is in points; wins and losses are the images that only the method, only the baseline, had right; p is the
    exact two-sided McNemar test's, times the number of tests made (Holm), at most 1. It takes one image under two seeds
    for two images and knows nothing of how much runs of one method differ, so `agree` says whether the gain has the
    same sign under every seed: without that nothing is claimed.
    """

    method: str
    baseline: str
    metric: str
    gain: float
    wins: int
    losses: int
    p: float
    agree: bool


def command(plan: Plan, method: str, seed: int) -> list[str]:
    """Return the training command of one run."""
    objective, free = method.removesuffix(FREE), method.endswith(FREE)
    return [
        sys.executable, "-m", "fasttht", "train", "--objective", objective, *(REPLAY if free else ()),
        "--seed", str(seed), "--output", str(_folder(plan, method, seed)), *plan.train,
    ]  # fmt: skip


def compare(plan: Plan, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train and evaluate what is missing; return the report, ready for JSON.

    Raises: UsageError for a run that cannot be trained, with what it said last; CheckpointError for one without a
    checkpoint.
    """
    runs = list(product(plan.seeds, plan.methods))
    plan.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(plan.jobs) as pool:
        under_way = [pool.submit(_run, plan, method, seed, say) for seed, method in runs]
        try:
            for found in under_way:
                found.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has begun ends, what has not does not begin
            raise
    hits = {(method, seed): load_hits(_archive(plan, method, seed)) for seed, method in runs}
    return report(plan, hits)


def report(plan: Plan, hits: dict[tuple[str, int], dict[str, Hits]]) -> dict[str, Any]:
    """Return means, deviations and paired tests of (method, seed) -> metric -> right (N,) bool."""
    metrics = list(next(iter(hits.values())))
    rows = []
    for method in plan.methods:
        scores = {metric: [100 * float(hits[method, seed][metric].mean()) for seed in plan.seeds] for metric in metrics}
        rows.append({"method": method, "scores": scores})
    baseline, *others = plan.methods
    pairs = [
        _paired(
            method, baseline, metric,
            [hits[method, seed][metric] for seed in plan.seeds], [hits[baseline, seed][metric] for seed in plan.seeds],
        )
        for method in others for metric in metrics
    ]  # fmt: skip
    return {
        "compare": {"methods": plan.methods, "seeds": plan.seeds, "train": plan.train, "restarts": plan.restarts},
        "images": len(next(iter(hits.values()))[metrics[0]]),
        "rows": rows,
        "paired": [asdict(pair) for pair in holm(pairs)],
    }


def _paired(method: str, baseline: str, metric: str, ours: list[Hits], theirs: list[Hits]) -> Paired:
    wins = [int((a & ~b).sum()) for a, b in zip(ours, theirs, strict=True)]
    losses = [int((b & ~a).sum()) for a, b in zip(ours, theirs, strict=True)]
    gain = 100 * (sum(wins) - sum(losses)) / sum(len(a) for a in ours)
    agree = len({(won > lost) - (won < lost) for won, lost in zip(wins, losses, strict=True)}) == 1
    return Paired(method, baseline, metric, gain, sum(wins), sum(losses), mcnemar(sum(wins), sum(losses)), agree)


def mcnemar(wins: int, losses: int) -> float:
    """Return McNemar's exact two-sided p: the images that only one of the two had right as tosses of a fair coin."""
    num, ways, tail = wins + losses, 1, 0
    for i in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (num - i) // (i + 1)  # num over i + 1
    return min(1.0, float(2 * tail / 2**num))


def holm(pairs: Sequence[Paired]) -> list[Paired]:
    """Return the tests with their p multiplied as Holm says, so that all of them together err in 5 % of comparisons."""
    ranked = sorted(range(len(pairs)), key=lambda i: pairs[i].p)
    found, highest = list(pairs), 0.0
    for rank, i in enumerate(ranked):
        highest = max(highest, min(1.0, pairs[i].p * (len(pairs) - rank)))
        found[i] = Paired(**(asdict(pairs[i]) | {"p": highest}))
    return found


def sentences(paired: Iterable[dict[str, Any]], level: float = 0.05) -> list[str]:
    """Return what may be claimed: one sentence for each pair that images and seeds separate, one for all others."""
    pairs = [Paired(**pair) for pair in paired]
    said = [
        f"{pair.method} is {'better' if pair.gain > 0 else 'worse'} than {pair.baseline} under {pair.metric}: "
        f"{pair.gain:+.2f} points, {pair.wins} images only it had right, {pair.losses} only {pair.baseline}, "
        f"p {pair.p:.2g}"
        for pair in pairs
        if pair.p < level and pair.agree
    ]
    rest = [
        f"{pair.method} under {pair.metric} ({pair.gain:+.2f})" for pair in pairs if pair.p >= level or not pair.agree
    ]
    return said + ([f"not separated from {pairs[0].baseline}: {', '.join(rest)}"] if rest else [])


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table: the method, then mean and standard deviation over the seeds, in percent."""
    return [
        row["method"],
        *(
            f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
            for values in row["scores"].values()
        ),
    ]


def load_hits(path: Path) -> dict[str, Hits]:
    """Read an archive that `fasttht eval --per-image` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _folder(plan: Plan, method: str, seed: int) -> Path:
    return plan.output / f"{method}-seed{seed}"


def _archive(plan: Plan, method: str, seed: int) -> Path:
    """The evaluation's file, named after its settings and the training's: with others it is another file.

    A run that was trained with other options is then refused by the training command.
    """
    steps = "-".join(str(steps) for steps in plan.eval_steps)
    options = hashlib.sha256(" ".join(plan.train).encode()).hexdigest()[:8]
    return _folder(plan, method, seed) / f"compare-pgd{steps}-r{plan.restarts}-{options}.npz"


def _run(plan: Plan, method: str, seed: int, say: Callable[[str], None]) -> None:
    archive = _archive(plan, method, seed)
    if archive.exists():
        say(f"{method}, seed {seed}: evaluated before")
        return
    say(f"{method}, seed {seed}: training")
    _call(command(plan, method, seed), method)
    say(f"{method}, seed {seed}: evaluating")
    partial = archive.with_suffix(".partial")
    steps = [str(steps) for steps in plan.eval_steps]
    _call(
        [
            sys.executable, "-m", "fasttht", "eval", str(_folder(plan, method, seed)), "--goal", "untargeted",
            "--eval-steps", *steps, "--eval-restarts", str(plan.restarts), "--per-image", str(partial),
        ],
        method,
    )  # fmt: skip
    partial.replace(archive)


def _call(words: list[str], method: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        error = CheckpointError if done.returncode == CheckpointError.exit_code else UsageError
        raise error(f"{method}: expected `{' '.join(words[1:])}` to end with 0, got {done.returncode}: {last}")


def write_report(found: dict[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(found, indent=1) + "\n")
