"""The attack in the network's own input finds what the plain loop over pixels finds, bit for bit."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttht import kernels
from fasttht.attacks.engine import FoldedEngine
from fasttht.attacks.pgd import Draw, attack
from fasttht.attacks.threat import Threat

CLASSES = 7
DRAW = Draw(seed=3, epoch=2, step=9)
INDEX = torch.tensor([4, 90, 2**40, 0])
LABELS = torch.tensor([1, 6, 3, 0])
LINF: dict[str, Any] = {"eps": 16 / 255, "alpha": 4 / 255, "steps": 4}
L2: dict[str, Any] = {"eps": 1.5, "alpha": 0.5, "steps": 4, "norm": "l2"}


def both(engine: FoldedEngine, x: Tensor, threat: Threat, soft_target: Tensor | None = None) -> list[Any]:
    """The plain loop's result and the engine's own."""
    options: dict[str, Any] = {"num_classes": CLASSES, "soft_target": soft_target}
    return [
        attack(engine.gradient, x, LABELS[: len(x)], INDEX[: len(x)], threat, DRAW, **options),
        engine.attack(x, LABELS[: len(x)], INDEX[: len(x)], threat, DRAW, **options),
    ]


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float", "lattice"])
@pytest.mark.parametrize(("stem", "size"), [("imagenet", 16), ("imagenet", 17), ("small", 8)])
@pytest.mark.parametrize("name", ["folded", "fused"])
def test_images_and_health_are_those_of_the_plain_loop(
    build: Any, images: Any, name: str, stem: str, size: int, dtype: torch.dtype, targeted: bool
) -> None:
    """On squares of pixels, on an odd size, which has none, and with the small stem."""
    engine = FoldedEngine(name, build(stem), dtype=torch.float32)
    x = images(4, size, dtype)
    plain, own = both(engine, x, Threat(**LINF, targeted=targeted, clean_prob=0.5))
    assert torch.equal(own.x_adv, plain.x_adv)
    assert own.x_adv.dtype == torch.float32
    assert (float(own.zero_grad), float(own.nan_grad)) == (float(plain.zero_grad), float(plain.nan_grad))
    clean = kernels.u8_to_input(x) if dtype == torch.uint8 else x
    assert float((own.x_adv - clean).abs().mean()) > 4 / 255
    assert torch.equal(x, images(4, size, dtype))


@pytest.mark.parametrize(
    "threat",
    [
        Threat(**L2),
        Threat(**L2, targeted=True, clean_prob=1),
        Threat(eps=0.06, alpha=0.02, steps=4, norm="l2-relative"),
        Threat(**LINF, start="gaussian"),
        Threat(**LINF, start="clean"),
        Threat(**{**LINF, "steps": 0}),
        Threat(**{**L2, "steps": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["folded", "fused"])
def test_every_threat_is_the_same_in_both(build: Any, images: Any, name: str, threat: Threat) -> None:
    """In float64, in which the deviations of the channels may be divided by at another place."""
    engine, x = FoldedEngine(name, build(dtype=torch.float64), dtype=torch.float64), images(4, 16, torch.float64)
    plain, own = both(engine, x, threat)
    assert torch.allclose(own.x_adv, plain.x_adv, rtol=0, atol=1e-12)
    assert torch.equal(own.x_adv, x) == (threat.start == "clean" and threat.steps == 0)


@pytest.mark.parametrize("name", ["folded", "fused"])
def test_a_soft_target_is_the_same_in_both(build: Any, images: Any, name: str) -> None:
    engine, x = FoldedEngine(name, build(), dtype=torch.float32), images(4, 16)
    soft = torch.softmax(torch.arange(4 * CLASSES).view(4, CLASSES) % 5 * 1.0, dim=1)
    plain, own = both(engine, x, Threat(**LINF), soft)
    assert torch.equal(own.x_adv, plain.x_adv)
    assert not torch.equal(own.x_adv, both(engine, x, Threat(**LINF))[1].x_adv)


@pytest.mark.parametrize("name", ["folded", "fused"])
def test_half_precision_is_the_same_in_both(build: Any, images: Any, name: str) -> None:
    """bfloat16, whose stem stays float32."""
    engine, x = FoldedEngine(name, build(), dtype=torch.bfloat16), images(4, 16)
    plain, own = both(engine, x, Threat(**LINF))
    assert torch.equal(own.x_adv, plain.x_adv)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of the compiler's own modules
def test_a_compiled_attack_on_a_soft_target_is_the_folded_one(build: Any, images: Any) -> None:
    model, x = build("small", torch.float64), images(2, 8, torch.float64)
    soft = torch.softmax(torch.arange(2.0 * CLASSES, dtype=torch.float64).view(2, CLASSES) % 5, dim=1)
    compiled, folded = (
        FoldedEngine(name, model, dtype=torch.float64).attack(
            x, LABELS[:2], INDEX[:2], Threat(**LINF), DRAW, num_classes=CLASSES, soft_target=soft
        )
        for name in ("compiled", "folded")
    )
    assert torch.allclose(compiled.x_adv, folded.x_adv, rtol=0, atol=1e-12)


def test_images_in_another_memory_format_are_attacked_alike(build: Any, images: Any) -> None:
    engine, x = FoldedEngine("fused", build(), dtype=torch.float32), images(4, 16)
    last, first = (
        engine.attack(at, LABELS, INDEX, Threat(**LINF), DRAW, num_classes=CLASSES).x_adv for at in (x, x.contiguous())
    )
    assert torch.equal(last, first)
    assert first.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["folded", "fused"])
def test_weights_gradients_and_modes_are_left_alone(build: Any, images: Any, name: str) -> None:
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    FoldedEngine(name, model, dtype=torch.float32).attack(
        images(4, 16), LABELS, INDEX, Threat(**LINF), DRAW, num_classes=CLASSES
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_between_two_gradients_there_is_one_op(build: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is normalised but the start, and no gradient brought back to pixels but the last, to be counted."""
    calls: list[str] = []

    def spy(name: str) -> None:
        original = getattr(kernels, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(kernels, name, counted)

    for name in ("model_input", "model_input_", "image_grad", "pgd_linf_step_", "pgd_linf_step_input_"):
        spy(name)
    engine = FoldedEngine("fused", build(), dtype=torch.float32)
    engine.attack(images(4, 16), LABELS, INDEX, Threat(**LINF), DRAW, num_classes=CLASSES)
    assert calls == ["model_input_", *["pgd_linf_step_input_"] * 3, "image_grad", "pgd_linf_step_input_"]


class Devices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that reads or makes a tensor outside a device, or hands a value to the host."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.seen: list[str] = []
        self.outside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        self.seen.append(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        waits = any(
            word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "masked_sel")
        )
        if waits or any(tensor.device.type != self.device for tensor in tensors):
            self.outside.append(name)
        return out


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize(
    ("threat", "dtype"),
    [
        (Threat(**LINF, targeted=True, clean_prob=0.2), torch.float32),
        (Threat(**LINF, targeted=True, clean_prob=0.2), torch.uint8),
        (Threat(**LINF, start="gaussian"), torch.float32),
        (Threat(**L2, clean_prob=0.2), torch.float32),
        (Threat(**{**L2, "norm": "l2-relative"}, start="gaussian"), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["folded", "fused"])
def test_nothing_waits_for_the_device_or_comes_from_the_host(
    build: Any, name: str, threat: Threat, dtype: torch.dtype, soft: bool
) -> None:
    """What a capture forbids, seen on tensors without data: a copy from the host, and a value that the host reads."""
    model = build()
    model.trunk.to("meta")
    model.classifier.to("meta")
    engine = FoldedEngine(name, model, dtype=torch.float16)
    x = torch.empty(4, 3, 16, 16, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    rows = torch.empty(4, dtype=torch.int64, device="meta")
    soft_target = torch.empty(4, CLASSES, device="meta") if soft else None
    with Devices("meta") as devices:
        found = engine.attack(x, rows, rows, threat, DRAW, num_classes=CLASSES, soft_target=soft_target)
    assert found.x_adv.shape == x.shape
    assert devices.outside == []
    steps = [op for op in devices.seen if "convolution_backward" in op]
    assert len(steps) >= 4 * threat.steps  # so that the attack was seen


def test_the_watcher_sees_what_a_capture_forbids() -> None:
    with Devices("meta") as devices:
        torch.empty(3, device="meta").add_(torch.tensor([1.0, 2.0, 3.0]).to("meta"))
    assert any("_to_copy" in op for op in devices.outside)


def test_lattices_refuse_what_they_cannot_hold(build: Any, images: Any) -> None:
    engine = FoldedEngine("fused", build(), dtype=torch.float32)
    x = images(4, 16, torch.uint8)
    for threat in (Threat(eps=1, alpha=1, steps=1, norm="l2"), Threat(**LINF, start="gaussian")):
        for run in (engine.attack, partial(attack, engine.gradient)):
            with pytest.raises(ValueError, match="lattice attack: expected the norm linf and a start that is uniform"):
                run(x, LABELS, INDEX, threat, DRAW, num_classes=CLASSES)
