"""What a training step has to compute and to move, so that its time can be judged: MFU, bandwidth, and the limit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fasttht.bench.ladder import ENGINE_RUNGS, has_byte_model, predicted_bytes
from fasttht.models.two_head import TwoHead

# A host that needs so much of the step's time to ask for its work is what the device waits for.
LAUNCH_BOUND = 0.9
# Where neither arithmetic nor memory gets so far, in percent of its best, neither is what limits a step.
NEAR_PCT = 10.0
# More waiting for images than this is worth a faster loader before anything else.
DATA_BOUND_PCT = 5.0

_NUM_CLASSES = 1000
# BN in training mode wants more than one value of each channel, and small images end at one position.
_IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of step. attack_steps: input gradients of the attack by `engine`; replay: free replays, 1 is none."""

    that: bool
    attack_steps: int = 0
    engine: str | None = None
    replay: int = 1


@cache
def model_flops(step: Step, arch: str, stem: str, width: int, img_size: int) -> float:
    """Return the FLOPs of a step for one image that the method cannot do without, counted on tensors without data.

    2 FLOPs a multiply-add. A training step's backward has weight gradients and, but for free replays, none with respect
    to the images; an attack step has those alone; g runs forward once. What an engine does beyond it is not counted, so
    MFU falls by it.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        feat_dim = 128 if step.that else None
        model = TwoHead(arch, _NUM_CLASSES, stem=stem, width=width, classifier="linear", feat_dim=feat_dim)  # type: ignore[arg-type]
    x = torch.empty(_IMAGES, 3, img_size, img_size, device="meta")
    y = torch.empty(_IMAGES, dtype=torch.int64, device="meta")

    def differentiate(images: torch.Tensor, *, feature: bool) -> None:
        logits, feat = model(images) if feature else (model.logits(images), None)
        torch.autograd.backward(F.cross_entropy(logits, y) + (0 if feat is None else feat.sum()))

    leaf = x.clone().requires_grad_(True)
    found = float(step.replay * _count(lambda: differentiate(leaf if step.replay > 1 else x, feature=step.that)))
    if step.attack_steps:
        model.requires_grad_(False)  # the counter does not take autograd.grad; without it, no weight gradient is made
        found += step.attack_steps * _count(lambda: differentiate(leaf, feature=False))
    if step.that:
        with torch.no_grad():
            found += _count(lambda: model(x))
    return found / _IMAGES


def _count(job: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        job()
    return int(counter.get_total_flops())


def model_bytes(step: Step, arch: str, stem: str, width: int, img_size: int, itemsize: int) -> int | None:
    """Return the activation bytes of a step for one image by the analytic model, None for a network it cannot count.

    The training pass and g as eager PyTorch runs them; the attack as its engine's rung does.
    """
    if not has_byte_model(stem):
        return None

    def passes(name: str) -> int:
        return predicted_bytes(name, arch, img_size, width=width, itemsize=itemsize)

    found = step.replay * passes("train")
    if step.attack_steps:
        assert step.engine is not None, "an attack has an engine"
        found += step.attack_steps * passes(ENGINE_RUNGS.get(step.engine, "A3"))
    return found + (passes("clean") if step.that else 0)


def judge(
    *,
    seconds: float,
    host_share: float | None,
    data_wait_pct: float,
    flops: float,
    num_bytes: int | None,
    tflops: float,
    gb_per_s: float,
) -> dict[str, Any]:
    """Return what a step of `seconds` reached, in percent of the machine's best, and what limits it.

    flops, num_bytes: of the whole batch. host_share: the host's time to ask for the step over the step's, None where
    the host does the work itself. limit: `data` where more than 5 % of the step waits for images; else `launch` where
    the host takes at least 90 % of the step to ask for it, so that the device idles; else whichever of arithmetic
    (`compute`, mfu_pct) and memory (`bandwidth`, copy_pct) is nearer to its best, if that is 10 % at least. Otherwise,
    and where there is no byte model, the limit is None: it is not known.
    """
    mfu = 100 * flops / seconds / (tflops * 1e12)
    copy = None if num_bytes is None else 100 * num_bytes / seconds / (gb_per_s * 1e9)
    limit: str | None
    if data_wait_pct > DATA_BOUND_PCT:
        limit = "data"
    elif host_share is not None and host_share >= LAUNCH_BOUND:
        limit = "launch"
    elif copy is None or max(copy, mfu) < NEAR_PCT:
        limit = None
    else:
        limit = "bandwidth" if copy >= mfu else "compute"
    return {"mfu_pct": mfu, "copy_pct": copy, "limit": limit}
