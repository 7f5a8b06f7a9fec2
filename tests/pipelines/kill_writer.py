"""Run by test_split_writer.py in a process of its own: kills the writer at many points, resumes it, compares bytes.

Arguments: image tree, folder to write in. Prints the number of kills.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttht.pipelines import split_writer
from fasttht.pipelines.writer import write_dataset

fsync = os.fsync
SOURCE, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
# What the writer does to files, told by the interpreter's own audit events.
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "shutil.copyfile", "shutil.rmtree"}


class Countdown:
    """Kills this process without warning at the event number `at`; events are images done and file operations."""

    def __init__(self, at: int | None) -> None:
        self.at, self.seen, self.last_image = at, 0, 0
        self.syncs: list[int] = []

    def __call__(self, *_: Any) -> None:
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def sync(self, descriptor: int) -> None:
        self.syncs.append(self.seen)
        self()
        fsync(descriptor)

    def image(self, *_: Any) -> None:
        self()
        self.last_image = self.seen

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(FOLDER) in str(arguments[0]):
            self()


def write(output: Path, countdown: Countdown, *, resume: bool) -> None:
    write_dataset(
        "folder", SOURCE, output, resume=resume, workers=2, on_error="skip", max_errors=0, progress=countdown.image
    )


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; return its status."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_write(output: Path, at: int, *, resume: bool) -> bool:
    """Write until event `at` kills it; return False if the write ended before."""

    def work() -> None:
        countdown = Countdown(at)
        sys.addaudithook(countdown.audit)
        os.fsync = countdown.sync
        write(output, countdown, resume=resume)

    status = in_child(work)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.iterdir()}


def count_events(output: Path) -> tuple[int, int, list[int]]:
    """Return the number of events of a whole write, of those up to the last image, and which wait for the disk."""
    report = FOLDER / "events"

    def work() -> None:
        countdown = Countdown(None)
        sys.addaudithook(countdown.audit)
        os.fsync = countdown.sync
        write(output, countdown, resume=False)
        os.write(descriptor, " ".join(map(str, (countdown.seen, countdown.last_image, *countdown.syncs))).encode())

    descriptor = os.open(report, os.O_CREAT | os.O_RDWR)
    assert in_child(work) == 0
    total, images, *syncs = map(int, report.read_text().split())
    return total, images, syncs


def main() -> None:
    split_writer.COMMIT_ROWS = 8
    total, images, syncs = count_events(FOLDER / "whole")
    expected = contents(FOLDER / "whole")
    assert sorted(expected) == ["train.beton", "train.beton.json", "val.beton", "val.beton.json"]
    # Spread over the images, then every wait for the disk (between images and journal there are some), and every file
    # operation of the end: the last table, the renames, the tidying up.
    points = sorted({round(i * images / 14) for i in range(14)} | {*syncs} | {*range(images, total)})
    for number, at in enumerate(points):
        output = FOLDER / f"killed-{number}"
        assert killed_write(output, at, resume=False), f"event {at} of {total} was not reached"
        if number % 2:  # half of them are killed again while they resume
            killed_write(output, 5 + number, resume=True)
        write(output, Countdown(None), resume=True)
        assert contents(output) == expected, f"killed at event {at} of {total}"
        shutil.rmtree(output)
    sys.stdout.write(f"{len(points)}\n")


main()
