"""Evaluations beyond PGD, by the name that `--suites` knows them by. Each is imported when it is asked for.

A suite takes the rows and returns which of them were right, (N,) bool in their order, by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fasttht.alarms import Alarm
from fasttht.attacks.threat import Threat
from fasttht.distributed import World
from fasttht.errors import UsageError
from fasttht.knn_search import check_k, faiss_module
from fasttht.meeting import Meeting
from fasttht.signals import Stop
from fasttht.subject import Subject

if TYPE_CHECKING:
    from fasttht.knn import Defence

SuiteName = Literal["apgd", "autoattack", "knn"]

AUTO: tuple[SuiteName, ...] = ("apgd", "autoattack")
SUITES: tuple[SuiteName, ...] = (*AUTO, "knn")

Say = Callable[[str], None]

_LAG = 8


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises: UsageError for a name that is no known suite's, with the nearest."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "give one of these"
            raise UsageError(f"--suites: expected some of {', '.join(known)}, got {name}; {hint}")


def check_suites(names: Sequence[str], subject: Subject, knn: dict[str, Any]) -> None:
    """Refuse before anything is computed what cannot be done after hours of it.

    Raises: UsageError for a name that is no suite, with the nearest; for a missing package; for more neighbours than
    training images, or features that the network does not have, or a search without its package.
    """
    check_names(names, SUITES)
    auto = _auto(names)
    if auto:
        from fasttht.attacks.auto import check

        check(subject, auto)
    if "knn" not in names:
        return
    check_k(knn["k"], len(subject.splits.train))
    if knn["features"] == "head" and subject.model.feature_head is None:
        raise UsageError(
            "--knn-features: expected trunk for a network without a feature head, got head; only objectives with a "
            "contrastive loss train one"
        )
    if knn["search"] == "faiss":
        faiss_module()


def open_defence(
    subject: Subject,
    threats: Sequence[Threat],
    knn: dict[str, Any],
    work_dir: Path | None,
    say: Say,
    world: World,
    stop: Stop,
) -> tuple[Defence, dict[str, Any], str]:
    """Return the nearest neighbours, what a row says of them, and that in words.

    threats: what they are attacked with; knn: their options. work_dir: where their bank is kept, in `knn`; by default
    see `knn_bank.open_index`, which the ranks of the world call together. stop: as `run_suites` has it.

    Raises: Stopped.
    """
    from fasttht.knn import Defence
    from fasttht.knn_bank import FOLDER, bank_source

    source, title = bank_source(subject, knn["features"])
    if not threats:
        say("--suites knn: expected --eval-steps above 0 to attack with, got none; clean images only")
    folder = None if work_dir is None else work_dir / FOLDER
    defence = Defence(subject, threats, **knn, folder=folder, say=say, world=world, stop=stop)
    words = f"knn: k {knn['k']}, {knn['weighting']} weights, {knn['features']} features, bank by {title}"
    return defence, {f"knn_{name}": value for name, value in knn.items()} | {"knn_bank": source}, words


def run_suites(
    names: Sequence[str],
    subject: Subject,
    rows: Tensor,
    world: World,
    *,
    folder: Path | None,
    defence: Defence | None,
    say: Say,
    alarms: list[Alarm],
    stop: Stop,
) -> dict[str, Tensor]:
    """Return what each suite finds for rows (N,) of the held-out images.

    folder: where AutoAttack keeps what it has, to go on after a stop. alarms: gets what its library warns of. defence:
    the nearest neighbours, if they are asked for. Every rank of the world computes a part and gets all. stop: what a
    signal is noted in, at which all ranks leave. They meet after every batch, and are up to _LAG chunks apart: these
    take as long as they have images that are still right.

    Raises: Stopped.
    """
    found: dict[str, Tensor] = {}
    auto = _auto(names)
    if auto and folder is not None:
        from fasttht.attacks.auto import evaluate as attack

        warned: list[Alarm] = []
        hits = attack(
            subject, rows, auto, folder, say, shard=(world.rank, world.size), alarms=warned,
            together=lambda chunks: Meeting(world, stop, max(world.everybodys("chunks", chunks)), lag=_LAG),
        )  # fmt: skip
        found |= {name: torch.tensor(world.everybodys(name, each.tolist())).any(dim=0) for name, each in hits.items()}
        said = world.everybodys("alarms", [(alarm.name, alarm.text) for alarm in warned])
        alarms += [Alarm(name, text) for name, text in dict(pair for pairs in said for pair in pairs).items()]
    if defence is not None:
        batches = -(-max(world.counts(len(rows))) // subject.config.evaluation.eval_batch_size)
        with Meeting(world, stop, batches) as meeting:
            hits = defence.evaluate(rows[world.rows(len(rows))], on_batch=lambda images: meeting.meet())
        found |= {
            name: torch.tensor(list(chain(*world.everybodys(name, each.tolist())))) for name, each in hits.items()
        }
    return found


def _auto(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in AUTO]
