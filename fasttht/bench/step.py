"""What an adversarial training step costs in clean ones: the same network, batch, update and machine, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fasttht.attacks.pgd import Draw
from fasttht.bench.env import environment
from fasttht.bench.jobs import summarise_jobs, time_jobs
from fasttht.bench.windows import Progress
from fasttht.build import amp_dtype_of, build_model, build_schedule
from fasttht.config import AttackConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.state import TrainState
from fasttht.steps import free_step, standard_step

CLEAN = "clean"
_NUM_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: a clean step, a THAT step of `steps` PGD steps, and a free minibatch of `replay` replays."""

    arch: str
    stem: str
    width: int
    batch_size: int
    img_size: int
    steps: int
    replay: int
    engine: str
    windows: int
    cpu: bool = False


def measure(settings: Settings, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. clean_steps is the cost of a step in clean ones.

    Images lie on the device, so no data are waited for. g is frozen, as in the paper.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
    names = {
        CLEAN: (CLEAN, 1),
        f"that-pgd{settings.steps}": ("that", 1),
        f"that-free{settings.replay}": ("that", settings.replay),
    }
    made = {name: _make_step(settings, objective, replay, device) for name, (objective, replay) in names.items()}
    seconds = time_jobs(
        {name: step for name, (step, _) in made.items()}, device, windows=settings.windows, progress=progress
    )
    rows = summarise_jobs(seconds, settings.batch_size, CLEAN)
    for row in rows:
        low, median, high = (
            1 / ratio for ratio in (row["ratio_quartiles"][1], row["ratio"], row["ratio_quartiles"][0])
        )
        row |= {"clean_steps": median, "clean_steps_quartiles": [low, high], "engine": made[row["name"]][1]}
    return {
        "bench": "step",
        "env": environment(device) | {"threads": torch.get_num_threads()},
        "settings": {
            "arch": settings.arch, "stem": settings.stem, "width": settings.width, "batch_size": settings.batch_size,
            "img_size": settings.img_size, "windows": settings.windows, "device": str(device),
        },
        "rows": rows,
    }  # fmt: skip


def _make_step(
    settings: Settings, objective: str, replay: int, device: torch.device
) -> tuple[Callable[[], None], str | None]:
    """Return a training step on images that lie on the device, and the attack engine it uses."""
    config = resolve(
        TrainConfig(
            model=ModelConfig(arch=settings.arch, stem=settings.stem, width=settings.width),  # type: ignore[arg-type]
            attack=AttackConfig(
                steps=settings.steps if objective != CLEAN and replay == 1 else None,
                replay=replay,
                attack_engine=settings.engine,  # type: ignore[arg-type]
            ),
            method=MethodConfig(objective=objective, clean_encoder="momentum"),  # type: ignore[arg-type]
            optim=OptimConfig(batch_size=settings.batch_size, lr=1e-6),
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
    num_done = 0

    def step() -> None:
        nonlocal num_done
        if replay > 1:
            free_step(state, config, batch)
        else:
            standard_step(state, config, batch, Draw(0, 0, num_done), num_classes=_NUM_CLASSES)
        num_done += 1

    return step, None if state.engine is None else state.engine.name


def _batch(settings: Settings, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.img_size, settings.img_size, 3)
    x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device).permute(0, 3, 1, 2)
    index = torch.arange(settings.batch_size, device=device)
    return Batch(x, index % _NUM_CLASSES, index)
