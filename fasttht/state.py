"""Everything the next step depends on. What is not here is not in a checkpoint, and not in the result."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from fasttht.attacks.engine import Engine, build_engine
from fasttht.attacks.free import FreeDelta
from fasttht.bank import Bank, build_bank
from fasttht.config import TrainConfig
from fasttht.distributed import SOLO, World
from fasttht.gradients import Reducer
from fasttht.metrics import Meter
from fasttht.models.clean_encoder import CleanEncoder, lerp_
from fasttht.models.two_head import CosineClassifier, TwoHead, decay_groups
from fasttht.regions import region
from fasttht.schedule import LearningRate, Schedule
from fasttht.step_engine import build_step_engine
from fasttht.traits import TRAITS


class GuardedSGD(torch.optim.SGD):
    """Fused SGD that remembers, on the device, whether the loss scaler made it skip its last step.

    The fused kernel reads `found_inf` itself, so a skipped step costs no host sync. Momentum buffers exist from the
    start, with their parameter's strides: a contiguous buffer beside a channels-last parameter would make the fused
    kernel pair up the wrong elements, silently.
    """

    found_inf: Tensor  # set by torch.amp.GradScaler around step()

    def __init__(self, groups: list[dict[str, object]], *, momentum: float, nesterov: bool, lr: Tensor) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        self.last_found_inf = torch.zeros((), device=lr.device)
        self._refused = torch.zeros((), dtype=torch.bool, device=lr.device)
        if momentum:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step unless `found_inf` is 1 or the gradient is refused. Called by GradScaler.step only."""
        self.found_inf = torch.maximum(self.found_inf, self._refused.to(self.found_inf.dtype))
        self.last_found_inf.copy_(self.found_inf.reshape(()))
        super().step()

    def refuse(self, whether: Tensor) -> None:
        """Have the next step skipped if `whether`, () bool on the parameters' device, is true."""
        self._refused.copy_(whether)


def new_scaler(device: torch.device, amp_dtype: torch.dtype) -> torch.amp.GradScaler:
    """Return a loss scaler whose tensors exist, so that they can be saved and loaded.

    The scale starts at 1 where it is not needed for range: the scaler is then only the guard that keeps a non-finite
    gradient from the weights.
    """
    scaler = torch.amp.GradScaler(
        device.type,
        init_scale=2.0**16 if amp_dtype == torch.float16 else 1.0,
        growth_interval=2000 if amp_dtype == torch.float16 else 2**31 - 1,
    )
    scaler.scale(torch.zeros((), device=device))  # creates them
    return scaler


class Updated(Protocol):
    """The parts of a state that an optimizer update needs."""

    optimizer: GuardedSGD
    scaler: torch.amp.GradScaler
    lr: Tensor
    updates: Tensor
    meter: Meter

    @property
    def schedule(self) -> LearningRate: ...


@torch.no_grad()
def guarded_update_(state: Updated, model: nn.Module, trunk: nn.Module, before: list[Tensor]) -> Tensor:
    """Apply the accumulated gradients of `model` unless their norm is not finite, without a host sync.

    It is infinite too where finite gradients are so large (1e19 in float32) that momentum or weights would overflow.

    Mutates weights, momentum, scaler, learning rate and the update count; clears the gradients. A skipped update
    brings the trunk's buffers back to `before`. Returns () float64, 1 if the update was taken, 0 if it was skipped:
    rates that follow are multiplied by it, in float64 because 1 - m loses digits in float32.
    """
    state.lr.copy_(state.schedule.at(state.updates))
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    state.optimizer.refuse(~norm.isfinite())
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    skipped = state.optimizer.last_found_inf
    for buffer, kept in zip(trunk.buffers(), before, strict=True):
        torch.where(skipped > 0, kept, buffer, out=buffer)
    taken = 1 - skipped.double()
    state.updates += taken.to(torch.int64)
    state.meter.once(grad_norm=torch.where(skipped > 0, 0.0, norm), skipped=skipped, steps=1)
    return taken


def update_tensors(state: Updated, model: nn.Module) -> dict[str, Tensor]:
    """Return, by name, what a checkpoint must hold of the update itself; the live tensors, not copies."""
    training: dict[str, Tensor] = {"updates": state.updates, "meter": state.meter.sums}
    for name, parameter in model.named_parameters():
        if "momentum_buffer" in state.optimizer.state[parameter]:
            training[f"momentum.{name}"] = state.optimizer.state[parameter]["momentum_buffer"]
    # Not the scaler's state_dict(): that reads them to the host.
    scale, growth = state.scaler._scale, state.scaler._growth_tracker
    assert scale is not None, "new_scaler created the scaler's tensors"
    assert growth is not None, "new_scaler created the scaler's tensors"
    return training | {"scaler.scale": scale, "scaler.growth_tracker": growth}


class TrainState:
    """A run between two steps.

    Everything in it is the same on all ranks but delta, of which each holds its rows, and the meter's sums.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: TwoHead,
        clean_encoder: CleanEncoder | None,
        schedule: Schedule,
        *,
        img_size: int,
        amp_dtype: torch.dtype = torch.float32,
        num_images: int | None = None,
        world: World = SOLO,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Build a fresh state. report: told in one line of a step engine that turns out not to work."""
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        self.device, self.dtype, self.amp_dtype = device, dtype, amp_dtype
        self.world = world
        method, optim = config.method, config.optim
        assert optim.batch_size is not None, "the config was not resolved"
        # networks
        self.model = model
        self.clean_encoder = clean_encoder
        self._encoder_digest: str | None = None
        self.ema = copy.deepcopy(model).requires_grad_(False) if optim.model_ema else None
        # the update
        self.lr = torch.zeros((), device=device)
        self.optimizer = GuardedSGD(
            decay_groups(model, optim.weight_decay, decay_all=optim.decay_all),
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            lr=self.lr,
        )
        self.scaler = new_scaler(device, amp_dtype)
        self.schedule = schedule
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        # the method
        self.bank: Bank | None = None
        if clean_encoder is not None:
            self.bank = build_bank(
                method, config.model.feat_dim, num_images, seed=config.run.seed, device=device, dtype=dtype
            )
        self.delta: FreeDelta | None = None
        if config.attack.replay > 1:
            shape = (optim.batch_size, 3, img_size, img_size)
            self.delta = FreeDelta(shape, device=device, dtype=dtype, world=world)
        self.engine: Engine | None = None
        if TRAITS[method.objective].attacked and config.attack.replay == 1:
            self.engine = build_engine(config.attack, model, self.attack_logits, img_size=img_size, amp_dtype=amp_dtype)
        self.step_engine = build_step_engine(
            config, model, self.bank, report=report, abandon=self.abandon_, world=world
        )
        # progress
        self.step = 0
        self.meter = Meter(device, TRAITS[method.objective].parts, world=world)
        self.reducer = None if world.size == 1 else Reducer(world, list(model.parameters()), self._moved_by_forwards())

    def autocast(self) -> torch.autocast:
        """Return a fresh autocast context; a fresh one, because its weight cache must not outlive a backward."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)

    def attack_logits(self, x: Tensor) -> Tensor:
        """Return f's logits as the eager attack sees them: under the run's autocast, in the mode f is in."""
        with self.autocast():
            return self.model.logits(x)

    @region("clean_encoder")
    def clean_features(self, x: Tensor) -> Tensor | None:
        """Return g(x), (B, D) of unit norm without gradient, or None if there is no clean encoder."""
        if self.clean_encoder is None:
            return None
        before = [buffer.clone() for buffer in self.clean_encoder.trunk.buffers() if not self.clean_encoder.frozen]
        with self.autocast():
            feat_clean: Tensor = self.clean_encoder(x)
        for buffer, kept in zip(self.clean_encoder.trunk.buffers(), before, strict=False):
            torch.where(buffer.isfinite(), buffer, kept, out=buffer)  # an overflow would stay in them for good
        return feat_clean

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return every tensor a checkpoint holds, by file and name; they are the live ones, not copies."""
        training = update_tensors(self, self.model)
        if self.bank is not None:
            training |= {f"bank.{name}": tensor for name, tensor in self.bank.state().items()}
        if self.delta is not None:
            training["delta"] = self.delta.value
        files = {"model": dict(self.model.state_dict()), "training": training}
        if self.ema is not None:
            files["ema"] = dict(self.ema.state_dict())
        if self.clean_encoder is not None and not self.clean_encoder.frozen:
            files["clean_encoder"] = dict(self.clean_encoder.state_dict())
        return files

    def to_save(self) -> dict[str, dict[str, Tensor]] | None:
        """Return `tensors` as a checkpoint holds them, that of one process, on rank 0; None elsewhere."""
        files = self.tensors()
        files["training"]["meter"] = self.meter.total()
        whole = None if self.delta is None else self.delta.collect()
        if whole is not None:
            files["training"]["delta"] = whole
        return files if self.world.main else None

    @contextmanager
    def to_load(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Give tensors to fill with a checkpoint's, whatever number of ranks wrote it; then every rank takes its part.

        Left by an exception, what was not the live tensor is forgotten.
        """
        files = self.tensors()
        if self.world.size > 1 and self.delta is not None:
            files["training"]["delta"] = torch.empty(self.delta.shape, dtype=self.dtype)
        yield files
        if self.delta is not None and self.world.size > 1:
            self.delta.take_(files["training"]["delta"])
        if not self.world.main:
            self.meter.sums.zero_()

    def depends_on(self) -> dict[str, str]:
        """Return the digest of a frozen g: no checkpoint holds it, and a resumed run must find the same one."""
        if self.clean_encoder is None or not self.clean_encoder.frozen:
            return {}
        if self._encoder_digest is None:
            digest = hashlib.sha256()
            for tensor in self.clean_encoder.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._encoder_digest = digest.hexdigest()[:16]
        return {"clean encoder": self._encoder_digest}

    @region("optimizer")
    def statistics(self) -> list[Tensor]:
        """Return copies of f's BN statistics, to be handed to `update_` after the forward that changes them."""
        return [buffer.clone() for buffer in self.model.trunk.buffers()]

    def _moved_by_forwards(self) -> list[Tensor]:
        """Return the running statistics of f, and of a g that trains: what each rank's own images move."""
        trunks: list[nn.Module] = [self.model.trunk]
        if self.clean_encoder is not None and not self.clean_encoder.frozen:
            trunks.append(self.clean_encoder.trunk)
        return [buffer for trunk in trunks for buffer in trunk.buffers() if buffer.is_floating_point()]

    def abandon_(self) -> None:
        """Forget a step that broke off before it ran: its gradients, and what the scaler noted of it."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler._per_optimizer_states.clear()

    @region("optimizer")
    @torch.no_grad()
    def update_(self, config: TrainConfig, before: list[Tensor]) -> Tensor:
        """Apply the accumulated gradients and everything that follows an update, without a host sync.

        Mutates weights, momentum, scaler, EMA, momentum g and the update count; clears the gradients. If a gradient
        is not finite all of them but the scaler stay as they were, and f's BN statistics go back to `before`: an
        infinite activation would stay in them for good. Returns () float, 1 if the update was skipped.
        """
        if self.reducer is not None:
            self.reducer.finish_()
        taken = guarded_update_(self, self.model, self.model.trunk, before)
        if isinstance(self.model.classifier, CosineClassifier):
            self.model.classifier.clamp_scale_()
        if self.clean_encoder is not None and not self.clean_encoder.frozen:
            rate = (1 - config.method.encoder_momentum) * taken
            self.clean_encoder.follow_(self.model, rate)
        if self.ema is not None:
            # The decay ramps up, else a short run's average would still be mostly its initial weights.
            count = self.updates.double()
            decay = ((1 + count) / (10 + count)).clamp(max=config.optim.model_ema_decay)
            _follow_all_(self.ema, self.model, (1 - decay) * taken)
        return self.optimizer.last_found_inf


def _follow_all_(ema: TwoHead, model: TwoHead, rate: Tensor) -> None:
    """Average parameters and float buffers; copy counters, which have no mean."""
    own, source = ema.state_dict(), model.state_dict()
    names = [name for name, tensor in own.items() if tensor.is_floating_point()]
    lerp_([own[n] for n in names], [source[n] for n in names], rate)
    for name, tensor in own.items():
        if not tensor.is_floating_point():
            tensor.copy_(source[name])
