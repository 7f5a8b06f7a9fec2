"""A whole attack as one CUDA graph: hundreds of launches become one, and the host is free while it runs.

The graph reads its images, classes, dataset rows and counters from buffers of its own, and the network's weights where
they lie: a `refresh_` in place, another seed, epoch or step, and other images are seen by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttht import log
from fasttht.attacks.pgd import Attacked, Draw
from fasttht.attacks.threat import Threat

# One for each shape and threat. Full and last batches, in two formats, fit; sizes that change all the time do not.
MAX_GRAPHS = 4

# What the allocator loses between tensors, as a share of the tensors.
_FRAGMENTATION = 0.1


class Attack(Protocol):
    """`attack_laid_out` of one network."""

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        threat: Threat,
        counters: Tensor,
        *,
        num_classes: int,
        soft_target: Tensor | None,
    ) -> Attacked: ...


class Recorder(Protocol):
    """What turns launches into something that is replayed."""

    def record(self, run: Callable[[], Attacked]) -> tuple[Attacked, Callable[[], None]]:
        """Return the tensors that every replay writes, and the replay.

        `run` may be called several times; its result is only there after a replay.

        Raises: RuntimeError where it cannot be recorded (torch.OutOfMemoryError is one).
        """
        ...


class CudaRecorder:
    """CUDA graphs of one device. They share a memory pool: attacks run one after the other, on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: object = None
        self._bytes = 0  # of the pool

    def record(self, run: Callable[[], Attacked]) -> tuple[Attacked, Callable[[], None]]:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            outside = torch.cuda.current_stream()
            try:
                return self._record(run, self._stream, outside)
            except RuntimeError:
                torch.cuda.empty_cache()
                raise
            finally:
                # A failed capture leaves its stream the current one.
                torch.cuda.set_stream(outside)

    def _record(
        self, run: Callable[[], Attacked], stream: torch.cuda.Stream, outside: torch.cuda.Stream
    ) -> tuple[Attacked, Callable[[], None]]:
        # Once outside the capture, on its stream: kernels are compiled and loaded, cuDNN's chosen, workspaces there.
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            run()
        outside.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # thread_local: the loader's thread allocates and copies meanwhile, which would end a global capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            attacked = run()
        # A graph's memory is its own from now on: what follows an attack in a step must find room beside it.
        pool = self._bytes + torch.cuda.memory_reserved() - before
        snapshot = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        others = bytes_of_other_pools(snapshot, torch.cuda.current_device(), self._pool)
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - others
        if not fits(pool, torch.cuda.max_memory_allocated(), room):
            graph.reset()
            raise torch.OutOfMemoryError(f"{pool / 2**30:.1f} GiB of graphs beside the rest of a step")
        self._bytes = pool
        return attacked, graph.replay


def bytes_of_other_pools(snapshot: Iterable[Mapping[str, Any]], device: int, own: object) -> int:
    """Return what an allocator's snapshot says is kept for graphs of other recorders: reserved, but free to nobody."""
    here = [part for part in snapshot if part["device"] == device]
    return sum(part["total_size"] for part in here if part["segment_pool_id"] not in ((0, 0), own))


def fits(graphs: int, step: int, room: int) -> bool:
    """Whether the bytes of graphs fit beside the peak of whole steps, and what is lost between tensors."""
    return graphs + step * (1 + _FRAGMENTATION) <= room


@dataclass(frozen=True)
class _Held:
    """A recorded attack: the buffers it reads, the tensors it writes and what runs it."""

    inputs: tuple[Tensor, ...]
    counters: Tensor
    attacked: Attacked
    replay: Callable[[], None]


class GraphedAttack:
    """An attack that is recorded once per shape, type and threat, and replayed from then on.

    The first of its kind runs unrecorded and the second is recorded: shapes that come once are not worth it, and by
    then the recorder knows what memory the rest of a step takes. Where no graph can be had (the capture fails, memory
    does not suffice, there are `max_graphs` already) it runs unrecorded, and `say` is told why in one line, once. Its
    results are copies: the next attack leaves them alone.
    """

    def __init__(
        self,
        run: Attack,
        recorder: Recorder,
        *,
        say: Callable[[str], None] = log.say,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self._run = run
        self._recorder = recorder
        self._say = say
        self._max_graphs = max_graphs
        self._held: dict[object, _Held] = {}
        self._seen: set[object] = set()
        self._failed = False
        self._told = False
        self._paused = False

    @property
    def recorded(self) -> bool:
        """Whether there is an attack that is replayed."""
        return bool(self._held)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run attacks unrecorded: what a replay does in one piece has its parts there. Recordings are kept."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        threat: Threat,
        draw: Draw,
        *,
        num_classes: int,
        soft_target: Tensor | None = None,
    ) -> Attacked:
        """Do what `pgd.attack` does; x_adv is channels-last."""
        inputs = (x, y, index) if soft_target is None else (x, y, index, soft_target)
        key = (tuple((tensor.shape, tensor.dtype) for tensor in inputs), threat, num_classes)
        held = None
        if not self._paused:
            held = self._held.get(key) or self._hold(key, inputs, threat, draw, num_classes)
        if held is None:
            counters = draw.counters(x.device)
            return self._run(x, y, index, threat, counters, num_classes=num_classes, soft_target=soft_target)
        for buffer, tensor in zip(held.inputs, inputs, strict=True):
            buffer.copy_(tensor.detach(), non_blocking=True)
        draw.write_(held.counters)
        held.replay()
        found = held.attacked
        return Attacked(found.x_adv.clone(), found.zero_grad.clone(), found.nan_grad.clone())

    def _hold(
        self, key: object, inputs: tuple[Tensor, ...], threat: Threat, draw: Draw, num_classes: int
    ) -> _Held | None:
        """Record the attack of these shapes, or say why not and return None."""
        if key not in self._seen or self._failed:
            self._seen.add(key)
            return None
        if len(self._held) >= self._max_graphs:
            self._tell(f"{self._max_graphs} shapes have one, and no more are kept")
            return None
        try:
            held = self._record(inputs, threat, draw, num_classes)
        except RuntimeError as error:
            why = _reason(error)
        else:
            self._held[key] = held
            return held
        # After the handler: the error's traceback kept the attack's tensors alive.
        self._failed = True
        self._tell(why)
        return None

    def _record(self, inputs: tuple[Tensor, ...], threat: Threat, draw: Draw, num_classes: int) -> _Held:
        x, *rest = inputs
        buffers = (x.detach().clone(memory_format=torch.channels_last), *(tensor.detach().clone() for tensor in rest))
        images, y, index, *soft = buffers
        counters = draw.counters(x.device)
        attacked, replay = self._recorder.record(
            lambda: self._run(
                images, y, index, threat, counters, num_classes=num_classes, soft_target=soft[0] if soft else None
            )
        )
        return _Held(buffers, counters, attacked, replay)

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"attack graph: some attacks run without one: {why}")


def _reason(error: RuntimeError) -> str:
    """Return one line for people. The end of a broken capture raises a second error, which hides the first."""
    cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    if isinstance(error, torch.OutOfMemoryError) or isinstance(cause, torch.OutOfMemoryError):
        return "its memory does not fit beside the rest"
    return (str(cause).splitlines() or [type(cause).__name__])[0]
