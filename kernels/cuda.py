"""Which implementation CUDA tensors get, and why; and the launch of a kernel through NVIDIA's cuda.core.

Nothing is imported or asked of a GPU before the first CUDA tensor. `FASTTHT_KERNELS` chooses: `auto` (the kernels
where one can be compiled and loaded, else plain torch), `cuda` (the kernels, or an error that says what is missing),
`torch`. CPU tensors always get the reference.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import torch

from fasttht.kernels import build
from fasttht.kernels.launches import Launch

VARIABLE = "FASTTHT_KERNELS"
CHOICES = ("auto", "cuda", "torch")

BLOCK = 256
# Blocks of 256 threads that fill a multiprocessor of 2048; each thread loops over what is left.
BLOCKS_PER_SM = 8

# Built and loaded before any is relied on: source, kernel and macros of a small one.
_PROBE: tuple[str, str, build.Defines] = ("drelu_add", "drelu_add", (("VALUE", "Half"),))

# (op, implementation) -> calls with tensors that a kernel might have taken, so that a fallback cannot go unseen.
ran: Counter[tuple[str, str]] = Counter()


class Implementation(NamedTuple):
    """What CUDA tensors get, and the reason in one sentence."""

    name: Literal["cuda", "torch"]
    reason: str


class Backend(Protocol):
    """What runs a launch."""

    def launch(self, launch: Launch, device: torch.device) -> None: ...


def implementation(device: int = 0) -> Implementation:
    """Return which implementation tensors of that CUDA device get, and why.

    Raises: ValueError if FASTTHT_KERNELS is none of its values; RuntimeError if it says `cuda` and that cannot be.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}, got {wanted}")
    if wanted == "torch":
        return Implementation("torch", f"{VARIABLE}=torch asks for plain torch.")
    found = _find(device)
    if wanted == "cuda" and found.name == "torch":
        raise RuntimeError(f"{VARIABLE}: expected auto or torch on this machine, got cuda; {found.reason}")
    return found


@cache
def _find(device: int) -> Implementation:
    if not torch.cuda.is_available():
        return Implementation("torch", "torch sees no CUDA device.")
    if torch.version.hip:
        return Implementation("torch", "torch is built for ROCm, and the kernels are CUDA.")
    extra = f'pip install "fasttht[cuda{(torch.version.cuda or "12").split(".")[0]}]"'
    try:
        compiler = _compiler()
    except (ImportError, OSError, RuntimeError) as err:
        return Implementation("torch", f"The CUDA compiler does not load ({_first_line(err)}); run: {extra}.")
    arch = _arch(device)
    if arch not in compiler.archs:
        return Implementation("torch", f"NVRTC {compiler.version} does not compile for {arch}.")
    try:
        _core().prepare(*_PROBE, device)
    except Exception as err:  # cuda.core's own classes among them: too new for the driver, no room, a broken header
        return Implementation("torch", f"A kernel does not build or load on {arch} ({_first_line(err)}).")
    return Implementation("cuda", f"NVRTC {compiler.version} compiles the kernels for {arch}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@cache
def _compiler() -> build.Nvrtc:
    return build.Nvrtc()


@cache
def _arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def backend(device: torch.device) -> Backend | None:
    """Return what launches kernels on that device, or None where tensors there get the reference."""
    if device.type != "cuda":
        return None
    return _core() if implementation(device.index).name == "cuda" else None


def refuse(op: str, why: str) -> None:
    """Take note that no kernel takes a call.

    Raises: ValueError if FASTTHT_KERNELS says that only kernels will do.
    """
    if os.environ.get(VARIABLE) == "cuda":
        raise ValueError(f"{op}: expected tensors that its kernel takes, got others: {why}; {VARIABLE}=auto allows it")
    ran[op, "torch"] += 1


class _Stream:
    """A torch stream as cuda.core takes one: by NVIDIA's stream protocol, version 0."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class CudaCore:
    """Launches through cuda.core, on torch's current stream; kernels are kept once loaded."""

    def __init__(self, core: Any, compiler: build.Compiler) -> None:
        self._core = core
        self._compiler = compiler
        # Of a library of CUDA 12: one handle serves every device of the architecture.
        self._kernel = lru_cache(maxsize=None)(self._load)
        self._config = lru_cache(maxsize=256)(self._configure)

    def prepare(self, source: str, kernel: str, defines: build.Defines, device: int) -> None:
        """Build and load a kernel without launching it. Raises: whatever the compiler or the driver has against it."""
        with torch.cuda.device(device):
            self._core.Device(device).set_current()
            self._kernel(source, kernel, defines, _arch(device))

    def launch(self, launch: Launch, device: torch.device) -> None:
        """Launch without waiting. For a graph capture the kernel must have run before: loading cannot be captured."""
        index = device.index
        with torch.cuda.device(device):
            # A thread that has made no runtime call yet has no current context, and a launch needs one. The primary
            # context is the one torch uses.
            self._core.Device(index).set_current()
            kernel = self._kernel(launch.source, launch.kernel, launch.defines, _arch(index))
            stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
            self._core.launch(stream, self._config(launch.items, _multiprocessors(index)), kernel, *launch.args)

    def _load(self, source: str, kernel: str, defines: build.Defines, arch: str) -> Any:
        code = build.cubin(source, defines, arch, self._compiler)
        return self._core.ObjectCode.from_cubin(code, name=f"{source}-{arch}").get_kernel(kernel)

    def _configure(self, items: int, multiprocessors: int) -> Any:
        blocks = min(-(-items // BLOCK), BLOCKS_PER_SM * multiprocessors)
        return self._core.LaunchConfig(grid=blocks, block=BLOCK)


@cache
def _core() -> CudaCore:
    return CudaCore(importlib.import_module("cuda.core"), _compiler())


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
