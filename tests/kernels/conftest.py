"""Sample calls of every op, and a host build of every kernel that runs the very launches a GPU would get.

The host build includes the .cu files as they are. A launch's arguments are packed as cuda.core packs them and
unpacked by the kernel's own signature, as the driver does it; each thread's loop then runs in turn.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ctypes import c_int, c_int64, c_void_p
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fasttht.kernels import build, cuda, draws
from fasttht.kernels.launches import Launch
from fasttht.kernels.reference import input_shape

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STATES = (torch.float32, torch.uint8)
NAMES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.uint8: "Byte"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CHANNELS_LAST = torch.channels_last

# ---- every variant of every kernel -------------------------------------------------------------------------------


def _variants() -> list[tuple[str, build.Defines]]:
    states, floats = [NAMES[dtype] for dtype in STATES], [NAMES[dtype] for dtype in FLOATS]
    layouts = ["PLAIN", "PAD4", "S2D"]
    macros: dict[str, dict[str, list[str]]] = {
        "pgd_step": {"STATE": states, "GRAD": floats},
        "pgd_step_input": {"STATE": states, "LAID": floats, "LAYOUT": layouts},
        "model_input": {"STATE": states, "LAID": floats, "LAYOUT": layouts},
        "draw_start": {"STATE": states},
        "free_step": {},
        "u8_to_input": {"OUT": floats},
        "bank_write": {"FEATURE": floats, "FEAT": floats},
        "drelu_add": {"VALUE": floats},
        "bn_relu": {"VALUE": floats},
        "bn_relu_sums": {"VALUE": floats},
        "bn_relu_grad": {"VALUE": floats},
    }
    found = []
    for source, choices in macros.items():
        for values in product(*choices.values()):
            found.append((source, tuple(zip(choices, values, strict=True))))
    return found


VARIANTS = _variants()
ENTRIES = {
    "bank_write": ("bank_write", "bank_advance"),
    "bn_relu_sums": ("bn_relu_sums", "bn_relu_fold"),
}  # source -> entry points, where not the one of its name

# ---- the host build ----------------------------------------------------------------------------------------------

HARNESS = """
#include <tuple>
#include <utility>
#include "bn_relu.cuh"
#include "draws.cuh"
#include "layout.cuh"

template <class... A, std::size_t... I>
void run(void (*kernel)(A...), void** args, Int64 threads, std::index_sequence<I...>) {
    host_num_threads = threads;
    // From the last to the first: work that relied on the order of threads would show.
    for (host_thread = threads - 1; host_thread >= 0; --host_thread) kernel(*static_cast<A*>(args[I])...);
}
template <class... A>
void run(void (*kernel)(A...), void** args, Int64 threads) {
    run(kernel, args, threads, std::index_sequence_for<A...>{});
}
template <class... A>
int sizes(void (*)(A...), int* to) {
    int count = 0;
    ((to[count++] = int(sizeof(A))), ...);
    return count;
}
"""


def _host_source() -> str:
    text = [HARNESS]
    for i, (source, defines) in enumerate(VARIANTS):
        entries = ENTRIES.get(source, (source,))
        macros = [*defines, *((entry, f"{entry}_{i}") for entry in entries)]
        text += [f"#define {name} {value}" for name, value in macros]
        text += [f"namespace variant_{i} {{", f'#include "{source}.cu"', "}"]
        text += [f"#undef {name}" for name, _ in macros]
        for entry in entries:
            kernel = f"variant_{i}::{entry}_{i}"
            text.append(f'extern "C" void run_{entry}_{i}(void** a, Int64 threads) {{ run({kernel}, a, threads); }}')
            text.append(f'extern "C" int sizes_{entry}_{i}(int* to) {{ return sizes({kernel}, to); }}')
    return "\n".join(text)


def pack(args: tuple[object, ...]) -> tuple[int, object]:
    """Return the address of an array of addresses of the arguments, and what keeps it alive."""
    try:
        from cuda.core._kernel_arg_handler import ParamHolder  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        typed = [c_void_p(arg) if isinstance(arg, int) else arg for arg in args]
        array = (c_void_p * len(typed))(*[ctypes.addressof(value) for value in typed])  # type: ignore[arg-type]
        return ctypes.addressof(array), (array, typed)
    holder = ParamHolder(args)
    return holder.ptr, holder


class HostKernels:
    """A backend that runs launches on CPU tensors. `threads` share the work; `launched` says what has run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.threads = 5
        self.launched: list[str] = []

    def launch(self, launch: Launch, device: torch.device) -> None:
        name = f"{launch.kernel}_{VARIANTS.index((launch.source, launch.defines))}"
        sizes = (c_int * 64)()
        count = self._library[f"sizes_{name}"](sizes)
        given = [8 if isinstance(arg, int) else ctypes.sizeof(arg) for arg in launch.args]  # type: ignore[arg-type]
        assert given == sizes[:count], f"{name}: the kernel's parameters have other sizes"
        address, keep = pack(launch.args)
        self._library[f"run_{name}"](c_void_p(address), c_int64(self.threads))
        del keep
        self.launched.append(launch.kernel)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build the kernels for the host")
    folder: Path = tmp_path_factory.mktemp("host_kernels")
    (folder / "all.cpp").write_text(_host_source(), encoding="utf-8")
    command = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    command += ["-shared", "-fPIC", f"-I{build.SRC}", "all.cpp", "-o", "all.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "all.so"))


@pytest.fixture
def host(host_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    """Give CPU tensors that go through a registered op the host build, in place of the reference."""
    backend = HostKernels(host_library)
    monkeypatch.setattr(cuda, "backend", lambda device: backend)
    return backend


# ---- sample calls ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One call of a registered op: CPU arguments, and by how many elements to shift tensors in memory."""

    op: str
    args: tuple[Any, ...]
    shift: int = 0


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wild(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers with every special one among them: zeros, infinities, NaN, subnormals, the largest."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.tiny / 4, -info.tiny / 4, info.max, info.min]
    values = torch.randn(shape, generator=_generator(seed), dtype=torch.float64).flatten()
    where = torch.rand(values.shape, generator=_generator(seed + 1)) < 0.3
    picks = torch.randint(len(special), values.shape, generator=_generator(seed + 2))
    values[where] = torch.tensor(special, dtype=torch.float64)[picks[where]]
    return values.to(dtype).view(shape)


def pixels(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Images with both ends of the range in them."""
    levels = torch.randint(-20, 276, shape, generator=_generator(seed)).clamp_(0, 255)
    if dtype == torch.uint8:
        return levels.to(torch.uint8)
    return torch.where(levels % 3 == 0, levels / 255, torch.rand(shape, generator=_generator(seed + 1))).to(dtype)


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=CHANNELS_LAST)


SHAPES = [(2, 3, 6, 8), (3, 3, 17, 23), (1, 3, 32, 32), (5, 3, 1, 1), (2, 3, 2, 2), (0, 3, 4, 4)]
DISTANCES = {torch.float32: [(4 / 255, 1 / 255), (16 / 255, -4 / 255), (0.0, 0.1), (1.0, 0.5)]}
DISTANCES[torch.uint8] = [(4, 1), (16, -4), (0, 30), (255, 255)]  # type: ignore[list-item]


def _steps() -> Iterator[Case]:
    for state, grad, (i, shape), last in product(STATES, FLOATS, enumerate(SHAPES), [True, False]):
        form = _last if last else Tensor.contiguous
        op = "pgd_lattice_step_" if state == torch.uint8 else "pgd_linf_step_"
        x_adv, x = form(pixels(shape, state, i)), form(pixels(shape, state, i + 10))
        distances = DISTANCES[state][i % 4]
        yield Case(op, (x_adv, form(wild(shape, grad, i + 20)), x, *distances), shift=i % 3)
    # Pixels that are none: what torch.clamp makes of them.
    odd = wild((2, 3, 9, 9), torch.float32, 30)
    yield Case(
        "pgd_linf_step_",
        (pixels((2, 3, 9, 9), torch.float32, 31), odd, wild((2, 3, 9, 9), torch.float32, 32), 0.1, 0.2),
    )
    yield Case(
        "pgd_linf_step_",
        (wild((2, 3, 9, 9), torch.float32, 33), odd, pixels((2, 3, 9, 9), torch.float32, 34), 0.1, 0.2),
    )


def _inputs() -> Iterator[Case]:
    for state, laid, layout, (i, shape) in product(STATES, FLOATS, ("plain", "pad4", "s2d"), enumerate(SHAPES)):
        if layout == "s2d" and shape[2] % 2:
            continue
        x_adv, x = _last(pixels(shape, state, i)), _last(pixels(shape, state, i + 10))
        # Whatever was in the output goes: it starts as NaN.
        out = _last(torch.full(input_shape(shape, layout), float("nan"), dtype=laid))  # type: ignore[arg-type]
        grad = _last(wild(tuple(out.shape), laid, i + 20))
        name = "lattice" if state == torch.uint8 else "linf"
        args = (*DISTANCES[state][i % 4], MEAN, STD, layout)
        yield Case(f"pgd_{name}_step_input_", (x_adv, out, grad, x, *args), shift=i % 3)
        yield Case("model_input_", (out, x, MEAN, STD, layout), shift=i % 3)


def _starts() -> Iterator[Case]:
    for state, (i, shape), last, clean in product(STATES, enumerate(SHAPES), [True, False], [0.0, 0.5, 1.0]):
        x = pixels(shape, state, i)
        x = _last(x) if last else x
        index = torch.randint(2**62, shape[:1], generator=_generator(i)) * 2 - 2**62
        op, eps = ("draw_lattice_start", [0, 4, 16, 255][i % 4]) if state == torch.uint8 else ("draw_start", 0.07)
        counters = torch.tensor([-(2**63), 2**63 - 1, i])
        yield Case(op, (x, index, counters, eps, clean, 0, 0, 0), shift=i % 2)
        yield Case(op, (x, index, None, eps, clean, 2**63 - 1, -5, i))
    # To the last bit of the coin: at the draw itself the batch moves, one step above it does not.
    key = draws.row_keys(draws.STREAM_CLEAN_START, 1, 2, 3, torch.zeros(1, dtype=torch.int64))
    coin = draws.draw_uniform(key, torch.zeros(1, dtype=torch.int64)).item()
    for clean in (coin, coin + 2**-24):
        yield Case("draw_start", (torch.full((1, 3, 2, 2), 0.5), torch.tensor([7]), None, 0.1, clean, 1, 2, 3))


# Slots, rows, cursor. A cursor outside the ring is not of our making, but has a meaning.
RINGS = [(7, 3, 6), (5, 5, 2), (4, 11, 3), (6, 0, 1), (6, 4, -9), (6, 4, 20)]


def _others() -> Iterator[Case]:
    for skip, (i, shape) in product([0.0, 1.0], enumerate(SHAPES)):
        delta, grad = _last(wild(shape, torch.float32, i).clamp(-0.1, 0.1)), _last(wild(shape, torch.float32, i + 5))
        yield Case("free_delta_step_", (delta, grad, torch.tensor(skip), 0.1, 0.03), shift=i % 3)
    every = torch.arange(256, dtype=torch.uint8)
    for dtype, shape in product(FLOATS, SHAPES):
        yield Case("u8_to_input", (every.view(2, 8, 16), dtype))
        yield Case("u8_to_input", (_last(pixels(shape, torch.uint8, 1)), dtype), shift=1)
    for features, feat, (size, rows, ptr) in product(FLOATS, FLOATS, RINGS):
        ring = (torch.zeros(size, 6, dtype=features), torch.full((size,), -1), torch.tensor(ptr))
        yield Case("bank_write_", (*ring, wild((rows, 6), feat, rows), torch.arange(rows) + 2**40))
    # Every half-precision number, and float32 ones that fall between.
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(512, 128)
        between = (torch.randn(512, 128, generator=_generator(1)) * 2.0 ** torch.arange(-64, 64)).float()
        for wide, feat in ((torch.float32, patterns), (dtype, between)):
            ring = (torch.zeros(600, 128, dtype=wide), torch.full((600,), -1), torch.tensor(500))
            yield Case("bank_write_", (*ring, feat, torch.arange(512)))
    for dtype, (i, shape), second in product(FLOATS, enumerate([*SHAPES, (4, 64, 7, 7), (33,)]), [True, False]):
        form: Callable[[Tensor], Tensor] = _last if len(shape) == 4 else Tensor.contiguous
        grad, other, out = (form(wild(shape, dtype, seed)) for seed in (i, i + 50, i + 100))
        yield Case("drelu_add_", (grad, other if second else None, out), shift=i % 5)


# Channels that are whole vectors and that are not, fewer rows than threads, none at all.
NORMED = [(2, 16, 3, 5), (3, 5, 4, 4), (4, 64, 7, 7), (0, 8, 2, 2), (2, 24, 1, 3), (1, 4, 9, 9)]


def whole(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small whole numbers, whose products have sums that are exact in any order."""
    return torch.randint(low, high, shape, generator=_generator(seed)).to(dtype)


def _norms() -> Iterator[Case]:
    def per_channel(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape[1], generator=_generator(seed))

    for dtype, (i, shape), second in product(FLOATS, enumerate(NORMED), [True, False]):
        x, other, grad, out = (_last(wild(shape, dtype, i + 20 * seed)) for seed in range(4))
        mean, invstd, weight, bias = (per_channel(shape, i + seed) for seed in range(4))
        yield Case("bn_relu", (x, other if second else None, mean, invstd.exp(), weight, bias), shift=i % 3)
        dx, dother = torch.full_like(x, 7), torch.full_like(x, 8)
        sums = torch.randn(2, shape[1], generator=_generator(i))
        args = (dx, dother if second else None, grad, out, x, mean, invstd.exp(), weight, sums)
        yield Case("bn_relu_grad_", args, shift=i % 3)
        grad, out, x = (_last(whole(shape, -4, 5, dtype, i + 40 * seed)) for seed in range(3))
        if second and x.numel():  # infinities and NaNs make a channel's sums what they make them in any order
            grad[0, 0, 0, 0], x[0, 1, 0, 0], out[0, 0], out[0, 1] = float("inf"), float("nan"), 1, 1
        yield Case("bn_relu_sums", (grad, out, x, whole(shape[1:2], -2, 3, torch.float32, i)), shift=i % 3)
    # More rows than there are threads to share them.
    shape = (1, 1, 520, 520)
    x, one = _last(whole(shape, -4, 5, torch.bfloat16, 1)), torch.ones(1)
    yield Case("bn_relu", (x, None, one, 2 * one, one, one))
    yield Case("bn_relu_sums", (x, x, x, one))
    yield Case("bn_relu_grad_", (x + 1, None, x, x, x, one, one, one, torch.tensor([[2.0**18], [0.5]])))


CASES = [*_steps(), *_inputs(), *_starts(), *_others(), *_norms()]
OPS = sorted({case.op for case in CASES})


def placed(case: Case, device: torch.device) -> list[Any]:
    """Copy a case's tensors to the device, each with its own strides and `shift` elements into its storage."""

    def place(arg: Any) -> Any:
        if not isinstance(arg, Tensor) or arg.ndim == 0:
            return arg.to(device, copy=True) if isinstance(arg, Tensor) else arg
        storage = torch.empty(arg.numel() + case.shift, dtype=arg.dtype, device=device)
        return storage[case.shift :].as_strided(arg.size(), arg.stride(), case.shift).copy_(arg)

    return [place(arg) for arg in case.args]


def run(case: Case, device: torch.device) -> list[Tensor]:
    """Call the registered op, and return what the call left behind: its result, and every tensor it was given."""
    args = placed(case, device)
    result = getattr(torch.ops.fasttht, case.op)(*args)
    return [arg for arg in [result, *args] if isinstance(arg, Tensor)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, but that one NaN or one zero is as good as another."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        strided = other.numel() > 0  # of nothing, strides mean nothing
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True, check_stride=strided)


# ---- what the tests get ------------------------------------------------------------------------------------------


class Samples:
    """The sample calls, and how to run and compare them."""

    all = CASES
    variants = frozenset(VARIANTS)
    cases = staticmethod(lambda op: [case for case in CASES if case.op == op])
    run = staticmethod(run)
    placed = staticmethod(placed)
    assert_same = staticmethod(assert_same)
    wild = staticmethod(wild)
    pixels = staticmethod(pixels)


@pytest.fixture
def samples() -> type[Samples]:
    return Samples


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `op` every op, and one that asks for `source` every kernel source."""
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", OPS)
    if "source" in metafunc.fixturenames:
        metafunc.parametrize("source", sorted({source for source, _ in VARIANTS}))


@pytest.fixture
def variants(source: str) -> list[build.Defines]:
    """All sets of macros that `source` is compiled with."""
    return [defines for name, defines in VARIANTS if name == source]
