"""The registered ops: their schemas and fakes, what they refuse, and that torch.compile and captures can hold them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttht import kernels
from fasttht.kernels import draws, ops, reference

CPU = torch.device("cpu")


def test_every_op_passes_opcheck(op: str, samples: Any) -> None:
    """Schema, fake tensors, autograd registration and functionalisation."""
    cases = samples.cases(op)
    for case in cases[:: len(cases) // 4]:
        args = samples.placed(case, CPU)
        for arg in args:
            if isinstance(arg, Tensor) and arg.is_floating_point():
                arg.nan_to_num_(0.0).clamp_(-9, 9)  # opcheck takes one NaN to differ from another
        torch.library.opcheck(getattr(torch.ops.fasttht, op), tuple(args))


def test_every_in_place_op_declares_what_it_changes(op: str, samples: Any) -> None:
    schema = getattr(torch.ops.fasttht, op).default._schema
    declared = {arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}
    found = set()
    for case in samples.cases(op):
        args = samples.placed(case, CPU)
        getattr(torch.ops.fasttht, op)(*args)
        for arg, before, after in zip(schema.arguments, case.args, args, strict=True):
            if isinstance(before, Tensor) and not torch.equal(before.nan_to_num(), after.nan_to_num()):
                found.add(arg.name)
    assert found == declared


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["draw_start", "draw_lattice_start", "u8_to_input"])
def test_a_fake_result_has_the_shape_type_and_strides_of_the_real_one(name: str, channels_last: bool) -> None:
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(2, 3, 5, 7, dtype=torch.float32 if name == "draw_start" else torch.uint8)
    x = x.contiguous(memory_format=form)
    rest = (torch.float16,) if name == "u8_to_input" else (torch.arange(2), None, 4, 0.0, 0, 0, 0)
    real = getattr(torch.ops.fasttht, name)(x, *rest)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = getattr(torch.ops.fasttht, name)(mode.from_tensor(x), *rest)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_meta_tensors_go_through_the_registered_op() -> None:
    """Whoever counts what an engine does on meta tensors sees one op, not its reference's many."""
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.empty(2, 3, 8, 8, device="meta")
    with Log():
        kernels.pgd_linf_step_(x, x.new_empty(x.shape), x.new_empty(x.shape), eps=0.1, alpha=0.1)
    assert [name for name in seen if "new_empty" not in name] == ["fasttht.pgd_linf_step_.default"]


# ---- the public functions on the CPU -----------------------------------------------------------------------------


def images(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, (2, 3, 4, 6), generator=generator).to(dtype)
    return torch.rand(2, 3, 4, 6, generator=generator, dtype=dtype)


PUBLIC: dict[str, Callable[[Any], Any]] = {
    "pgd_linf_step_": lambda of: (
        of.pgd_linf_step_(x := images(seed=1), images() - 0.5, images(), eps=0.1, alpha=0.2) or x
    ),
    "pgd_lattice_step_": lambda of: (
        of.pgd_lattice_step_(x := images(torch.uint8, 1), images() - 0.5, images(torch.uint8), eps=9, alpha=4) or x
    ),
    "free_delta_step_": lambda of: (
        of.free_delta_step_(x := images() - 0.5, images(seed=1) - 0.5, torch.tensor(0.0), eps=0.3, alpha=0.1) or x
    ),
    "u8_to_input": lambda of: of.u8_to_input(images(torch.uint8), torch.float64),
    "draw_start": lambda of: of.draw_start(
        images(torch.float64), torch.arange(2), eps=0.1, clean_prob=0.0, seed=2**64 - 1, epoch=2, step=3
    ),
    "draw_lattice_start": lambda of: of.draw_lattice_start(
        images(torch.uint8), torch.arange(2), eps=7, clean_prob=0.0, seed=1, epoch=2, step=3
    ),
    "drelu_add_": lambda of: of.drelu_add_(x := images(), images(seed=1), images(seed=2) - 0.5) or x,
    "bank_write_": lambda of: (
        of.bank_write_(
            x := torch.zeros(3, 2, dtype=torch.float64),
            torch.zeros(3).long(),
            torch.tensor(2),
            torch.rand(5, 2, generator=torch.Generator().manual_seed(0)),
            torch.arange(5),
        )
        or x
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_op_on_the_cpu_is_the_reference(name: str) -> None:
    """To the last bit, float64 included, which no kernel takes."""
    found, expected = PUBLIC[name](ops), PUBLIC[name](draws if "draw_" in name else reference)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert bool(found.any())


def test_a_public_op_on_the_cpu_does_not_ask_for_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTHT_KERNELS", "no such thing")
    for call in PUBLIC.values():
        call(ops)


def test_compiled_code_may_hold_every_kind_of_op() -> None:
    """Traced whole, without a break in the graph."""

    def step(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        torch.ops.fasttht.pgd_linf_step_(x_adv, grad, x, 0.1, 0.05)
        return torch.ops.fasttht.draw_start(x_adv * 1, torch.arange(2), None, 0.1, 0.0, 1, 2, 3)

    x, grad = images(), images(seed=1) - 0.5
    expected_state, found_state = x.clone(), x.clone()
    expected = step(expected_state, grad, x)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(found_state, grad, x)
    assert torch.equal(found, expected)
    assert torch.equal(found_state, expected_state)
    assert not torch.equal(found_state, x)


# ---- what is refused ---------------------------------------------------------------------------------------------

FUSED, V = torch.ops.fasttht, torch.ones(3)
X, U8, G = images(), images(torch.uint8), images(seed=1)
LAID = torch.zeros(2, 12, 5, 6)
INPUT: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}
RING = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.tensor(0))
KEY: dict[str, Any] = {"clean_prob": 0.0, "seed": 0, "epoch": 0, "step": 0}

REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: ops.pgd_linf_step_(X, G[:, :1], X, eps=0.1, alpha=0.1),
        r"grad of shape \(2, 3, 4, 6\), got \(2, 1, 4, 6\)",
    ),
    (lambda: ops.pgd_linf_step_(X, G.long(), X, eps=0.1, alpha=0.1), "grad of a floating-point type, got torch.int64"),
    (lambda: ops.pgd_linf_step_(X, G, X.double(), eps=0.1, alpha=0.1), "x of torch.float32, got torch.float64"),
    (lambda: ops.pgd_linf_step_(U8, G, U8, eps=0.1, alpha=0.1), "x_adv of a floating-point type, got torch.uint8"),
    (lambda: ops.pgd_linf_step_(X, G.to("meta"), X, eps=0.1, alpha=0.1), "grad on cpu, got meta"),
    (lambda: ops.pgd_lattice_step_(X, G, X, eps=4, alpha=1), "x_adv of torch.uint8, got torch.float32"),
    (lambda: ops.pgd_lattice_step_(U8, G, U8, eps=0.5, alpha=1), "eps to be a whole number of levels, .* got 0.5"),  # type: ignore[arg-type]
    (lambda: ops.pgd_lattice_step_(U8, G, U8, eps=256, alpha=1), "eps to be a whole number .* 0 to 255, got 256"),
    (lambda: ops.pgd_lattice_step_(U8, G, U8, eps=4, alpha=-256), "alpha to be a whole number of levels, -255 to 255"),
    (lambda: ops.model_input_(LAID, X, **INPUT, layout="nhwc"), "layout to be one of plain, pad4, s2d, got nhwc"),  # type: ignore[arg-type]
    (lambda: ops.model_input_(LAID, X, **INPUT, layout="pad4"), r"out of shape \(2, 4, 4, 6\) for pad4, got"),
    (lambda: ops.model_input_(LAID, X[:, :, :3], **INPUT, layout="s2d"), "an even height and width for s2d, got 3 x 6"),
    (lambda: ops.model_input_(LAID, X[:, :2], **INPUT, layout="s2d"), "x to have 3 channels, got 2"),
    (lambda: ops.model_input_(LAID, X[0], **INPUT, layout="s2d"), r"x of shape \(B, C, H, W\), got \(3, 4, 6\)"),
    (
        lambda: ops.model_input_(LAID, X, mean=[0.0], std=[1.0] * 3, layout="s2d"),
        "3 means and 3 deviations, got 1 and 3",
    ),
    (lambda: ops.model_input_(LAID, X, mean=[0.0] * 3, std=[1.0, 0.0, 1.0], layout="s2d"), "positive deviations"),
    (
        lambda: ops.pgd_linf_step_input_(X, LAID, LAID.half(), X, eps=0.1, alpha=0.1, **INPUT, layout="s2d"),
        "grad of torch.float32, got torch.float16",
    ),
    (
        lambda: ops.pgd_linf_step_input_(X, LAID, G, X, eps=0.1, alpha=0.1, **INPUT, layout="s2d"),
        r"grad of shape \(2, 12, 5, 6\), got \(2, 3, 4, 6\)",
    ),
    (lambda: ops.draw_start(X, torch.arange(3), eps=0.1, **KEY), r"2 indices, one per image, got \(3,\)"),
    (lambda: ops.draw_start(X, torch.arange(2).int(), eps=0.1, **KEY), "index of torch.int64, got torch.int32"),
    (lambda: ops.draw_start(U8, torch.arange(2), eps=0.1, **KEY), "x of a floating-point type, got torch.uint8"),
    (lambda: ops.draw_lattice_start(X, torch.arange(2), eps=4, **KEY), "x of torch.uint8, got torch.float32"),
    (
        lambda: ops.draw_start_at(X, torch.arange(2), torch.arange(2), eps=0.1, clean_prob=0.0),
        r"counters \(seed, epoch, step\) of shape \(3,\), got \(2,\)",
    ),
    (lambda: ops.free_delta_step_(X, G, torch.zeros(1), eps=0.1, alpha=0.1), r"skip of shape \(\) on cpu, got \(1,\)"),
    (lambda: ops.free_delta_step_(X, G[:1], torch.tensor(0.0), eps=0.1, alpha=0.1), r"got \(1, 3, 4, 6\)"),
    (lambda: ops.u8_to_input(X), "x of torch.uint8, got torch.float32"),
    (lambda: ops.u8_to_input(U8, torch.int32), "a floating-point type to convert to, got torch.int32"),
    (lambda: ops.bank_write_(*RING, torch.zeros(2, 4), torch.zeros(2).long()), r"feat of shape \(B, 3\), got \(2, 4\)"),
    (
        lambda: ops.bank_write_(*RING, torch.zeros(2, 3), torch.zeros(3).long()),
        r"feat_index of shape \(2,\), got \(3,\)",
    ),
    (lambda: ops.bank_write_(*RING, torch.zeros(2, 3), torch.zeros(2)), "feat_index of torch.int64, got torch.float32"),
    (lambda: ops.bank_write_(torch.zeros(0, 3), *RING[1:], torch.zeros(2, 3), torch.zeros(2).long()), "N at least 1"),
    (lambda: ops.drelu_add_(X, G[:1], X), r"other of shape \(2, 3, 4, 6\), got \(1, 3, 4, 6\)"),
    (lambda: ops.drelu_add_(X, None, X.half()), "out of torch.float32, got torch.float16"),
    (lambda: ops.drelu_add_(U8, None, U8), "grad of a floating-point type, got torch.uint8"),
    (lambda: FUSED.bn_relu(X, X[:1], V, V, V, V), r"other of shape \(2, 3, 4, 6\), got \(1, 3, 4, 6\)"),
    (lambda: FUSED.bn_relu(X, X.half(), V, V, V, V), "other of torch.float32, got torch.float16"),
    (lambda: FUSED.bn_relu(X, None, V[:2], V, V, V), r"mean of shape \(3,\), got \(2,\)"),
    (lambda: FUSED.bn_relu(X.half(), None, V, V, V.half(), V), "weight of torch.float32, got torch.float16"),
    (lambda: FUSED.bn_relu(X, None, V, V.to("meta"), V, V), "invstd on cpu, got meta"),
    (lambda: FUSED.bn_relu_sums(X[0], X, X, V), r"grad of shape \(2, 3, 4, 6\), got \(3, 4, 6\)"),
    (lambda: FUSED.bn_relu_sums(X, X.half(), X, V), "out of torch.float32, got torch.float16"),
    (lambda: FUSED.bn_relu_grad_(X, None, X, X, X, V, V, V, torch.ones(3)), r"sums of shape \(2, 3\), got \(3,\)"),
    (
        lambda: kernels.bn_relu(X[:1, :, :1, :1], None, V, V, V, V, momentum=0.1, eps=1e-5),
        r"two values per channel in training, got x \(1, 3, 1, 1\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_argument_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+: expected .*" + message):
        call()


def test_the_registered_op_and_its_fake_refuse_as_well() -> None:
    """In eager mode a fake does not run, so the check must be in both."""
    args = (X.clone(), G[:, :1], X, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"grad of shape"):
        torch.ops.fasttht.pgd_linf_step_(*args)
    with pytest.raises(ValueError, match=r"grad of shape"):
        torch.ops.fasttht.pgd_linf_step_(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
