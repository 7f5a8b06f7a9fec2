"""How long a preset would train on this machine, from the speed of its own kind of step, measured in this run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasttht.config_file import QUICKSTART, from_flat, read_preset
from fasttht.errors import UsageError
from fasttht.resolve import passes, resolve

# ILSVRC 2012, the training split.
IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Plan:
    """What a preset asks for. step: the row of `bench step` that it consists of."""

    preset: str
    step: str
    images: int
    passes: int


def plan_preset(
    preset: str | None, *, arch: str, stem: str, width: int, img_size: int, steps: int, replay: int
) -> Plan | None:
    """Return the preset's plan, None for no preset.

    Raises: UsageError if what is measured is not what the preset runs: figures of one network say little of another's.
    """
    if preset is None:
        return None
    if preset == QUICKSTART:
        raise UsageError(f"--preset: expected a preset that trains on ImageNet, got {preset}; it takes minutes: run it")
    options = read_preset(preset)
    config = resolve(from_flat(options, where=f"preset {preset}"))
    free = config.attack.replay > 1
    if config.method.objective != "that" or config.model.denoise or options.get("clean_encoder") == "momentum":
        raise UsageError(
            f"--preset: expected one that trains plain THAT with a frozen clean encoder, got {preset}; "
            "hours are only told for a step that was measured"
        )
    wanted: list[tuple[str, object, object]] = [
        ("--arch", config.model.arch, arch), ("--stem", config.model.stem, stem),
        ("--width", config.model.width, width), ("--img-size", config.data.img_size, img_size),
        ("--replay", config.attack.replay, replay) if free else ("--steps", config.attack.steps, steps),
    ]  # fmt: skip
    for flag, expected, got in wanted:
        if expected != got:
            raise UsageError(
                f"{flag}: expected {expected} beside --preset {preset}, got {got}; "
                "hours are only told for a step that was measured"
            )
    assert config.optim.epochs is not None, "the config was resolved"
    row = f"that-free{replay}" if free else f"that-pgd{steps}"
    return Plan(preset, row, IMAGENET_IMAGES, passes(config, config.optim.epochs))


def hours(plan: Plan | None, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the report's entry: hours on one device, by the fastest row of the plan's step; None for no plan.

    Training alone: evaluation, and data that come too slowly, are not in it.
    """
    if plan is None:
        return None
    fitting = [row for row in rows if row["name"].split("/")[0] == plan.step]
    row = max(fitting, key=lambda row: float(row["img_per_s"]))
    return {
        "preset": plan.preset, "row": row["name"], "images": plan.images, "passes": plan.passes,
        "img_per_s": row["img_per_s"], "hours": plan.images * plan.passes / row["img_per_s"] / 3600,
    }  # fmt: skip
