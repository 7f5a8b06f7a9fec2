"""Whether an exported network is the run's: both see the same held-out images, clean and attacked, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.pgd import Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.errors import CheckpointError
from fasttht.evaluate import step_size
from fasttht.models.mixture_bn import has_mixture_bn, through
from fasttht.models.standalone import Network
from fasttht.models.two_head import TwoHead
from fasttht.subject import Subject, images

LOGITS_WITHIN, ONNX_WITHIN = 1e-5, 1e-4
STEPS = 10
# ONNX runs on the CPU: this many of the images are enough to see whether it computes the same.
_ONNX_IMAGES = 512


@dataclass
class Tally:
    """What was seen so far: right answers of the run's network and of the export, and the largest differences."""

    images: int = 0
    clean: tuple[int, int] = (0, 0)
    attacked: tuple[int, int] = (0, 0)
    attacked_differ: int = 0
    logits: float = 0.0
    wrapper: float = 0.0
    onnx: float = 0.0
    onnx_images: int = 0
    ties: int = 0

    def top1(self, correct: int) -> float:
        """Return a count as percent of the images, rounded as evaluation rows are."""
        return round(100 * correct / self.images, 4)


def threat_of(subject: Subject) -> Threat:
    """Return the attack that exports are scored under: PGD-10, untargeted, in the run's norm and radius."""
    attacked = subject.config.attack
    assert attacked.eps is not None, "the config was not resolved"
    rule = subject.config.evaluation.eval_rule
    alpha = step_size(attacked.eps, STEPS, rule, attacked.norm)
    return Threat(eps=attacked.eps, alpha=alpha, steps=STEPS, norm=attacked.norm)


def chosen_rows(held_out: int, limit: int) -> Tensor:
    """Return the rows to look at, (N,) int64: all, or `limit` evenly spaced ones (a file is sorted by class)."""
    if not 0 < limit < held_out:
        return torch.arange(held_out)
    return torch.arange(limit) * held_out // limit


def compare_exact(
    subject: Subject,
    exported: TwoHead,
    wrapper: Network,
    onnx: Callable[[Tensor], Tensor] | None,
    rows: Tensor,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tally:
    """Compare the exported network, as fasttht, model.py and (onnx) onnxruntime compute it, with the run's.

    Logits and features agree to 1e-5 (through both branches of mixture BN), and PGD-10 leaves the same images right; on
    a GPU, whose max-pool backward adds in any order, up to one in a thousand may differ. ONNX's logits agree to 1e-4,
    or, for a network whose float32 does not carry that, to four times what float32 itself differs from float64.

    Raises: CheckpointError naming what differs, by how much and on which held-out row.
    """
    tally, threat, draw = Tally(), threat_of(subject), Draw(subject.config.run.seed)
    exported.to(subject.device)
    wrapper.to(subject.device)
    own = subject.model
    gradients = [input_gradient(model.logits) for model in (own, exported)]
    with evaluating(own), evaluating(exported), _repeatable():
        for batch in images(subject, rows=rows):
            x = kernels.u8_to_input(batch.x)
            logits = _compare_outputs(own, exported, wrapper, x, batch.index, tally)
            if onnx is not None and tally.onnx_images < _ONNX_IMAGES:
                part = x[: _ONNX_IMAGES - tally.onnx_images]
                expected = logits[: len(part)].cpu()
                gap, limit = onnx(part) - expected, ONNX_WITHIN
                if bool((gap.abs() > limit).any()):
                    limit = max(limit, 4 * _rounding(wrapper, part, expected))
                tally.onnx = max(tally.onnx, _within(gap, limit, "model.onnx", "logits", batch.index))
                tally.onnx_images += len(part)
            hits = []
            for model, gradient in zip((own, exported), gradients, strict=True):
                attacked = attack(gradient, x, batch.y, batch.index, threat, draw, num_classes=logits.shape[1])
                with torch.no_grad():
                    hits.append(model.logits(attacked.x_adv).argmax(dim=1) == batch.y)
            tally.attacked = (tally.attacked[0] + int(hits[0].sum()), tally.attacked[1] + int(hits[1].sum()))
            tally.attacked_differ += int((hits[0] != hits[1]).sum())
            right = int((logits.argmax(dim=1) == batch.y).sum())
            tally.clean = (tally.clean[0] + right, tally.clean[1] + right)
            tally.images += len(x)
            on_batch(tally.images)
    allowed = tally.images // 1000 if subject.device.type == "cuda" else 0
    if tally.attacked_differ > allowed:
        raise CheckpointError(
            f"export: expected PGD-{STEPS} to leave the same images right as in the run, got "
            f"{tally.attacked_differ} of {tally.images} otherwise; nothing was kept"
        )
    return tally


@torch.no_grad()
def _compare_outputs(
    own: TwoHead, exported: TwoHead, wrapper: Network, x: Tensor, index: Tensor, tally: Tally
) -> Tensor:
    """Compare logits and features of one batch; return the run's logits."""
    for branch in ("clean", "adversarial") if has_mixture_bn(own) else ("adversarial",):
        wrapper.set_branch(branch)
        with through(own, branch), through(exported, branch):
            expected, found = own(x), exported(x)
        pairs = [("model.safetensors", "logits", found.logits, expected.logits)]
        pairs += [("model.py", "logits", wrapper(x), expected.logits)]
        if expected.feat is not None and found.feat is not None:
            pairs += [("model.safetensors", "features", found.feat, expected.feat)]
            pairs += [("model.py", "features", wrapper.features(x), expected.feat)]
        for file, what, there, here in pairs:
            gap = _within(there - here, LOGITS_WITHIN, file, what, index)
            if file == "model.py":
                tally.wrapper = max(tally.wrapper, gap)
            else:
                tally.logits = max(tally.logits, gap)
    logits: Tensor = expected.logits
    return logits


@torch.no_grad()
def _rounding(wrapper: Network, x: Tensor, logits: Tensor) -> float:
    """Return how far the network's float32 logits (B, C) are from its float64 ones, at most."""
    exact = copy.deepcopy(wrapper).cpu().double()
    return float((exact(x.cpu().double()) - logits).abs().max())


def compare_predictions(
    subject: Subject, exported: TwoHead, rows: Tensor, on_batch: Callable[[int], None] = lambda done: None
) -> Tally:
    """Compare the predicted classes of an export with torchvision's keys with the run's; no attack, see there.

    An image whose two best logits in the run lie within a 1e-5th of their size is a tie, and may fall either way.

    Raises: CheckpointError naming the first held-out row that is predicted otherwise.
    """
    tally = Tally()
    exported.to(subject.device)
    with evaluating(subject.model), evaluating(exported), _repeatable(), torch.no_grad():
        for batch in images(subject, rows=rows):
            x = kernels.u8_to_input(batch.x)
            logits = subject.model.logits(x)
            expected, found = logits.argmax(dim=1), exported.logits(x).argmax(dim=1)
            best = logits.gather(1, torch.stack([expected, found], dim=1))
            differ = expected != found
            tie = best[:, 0] - best[:, 1] < LOGITS_WITHIN * best[:, 0].abs().clamp(min=1)
            wrong = differ & ~tie
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise CheckpointError(
                    f"export: expected the run's predictions, got class {int(found[row])} instead of "
                    f"{int(expected[row])} for held-out row {int(batch.index[row])} and {int(wrong.sum()) - 1} more of "
                    "its batch; nothing was kept"
                )
            tally.ties += int(differ.sum())
            right = [int((prediction == batch.y).sum()) for prediction in (expected, found)]
            tally.clean = (tally.clean[0] + right[0], tally.clean[1] + right[1])
            tally.images += len(x)
            on_batch(tally.images)
    return tally


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compare what was read back bit by bit with what was to be written. Raises: CheckpointError naming a tensor."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found or not torch.equal(expected[name].cpu(), found[name].cpu()):
            raise CheckpointError(
                f"export: expected {name} to be read back as it was written, got another one; "
                "nothing was kept: is the disk sound?"
            )


def figures(tally: Tally, held_out: int, threat: Threat | None) -> dict[str, Any]:
    """Return the scores of an export: percent over `images` of `held_out`."""
    row: dict[str, Any] = {"clean_top1": tally.top1(tally.clean[1])}
    if threat is not None:
        row |= {f"{threat.name}_top1": tally.top1(tally.attacked[1]), "alpha": threat.alpha}
    return row | {"images": tally.images, "held_out": held_out}


def _within(gap: Tensor, limit: float, file: str, what: str, index: Tensor) -> float:
    """Return the largest absolute value of gap (B, ...). Raises: CheckpointError if it is above the limit, or NaN."""
    worst = gap.abs().flatten(1).amax(dim=1)
    if not bool((worst <= limit).all()):
        row = int((~(worst <= limit)).nonzero()[0])
        raise CheckpointError(
            f"export: expected the {what} of {file} within {limit:g} of the run's, got a difference of "
            f"{float(worst[row]):.3g} on held-out row {int(index[row])}; nothing was kept"
        )
    return float(worst.max())


@contextmanager
def _repeatable() -> Iterator[None]:
    """No TF32, and no algorithm of cuDNN whose result varies, so that equal networks give equal figures."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    cudnn.deterministic = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = kept
