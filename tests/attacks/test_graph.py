"""A recorded attack: what a replay reads anew, when another recording is made, and what happens where none can be.

The recorder is the part that needs a GPU, so most tests hand in one of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttht.attacks.engine import FoldedEngine, build_engine
from fasttht.attacks.graph import CudaRecorder, GraphedAttack, fits
from fasttht.attacks.pgd import Attacked, Draw, attack
from fasttht.attacks.threat import Threat
from fasttht.config import AttackConfig
from fasttht.errors import UsageError
from fasttht.models.two_head import TwoHead

CLASSES = 7
DRAW = Draw(seed=3, epoch=2, step=9)
THREAT = Threat(eps=16 / 255, alpha=4 / 255, steps=2, targeted=True)


class Tape:
    """A recorder that records calls: a replay runs them again, into the tensors of the recording."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.recorded = self.replayed = 0

    def record(self, run: Callable[[], Attacked]) -> tuple[Attacked, Callable[[], None]]:
        self.recorded += 1
        run()  # as a warm-up does
        if self.failure is not None:
            raise self.failure
        kept = run()
        tensors = (kept.x_adv, kept.zero_grad, kept.nan_grad)
        for tensor in tensors:
            tensor.fill_(float("nan"))  # a capture launches nothing

        def replay() -> None:
            self.replayed += 1
            found = run()
            for tensor, now in zip(tensors, (found.x_adv, found.zero_grad, found.nan_grad), strict=True):
                tensor.copy_(now)

        return kept, replay


def rows(num: int) -> tuple[Tensor, Tensor]:
    return torch.arange(num) % CLASSES, torch.arange(num) * 3 + 1


def plain(engine: FoldedEngine, x: Tensor, draw: Draw = DRAW, threat: Threat = THREAT, **options: Any) -> Attacked:
    return attack(engine.gradient, x, *rows(len(x)), threat, draw, num_classes=CLASSES, **options)


def same(found: Attacked, expected: Attacked) -> bool:
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def taped(model: TwoHead, tape: Tape) -> tuple[FoldedEngine, Callable[..., Attacked]]:
    engine = FoldedEngine("fused", model, dtype=torch.float32, recorder=tape)

    def run(x: Tensor, draw: Draw = DRAW, threat: Threat = THREAT, **options: Any) -> Attacked:
        return engine.attack(x, *rows(len(x)), threat, draw, num_classes=CLASSES, **options)

    return engine, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float", "lattice"])
def test_one_recording_serves_other_images_classes_and_rows(build: Any, images: Any, dtype: torch.dtype) -> None:
    tape = Tape()
    engine, _ = taped(build(), tape)
    for seed in range(4):
        x, y, index = images(4, 16, dtype, seed), (torch.arange(4) + seed) % CLASSES, torch.arange(4) + 10 * seed
        found = engine.attack(x, y, index, THREAT, DRAW, num_classes=CLASSES)
        assert same(found, attack(engine.gradient, x, y, index, THREAT, DRAW, num_classes=CLASSES))
        assert torch.equal(x, images(4, 16, dtype, seed))
    assert (tape.recorded, tape.replayed) == (1, 3)  # the first ran unrecorded


def test_a_replay_sees_new_weights_after_a_refresh(build: Any, images: Any) -> None:
    tape, model, x = Tape(), build(), images(4, 16)
    engine, run = taped(model, tape)
    run(x)
    first = run(x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    assert same(run(x), first)  # not before
    engine.refresh_()
    second = run(x)
    assert same(second, plain(engine, x))
    assert not torch.equal(second.x_adv, first.x_adv)
    assert (tape.recorded, tape.replayed) == (1, 3)


@pytest.mark.parametrize("draw", [Draw(4, 2, 9), Draw(3, 3, 9), Draw(3, 2, 10), Draw(2**64 - 1, 2, 9)], ids=str)
def test_every_counter_changes_the_draws_of_a_replay(build: Any, images: Any, draw: Draw) -> None:
    tape, x, threat = Tape(), images(4, 16), Threat(eps=0.1, alpha=0.1, steps=0)
    engine, run = taped(build(), tape)
    run(x, DRAW, threat)
    first = run(x, DRAW, threat)
    second = run(x, draw, threat)
    assert same(first, plain(engine, x, DRAW, threat))
    assert same(second, plain(engine, x, draw, threat))
    assert not torch.equal(first.x_adv, second.x_adv)
    assert (tape.recorded, tape.replayed) == (1, 2)


def test_targets_are_drawn_anew(build: Any, images: Any) -> None:
    """From the clean image with one step: only the target is random."""
    tape, x = Tape(), images(6, 16)
    engine, run = taped(build(), tape)
    threat = Threat(eps=0.1, alpha=0.05, steps=1, targeted=True, clean_prob=1)
    run(x, DRAW, threat)
    found = [run(x, Draw(seed), threat) for seed in range(3)]
    assert all(same(one, plain(engine, x, Draw(seed), threat)) for seed, one in enumerate(found))
    assert not torch.equal(found[0].x_adv, found[1].x_adv)
    assert (tape.recorded, tape.replayed) == (1, 3)


def test_what_the_launches_depend_on_makes_another_recording(build: Any, images: Any) -> None:
    tape, engine = Tape(), FoldedEngine("fused", build(), dtype=torch.float32)
    run = graphed(engine, tape, [], max_graphs=5)
    soft = torch.full((4, CLASSES), 1 / CLASSES)
    cases: list[tuple[Tensor, Threat, Tensor | None]] = [
        (images(4, 16), THREAT, None),
        (images(3, 16), THREAT, None),
        (images(4, 16, torch.uint8), THREAT, None),
        (images(4, 16), THREAT, soft),
        (images(4, 16), Threat(eps=0.1, alpha=0.05, steps=1), None),
    ]
    for turn, expected in enumerate([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [5] * 5]):
        for (x, threat, soft_target), recorded in zip(cases, expected, strict=True):
            found = run(x, Draw(turn), threat, soft_target=soft_target)
            assert same(found, plain(engine, x, Draw(turn), threat, soft_target=soft_target))
            assert tape.recorded == recorded


@pytest.mark.parametrize("norm", ["l2", "l2-relative"])
def test_l2_attacks_are_recorded_too(build: Any, images: Any, norm: Any) -> None:
    tape, x = Tape(), images(4, 16)
    engine, run = taped(build(), tape)
    threat = Threat(eps=0.05 if norm == "l2-relative" else 1.5, alpha=0.02, steps=2, norm=norm)
    for draw in (DRAW, DRAW, Draw(8)):
        assert same(run(x, draw, threat), plain(engine, x, draw, threat))
    assert (tape.recorded, tape.replayed) == (1, 2)


def test_results_outlive_the_next_attack(build: Any, images: Any) -> None:
    engine, run = taped(build(), tape := Tape())
    run(images(4, 16))
    first = run(images(4, 16))
    run(images(4, 16, seed=1), Draw(9))
    assert tape.replayed == 2
    assert same(first, plain(engine, images(4, 16)))


def graphed(engine: FoldedEngine, tape: Tape, said: list[str], max_graphs: int = 4) -> Callable[..., Attacked]:
    found = GraphedAttack(engine._attack, tape, say=said.append, max_graphs=max_graphs)

    def run(x: Tensor, draw: Draw = DRAW, threat: Threat = THREAT, **options: Any) -> Attacked:
        return found(x, *rows(len(x)), threat, draw, num_classes=CLASSES, **options)

    return run


def test_shapes_beyond_the_limit_run_unrecorded_and_it_is_said_once(build: Any, images: Any) -> None:
    said: list[str] = []
    tape, engine = Tape(), FoldedEngine("fused", build(), dtype=torch.float32)
    run = graphed(engine, tape, said, max_graphs=2)
    for num in (2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4):
        assert same(run(images(num, 16)), plain(engine, images(num, 16)))
    assert (tape.recorded, tape.replayed) == (2, 4)
    assert said == ["attack graph: some attacks run without one: 2 shapes have one, and no more are kept"]


def hidden(cause: RuntimeError) -> RuntimeError:
    """The error that a broken capture ends with, raised while the cause was on its way up."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "operation not permitted when"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "its memory does not fit beside the rest"),
        (RuntimeError(), "RuntimeError"),
        (hidden(RuntimeError("operation not permitted")), "operation not permitted"),
        (hidden(torch.OutOfMemoryError("CUDA out of memory")), "its memory does not fit beside the rest"),
    ],
    ids=["capture", "memory", "silent", "hidden", "hidden memory"],
)
def test_a_failed_recording_falls_back_for_good_and_says_why_once(
    build: Any, images: Any, failure: Exception, why: str
) -> None:
    said: list[str] = []
    tape, engine = Tape(failure), FoldedEngine("fused", build(), dtype=torch.float32)
    run = graphed(engine, tape, said)
    for num in (4, 4, 4, 3, 3):
        assert same(run(images(num, 16)), plain(engine, images(num, 16)))
    assert (tape.recorded, tape.replayed) == (1, 0)
    assert len(said) == 1
    assert said[0].startswith(f"attack graph: some attacks run without one: {why}")
    assert "\n" not in said[0]


def test_a_mistake_of_the_caller_is_not_a_failed_recording(build: Any, images: Any) -> None:
    said: list[str] = []
    tape, engine = Tape(), FoldedEngine("fused", build(), dtype=torch.float32)
    run = graphed(engine, tape, said)
    with pytest.raises(ValueError, match=r"whole 255ths, got 1.5/255"):
        run(images(4, 16, torch.uint8), DRAW, Threat(eps=1.5 / 255, alpha=1 / 255, steps=1))
    for _ in range(3):
        assert same(run(images(4, 16)), plain(engine, images(4, 16)))
    assert (tape.replayed, said) == (2, [])


def test_shapes_that_come_once_are_never_recorded(build: Any, images: Any) -> None:
    tape, said = Tape(), []  # type: ignore[var-annotated]
    run = graphed(FoldedEngine("fused", build(), dtype=torch.float32), tape, said)
    for num in range(1, 8):
        run(images(num, 16))
    assert (tape.recorded, said) == (0, [])


def test_a_graph_must_fit_beside_the_rest_of_a_step() -> None:
    assert fits(graphs=4, step=10, room=15)
    assert not fits(graphs=4, step=10, room=14)  # what is lost between tensors
    assert not fits(graphs=16, step=0, room=15)


def test_gradients_of_weights_and_random_states_are_left_alone(build: Any, images: Any) -> None:
    """The random states by the guard that every test has."""
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    _, run = taped(model, tape := Tape())
    for _ in range(2):
        run(images(4, 16))
    assert tape.replayed == 1
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert not any(p.grad is None for p in model.parameters())


def test_a_graph_on_a_cpu_is_refused_and_auto_takes_none(build: Any) -> None:
    model = build()
    make = partial(build_engine, model=model, logits=model.logits, img_size=16, amp_dtype=torch.float32)
    with pytest.raises(UsageError, match="--attack-graph: expected auto or off beside device cpu, got on"):
        make(AttackConfig(attack_graph="on"))
    engine = make(AttackConfig(attack_engine="fused"))
    assert isinstance(engine, FoldedEngine)
    assert engine._graphed is None
    assert "graph" not in engine.reason


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def on_gpu(
    model: TwoHead, images: Any, **options: Any
) -> tuple[FoldedEngine, Callable[[int, Threat], tuple[Any, ...]]]:
    model = model.cuda()
    engine = build_engine(AttackConfig(**options), model, model.logits, img_size=16, amp_dtype=torch.float16)
    assert isinstance(engine, FoldedEngine)

    def arguments(seed: int, threat: Threat, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        y, index = (tensor.cuda() for tensor in rows(8))
        return images(8, 16, dtype, seed).cuda(), y, index, threat, Draw(seed, 1, seed)

    return engine, arguments


@pytest.fixture
def deterministic() -> Any:
    """The same convolution kernels in every call, so that results may be compared bit for bit."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("threat", [THREAT, Threat(eps=1.5, alpha=0.5, steps=3, norm="l2")], ids=["linf", "l2"])
@pytest.mark.parametrize("name", ["folded", "fused"])
def test_a_captured_attack_equals_an_uncaptured_one(build: Any, images: Any, name: Any, threat: Threat) -> None:
    captured, arguments = on_gpu(build(), images, attack_engine=name, attack_graph="on")
    free, _ = on_gpu(build(), images, attack_engine=name, attack_graph="off")
    for seed in range(3):
        one, other = (engine.attack(*arguments(seed, threat), num_classes=CLASSES) for engine in (captured, free))
        if threat.norm == "linf":
            assert float((one.x_adv == other.x_adv).float().mean()) > 0.999
        torch.testing.assert_close(one.x_adv, other.x_adv, rtol=0, atol=2 * threat.alpha + 1e-3)
        assert float((one.x_adv - other.x_adv).abs().mean()) < 1e-4
    assert captured._graphed is not None
    assert len(captured._graphed._held) == 1
    assert free._graphed is None


@pytest.mark.gpu
def test_a_captured_attack_never_waits(build: Any, images: Any) -> None:
    """Nor does one that runs unrecorded; what is made on the first call is made before."""
    for graph in ("on", "off"):
        engine, arguments = on_gpu(build(), images, attack_engine="fused", attack_graph=graph)
        calls = [arguments(seed, THREAT) for seed in range(3)]
        for call in calls[:2]:
            engine.attack(*call, num_classes=CLASSES)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                engine.refresh_()
                engine.attack(*call, num_classes=CLASSES)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_thread_may_copy_and_allocate_while_an_attack_is_captured(build: Any, images: Any) -> None:
    engine, arguments = on_gpu(build(), images, attack_engine="fused", attack_graph="on")
    call, stop, copied = arguments(0, THREAT), threading.Event(), []
    engine.attack(*call, num_classes=CLASSES)  # the second is captured

    def load() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            while not stop.is_set():
                copied.append(torch.ones(1 << 16).pin_memory().to("cuda", non_blocking=True).sum().item())
                del copied[:-1]

    loader = threading.Thread(target=load)
    loader.start()
    try:
        found = engine.attack(*call, num_classes=CLASSES)
    finally:
        stop.set()
        loader.join()
    assert copied == [float(1 << 16)]
    assert bool(found.x_adv.isfinite().all())
    assert engine._graphed is not None
    assert len(engine._graphed._held) == 1


@pytest.mark.gpu
@pytest.mark.changes_rng
def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    """One that waits cannot be captured: stream, memory and random numbers go on as before."""
    stream = torch.cuda.current_stream()

    def waits() -> Attacked:
        x = torch.ones(8, device="cuda")
        return Attacked(x * x.sum().item(), x.sum(), x.sum())

    with pytest.raises(RuntimeError):
        CudaRecorder(torch.device("cuda", torch.cuda.current_device())).record(waits)
    assert torch.cuda.current_stream() == stream
    assert nn.Linear(8, 8).cuda()(torch.rand(4, 8, device="cuda")).shape == (4, 8)
    torch.cuda.synchronize()
