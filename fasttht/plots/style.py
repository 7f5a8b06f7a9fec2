"""How pictures look, and how a figure becomes bytes: the same data give the same bytes.

Figures are objects of their own (no pyplot, no global state); the reader's matplotlibrc is not asked. Okabe and Ito's
colours, which colour-blind people tell apart, always beside another mark: a marker, a line style or a word.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttht.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for a line on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

# 1000 pixels wide; text of 13 points is 18 pixels there and 14 where a page shows the picture 800 wide.
WIDTH, DPI = 10.0, 100
_STYLE: dict[str, Any] = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine has it
    "font.size": 13,
    "axes.titlesize": 13,
    "figure.titlesize": 14,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d9d9d9",
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "errorbar.capsize": 3.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
}


def check_installed() -> None:
    """Raises: UsageError if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('plot: expected the matplotlib package, got none; run: pip install "fasttht[plots]"')


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in here: matplotlib's defaults and the settings above, whatever the reader has set."""
    check_installed()
    from matplotlib import style

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in another script: boxes, no noise
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(fig: Figure, alt: str) -> bytes:
    """Return the figure as PNG; alt, what it shows in words, is kept in it. No transparency, date or version."""
    from PIL import Image, PngImagePlugin

    raw = io.BytesIO()
    fig.savefig(raw, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 0})
    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Description", alt)
    with Image.open(raw) as image:
        image.convert("RGB").save(out, format="PNG", optimize=True, pnginfo=info)
    return out.getvalue()


def colour(i: int) -> str:
    """Return the i-th colour; they repeat after the seventh, when markers and dashes have moved on."""
    return COLOURS[i % len(COLOURS)]


def marker(i: int) -> str:
    """Return the i-th marker."""
    return MARKERS[(i + i // len(MARKERS)) % len(MARKERS)]


def dashes(i: int) -> Any:
    """Return the i-th line style."""
    return DASHES[i % len(DASHES)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return what to call runs in a picture: their folders' names, or as much of the path as tells them apart."""
    resolved = [path.resolve() for path in paths]
    depth = 1
    names = [path.name for path in resolved]
    while len(set(names)) < len(set(resolved)):
        depth += 1
        names = [str(Path(*path.parts[-depth:])) for path in resolved]
    return [short(name) for name in names]


def short(text: str, length: int = 40) -> str:
    """Return text that a picture can hold: printable, cut in the middle, seen by legends (these skip `_...`)."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    if len(shown) > length:
        head = (length - 1) // 2
        shown = f"{shown[:head]}…{shown[len(shown) - (length - 1 - head) :]}"
    return f" {shown}" if shown.startswith("_") else shown


def picture(ax: Axes, image: Any) -> None:
    """Show image (H, W, 3) uint8; small ones keep their pixels, large ones are averaged down."""
    ax.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 100 else "antialiased")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color("#666666")
