"""Pictures made of images: loss surfaces, attacked examples, nearest neighbours.

Each function takes data and returns a figure and its words (what a reader without the picture is told); call it inside
`style.styled`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fasttht.plots.landscape import Surface
from fasttht.plots.samples import VOTERS, Attacked, Retrieved
from fasttht.plots.style import GREEN, VERMILLION, figure, picture, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Name = Callable[[int], str]


def surfaces(names: Sequence[str], found: Sequence[Surface], label: Name) -> tuple[Figure, str]:
    """Draw filled contours of the loss, a row for each run, all on one scale.

    Contours and not a surface in perspective: nothing hides behind a ridge, and values can be read.
    """
    across = ("adversarial direction", "random direction 2")
    fig = figure(4.3 * len(found) + 0.6)
    panels = fig.subplots(len(found), 2, squeeze=False)
    low = min(min(s.adversarial.min(), s.random.min()) for s in found)
    high = max(max(s.adversarial.max(), s.random.max()) for s in found)
    levels = np.linspace(low, high if high > low else low + 1e-6, 13)
    drawn = None
    for row, (name, one) in enumerate(zip(names, found, strict=True)):
        offsets = one.offsets * 255
        for ax, text, grid in zip(panels[row], across, (one.adversarial, one.random), strict=True):
            drawn = ax.contourf(offsets, offsets, grid, levels=levels, cmap="cividis")
            ax.contour(offsets, offsets, grid, levels=levels, colors="black", linewidths=0.5, alpha=0.6)
            ax.plot([0], [0], marker="P", color="white", markeredgecolor="black", markersize=12)
            ax.set(xlabel=f"{text} (1/255)", ylabel="random direction 1 (1/255)", aspect="equal")
            ax.grid(visible=False)
            ax.set_title(f"{name}\nloss {grid.min():.2g} to {grid.max():.2g}")
    assert drawn is not None, "no surface to draw"
    bar = fig.colorbar(drawn, ax=panels.ravel().tolist())
    bar.set_label("cross entropy")
    bar.ax.set_yticks(levels[::2], [f"{value:.3g}" for value in levels[::2]])
    first = found[0]
    fig.suptitle(f"loss around held-out image {first.row}, of class {short(label(first.label))}: the cross")
    said = [
        f"{name.strip()}: {one.adversarial.min():.3g} to {one.adversarial.max():.3g} with the adversarial direction, "
        f"{one.random.min():.3g} to {one.random.max():.3g} with two random ones"
        for name, one in zip(names, found, strict=True)
    ]
    reach = first.offsets[-1] * 255
    return fig, (
        f"Cross entropy around held-out image {first.row}, offsets up to {reach:.4g}/255 along signed directions. "
        f"{'; '.join(said)}."
    )


def examples(
    found: Sequence[Attacked], factor: float, title: str, label: Name, *, picked: bool = False
) -> tuple[Figure, str]:
    """Draw a column for each image: clean, attacked, and the perturbation times a factor around grey.

    picked: they come from `samples.pick`, so the share that the attack flips says nothing; the title tells.
    """
    num = len(found)
    side = 9.2 / max(num, 4)
    fig = figure(3 * (side + 0.35) + 1.1)
    axes = fig.subplots(3, num, squeeze=False)
    wide = 14 if num <= 6 else 9
    for column, one in enumerate(found):
        rows = (one.clean, one.attacked, one.noise)
        for row, (ax, image) in enumerate(zip(axes[:, column], rows, strict=True)):
            picture(ax, image)
            if row < 2:
                _verdict(ax, label(one.predicted[row]), one.confidence[row], one.predicted[row] == one.label, wide)
        axes[0, column].set_title(f"row {one.row}\nclass {short(label(one.label), wide)}", fontsize=12)
    for row, text in enumerate(("clean", "attacked", f"perturbation\nx {factor:.3g}")):
        axes[row, 0].set_ylabel(text)
    fig.suptitle(f"{title}\nbelow: taken for, confidence" + ("; first of each kind in random order" if picked else ""))
    said = [
        f"row {one.row} of class {label(one.label)} is taken for {label(one.predicted[0])} with "
        f"{100 * one.confidence[0]:.0f} %, attacked for {label(one.predicted[1])} with {100 * one.confidence[1]:.0f} %"
        for one in found
    ]
    return fig, f"Held-out images, attacked and their perturbation times {factor:.3g}. {title}. {'; '.join(said)}."


def _verdict(ax: Axes, name: str, confidence: float, right: bool, wide: int) -> None:
    """Write below an image what it is taken for; right or wrong by word, sign and frame."""
    ax.set_xlabel(f"{'✓' if right else '✗'} {short(name, wide)}, {100 * confidence:.0f} %", fontsize=12)
    _frame(ax, right)


def _frame(ax: Axes, right: bool) -> None:
    for spine in ax.spines.values():
        spine.set_color(GREEN if right else VERMILLION)
        spine.set_linewidth(3)
        spine.set_linestyle("-" if right else "--")


def gallery(found: Sequence[Retrieved], title: str, label: Name) -> tuple[Figure, str]:
    """Draw a row for each query: it, it under attack, its nearest training images with class and similarity."""
    shown = len(found[0].rows)
    side = 9.0 / (shown + 2)
    fig = figure(len(found) * (side + 0.35) + 0.9)
    axes = fig.subplots(len(found), shown + 2, squeeze=False)
    wide = 12 if shown <= 6 else 8
    for row, one in zip(axes, found, strict=True):
        query = one.query
        picture(row[0], query.clean)
        picture(row[1], query.attacked)
        row[0].set_xlabel(f"class {short(label(query.label), wide)}", fontsize=12)
        row[1].set_xlabel(f"{'✓' if one.success else '✗'} vote: {short(label(one.predicted), wide)}", fontsize=12)
        row[0].set_ylabel("success" if one.success else "failure", fontweight="bold")
        _frame(row[1], one.success)
        for ax, image, near, similarity in zip(row[2:], one.pictures, one.labels, one.similarities, strict=True):
            picture(ax, image)
            right = near == query.label
            ax.set_xlabel(f"{'✓' if right else '✗'} {short(label(near), wide)}  {similarity:.2f}", fontsize=12)
            _frame(ax, right)
    for column, text in enumerate(("query", "attacked")):
        axes[0, column].set_title(text)
    heading = axes[0, 2].text(0, 1.07, "nearest training images: class, similarity", transform=axes[0, 2].transAxes)
    heading.set_in_layout(False)  # it spans columns: the layout would widen the first
    fig.suptitle(f"{title}; vote: of {VOTERS}")
    said = [
        f"row {one.query.row} of class {label(one.query.label)}: neighbours of "
        f"{', '.join(label(near) for near in one.labels)}, vote of {VOTERS} for {label(one.predicted)}"
        for one in found
    ]
    return fig, f"Nearest training images of attacked queries. {title}. {'; '.join(said)}."
