"""The ladder of attack engines beside its peers: one network, one batch, one start, K steps of untargeted PGD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.engine import EagerEngine, Engine, FoldedEngine
from fasttht.attacks.graph import CudaRecorder
from fasttht.attacks.pgd import FP16_LOSS_SCALE, Draw
from fasttht.attacks.threat import Threat
from fasttht.bench.attack_peers import PEERS, Logits, Peer, peer, peer_version
from fasttht.bench.calls import Calls, count_calls, peak_memory_gib
from fasttht.bench.env import environment
from fasttht.bench.jobs import OUT_OF_MEMORY, Job, free_memory, summarise_jobs, time_jobs
from fasttht.bench.ladder import ENGINE_RUNGS, count_rung, has_byte_model, predicted_bytes
from fasttht.bench.trace import write_trace
from fasttht.bench.windows import Progress
from fasttht.kernels import convs
from fasttht.models.two_head import TwoHead
from fasttht.precision import fastest_kernels, full_precision

ENGINES = tuple(ENGINE_RUNGS)
_EPS, _ALPHA = 4 / 255, 1 / 255
_NUM_CLASSES = 1000
# Images whose float32 gradients are taken at once: of 256 of them a ResNet-50 keeps 20 GB.
_EXACT_IMAGES = 32
# Images of a batch where nothing else is asked for: what a small machine can wait for, and what fills a GPU.
CPU_BATCH_SIZE, CUDA_BATCH_SIZE = 8, 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: names of ENGINES and PEERS on a network and a batch. batch_size None: 8, on CUDA 128."""

    engines: tuple[str, ...]
    arch: str
    stem: str
    width: int
    batch_size: int | None
    img_size: int
    steps: int
    windows: int
    cpu: bool = False
    trace: Path | None = None


def device_of(cpu: bool) -> torch.device:
    """Return the device that a benchmark runs on."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def batch_size_of(batch_size: int | None, device: torch.device) -> int:
    return batch_size or (CUDA_BATCH_SIZE if device.type == "cuda" else CPU_BATCH_SIZE)


def described(settings: Settings) -> dict[str, Any]:
    """Return the report's settings."""
    device = device_of(settings.cpu)
    return {
        "arch": settings.arch, "stem": settings.stem, "width": settings.width,
        "batch_size": batch_size_of(settings.batch_size, device), "img_size": settings.img_size,
        "attack": f"pgd{settings.steps}", "windows": settings.windows, "device": str(device),
        "dtype": "float16" if device.type == "cuda" else "float32",
    }  # fmt: skip


@fastest_kernels()
def measure(settings: Settings, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. Ratios are to torchattacks, or to `eager` without it.

    What is counted (launches, waits, memory) and traced is so after the timed windows, in calls of its own. What memory
    does not suffice for has its reason where its figures would be.
    """
    device = device_of(settings.cpu)
    model, x, y = subject(settings, device)
    threat = Threat(eps=_EPS, alpha=_ALPHA, steps=settings.steps, start="clean")
    jobs: dict[str, Callable[[], Tensor]] = {}
    missing: list[dict[str, Any]] = []

    def drop(name: str) -> None:
        jobs.pop(name, None)
        free_memory(device)
        missing.append({"name": name, "not_run": OUT_OF_MEMORY})

    for name in settings.engines:
        progress(f"{name}: building it")
        try:
            jobs[name] = _job(name, model, x, y, threat)
            continue
        except ImportError as error:
            missing.append({"name": name, "not_run": f"it is not installed ({error})"})
            continue
        except torch.OutOfMemoryError:
            pass
        drop(name)
    rows: list[dict[str, Any]] = []
    traced: dict[str, str] = {}
    seconds = time_jobs(jobs, device, windows=settings.windows, progress=progress, drop=drop)
    if seconds:
        reference = next((name for name in ("torchattacks", "eager") if name in jobs), next(iter(jobs)))
        rows = summarise_jobs(seconds, len(x), reference)
        _add_rungs(rows, settings)
        if settings.trace is not None:
            traced = write_trace(jobs, device, settings.trace)
        exact = _exact_signs(model, x, y)
        for row in rows:
            progress(f"{row['name']}: counting")
            row["version"] = peer_version(row["name"]) if row["name"] in PEERS else None
            # Each is let go when it has been counted: the next one's memory is its own.
            _describe(row, jobs.pop(row["name"]), settings, model, x, y, exact)
            free_memory(device)
    return {
        "bench": "attack",
        "env": environment(device) | {"threads": torch.get_num_threads()},
        "settings": described(settings),
        "rows": rows + missing,
    } | traced


def _describe(
    row: dict[str, Any], job: Callable[[], Tensor], settings: Settings, model: TwoHead, x: Tensor, y: Tensor,
    exact: Tensor | None,
) -> None:  # fmt: skip
    """Put into a row what is counted, and how good the attack is; or that memory did not suffice for it."""
    try:
        row |= _counted(row["name"], job, x.device, settings)
        row |= _quality(row["name"], model, job, x, y, exact)
    except torch.OutOfMemoryError:
        row["not_counted"] = OUT_OF_MEMORY


def _exact_signs(model: TwoHead, x: Tensor, y: Tensor) -> Tensor | None:
    """Return the signs that others are compared with; None if memory does not suffice: what was timed is kept."""
    try:
        return exact_gradient(EagerEngine(model, model.logits).gradient, x, y).sign()
    except torch.OutOfMemoryError:
        pass
    free_memory(x.device)  # after the handler: the error's traceback kept tensors alive
    return None


def exact_gradient(gradient: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the input gradients that others are compared with: in full float32, some images at a time."""
    with full_precision():
        starts = range(0, len(x), _EXACT_IMAGES)
        return torch.cat([gradient(x[i : i + _EXACT_IMAGES], y[i : i + _EXACT_IMAGES]) for i in starts])


def subject(settings: Settings, device: torch.device) -> tuple[TwoHead, Tensor, Tensor]:
    """Return a network whose BN layers have seen data, images and classes; the global RNG is left as it was."""
    batch_size = batch_size_of(settings.batch_size, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoHead(settings.arch, _NUM_CLASSES, stem=settings.stem, width=settings.width)  # type: ignore[arg-type]
        x = torch.rand(batch_size, 3, settings.img_size, settings.img_size)
        y = torch.randint(0, _NUM_CLASSES, (batch_size,))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # as after training: the zeros they start from would cut branches off
        model.train().logits(x)
    return model.eval().requires_grad_(True), x, y.to(device)


def _job(name: str, model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Callable[[], Tensor]:
    """Return one attack, from the clean image, last iterate. Raises: ImportError for a peer that is not installed."""
    if name in PEERS:
        return peer(name, model, x, y, threat)
    if name == "backward":
        twin = copy.deepcopy(model).train()  # whose running statistics move
        return lambda: _backward_attack(twin, x, y, threat)
    engine, index, draw = _engine(name, model, x), torch.arange(len(x), device=x.device), Draw(0)
    return lambda: engine.attack(x, y, index, threat, draw, num_classes=_NUM_CLASSES).x_adv


def _engine(name: str, model: TwoHead, x: Tensor) -> Engine:
    if name.startswith("eager"):
        scale = FP16_LOSS_SCALE if x.is_cuda else 1.0
        return EagerEngine(
            model, Logits(model), batch_norm="batch" if name == "eager-batch" else "eval", loss_scale=scale
        )
    if not x.is_cuda:
        return FoldedEngine(name, model, dtype=torch.float32)
    recorder = CudaRecorder(x.device) if name != "compiled" else None  # as --attack-graph auto does
    return FoldedEngine(name, model, dtype=torch.float16, recorder=recorder)


def _backward_attack(model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Attack as most public code does: `.backward()`, weight gradients and all, BN in training mode."""
    x_adv = x.clone()
    for _ in range(threat.steps):
        leaf = x_adv.detach().requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(Logits(model)(leaf), y).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        kernels.pgd_linf_step_(x_adv, leaf.grad, x, eps=threat.eps, alpha=threat.alpha)
    return x_adv


def _add_rungs(rows: list[dict[str, Any]], settings: Settings) -> None:
    """Put each engine's rung into its row, how much faster than the lowest rung here it is, and by the byte model.

    speedup is from medians; predicted_speedup, and mb_per_image of one input gradient in half precision, are left out
    for networks that the model cannot count.
    """
    engines = sorted((row for row in rows if row["name"] in ENGINE_RUNGS), key=lambda row: ENGINE_RUNGS[row["name"]])
    for row in engines:
        lowest = engines[0]
        row |= {
            "rung": ENGINE_RUNGS[row["name"]],
            "speedup": lowest["ms"] / row["ms"],
            "speedup_to": ENGINE_RUNGS[lowest["name"]],
        }
        if has_byte_model(settings.stem):
            own, other = (
                predicted_bytes(rung, settings.arch, settings.img_size, width=settings.width)
                for rung in (row["rung"], row["speedup_to"])
            )
            row |= {"predicted_speedup": other / own, "predicted_mb_per_image": own / 1e6}


def _counted(name: str, job: Job, device: torch.device, settings: Settings) -> dict[str, Any]:
    """Return launches and waits of one attack step, and the memory that an attack needs."""
    found: dict[str, Any] = {"gpu_mem_gib": peak_memory_gib(job, device)}
    if name == "compiled" and device.type != "cuda":
        # What the compiler made of the operators is not seen by the dispatcher, and on a CPU nothing is launched.
        return found | {"launches_per_step": None, "waits_per_step": None}
    if name == "fused" and device.type != "cuda":
        # A CPU runs its ops' references; on tensors without data each is one call, as on a GPU. The update is one more.
        network: dict[str, Any] = {"stem": settings.stem, "width": settings.width}
        count = count_rung(ENGINE_RUNGS[name], settings.arch, settings.img_size, **network)
        return found | Calls(count.launches + 1, count.waits, None, "meta").per(1)
    if name == "fused":
        found["fused_conv_shapes"] = convs.shapes_run()
    return found | count_calls(job, device).per(settings.steps)


def _quality(
    name: str, model: TwoHead, job: Callable[[], Tensor], x: Tensor, y: Tensor, exact: Tensor | None
) -> dict[str, Any]:
    """Return, in percent: how often the attack succeeds; of its gradient the agreement of signs and the zeros.

    A peer's gradient is known by its first step. Training-mode BN has gradients of another function: there is no
    agreement to speak of. Without exact signs there is none either, and the reason in its place.
    """
    x_adv = job()
    with torch.no_grad():
        clean, attacked = (model.logits(images).argmax(dim=1) for images in (x, x_adv))
    found: dict[str, Any] = {"changed_pct": 100 * (clean != attacked).double().mean().item()}
    if name == "backward":
        return found
    if isinstance(job, Peer):
        found["layout"] = job.layout
        signs, inside = (job.one_step() - x).sign(), (x > 0) & (x < 1)  # a step out of [0, 1] is no step
        signs, exact = signs[inside], None if exact is None else exact[inside]
    else:
        signs = _engine(name, model, x).gradient(x, y).sign()
    found["zero_grad_pct"] = 100 * (signs == 0).double().mean().item()
    if name == "eager-batch":
        return found
    if exact is None:
        found["not_counted"] = OUT_OF_MEMORY
    else:
        found["sign_agreement_pct"] = 100 * (signs == exact).double().mean().item()
    return found
