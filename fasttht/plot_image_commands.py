"""The `plot` commands that show single images: words to a measurement, the measurement to a picture. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App

from fasttht.config import Many, Pixels
from fasttht.config_file import length_text
from fasttht.errors import UsageError
from fasttht.plots import place

if TYPE_CHECKING:
    from fasttht.attacks.threat import Threat
    from fasttht.subject import Subject


def register(app: App) -> None:
    """Add surface, retrieval and examples to the `plot` commands."""
    for command in (surface, retrieval, examples):
        app.command(command)


def surface(
    *runs: Path,
    image: int = 0,
    eps: Pixels | None = None,
    points: int = 41,
    output: Path | None = None,
    device: str = "auto",
) -> int:
    """Draw the loss around one held-out image: adversarial and random direction, and two random ones (Figure 6).

    Parameters
    ----------
    runs
        Run folders, a row of the picture each.
    image
        Row of the held-out split.
    eps
        Largest offset along each direction. Default: the first run's own radius, if that is in linf.
    points
        Points along each direction.
    output
        Folder for the picture and its data. Default: plots/ in the first run.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    """
    place.check_runs(runs, most=4)
    place.check_least("--points", points, 3)
    if eps is not None and not 0 < eps <= 1:
        raise UsageError(f"--eps: expected a radius above 0 and at most 1, got {eps:g}")
    from fasttht.plots import images as drawing
    from fasttht.plots.landscape import surface as measure
    from fasttht.plots.style import check_installed, run_names
    from fasttht.plots.sweep import digest, one_of

    check_installed()
    found, data, fingerprints = [], [], []
    for run in runs:
        subject = place.open_subject(run, device)
        norm = subject.config.attack.norm
        if eps is None and norm != "linf":
            raise UsageError(f"--eps: expected a radius beside a run of norm {norm}, got none; for example 4/255")
        eps = subject.config.attack.eps if eps is None else eps
        assert eps is not None, "the config was not resolved"
        fingerprints.append(subject.splits.val.fingerprint)
        one_of("data set", fingerprints, "draw them apart")
        found.append(measure(subject, image, eps=eps, points=points))
        where = {"run": run.name, "checkpoint": subject.checkpoint, "digest": digest(subject)}
        data.append({**where, **found[-1].data()})
    place.write_picture(
        lambda: drawing.surfaces(run_names(runs), found, _names(subject)),
        place.folder_of(runs[0], output),
        place.file_name(f"surface-{image}", runs),
        data,
    )
    return 0


def retrieval(
    run: Path,
    /,
    *,
    neighbours: int = 5,
    successes: int = 3,
    failures: int = 3,
    steps: int = 10,
    eps: Pixels | None = None,
    targeted: bool = False,
    limit: int = 256,
    output: Path | None = None,
    device: str = "auto",
) -> int:
    """Draw attacked queries beside their nearest training images: rows that the vote of 50 gets right, and wrong ones.

    Queries are attacked on the classifier and come in a random order that the run's seed gives (Figure 5).

    Parameters
    ----------
    run
        Run folder.
    neighbours
        Training images shown for each query.
    successes
        Rows that the vote gets right.
    failures
        Rows that it gets wrong.
    steps
        PGD length.
    eps
        Radius. Default: the run's own.
    targeted
        Attack towards a random other class.
    limit
        Held-out images to try at most.
    output
        Folder for the picture and its data. Default: plots/ in the run.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    """
    for flag, number in (
        ("--neighbours", neighbours),
        ("--limit", limit),
        ("--successes + --failures", successes + failures),
    ):
        place.check_least(flag, number)
    for flag, number in (("--steps", steps), ("--successes", successes), ("--failures", failures)):
        place.check_least(flag, number, 0)
    if neighbours > 10 or successes + failures > 12:
        raise UsageError(
            f"--neighbours, --successes, --failures: expected a picture of at most 10 neighbours and 12 rows, "
            f"got {neighbours} and {successes + failures}"
        )
    from fasttht import log
    from fasttht.knn import neighbours as nearest
    from fasttht.plots import images as drawing
    from fasttht.plots.samples import retrieve
    from fasttht.plots.style import check_installed, short

    check_installed()
    subject = place.open_subject(run, device)
    threat = _threat(subject, steps, eps, targeted)
    if neighbours > len(subject.splits.train):
        raise UsageError(
            f"--neighbours: expected at most the {len(subject.splits.train)} training images, got {neighbours}"
        )
    found, tried = retrieve(
        subject, threat, nearest, shown=neighbours, successes=successes, failures=failures, limit=limit
    )
    if not found:
        raise UsageError(
            f"--limit: expected the queries asked for among the {tried} tried, got none; raise it, or ask for others"
        )
    right = sum(one.success for one in found)
    log.say(f"{tried} queries tried: {right} successes and {len(found) - right} failures are shown")
    place.write_picture(
        lambda: drawing.gallery(
            found, f"{short(run.resolve().name)}: {_words(threat)}, made on the classifier", _names(subject)
        ),
        place.folder_of(run, output),
        "retrieval",
        {"checkpoint": subject.checkpoint, "tried": tried, "queries": [one.data() for one in found]},
    )
    return 0


def examples(
    run: Path,
    /,
    *,
    images: Annotated[tuple[int, ...] | None, Many] = None,
    steps: int = 10,
    eps: Pixels | None = None,
    targeted: bool = False,
    output: Path | None = None,
    device: str = "auto",
) -> int:
    """Draw held-out images, what the attack makes of them, and the perturbation amplified, with what f takes them for.

    Parameters
    ----------
    run
        Run folder.
    images
        Rows of the held-out split. Default: in an order that the run's seed gives, the first three that the attack
        flips and the first three that it does not.
    steps
        PGD length.
    eps
        Radius. Default: the run's own.
    targeted
        Attack towards a random other class.
    output
        Folder for the picture and its data. Default: plots/ in the run.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    """
    if images is not None:
        place.check_list("--images", images)
        if len(images) > 8:
            raise UsageError(f"--images: expected at most 8, got {len(images)}")
    place.check_least("--steps", steps, 0)
    from fasttht.plots import images as drawing
    from fasttht.plots.samples import examples as measure
    from fasttht.plots.samples import pick
    from fasttht.plots.style import check_installed, short

    check_installed()
    subject = place.open_subject(run, device)
    threat = _threat(subject, steps, eps, targeted)
    rows = pick(subject, threat, 6) if images is None else list(images)
    found, factor = measure(subject, threat, rows)
    title = f"{short(run.resolve().name)}: {_words(threat)}"
    place.write_picture(
        lambda: drawing.examples(found, factor, title, _names(subject), picked=images is None),
        place.folder_of(run, output),
        "examples",
        {"checkpoint": subject.checkpoint, "factor": factor, "images": [one.data() for one in found]},
    )
    return 0


def _threat(subject: Subject, steps: int, eps: float | None, targeted: bool) -> Threat:
    """Return the attack that is drawn, at the run's own radius unless told. Raises: UsageError for too large a one."""
    from fasttht.plots.sweep import threat_of

    radius = subject.config.attack.eps if eps is None else eps
    assert radius is not None, "the config was not resolved"
    if subject.config.attack.norm == "linf" and radius > 1:
        raise UsageError(f"--eps: expected a radius of at most 1 in linf, got {radius:g}")
    return threat_of(subject, steps=steps, eps=radius, targeted=targeted)


def _words(threat: Threat) -> str:
    goal = "targeted" if threat.targeted else "untargeted"
    return f"{goal} PGD-{threat.steps}, {threat.norm} eps {length_text(threat.norm, threat.eps)}"


def _names(subject: Subject) -> Any:
    from fasttht.plots.samples import class_name

    return lambda label: class_name(subject, label)
