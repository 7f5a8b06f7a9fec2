"""Which decoders there are, whether each can run here, and which one `auto` takes."""

from __future__ import annotations

import functools
import importlib.util

import torch

from fasttht.pipelines import ResourceError
from fasttht.pipelines.beton import MODES, BetonFile
from fasttht.pipelines.decoder import Decoder
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.stages import Stages

DECODERS = ("turbo", "ffcv", "dali-cpu", "dali-gpu", "synthetic")

# Hardware JPEG engines came with A100 (8.0) and are in H100 (9.0), B200 (10.0) and B300 (10.3); the
# 8.6, 8.9 and 12.0 ones are consumers' GPUs without one.
_JPEG_ENGINES = ((8, 0), (9, 0), (10, 0), (10, 3))


def why_not(name: str, device: torch.device) -> str | None:
    """Return why a decoder cannot run here and what to do about it, or None if it can: it was loaded and tried."""
    if name == "ffcv" and not _installed("ffcv"):
        return 'the ffcv package is not installed; run: pip install "fasttht[ffcv]"'
    if name.startswith("dali") and not _installed("nvidia.dali"):
        return 'NVIDIA DALI is not installed; run: pip install "fasttht[dali]"'
    if name == "dali-gpu" and device.type != "cuda":
        return f"it decodes on a CUDA device and this run is on {device.type}; take dali-cpu or turbo"
    return _what_breaks(name, device) if name in ("ffcv", "dali-cpu", "dali-gpu") else None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


@functools.cache  # DALI takes a second or two
def _what_breaks(name: str, device: torch.device) -> str | None:
    """Load a decoder's library and try it out; return what goes wrong and what to do about it, or None."""
    try:
        if name == "ffcv":
            from fasttht.pipelines.decode_ffcv import load_decode_into

            load_decode_into()
        else:
            from fasttht.pipelines.decode_dali import try_out

            try_out(device if name == "dali-gpu" else None)
    except (ImportError, OSError, ResourceError) as error:
        said = " ".join(str(error).split()).removeprefix(f"loader {name.partition('-')[0]}: ")
        return said if "; " in said else f"it does not load: {said}; install it again, or take the loader turbo"
    return None


def choose(name: str, device: torch.device, samples: Samples) -> tuple[str, str]:
    """Return the decoder that `name` means on this device for these samples, and why, in words for people."""
    if name != "auto":
        return name, "as asked"
    if device.type != "cuda":
        return "turbo", "no GPU to decode on"
    # On a GPU without an engine for it, decoding takes the multiprocessors that the attack needs.
    if torch.cuda.get_device_capability(device) not in _JPEG_ENGINES:
        return "turbo", "CPU threads keep the GPU free for the attack"
    if not isinstance(samples, BetonFile) or (samples.stored()[0] != MODES.index("jpg")).any():
        return "turbo", "this GPU has a JPEG engine, but the images are not all JPEGs in a .beton file"
    obstacle = why_not("dali-gpu", device)
    if obstacle is not None:
        return "turbo", f"this GPU has a JPEG engine, but for dali-gpu {obstacle}"
    reason = "this GPU has a JPEG engine, which leaves it free for the attack"
    return "dali-gpu", f"{reason}; not measured: compare it with turbo by `fasttht bench load`"


def open_decoder(
    name: str, samples: Samples, *, img_size: int, workers: int, device: torch.device, stages: Stages
) -> Decoder:
    """Open one of DECODERS. Raises: ValueError for another name; ImportError if its package is not there."""
    memory = HostMemory(img_size, pinned=device.type == "cuda")
    if name in ("turbo", "ffcv"):
        from fasttht.pipelines.decode_turbo import decode_into
        from fasttht.pipelines.threaded import DecodeInto, ThreadedDecoder

        function: DecodeInto = decode_into
        if name == "ffcv":
            from fasttht.pipelines.decode_ffcv import load_decode_into

            function = load_decode_into()
        return ThreadedDecoder(name, function, samples, memory, stages, workers=workers)
    if name in ("dali-cpu", "dali-gpu"):
        from fasttht.pipelines.decode_dali import DaliDecoder

        on = device if name == "dali-gpu" else None
        return DaliDecoder(samples, memory, stages, img_size=img_size, workers=workers, device=on)
    if name == "synthetic":
        from fasttht.pipelines.synthetic import SyntheticDecoder

        return SyntheticDecoder(img_size=img_size, device=device)
    raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {name}")
