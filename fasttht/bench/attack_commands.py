"""The commands `bench attack`, `zeros` and `ladder`: words to settings, a report to a table. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from fasttht.bench.finish import check_output, check_positive, figure, finish, machine
from fasttht.config import Many
from fasttht.errors import UsageError

if TYPE_CHECKING:
    from cyclopts import App

Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
EngineName = Literal[
    "backward", "eager-batch", "eager", "folded", "compiled", "fused", "torchattacks", "foolbox", "art"
]
ENGINES: tuple[EngineName, ...] = (
    "backward", "eager-batch", "eager", "folded", "compiled", "fused", "torchattacks", "foolbox", "art",
)  # fmt: skip


def attack(
    *,
    engines: Annotated[tuple[EngineName, ...], Many] = ENGINES,
    arch: Arch = "resnet50",
    stem: Literal["imagenet", "small"] = "imagenet",
    width: int = 64,
    batch_size: int | None = None,
    img_size: int = 224,
    steps: int = 10,
    windows: int = 5,
    cpu: bool = False,
    output: Path | None = None,
    compare: Path | None = None,
    trace: Path | None = None,
) -> int:
    """Measure PGD: every attack engine, and torchattacks, foolbox and ART where they are installed.

    One network, batch and start for all; each peer in the fastest of four memory layouts. The last line of
    stdout is the report as JSON.

    Parameters
    ----------
    engines
        Which to measure. backward: what most public code does, weight gradients and training-mode BN.
    batch_size
        Images. Default: 8, on a CUDA device 128.
    steps
        Steps of each attack.
    windows
        Attacks per engine, in turn, after one to warm up.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    compare
        Set each row beside that of an older --output: the newest report in it, of this machine and these settings.
    trace
        Write one attack of each as a Chrome trace, .json or .json.gz, with the regions of the attack named.
    """
    if not engines:
        raise UsageError(f"--engines: expected one or more of {', '.join(ENGINES)}, got none; name them or drop it")
    check_positive({"--width": width, "--img-size": img_size, "--steps": steps, "--windows": windows})
    check_positive({"--batch-size": 1 if batch_size is None else batch_size})
    check_output(output)
    from fasttht import log
    from fasttht.bench import compare as comparison
    from fasttht.bench.attack import Settings, described, device_of, measure
    from fasttht.bench.trace import check_trace, show_trace

    check_trace(trace)
    settings = Settings(
        engines=tuple(dict.fromkeys(engines)), arch=arch, stem=stem, width=width, batch_size=batch_size,
        img_size=img_size, steps=steps, windows=windows, cpu=cpu, trace=trace,
    )  # fmt: skip
    old = comparison.open_report(compare, "attack", described(settings), device_of(cpu))
    with log.console.status("bench attack") as status:
        report = measure(settings, progress=status.update)
    comparison.compare(old, report)
    _show_attack(report)
    comparison.show(report)
    show_trace(trace, report)
    finish(report, output)
    return 0


def _show_attack(report: dict[str, Any]) -> None:
    from fasttht import log

    settings, ran = report["settings"], [row for row in report["rows"] if "img_per_s" in row]
    if ran:
        log.table(
            f"{settings['attack']} on {settings['arch']}, batch {settings['batch_size']}, "
            f"{settings['img_size']} px, {machine(report)}",
            ("engine", "img/s", "ms", "ratio", "quartiles", "signs %", "zeros %"),
            (
                (
                    row["name"],
                    f"{row['img_per_s']:.2f}",
                    f"{row['ms']:,.0f}",
                    f"{row['ratio']:.2f}",
                    "{:.2f}-{:.2f}".format(*row["ratio_quartiles"]),
                    figure(row.get("sign_agreement_pct"), "{:.2f}"),
                    figure(row.get("zero_grad_pct"), "{:.2f}"),
                )
                for row in ran
            ),
        )
        log.say(
            f"ratio: to {ran[0]['ratio_to']}, in the same window; signs: share that agrees with eager's float32 "
            "gradient; zeros: share of exact zeros in it"
        )
        _show_rungs(ran)
    for row in report["rows"]:
        if "not_run" in row:
            log.say(f"{row['name']}: not run: {row['not_run']}")
        elif "not_counted" in row:
            log.say(f"{row['name']}: timed, but not all of it counted: {row['not_counted']}")


def _show_rungs(ran: list[dict[str, Any]]) -> None:
    from fasttht import log

    log.table(
        "the ladder, and what one attack step asks for",
        ("engine", "rung", "speed-up", "predicted", "launches", "waits", "GiB"),
        (
            (
                row["name"],
                row.get("rung", ""),
                figure(row.get("speedup"), "{:.2f}"),
                figure(row.get("predicted_speedup"), "{:.2f}"),
                figure(row.get("launches_per_step"), "{:,.0f}"),
                figure(row.get("waits_per_step")),
                figure(row.get("gpu_mem_gib"), "{:.2f}"),
            )
            for row in ran
        ),
    )
    for found in (row["fused_conv_shapes"] for row in ran if "fused_conv_shapes" in row):
        log.say(f"fused: cuDNN's own conv+ReLU kernels for {found['cudnn']} shapes, two passes for {found['plain']}")
    lowest = next((row["speedup_to"] for row in ran if "rung" in row), None)
    if lowest is not None:
        log.say(f"speed-up: over {lowest}; predicted: by the byte model, for a GPU that is bound by bandwidth")
    if {row.get("counted_by") for row in ran} <= {"dispatch", "meta", None}:
        log.say("launches and waits: torch's operators, as a GPU would be asked for them; memory: not measured")


def zeros(
    *,
    dtypes: Annotated[tuple[Literal["fp16", "bf16"], ...], Many] = ("fp16", "bf16"),
    exponents: Annotated[tuple[int, ...], Many] = (0, 2, 4, 6, 8, 10, 12, 14),
    arch: Arch = "resnet50",
    stem: Literal["imagenet", "small"] = "imagenet",
    width: int = 64,
    batch_size: int | None = None,
    img_size: int = 224,
    cpu: bool = False,
    output: Path | None = None,
) -> int:
    """Look for input gradients that half precision turns to zero: their share against the loss scale, mean and sum.

    Nothing is timed. On a CPU half precision is slow: give a small network. The last line of stdout is the report.

    Parameters
    ----------
    exponents
        Powers of two to multiply the loss by, -40 to 40.
    batch_size
        Images. Default: 8, on a CUDA device 128. What a mean divides by.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    """
    if not dtypes:
        raise UsageError("--dtypes: expected fp16, bf16 or both, got none; name them or drop it")
    if not exponents or not -40 <= min(exponents) <= max(exponents) <= 40:
        got = " ".join(map(str, exponents)) or "none"
        raise UsageError(f"--exponents: expected powers of two from -40 to 40, got {got}; 8 is a scale of 256")
    check_positive({"--width": width, "--img-size": img_size, "--batch-size": 1 if batch_size is None else batch_size})
    check_output(output)
    from fasttht import log
    from fasttht.bench.zeros import Settings, measure

    settings = Settings(
        dtypes=tuple(dict.fromkeys(dtypes)), exponents=tuple(dict.fromkeys(exponents)), arch=arch, stem=stem,
        width=width, batch_size=batch_size, img_size=img_size, cpu=cpu,
    )  # fmt: skip
    with log.console.status("bench zeros") as status:
        report = measure(settings, progress=status.update)
    log.table(
        f"input gradients of {arch}, batch {report['settings']['batch_size']}, {img_size} px, {machine(report)}",
        ("type, loss, scale", "zero %", "not finite %", "signs %"),
        (
            (
                row["name"],
                f"{row['zero_grad_pct']:.3f}",
                f"{row['nonfinite_pct']:.3f}",
                f"{row['sign_agreement_pct']:.2f}",
            )
            for row in report["rows"]
        ),
    )
    log.say(f"float32: {report['float32_zero_grad_pct']:.3f} % zeros; signs: share that agrees with it")
    finish(report, output)
    return 0


def ladder(
    *, arch: Annotated[Arch, Parameter(name=["--arch", "--model"])] = "resnet50", img_size: int = 224,
    output: Path | None = None,
) -> int:  # fmt: skip
    """Count what one input gradient of each rung asks of a GPU: launches, activation bytes, waits. Nothing is timed.

    exchanges: with other processes, where they share their BN statistics (--sync-bn). The last line of stdout is the
    report as JSON.

    Parameters
    ----------
    output
        Also append the JSON line to this file.
    """
    check_positive({"--img-size": img_size})
    check_output(output)
    from fasttht import log
    from fasttht.bench.ladder import COUNTED, NOT_COUNTED, RUNGS, count_collectives, count_rung, predicted_bytes

    rows: list[dict[str, Any]] = []
    for rung, what in RUNGS.items():
        row: dict[str, Any] = {"name": rung, "what": what, "predicted_mb": predicted_bytes(rung, arch, img_size) / 1e6}
        if rung in COUNTED:
            count = count_rung(rung, arch, img_size)
            row |= {
                "launches": count.launches, "mb_per_image": count.num_bytes / 1e6, "waits": count.waits,
                "collectives": count_collectives(rung, arch),
            }  # fmt: skip
        else:
            row["not_counted"] = NOT_COUNTED
        rows.append(row)
    log.table(
        f"one input gradient of {arch}, {img_size} px, float16, counted",
        ("rung", "what", "launches", "MB an image", "predicted", "waits", "exchanges"),
        (
            (
                row["name"],
                row["what"],
                figure(row.get("launches"), "{}"),
                figure(row.get("mb_per_image")),
                f"{row['predicted_mb']:.1f}",
                figure(row.get("waits"), "{}"),
                figure(row.get("collectives"), "{}"),
            )
            for row in rows
        ),
    )
    log.say(f"A4: not counted: {NOT_COUNTED}")
    finish({"bench": "ladder", "settings": {"arch": arch, "img_size": img_size}, "rows": rows}, output)
    return 0


def register(app: App) -> None:
    """Add these to the bench commands."""
    for command in (attack, ladder, zeros):
        app.command(command)
