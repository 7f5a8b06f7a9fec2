"""The two train steps: equal to the plain-PyTorch specification, without host syncs, however a batch is cut."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht import kernels
from fasttht.attacks.pgd import Draw
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.schedule import Schedule
from fasttht.state import TrainState
from fasttht.step_engine import build_step_engine
from fasttht.steps import free_step, standard_step

CLASSES, SIDE = 5, 8


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "that_minimal.py"
    spec = importlib.util.spec_from_file_location("that_minimal", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(**options: Any) -> TrainConfig:
    """A resolved config of a very small network; options are by their names, whatever their section."""
    config = TrainConfig()
    defaults: dict[str, Any] = {
        "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 8, "img_size": SIDE, "bank_size": 20,
        "batch_size": 8, "epochs": 1, "smoothing": 0.0, "warmup_epochs": 0.0, "eps": 0.1, "alpha": 0.03125,
        "encoder_momentum": 0.9, "lr": 0.125, "start_clean_prob": 0.0,
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


# Rungs of the training step that a CPU can take.
RUNGS = ["eager", "compiled", "fused", "captured"]


def tiny_state(
    config: TrainConfig, *, frozen: bool = False, dtype: torch.dtype = torch.float64, rung: str = "eager"
) -> TrainState:
    """A fresh state; the schedule is constant. Blocks are not born as identities, so every weight matters."""
    model = build_model(config, CLASSES, torch.device("cpu")).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    encoder = CleanEncoder(model, frozen=frozen) if model.feature_head is not None else None
    assert config.optim.lr is not None
    state = TrainState(config, model, encoder, Schedule(config.optim.lr, milestones=[]), img_size=SIDE, num_images=40)
    state.step_engine = build_step_engine(
        config, model, state.bank, report=lambda line: pytest.fail(line), abandon=state.abandon_,
        name=rung, backend="aot_eager", recorder=Recorder(),
    )  # fmt: skip
    return state


def make_batch(step: int, size: int = 8) -> Batch:
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    y = torch.from_numpy(rng.integers(0, CLASSES, size))
    index = torch.from_numpy(rng.choice(40, size, replace=False))
    return Batch(x, y, index)


def assert_same(ours: TrainState, f: Any, g: Any, bank: Any, optimizer: torch.optim.Optimizer) -> None:
    close = {"rtol": 1e-8, "atol": 1e-10}
    for (name, own), theirs in zip(ours.model.state_dict().items(), f.state_dict().values(), strict=True):
        torch.testing.assert_close(own, theirs, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert ours.clean_encoder is not None
    for own, theirs in zip(ours.clean_encoder.state_dict().values(), g.state_dict().values(), strict=True):
        torch.testing.assert_close(own, theirs, **close)
    for own_p, p in zip(ours.model.parameters(), f.parameters(), strict=True):
        buffer = ours.optimizer.state[own_p]["momentum_buffer"]
        torch.testing.assert_close(buffer, optimizer.state[p]["momentum_buffer"], **close)
    assert ours.bank is not None
    torch.testing.assert_close(ours.bank.features, bank.feat, **close)
    assert ours.bank.index.tolist() == bank.index.tolist()
    assert int(ours.bank.ptr) == bank.ptr


def reference_of(state: TrainState, config: TrainConfig, minimal: ModuleType) -> tuple[Any, Any, Any, Any]:
    """Copies of f and g, plain SGD with the paper's decay rule, and the specification's bank."""
    import copy

    assert state.bank is not None
    f, g = copy.deepcopy(state.model), copy.deepcopy(state.clean_encoder)
    groups = [
        {"params": [p for p in f.parameters() if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in f.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=config.optim.lr or 0.0, momentum=0.9, nesterov=True, foreach=False)
    return f, g, optimizer, minimal.Bank(config.method.bank_size, config.model.feat_dim, torch.float64)


@pytest.mark.parametrize(
    ("targeted", "frozen", "rung"),
    [(False, True, "eager"), (True, True, "eager"), (False, False, "eager"), *((True, False, rung) for rung in RUNGS)],
)
def test_standard_trainer_equals_the_specification_for_five_steps(
    minimal: ModuleType, targeted: bool, frozen: bool, rung: str
) -> None:
    config = tiny_config(steps=3, targeted=targeted)
    state = tiny_state(config, frozen=frozen, rung=rung)
    f, g, optimizer, bank = reference_of(state, config, minimal)
    f.train()
    for step in range(5):
        batch, draw = make_batch(step), Draw(7, 0, step)
        counters = {"seed": 7, "epoch": 0, "step": step}
        x = batch.x.double() / 255
        start = kernels.draw_start(x, batch.index, eps=0.1, clean_prob=0.0, **counters)
        target = kernels.draw_target(batch.y, batch.index, CLASSES, **counters) if targeted else None
        standard_step(state, config, batch, draw, num_classes=CLASSES)
        minimal.standard_step(
            f, g, optimizer, bank, x, batch.y, batch.index, start - x, eps=0.1, alpha=0.03125, steps=3, tau=0.2,
            target=target, momentum=None if frozen else 0.9,
        )  # fmt: skip
        assert_same(state, f, g, bank, optimizer)


@pytest.mark.parametrize(("frozen", "rung"), [(True, "eager"), (False, "eager"), (False, "fused"), (False, "captured")])
def test_free_trainer_equals_the_specification_for_five_steps(minimal: ModuleType, frozen: bool, rung: str) -> None:
    config = tiny_config(replay=3, alpha=None)
    state = tiny_state(config, frozen=frozen, rung=rung)
    f, g, optimizer, bank = reference_of(state, config, minimal)
    f.train()
    assert state.delta is not None
    delta = torch.zeros(8, 3, SIDE, SIDE, dtype=torch.float64)
    for step in range(5):
        batch = make_batch(step, size=8 if step < 4 else 5)  # a short last batch
        free_step(state, config, batch, Draw(0))
        minimal.free_step(
            f, g, optimizer, bank, delta, batch.x.double() / 255, batch.y, batch.index, eps=0.1, alpha=0.1, replay=3,
            tau=0.2, momentum=None if frozen else 0.9,
        )  # fmt: skip
        assert_same(state, f, g, bank, optimizer)
        torch.testing.assert_close(state.delta.value, delta, rtol=0, atol=1e-15)


class SyncCounter(TorchDispatchMode):
    """Count the ops that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten.is_nonzero.default,
        ):
            self.syncs.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2}, {"steps": 2, "targeted": False}, {"replay": 2}, {"steps": 2, "objective": "trades"},
        {"steps": 1, "objective": "mbn-alp"}, {"replay": 2, "objective": "at-kl"}, {"steps": 1, "denoise": True},
        {"steps": 1, "bank_kind": "dataset", "num_negatives": 6},
    ],
    ids=str,
)  # fmt: skip
def test_train_steps_never_wait_for_the_device(options: dict[str, Any], rung: str) -> None:
    config = tiny_config(model_ema=True, **options)
    state = tiny_state(config, dtype=torch.float32, rung=rung)
    with SyncCounter() as counter:
        float(torch.ones(()))  # the counter sees a sync where there is one
        assert counter.syncs
        counter.syncs.clear()
        for step in range(2):
            if "replay" in options:
                free_step(state, config, make_batch(step), Draw(0))
            else:
                standard_step(state, config, make_batch(step), Draw(0), num_classes=CLASSES)
    assert counter.syncs == []


@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
@pytest.mark.parametrize("options", [{"steps": 2}, {"replay": 2, "alpha": None}], ids=["standard", "free"])
def test_gradient_accumulation_keeps_bank_delta_and_draws(options: dict[str, Any], rung: str) -> None:
    """BN sees the parts, so weights differ; what is drawn, stored and cut may not."""
    states = []
    for parts in (1, 4):
        config = tiny_config(grad_accum_steps=parts, **options)
        state = tiny_state(config, frozen=True, rung=rung)
        state.model.eval()  # without batch statistics the parts add up to the whole batch
        for step in range(3):
            if "replay" in options:
                free_step(state, config, make_batch(step, 8 if step else 6), Draw(0))
            else:
                standard_step(state, config, make_batch(step, 8 if step else 6), Draw(3, 0, step), num_classes=CLASSES)
        states.append(state)
    whole, split = states
    assert whole.bank is not None
    assert split.bank is not None
    assert whole.bank.index.tolist() == split.bank.index.tolist()
    torch.testing.assert_close(whole.bank.features, split.bank.features, rtol=1e-9, atol=1e-12)
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    if whole.delta is not None and split.delta is not None:
        torch.testing.assert_close(whole.delta.value, split.delta.value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
@pytest.mark.parametrize("amp", ["bf16", "fp32"])
def test_loss_scaler_path_trains_and_skips_on_cpu(amp: str, rung: str) -> None:
    """The scaler at a real scale, as fp16 uses it on a GPU; CPU fp16 convolutions are too slow to test with."""
    config = tiny_config(steps=1, amp_dtype=amp)
    state = tiny_state(config, dtype=torch.float32, rung=rung)
    state.amp_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[amp]
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    state.scaler.scale(torch.zeros(()))
    before = [p.detach().clone() for p in state.model.parameters()]
    for step in range(2):
        standard_step(state, config, make_batch(step), Draw(0, 0, step), num_classes=CLASSES)
    assert state.scaler.get_scale() == 2.0**11
    assert int(state.updates) == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    before = [p.detach().clone() for p in state.model.parameters()]
    state.scaler._scale.fill_(float("inf"))  # type: ignore[union-attr]
    standard_step(state, config, make_batch(2), Draw(0, 0, 2), num_classes=CLASSES)
    assert int(state.updates) == 2
    for a, b in zip(before, state.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.changes_rng
def test_engines_agree_where_a_batch_comes_in_parts() -> None:
    """All parts are attacked as the network was before the step, whoever computes the gradients."""
    found = []
    for engine in ("eager", "folded"):
        config = tiny_config(steps=2, grad_accum_steps=2, attack_engine=engine)
        state = tiny_state(config)
        for step in range(2):
            standard_step(state, config, make_batch(step), Draw(0, 0, step), num_classes=CLASSES)
        found.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bank", ["queue", "dataset"])
def test_a_clean_feature_that_overflowed_costs_one_step(bank: str) -> None:
    options: dict[str, Any] = {"bank_kind": bank} | ({"num_negatives": 6} if bank == "dataset" else {})
    config = tiny_config(steps=1, **options)
    state = tiny_state(config)
    assert state.clean_encoder is not None
    forward = state.clean_encoder.forward
    for step in range(4):
        batch = make_batch(step)
        if step == 1:
            state.clean_encoder.forward = lambda x: forward(x) * torch.inf  # type: ignore[method-assign]
        else:
            state.clean_encoder.forward = forward  # type: ignore[method-assign]
        standard_step(state, config, batch, Draw(0, 0, step), num_classes=CLASSES)
    assert int(state.updates) == 3
    assert state.bank is not None
    assert all(tensor.isfinite().all() for tensor in state.bank.state().values())


def test_momentum_statistics_survive_an_overflow() -> None:
    config = tiny_config(steps=1)
    state = tiny_state(config)
    assert state.clean_encoder is not None
    before = [buffer.clone() for buffer in state.clean_encoder.trunk.buffers()]
    x = torch.full((4, 3, SIDE, SIDE), torch.inf, dtype=torch.float64)
    state.clean_features(x)
    after = list(state.clean_encoder.trunk.buffers())
    assert all(buffer.isfinite().all() for buffer in after)
    state.clean_features(torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
