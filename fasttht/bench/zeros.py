"""How large a loss scale half-precision attacks need: the share of input gradients that are exactly zero against it.

In float16 what is below 6e-8 becomes 0, sign(0) is 0, and a pixel whose gradient vanished does not move: the attack
gets weaker and nothing says so. A mean over the batch makes every gradient smaller by the batch size. Too large a
scale overflows instead, and gradients become infinite or NaN. The signs are compared with float32's.

The network is the folded one that attacks use, with weights as initialised: a trained one's gradients are of another
size, so a run also logs its own share (`zero_grad_pct`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.attacks.folded import FoldedNet
from fasttht.bench.attack import Settings as Subject
from fasttht.bench.attack import exact_gradient, subject
from fasttht.bench.env import environment
from fasttht.bench.windows import Progress

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to look at: types by name, exponents of the loss scale, and the network and batch."""

    dtypes: tuple[str, ...]
    exponents: tuple[int, ...]
    arch: str
    stem: str
    width: int
    batch_size: int | None
    img_size: int
    cpu: bool = False


def measure(settings: Settings, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Measure everything; return the report, ready for JSON. A row for each type, reduction and scale."""
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
    model, x, y = subject(
        Subject(
            engines=(), arch=settings.arch, stem=settings.stem, width=settings.width, batch_size=settings.batch_size,
            img_size=settings.img_size, steps=1, windows=1, cpu=settings.cpu,
        ),
        device,
    )  # fmt: skip
    net = FoldedNet(model, torch.float32)
    exact = exact_gradient(lambda images, classes: _gradient(net, images, classes, "sum", 1.0), x, y)
    rows = []
    for name in settings.dtypes:
        net = FoldedNet(model, DTYPES[name])
        for reduction in REDUCTIONS:
            rows += _rows(net, name, reduction, settings.exponents, x, y, exact, progress)
    return {
        "bench": "zeros",
        "env": environment(device) | {"threads": torch.get_num_threads()},
        "settings": {
            "arch": settings.arch, "stem": settings.stem, "width": settings.width, "batch_size": settings.batch_size,
            "img_size": settings.img_size, "device": str(device), "weights": "as initialised", "engine": "folded",
        },
        "float32_zero_grad_pct": _percent(exact == 0),
        "rows": rows,
    }  # fmt: skip


def _rows(
    net: FoldedNet,
    dtype: str,
    reduction: Reduction,
    exponents: Sequence[int],
    x: Tensor,
    y: Tensor,
    exact: Tensor,
    progress: Progress,
) -> list[dict[str, Any]]:
    rows = []
    for exponent in exponents:
        progress(f"{dtype}, {reduction}, loss times 2^{exponent}")
        found = _gradient(net, x, y, reduction, 2.0**exponent)
        rows.append(
            {
                "name": f"{dtype} {reduction} 2^{exponent}", "dtype": dtype, "reduction": reduction,
                "scale_exponent": exponent, "zero_grad_pct": _percent(found == 0),
                "nonfinite_pct": _percent(~found.isfinite()),
                "sign_agreement_pct": _percent(found.sign() == exact.sign()),
            }
        )  # fmt: skip
    return rows


def _gradient(net: FoldedNet, x: Tensor, y: Tensor, reduction: Reduction, scale: float) -> Tensor:
    """Return the pixels' gradient as the folded engine gets it, in float32, but for reduction and scale."""
    leaf = x.detach().requires_grad_(True)
    loss = F.cross_entropy(net(leaf), y, reduction=reduction) * scale
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def _percent(which: Tensor) -> float:
    return 100 * which.double().mean().item()
