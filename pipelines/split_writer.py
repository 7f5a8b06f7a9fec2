"""One .beton from a set of images: which order, which settings, what is kept when the write is stopped.

The same images and settings give the same bytes, whatever the number of workers and however often the write was killed
and resumed.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from fasttht.pipelines import DataError, ResourceError
from fasttht.pipelines.beton import MODES, BetonFile
from fasttht.pipelines.beton_write import BetonWriter
from fasttht.pipelines.encode import OUTCOMES, REMARKS, Encode, Encoding, encode_sample, find_remarks
from fasttht.pipelines.journal import RECORD, Records, append_commit, check_settings, journal_path, read_journal
from fasttht.pipelines.manifest import Manifest, manifest_path, read_manifest, sync, write_manifest
from fasttht.pipelines.ordered import count_workers, map_ordered
from fasttht.pipelines.plan import STREAM_WRITE, Index, hash_rows
from fasttht.pipelines.samples import Sample, Samples

OnError = Literal["abort", "skip"]

MAX_ERRORS = 100

# Images between two entries of the journal, each of which waits for the disk: about 56 MB of ImageNet.
COMMIT_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteReport:
    """What was written: images, bytes of the .beton, and images per outcome (they add up to num_samples).

    Outcomes: "passthrough" byte for byte, "reencoded" as JPEG at the same size, "raw" pixels at the same
    size, "resized" shrunk first, then either. remarks: images per oddity (encode.REMARKS). skipped: (path, reason)
    of the images left out.
    """

    num_samples: int
    num_bytes: int
    counts: Mapping[str, int]
    remarks: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...]


@dataclass(slots=True, kw_only=True)
class Tally:
    """How far a write is, updated in place: images done (stored or skipped) of total, and bytes stored.

    resumed of the images done were found in the journal.
    """

    total: int
    done: int = 0
    resumed: int = 0
    num_bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, record: np.void) -> None:
        """Count one image that was stored."""
        self.num_bytes += int(record["size"])
        self.counts[OUTCOMES[record["outcome"]]] += 1
        self.remarks.update(remark for bit, remark in enumerate(REMARKS) if record["remarks"] >> bit & 1)


def write_split(
    samples: Samples,
    path: Path | str,
    *,
    encode: Encode = "passthrough",
    max_resolution: int | None = None,
    quality: int = 95,
    seed: int = 0,
    shuffle: bool = True,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    resume: bool = False,
    workers: int = 1,
    on_error: OnError = "abort",
    max_errors: int = MAX_ERRORS,
    progress: Callable[[Tally], None] | None = None,
) -> WriteReport:
    """Write `samples` to the .beton `path`, and its manifest beside it.

    Rows are laid down in an order drawn from `seed` (files read page by page then still mix the classes), or
    as they come. `settings` are noted in the manifest beside this function's own. `workers` threads read, encode
    and check, 0 is one per core. `on_error` "skip" leaves out images that cannot be stored, `max_errors` of them
    at most (0: any number), and lists them in the manifest; the others keep their order. `progress` is called
    after every image.

    Until all is on disk, images lie in `<path>.partial`, and every COMMIT_ROWS of them are noted in
    `<path>.journal`. After an error, or a kill, what is noted there is kept: `resume` goes on with it and gives the
    bytes of an uninterrupted write; where there is nothing to go on with it starts, and a finished `path` of the same
    settings and images it leaves alone. Without it an unfinished write is refused, unless `force` replaces it.
    An older file stays as it was until the new one is whole.

    Raises: DataError if `path` exists (without `force`) or an image cannot be stored, naming it; ResourceError for a
    full disk; ValueError.
    """
    encoding = Encoding(encode=encode, max_resolution=max_resolution, quality=quality)
    if on_error not in get_args(OnError) or max_errors < 0:
        raise ValueError(f"on_error: expected one of {get_args(OnError)} and a limit, got {on_error!r}, {max_errors}")
    num_workers, path = count_workers(workers), Path(path)
    job = {**(settings or {}), **asdict(encoding), "seed": seed, "shuffle": shuffle}
    if not path.parent.is_dir():
        raise DataError(f"{path}: expected an existing folder to write to, got none; make it first")
    if resume and (report := finished_report(path, job, samples.fingerprint)) is not None:
        journal_path(path).unlink(missing_ok=True)
        return report
    refuse_existing(path, force=force, resume=resume)
    order = np.arange(len(samples), dtype=np.int64)
    if shuffle:
        order = np.argsort(hash_rows(STREAM_WRITE, seed, 0, 0, order), kind="stable")
    split = _Split(samples, order, path, encoding, {**job, "images": samples.fingerprint})
    with split.open(resume=resume) as file:
        return split.write(file, job, num_workers, max_errors if on_error == "skip" else None, progress)


class _Split:
    """One file while it is written: the images, their order, and what is noted in the journal."""

    def __init__(
        self, samples: Samples, order: Index, path: Path, encoding: Encoding, identity: Mapping[str, Any]
    ) -> None:
        self.samples, self.order, self.path, self.encoding = samples, order, path, encoding
        self.identity = identity
        self.partial, self.journal = path.with_name(path.name + ".partial"), journal_path(path)
        self.records: list[Records] = []
        self.reasons: list[str] = []
        self.is_sound = False  # what the journal lists has been found in the partial file

    @contextmanager
    def open(self, *, resume: bool) -> Iterator[BinaryIO]:
        """Open the partial file; after an error it goes, unless the journal says that it is worth keeping."""
        if not resume:
            self.journal.unlink(missing_ok=True)
        records, self.reasons = read_journal(self.journal, self.identity)
        self.records = [records]
        if len(records) and not self.partial.exists():
            raise DataError(f"{self.partial}: expected the images that its journal lists, got no file; add --force")
        try:
            with open(self.partial, "r+b" if len(records) else "w+b") as file:
                yield file
        except BaseException as error:
            kept = len(read_journal(self.journal, self.identity)[0])
            if not kept:
                self.partial.unlink(missing_ok=True)
                self.journal.unlink(missing_ok=True)
            hint = (
                f"; {kept:,} of {len(self.order):,} images are kept, resume to go on" if kept and self.is_sound else ""
            )
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(f"{self.path}: expected room on the disk, got a full one{hint}") from None
            if isinstance(error, DataError) and hint:
                raise type(error)(f"{error}{hint}") from None
            raise

    def write(
        self,
        file: BinaryIO,
        job: Mapping[str, Any],
        workers: int,
        max_errors: int | None,
        progress: Callable[[Tally], None] | None,
    ) -> WriteReport:
        """Lay down the images that are not there yet, close the file, and let it appear under its name."""
        writer = BetonWriter(file, self.path, len(self.order))
        tally, noted = Tally(total=len(self.order)), self.records[0]
        self._replay(file, writer, tally, noted)
        rows = self.order[len(noted) :].tolist()
        pending, reasons = np.zeros(COMMIT_ROWS, RECORD), list[str]()
        with closing(map_ordered(self._encode, rows, workers)) as results:
            for i, result in zip(rows, results, strict=True):
                record = pending[tally.done % COMMIT_ROWS : tally.done % COMMIT_ROWS + 1]
                if isinstance(result, DataError):
                    record[:] = np.zeros(1, RECORD)
                    reasons.append(self._skip(i, result, tally, max_errors))
                else:
                    stored, record[:] = result
                    writer.append(stored, int(self.samples.labels[i]))
                    tally.add(record[0])
                tally.done += 1
                if tally.done % COMMIT_ROWS == 0:
                    _sync(file)
                    append_commit(self.journal, self.identity, pending, reasons)
                    self.records.append(pending.copy())
                    reasons = []
                if progress is not None:
                    progress(tally)
        self.records.append(pending[: tally.done % COMMIT_ROWS])
        if writer.num_samples == 0:
            raise DataError(f"{self.path}: expected at least one image that can be stored, got none")
        fingerprint = writer.finish()
        _sync(file)
        self._publish(self._manifest(fingerprint, job, tally))
        return WriteReport(
            num_samples=writer.num_samples,
            num_bytes=self.path.stat().st_size,
            counts=dict(tally.counts),
            remarks=dict(tally.remarks),
            skipped=tuple(tally.skipped),
        )

    def _encode(self, i: int) -> tuple[Sample, tuple[int, ...]] | DataError:
        """Do the work on row i that needs no order; an image that cannot be stored comes back as its error."""
        try:
            sample = self.samples.sample(i)
            stored, outcome = encode_sample(sample, self.encoding)
        except DataError as error:
            return error
        found = find_remarks(sample, self.samples.origin(i), outcome)
        bits = sum(1 << REMARKS.index(remark) for remark in found)
        size, checksum = stored.data.size, zlib.crc32(np.ascontiguousarray(stored.data).data)
        mode = 0 if stored.mode == MODES[0] else 1
        return stored, (mode, OUTCOMES.index(outcome), bits, stored.height, stored.width, size, checksum)

    def _skip(self, i: int, error: DataError, tally: Tally, max_errors: int | None) -> str:
        """Count an image that cannot be stored and return why; raise that instead if there may be no more of them."""
        where = self.samples.where(i)
        reason = str(error).removeprefix(f"{where}: ")  # an unreadable file is named in its error
        if max_errors is None:
            raise DataError(f"{where}: {reason}")
        if 0 < max_errors <= len(tally.skipped):
            raise DataError(f"{where}: expected at most {max_errors:,} images to skip, got another: {reason}")
        tally.skipped.append((self.samples.origin(i) or f"row {i}", reason))
        return reason

    def _replay(self, file: BinaryIO, writer: BetonWriter, tally: Tally, noted: Records) -> None:
        """Take what the journal noted as done, after a look at the images of its last commit."""
        reasons = iter(self.reasons)
        for done, (i, record) in enumerate(zip(self.order.tolist(), noted, strict=False)):
            if record["size"] == 0:
                tally.skipped.append((self.samples.origin(i) or f"row {i}", next(reasons)))
                continue
            mode, _, _, height, width, size, checksum = record.item()
            start = writer.place(MODES[mode], height, width, size, int(self.samples.labels[i]))
            tally.add(record)
            if done >= len(noted) - COMMIT_ROWS:
                file.seek(start)
                if zlib.crc32(file.read(size)) != checksum:
                    problem = f"{self.partial}: expected the {len(noted):,} images that its journal lists"
                    raise DataError(f"{problem}, got other bytes for {self.samples.where(i)}; start anew with --force")
        tally.done = tally.resumed = len(noted)
        self.is_sound = True
        file.truncate(writer.end if len(noted) else 0)

    def _manifest(self, fingerprint: str, job: Mapping[str, Any], tally: Tally) -> Manifest:
        records = np.concatenate(self.records)
        kept = records["size"] > 0
        return Manifest(
            num_samples=int(kept.sum()),
            fingerprint=fingerprint,
            class_names=self.samples.class_names,
            settings=job,
            sources=tuple(self.samples.origin(i) for i in self.order[kept].tolist()),
            checksums=np.ascontiguousarray(records["checksum"][kept]).tobytes(),
            source_fingerprint=self.samples.fingerprint,
            counts={name: tally.counts[name] for name in OUTCOMES if name in tally.counts},
            remarks={name: tally.remarks[name] for name in REMARKS if name in tally.remarks},
            skipped=tuple(tally.skipped),
        )

    def _publish(self, manifest: Manifest) -> None:
        # The manifest first: a kill between the two leaves the partial file and its journal, to be resumed.
        write_manifest(self.path, manifest)
        os.replace(self.partial, self.path)
        sync(self.path.parent)
        self.journal.unlink(missing_ok=True)


def refuse_existing(path: Path, *, force: bool = False, resume: bool = False) -> None:
    """Refuse to write over a .beton, its manifest or an unfinished one, unless told to. Raises: DataError."""
    if force:
        return
    for file in (path, manifest_path(path)):
        # A write that was killed at the very end may have left its manifest without the file.
        if file.exists() and not (resume and file != path):
            raise DataError(f"{file}: expected no such file, got one; choose another output, or add --force")
    if journal_path(path).exists() and not resume:
        raise DataError(f"{path}: expected no unfinished write, got one; add --resume, or --force to start anew")


def finished_report(path: Path, job: Mapping[str, Any], images: str, *, force: bool = False) -> WriteReport | None:
    """Return the report of a whole file with these settings and images; None if there is none.

    Raises: DataError naming the differences, if there is one with others; not with `force`.
    """
    try:
        manifest = read_manifest(path, fingerprint=BetonFile(path).fingerprint)
    except DataError:
        return None
    if manifest is None:
        return None
    found = {**manifest.settings, "images": manifest.source_fingerprint}
    if found != {**job, "images": images}:
        if not force:
            check_settings(path, found, {**job, "images": images})
        return None
    return WriteReport(
        num_samples=manifest.num_samples,
        num_bytes=path.stat().st_size,
        counts=manifest.counts,
        remarks=manifest.remarks,
        skipped=manifest.skipped,
    )


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
