"""The `bench` commands: words to a call of a benchmark, its report to tables and one line of JSON. No logic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App

from fasttht.bench import attack_commands, scale_commands, step_commands
from fasttht.bench.finish import check_output, drop_part, finish, keep_part, kept_part
from fasttht.config import Many
from fasttht.errors import UsageError
from fasttht.exits import stop_code

bench_app = App(name="bench", help="Measure where the time goes, beside peers, on this machine.")
attack_commands.register(bench_app)
step_commands.register(bench_app)
scale_commands.register(bench_app)

LoaderName = Literal["turbo", "ffcv", "dali-cpu", "dali-gpu", "synthetic", "ffcv-stock", "torchvision-cuda"]
LOADERS: tuple[LoaderName, ...] = (
    "turbo", "ffcv", "dali-cpu", "dali-gpu", "synthetic", "ffcv-stock", "torchvision-cuda",
)  # fmt: skip

# The order in which a sample meets them; others come behind.
_STAGES = ("read", "decode", "resize", "copy")


@bench_app.default
def bench(*, cpu: bool = False, output: Path | None = None) -> int:
    """Run load, attack, step and kernels, one after the other, each with a line of JSON: where does the time go?

    On a CPU with small batches and few windows: some minutes. Each alone has the options, and the better figures.

    Parameters
    ----------
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON lines to this file.
    """
    check_output(output)
    from fasttht.bench.attack import device_of

    small = device_of(cpu).type == "cpu"
    benchmarks: list[tuple[Callable[..., int], dict[str, Any]]] = [
        (load, {"workers": (1,), "windows": 3, "window_s": 0.5, "first_batch": False}),
        (attack_commands.attack, {"batch_size": 2, "windows": 2}),
        (step_commands.step, {"batch_size": 2, "windows": 2}),
        (step_commands.kernels, {"batch_size": 2, "windows": 3}),
    ]
    for benchmark, options in benchmarks:
        code = benchmark(cpu=cpu, output=output, **(options if small else {}))
        if code:
            return code
    return 0


@bench_app.command(name="load")
def load(
    *,
    data: Path | None = None,
    loaders: Annotated[tuple[LoaderName, ...], Many] = LOADERS,
    workers: Annotated[tuple[int, ...], Many] = (1, 2),
    batch_size: int = 64,
    img_size: int = 224,
    windows: int = 7,
    window_s: float = 2.0,
    first_batch: bool = True,
    slowdown: bool | None = None,
    cpu: bool = False,
    output: Path | None = None,
    compare: Path | None = None,
) -> int:
    """Measure loaders: img/s, time to the first batch, and what decoding costs an attack beside it.

    Windows of all loaders take turns, on the same cores; the ratio is to stock FFCV's median, to turbo's without it.
    The last line of stdout is the report as JSON.

    Parameters
    ----------
    data
        A .beton file, or a folder with train.beton. Default: 512 photographs made here once, 500 x 375.
    loaders
        Which to measure. Default: all; what cannot run is listed with the reason.
    workers
        Numbers of workers to measure with, each on so many cores.
    batch_size
        Images per batch; stock FFCV gets the fastest of 32, 64, 128 and 256 instead.
    img_size
        Side of the square that images are cut to, in pixels.
    windows
        Windows per loader and number of workers.
    window_s
        Length of a window in seconds.
    first_batch
        Start three processes per loader, with the largest of --workers, and time each until its first batch.
    slowdown
        Time PGD-10 alone and beside each loader. Default: on a CUDA device only; on a CPU with a small network.
    cpu
        Stay on the CPU where there is a CUDA device too.
    output
        Also append the JSON line to this file.
    compare
        Set each row beside that of an older --output: the newest report in it, of this machine and these settings.
    """
    if not loaders:
        raise UsageError(f"--loaders: expected one or more of {', '.join(LOADERS)}, got none; name them or drop it")
    if not workers or min(workers) < 1:
        got = " ".join(map(str, workers)) or "none"
        raise UsageError(f"--workers: expected numbers of 1 or more, got {got}; give the cores to use, such as 1 2")
    for flag, value in (("--batch-size", batch_size), ("--img-size", img_size), ("--windows", windows)):
        if value < 1:
            raise UsageError(f"{flag}: expected 1 or more, got {value}; drop it for the default")
    if not (0 < window_s < math.inf):
        raise UsageError(f"--window-s: expected seconds above 0, got {window_s:g}; drop it for the default")
    check_output(output)
    from fasttht import log
    from fasttht.bench import compare as comparison
    from fasttht.bench.attack import device_of
    from fasttht.bench.load import Settings, described, measure

    settings = Settings(
        data=data, loaders=tuple(dict.fromkeys(loaders)), workers=tuple(dict.fromkeys(workers)), cpu=cpu,
        batch_size=batch_size, img_size=img_size, windows=windows, window_s=window_s,
        first_batch=first_batch, slowdown=slowdown,
    )  # fmt: skip
    old = comparison.open_report(compare, "load", described(settings), device_of(cpu))
    drop_part(output)
    try:
        with log.console.status("bench load") as status:
            report = measure(settings, progress=status.update, keep=partial(keep_part, output=output))
    except KeyboardInterrupt as error:
        part = kept_part(output)
        log.fail("stopped; nothing was kept" if part is None else f"stopped; what was measured is in {part}")
        return stop_code(error)
    comparison.compare(old, report)
    _show(report)
    comparison.show(report)
    finish(report, output)
    return 0


def _show(report: dict[str, Any]) -> None:
    from fasttht import log

    data, env = report["data"], report["env"]
    height, width = data["median_size"]
    log.say(
        f"{data['images']:,} images of {width} x {height}, {data['mean_bytes'] / 1000:.1f} kB each, from "
        f"{data['source']}; {env['cpu']}, {env['cores']} cores; {env['gpu'] or 'no GPU'}"
    )
    if data["source"] == "made-up":
        log.say("the images are noise: for photographs install scikit-learn or scikit-image, or give --data")
    for workers in dict.fromkeys(row["workers"] for row in report["rows"]):
        _show_speeds(workers, [row for row in report["rows"] if row["workers"] == workers and "img_per_s" in row])
    _show_first_batch(report.get("first_batch", []), max(report["settings"]["workers"]))
    if "attack" in report:
        _show_attack(report["attack"])
    reasons = {row["name"]: row["not_run"] for row in report["rows"] if "not_run" in row}
    if reasons:
        log.table("not run", ("loader", "reason"), reasons.items())
    for skipped in report["skipped"]:
        log.say(f"not measured: {skipped}")


def _show_speeds(workers: int, rows: list[dict[str, Any]]) -> None:
    from fasttht import log

    log.table(
        f"workers {workers}: images per second",
        ("loader", "batch", "img/s", "quartiles", "ratio"),
        (
            (
                row["name"],
                row["batch_size"],
                f"{row['img_per_s']:,.0f}",
                "{:,.0f} to {:,.0f}".format(*row["quartiles"]),
                f"{row['ratio']:.2f}" if "ratio" in row else "",
            )
            for row in rows
        ),
    )
    for cores in {row["cores"] for row in rows} - {workers}:
        log.say(f"workers {workers}: only {cores} cores are there, and all of them were used")
    for reference in {row["ratio_to"] for row in rows if "ratio_to" in row}:
        log.say(f"ratio: to {reference}")
    staged = [row for row in rows if row["stages"]]
    found = dict.fromkeys(stage for row in staged for stage in row["stages"])
    stages = [*(stage for stage in _STAGES if stage in found), *(stage for stage in found if stage not in _STAGES)]
    if staged:
        log.table(
            f"workers {workers}, by stage: images per second of one thread that did nothing else",
            ("loader", *stages),
            (
                (row["name"], *(f"{row['stages'][s]:,.0f}" if s in row["stages"] else "" for s in stages))
                for row in staged
            ),
        )


def _show_first_batch(rows: list[dict[str, Any]], workers: int) -> None:
    from fasttht import log

    if rows:
        log.table(
            f"seconds from the start of a process to its first batch, median of three, workers {workers}",
            ("process", "s"),
            ((row["name"], f"{row['seconds']:.2f}" if "seconds" in row else "not run") for row in rows),
        )
    _show_reasons("first batch", rows)


def _show_reasons(what: str, rows: list[dict[str, Any]]) -> None:
    from fasttht import log

    for row in rows:
        if "not_run" in row:
            log.say(f"{what}, {row['name']}: not run: {row['not_run']}")


def _show_attack(found: dict[str, Any]) -> None:
    from fasttht import log

    alone, rows = found["alone"], [row for row in found["rows"] if "not_run" not in row]
    log.table(
        f"{found['attack']} on {found['network']}, batch {found['batch_size']}, beside {found['workers']} workers",
        ("beside", "ms a step", "quartiles", "ratio", "img/s decoded"),
        (
            (name, f"{row['step_ms']:.1f}", "{:.1f} to {:.1f}".format(*row["quartiles"]), ratio, speed)
            for name, row, ratio, speed in [
                ("nothing", alone, "1.00", ""),
                *((row["name"], row, f"{row['ratio']:.3f}", f"{row['img_per_s']:,.0f}") for row in rows),
            ]
        ),
    )
    _show_reasons("beside the attack", found["rows"])
