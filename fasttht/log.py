"""What people see: a live bar on a terminal, plain lines in a pipe, tables at the end. The only room that prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False)


def say(text: str) -> None:
    """Print one line for people."""
    console.print(text, markup=False, soft_wrap=True)


def fail(text: str) -> None:
    """Print the one line that ends a command to stderr."""
    sys.stderr.write(f"fasttht: {text}\n")


class Screen:
    """Progress of one long job: a bar with figures on a terminal, a line per update elsewhere.

    Use as a context manager; `total` is in `unit`s, and `done` may start above zero after a resume.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Screen:
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, done: int) -> None:
        """Move the bar; silent in a pipe."""
        self.done = done
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def figures(self, values: dict[str, str]) -> None:
        """Print the newest figures as a line, above the bar where there is one."""
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        say(f"{self.title} {self.done}/{self.total} {self.unit}  {text}")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table under its title; the first column is text, the others are numbers."""
    say(title)
    out = Table()
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*(str(cell) for cell in row))
    console.print(out)


def scores(title: str, row: dict[str, Any]) -> None:
    """Print an evaluation row as a table: accuracy in percent and the exact count."""
    images = int(row["images"])
    names = [name for name in row if name.endswith("_top1")]
    table(
        title,
        ("attack", "top-1 %", "correct"),
        (
            (
                name.removesuffix("_top1").replace("_", " "),
                f"{row[name]:.2f}",
                f"{round(row[name] * images / 100)}/{images}",
            )
            for name in names
        ),
    )


class WriteScreen:
    """Progress of a data set being written or verified: one bar per file, or a line every few seconds in a pipe.

    `clock` counts seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._screen: Screen | None = None
        self._start = self._shown = 0.0
        self._skip = self._skip_bytes = 0

    def __enter__(self) -> WriteScreen:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._screen is not None:
            self._screen.__exit__(None, None, None)

    def advance(
        self,
        title: str,
        done: int,
        total: int,
        num_bytes: int,
        *,
        resumed: int = 0,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Move the bar of the file `title` to `done` images and `num_bytes`; the first call of a file opens it.

        `resumed` images were there before this run, and are not part of its speed.
        """
        now = self._clock()
        if self._screen is None or self._screen.title != title:
            self.__exit__()
            self._screen = Screen(title, total, "images", done=resumed).__enter__()
            self._start = self._shown = now
            self._skip, self._skip_bytes = done, num_bytes
            if resumed:
                say(f"{title}: {resumed:,} of {total:,} images were there")
        self._screen.advance(done)
        if now - self._shown < (0.5 if console.is_terminal else 5.0):
            return
        self._shown = now
        speed = (done - self._skip) / (now - self._start)
        figures = {
            "img/s": f"{speed:,.0f}",
            "MB/s": f"{(num_bytes - self._skip_bytes) / (now - self._start) / 1e6:.1f}",
            "ETA": f"{timedelta(seconds=round((total - done) / speed))}" if speed else "unknown",
        }
        self._screen.figures(figures | {name: f"{count:,}" for name, count in (counts or {}).items()})
