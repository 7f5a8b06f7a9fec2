"""What a machine can do at best: its bandwidth measured by copying, its arithmetic by a table or a large product."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fasttht.bench.jobs import synchronize
from fasttht.bench.windows import quartiles

# Dense half-precision tensor-core TFLOP/s with float32 accumulation, from NVIDIA's data sheets, by device name; the
# first that matches. Boards of one chip differ in clock and power, so a name that is not here is measured instead.
HALF_TFLOPS = (
    (r"V100.*PCIE", 112.0), (r"V100-SXM3", 130.0), (r"V100", 125.0),
    (r"\bA100\b", 312.0),
    (r"\bH100 PCIe\b", 756.0), (r"\bH100 NVL\b", 835.0), (r"\bH100\b", 989.0),
    (r"\bH200 NVL\b", 835.0), (r"\bH200\b", 989.0),
    (r"\bL40S\b", 362.0),
    (r"RTX 3090$", 71.0), (r"RTX 4090$", 165.2),
)  # fmt: skip

# Caches that the machine does not tell the size of; no CPU of a training node has more in one piece.
_UNKNOWN_CACHE = 64 * 2**20
# Buffers are so many caches large: what is left of the one before in the cache then does not matter.
_CACHES = 4
_LARGEST = 2**30


def known_tflops(device_name: str) -> float | None:
    """Return the dense half-precision peak of a GPU, None for one that is not in the table."""
    return next((peak for pattern, peak in HALF_TFLOPS if re.search(pattern, device_name)), None)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory: a GPU's L2, a CPU's largest."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or _UNKNOWN_CACHE
    found = [_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(found, default=0) or _UNKNOWN_CACHE


def _size(path: Path) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
    return int(match[1]) * 1024 ** " KMG".index(match[2] or " ") if match else 0


def copy_bandwidth(device: torch.device, *, windows: int, buffer_bytes: int | None = None) -> dict[str, Any]:
    """Measure copying between two buffers larger than the cache; gb_per_s counts bytes read and bytes written."""
    size = buffer_bytes or min(_CACHES * cache_bytes(device), _LARGEST)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = 20 if device.type == "cuda" else 1
    low, median, high = quartiles(_window_seconds(lambda: target.copy_(source), device, calls, windows))
    return {
        "gb_per_s": 2 * size / median / 1e9,
        "quartiles": [2 * size / high / 1e9, 2 * size / low / 1e9],
        "buffer_mb": size / 1e6,
    }


def arithmetic_peak(device: torch.device, *, windows: int, side: int | None = None) -> dict[str, Any]:
    """Return the peak that MFU is a share of, tflops, and its source: a known GPU's data sheet, else what is measured.

    That is a product of square matrices, in the type that training uses: float16 on CUDA, float32 on a CPU; there the
    faster of it and a convolution, for products go through a library that is slow on other makers' CPUs.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_tflops(name)
        if known is not None:
            return {"tflops": known, "source": f"data sheet of {name}, dense float16"}
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    side = side or (8192 if device.type == "cuda" else 1024)
    # Not random: only the clock may notice what is multiplied, and the global random state stays as it is.
    a = torch.linspace(-1, 1, side * side, device=device).view(side, side).to(dtype)
    out = torch.empty_like(a)
    calls = 10 if device.type == "cuda" else 1
    _, median, _ = quartiles(_window_seconds(lambda: torch.mm(a, a, out=out), device, calls, windows))
    kind = str(dtype).removeprefix("torch.")
    product: dict[str, Any] = {
        "tflops": 2 * side**3 / median / 1e12,
        "source": f"measured product of {side} x {side}, {kind}",
    }
    if device.type == "cuda":
        return product
    channels, pixels = side // 4, 28
    x = torch.linspace(-1, 1, channels * pixels**2).view(1, channels, pixels, pixels)
    weight = torch.linspace(-1, 1, channels**2 * 9).view(channels, channels, 3, 3)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    _, median, _ = quartiles(_window_seconds(lambda: F.conv2d(x, weight, padding=1), device, calls, windows))
    convolution: dict[str, Any] = {
        "tflops": 2 * weight.numel() * pixels**2 / median / 1e12,
        "source": f"measured convolution, 3 x 3, {channels} channels of {pixels} x {pixels}, {kind}",
    }
    return max(product, convolution, key=lambda measured: measured["tflops"])


def _window_seconds(job: Any, device: torch.device, calls: int, windows: int) -> list[float]:
    """Return the seconds of a call in each window of `calls`, after two calls to warm up."""
    job()
    job()
    found = []
    for _ in range(windows):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            job()
        synchronize(device)
        found.append((time.perf_counter() - start) / calls)
    return found
