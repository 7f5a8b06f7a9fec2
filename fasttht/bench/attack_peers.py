"""Other libraries' PGD on our network: each as its users call it, in the memory layout that it is fastest with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fasttht.attacks.threat import Threat
from fasttht.bench.env import package_version
from fasttht.bench.jobs import time_jobs
from fasttht.models.two_head import TwoHead

# Their module and the package it comes in; `art` is the Adversarial Robustness Toolbox.
_PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
PEERS = tuple(_PACKAGES)

_NUM_CLASSES = 1000

# Steps of the attacks that find the faster layout: it is the same for each of them.
_PROBED_STEPS = 2

Run = Callable[[], Tensor]


class Logits(nn.Module):
    """The network as peers expect one: pixels to logits, in half precision on CUDA."""

    def __init__(self, model: TwoHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16, enabled=x.is_cuda):
            return self.model.logits(x)


class _ChannelsLast(Logits):
    """The same for a peer that makes its own tensors, and makes them contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


def peer_version(name: str) -> str | None:
    return package_version(_PACKAGES[name])


@dataclass(frozen=True)
class Peer:
    """A peer's attack from the clean images: called, it returns what it found. layout: of weights and images.

    one_step: one step of it, whose signs are its gradient's.
    """

    layout: str
    run: Run
    one_step: Run

    def __call__(self) -> Tensor:
        return self.run()


def peer(name: str, model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Peer:
    """Return a peer's untargeted attack, with weights and images each in whichever layout is faster.

    All four are tried, by the median of three short attacks. Raises: ImportError for a peer that is not installed.
    """
    module = import_module(name)
    build = {"torchattacks": _torchattacks, "foolbox": _foolbox, "art": _art}[name]
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    weights = {"channels_last": model, "contiguous": plain}
    images = {"channels_last": x.contiguous(memory_format=torch.channels_last), "contiguous": x.contiguous()}
    make = {
        f"weights {one}, images {other}": partial(build, module, weights[one], images[other], y)
        for one in weights
        for other in images
    }
    short = replace(threat, steps=min(_PROBED_STEPS, threat.steps))
    seconds = time_jobs({layout: made(short) for layout, made in make.items()}, x.device, windows=3)
    layout = min(seconds, key=lambda layout: median(seconds[layout]))
    return Peer(layout, make[layout](threat), make[layout](replace(threat, steps=1)))


def _torchattacks(module: Any, model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Run:
    net = Logits(model).eval()
    attack = module.PGD(net, eps=threat.eps, alpha=threat.alpha, steps=threat.steps, random_start=False)
    return partial(attack, x, y)


def _foolbox(module: Any, model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Run:
    wrapped = module.PyTorchModel(Logits(model).eval(), bounds=(0, 1), device=x.device)
    attack = module.attacks.LinfPGD(abs_stepsize=threat.alpha, steps=threat.steps, random_start=False)

    def run() -> Tensor:
        found: Tensor = attack(wrapped, x, y, epsilons=threat.eps)[1]
        return found

    return run


def _art(module: Any, model: TwoHead, x: Tensor, y: Tensor, threat: Threat) -> Run:
    """ART takes and returns NumPy arrays; carrying them to the device and back is part of its call."""
    evasion = import_module(f"{module.__name__}.attacks.evasion")
    estimators = import_module(f"{module.__name__}.estimators.classification")
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    classifier = estimators.PyTorchClassifier(
        (_ChannelsLast if channels_last else Logits)(model).eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=_NUM_CLASSES,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = evasion.ProjectedGradientDescentPyTorch(
        classifier, eps=threat.eps, eps_step=threat.alpha, max_iter=threat.steps, num_random_init=0,
        batch_size=len(x), verbose=False,
    )  # fmt: skip
    images, labels = x.contiguous().cpu().numpy(), y.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images, labels)).to(x.device)
