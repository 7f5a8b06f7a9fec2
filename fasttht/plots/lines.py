"""Pictures made of lines: training curves, accuracy against steps and against the radius.

Each function takes data and returns a figure and its words (what a reader without the picture is told); call it inside
`style.styled`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasttht.config_file import length_text
from fasttht.plots.history import Row, curve, evaluations
from fasttht.plots.style import colour, dashes, figure, marker
from fasttht.plots.sweep import Line, bars, threat_text, top1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "loss": "training loss",
    "loss_cls": "classification loss",
    "loss_cl": "contrastive loss (Eq. 5)",
    "adv_top1": "attacked training images,\ntop-1 (%)",
    "clean_top1": "clean training images,\ntop-1 (%)",
    "lr": "learning rate",
    "zero_grad_pct": "input gradients that\nare exactly 0 (%)",
    "nan_grad_pct": "input gradients that\nare NaN (%)",
    "grad_norm": "gradient norm",
    "logit_scale": "sharpness s = 1/eta",
}
_STEPS_LABEL = "optimizer steps"


def curves(names: Sequence[str], runs: Sequence[Sequence[Row]], metrics: Sequence[str]) -> tuple[Figure, str]:
    """Draw a panel for each metric, a line in it for each run that has it, and one with the evaluations.

    Raises: nothing; a run without a metric has no line in its panel.
    """
    scores = [evaluations(rows) for rows in runs]
    num = len(metrics) + any(scores)
    columns = min(2, num)
    fig = figure(0.8 + 2.7 * math.ceil(num / columns))
    panels = fig.subplots(math.ceil(num / columns), columns, squeeze=False).ravel()
    for panel in panels[num:]:
        panel.remove()
    handles: dict[str, Any] = {}
    for panel, metric in zip(panels, metrics, strict=False):
        values: list[float] = []
        for i, (name, rows) in enumerate(zip(names, runs, strict=True)):
            x, y = curve(rows, metric)
            if x:
                every = max(1, len(x) // 12)
                (line,) = panel.plot(
                    x, y, color=colour(i), linestyle=dashes(i), marker=marker(i), markevery=every, label=name
                )
                handles.setdefault(name, line)
                values += y
        if metric == "lr" and values and min(values) > 0:
            _log_axis(panel)
        panel.set(xlabel=_STEPS_LABEL, ylabel=LABELS.get(metric, metric))
    if any(scores):
        _evaluations(panels[len(metrics)], scores)
    if len(names) > 1:
        fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 3))
    else:
        fig.suptitle(names[0])
    return fig, _curve_words(names, runs, metrics)


def _log_axis(panel: Axes) -> None:
    """Make y logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _evaluations(panel: Axes, scores: Sequence[dict[str, tuple[list[int], list[float]]]]) -> None:
    """Draw a line for each run and score: the run's colour, the score's marker and dashes."""
    kinds = list(dict.fromkeys(name for found in scores for name in found))
    for i, found in enumerate(scores):
        for name, (x, y) in found.items():
            j = kinds.index(name)
            panel.plot(x, y, color=colour(i), linestyle=dashes(j), marker=marker(j), label=name)
    panel.set(xlabel=_STEPS_LABEL, ylabel="held-out images,\ntop-1 (%)")
    panel.margins(y=0.1)
    grey = [panel.plot([], [], color="#444444", linestyle=dashes(j), marker=marker(j))[0] for j in range(len(kinds))]
    panel.legend(grey, [kind.replace("_", " ") for kind in kinds], fontsize=11)


def _curve_words(names: Sequence[str], runs: Sequence[Sequence[Row]], metrics: Sequence[str]) -> str:
    said = []
    for name, rows in zip(names, runs, strict=True):
        ends = [f"{metric} ends at {curve(rows, metric)[1][-1]:.4g}" for metric in metrics if curve(rows, metric)[1]]
        ends += [f"{score} at {values[-1]:.2f} %" for score, (_, values) in evaluations(rows).items()]
        said.append(f"{name.strip()}: {', '.join(ends)}")
    return f"Training curves against optimizer steps. {'. '.join(said)}."


def steps(lines: Sequence[Line]) -> tuple[Figure, str]:
    """Draw accuracy against the number of PGD steps, with 95 % intervals; a dotted line is a run's clean accuracy."""
    fig = figure(5.6)
    ax = fig.subplots()
    _sweep(ax, lines)
    for i, line in enumerate(lines):
        # Where runs are equally good, dots of one fall between those of the others.
        dots = (2 * i, (2, 2 * max(1, len(lines) - 1)))
        ax.axhline(top1(line.points[0], "clean_correct"), color=colour(i), linestyle=dots, linewidth=1.5)
    values = sorted({x for line in lines for x in line.x})
    if len(values) > 1:
        if values[0] == 0:
            ax.set_xscale("symlog", linthresh=1, linscale=0.5)
        else:
            ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set(xlabel="PGD steps", ylabel="held-out images, top-1 (%)")
    ax.set_title(f"PGD, {threat_text(lines[0].points[0])}\ndotted: clean images; bars: 95 % intervals")
    words = f"number of PGD steps, {threat_text(lines[0].points[0])}"
    return fig, _sweep_words(words, lines, [f"{value:g}" for value in lines[0].x])


def eps(lines: Sequence[Line]) -> tuple[Figure, str]:
    """Draw accuracy against the radius, with 95 % intervals; linf radii in levels of 8-bit images."""
    point = lines[0].points[0]
    scale, label = {
        "linf": (255, "eps (1/255)"), "l2": (1, "eps (l2 norm of [0, 1] pixels)"),
        "l2-relative": (1, "eps (share of the image's l2 norm)"),
    }[point["norm"]]  # fmt: skip
    fig = figure(5.6)
    ax = fig.subplots()
    _sweep(ax, lines, scale)
    goal = "targeted" if point["targeted"] else "untargeted"
    ax.set(xlabel=label, ylabel="held-out images, top-1 (%)", ylim=(-2, 102))
    threat = f"PGD-{point['steps']}, {point['norm']}, {goal}, {point['images']:,} images"
    ax.set_title(f"{threat}; bars: 95 % intervals")
    marks = [length_text(point["norm"], value) for value in lines[0].x]
    return fig, _sweep_words(f"radius eps, {threat}", lines, marks)


def _sweep(ax: Axes, lines: Sequence[Line], scale: float = 1.0) -> None:
    for i, line in enumerate(lines):
        ax.errorbar(
            [x * scale for x in line.x], [top1(p) for p in line.points], yerr=bars(line.points), color=colour(i),
            linestyle=dashes(i), marker=marker(i), label=line.name, elinewidth=1.3,
        )  # fmt: skip
    ax.legend()


def _sweep_words(against: str, lines: Sequence[Line], marks: Sequence[str]) -> str:
    said = [
        f"{line.name.strip()}: "
        + ", ".join(f"{top1(p):.2f} % at {mark}" for mark, p in zip(marks, line.points, strict=True))
        + f", clean {top1(line.points[0], 'clean_correct'):.2f} %"
        for line in lines
    ]
    return f"Top-1 accuracy on held-out images against the {against}. {'; '.join(said)}."
