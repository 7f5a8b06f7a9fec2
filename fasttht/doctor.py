"""What this machine has, what is wrong with it, and what to type: one line for each part that a run may need."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Files, pipes and mapped data of a run with 32 workers; Debian's default is 1024.
_OPEN_FILES = 1024
# A ResNet-152's checkpoints, three at a time, are 2 GB.
_FREE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line. status: ok, problem (a run here will fail or crawl), or absent (optional). advice: what to type."""

    part: str
    status: Literal["ok", "problem", "absent"]
    text: str
    advice: str = ""


def examine(folder: Path) -> list[Finding]:
    """Look at everything; `folder` is where run folders would lie. Nothing is installed, written or sent."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _torch, _driver, _gpu, _nvrtc, _kernels, _decoders, _apex, lambda: _disk(folder), _limits
    )  # fmt: skip
    return [finding for look in looks for finding in look()]


def _python() -> Iterator[Finding]:
    text = (
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    )
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "problem", text, "install Python 3.11 or later")


def _torch() -> Iterator[Finding]:
    version = torch.__version__
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", "ok", f"{version}, built for {built_for}, {torch.get_num_threads()} threads")


def _driver() -> Iterator[Finding]:
    found = driver_cuda()
    if found is None:
        yield Finding("driver", "absent", "no NVIDIA driver: libcuda.so.1 does not load")
        return
    text = f"{_driver_release() or 'of unknown release'}, for CUDA up to {found[0]}.{found[1]}"
    built_for = int((torch.version.cuda or "0").split(".")[0])
    if built_for > found[0]:
        advice = f"update the driver, or install a torch built for CUDA {found[0]}"
        yield Finding("driver", "problem", f"{text}; this torch is built for CUDA {torch.version.cuda}", advice)
    else:
        yield Finding("driver", "ok", text)


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver runs, None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _driver_release() -> str | None:
    try:
        found = re.search(r"Module.*?(\d+\.\d+(?:\.\d+)?)", _DRIVER_FILE.read_text(encoding="utf-8"))
        return found[1] if found else None
    except OSError:  # a container may hide it
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip().split("\n")[0] or None


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        text = "nvidia-smi is there, but torch sees no CUDA device" if driver else "none: training runs on the CPU"
        advice = "install a torch built for your driver's CUDA version, or update the driver" if driver else ""
        yield Finding("gpu", "problem" if driver else "absent", text, advice)
        return
    for i in range(torch.cuda.device_count()):
        yield judge_gpu(
            f"gpu {i}",
            torch.cuda.get_device_name(i),
            torch.cuda.get_device_capability(i),
            torch.cuda.get_device_properties(i).total_memory,
            torch.cuda.get_arch_list(),
        )


def judge_gpu(part: str, name: str, capability: tuple[int, int], memory: int, built_for: list[str]) -> Finding:
    """Say whether this torch has code for a device of this compute capability."""
    major, minor = capability
    text = f"{name}, compute capability {major}.{minor}, {memory / 2**30:.0f} GiB"
    same_major = [
        arch for arch in built_for if arch.startswith(f"sm_{major}") and int(arch[3:].rstrip("abcf")) // 10 == major
    ]
    runs = any(int(arch[3:].rstrip("abcf")) % 10 <= minor for arch in same_major)
    runs = runs or any(arch.startswith("compute_") and int(arch[8:]) <= 10 * major + minor for arch in built_for)
    if runs:
        return Finding(part, "ok", text)
    advice = f"install a torch built for sm_{major}{minor}; this one has {' '.join(built_for) or 'no GPU code'}"
    if major == 7 and minor < 5:
        advice = 'pip install "torch==2.10.*": the last default build with Volta (sm_70) in it'
    return Finding(part, "problem", f"{text}: this torch has no code for it", advice)


def _nvrtc() -> Iterator[Finding]:
    """The compiler of the kernels; it needs no GPU, so it is tried on a machine without one too."""
    from fasttht.kernels import build

    extra = f'pip install "fasttht[cuda{(torch.version.cuda or "12").split(".")[0]}]"'
    try:
        compiler = build.Nvrtc()
        arch = max(compiler.archs, key=lambda name: int(name[3:]))
        compiler.compile("drelu_add", (("VALUE", "Half"),), arch)
    except Exception as error:  # of cuda.core, of its bindings, of the loader
        broken = torch.cuda.is_available() and not isinstance(error, ImportError)
        yield Finding("nvrtc", "problem" if broken else "absent", _first_line(error), extra)
        return
    archs = sorted(int(name[3:]) for name in compiler.archs)
    text = f"{compiler.version} through cuda-core {_version('cuda-core')} compiles for sm_{archs[0]} to sm_{archs[-1]}"
    yield Finding("nvrtc", "ok", text)


def _kernels() -> Iterator[Finding]:
    from fasttht import kernels

    try:
        found = kernels.implementation()
    except (ValueError, RuntimeError) as error:
        yield Finding("kernels", "problem", str(error), "unset FASTTHT_KERNELS")
    else:
        yield Finding("kernels", "ok" if found.name == "cuda" else "absent", f"{found.name}: {found.reason}")


def _decoders() -> Iterator[Finding]:
    from fasttht.pipelines import backends

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dali = "nvidia-dali-cuda120"
    packages = {"turbo": "simplejpeg", "ffcv": "ffcv", "dali-cpu": dali, "dali-gpu": dali}
    for name, package in packages.items():
        obstacle = backends.why_not(name, device)
        broken = _why_not_loaded(name) if _is_installed(package) else None
        if broken is not None:
            again = f"pip install --force-reinstall {package}"
            yield Finding(f"loader {name}", "problem", f"{package} {_version(package)} does not load: {broken}", again)
        elif obstacle is None:
            yield Finding(f"loader {name}", "ok", f"{package} {_version(package)}")
        else:
            text, _, advice = obstacle.partition("; ")
            yield Finding(f"loader {name}", "absent", text, advice.removeprefix("run: "))


def _why_not_loaded(name: str) -> str | None:
    """Load what a decoder decodes with, and return what is wrong with it: to be installed is not enough."""
    try:
        if name == "ffcv":
            from fasttht.pipelines.decode_ffcv import load_decode_into

            load_decode_into()
        else:
            importlib.import_module("simplejpeg" if name == "turbo" else "nvidia.dali.backend")
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _apex() -> Iterator[Finding]:
    # By its compiled parts: the package of that name in the index is another project's.
    parts = [name for name in ("amp_C", "bnp", "fused_conv_bias_relu") if importlib.util.find_spec(name) is not None]
    if parts:
        yield Finding("apex", "ok", f"compiled parts found: {', '.join(parts)}")
    else:
        advice = "only from its repository, and never needed: https://github.com/NVIDIA/apex#installation"
        yield Finding("apex", "absent", "none of its compiled parts", advice)


def _disk(folder: Path) -> Iterator[Finding]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.0f} GB free at {existing}"
    if not os.access(existing, os.W_OK):
        yield Finding("disk", "problem", f"{existing} cannot be written", "give --output a folder that can")
    else:
        enough = free >= _FREE_BYTES
        yield Finding(
            "disk", "ok" if enough else "problem", text, "" if enough else "make room, or give another --output"
        )


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES
    yield Finding(
        "open files",
        "ok" if enough else "problem",
        f"up to {soft:,}",
        "" if enough else f"ulimit -n {min(hard, 65536)}",
    )


def _is_installed(package: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=package)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
