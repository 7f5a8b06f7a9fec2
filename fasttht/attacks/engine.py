"""Where an attack's input gradients come from: a ladder of engines, each equal to the one below it and faster.

eager     the network itself, under autocast. Any module, any BN mode.
folded    the network rebuilt for input gradients only: BN folded into the convolutions once per training step (in at
          least float32, then rounded), weights persistent in one type and channels-last, no autocast.
compiled  folded, with the pointwise passes fused by torch.compile; anew for each of the first eight shapes.
fused     folded, with a hand-written backward: ReLU masks and residual additions in one pass each.

All return the gradient of the sum over the batch of the cross entropy, in pixels, times a power of two; and all run the
whole attack. The folded ones do that in the layout of the network's own input, on a GPU as one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels, log
from fasttht.attacks.folded import FoldedNet
from fasttht.attacks.fused import FusedGradient
from fasttht.attacks.graph import CudaRecorder, GraphedAttack, Recorder
from fasttht.attacks.laid_out import attack_laid_out
from fasttht.attacks.pgd import FP16_LOSS_SCALE, Attacked, Draw, InputGradient, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.config import AttackConfig
from fasttht.errors import UsageError
from fasttht.models.denoise import has_denoising
from fasttht.models.two_head import TwoHead

# From so many multiply-adds for one image's forward on `auto` takes the gradient by hand on a CPU. Below it the smaller
# cost of each call counts, not what is saved in memory traffic (ResNet-50 at 224: 4.1e9).
_BY_HAND_FROM_MACS = 2e8


class Engine(Protocol):
    """A source of input gradients that belongs to one model. reason: why it was taken, in words for people."""

    name: str
    reason: str

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what an `InputGradient` does, for images x (B, 3, H, W) and classes y, (B,) or (B, C)."""
        ...

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        threat: Threat,
        draw: Draw,
        *,
        num_classes: int,
        soft_target: Tensor | None = None,
    ) -> Attacked:
        """Do what `pgd.attack` does; x_adv may be in another memory format."""
        ...

    def probabilities(self, x: Tensor) -> Tensor:
        """Return p(x), (B, C) without gradient, by the network that the gradients are of: TRADES' attack compares."""
        ...

    def refresh_(self) -> None:
        """Take over the model's weights and statistics as they are now; once per training step, before its attack."""
        ...


class EagerEngine:
    """The model itself, in evaluation mode or, with `batch_norm="batch"`, with each batch's own statistics.

    Neither the model's modes nor its buffers are different afterwards.
    """

    name = "eager"

    def __init__(
        self,
        model: nn.Module,
        logits: Callable[[Tensor], Tensor],
        *,
        batch_norm: str = "eval",
        loss_scale: float = 1.0,
        reason: str = "",
    ) -> None:
        self.reason = reason
        self._model = model
        self._batch_norm = batch_norm
        self._logits = logits
        self._gradient = input_gradient(logits, loss_scale)

    def refresh_(self) -> None:
        """Do nothing: the model is always up to date."""

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        with evaluating(self._model):
            if self._batch_norm == "eval":
                return self._gradient(x, y)
            with batch_statistics(self._model):
                return self._gradient(x, y)

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        threat: Threat,
        draw: Draw,
        *,
        num_classes: int,
        soft_target: Tensor | None = None,
    ) -> Attacked:
        return attack(self.gradient, x, y, index, threat, draw, num_classes=num_classes, soft_target=soft_target)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        with evaluating(self._model):
            return self._logits(x).softmax(dim=1)


class FoldedEngine:
    """The folded network, differentiated by autograd, compiled or not, or by hand.

    dtype: of weights and activations; the head and the loss are float32 at least, as in the model. With a recorder the
    attack is recorded and replayed.

    Raises: ValueError for a model that cannot be folded, with the reason.
    """

    def __init__(
        self,
        name: str,
        model: TwoHead,
        *,
        dtype: torch.dtype,
        reason: str = "",
        recorder: Recorder | None = None,
    ) -> None:
        self.name, self.reason = name, reason
        self._model = model
        self._net = FoldedNet(model, dtype)
        scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self._gradient, of_input = _DIFFERENTIATED[name](self._net, scale)
        self._attack = partial(attack_laid_out, _LaidOutNet(self._net, of_input))
        self._graphed = None if recorder is None else GraphedAttack(self._attack, recorder)

    @property
    def graphed(self) -> GraphedAttack | None:
        """What records and replays attacks, or None if each is run."""
        return self._graphed

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return self._gradient(x, y)

    def attack(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        threat: Threat,
        draw: Draw,
        *,
        num_classes: int,
        soft_target: Tensor | None = None,
    ) -> Attacked:
        if self._graphed is not None:
            return self._graphed(x, y, index, threat, draw, num_classes=num_classes, soft_target=soft_target)
        counters = draw.counters(x.device)
        return self._attack(x, y, index, threat, counters, num_classes=num_classes, soft_target=soft_target)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        logits: Tensor = self._net(x)
        return logits.softmax(dim=1)

    def refresh_(self) -> None:
        self._net.refresh_(self._model)


# The network's own input, the classes and the input's layout to a gradient like the input.
_InputGradientLaidOut = Callable[[Tensor, Tensor, kernels.Layout], Tensor]


class _LaidOutNet:
    """A folded network as `attack_laid_out` takes it."""

    def __init__(self, net: FoldedNet, gradient: _InputGradientLaidOut) -> None:
        self.mean, self.std, self.dtype = net.mean, net.std, net.stem.weight.dtype
        self.layout = net.stem.layout
        self.gradient = gradient


def _by_autograd(net: FoldedNet, loss_scale: float) -> tuple[InputGradient, _InputGradientLaidOut]:
    def of_input(pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        return input_gradient(lambda leaf: net.logits(leaf, layout), loss_scale)(pixels, y)

    return input_gradient(net, loss_scale), of_input


def _compiled(net: FoldedNet, loss_scale: float) -> tuple[InputGradient, _InputGradientLaidOut]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="sum") * loss_scale

    def loss_of_input(pixels: Tensor, y: Tensor, layout: kernels.Layout) -> Tensor:
        return F.cross_entropy(net.logits(pixels, layout), y, reduction="sum") * loss_scale

    # The functional gradient, because autograd.grad is not traced; the shape is part of the compiled code.
    gradient: InputGradient = torch.compile(torch.func.grad(loss), fullgraph=True, dynamic=False)
    of_input: _InputGradientLaidOut = torch.compile(torch.func.grad(loss_of_input), fullgraph=True, dynamic=False)
    plain, plain_of_input = _by_autograd(net, loss_scale)
    return _OrPlain(lambda x, y: gradient(x.detach(), y), plain), _OrPlain(of_input, plain_of_input)


class _OrPlain:
    """A compiled function, and the plain one where there is no compiled one.

    That is for good once the compiler has failed, which is said; and for shapes that come when torch keeps as much code
    of one function as it will: eight shapes, and growing images (`--progressive-size`) may have more.
    """

    def __init__(self, compiled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
        from torch._dynamo import exc  # a second that the other engines need not wait

        self._compiled, self._plain = compiled, plain
        self._error, self._is_full = exc.TorchDynamoException, exc.FailOnRecompileLimitHit
        self._failed = False
        self._refused: set[torch.Size] = set()

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        if not self._failed and x.shape not in self._refused:
            try:
                return self._compiled(x, *rest)
            except self._is_full:  # both raised before anything has run
                self._refused.add(x.shape)
            except self._error as error:
                self._failed = True
                cause = getattr(error, "inner_exception", error)
                why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
                log.say(f"attack engine: folded from here on; compiling failed: {why}")
        return self._plain(x, *rest)


def _by_hand(net: FoldedNet, loss_scale: float) -> tuple[InputGradient, _InputGradientLaidOut]:
    gradient = FusedGradient(net, loss_scale)
    return gradient, gradient.laid_out


# How each engine differentiates the folded network, with respect to pixels and to its own input.
_DIFFERENTIATED: dict[str, Callable[[FoldedNet, float], tuple[InputGradient, _InputGradientLaidOut]]] = {
    "folded": _by_autograd,
    "compiled": _compiled,
    "fused": _by_hand,
}


def build_engine(
    settings: AttackConfig,
    model: TwoHead,
    logits: Callable[[Tensor], Tensor],
    *,
    img_size: int,
    amp_dtype: torch.dtype,
) -> Engine:
    """Build the engine that the settings ask for. logits: the model's, under the run's autocast.

    The folded ones compute in amp_dtype on a GPU and in the model's own type on a CPU, whose half types are slow.
    `--attack-graph auto` captures the attacks of folded and fused on a GPU: what torch.compile makes is captured only
    if asked for.

    Raises: ValueError for a model that cannot be folded; UsageError for a graph where there can be none.
    """
    parameter = next(model.parameters())
    name, reason = choose_engine(
        settings.attack_engine, model, img_size, parameter.device, batch_norm=settings.attack_bn
    )
    device, graph = parameter.device, settings.attack_graph
    if graph == "on" and (device.type != "cuda" or name == "eager"):
        got = "the eager engine" if device.type == "cuda" else f"device {device}"
        raise UsageError(
            f"--attack-graph: expected auto or off beside {got}, got on; only folded attacks on a GPU are captured"
        )
    if name != "eager":
        on_gpu = device.type == "cuda"
        captured = on_gpu and (graph == "on" or (graph == "auto" and name != "compiled"))
        return FoldedEngine(
            name,
            model,
            dtype=amp_dtype if on_gpu else parameter.dtype,
            reason=f"{reason}; each attack is one CUDA graph" if captured else reason,
            recorder=CudaRecorder(device) if captured else None,
        )
    scale = FP16_LOSS_SCALE if amp_dtype == torch.float16 else 1.0
    return EagerEngine(model, logits, batch_norm=settings.attack_bn, loss_scale=scale, reason=reason)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every BN layer normalise with the batch's own statistics; the running ones are neither read nor written."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(layer.running_mean, layer.running_var) for layer in layers]
    for layer in layers:
        layer.running_mean = layer.running_var = None  # which is how a BN layer in evaluation mode is told to
    try:
        yield
    finally:
        for layer, (mean, var) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var = mean, var


def choose_engine(
    name: str, model: TwoHead, img_size: int, device: torch.device, *, batch_norm: str
) -> tuple[str, str]:
    """Return the engine that `name` means for this model, and why, in words for people."""
    if name != "auto":
        return name, "as asked"
    if batch_norm == "batch":
        return "eager", "batch statistics cannot be folded"
    if has_denoising(model):
        return "eager", "denoising blocks cannot be folded"
    if device.type == "cuda":
        return "folded", "the faster ones have not been measured on a GPU yet: compare them with `fasttht bench attack`"
    macs = count_macs(model, img_size)
    if macs < _BY_HAND_FROM_MACS:
        return "folded", f"{macs / 1e6:.1f} million multiply-adds an image are few"
    return "fused", f"{macs / 1e9:.1f} billion multiply-adds an image"


def count_macs(model: TwoHead, img_size: int) -> int:
    """Return the multiply-adds of the trunk's convolutions in one image's forward."""
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(model.trunk).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, 3, img_size, img_size, device="meta"))
    return int(counter.get_total_flops()) // 2
