"""The graph that DALI runs, on the CPU or with nvJPEG on a GPU: jpeg -> window -> resized -> flipped."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

Backend = Literal["cpu", "mixed"]

# Batches that DALI works on at a time. One is 15 % slower: its threads idle at the end of each batch.
DEPTH = 2


def make_graph(backend: Backend, device_id: int | None, *, workers: int, max_batch: int, img_size: int) -> Any:
    """Return a DALI pipeline, not yet built, from what the decoder feeds to (S, S, 3) uint8; "mixed" is on the GPU."""
    fn, types, pipeline = import_dali()
    graph = pipeline.Pipeline(max_batch, workers, device_id, prefetch_queue_depth=DEPTH)
    with graph:
        # On the CPU DALI reads the samples where they lie: the job holds them until it is done.
        jpeg = fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1, no_copy=backend == "cpu")
        start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
        begin, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("begin", "end"))
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        images = fn.decoders.image_slice(
            jpeg, start, shape, axis_names="HW", device=backend, output_type=types.RGB,
            adjust_orientation=False,  # EXIF is ignored, as everywhere here
            jpeg_fancy_upsampling=True,  # chroma as libjpeg-turbo interpolates it, on the GPU too
            affine=False,  # ranks on one node would all be tied to the same cores
        )  # fmt: skip
        images = fn.resize(
            images, roi_start=begin, roi_end=end, size=[img_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True
        )
        graph.set_outputs(fn.flip(images, horizontal=flip))
    return graph


def import_dali() -> tuple[Any, Any, Any]:
    """Return DALI's modules fn, types and pipeline. Raises: ImportError."""
    try:
        return tuple(import_module(f"nvidia.dali.{name}") for name in ("fn", "types", "pipeline"))  # type: ignore[return-value]
    except ModuleNotFoundError as error:
        raise ImportError(f'loader dali: expected NVIDIA DALI, got {error}; run: pip install "fasttht[dali]"') from None
    except (ImportError, OSError, RuntimeError) as error:  # a library that is missing or damaged
        text = f"loader dali: expected a DALI that loads, got {error}; install it again, or take the loader turbo"
        raise ImportError(text) from None
