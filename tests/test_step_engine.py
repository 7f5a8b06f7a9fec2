"""The rungs of the training step: equal to the eager one, recorded and compiled once, and replaced where they fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttht.attacks.pgd import Draw
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.objectives import Terms, Views
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.schedule import Schedule
from fasttht.state import TrainState
from fasttht.step_engine import CompiledLoss, build_step_engine, choose_step_engine
from fasttht.steps import free_step, standard_step

CLASSES, SIDE, BATCH = 5, 8, 8
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"steps": 2},
    "free": {"replay": 3, "alpha": None},
    "free in parts": {"replay": 2, "alpha": None, "grad_accum_steps": 2},
    "clean": {"objective": "clean"},
}


def config_of(**options: Any) -> TrainConfig:
    """A resolved config of a very small network; options are by their names, whatever their section."""
    config = TrainConfig()
    defaults: dict[str, Any] = {
        "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 8, "img_size": SIDE, "bank_size": 20,
        "batch_size": BATCH, "epochs": 1, "warmup_epochs": 0.0, "eps": 0.1, "alpha": 0.03125, "lr": 0.125,
        "encoder_momentum": 0.9, "start_clean_prob": 0.0, "model_ema": True,
    }  # fmt: skip
    for name, value in {**defaults, **options}.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, value)
    return resolve(config)


class FakeRecorder:
    """Records by keeping the work, and replays by doing it."""

    def __init__(self, broken: Callable[[], None] | None = None) -> None:
        self.num_warm = self.num_recorded = self.num_replayed = 0
        self.broken = broken

    def warm(self, work: Callable[[], None]) -> None:
        self.num_warm += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        if self.broken is not None:
            self.broken()

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


def state_of(
    config: TrainConfig, rung: str, *, device: torch.device = CPU, dtype: torch.dtype = torch.float64, **options: Any
) -> TrainState:
    """A fresh state with a constant rate, taking its steps on that rung; no block is born as an identity."""
    model = build_model(config, CLASSES, device).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    encoder = CleanEncoder(model, frozen=False) if model.feature_head is not None else None
    assert config.optim.lr is not None
    state = TrainState(config, model, encoder, Schedule(config.optim.lr, milestones=[]), img_size=SIDE)
    state.step_engine = build_step_engine(
        config, model, state.bank, abandon=state.abandon_, name=rung,
        **{"report": lambda line: pytest.fail(line), **options},
    )  # fmt: skip
    return state


def batch_of(number: int, rows: int = BATCH, device: torch.device = CPU) -> Batch:
    rng = np.random.default_rng(number)
    x = torch.from_numpy(rng.integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    y, index = torch.from_numpy(rng.integers(0, CLASSES, rows)), torch.from_numpy(rng.choice(40, rows, replace=False))
    return Batch(x.to(device), y.to(device), index.to(device))


def take(state: TrainState, config: TrainConfig, number: int, rows: int = BATCH) -> None:
    batch = batch_of(number, rows, state.device)
    if config.attack.replay > 1:
        free_step(state, config, batch, Draw(0))
    else:
        standard_step(state, config, batch, Draw(3, 0, number), num_classes=CLASSES)


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    return {f"{file} {name}": t for file, group in state.tensors().items() for name, t in group.items()}


def assert_equal_states(one: TrainState, two: TrainState, **close: float) -> None:
    for (name, a), b in zip(all_tensors(one).items(), all_tensors(two).values(), strict=True):
        torch.testing.assert_close(
            b.detach().cpu(), a.detach().cpu(), rtol=close.get("rtol", 0), atol=close.get("atol", 0),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


ROWS = [BATCH, BATCH, 5, BATCH, BATCH]  # a short batch before and after what was recorded


@pytest.mark.parametrize("rung", ["fused", "captured"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rung_equals_eager_bit_for_bit(kind: str, rung: str) -> None:
    """On a CPU, where the fused ops are torch's own passes: every tensor of a checkpoint, after every minibatch."""
    config = config_of(**KINDS[kind])
    recorder = FakeRecorder()
    eager, other = state_of(config, "eager"), state_of(config, rung, recorder=recorder)
    for number, rows in enumerate(ROWS):
        take(eager, config, number, rows)
        take(other, config, number, rows)
        assert_equal_states(eager, other)
    assert int(eager.updates) == len(ROWS) * config.attack.replay
    if rung == "captured":
        assert (recorder.num_warm, recorder.num_recorded) == (1, 1)
        assert recorder.num_replayed == 3 * config.attack.replay


def test_a_recording_reads_nothing_of_the_batch_but_its_own_buffers() -> None:
    """A batch whose memory is written over as soon as it was copied changes nothing."""
    config = config_of(**KINDS["free"])
    eager, captured = state_of(config, "eager"), state_of(config, "captured", recorder=FakeRecorder())
    slot = batch_of(0)  # as in a loader's ring, where each batch comes to lie in an old one's memory
    for number in range(4):
        take(eager, config, number)
        batch = batch_of(number)
        for mine, new in zip((slot.x, slot.y, slot.index), (batch.x, batch.y, batch.index), strict=True):
            mine.copy_(new)
        free_step(captured, config, slot, Draw(0))
    assert_equal_states(eager, captured)


def test_a_captured_run_resumes_as_it_was() -> None:
    """The resumed process warms up and records anew; the run that was not stopped replayed all the while."""
    config = config_of(**KINDS["free"])
    whole, first, second = (state_of(config, "captured", recorder=FakeRecorder()) for _ in range(3))
    for number in range(5):
        take(whole, config, number)
    for number in range(2):
        take(first, config, number)
    for mine, theirs in zip(all_tensors(second).values(), all_tensors(first).values(), strict=True):
        mine.detach().copy_(theirs.detach())
    for number in range(2, 5):
        take(second, config, number)
    assert_equal_states(whole, second)


@pytest.mark.parametrize("kind", ["standard", "free"])
def test_a_recording_that_fails_is_said_once_and_changes_nothing(kind: str) -> None:
    config = config_of(**KINDS[kind])
    said: list[str] = []
    recorder = FakeRecorder()
    eager, other = state_of(config, "eager"), state_of(config, "captured", recorder=recorder, report=said.append)

    def broken() -> None:
        # As far as a real recording may come: gradients are there, the scaler has seen them.
        for parameter in other.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        other.scaler.unscale_(other.optimizer)
        raise RuntimeError("CUDA out of memory.\nTried to allocate more")

    recorder.broken = broken
    for number in range(4):
        take(eager, config, number)
        take(other, config, number)
    assert said == ["step engine: nothing is captured from here on; recording failed: CUDA out of memory."]
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 0)
    assert_equal_states(eager, other)


def test_one_compiled_function_serves_every_step_replay_and_part() -> None:
    """Short batches do not compile another; all is equal within rounding, a step with a bad gradient included."""
    from torch._dynamo.testing import CompileCounterWithBackend

    config = config_of(**KINDS["free in parts"])
    backend: Any = CompileCounterWithBackend("aot_eager")
    eager, compiled = state_of(config, "eager"), state_of(config, "compiled", backend=backend)
    bad = False
    for state in (eager, compiled):
        state.model.trunk.conv1.weight.register_hook(lambda grad: grad / 0 if bad else grad)  # type: ignore[no-untyped-call]
    for number, rows in enumerate(ROWS):
        bad = number == 3
        take(eager, config, number, rows)
        take(compiled, config, number, rows)
        # Of a pixel whose gradient is zero but for rounding the sign, and with it all that follows, may differ.
        assert_equal_states(eager, compiled, rtol=1e-8, atol=1e-9)
    assert int(compiled.updates) == (len(ROWS) - 1) * config.attack.replay
    assert backend.frame_count == 1


def test_what_cannot_be_compiled_is_said_once_and_computed_eagerly() -> None:
    config = config_of(**KINDS["free"])
    said: list[str] = []

    def broken(*_: Any) -> Any:
        raise NotImplementedError("no such machine")

    eager = state_of(config, "eager")
    other = state_of(config, "compiled", backend=broken, report=said.append)
    for number in range(2):
        take(eager, config, number)
        take(other, config, number)
    (line,) = said
    assert line.startswith("step engine: eager from here on; compiling failed: ")
    assert "no such machine" in line
    assert_equal_states(eager, other)


@pytest.mark.changes_rng
def test_the_real_compiler_gives_the_same_loss_and_gradients() -> None:
    """One small convolution with its norm: what inductor makes of it, in training mode and through the backward."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())

    def plain_of(net: nn.Module) -> Callable[[Views], Terms]:
        def plain(views: Views) -> Terms:
            logits = net(views.x_adv).mean(dim=(2, 3))
            loss = nn.functional.cross_entropy(logits, views.y)
            return Terms(loss, {"loss_cls": loss}, logits)

        return plain

    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for net, loss in (
        (nets[0], plain_of(nets[0])),
        (nets[1], CompiledLoss(plain_of(nets[1]), 6, lambda line: pytest.fail(line))),
    ):
        for _ in range(2):
            leaf = x.clone().requires_grad_(True)
            terms = loss(Views(x, leaf, torch.arange(6) % 4, torch.arange(6), None))
            found.append([terms.loss, terms.logits, *torch.autograd.grad(terms.loss, [leaf, *net.parameters()])])
        found[-1] += net.buffers()
    for one, two in zip(found[0] + found[1], found[2] + found[3], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def choose(device: torch.device = CPU, **options: Any) -> tuple[str, str]:
    return choose_step_engine(config_of(**options), device)


def test_what_is_asked_for_is_taken_or_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert choose(step_engine="eager") == ("eager", "as asked")
    assert choose(step_engine="fused") == ("fused", "as asked")
    assert choose(step_engine="captured") == (
        "fused", "captured was asked for, but only a CUDA device records its work",
    )  # fmt: skip
    assert choose(cuda, step_engine="captured") == ("captured", "as asked")
    assert choose(cuda, step_engine="captured", replay=2, grad_accum_steps=2)[0] == "captured"
    name, reason = choose(cuda, step_engine="captured", steps=2, grad_accum_steps=2)
    assert (name, "--grad-accum-steps" in reason) == ("fused", True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    name, reason = choose(step_engine="compiled")
    assert (name, "no C++ compiler" in reason) == ("eager", True)
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    assert choose(step_engine="compiled") == ("compiled", "as asked")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name, reason = choose(cuda, step_engine="compiled")
    assert (name, "no Triton" in reason) == ("eager", True)
    monkeypatch.setenv("FASTTHT_KERNELS", "torch")
    name, reason = choose(cuda, step_engine="fused")
    assert (name, reason.endswith("FASTTHT_KERNELS=torch asks for plain torch.")) == ("eager", True)


def test_the_automatic_choice_claims_no_speed_that_was_not_measured() -> None:
    name, reason = choose(torch.device("cuda", 0))
    assert (name, "not been measured" in reason) == ("eager", True)
    assert choose()[0] == "eager"


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["standard", "free"])
def test_captured_equals_uncaptured_on_a_gpu(kind: str, gpu: torch.device) -> None:
    """Three full minibatches at four replays and a short one: one is the warm-up, two are replayed."""
    options = KINDS[kind] | ({"replay": 4} if "replay" in KINDS[kind] else {})
    config = config_of(**options)
    states = [state_of(config, rung, device=gpu, dtype=torch.float32) for rung in ("fused", "captured")]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for number, rows in enumerate([BATCH, BATCH, BATCH, 5, BATCH]):
            for state in states:
                take(state, config, number, rows)
    assert_equal_states(*states, rtol=1e-4, atol=1e-4)
    assert int(states[1].updates) == 5 * config.attack.replay


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["eager", "fused", "captured"])
def test_no_rung_waits_for_the_gpu(rung: str, gpu: torch.device) -> None:
    config = config_of(replay=4, alpha=None)
    state = state_of(config, rung, device=gpu, dtype=torch.float32)
    for number in range(2):
        take(state, config, number)
    batch = batch_of(2, device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        free_step(state, config, batch, Draw(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_a_gpu_that_works(gpu: torch.device) -> None:
    config = config_of(replay=2, alpha=None)
    said: list[str] = []
    state = state_of(config, "captured", device=gpu, dtype=torch.float32, report=said.append)
    eager = state_of(config, "fused", device=gpu, dtype=torch.float32)
    # Reading a number on the host cannot be captured.
    handle = state.model.register_forward_hook(lambda _module, _args, out: None if float(out[0].sum()) else out)
    for number in range(3):
        take(state, config, number)
        take(eager, config, number)
    handle.remove()
    assert len(said) == 1
    assert torch.cuda.current_stream(gpu) == torch.cuda.default_stream(gpu)
    assert_equal_states(eager, state, rtol=1e-4, atol=1e-4)
