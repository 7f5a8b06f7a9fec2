"""What decoding costs an attack that runs at the same time: the loader must leave the device to the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch

from fasttht.attacks.pgd import FP16_LOSS_SCALE, Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.bench.jobs import synchronize
from fasttht.bench.windows import Candidate, Clock, Progress, quartiles
from fasttht.models.two_head import TwoHead
from fasttht.pipelines import DataError
from fasttht.precision import fastest_kernels

# The paper's: 10 steps at 16/255, targeted.
_THREAT = Threat(eps=16 / 255, alpha=4 / 255, steps=10, targeted=True)

_NUM_CLASSES = 1000

# On a CPU there is nothing to leave free; a small network shows that the measurement works.
_CPU_BATCH_SIZE, _CPU_IMG_SIZE = 8, 32


class _Failed(Exception):
    """A candidate failed beside the attack, with its words; the attack itself did not."""


# How long a decoder may take to deliver its first batch, in seconds.
_START_LIMIT_S = 300.0


@fastest_kernels()
def measure_slowdown(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    workers: int,
    batch_size: int,
    img_size: int,
    windows: int,
    seconds: float,
    progress: Progress = lambda what: None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Time PGD-10 steps on images that lie on the device: alone, and while each candidate decodes at full speed.

    Windows take turns: alone, then beside each candidate, then alone again. ratio: median beside / median alone.
    On CUDA ResNet-50 in float16; on CPU a small ResNet-18, with `batch_size` and `img_size` of its own.
    """
    on_gpu = device.type == "cuda"
    if not on_gpu:
        batch_size, img_size = _CPU_BATCH_SIZE, _CPU_IMG_SIZE
    step = _attack_step(device, batch_size, img_size)
    _time_steps(step, device, 0.0, clock)  # warm-up: memory, and the choice of convolutions
    alone: list[float] = []
    beside: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    speeds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    failed: dict[str, str] = {}
    for i in range(windows):
        progress(f"attack alone: window {i + 1} of {windows}")
        alone.append(_time_steps(step, device, seconds, clock))
        for candidate in candidates:
            if candidate.name in failed:
                continue
            progress(f"attack beside {candidate.name}: window {i + 1} of {windows}")
            try:
                with _decoding(candidate, device) as count:
                    start, images = clock(), count()
                    beside[candidate.name].append(_time_steps(step, device, seconds, clock))
                    speeds[candidate.name].append((count() - images) / (clock() - start))
            except _Failed as error:
                failed[candidate.name] = str(error)
    low, median, high = quartiles(alone)
    return {
        "network": "resnet50" if on_gpu else "resnet18, small stem, width 4",
        "attack": "pgd10",
        "gradient": "autograd, BN in evaluation, " + ("float16 autocast" if on_gpu else "float32"),
        "batch_size": batch_size,
        "img_size": img_size,
        "workers": workers,
        "alone": {"step_ms": median, "quartiles": [low, high]},
        "rows": [
            {"name": name, "not_run": failed[name]} if name in failed else _row(name, own, median, speeds[name])
            for name, own in beside.items()
        ],
    }


def _row(name: str, step_ms: list[float], alone_ms: float, speeds: list[float]) -> dict[str, Any]:
    low, median, high = quartiles(step_ms)
    return {
        "name": name,
        "step_ms": median,
        "quartiles": [low, high],
        "ratio": median / alone_ms,
        "img_per_s": quartiles(speeds)[1],
    }


def _attack_step(device: torch.device, batch_size: int, img_size: int) -> Callable[[], None]:
    """Return one PGD-10 attack on a resident batch: input gradients by autograd, BN in evaluation."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if on_gpu:
            model = TwoHead("resnet50", _NUM_CLASSES)
        else:
            model = TwoHead("resnet18", _NUM_CLASSES, stem="small", width=4)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch_size, 3, img_size, img_size), generator=generator)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    index = torch.arange(batch_size, device=device)
    y = index % _NUM_CLASSES

    def logits(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.float16, enabled=on_gpu):
            found: torch.Tensor = model.logits(images)
            return found

    gradient = input_gradient(logits, FP16_LOSS_SCALE if on_gpu else 1.0)

    def step() -> None:
        with evaluating(model):
            attack(gradient, x, y, index, _THREAT, Draw(seed=0), num_classes=_NUM_CLASSES)

    return step


def _time_steps(step: Callable[[], None], device: torch.device, seconds: float, clock: Clock) -> float:
    """Run steps for at least `seconds`, one at the least; return milliseconds per step."""
    synchronize(device)
    start = end = clock()
    num_steps = 0
    while end - start < seconds or not num_steps:
        step()
        synchronize(device)  # once a step: the queue of launches stays as short as a training loop's
        num_steps += 1
        end = clock()
    return 1000 * (end - start) / num_steps


@contextmanager
def _decoding(candidate: Candidate, device: torch.device) -> Iterator[Callable[[], int]]:
    """Keep a candidate decoding in the background, its batches dropped; yield what counts its images so far.

    The block is entered once the first batch is there. Raises: DataError, or _Failed for what else it raised.
    """
    stop, delivered = threading.Event(), threading.Event()
    total, errors = [0], list[BaseException]()

    def consume() -> None:
        # On a stream of its own: on the default one every batch would wait for the attack's kernels before it.
        own = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(own) if own else nullcontext(), closing(candidate.batches()) as batches:
                for num in batches:
                    total[0] += num
                    delivered.set()
                    if stop.is_set():
                        return
        except BaseException as error:  # raised in the thread that measures
            errors.append(error)
        finally:
            delivered.set()

    thread = threading.Thread(target=consume, name="fasttht-bench-consumer", daemon=True)
    thread.start()
    try:
        if not delivered.wait(_START_LIMIT_S):
            raise _Failed(f"no batch within {_START_LIMIT_S:g} s")
        if not errors:
            yield lambda: total[0]
    finally:
        stop.set()
        thread.join(timeout=60)
    for error in errors:
        if isinstance(error, DataError):
            raise error
        raise _Failed(" ".join(f"{type(error).__name__}: {error}".split()))
