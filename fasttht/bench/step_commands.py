"""The commands `bench step` and `kernels`: words to settings, a report to tables. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fasttht.bench.attack_commands import Arch
from fasttht.bench.finish import check_output, check_positive, figure, finish, machine
from fasttht.config import Many, StepEngineName
from fasttht.errors import UsageError

if TYPE_CHECKING:
    from cyclopts import App


def step(
    *,
    arch: Arch = "resnet50",
    stem: Literal["imagenet", "small"] = "imagenet",
    width: int = 64,
    batch_size: int | None = None,
    img_size: int = 224,
    steps: int = 10,
    replay: int = 4,
    attack_engine: Literal["auto", "eager", "folded", "compiled", "fused"] = "auto",
    step_engine: Annotated[tuple[StepEngineName, ...], Many] = ("auto",),
    windows: int = 5,
    preset: str | None = None,
    data: Path | None = None,
    loader: Literal["turbo", "ffcv", "dali-cpu", "dali-gpu"] = "turbo",
    workers: int = 0,
    cpu: bool = False,
    output: Path | None = None,
    compare: Path | None = None,
    trace: Path | None = None,
) -> int:
    """Measure training steps: what a THAT step and a free minibatch cost in clean steps, and where their time goes.

    Same network, batch and update; images lie on the device, but with --data. The last line of stdout is the report.

    Parameters
    ----------
    batch_size
        Images. Default: 8, on a CUDA device 128.
    steps
        PGD steps of the THAT step.
    replay
        Replays of the free minibatch.
    step_engine
        Rungs of the training step's own ladder; each step is measured on each of them.
    windows
        Steps of each kind, in turn, after one to warm up; as many again, watched, for the phases.
    preset
        Also tell how many hours this preset would train on this device; the step measured must be its own.
    data
        Watch the phases of steps whose images are loaded from here, as by `train --data`, so that what they wait for
        is seen. Default: no waiting.
    loader
        Decoder that loads them.
    workers
        Its threads; 0: one per core.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    compare
        Set each row beside that of an older --output: the newest report in it, of this machine and these settings.
    trace
        Write one step of each kind as a Chrome trace, .json or .json.gz, with the phases as named spans.
    """
    if replay < 2:
        raise UsageError(f"--replay: expected 2 or more, got {replay}; 1 is no replay at all")
    check_positive({"--width": width, "--img-size": img_size, "--steps": steps, "--windows": windows})
    check_positive({"--batch-size": 1 if batch_size is None else batch_size})
    if workers < 0:
        raise UsageError(f"--workers: expected 0 (one per core) or more, got {workers}; drop it for the default")
    check_output(output)
    from fasttht import log
    from fasttht.bench import compare as comparison
    from fasttht.bench.attack import device_of
    from fasttht.bench.hours import hours, plan_preset
    from fasttht.bench.step import Settings, described, measure
    from fasttht.bench.trace import check_trace, show_trace

    check_trace(trace)
    plan = plan_preset(
        preset, arch=arch, stem=stem, width=width, img_size=img_size, steps=steps, replay=replay
    )  # fmt: skip
    settings = Settings(
        arch=arch, stem=stem, width=width, batch_size=batch_size, img_size=img_size, steps=steps, replay=replay,
        engine=attack_engine, step_engines=tuple(dict.fromkeys(step_engine)),
        windows=windows, cpu=cpu, trace=trace, data=data, loader=loader, workers=workers,
    )  # fmt: skip
    old = comparison.open_report(compare, "step", described(settings), device_of(cpu))
    with log.console.status("bench step") as status:
        report = measure(settings, progress=status.update)
    report["hours"] = hours(plan, report["rows"])
    comparison.compare(old, report)
    _show_steps(report)
    comparison.show(report)
    show_trace(trace, report)
    finish(report, output)
    return 0


def _show_steps(report: dict[str, Any]) -> None:
    from fasttht import log

    settings, rows = report["settings"], report["rows"]
    log.table(
        f"training steps of {settings['arch']}, batch {settings['batch_size']}, {settings['img_size']} px, "
        f"{machine(report)}",
        ("step", "attack", "step by", "img/s", "ms", "clean steps", "quartiles"),
        (
            (
                row["name"],
                row["engine"] or "",
                row["step_engine"],
                f"{row['img_per_s']:.2f}",
                f"{row['ms']:,.0f}",
                f"{row['clean_steps']:.2f}",
                "{:.2f}-{:.2f}".format(*row["clean_steps_quartiles"]),
            )
            for row in rows
        ),
    )
    log.table(
        "what a step reaches of this machine's best, and what limits it",
        ("step", "MFU %", "copy %", "limit", "GiB"),
        (
            (
                row["name"],
                f"{row['mfu_pct']:.1f}",
                figure(row["copy_pct"]),
                row["limit"] or "not known",
                figure(row["gpu_mem_gib"], "{:.2f}"),
            )
            for row in rows
        ),
    )
    log.say(
        f"MFU: of {report['peak']['tflops']:.3g} TFLOP/s ({report['peak']['source']}); copy: the byte model's bytes, "
        f"of {report['copy']['gb_per_s']:.1f} GB/s measured by copying"
    )
    phases = [phase["name"] for phase in rows[0]["phases"]]
    shares = [{phase["name"]: phase for phase in row["phases"]} for row in rows]
    log.table(
        "where a step's time goes, ms and % (watched, in windows of their own)",
        ("phase", *(row["name"] for row in rows)),
        (
            (
                phase.replace("_", " "),
                *(f"{own[phase]['ms']:,.1f}  {own[phase]['pct']:4.1f}" if own[phase]["pct"] else "-" for own in shares),
            )
            for phase in phases
        ),
    )
    phases_with_notes = [phase for row in rows for phase in row["phases"] if "note" in phase]
    for note in dict.fromkeys(f"{phase['name'].replace('_', ' ')}: {phase['note']}" for phase in phases_with_notes):
        log.say(note)
    for row in rows:
        if "attack_apart" in row:
            parts = ", ".join(f"{phase['name']} {phase['ms']:,.1f}" for phase in row["attack_apart"] if phase["ms"])
            log.say(f"{row['name']}, the attack without its graph, ms: {parts.replace('_', ' ')}")
    told = report["hours"]
    if told is not None:
        log.say(
            f"{told['preset']}: {told['images']:,} images x {told['passes']} passes at {told['img_per_s']:,.1f} img/s "
            f"({told['row']}) take {told['hours']:,.1f} hours on one such device, evaluation and data left out"
        )


def kernels(
    *,
    ops: Annotated[tuple[str, ...], Many] = (),
    compiled: bool = False,
    batch_size: int | None = None,
    img_size: int = 224,
    channels: int = 256,
    windows: int = 7,
    window_s: float = 0.05,
    cpu: bool = False,
    output: Path | None = None,
    compare: Path | None = None,
) -> int:
    """Measure every fused op beside its plain-torch reference: microseconds, GB/s, share of the copy bandwidth.

    On a CPU the references run, and nothing else is there. The last line of stdout is the report as JSON.

    Parameters
    ----------
    ops
        Which to measure. Default: all.
    compiled
        Also measure torch.compile of each reference.
    batch_size
        Images. Default: 8, on a CUDA device 128.
    channels
        Channels of the widest activation, a multiple of 4; its side is a quarter of --img-size.
    windows
        Windows per implementation, in turn, after one to warm up.
    window_s
        Length of a window in seconds.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    compare
        Set each row beside that of an older --output: the newest report in it, of this machine and these settings.
    """
    check_positive({"--img-size": img_size, "--channels": channels, "--windows": windows})
    check_positive({"--batch-size": 1 if batch_size is None else batch_size})
    if channels % 4:
        raise UsageError(f"--channels: expected a multiple of 4, got {channels}; 256 is ResNet-50's first stage")
    if not 0 < window_s < 60:
        raise UsageError(
            f"--window-s: expected seconds above 0 and below 60, got {window_s:g}; drop it for the default"
        )
    check_output(output)
    from fasttht import log
    from fasttht.bench import compare as comparison
    from fasttht.bench.attack import batch_size_of, device_of
    from fasttht.bench.kernel_cases import CASES
    from fasttht.bench.kernels import Settings, described, measure

    if not set(ops) <= set(CASES):
        got = " ".join(sorted(set(ops) - set(CASES)))
        raise UsageError(f"--ops: expected names of {', '.join(CASES)}, got {got}; name them or drop it")
    settings = Settings(
        ops=tuple(dict.fromkeys(ops)) or tuple(CASES), batch_size=batch_size_of(batch_size, device_of(cpu)),
        img_size=img_size, channels=channels, windows=windows, window_s=window_s, compiled=compiled, cpu=cpu,
    )  # fmt: skip
    old = comparison.open_report(compare, "kernels", described(settings), device_of(cpu))
    with log.console.status("bench kernels") as status:
        report = measure(settings, progress=status.update)
    comparison.compare(old, report)
    _show_kernels(report)
    comparison.show(report)
    finish(report, output)
    return 0


def _show_kernels(report: dict[str, Any]) -> None:
    from fasttht import log

    settings, rows = report["settings"], [row for row in report["rows"] if "us" in row]
    log.table(
        f"ops, batch {settings['batch_size']}, {settings['img_size']} px, {machine(report)}",
        ("op", "as", "ran", "us", "quartiles"),
        (
            (
                row["name"],
                row["implementation"],
                row["ran"],
                f"{row['us']:,.1f}",
                "{:,.1f}-{:,.1f}".format(*row["quartiles_us"]),
            )
            for row in rows
        ),
    )
    log.table(
        f"beside the {report['copy']['gb_per_s']:.1f} GB/s that copying reaches here",
        ("op", "as", "MB", "GB/s", "copy %", "ratio"),
        (
            (
                row["name"],
                row["implementation"],
                f"{row['traffic_mb']:,.2f}",
                f"{row['gb_per_s']:,.2f}",
                f"{row['copy_pct']:.1f}",
                f"{row['ratio']:.2f}",
            )
            for row in rows
        ),
    )
    log.say(f"kernels: {report['implementation']['name']}: {report['implementation']['reason']}")
    log.say("GB/s: the bytes that an op must move; ratio: how much faster than its reference, in the same window")
    warm = [f"{row['name']} ({row['implementation']})" for row in rows if not row["cold"]]
    if warm:
        log.say(f"operands that may have stayed in the cache: {', '.join(warm)}")
    for row in report["rows"]:
        if "not_run" in row:
            which = f", {row['implementation']}" if "implementation" in row else ""
            log.say(f"{row['name']}{which}: not run: {row['not_run']}")


def register(app: App) -> None:
    """Add these to the bench commands."""
    for command in (step, kernels):
        app.command(command)
