"""What an adversarial training step costs in clean ones: the same network, batch, update and machine, in one run.

And where its time goes: phases of a step watched in windows of their own (`phases.py`), what it reaches of the
machine's arithmetic and bandwidth, and which of them limits it (`cost.judge`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fasttht.attacks.graph import GraphedAttack
from fasttht.attacks.pgd import Draw
from fasttht.bench.attack import batch_size_of, device_of
from fasttht.bench.calls import peak_memory_gib
from fasttht.bench.cost import Step, judge, model_bytes, model_flops
from fasttht.bench.env import environment
from fasttht.bench.feed import LEAD, fed, training_images
from fasttht.bench.jobs import Job, summarise_jobs, time_jobs
from fasttht.bench.peaks import arithmetic_peak, copy_bandwidth
from fasttht.bench.phases import break_down
from fasttht.bench.trace import write_trace
from fasttht.bench.windows import Progress
from fasttht.build import amp_dtype_of, build_model, build_schedule
from fasttht.config import AttackConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, StepEngineName, TrainConfig
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.pipelines.loader import Batch
from fasttht.pipelines.samples import Samples
from fasttht.precision import fastest_kernels
from fasttht.resolve import resolve
from fasttht.state import TrainState
from fasttht.steps import free_step, standard_step

CLEAN = "clean"
_NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: a clean step, a THAT step of `steps` PGD steps, and a free minibatch of `replay` replays.

    step_engines: rungs of the training step's own ladder; each kind of step on each of them. data: what the phases'
    images are loaded from, by a decoder with as many threads as workers says (0: one per core); None: they lie there.
    """

    arch: str
    stem: str
    width: int
    batch_size: int | None
    img_size: int
    steps: int
    replay: int
    engine: str
    windows: int
    step_engines: tuple[StepEngineName, ...]
    cpu: bool = False
    data: Path | None = None
    loader: str = "turbo"
    workers: int = 0
    trace: Path | None = None
    probe_bytes: int | None = None
    probe_side: int | None = None


@dataclass(frozen=True)
class _Kind:
    """A row to be: its step, ready to run on images that lie there or on others, and what the method asks of it."""

    run: Job
    run_on: Callable[[Batch], None]
    cost: Step
    state: TrainState

    @property
    def step_engine(self) -> str:
        return self.state.step_engine.name

    @property
    def graphed(self) -> GraphedAttack | None:
        """What replays its attack, if something does by now."""
        found = getattr(self.state.engine, "graphed", None)
        return found if isinstance(found, GraphedAttack) and found.recorded else None


def described(settings: Settings) -> dict[str, Any]:
    """Return the report's settings."""
    device = device_of(settings.cpu)
    loaded = {"data": str(settings.data), "loader": settings.loader, "workers": settings.workers}
    return {
        "arch": settings.arch, "stem": settings.stem, "width": settings.width,
        "batch_size": _num_images(settings, device), "img_size": settings.img_size,
        "windows": settings.windows, "device": str(device),
    } | ({} if settings.data is None else loaded)  # fmt: skip


@fastest_kernels()
def measure(settings: Settings, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. clean_steps is the cost of a step in clean ones.

    Images lie on the device, so no data are waited for, but in the phases of settings with data. g is frozen, as in the
    paper. The clean step that others are compared with is the fastest here.

    Raises: UsageError, DataError for the data.
    """
    device = device_of(settings.cpu)
    samples = _samples(settings, device)  # refused now, and not after minutes of timing
    kinds: dict[str, _Kind] = {}
    for engine in settings.step_engines:
        suffix = f"/{engine}" if len(settings.step_engines) > 1 else ""
        for name, objective, replay in (
            (CLEAN, CLEAN, 1),
            (f"that-pgd{settings.steps}", "that", 1),
            (f"that-free{settings.replay}", "that", settings.replay),
        ):
            progress(f"{name}{suffix}: building it")
            kinds[name + suffix] = _make_step(settings, objective, replay, engine, device)
    jobs = {name: kind.run for name, kind in kinds.items()}
    seconds = time_jobs(jobs, device, windows=settings.windows, progress=progress)
    reference = min((name for name in kinds if name.startswith(CLEAN)), key=lambda name: median(seconds[name]))
    rows = summarise_jobs(seconds, _num_images(settings, device), reference)
    watched = _watch(kinds, settings, samples, device, progress)
    progress("copying and multiplying, for the machine's best")
    copy = copy_bandwidth(device, windows=settings.windows, buffer_bytes=settings.probe_bytes)
    peak = arithmetic_peak(device, windows=settings.windows, side=settings.probe_side)
    for row in rows:
        low, middle, high = (
            1 / ratio for ratio in (row["ratio_quartiles"][1], row["ratio"], row["ratio_quartiles"][0])
        )
        kind = kinds[row["name"]]
        row |= {"clean_steps": middle, "clean_steps_quartiles": [low, high]}
        row |= {"engine": kind.cost.engine, "step_engine": kind.step_engine}
        row |= watched[row["name"]]
        row |= _judged(row, kind.cost, settings, device, copy["gb_per_s"], peak["tflops"])
        row["gpu_mem_gib"] = peak_memory_gib(kind.run, device)
    traced = {} if settings.trace is None else write_trace(jobs, device, settings.trace)
    return {
        "bench": "step",
        "env": environment(device) | {"threads": torch.get_num_threads()},
        "settings": described(settings),
        "copy": copy,
        "peak": peak,
        "rows": rows,
    } | traced


def _watch(
    kinds: dict[str, _Kind], settings: Settings, samples: Samples | None, device: torch.device, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Return every kind's phases; of an attack that is replayed in one piece also its parts, run one by one.

    samples: what the images are loaded from; None: they lie on the device.
    """
    options: dict[str, Any] = {"windows": settings.windows, "progress": progress}
    if samples is None:
        found = break_down({name: kind.run for name, kind in kinds.items()}, device, **options)
    else:
        with fed(
            samples, device, _num_images(settings, device), settings.img_size,
            decoder=settings.loader, workers=settings.workers,
        ) as feed:  # fmt: skip
            jobs = {name: partial(_run_next, kind.run_on, feed) for name, kind in kinds.items()}
            found = break_down(jobs, device, lead=LEAD, **options)
    for name, kind in kinds.items():
        if (graphed := kind.graphed) is not None:
            with graphed.paused():
                kind.run()  # what is made on the first call is made before
                apart = break_down({name: kind.run}, device, **options)[name]["phases"]
            found[name]["attack_apart"] = [row for row in apart if row["name"].startswith("attack")]
            whole = next(row for row in found[name]["phases"] if row["name"] == "attack")
            whole["note"] = "one CUDA graph; attack_apart has its parts, run one by one"
    return found


def _run_next(run_on: Callable[[Batch], None], feed: Iterator[Batch]) -> None:
    run_on(next(feed))


def _judged(
    row: dict[str, Any], cost: Step, settings: Settings, device: torch.device, gb_per_s: float, tflops: float
) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    images = _num_images(settings, device)
    network = (settings.arch, settings.stem, settings.width, settings.img_size)
    flops = images * model_flops(cost, *network)
    num_bytes = model_bytes(cost, *network, itemsize=2 if on_gpu else 4)
    judged = judge(
        seconds=row["ms"] / 1000,
        host_share=row["host_ms"] / row["watched_ms"] if on_gpu else None,
        data_wait_pct=next(phase["pct"] for phase in row["phases"] if phase["name"] == "data_wait"),
        flops=flops,
        num_bytes=None if num_bytes is None else images * num_bytes,
        tflops=tflops,
        gb_per_s=gb_per_s,
    )
    return judged | {"model_gflop_per_image": flops / images / 1e9}


def _make_step(
    settings: Settings, objective: str, replay: int, step_engine: StepEngineName, device: torch.device
) -> _Kind:
    """Build a training step on images that lie on the device."""
    config = resolve(
        TrainConfig(
            model=ModelConfig(arch=settings.arch, stem=settings.stem, width=settings.width),  # type: ignore[arg-type]
            attack=AttackConfig(
                steps=settings.steps if objective != CLEAN and replay == 1 else None,
                replay=replay,
                attack_engine=settings.engine,  # type: ignore[arg-type]
            ),
            method=MethodConfig(objective=objective, clean_encoder="momentum"),  # type: ignore[arg-type]
            optim=OptimConfig(batch_size=_num_images(settings, device), lr=1e-6, step_engine=step_engine),
            run=RunConfig(device=str(device)),
        )
    )
    model = build_model(config, _NUM_CLASSES, device)
    encoder = CleanEncoder(model, frozen=True) if objective != CLEAN else None
    state = TrainState(
        config, model, encoder, build_schedule(config, 1000),
        img_size=settings.img_size, amp_dtype=amp_dtype_of(config, device),
    )  # fmt: skip
    batch = _batch(settings, device)
    name = None if state.engine is None else state.engine.name
    cost = Step(that=objective != CLEAN, attack_steps=settings.steps if name else 0, engine=name, replay=replay)
    run_on = _stepper(state, config, replay)
    return _Kind(partial(run_on, batch), run_on, cost, state)


def _stepper(state: TrainState, config: TrainConfig, replay: int) -> Callable[[Batch], None]:
    num_done = 0

    def step(batch: Batch) -> None:
        nonlocal num_done
        if replay > 1:
            free_step(state, config, batch, Draw(0))
        else:
            standard_step(state, config, batch, Draw(0, 0, num_done), num_classes=_NUM_CLASSES)
        num_done += 1

    return step


def _num_images(settings: Settings, device: torch.device) -> int:
    return batch_size_of(settings.batch_size, device)


def _samples(settings: Settings, device: torch.device) -> Samples | None:
    """Open what images are loaded from, None for none. Raises: UsageError, DataError for the data."""
    if settings.data is None:
        return None
    return training_images(settings.data, device, _num_images(settings, device), decoder=settings.loader)


def _batch(settings: Settings, device: torch.device) -> Batch:
    batch_size = _num_images(settings, device)
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, settings.img_size, settings.img_size, 3)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device).permute(0, 3, 1, 2)
    index = torch.arange(batch_size, device=device)
    return Batch(x, index % _NUM_CLASSES, index)
