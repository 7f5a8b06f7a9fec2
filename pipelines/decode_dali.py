"""NVIDIA DALI behind the Decoder contract: JPEGs by nvImageCodec on CPU threads, or on the GPU.

DALI gets the encoded bytes, the windows and the flips of each request, and draws nothing itself. On the CPU it decodes
as libjpeg-turbo does, bit for bit, and its resampler is antialiased bilinear like decode_turbo's: pixels are within
1/255, 0.15/255 on average. Two exceptions: the outermost ring of a shrunken window or image, whose edge DALI repeats
instead of leaving it out (27/255 measured at most, 0.4/255 on average over the worst photograph), and windows of four
times the output and more, which decode_turbo decodes at half size. What nvJPEG does on a GPU has not been measured.

Rows that are no plain JPEG (raw pixels, PNG, CMYK, bytes behind the end of the image) never reach DALI: the embedded
decoder does them, one by one, while DALI works. So a file of raw pixels is better read by the loader turbo.

One image that DALI refuses ends its pipeline. Then each image of that request is tried alone, a new pipeline is built,
and the requests in flight are run again without what failed. The other way round, DALI accepts what the strict decoder
refuses: damage in the middle of the image data, and any below the window, which it does not read. Checksums find that
when the sample is read; a file without a manifest has none, and then only a missing end of the image is noticed.
"""

from __future__ import annotations

import re
from collections import deque
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from fasttht.pipelines import DataError, ResourceError
from fasttht.pipelines.dali_graph import DEPTH, Backend, import_dali, make_graph
from fasttht.pipelines.decode_turbo import decode_into, decode_rgb, is_jpeg, jpeg_header
from fasttht.pipelines.decoder import Decoded, Request
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.samples import Sample, Samples
from fasttht.pipelines.stages import IDLE, Stages

# What DALI raises: the type is that of its C++ exception.
_DALI_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)

_Encoded = dict[int, Sample]
"""The JPEGs of a request that DALI decodes, by their position in it, ascending."""


def try_out(device: torch.device | None) -> None:
    """Build a small pipeline, on the CPU if `device` is None, and run it. Raises: ImportError; ResourceError."""
    if device is not None and not torch.cuda.is_available():
        raise ResourceError("loader dali: expected a GPU that torch can use, got none; take the loader turbo")
    import_dali()
    pipe = _Pipe(_device_id(device), workers=1, img_size=8)
    pipe.open(1)
    pipe.close()


def _device_id(device: torch.device | None) -> int | None:
    return None if device is None else torch.empty(0, device=device).get_device()  # "cuda" is the current one


def _inputs(request: Request, encoded: _Encoded, size: int) -> dict[str, Any]:
    """Return what DALI is fed for these rows: the bytes; what to decode, in whole pixels; what of that to resize.

    In training a window is decoded and all of it resized: what lies beside it has no influence. In evaluation the
    image is decoded and a part resized that may have fractions: Resize and CenterCrop of torchvision in one step.
    """
    positions = list(encoded)
    shapes, windows = request.shapes[positions], request.windows[positions]
    begin, end = np.zeros(windows[:, 2:].shape), windows[:, 2:]
    if request.short_side is not None:
        resized = np.floor(request.short_side * shapes / shapes.min(axis=1, keepdims=True))
        corner = np.round((resized - size) / 2)
        begin, end = (place * shapes / resized for place in (corner, corner + size))
    return {
        "jpeg": [sample.data for sample in encoded.values()],
        "start": windows[:, :2].astype(np.int32),
        "shape": windows[:, 2:].astype(np.int32),
        "begin": begin.astype(np.float32),
        "end": end.astype(np.float32),
        "flip": request.flips[positions].astype(np.int32),
    }


class _Pipe:
    """A DALI pipeline that can be built again. After an error it is of no more use until then."""

    def __init__(self, device_id: int | None, *, workers: int, img_size: int) -> None:
        self.max_batch = 0
        self._device_id, self._workers, self._img_size = device_id, workers, img_size
        self._graph: Any = None
        self._error: Exception | None = RuntimeError("no pipeline was built")

    def open(self, max_batch: int) -> None:
        """Build it, in the place of an older one, and try it out. Raises: ResourceError if it does not work."""
        self.close()
        self.max_batch, self._error = max_batch, None
        backend: Backend = "cpu" if self._device_id is None else "mixed"
        trial = Request(np.zeros(1, np.int64), np.array([[8, 8]]), np.array([[0, 0, 8, 8]]), np.zeros(1, np.bool_))
        jpeg = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8)), dtype=np.uint8)
        try:
            self._graph = make_graph(
                backend, self._device_id, workers=self._workers, max_batch=max_batch, img_size=self._img_size
            )
            for _ in range(DEPTH):  # so many batches does DALI's first run take
                self._feed(trial, {0: Sample("jpg", jpeg, 8, 8)})
            self._graph.schedule_run()
            for _ in range(DEPTH):
                self.take(None)
        except _DALI_ERRORS as error:
            self._error = error
            raise ResourceError(
                f"loader dali: expected a pipeline for {max_batch} images of {self._img_size} pixels, "
                f"got {_first_line(error)!r}; take the loader turbo"
            ) from error

    def schedule(self, request: Request, encoded: _Encoded) -> None:
        """Have these rows decoded. An error is kept for whoever takes the result."""
        if not encoded or self._error is not None:
            return
        try:
            self._feed(request, encoded)
            self._graph.schedule_run()
        except _DALI_ERRORS as error:
            self._error = error

    def take(self, out: Tensor | None) -> None:
        """Write the oldest batch under way into `out` (n, S, S, 3), or drop it. Raises: one of _DALI_ERRORS.

        A GPU's pixels are written on the current stream; the host does not wait for them.
        """
        graph = self._graph  # `close` may take it away meanwhile
        if self._error is not None:
            raise self._error
        stream = None if out is None or not out.is_cuda else torch.cuda.current_stream(out.device)
        try:
            (images,) = graph.share_outputs(cuda_stream=stream)
            if out is not None:
                import_module("nvidia.dali.plugin.pytorch").feed_ndarray(images.as_tensor(), out, cuda_stream=stream)
            graph.release_outputs()
        except _DALI_ERRORS as error:
            self._error = error
            raise

    def close(self) -> None:
        """End DALI's threads, which read the samples' memory: the samples must live until then."""
        self._error = RuntimeError("the pipeline is closed")
        self._graph = None

    def _feed(self, request: Request, encoded: _Encoded) -> None:
        for name, data in _inputs(request, encoded, self._img_size).items():
            self._graph.feed_input(name, data)


class _Job:
    """One request: what DALI decodes of it, what the embedded decoder does, and what is bad already."""

    def __init__(self, decoder: DaliDecoder, request: Request) -> None:
        self._decoder, self.request = decoder, request
        self.encoded: _Encoded = {}
        self.embedded: dict[int, Sample] = {}
        self.bad: dict[int, str] = {}

    def wait(self, seconds: float) -> bool:
        return True  # DALI cannot wait for so long and no longer; the track says "decode" while `result` blocks

    def result(self) -> Decoded:
        return self._decoder.finish(self)


class DaliDecoder:
    """Decodes requests with DALI: on the CPU if `device` is None, else on that GPU.

    Samples are read, and their checksums compared, in `start`; `workers` is the number of DALI's own threads. A job
    whose result is never taken costs its decoding and nothing else. A request larger than any before it makes a new
    pipeline, in which those in flight start anew.

    Raises: ImportError without DALI; ValueError for a device that is no GPU. From `start` and `result` ResourceError,
    if DALI fails and not because of a sample.
    """

    def __init__(
        self, samples: Samples, memory: HostMemory, stages: Stages, *,
        img_size: int, workers: int, device: torch.device | None,
    ) -> None:  # fmt: skip
        if device is not None and device.type != "cuda":
            raise ValueError(f"dali-gpu: expected a CUDA device, got {device}; take dali-cpu or turbo")
        import_dali()
        self.name = "dali-cpu" if device is None else "dali-gpu"
        self._samples, self._memory, self._stages = samples, memory, stages
        self._img_size, self._device = img_size, device
        device_id = _device_id(device)
        self._pipe, self._single = (_Pipe(device_id, workers=workers, img_size=img_size) for _ in range(2))
        self._jobs: deque[_Job] = deque()  # in flight, oldest first
        self._closed = False

    def start(self, request: Request) -> _Job:
        if self._closed:
            raise ValueError("decoder: expected an open one, got one that was closed")
        job, track = _Job(self, request), self._stages.track()
        for position, row in enumerate(request.index.tolist()):
            track.enter("read", row)
            try:
                sample = self._samples.sample(row)
                whose = job.encoded if _for_dali(sample, request.cut(position).shape) else job.embedded
                whose[position] = sample
            except DataError as error:
                job.bad[position] = str(error)
        track.enter("decode", -1)
        if job.encoded and len(request.index) > self._pipe.max_batch:
            self._pipe.open(len(request.index))
            for earlier in self._jobs:
                self._pipe.schedule(earlier.request, earlier.encoded)
        self._pipe.schedule(request, job.encoded)
        self._jobs.append(job)
        track.enter(IDLE)
        return job

    def close(self) -> None:
        """End DALI's threads and free its memory; a second call does nothing."""
        self._closed = True
        self._pipe.close()  # the jobs stay: a thread that is still in `result` uses them
        self._single.close()

    def finish(self, job: _Job) -> Decoded:
        """Return a job's result; those before it whose results nobody took are dropped."""
        if self._closed or job not in self._jobs:
            raise ValueError("decoder: expected a job in flight, got one that was taken, dropped or closed")
        track = self._stages.track()
        while self._jobs[0] is not job:
            track.enter("decode", -1)
            if self._jobs[0].encoded:
                try:
                    self._pipe.take(None)
                except _DALI_ERRORS:  # the job that is wanted will find out
                    self._pipe.close()  # before the samples go that it may still read
            self._jobs.popleft()
        try:
            num, size, gpu = len(job.request.index), self._img_size, self._device
            shape = (num, size, size, 3)
            pixels = self._memory.take(num) if gpu is None else torch.empty(shape, dtype=torch.uint8, device=gpu)
            self._decode_embedded(job, pixels)  # while DALI works on the rest
            track.enter("decode", -1)
            try:
                self._take(job, pixels)
            except _DALI_ERRORS as error:
                self._recover(job, pixels, error)
        finally:
            track.enter(IDLE)
            self._jobs.popleft()
            job.encoded.clear()
            job.embedded.clear()
        return Decoded(pixels, tuple(sorted(job.bad.items())))

    def _decode_embedded(self, job: _Job, pixels: Tensor) -> None:
        """Decode what is none of DALI's into its slots."""
        track = self._stages.track()
        slots = self._memory.take(len(job.embedded)) if pixels.is_cuda else [pixels[i] for i in job.embedded]
        for slot, (position, sample) in zip(slots, job.embedded.items(), strict=True):
            track.enter("decode", int(job.request.index[position]))
            try:
                decode_into(sample, job.request.cut(position), slot.numpy(), track)
            except DataError as error:
                job.bad[position] = str(error)
            if pixels.is_cuda:
                pixels[position].copy_(slot, non_blocking=True)

    def _take(self, job: _Job, pixels: Tensor) -> None:
        """Take DALI's part of the oldest job into its slots. Raises: one of _DALI_ERRORS."""
        num, part = len(job.encoded), pixels
        if num == 0:
            return
        if num < len(pixels):
            part = torch.empty_like(pixels[:num]) if pixels.is_cuda else self._memory.take(num)
        self._pipe.take(part)
        if part is not pixels:
            pixels[torch.tensor(list(job.encoded), device=pixels.device)] = part

    def _recover(self, job: _Job, pixels: Tensor, error: Exception) -> None:
        """Decode the oldest job image by image, so that those are bad which DALI refuses, and start the others anew.

        If each image by itself is fine, the error was that of a job behind this one, or it comes again.
        """
        track, later, num_bad = self._stages.track(), list(self._jobs)[1:], len(job.bad)
        self._pipe.close()
        self._single.open(1)
        for position, sample in job.encoded.items():
            track.enter("decode", int(job.request.index[position]))
            self._single.schedule(job.request, {position: sample})
            try:
                self._single.take(pixels[position : position + 1])
            except _DALI_ERRORS as refusal:
                job.bad[position] = _reason(sample, refusal)
                self._single.open(1)
        self._single.close()
        self._pipe.open(self._pipe.max_batch)
        if len(job.bad) == num_bad:
            self._pipe.schedule(job.request, job.encoded)
            try:
                self._take(job, pixels)
            except _DALI_ERRORS as again:
                raise ResourceError(
                    f"{self.name}: expected a decoded batch, got {_first_line(again)!r} from DALI and no sample that "
                    "causes it; try a smaller batch, or the loader turbo"
                ) from error
        for other in later:
            self._pipe.schedule(other.request, other.encoded)


def _for_dali(sample: Sample, shape: tuple[int, int]) -> bool:
    """Return whether DALI is to decode this sample. Raises: DataError for a JPEG of another size than announced."""
    header = None if sample.mode == "raw" or not is_jpeg(sample.data) else jpeg_header(sample.data)
    if header is None or header[2] in ("CMYK", "YCCK") or sample.data[-2:].tobytes() != b"\xff\xd9":  # end of image
        return False
    if header[:2] != shape:
        wanted, got = ("x".join(map(str, size)) for size in (shape, header[:2]))
        raise DataError(f"expected an image of {wanted} pixels, as announced, got {got}")
    return True


def _reason(sample: Sample, error: Exception) -> str:
    """Say what is wrong with a sample that DALI refuses: in the strict decoder's words if it does so too."""
    try:
        decode_rgb(sample)
    except DataError as damage:
        return str(damage)
    return f"expected an image that DALI decodes, got {_first_line(error)!r}"


def _first_line(error: Exception) -> str:
    """Return the line of a DALI error that says what happened; around it are tracebacks and general words."""
    text = str(error).rpartition("encountered:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if not line.startswith("Critical error")), type(error).__name__)
    return re.sub(r" sample #\d+ ?:?$", "", said)
