"""Free training against a naive loop written from the paper's code, bit for bit, and its persistent perturbation."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.attacks.free import FreeDelta, perturbed
from fasttht.attacks.pgd import Draw
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.schedule import Schedule
from fasttht.state import TrainState
from fasttht.step_engine import build_step_engine
from fasttht.steps import free_step

CLASSES, SIDE, BATCH, REPLAY = 5, 8, 6, 3
EPS, LR, DECAY = 0.1, 0.125, 1e-4  # the rate travels as float32, in which it is exact


def config_of(**options: Any) -> TrainConfig:
    """A resolved config of a very small network; options are by their names, whatever their section."""
    config = TrainConfig()
    defaults: dict[str, Any] = {
        "objective": "at", "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 8, "img_size": SIDE,
        "bank_size": 20, "batch_size": BATCH, "epochs": 1, "smoothing": 0.0, "warmup_epochs": 0.0, "replay": REPLAY,
        "eps": EPS, "lr": LR, "weight_decay": DECAY, "encoder_momentum": 0.5, "model_ema_decay": 0.5,
    }  # fmt: skip
    for name, value in {**defaults, **options}.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, value)
    return resolve(config)


class Recorder:
    """Records by keeping the work, and replays by doing it."""

    def warm(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def state_of(config: TrainConfig, rung: str = "eager") -> TrainState:
    """A fresh state in float64 with a constant rate; no block is born as an identity."""
    model = build_model(config, CLASSES, torch.device("cpu")).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    encoder = CleanEncoder(model, frozen=False) if model.feature_head is not None else None
    state = TrainState(config, model, encoder, Schedule(LR, milestones=[]), img_size=SIDE)
    state.step_engine = build_step_engine(
        config, model, state.bank, report=lambda line: pytest.fail(line), abandon=state.abandon_,
        name=rung, backend="aot_eager", recorder=Recorder(),
    )  # fmt: skip
    return state


def batch_of(number: int, rows: int = BATCH) -> Batch:
    rng = np.random.default_rng(number)
    x = torch.from_numpy(rng.integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    return Batch(x, torch.from_numpy(rng.integers(0, CLASSES, rows)), torch.from_numpy(rng.choice(40, rows, False)))


def delta_of(state: TrainState) -> Tensor:
    assert state.delta is not None
    return state.delta.value


class NaiveFree:
    """Shafahi et al.'s loop: one global noise buffer, and one backward for the noise and for the weights."""

    def __init__(self, model: TwoHead) -> None:
        self.model = model
        weights = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True, fused=True)
        self.global_noise = torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.float64)
        self.global_noise = self.global_noise.to(memory_format=torch.channels_last)

    def step(self, batch: Batch) -> None:
        rows = len(batch.y)
        for _ in range(REPLAY):
            noise = self.global_noise[:rows].clone().requires_grad_(True)
            image = (batch.x.double() / 255 + noise).clamp(0, 1)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(image).logits, batch.y).backward()  # type: ignore[no-untyped-call]
            assert noise.grad is not None
            self.global_noise[:rows] += EPS * noise.grad.sign()
            self.global_noise.clamp_(-EPS, EPS)
            self.optimizer.step()


@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
def test_free_step_equals_a_naive_loop_bit_for_bit(rung: str) -> None:
    """Three batches, the last one short: weights, BN statistics, momentum and the perturbation."""
    config = config_of()
    state = state_of(config, rung)
    naive = NaiveFree(copy.deepcopy(state.model))
    for number, rows in enumerate([BATCH, BATCH, BATCH - 2]):
        before = delta_of(state).clone()
        free_step(state, config, batch_of(number, rows), Draw(0))
        naive.step(batch_of(number, rows))
        for (name, one), two in zip(state.model.state_dict().items(), naive.model.state_dict().values(), strict=True):
            assert torch.equal(one, two), name
        assert torch.equal(delta_of(state), naive.global_noise)
        assert torch.equal(delta_of(state)[rows:], before[rows:])
        assert not torch.equal(delta_of(state)[:rows], before[:rows])
        for one, two in zip(state.model.parameters(), naive.model.parameters(), strict=True):
            buffers = [
                optimizer.state[parameter]["momentum_buffer"]
                for optimizer, parameter in ((state.optimizer, one), (naive.optimizer, two))
            ]
            assert torch.equal(*buffers)
    assert int(state.updates) == 3 * REPLAY
    assert int(state.model.trunk.bn1.num_batches_tracked) == 3 * REPLAY  # type: ignore[arg-type]


def test_perturbation_starts_at_zero_and_persists_across_batches() -> None:
    """What the second batch's first replay sees is what the first batch's last one left."""
    config = config_of()
    state = state_of(config)
    seen: list[Tensor] = []
    state.model.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().clone()))
    batches = [batch_of(0), batch_of(1, BATCH - 2), batch_of(2)]
    kept = []
    for batch in batches:
        kept.append(delta_of(state).clone())
        free_step(state, config, batch, Draw(0))
    assert not kept[0].any()
    for number, batch in enumerate(batches):
        first = seen[number * REPLAY]
        rows = len(batch.y)
        assert torch.equal(first, (batch.x.double() / 255 + kept[number][:rows]).clamp(0, 1))
        later = seen[number * REPLAY + 1]
        assert not torch.equal(first, later)
    assert bool(kept[1].any())
    assert torch.equal(kept[2][BATCH - 2 :], kept[1][BATCH - 2 :])
    assert len(seen) == 3 * REPLAY


def test_perturbation_stays_within_eps_and_holds_still_where_the_image_is_clipped() -> None:
    config = config_of(alpha=0.0625)
    state = state_of(config)
    batch = batch_of(0)
    batch.x[:, :, ::2] = 255
    for _ in range(3):
        before = delta_of(state).clone()
        free_step(state, config, batch, Draw(0))
        # From 255 a step up leaves [0, 1]; there the gradient is zero, so it is neither taken back nor repeated.
        outside = before[:, :, ::2] > 0
        assert torch.equal(delta_of(state)[:, :, ::2][outside], before[:, :, ::2][outside])
    assert bool(outside.any())
    assert float(delta_of(state)[:, :, ::2].max()) == 0.0625
    assert float(delta_of(state)[:, :, 1::2].max()) == EPS
    assert float(delta_of(state).min()) == -EPS


def test_gradient_of_the_perturbation_is_zero_outside_the_image_range() -> None:
    x = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64).view(1, 1, 1, 4)
    leaf = torch.tensor([-0.1, 0.1, 0.05, 0.2], dtype=torch.float64).view(1, 1, 1, 4).requires_grad_(True)
    image = perturbed(x, leaf)
    torch.testing.assert_close(image, torch.tensor([0, 0.3, 0.95, 1], dtype=torch.float64).view(1, 1, 1, 4))
    (grad,) = torch.autograd.grad(image.sum(), leaf)
    assert grad.flatten().tolist() == [0, 1, 1, 0]


def test_a_step_of_some_rows_leaves_the_others_and_skipped_ones_leave_all() -> None:
    delta = FreeDelta((4, 3, 2, 2), device="cpu", dtype=torch.float64)
    assert delta.value.is_contiguous(memory_format=torch.channels_last)
    leaf = delta.leaf(slice(1, 3))
    assert leaf.requires_grad
    grad = torch.linspace(-1, 1, leaf.numel(), dtype=torch.float64).view(leaf.shape)
    grad[0, 0, 0, 0], grad[1, 0, 0, 0] = float("nan"), float("inf")
    delta.step_(slice(1, 3), grad, torch.tensor(1.0), eps=0.1, alpha=0.08)
    assert not delta.value.any()
    for taken in (1, 2):
        delta.step_(slice(1, 3), grad, torch.tensor(0.0), eps=0.1, alpha=0.08)
        assert not delta.value[[0, 3]].any()
        expected = grad.sign().nan_to_num(nan=0.0) * min(0.08 * taken, 0.1)
        torch.testing.assert_close(delta.value[1:3], expected, rtol=0, atol=1e-16)
    assert not leaf.any()  # a copy


class Fault:
    """Make the gradient of the first convolution infinite while it is on."""

    def __init__(self, model: TwoHead, value: float) -> None:
        self.on = False
        self.value = value
        self.num_calls = 0
        model.trunk.conv1.weight.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, grad: Tensor) -> Tensor:
        self.num_calls += 1
        return grad.masked_fill(torch.ones_like(grad, dtype=torch.bool), self.value) if self.on else grad


def protected(state: TrainState) -> dict[str, Tensor]:
    """What a step that was not taken must leave as it was."""
    found = {"updates": state.updates, "delta": delta_of(state)}
    found |= {f"weight {name}": p.detach() for name, p in state.model.named_parameters()}
    for name, parameter in state.model.named_parameters():
        found[f"momentum {name}"] = state.optimizer.state[parameter]["momentum_buffer"]
    if state.ema is not None:
        # Counters of batches are copied, and mean nothing in evaluation mode.
        found |= {f"ema {name}": t for name, t in state.ema.state_dict().items() if t.is_floating_point()}
    if state.clean_encoder is not None:
        found |= {f"clean encoder {name}": p for name, p in state.clean_encoder.named_parameters()}
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("value", "rung"),
    [(float("nan"), "eager"), *((float("inf"), rung) for rung in ("eager", "fused", "captured"))],
)
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, rung: str) -> None:
    config = config_of(objective="that", model_ema=True)
    state = state_of(config, rung)
    fault = Fault(state.model, value)
    free_step(state, config, batch_of(0), Draw(0))
    before = protected(state)
    state.meter.read()
    fault.on = True
    free_step(state, config, batch_of(1), Draw(0))
    after = protected(state)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert state.meter.read()["skipped"] == REPLAY
    fault.on = False
    free_step(state, config, batch_of(2), Draw(0))
    last = protected(state)
    assert {name.split()[0] for name in before if not torch.equal(before[name], last[name])} == {
        "updates", "delta", "weight", "momentum", "ema", "clean",
    }  # fmt: skip
    assert all(bool(tensor.isfinite().all()) for tensor in last.values())
    assert int(state.updates) == 2 * REPLAY
    assert fault.num_calls == 3 * REPLAY


@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
def test_an_overflow_in_the_forward_leaves_the_average_as_it_was(rung: str) -> None:
    """What float16 activations do: the gradient is not finite, and BN has seen infinity before it."""
    config = config_of(model_ema=True)
    state = state_of(config, rung)
    free_step(state, config, batch_of(0), Draw(0))
    before = protected(state)
    handle = state.model.trunk.layer1.register_forward_hook(lambda _module, _args, out: out * float("inf"))
    statistics = state.statistics()
    free_step(state, config, batch_of(1), Draw(0))
    handle.remove()
    after = protected(state)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(torch.equal(a, b) for a, b in zip(statistics, state.statistics(), strict=True))


def test_after_a_step_that_was_not_taken_the_next_is_the_one_it_would_have_been() -> None:
    """Bit for bit the step of a run that never met the bad batch; the halved loss scale is exact."""
    config = config_of()
    states = [state_of(config) for _ in range(2)]
    for state in states:
        free_step(state, config, batch_of(0), Draw(0))
    fault = Fault(states[0].model, float("inf"))
    fault.on = True
    free_step(states[0], config, batch_of(1), Draw(0))
    fault.on = False
    for state in states:
        free_step(state, config, batch_of(2), Draw(0))
    one, two = (protected(state) for state in states)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
def test_only_the_replays_with_a_bad_gradient_are_skipped(rung: str) -> None:
    config = config_of()
    state, other = state_of(config, rung), state_of(config)
    fault = Fault(state.model, float("inf"))
    weight = state.model.trunk.conv1.weight
    weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda _parameter: setattr(fault, "on", False)
    )
    fault.on = True
    free_step(state, config, batch_of(0), Draw(0))  # the first of three replays is lost
    assert int(state.updates) == REPLAY - 1
    shorter = config_of(replay=REPLAY - 1)
    free_step(other, shorter, batch_of(0), Draw(0))
    one, two = protected(state), protected(other)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
