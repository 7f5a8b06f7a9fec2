"""APGD and AutoAttack (Croce & Hein 2020) through pyautoattack: per-image results, resumable, the same for any split.

The images are attacked in chunks of consecutive positions, each with random numbers keyed by (seed, chunk, attack), so
neither the evaluation's batch size nor the number of processes changes anything. The size of the chunks does: the
library draws one start for a whole chunk, so another size is another draw, and the chunk is a part of the result.

Every finished (chunk, attack) is a file of its own, renamed into place, under a key of everything it depends on. What
a kill leaves half written has no such name; a file whose checksum or key is another's counts as none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttht import kernels, log, signals
from fasttht.alarm_rows import Alarm
from fasttht.attacks.auto_results import Done, Results, digest
from fasttht.attacks.auto_warnings import as_alarms, library_warnings
from fasttht.attacks.pgd import evaluating
from fasttht.distributed import SOLO
from fasttht.errors import UsageError, is_shortage
from fasttht.meeting import Meeting
from fasttht.pipelines import ResourceError
from fasttht.signals import Stop
from fasttht.subject import Subject, images
from fasttht.suites import check_names

# What each suite runs, under pyautoattack's names, and what each result is called.
SUITES: dict[str, dict[str, str]] = {
    "apgd": {"apgd_ce": "apgd-ce", "apgd_dlr": "apgd-dlr"},
    "autoattack": {"aa_apgd_ce": "apgd-ce", "aa_apgd_t": "apgd-t", "aa_fab_t": "fab-t", "aa_square": "square"},
}
# An attack meets only the images that this one left right.
_AFTER = {"apgd-ce": None, "apgd-dlr": None, "apgd-t": "apgd-ce", "fab-t": "apgd-t", "square": "fab-t"}
_NORMS = {"linf": "Linf", "l2": "L2"}
_SUFFIXES = {"linf": "", "l2": "_l2"}
# DLR divides by a difference with the third largest logit, its targeted form also with the fourth.
_MIN_CLASSES = {"apgd": 3, "autoattack": 4}
_TARGETS = 9
# Square in l2 cuts an image into five windows a side.
_MIN_SIDE = 5

# Images attacked at once. At 224 pixels a ResNet-152 keeps some 0.2 GB an image for its input gradient.
CHUNK = 64
_FORMAT = 1


@dataclass(frozen=True)
class Budget:
    """Iterations of APGD and FAB, queries of Square. Any but the default is not AutoAttack's standard version."""

    n_iter: int = 100
    n_queries: int = 5000


STANDARD = Budget()


def check(subject: Subject, names: Sequence[str]) -> None:
    """Refuse what cannot be evaluated, before anything is computed.

    Raises: UsageError for a suite that is none, a missing library, a norm that the library has not, or data of too few
    classes for the DLR loss.
    """
    check_names(names, tuple(SUITES))
    _library()
    attack, classes = subject.config.attack, subject.splits.num_classes
    if attack.norm not in _NORMS:
        raise UsageError(
            f"--norm: expected {' or '.join(_NORMS)} for {' and '.join(names)}, got {attack.norm}; "
            "pyautoattack has one radius for all images"
        )
    for name in names:
        if classes < _MIN_CLASSES[name]:
            raise UsageError(
                f"--suites: expected data of at least {_MIN_CLASSES[name]} classes for {name}, whose DLR loss compares "
                f"as many logits, got {classes}; take PGD with the margin loss instead"
            )
    side = subject.config.data.img_size
    if attack.norm == "l2" and "autoattack" in names and side < _MIN_SIDE:
        raise UsageError(f"--suites: expected images of at least {_MIN_SIDE} pixels for Square in l2, got {side}")


def evaluate(
    subject: Subject,
    rows: Tensor,
    names: Sequence[str],
    folder: Path,
    say: Callable[[str], None] = log.say,
    *,
    chunk: int = CHUNK,
    budget: Budget = STANDARD,
    shard: tuple[int, int] = (0, 1),
    alarms: list[Alarm] | None = None,
    together: Callable[[int], Meeting] = lambda chunks: Meeting(SOLO, Stop(), chunks),
) -> dict[str, Tensor]:
    """Attack held-out images with suites of attacks; return which stay right, (N,) bool by position in `rows`.

    rows: (N,) int64 rows of the validation split. names: `apgd` gives `apgd_ce`, `apgd_dlr` (each alone, 100
    iterations) and `apgd`, right under both; `autoattack` is the standard version: `aa_apgd_ce`, `aa_apgd_t`,
    `aa_fab_t`, `aa_square`, each also right under those before it, and `autoattack`, the last of them. In l2 the names
    end in `_l2`. Norm, radius and seed are the configuration's. Fewer than ten classes: as many targets as there are
    other classes. float32, TF32 off, deterministic cuDNN; the model's mode, its gradients and the global random state
    are left as they were.

    folder: where finished chunks are kept; the same call continues there. shard: (rank, number of processes); of more
    than one, each attacks its own chunks, all others' positions are False, and the union over ranks is the result.
    alarms: gets what the library warned of. together: opens the context in which processes meet after every chunk, for
    the number of chunks that this one has left.

    Raises: Stopped, with the finished chunks kept; UsageError as `check`; ResourceError if a chunk does not fit into
    the device's memory; DataError for an image that cannot be read.
    """
    check(subject, names)
    attacks = list(dict.fromkeys(attack for name in names for attack in SUITES[name].values()))
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder, _common(subject, chunk, budget), say)
    parts = [rows[first : first + chunk].cpu() for first in range(0, len(rows), chunk)]
    mine = list(range(len(parts)))[shard[0] :: shard[1]]
    kept = {(k, attack): results.read(k, attack, parts[k]) for k in mine for attack in attacks}
    done = {place: found for place, found in kept.items() if found is not None}
    todo = [k for k in mine if any((k, attack) not in done for attack in attacks)]
    if len(todo) < len(mine):
        say(f"{', '.join(names)}: {len(mine) - len(todo)} of {len(mine)} chunks were there")
    total = sum(len(parts[k]) for k in mine)
    left = fresh = sum(len(parts[k]) for k in todo)
    begun = time.monotonic()
    with (
        log.Screen(", ".join(names), total, "images", done=total - left) as screen,
        _exact(subject.model),
        together(len(todo)) as meeting,
    ):
        for k in todo:
            (batch,) = images(subject, "val", parts[k], chunk)
            # pyautoattack views gradients as rows, which channels-last images do not allow.
            x = kernels.u8_to_input(batch.x).float().contiguous()
            for attack in attacks:
                if (k, attack) not in done:
                    before = _AFTER[attack]
                    alive = None if before is None else done[k, before].hits
                    seed = _seed(subject.config.run.seed, k, attack)
                    done[k, attack] = _attack(subject, x, batch.y, attack, alive, seed, budget)
                    results.write(k, attack, parts[k], done[k, attack])
            left -= len(parts[k])
            screen.advance(total - left)
            seconds = (time.monotonic() - begun) * left / (fresh - left)
            say(_progress(names, attacks, done, screen, seconds))
            meeting.meet()
    if alarms is not None:
        alarms += as_alarms(done, len(mine))
    return _collect(subject, names, parts, done)


def _collect(
    subject: Subject, names: Sequence[str], parts: Sequence[Tensor], done: dict[tuple[int, str], Done]
) -> dict[str, Tensor]:
    """Return every result by name; a chunk of another process counts as wrong."""

    def whole(attack: str) -> Tensor:
        found = [
            done[k, attack].hits if (k, attack) in done else torch.zeros(len(part), dtype=torch.bool)
            for k, part in enumerate(parts)
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)

    hits: dict[str, Tensor] = {}
    for name in dict.fromkeys(names):
        suite = {result: whole(attack) for result, attack in SUITES[name].items()}
        hits |= suite | {name: torch.stack(list(suite.values())).all(dim=0)}
    return {f"{name}{_SUFFIXES[subject.config.attack.norm]}": found for name, found in hits.items()}


def _attack(
    subject: Subject, x: Tensor, y: Tensor, attack: str, alive: Tensor | None, seed: int, budget: Budget
) -> Done:
    """Run one of the library's attacks on the images of a chunk that are still right; return which remain so."""
    hits = torch.ones(len(x), dtype=torch.bool) if alive is None else alive.clone()
    if not hits.any():
        return Done(hits, ())
    library = _library()
    eps, device = subject.config.attack.eps, subject.device
    assert eps is not None, "the config was not resolved"

    def logits(x: Tensor) -> Tensor:
        signals.check()
        return subject.model.logits(x)

    auto = library.AutoAttack(logits, norm=_NORMS[subject.config.attack.norm], eps=eps, seed=seed, device=device)
    auto.attacks_to_run = [attack]
    auto.apgd_targeted.n_target_classes = auto.fab.n_target_classes = min(_TARGETS, subject.splits.num_classes - 1)
    if budget != STANDARD:
        _spend(auto, budget)
    chosen = hits.to(x.device)
    with library_warnings(library) as warnings, _random_state():
        try:
            _, predicted = auto.run_standard_evaluation(x[chosen], y[chosen], batch_size=len(x))
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            raise ResourceError(
                f"{attack}: expected room for a chunk of {len(x)} images on {device}, got none; free memory there"
            ) from None
    hits[hits.clone()] = (predicted == y[chosen]).cpu()
    return Done(hits, tuple(warnings))


def _spend(auto: Any, budget: Budget) -> None:
    """Give the library's attacks another budget, with the schedule that APGD derives from it."""
    for apgd in (auto.apgd, auto.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = budget.n_iter
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(s * budget.n_iter), 1) for s in (0.22, 0.06, 0.03))
    auto.fab.n_iter, auto.square.n_queries = budget.n_iter, budget.n_queries


def _library() -> Any:
    try:
        library = import_module("pyautoattack")
    except ImportError:
        raise UsageError(
            '--suites: expected the package pyautoattack, got none; run: pip install "fasttht[eval]"'
        ) from None
    return library


def _seed(seed: int, chunk: int, attack: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {chunk} {attack}".encode()).digest()[:7])


def _common(subject: Subject, chunk: int, budget: Budget) -> str:
    """Return a digest of all that the results depend on, but for the chunk and the attack."""
    config = subject.config
    facts = {
        "format": _FORMAT,
        "pyautoattack": _library().__version__,
        "model": digest(subject.model),
        "data": subject.splits.val.fingerprint,
        "img_size": config.data.img_size,
        "crop_pct": config.data.crop_pct,
        "classes": subject.splits.num_classes,
        "norm": config.attack.norm,
        "eps": config.attack.eps,
        "seed": config.run.seed,
        "chunk": chunk,
        **asdict(budget),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _progress(
    names: Sequence[str], attacks: Sequence[str], done: dict[tuple[int, str], Done], screen: log.Screen, seconds: float
) -> str:
    """Return a line: how far, how robust over the whole chunks so far, how long still."""
    whole = [k for k in {k for k, _ in done} if all((k, attack) in done for attack in attacks)]
    count = sum(len(done[k, attacks[-1]].hits) for k in whole)
    right = {attack: sum(int(done[k, attack].hits.sum()) for k in whole) for attack in attacks}
    figures = "  ".join(f"{attack} {100 * right[attack] / count:.2f} %" for attack in attacks)
    return f"{', '.join(names)} {screen.done}/{screen.total} images  {figures}  ETA {timedelta(seconds=round(seconds))}"


@contextmanager
def _random_state() -> Iterator[None]:
    """Keep the global random state, which the library seeds, on the CPU and on every GPU in use."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else ()):
        yield


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients (FAB calls backward), no TF32, the same cuDNN algorithms every time."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    switches = [
        (torch.backends.cuda.matmul, "allow_tf32", False),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
    ]
    before = [getattr(where, name) for where, name, _ in switches]
    for parameter in learnt:
        parameter.requires_grad_(False)
    for where, name, value in switches:
        setattr(where, name, value)
    try:
        with evaluating(model):
            yield
    finally:
        for (where, name, _), value in zip(switches, before, strict=True):
            setattr(where, name, value)
        for parameter in learnt:
            parameter.requires_grad_(True)
