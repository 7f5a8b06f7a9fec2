"""The `data` commands: words to a call of `fasttht.pipelines`, what comes back to tables. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from fasttht.errors import UsageError

if TYPE_CHECKING:
    from fasttht.pipelines.split_writer import WriteReport

data_app = App(name="data", help="Write, verify and describe data sets as .beton files.")


@data_app.command(name="write")
def data_write(
    kind: Literal["imagenet", "folder", "digits"],
    /,
    *,
    source: Path | None = None,
    output: Path,
    encode: Literal["passthrough", "jpeg", "raw"] = "passthrough",
    max_resolution: int | None = None,
    quality: int = 95,
    seed: int = 0,
    val_fraction: float = 0.1,
    subset: float | None = None,
    workers: int = 0,
    on_error: Literal["abort", "skip"] = "abort",
    max_errors: int = 100,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> int:
    """Write train.beton and val.beton, which stock FFCV reads too.

    Parameters
    ----------
    kind
        imagenet: train/ and val/ of wnid folders; folder: any class-per-folder tree; digits: the embedded ones.
    source
        Folder of the images; not used for digits.
    output
        Folder to write into.
    encode
        passthrough: keep JPEG bytes as they are where possible; jpeg: encode all anew; raw: pixels.
    max_resolution
        Shrink images whose longest side is larger, in pixels; 0 disables. Default: 500 for imagenet, else 0.
    quality
        JPEG quality of what is encoded anew, 1 to 100.
    seed
        Seed of the order in which images are laid down, and of the hold-out.
    val_fraction
        Share of each class held out where a folder has no val split.
    subset
        Keep fewer images of each split, a share below 1 or a number of them: as many of each class, drawn by the seed.
    workers
        Threads that read, decode and encode; 0: one per core. The files do not depend on it.
    on_error
        What an image that cannot be stored does. abort: end the write; skip: it is left out and listed.
    max_errors
        With --on-error skip: images per file that may be left out; 0: any number.
    resume
        Go on with an unfinished write of the same settings and images; starts where there is none.
    force
        Replace files that exist and, without --resume, an unfinished write.
    dry_run
        Only count the images, estimate the size from one image in 100, and look at the free space.
    """
    from fasttht.pipelines.subset import is_amount

    if (source is None) != (kind == "digits"):
        got = "nothing" if source is None else str(source)
        expected = "no --source for digits" if kind == "digits" else f"--source FOLDER for {kind}"
        raise UsageError(f"--source: expected {expected}, got {got}")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality: expected 1 to 100, got {quality}")
    if not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction: expected a share between 0 and 1, got {val_fraction:g}")
    if subset is not None and not is_amount(subset):
        raise UsageError(f"--subset: expected a share below 1 or a whole number of images, got {subset:g}")
    if max_resolution is not None and max_resolution < 0:
        raise UsageError(f"--max-resolution: expected a number of pixels, or 0, got {max_resolution}")
    if workers < 0:
        raise UsageError(f"--workers: expected 1 or more threads, or 0 for one per core, got {workers}")
    if max_errors < 0:
        raise UsageError(f"--max-errors: expected a number of images, or 0 for any, got {max_errors}")
    settings: dict[str, Any] = {
        "encode": encode,
        "max_resolution": "default" if max_resolution is None else max_resolution or None,
        "quality": quality,
        "seed": seed,
        "val_fraction": val_fraction,
        "subset": subset,
        "workers": workers,
    }
    if dry_run:
        return _show_plan(kind, source, output, settings)
    from fasttht import log
    from fasttht.pipelines.writer import write_dataset

    with log.WriteScreen() as screen:
        reports = write_dataset(
            kind, source, output, **settings, force=force, resume=resume, on_error=on_error, max_errors=max_errors,
            progress=lambda split, tally: screen.advance(
                split, tally.done, tally.total, tally.num_bytes, resumed=tally.resumed,
                counts={**tally.counts, "skipped": len(tally.skipped)},
            ),
        )  # fmt: skip
    _show_reports(output, reports)
    return 0


@data_app.command(name="verify")
def data_verify(path: Path, /, *, workers: int = 0) -> int:
    """Look at every image of a .beton file, or of both in a folder: checksum, decoding, size, label.

    Parameters
    ----------
    path
        A .beton file, or a folder with train.beton and val.beton.
    workers
        Threads; 0: one per core.
    """
    if workers < 0:
        raise UsageError(f"--workers: expected 1 or more threads, or 0 for one per core, got {workers}")
    from fasttht import log
    from fasttht.pipelines import DataError
    from fasttht.pipelines.verify import find_betons, verify_beton

    verdicts = []
    with log.WriteScreen() as screen:
        for beton in find_betons(path):
            verdicts.append(
                verify_beton(
                    beton, workers=workers, progress=lambda *done, name=beton.name: screen.advance(name, *done)
                )
            )
    log.table(
        str(path),
        ("file", "images", "problems", "classes"),
        (
            (
                verdict.path.name,
                f"{verdict.num_samples:,}",
                f"{verdict.num_problems:,}",
                len(verdict.histogram),
            )
            for verdict in verdicts
        ),
    )
    for verdict in verdicts:
        compared = "all compared" if verdict.checksums else "none to compare"
        if verdict.histogram:
            log.say(f"{verdict.path.name}: images per class: {verdict.describe_histogram()}")
        log.say(f"{verdict.path.name}: checksums {compared}; stock FFCV {verdict.stock}")
        for problem in verdict.problems:
            log.say(problem)
        if verdict.num_problems > len(verdict.problems):
            log.say(f"and {verdict.num_problems - len(verdict.problems):,} more in {verdict.path.name}")
    total = sum(verdict.num_problems for verdict in verdicts)
    if total:
        raise DataError(f"{path}: expected whole files, got {total:,} problems; write the data again")
    return 0


@data_app.command(name="info")
def data_info(path: Path, /) -> int:
    """Say what a .beton file, or both in a folder, hold, from index and manifest; no image is decoded.

    Parameters
    ----------
    path
        A .beton file, or a folder with train.beton and val.beton.
    """
    from fasttht import log
    from fasttht.pipelines.verify import describe_beton, find_betons

    for beton in find_betons(path):
        info = describe_beton(beton)
        manifest = "none"
        if info.has_manifest:
            manifest = "yes, with checksums" if info.checksums else "yes, without checksums"
        rows = {
            "images": f"{info.num_samples:,}",
            "classes": f"{info.num_classes:,}",
            "size": f"{info.num_bytes / 1e6:,.1f} MB, images {info.num_image_bytes / 1e6:,.1f} MB",
            "stored as": _list(info.modes),
            **{f"sides at {share} %": f"{shorter} x {longer}" for share, shorter, longer in info.sides},
            "page size": f"{info.page_size >> 20} MiB",
            "fingerprint": info.fingerprint,
            "manifest": manifest,
            "written": _list(info.counts),
            "remarks": _list(info.remarks),
            "skipped": f"{info.num_skipped:,}",
            "settings": ", ".join(f"{name} {value}" for name, value in info.settings.items()),
        }
        log.table(str(beton), ("", "value"), ((name, value) for name, value in rows.items() if value))
    return 0


def _show_plan(kind: Any, source: Path | None, output: Path, settings: dict[str, Any]) -> int:
    from fasttht import log
    from fasttht.pipelines.estimate import check_space
    from fasttht.pipelines.writer import plan_dataset

    plan = plan_dataset(kind, source, **settings)
    log.table(
        f"{output}: nothing is written",
        ("split", "images", "classes", "per class", "MB", "sampled", "unusable"),
        (
            (
                f"{split}.beton",
                f"{estimate.num_samples:,}",
                f"{len(estimate.class_counts):,}",
                f"{min(estimate.class_counts.values()):,} to {max(estimate.class_counts.values()):,}",
                f"{estimate.num_bytes / 1e6:,.1f}",
                f"{estimate.num_sampled:,}",
                f"{estimate.num_failed:,}",
            )
            for split, estimate in plan.items()
        ),
    )
    names = sorted({name for estimate in plan.values() for name in estimate.class_counts})
    columns = [estimate.class_counts for estimate in plan.values()]
    log.table("images per class", ("class", *plan), ((name, *(c.get(name, 0) for c in columns)) for name in names))
    needed = sum(estimate.num_bytes for estimate in plan.values())
    free = check_space(output, needed)
    log.say(f"{needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free")
    return 0


def _show_reports(output: Path, reports: dict[str, WriteReport]) -> None:
    from fasttht import log

    log.table(
        str(output),
        ("split", "images", "MB", "how", "skipped"),
        (
            (
                f"{split}.beton",
                f"{report.num_samples:,}",
                f"{report.num_bytes / 1e6:.1f}",
                _list(report.counts),
                f"{len(report.skipped):,}",
            )
            for split, report in reports.items()
        ),
    )
    for split, report in reports.items():
        if report.remarks:
            log.say(f"{split}: {_list(report.remarks)}")
        for path, reason in report.skipped[:3]:
            log.say(f"skipped {path}: {reason}")
        if len(report.skipped) > 3:
            log.say(f"and {len(report.skipped) - 3:,} more, listed in {output / split}.beton.json")


def _list(counts: Any) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
