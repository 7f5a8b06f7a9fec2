"""Which decoders there are, whether each can run here, and which one `auto` takes."""

from __future__ import annotations

import importlib.util

import torch

from fasttht.pipelines.decoder import Decoder
from fasttht.pipelines.host_memory import HostMemory
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.stages import Stages

DECODERS = ("turbo", "ffcv", "dali-cpu", "dali-gpu", "synthetic")

# Hardware JPEG engines came with A100 (8.0) and are in H100 (9.0) and later, but not in the 8.6 and 8.9 ones.
_JPEG_ENGINES = ((8, 0), (9, 0), (10, 0))


def why_not(name: str, device: torch.device) -> str | None:
    """Return why a decoder cannot run here and what to do about it, or None if it can."""
    if name == "ffcv" and not _installed("ffcv"):
        return 'the ffcv package is not installed; run: pip install "fasttht[ffcv]"'
    if name.startswith("dali") and not _installed("nvidia.dali"):
        return 'NVIDIA DALI is not installed; run: pip install "fasttht[dali]"'
    if name == "dali-gpu" and device.type != "cuda":
        return f"it decodes on a CUDA device and this run is on {device.type}; take dali-cpu or turbo"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def choose(name: str, device: torch.device) -> tuple[str, str]:
    """Return the decoder that `name` means on this device, and why, in words for people."""
    if name != "auto":
        return name, "as asked"
    # GPU decoding is never chosen unasked: on a V100 it takes the multiprocessors that the attack needs, and where
    # the GPU has an engine for it nobody has measured it here yet.
    reason = "CPU threads keep the GPU free for the attack"
    if device.type != "cuda":
        return "turbo", "no GPU to decode on"
    if torch.cuda.get_device_capability(device) in _JPEG_ENGINES and why_not("dali-gpu", device) is None:
        reason += "; this GPU has a JPEG engine: compare --loader dali-gpu with `fasttht bench load`"
    return "turbo", reason


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
