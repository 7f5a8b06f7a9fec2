"""Accuracy on clean and attacked held-out images: exact counts, draws keyed by image.

Every image counts once. The attack always starts from noise and returns its last iterate; float32, no TF32, no
autocast. Random numbers depend on (seed, dataset row) alone, so they are the same for any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fasttht import eval_files, eval_report, kernels, log, signals
from fasttht.alarms import Alarm
from fasttht.attacks.losses import least_likely, loss_of
from fasttht.attacks.pgd import Draw, InputGradient, attack, evaluating, input_gradient
from fasttht.attacks.threat import Loss, Norm, Threat
from fasttht.config_file import radius_text
from fasttht.distributed import SOLO, World
from fasttht.errors import Interrupted, UsageError
from fasttht.eval_attacks import GOALS, alarm_threats, check_losses, image_steps, knn_threats
from fasttht.eval_attacks import step_size as step_size
from fasttht.eval_attacks import threats as threats
from fasttht.eval_report import Score as Score
from fasttht.eval_report import record as record
from fasttht.eval_rows import choose_rows
from fasttht.meeting import Meeting
from fasttht.memory import Watch, eval_advice
from fasttht.models.mixture_bn import has_mixture_bn, through
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.loader import Batch, Loader
from fasttht.precision import full_precision
from fasttht.signals import Stop, Stopped
from fasttht.subject import images
from fasttht.subject_file import open_subject
from fasttht.suites import AUTO, check_suites, open_defence, run_suites


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an evaluation does beyond the run's own attacks; see the command's help.

    knn: k, weighting, features and search of the nearest neighbours. work_dir: where suites keep what they have, see
    `eval_files.work_folder` and `knn_bank.open_index`.
    """

    losses: tuple[Loss, ...] = ("ce",)
    eps_sweep: tuple[float, ...] = ()
    limit: int | None = None
    images_file: Path | None = None
    csv: Path | None = None
    suites: tuple[str, ...] = ()
    work_dir: Path | None = None
    knn_k: int = 50
    knn_weighting: Literal["similarity", "exponential"] = "similarity"
    knn_features: Literal["head", "trunk"] = "head"
    knn_search: Literal["exact", "faiss"] = "exact"
    alarms: Literal["off", "cheap", "full"] = "cheap"


class Tally:
    """What a walk over images has found, on its device; that of several walks over different images is their sum.

    hits: name -> (num_rows,) bool by dataset row. zero_grad: name -> (), float64, the sum of the shares of zeros in the
    last gradients of the images that the attack left right: DLR, say, has no gradient where it is done. seen:
    (num_rows,) bool.
    """

    def __init__(
        self, attacks: Sequence[Threat], num_rows: int, device: torch.device, *, restarts: int, branches: bool
    ):
        names = ["clean"]
        for threat in attacks:
            names += [threat.name] if restarts == 1 else [threat.name, f"{threat.name}_r{restarts}"]
        names += ["clean_branch_clean"] if branches else []
        if len(set(names)) < len(names):
            raise UsageError(f"attacks: expected each once, got {' '.join(names)}")
        self.hits = {name: torch.zeros(num_rows, dtype=torch.bool, device=device) for name in names}
        self.zero_grad = {
            threat.name: torch.zeros((), dtype=torch.float64, device=device) for threat in attacks if threat.steps
        }
        self.seen = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def scores(self, rows: Tensor | None = None) -> dict[str, Score]:
        """Return the scores of rows (N,), all by default, in their order."""
        return {name: Score(hits.cpu() if rows is None else hits.cpu()[rows]) for name, hits in self.hits.items()}

    def zero_grad_pct(self) -> dict[str, float]:
        """Return the mean share of zeros in percent, by name; none for an attack that left nothing right."""
        left = {name: int(self.hits[name].sum()) for name in self.zero_grad}
        return {name: 100 * float(total) / left[name] for name, total in self.zero_grad.items() if left[name]}

    def add_ranks_(self, world: World) -> None:
        """Add what other ranks have found on their images, so that every rank has all of it."""
        world.barrier("evaluation")  # all ranks are alive: a missing one would be waited for inside the device
        for hits in [*self.hits.values(), self.seen]:
            hits.copy_(world.sum_("hits", hits.to(torch.uint8)) > 0)
        for total in self.zero_grad.values():
            world.sum_("zero gradients", total)

    def so_far(self) -> dict[str, str]:
        """Return the accuracies on the images that every attack has seen, as text; nothing before there are any."""
        images = int(self.seen.sum())
        if not images:
            return {}
        return {name: f"{100 * int((hits & self.seen).sum()) / images:.2f} %" for name, hits in self.hits.items()}


def walk(
    model: TwoHead,
    batches: Iterable[Batch],
    attacks: Sequence[Threat],
    tally: Tally,
    *,
    seed: int,
    num_classes: int,
    restarts: int = 1,
    on_step: Callable[[int], None] = lambda images: None,
    on_batch: Callable[[int], None] = lambda images: None,
    on_attacked: Callable[[Threat, Batch, Tensor], None] = lambda threat, batch, x_adv: None,
) -> None:
    """Attack and classify what batches hold, and note it in the tally, in place; the model's mode is restored.

    on_step is called with the number of images of every pass, on_batch with that of all that are done; on_attacked with
    what the first restart of each attack, without the name of its radius, made of a batch. Ranks walk over rows of
    their own and add up their tallies.
    """
    branches, done = has_mixture_bn(model), 0
    last = torch.empty(0)

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        on_step(len(x))
        return model.logits(x)

    def counted(gradient: InputGradient) -> InputGradient:
        def count(x: Tensor, y: Tensor) -> Tensor:
            nonlocal last
            on_step(len(x))
            last = gradient(x, y)
            return last

        return count

    with evaluating(model), full_precision():
        for batch in batches:
            signals.check()
            x, y, index = kernels.u8_to_input(batch.x), batch.y, batch.index
            clean = logits(x)
            target = least_likely(clean, y)
            tally.hits["clean"][index] = clean.argmax(dim=1) == y
            if branches:
                with through(model, "clean"), torch.no_grad():
                    tally.hits["clean_branch_clean"][index] = model.logits(x).argmax(dim=1) == y
            found: dict[Threat, tuple[Tensor, Tensor, Tensor]] = {}  # right after one restart, after all; zeros
            for threat in attacks:
                same = replace(threat, named_eps=False)
                if same not in found:
                    gradient = counted(input_gradient(model.logits, loss=loss_of(threat, y)))
                    aim = target if threat.target == "least-likely" else None
                    worst = torch.ones_like(y, dtype=torch.bool)
                    for restart in range(restarts):
                        draw = Draw(seed, epoch=restart)
                        attacked = attack(gradient, x, y, index, threat, draw, num_classes=num_classes, target=aim)
                        worst = worst & (logits(attacked.x_adv).argmax(dim=1) == y)
                        if restart == 0:
                            on_attacked(same, batch, attacked.x_adv)
                            first = worst
                            zeros = (last == 0).flatten(1).double().mean(dim=1) if threat.steps else torch.zeros(0)
                    found[same] = first, worst, zeros
                first, worst, zeros = found[same]
                tally.hits[threat.name][index] = first
                if restarts > 1:
                    tally.hits[f"{threat.name}_r{restarts}"][index] = worst
                if threat.steps:
                    tally.zero_grad[threat.name] += torch.where(first, zeros, 0).sum()
            tally.seen[index] = True
            done += len(y)
            on_batch(done)


def evaluate(
    model: TwoHead,
    loader: Loader,
    attacks: Sequence[Threat],
    *,
    seed: int,
    num_classes: int,
    restarts: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Classify clean images and those of each attack; the model's mode is restored.

    The loader must be an evaluation loader; it is walked once. Returns a Score by name: `clean`, `pgd10`, ..., and
    with R > 1 restarts also `pgd10_r5`, ...: right only under every one of R attacks from other random starts (and, if
    targeted, at other random classes), the first of which is the one of `pgd10`. A network with mixture BN is
    evaluated through its adversarial branch, clean images too: a defender does not know which images were attacked.
    What those get through the clean branch (Xie et al.'s AdvProp) is `clean_branch_clean`. on_batch is called with the
    number of images done.
    """
    tally = Tally(
        attacks, len(loader.samples), next(model.parameters()).device, restarts=restarts, branches=has_mixture_bn(model)
    )
    walk(
        model, loader, attacks, tally, seed=seed, num_classes=num_classes, restarts=restarts,
        on_batch=on_batch or (lambda images: None),
    )  # fmt: skip
    return tally.scores()


@contextmanager
def _stopping(world: World) -> Iterator[Stop]:
    """Have several ranks leave together at a signal to any of them; one alone is ended at once, by `signals.ending`.

    Raises: Interrupted.
    """
    with signals.stop_signals() if world.size > 1 else nullcontext(Stop()) as stop:
        try:
            yield stop
        except Stopped as stopped:
            raise Interrupted(
                stopped.signal, "in an evaluation; the same command does it again, AutoAttack from its last chunk"
            ) from None


def evaluate_run(
    path: Path,
    *,
    changes: dict[str, Any],
    goal: str,
    which: str = "last",
    eps: float | None = None,
    norm: Norm | None = None,
    output: Path | None = None,
    per_image: Path | None = None,
    device: str = "auto",
    request: Request | None = None,
    world: World = SOLO,
) -> dict[str, Any]:
    """Evaluate a run folder's checkpoint, an export or a file; print the table, and return the row.

    which is the checkpoint (`resuming.choose`). changes are options that differ from the run's, eps another radius,
    norm another norm (its default radius, unless eps is given). output gets the row as one more JSON line, per_image a
    NumPy archive of which images were right: one bool array (N,) for each score, in the order of the dataset's rows.
    The moving average of the weights is what is evaluated, if the run keeps one. In the run folder nothing is changed
    but `eval`, where the row is appended too (`eval_files.keep`), and, by suites, `knn`. Each rank of the world takes
    its share of the images; all return the same row, and rank 0 writes it.

    Raises: CheckpointError if there is no whole checkpoint; DataError if the data are gone; UsageError for attacks that
    the number of classes does not allow, or images that are not there.
    """
    request = request or Request()
    given = {"eps": eps, "norm": norm}
    subject = open_subject(
        path, changes | {name: value for name, value in given.items() if value is not None},
        which=which, device=device, several=True,
    )  # fmt: skip
    config, splits, restarts = subject.config, subject.splits, subject.config.evaluation.eval_restarts
    attacks = threats(config, GOALS[goal], losses=request.losses, eps_sweep=request.eps_sweep)
    check_losses(attacks, splits.num_classes)
    knn = {
        "k": request.knn_k, "weighting": request.knn_weighting, "features": request.knn_features,
        "search": request.knn_search,
    }  # fmt: skip
    voted = knn_threats(config, GOALS[goal], request.eps_sweep) if "knn" in request.suites else []
    check_suites(request.suites, subject, knn)
    if request.alarms == "full":
        attacks = list(dict.fromkeys([*attacks, *alarm_threats(config, splits.num_classes)]))
    rows = choose_rows(splits.val, limit=request.limit, images_file=request.images_file, seed=config.run.seed)
    if len(rows) < world.size:
        raise UsageError(f"WORLD_SIZE: expected at most as many processes as {len(rows)} images, got {world.size}")
    for file in (output, per_image, request.csv):
        if file is not None and world.main:
            file.open("a").close()  # now, not after hours of attacks
    if request.csv is not None and world.main:
        eval_report.check_csv(request.csv)
    is_run, folder = subject.origin == "run", None
    if set(request.suites) & set(AUTO):
        folder = eval_files.work_folder(path, is_run=is_run, given=request.work_dir, say=log.say)
    about = eval_report.about(subject, [*attacks, *voted], limit=request.limit, images_file=request.images_file)
    defence, words, batch_size = None, "", config.evaluation.eval_batch_size
    warned: list[Alarm] = []
    tally = Tally(attacks, len(splits.val), subject.device, restarts=restarts, branches=has_mixture_bn(subject.model))
    mine = rows[world.rows(len(rows))]
    with Watch(subject.device).over("evaluation", batch_size, eval_advice), _stopping(world) as stop:
        if "knn" in request.suites:
            defence, labels, words = open_defence(subject, voted, knn, request.work_dir, log.say, world, stop)
            about |= labels
        meeting = Meeting(world, stop, -(-max(world.counts(len(rows))) // batch_size))
        with (
            log.EvalScreen(len(mine) * image_steps(attacks, restarts), tally.so_far) as screen,
            meeting,
        ):
            walk(
                subject.model, images(subject, "val", mine), attacks, tally, seed=config.run.seed,
                num_classes=splits.num_classes, restarts=restarts, on_step=screen.advance,
                on_attacked=defence.saw if defence is not None else lambda threat, batch, x_adv: None,
                on_batch=lambda images: meeting.meet(),
            )  # fmt: skip
        tally.add_ranks_(world)
        scores = tally.scores(rows)
        found = run_suites(
            request.suites, subject, rows, world, folder=folder, defence=defence, say=log.say, alarms=warned, stop=stop
        )
        scores |= {name: Score(hits.cpu()) for name, hits in found.items()}
    row = eval_report.row_of(about, scores, tally.zero_grad_pct(), attacks, request.eps_sweep)
    title = f"{subject.title}: {row['images']} held-out images, {radius_text(config)}"
    log.scores(f"{title}; {words}" if words else title, row)
    if per_image is not None and world.main:
        eval_report.write_archive(per_image, scores)
    if request.csv is not None and world.main:
        eval_report.append_csv(request.csv, row)
    if request.alarms != "off":
        row |= eval_report.look(row, subject, warned, full=request.alarms == "full", say=log.say)
    if output is not None and world.main:
        eval_report.append_line(output, row)
    if is_run and world.main:
        eval_files.keep(path, row, log.say)
    return row
