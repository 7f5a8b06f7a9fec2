"""Several processes that train one network: who they are, and every exchange between them, each under its name.

Start them with `torchrun --nproc-per-node N -m fasttht train ...`: NCCL between GPUs, gloo between CPUs. Each process
(rank) holds the whole network and takes a contiguous slice of every global batch.

What passes between hosts (stop signals, checks, names of files) has a gloo group of its own, so that it neither waits
for a GPU nor gets between the gradients. All exchanges go through a `World`; where one fails, its error says which
rank is missing (`roll_call.py`). A world of one process has no group, and each of its exchanges is an `if`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fasttht import log
from fasttht.errors import FastthtError, Interrupted, PeerError, UsageError
from fasttht.regions import region
from fasttht.roll_call import RollCall

T = TypeVar("T")

# NCCL ends a process by itself when one of its exchanges takes too long. It says less than we do: it comes second.
_NCCL_LATER_S = 60.0


class Pending:
    """An exchange under way. wait: block until its tensors hold the result; on CUDA the stream waits, not the host."""

    def __init__(self, world: World, name: str, work: dist.Work) -> None:
        self._world, self._name, self._work = world, name, work

    def wait(self) -> None:
        """Raises: PeerError if another rank is gone or too slow."""
        with self._world.exchange(self._name):
            self._work.wait()


class World:
    """The processes of one run, seen from one of them.

    rank counts from 0 over all machines, local_rank on this one. calls counts the exchanges so far, by name.
    Every method is to be called by all ranks, in the same order. Raises from all: PeerError if a rank is missing.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        device: torch.device | None = None,
        control: dist.ProcessGroup | None = None,
        roll_call: RollCall | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.calls: Counter[str] = Counter()
        self._control, self._roll_call = control, roll_call

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        return self  # a copied network talks to the same processes

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def rows(self, total: int, rank: int | None = None) -> slice:
        """Return a rank's slice (its own by default) of a global batch of `total` images, as EpochPlan cuts it."""
        rank = self.rank if rank is None else rank
        return slice(total * rank // self.size, total * (rank + 1) // self.size)

    def counts(self, total: int) -> list[int]:
        """Return how many of `total` images each rank has."""
        slices = [self.rows(total, rank) for rank in range(self.size)]
        return [rows.stop - rows.start for rows in slices]

    @contextmanager
    def exchange(self, name: str) -> Iterator[None]:
        """Say what is being waited for while inside. Raises: PeerError in place of what a broken group raises."""
        assert self._roll_call is not None, "there are other ranks"
        self._roll_call.doing = name
        try:
            with region("comm"):
                yield
        except RuntimeError as error:
            raise self._roll_call.take(name, error) from None
        self._roll_call.doing = "its own work"

    def at(self, step: int) -> None:
        """Note the step that this rank takes, for others to name it by."""
        if self._roll_call is not None:
            self._roll_call.step = step

    # -- tensors ---------------------------------------------------------------------------------------------------

    def sum_later(self, name: str, tensor: Tensor) -> Pending:
        """Begin to sum a tensor over ranks, in place; the same bits arrive at every rank."""
        self.calls[name] += 1
        with self.exchange(name):
            work = dist.all_reduce(tensor, async_op=True)
        assert work is not None, "there are other ranks"
        return Pending(self, name, work)

    def sum_(self, name: str, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place, and return it."""
        if self.size > 1:
            self.sum_later(name, tensor).wait()
        return tensor

    def gather_rows(self, name: str, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, rank 0's first: (sum(counts), ...), contiguous. counts: rows of each rank."""
        if self.size == 1:
            return tensor
        self.calls[name] += 1
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in counts]
        with self.exchange(name):
            dist.all_gather(found, padded)
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])

    def trade_rows(self, name: str, tensor: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """Send each rank its rows, rank 0's first, and return those that all ranks sent here, rank 0's first.

        sends, receives: how many go to and come from each rank.
        """
        self.calls[name] += 1
        found = tensor.new_empty((sum(receives), *tensor.shape[1:]))
        with self.exchange(name):
            dist.all_to_all_single(found, tensor.contiguous(), receives, sends)
        return found

    def collect_rows(self, name: str, tensor: Tensor, counts: Sequence[int]) -> Tensor | None:
        """Return the rows of all ranks, rank 0's first, on rank 0's CPU, one rank's at a time; None elsewhere."""
        self.calls[name] += 1
        with self.exchange(name):
            if not self.main:
                dist.send(tensor.contiguous(), dst=0)
                return None
            parts = [tensor.cpu()]
            for rank in range(1, self.size):
                part = tensor.new_empty((counts[rank], *tensor.shape[1:]))
                dist.recv(part, src=rank)
                parts.append(part.cpu())
            return torch.cat(parts)

    # -- between hosts ---------------------------------------------------------------------------------------------

    def ask(self, name: str, value: int) -> Callable[[], int]:
        """Begin to find the largest value of any rank; what is returned waits for it, and not for the device."""
        if self.size == 1:
            return lambda: value
        self.calls[name] += 1
        largest = torch.tensor(value)
        with self.exchange(name):
            work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None, "there are other ranks"
        pending = Pending(self, name, work)

        def answer() -> int:
            pending.wait()
            return int(largest)

        return answer

    def everybodys(self, name: str, value: T) -> list[T]:
        """Return the values of all ranks, rank 0's first. Values are what JSON can hold."""
        if self.size == 1:
            return [value]
        self.calls[name] += 1
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.exchange(name):
            lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor(len(text)), group=self._control)
            longest = max(int(length) for length in lengths)
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(found, torch.cat([text, text.new_zeros(longest - len(text))]), group=self._control)
        pairs = zip(found, lengths, strict=True)
        return [json.loads(bytes(row[: int(length)].tolist())) for row, length in pairs]

    def agree(self, name: str, value: str) -> None:
        """Check that every rank has the same. Raises: UsageError, on all of them, naming the first that differs."""
        for rank, other in enumerate(found := self.everybodys(name, value)):
            if other != found[0]:
                raise UsageError(
                    f"rank {rank}: expected the {name} of rank 0, {_short(found[0])}, got {_short(other)}; start every "
                    "process with the same command, release and files"
                )

    def on_main(self, name: str, work: Callable[[], T]) -> T:
        """Do something on rank 0 and return its result, which JSON can hold, everywhere.

        Raises: what it raised there; elsewhere PeerError.
        """
        if self.size == 1:
            return work()
        result: Any = None
        problem: Exception | None = None
        if self.main:
            try:
                result = work()
            except Exception as error:  # told to the others first: they wait
                problem = error
        failed, result = self.everybodys(name, [_sentence(problem), result])[0]
        if problem is not None:
            raise problem
        if failed is not None:
            raise PeerError(f"rank 0 could not go on: {failed}", told=True)
        return result  # type: ignore[no-any-return]

    def barrier(self, name: str) -> None:
        """Wait for all ranks. Raises: PeerError naming those that did not come."""
        if self.size > 1:
            self.everybodys(name, 0)


SOLO = World()

# Whether this process has left a group that was broken, or broken it: then it can only end.
lost = False


def _sentence(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, FastthtError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."


def processes() -> int:
    """Return how many processes were started to train together. Raises: UsageError."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or not int(text):
        raise UsageError(f"WORLD_SIZE: expected a number of processes, got {text}; torchrun sets it")
    return int(text)


@contextmanager
def open_world(device: torch.device, *, timeout_s: float) -> Iterator[World]:
    """Join the processes that torchrun started; SOLO if there is one only.

    timeout_s: how long an exchange may take before the run ends. Ranks other than 0 print nothing but errors. However
    this is left, the group ends; an error that this rank has alone is told to the others, whose runs end too. One that
    another rank has said already gets a true `told`.

    Raises: UsageError if the environment is not torchrun's; PeerError if not all processes come.
    """
    if processes() == 1:
        yield SOLO
        return
    try:
        rank, size = int(os.environ["RANK"]), processes()
        _ = os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE {processes()}: expected torchrun's environment beside it, got none or another value of "
            f"{error}; start with torchrun --nproc-per-node N -m fasttht train"
        ) from None
    roll_call = None
    try:
        world, roll_call = _join(rank, size, device, timeout_s)
        log.speak_as(rank)
        yield world
        world.barrier("end")
    except BaseException as error:
        if roll_call is not None:
            sentence = _sentence(error) or ""
            if not roll_call.first(sentence) and isinstance(error, Exception):
                error.told = True  # type: ignore[attr-defined]
            if not isinstance(error, Interrupted):  # all ranks stop there together
                roll_call.report(sentence)
        raise
    finally:
        global lost
        lost = roll_call is not None and roll_call.broken
        if roll_call is not None:
            roll_call.close()
        # After a failure exchanges may be under way that nobody will answer, and ending their threads would wait.
        if not lost and dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _round(store: Store, rank: int, size: int) -> str:
    """Return a name for this start of the group, the same on all ranks.

    torchrun keeps one store over restarts, in which the addresses of the last group's processes still stand. It counts
    restarts after a failure, but not those for a machine that came or went: every rank counts its own as well.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    number = store.add(f"fasttht/{restarts}/{size}/{rank}", 1)
    return f"fasttht/{restarts}/{size}/start{number}"


def _join(rank: int, size: int, device: torch.device, timeout_s: float) -> tuple[World, RollCall]:
    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        store = PrefixStore(_round(store, rank, size), store)
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout + timedelta(seconds=_NCCL_LATER_S if cuda else 0),
            device_id=device if cuda else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        dist.monitored_barrier(control, timeout=timeout, wait_all_ranks=True)
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeerError(
            f"start: expected {size} processes within {timeout_s:g} s, got: {first[:300]}; look at the first that "
            "failed, or raise --dist-timeout"
        ) from None
    assert control is not None, "every rank is in it"
    roll_call = RollCall(PrefixStore("roll", store), rank, size, timeout_s=timeout_s)
    return World(rank, size, device=device, control=control, roll_call=roll_call), roll_call
