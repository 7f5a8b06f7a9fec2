"""The commands `bench attack`, `step` and `ladder`: words to settings, a report to a table. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fasttht.bench.finish import check_output, finish
from fasttht.config import Many
from fasttht.errors import UsageError

if TYPE_CHECKING:
    from cyclopts import App

Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
EngineName = Literal["backward", "eager", "folded", "compiled", "fused", "torchattacks", "foolbox"]
ENGINES: tuple[EngineName, ...] = ("backward", "eager", "folded", "compiled", "fused", "torchattacks", "foolbox")


def attack(
    *,
    engines: Annotated[tuple[EngineName, ...], Many] = ENGINES,
    arch: Arch = "resnet50",
    stem: Literal["imagenet", "small"] = "imagenet",
    width: int = 64,
    batch_size: int = 8,
    img_size: int = 224,
    steps: int = 10,
    windows: int = 5,
    cpu: bool = False,
    output: Path | None = None,
) -> int:
    """Measure PGD: every attack engine, and torchattacks and foolbox where they are installed.

    One network, batch and start for all; each peer in the memory layout that it is faster with. The last line of
    stdout is the report as JSON.

    Parameters
    ----------
    engines
        Which to measure. backward: what most public code does, weight gradients and training-mode BN.
    steps
        Steps of each attack.
    windows
        Attacks per engine, in turn, after one to warm up.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    """
    if not engines:
        raise UsageError(f"--engines: expected one or more of {', '.join(ENGINES)}, got none; name them or drop it")
    _check(
        {"--width": width, "--batch-size": batch_size, "--img-size": img_size, "--steps": steps, "--windows": windows}
    )
    check_output(output)
    from fasttht import log
    from fasttht.bench.attack import Settings, measure

    settings = Settings(
        engines=tuple(dict.fromkeys(engines)), arch=arch, stem=stem, width=width, batch_size=batch_size,
        img_size=img_size, steps=steps, windows=windows, cpu=cpu,
    )  # fmt: skip
    with log.console.status("bench attack") as status:
        report = measure(settings, progress=status.update)
    ran = [row for row in report["rows"] if "img_per_s" in row]
    log.table(
        f"{report['settings']['attack']} on {arch}, batch {batch_size}, {img_size} px, {_machine(report)}",
        ("engine", "img/s", "ms", "ratio", "quartiles", "signs %", "zeros %"),
        (
            (
                row["name"],
                f"{row['img_per_s']:.2f}",
                f"{row['ms']:,.0f}",
                f"{row['ratio']:.2f}",
                "{:.2f}-{:.2f}".format(*row["ratio_quartiles"]),
                f"{row['sign_agreement_pct']:.2f}" if "sign_agreement_pct" in row else "",
                f"{row['zero_grad_pct']:.2f}" if "zero_grad_pct" in row else "",
            )
            for row in ran
        ),
    )
    log.say(
        f"ratio: to {ran[0]['ratio_to']}, in the same window; signs: share that agrees with eager's float32 gradient; "
        "zeros: share of exact zeros in it"
    )
    for row in report["rows"]:
        if "not_run" in row:
            log.say(f"{row['name']}: not run: {row['not_run']}")
    finish(report, output)
    return 0


def step(
    *,
    arch: Arch = "resnet50",
    stem: Literal["imagenet", "small"] = "imagenet",
    width: int = 64,
    batch_size: int = 8,
    img_size: int = 224,
    steps: int = 10,
    replay: int = 4,
    attack_engine: Literal["auto", "eager", "folded", "compiled", "fused"] = "auto",
    windows: int = 5,
    cpu: bool = False,
    output: Path | None = None,
) -> int:
    """Measure training steps: what a THAT step and a free minibatch cost in clean training steps.

    Same network, batch and update; images lie on the device. The last line of stdout is the report as JSON.

    Parameters
    ----------
    steps
        PGD steps of the THAT step.
    replay
        Replays of the free minibatch.
    windows
        Steps of each kind, in turn, after one to warm up.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    """
    if replay < 2:
        raise UsageError(f"--replay: expected 2 or more, got {replay}; 1 is no replay at all")
    _check(
        {"--width": width, "--batch-size": batch_size, "--img-size": img_size, "--steps": steps, "--windows": windows}
    )
    check_output(output)
    from fasttht import log
    from fasttht.bench.step import Settings, measure

    settings = Settings(
        arch=arch, stem=stem, width=width, batch_size=batch_size, img_size=img_size, steps=steps, replay=replay,
        engine=attack_engine, windows=windows, cpu=cpu,
    )  # fmt: skip
    with log.console.status("bench step") as status:
        report = measure(settings, progress=status.update)
    log.table(
        f"training steps of {arch}, batch {batch_size}, {img_size} px, {_machine(report)}",
        ("step", "engine", "img/s", "ms", "clean steps", "quartiles"),
        (
            (
                row["name"],
                row["engine"] or "",
                f"{row['img_per_s']:.2f}",
                f"{row['ms']:,.0f}",
                f"{row['clean_steps']:.2f}",
                "{:.2f} to {:.2f}".format(*row["clean_steps_quartiles"]),
            )
            for row in report["rows"]
        ),
    )
    finish(report, output)
    return 0


def ladder(*, arch: Arch = "resnet50", img_size: int = 224, output: Path | None = None) -> int:
    """Count what one input gradient of each rung asks of a GPU: launches, activation bytes, waits. Nothing is timed.

    The last line of stdout is the report as JSON.

    Parameters
    ----------
    output
        Also append the JSON line to this file.
    """
    if arch in ("resnet18", "resnet34"):
        raise UsageError(f"--arch: expected resnet50, resnet101 or resnet152, got {arch}; the model counts bottlenecks")
    _check({"--img-size": img_size})
    check_output(output)
    from fasttht import log
    from fasttht.bench.ladder import RUNGS, count_rung, predicted_bytes

    rows = []
    for rung, what in RUNGS.items():
        count = count_rung(rung, arch, img_size)
        rows.append(
            {
                "name": rung, "what": what, "launches": count.launches, "mb_per_image": count.num_bytes / 1e6,
                "predicted_mb": predicted_bytes(rung, arch, img_size) / 1e6,
                "waits": count.waits, "collectives": count.collectives,
            }
        )  # fmt: skip
    log.table(
        f"one input gradient of {arch}, {img_size} px, float16, counted",
        ("rung", "what", "launches", "MB an image", "predicted", "waits"),
        (
            (
                row["name"],
                row["what"],
                row["launches"],
                f"{row['mb_per_image']:.1f}",
                f"{row['predicted_mb']:.1f}",
                row["waits"],
            )
            for row in rows
        ),
    )
    finish({"bench": "ladder", "settings": {"arch": arch, "img_size": img_size}, "rows": rows}, output)
    return 0


def register(app: App) -> None:
    """Add these to the bench commands."""
    for command in (attack, step, ladder):
        app.command(command)


def _check(values: dict[str, int]) -> None:
    for flag, value in values.items():
        if value < 1:
            raise UsageError(f"{flag}: expected 1 or more, got {value}; drop it for the default")


def _machine(report: dict[str, Any]) -> str:
    env = report["env"]
    return env["gpu"] or f"{env['cpu']}, {env['threads']} threads"
