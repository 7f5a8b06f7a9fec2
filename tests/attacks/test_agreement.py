"""Our PGD beside torchattacks' and foolbox': their formulas restated in plain torch, and the libraries where they are.

Same weights and images, no random start: the first input gradients have the same signs, and after ten steps the same
held-out images are right.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.pgd import Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.build import build_model
from fasttht.config_file import from_flat, read_preset
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import resolve

EPS, ALPHA, STEPS = 0.06, 0.015, 10
CPU = torch.device("cpu")

Peer = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Digits:
    """A network that has learnt the digits somewhat, and the held-out ones."""

    def __init__(self) -> None:
        splits = open_splits(None)
        config = resolve(from_flat({**read_preset("quickstart"), "objective": "at", "width": 8}, where="test"))
        self.model: TwoHead = build_model(config, 10, CPU)
        x, y = self._all(splits.train)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for i in range(3 * 14):
            part = torch.arange(100 * i, 100 * (i + 1)) % len(x)
            optimizer.zero_grad()
            F.cross_entropy(self.model(x[part]).logits, y[part]).backward()
            optimizer.step()
        self.model.eval()
        self.x, self.y = self._all(splits.val)

    @staticmethod
    def _all(samples: Any) -> tuple[Tensor, Tensor]:
        pixels = [torch.from_numpy(samples.sample(i).data.copy()).view(8, 8, 3) for i in range(len(samples))]
        whole = torch.stack(pixels).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        return kernels.u8_to_input(whole), torch.from_numpy(samples.labels.copy())

    def ours(self, steps: int = STEPS) -> Tensor:
        threat = Threat(eps=EPS, alpha=ALPHA, steps=steps, start="clean")
        with evaluating(self.model):
            gradient = input_gradient(self.model.logits)
            return attack(gradient, self.x, self.y, torch.arange(360), threat, Draw(0), num_classes=10).x_adv

    @torch.no_grad()
    def right(self, x: Tensor) -> Tensor:
        return self.model.logits(x).argmax(dim=1) == self.y


class Pixels(nn.Module):
    """Pixels to logits, as other libraries want a network; keeps what the first gradient of its input was."""

    def __init__(self, model: TwoHead) -> None:
        super().__init__()
        self.model = model
        self.grads: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self.grads.append)
        return self.model.logits(x)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Digits()


def as_torchattacks(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """torchattacks.PGD 3.5 without a random start: mean loss; the perturbation is clamped, then the image."""
    adv = x.clone()
    for _ in range(STEPS):
        leaf = adv.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(nn.CrossEntropyLoss()(net(leaf), y), leaf)
        adv = leaf.detach() + ALPHA * grad.sign()
        adv = (x + (adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    return adv


def as_foolbox(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """foolbox' LinfPGD 3.3 without a random start: summed loss by backward; the same projection."""
    adv = x
    for _ in range(STEPS):
        leaf = adv.clone().requires_grad_(True)
        nn.CrossEntropyLoss(reduction="none")(net(leaf), y).sum().backward()
        assert leaf.grad is not None
        adv = adv + ALPHA * leaf.grad.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -EPS, EPS), 0, 1)
    return adv


def from_torchattacks(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    module = _peer("torchattacks")
    found: Tensor = module.PGD(net, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)(x, y)
    return found


def from_foolbox(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    module = _peer("foolbox")
    wrapped = module.PyTorchModel(net, bounds=(0, 1), device=x.device)
    found: Tensor = module.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS, random_start=False)(
        wrapped, x, y, epsilons=EPS
    )[1]
    return found


def _peer(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they import warns of itself
        return pytest.importorskip(name, reason=f"needs {name}: pip install {name}", exc_type=ImportError)


@pytest.mark.parametrize("peer", [as_torchattacks, as_foolbox, from_torchattacks, from_foolbox])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.changes_rng
def test_signs_agree_at_the_first_step_and_images_after_ten(digits: Digits, peer: Peer) -> None:
    net = Pixels(digits.model).eval()
    theirs = peer(net, digits.x.contiguous(), digits.y).detach()
    first = input_gradient(digits.model.logits)(digits.x, digits.y)
    agree = float((net.grads[0].sign() == first.sign()).double().mean())
    ours, clean = digits.right(digits.ours()), digits.right(digits.x)
    differ = int((ours != digits.right(theirs)).sum())
    sys.stderr.write(
        f"{peer.__name__}: {100 * agree:.4f} % of signs agree, {differ} of 360 images differ; "
        f"{int(clean.sum())} right, {int(ours.sum())} under attack\n"
    )
    assert agree >= 0.999
    assert differ <= 2
    assert int(clean.sum()) > 250  # else nothing would be compared
    assert int(ours.sum()) < int(clean.sum()) - 50
    assert (theirs - digits.x).abs().max() <= EPS + 1e-6
