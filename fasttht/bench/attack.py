"""The ladder of attack engines beside its peers: one network, one batch, one start, K steps of untargeted PGD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.engine import EagerEngine, Engine, FoldedEngine
from fasttht.attacks.pgd import FP16_LOSS_SCALE, pgd_linf
from fasttht.attacks.threat import Threat
from fasttht.bench.env import environment, package_version
from fasttht.bench.jobs import Job, summarise_jobs, time_jobs
from fasttht.bench.windows import Progress
from fasttht.models.two_head import TwoHead

ENGINES = ("backward", "eager", "folded", "compiled", "fused")
PEERS = ("torchattacks", "foolbox")
_EPS, _ALPHA = 4 / 255, 1 / 255


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: names of ENGINES and PEERS on a network and a batch."""

    engines: tuple[str, ...]
    arch: str
    stem: str
    width: int
    batch_size: int
    img_size: int
    steps: int
    windows: int
    cpu: bool = False


class _Logits(nn.Module):
    """The network as peers expect one: pixels to logits."""

    def __init__(self, model: TwoHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16, enabled=x.is_cuda):
            return self.model.logits(x)


def measure(settings: Settings, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. Ratios are to torchattacks, or to `eager` without it."""
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
    model, x, y = _subject(settings, device)
    threat = Threat(eps=_EPS, alpha=_ALPHA, steps=settings.steps)
    jobs: dict[str, Callable[[], Tensor]] = {}
    missing: list[dict[str, Any]] = []
    for name in settings.engines:
        try:
            jobs[name] = _job(name, model, x, y, threat)
        except ImportError as error:
            missing.append({"name": name, "not_run": f"it is not installed ({error})"})
    reference = next((name for name in ("torchattacks", "eager") if name in jobs), next(iter(jobs)))
    timed: dict[str, Job] = dict(jobs)
    seconds = time_jobs(timed, device, windows=settings.windows, progress=progress)
    rows = summarise_jobs(seconds, len(x), reference)
    exact = EagerEngine(model, model.logits).gradient(x, y).sign()
    for row in rows:
        row |= _quality(row["name"], model, jobs[row["name"]], x, y, exact)
        row["version"] = package_version(row["name"]) if row["name"] in PEERS else None
    return {
        "bench": "attack",
        "env": environment(device) | {"threads": torch.get_num_threads()},
        "settings": {
            "arch": settings.arch, "stem": settings.stem, "width": settings.width, "batch_size": settings.batch_size,
            "img_size": settings.img_size, "attack": f"pgd{settings.steps}", "windows": settings.windows,
            "device": str(device), "dtype": "float16" if device.type == "cuda" else "float32",
        },
        "rows": rows + missing,
    }  # fmt: skip


def _subject(settings: Settings, device: torch.device) -> tuple[TwoHead, Tensor, Tensor]:
    """Return a network whose BN layers have seen data, images and classes; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoHead(settings.arch, 1000, stem=settings.stem, width=settings.width)  # type: ignore[arg-type]
        x = torch.rand(settings.batch_size, 3, settings.img_size, settings.img_size)
        y = torch.randint(0, 1000, (settings.batch_size,))
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
        return _peer(name, model, x, y, threat)
    if name == "backward":
        twin = copy.deepcopy(model).train()  # whose running statistics move
        return lambda: _backward_attack(twin, x, y, threat)
    gradient = _engine(name, model, x).gradient
    return lambda: pgd_linf(gradient, x, y, threat, x).x_adv


def _engine(name: str, model: TwoHead, x: Tensor) -> Engine:
    if name == "eager":
        wrapped = _Logits(model)
        return EagerEngine(model, wrapped, loss_scale=FP16_LOSS_SCALE if x.is_cuda else 1.0)
    return FoldedEngine(name, model, dtype=torch.float16 if x.is_cuda else torch.float32)


def _backward_attack(model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Attack as most public code does: `.backward()`, weight gradients and all, BN in training mode."""
    x_adv = x.clone()
    for _ in range(threat.steps):
        leaf = x_adv.detach().requires_grad_(True)
        model.zero_grad()
        F.cross_entropy(_Logits(model)(leaf), y).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        kernels.pgd_linf_step_(x_adv, leaf.grad, x, eps=threat.eps, alpha=threat.alpha)
    return x_adv


def _peer(name: str, model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Callable[[], Tensor]:
    """Return a peer's attack in whichever memory layout it is faster with; both are tried, twice each."""
    module = import_module(name)
    net = _Logits(model).eval()
    run: Callable[[Tensor], Tensor]
    if name == "torchattacks":
        pgd = module.PGD(net, eps=threat.eps, alpha=threat.alpha, steps=threat.steps, random_start=False)
        run = lambda images: pgd(images, y)  # noqa: E731 -- one of two ways to call a peer
    else:
        wrapped = module.PyTorchModel(net, bounds=(0, 1), device=x.device)
        linf = module.attacks.LinfPGD(abs_stepsize=threat.alpha, steps=threat.steps, random_start=False)
        run = lambda images: linf(wrapped, images, y, epsilons=threat.eps)[1]  # noqa: E731
    layouts = [x, x.contiguous()]
    seconds = time_jobs({str(i): partial(run, images) for i, images in enumerate(layouts)}, x.device, windows=1)
    images = layouts[min(range(2), key=lambda i: seconds[str(i)])]
    return lambda: run(images)


def _quality(
    name: str, model: TwoHead, job: Callable[[], Tensor], x: Tensor, y: Tensor, exact: Tensor
) -> dict[str, float]:
    """Return, in percent: how often the attack succeeds; for an engine also its gradient's agreement and zeros."""
    x_adv = job()
    with torch.no_grad():
        clean, attacked = (model.logits(images).argmax(dim=1) for images in (x, x_adv))
    found = {"changed_pct": 100 * (clean != attacked).double().mean().item()}
    if name in ENGINES and name != "backward":
        gradient = _engine(name, model, x).gradient(x, y)
        found["sign_agreement_pct"] = 100 * (gradient.sign() == exact).double().mean().item()
        found["zero_grad_pct"] = 100 * (gradient == 0).double().mean().item()
    return found
