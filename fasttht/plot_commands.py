"""The `plot` commands: words to a measurement, the measurement to a picture. No logic, no torch until one is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App

from fasttht import plot_image_commands
from fasttht.config import Many, Pixels
from fasttht.errors import UsageError
from fasttht.plots import place

if TYPE_CHECKING:
    from fasttht.plots.sweep import Point

plot_app = App(
    name="plot", help="Draw runs: training curves, robustness, loss surfaces, neighbours, examples; write a report."
)
plot_image_commands.register(plot_app)

# Shares of the run's own radius that `plot eps` measures at, unless told.
_SHARES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)


@plot_app.command
def curves(*runs: Path, metrics: Annotated[tuple[str, ...] | None, Many] = None, output: Path | None = None) -> int:
    """Draw training curves and the evaluations along them, from metrics.jsonl; several runs on one plot.

    Parameters
    ----------
    runs
        Run folders.
    metrics
        Figures of metrics.jsonl, a panel each. Default: loss, adv_top1 (or clean_top1), lr, zero_grad_pct, grad_norm.
    output
        Folder for the picture. Default: plots/ in the first run.
    """
    place.check_runs(runs)
    from fasttht.plots import lines
    from fasttht.plots.history import chosen_metrics, rows_of
    from fasttht.plots.style import run_names

    rows = [rows_of(run) for run in runs]
    chosen = chosen_metrics(rows, metrics)
    folder = place.folder_of(runs[0], output)
    place.write_picture(lambda: lines.curves(run_names(runs), rows, chosen), folder, place.file_name("curves", runs))
    return 0


@plot_app.command(name="steps")
def accuracy_by_steps(
    *runs: Path,
    steps: Annotated[tuple[int, ...], Many] = (1, 2, 5, 10, 20, 50),
    eps: Pixels | None = None,
    targeted: bool = False,
    limit: int | None = None,
    output: Path | None = None,
    device: str = "auto",
) -> int:
    """Measure and draw accuracy against the number of PGD steps, with 95 % intervals.

    Points are kept in points.json beside the picture, so drawing again measures only what is new.

    Parameters
    ----------
    runs
        Run folders.
    steps
        PGD lengths; 0 is noise alone.
    eps
        Radius. Default: the runs' own, which must then be one.
    targeted
        Attack towards a random other class.
    limit
        That many held-out images, chosen at random by the run's seed. Default: all.
    output
        Folder for the picture and points.json. Default: plots/ in the first run; points then in each run's plots/.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    """
    place.check_runs(runs)
    place.check_list("--steps", steps)
    place.check_least("--steps", min(steps), 0)

    def asked(own: float) -> list[tuple[int, float]]:
        return [(length, own if eps is None else eps) for length in sorted(steps)]

    return _sweep("steps", runs, asked, targeted=targeted, limit=limit, output=output, device=device)


@plot_app.command(name="eps")
def accuracy_by_eps(
    *runs: Path,
    eps: Annotated[tuple[Pixels, ...] | None, Many] = None,
    steps: int = 20,
    targeted: bool = False,
    limit: int | None = None,
    output: Path | None = None,
    device: str = "auto",
) -> int:
    """Measure and draw accuracy against the radius of the attack, with 95 % intervals.

    Points are kept in points.json beside the picture, so drawing again measures only what is new.

    Parameters
    ----------
    runs
        Run folders.
    eps
        Radii, such as 0 2/255 4/255. Default: eight from 0 to twice the first run's own.
    steps
        PGD length.
    targeted
        Attack towards a random other class.
    limit
        That many held-out images, chosen at random by the run's seed. Default: all.
    output
        Folder for the picture and points.json. Default: plots/ in the first run; points then in each run's plots/.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    """
    place.check_runs(runs)
    place.check_least("--steps", steps, 0)
    if eps is not None:
        place.check_list("--eps", eps)
    radii = sorted(eps) if eps is not None else []

    def asked(own: float) -> list[tuple[int, float]]:
        if not radii:  # the first run's decide, for all
            exact = Fraction(own).limit_denominator(255 * 64)  # 4/255 and not a neighbour that prints as one
            radii.extend(own if share == 1 else float(exact * Fraction(share)) for share in _SHARES)
        return [(steps, radius) for radius in radii]

    return _sweep("eps", runs, asked, targeted=targeted, limit=limit, output=output, device=device)


def _sweep(
    kind: str,
    runs: Sequence[Path],
    asked: Callable[[float], list[tuple[int, float]]],
    *,
    targeted: bool,
    limit: int | None,
    output: Path | None,
    device: str,
) -> int:
    """Measure what is not kept and draw it; asked: a run's own radius to (steps, eps) of each point."""
    from fasttht import log
    from fasttht.plots import lines, sweep
    from fasttht.plots.style import check_installed, run_names

    check_installed()
    if limit is not None:
        place.check_least("--limit", limit)
    drawn: list[sweep.Line] = []
    for run, name in zip(runs, run_names(runs), strict=True):
        subject = place.open_subject(run, device)
        own, norm = subject.config.attack.eps, subject.config.attack.norm
        assert own is not None, "the config was not resolved"
        wanted = asked(own)
        if norm == "linf" and max(eps for _, eps in wanted) > 1:
            raise UsageError(f"--eps: expected radii of at most 1 in linf, got {max(eps for _, eps in wanted):g}")
        attacks = [sweep.threat_of(subject, steps=steps, eps=eps, targeted=targeted) for steps, eps in wanted]
        if drawn:  # before hours of attacks
            first = drawn[0].points[0]
            sweep.one_of("norm", [first["norm"], norm], "draw them apart")
            sweep.one_of("data set", [first["data"], subject.splits.val.fingerprint], "draw them apart")
            if kind == "steps":
                sweep.one_of("radius", [first["eps"], attacks[0].eps], "give --eps")

        def say(point: Point, fresh: bool, name: str = name) -> None:
            how = "" if fresh else " (measured before)"
            log.say(f"{name}: PGD-{point['steps']}, {sweep.threat_text(point)}: {sweep.top1(point):.2f} %{how}")

        file = place.folder_of(run, output) / sweep.FILE
        points = sweep.measure(subject, attacks, file, limit=limit, on_point=say)
        x = tuple(float(steps if kind == "steps" else eps) for steps, eps in wanted)
        drawn.append(sweep.Line(name, x, tuple(points)))
    draw = lines.steps if kind == "steps" else lines.eps
    place.write_picture(lambda: draw(drawn), place.folder_of(runs[0], output), place.file_name(kind, runs))
    return 0


@plot_app.command
def report(run: Path, /, *, alarms: Path | None = None, output: Path | None = None) -> int:
    """Write one HTML file about a run that opens anywhere, offline: settings, scores, curves, and its pictures.

    Scores are those of the run's end and of every `fasttht eval` of it since, with their alarms.
    Pictures are those in the folder it is written to: draw them first.

    Parameters
    ----------
    run
        Run folder.
    alarms
        Text file with the alarms of an evaluation, to be shown as it is.
    output
        Folder for report.html, and of the pictures. Default: plots/ in the run.
    """
    from fasttht import log
    from fasttht.plots.report import write_report

    log.say(f"report: {write_report(run, place.folder_of(run, output), alarms)}")
    return 0
