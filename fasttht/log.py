"""What people see: a live bar on a terminal, plain lines in a pipe, tables at the end. The only room that prints."""

from __future__ import annotations

import os
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

# Of several processes: which one this is; see speak_as.
_rank: int | None = None


def say(text: str, *, anywhere: bool = False) -> None:
    """Print one line for people; of several processes rank 0 only, unless it is to be said `anywhere`."""
    if anywhere and console.quiet:
        sys.stdout.write(f"{text}\n")
    console.print(text, markup=False, soft_wrap=True)


def speak_as(rank: int) -> None:
    """Speak as one of several processes: only rank 0 prints, but for errors, which are printed with their rank."""
    global _rank
    _rank = rank
    console.quiet = rank > 0


def fail(text: str) -> None:
    """Print the one line that ends a command to stderr, one line also where a name in it has line breaks."""
    line = " ".join(text.split())
    if _rank is not None:
        sys.stderr.write(f"fasttht: rank {_rank}: {line}\n")
    elif int(os.environ.get("RANK", "0")) == 0:  # before processes know of each other, what one finds all find
        sys.stderr.write(f"fasttht: {line}\n")


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
    """Print an evaluation row as a table: accuracy in percent and the exact count; what was measured of the attacks."""
    images = int(row["images"])
    names = [name.removesuffix("_top1") for name in row if name.endswith("_top1")]
    measured = {"success %": "_asr", "zero grad %": "_zero_grad_pct"}
    columns = {title: end for title, end in measured.items() if any(f"{name}{end}" in row for name in names)}
    table(
        title,
        ("attack", "top-1 %", "correct", *columns),
        (
            (
                name.replace("_", " "),
                f"{row[f'{name}_top1']:.2f}",
                f"{round(row[f'{name}_top1'] * images / 100)}/{images}",
                *(f"{row[name + end]:.2f}" if name + end in row else "" for end in columns.values()),
            )
            for name in names
        ),
    )


class EvalScreen:
    """Progress of an evaluation in passes of single images; a line with the accuracies so far now and then.

    so_far: read only when it is time for a line. `clock` counts seconds, `every` is how many lie between two lines.
    """

    def __init__(
        self,
        total: int,
        so_far: Callable[[], dict[str, str]],
        *,
        title: str = "evaluate",
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._screen = Screen(title, total, "image steps")
        self._so_far, self._clock, self._every = so_far, clock, every
        self._start = self._shown = clock()

    def __enter__(self) -> EvalScreen:
        self._screen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._screen.__exit__(None, None, None)

    def advance(self, images: int) -> None:
        """Count one more pass over so many images."""
        self._screen.advance(self._screen.done + images)
        now = self._clock()
        if now - self._shown < self._every:
            return
        self._shown = now
        speed = self._screen.done / (now - self._start)
        left = timedelta(seconds=round((self._screen.total - self._screen.done) / speed))
        self._screen.figures({"image steps/s": f"{speed:,.0f}", "ETA": str(left)} | self._so_far())


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
