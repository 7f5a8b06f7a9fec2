"""Several real processes for tests: forked from this one, which has imported torch, and joined over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttht.cli import main
from fasttht.distributed import World, open_world

FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """`size` processes, each of which calls work(rank) with torchrun's environment; what they print is in files."""

    def __init__(self, size: int, folder: Path, work: Callable[[int], Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, port = folder, free_port()
        self.processes = [FORK.Process(target=self._body, args=(rank, size, port, work)) for rank in range(size)]
        for process in self.processes:
            process.start()

    def _body(self, rank: int, size: int, port: int, work: Callable[[int], Any]) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        for number in (1, 2):
            os.dup2(os.open(self._folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = 0
        try:
            work(rank)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def text(self, rank: int) -> str:
        return (self._folder / f"rank{rank}.txt").read_text()

    def join(self, timeout_s: float = 60) -> list[int | None]:
        """Wait for all and return their exit codes; kills those that do not end, and fails."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        stuck = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        texts = "".join(f"--- rank {rank}\n{self.text(rank)}" for rank in range(len(self.processes)))
        assert not stuck, f"ranks {stuck} did not end within {timeout_s} s\n{texts}"
        return [process.exitcode for process in self.processes]


def in_world(size: int, folder: Path, work: Callable[[World], Any], *, timeout_s: float = 30) -> list[Any]:
    """Call work(world) in `size` joined processes and return what each returned (what torch can save)."""

    def body(rank: int) -> None:
        with open_world(torch.device("cpu"), timeout_s=timeout_s) as world:
            torch.save(work(world), folder / f"result{rank}.pt")

    ranks = Ranks(size, folder, body)
    codes = ranks.join()
    assert codes == [0] * size, "".join(ranks.text(rank) for rank in range(size))
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(size)]


def commands(size: int, folder: Path, words: Callable[[int], list[str]]) -> Ranks:
    """Start the command line in `size` processes, each with its own words."""
    return Ranks(size, folder, lambda rank: main(words(rank)))
