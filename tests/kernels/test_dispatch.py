"""Which implementation runs, what is said about it, and the cache of compiled kernels. Needs no GPU and no compiler."""

import copy
import ctypes
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttht import kernels
from fasttht.kernels import build, cuda, ops
from fasttht.kernels.launches import Launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decisions are made once per process: forget them around each test, and the environment's wish."""
    monkeypatch.delenv("FASTTHT_KERNELS", raising=False)
    decisions = (cuda._find, cuda._compiler, cuda._arch, cuda._core, cuda._multiprocessors)
    for decision in decisions:
        decision.cache_clear()
    ran = cuda.ran.copy()
    yield
    cuda.ran.clear()
    cuda.ran.update(ran)
    monkeypatch.undo()
    for decision in decisions:
        decision.cache_clear()


class FakeCompiler:
    """Counts what it is asked for; the "code" says what it was made from."""

    def __init__(self, version: str = "12.9") -> None:
        self.version = version
        self.archs = {"sm_70", "sm_90"}
        self.asked: list[tuple[str, build.Defines, str]] = []

    def compile(self, source: str, defines: build.Defines, arch: str) -> bytes:
        self.asked.append((source, defines, arch))
        return f"{source} {defines} {arch} {self.version}".encode()


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], compiler: Any, core: Any = None) -> None:
    """Make torch see a device of this capability, of which the driver is `core`; nothing is cached on the disk."""
    monkeypatch.setitem(sys.modules, "cuda.core", FakeCore() if core is None else core)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(build, "cache_folder", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(build, "Nvrtc", lambda: compiler)


# ---- the choice --------------------------------------------------------------------------------------------------


def test_without_a_gpu_torch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.implementation() == ("torch", "torch sees no CUDA device.")


def test_a_rocm_device_is_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0), FakeCompiler())  # torch calls AMD's gfx90a that
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.implementation() == ("torch", "torch is built for ROCm, and the kernels are CUDA.")


def test_with_a_gpu_and_a_compiler_for_it_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 0), FakeCompiler())
    assert kernels.implementation() == ("cuda", "NVRTC 12.9 compiles the kernels for sm_70.")
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    assert kernels.implementation().name == "cuda"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION\nand more"), ValueError("not a cubin"), MemoryError()]
)
@pytest.mark.parametrize("fails", ["compile", "set_current", "from_cubin", "get_kernel"])
def test_kernels_that_do_not_build_or_load_give_way_to_torch(
    monkeypatch: pytest.MonkeyPatch, fails: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    core, compiler = FakeCore(), FakeCompiler()
    code = SimpleNamespace(get_kernel=fail if fails == "get_kernel" else print)
    loader = SimpleNamespace(from_cubin=fail if fails == "from_cubin" else lambda *_, **__: code)
    monkeypatch.setattr(FakeCore, "ObjectCode", loader)
    if fails == "set_current":
        monkeypatch.setattr(core, "Device", lambda index: SimpleNamespace(set_current=fail), raising=False)
    if fails == "compile":
        monkeypatch.setattr(compiler, "compile", fail)
    pretend_gpu(monkeypatch, (7, 0), compiler, core)
    found = kernels.implementation()
    words = str(error).split("\n")[0] or "MemoryError"
    assert found == ("torch", f"A kernel does not build or load on sm_70 ({words}).")
    assert cuda.backend(torch.device("cuda", 0)) is None
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="got cuda; A kernel does not build or load"):
        kernels.implementation()


def test_the_kernel_that_is_tried_is_a_real_one(samples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core, compiler = FakeCore(), FakeCompiler()
    pretend_gpu(monkeypatch, (7, 0), compiler, core)
    assert kernels.implementation().name == "cuda"
    assert core.told == [("current", 0)]  # nothing was launched
    (tried,) = compiler.asked
    backend = Recorder()
    monkeypatch.setattr(cuda, "backend", lambda device: backend)
    for case in samples.cases("drelu_add_"):
        samples.run(case, CPU)
    assert tried in {(launch.source, launch.defines, "sm_70") for launch in backend.launches}


def test_torch_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 0), FakeCompiler())
    monkeypatch.setenv("FASTTHT_KERNELS", "torch")
    assert kernels.implementation() == ("torch", "FASTTHT_KERNELS=torch asks for plain torch.")


def test_a_compiler_that_has_dropped_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5), FakeCompiler("13.0"))
    assert kernels.implementation() == ("torch", "NVRTC 13.0 does not compile for sm_75.")


@pytest.mark.parametrize("toolkit", ["12.6", "13.0"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, toolkit: str) -> None:
    """Whichever import fails; the extra is that of torch's own toolkit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    found = kernels.implementation()
    assert found.name == "torch"
    assert "import of cuda.core halted" in found.reason
    assert found.reason.endswith(f'; run: pip install "fasttht[cuda{toolkit[:2]}]".')


@pytest.mark.parametrize("error", [RuntimeError("no libnvrtc.so.12\nand a long story"), OSError("no libnvrtc.so.12")])
def test_a_compiler_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "Nvrtc", fail)
    reason = kernels.implementation().reason
    assert reason.startswith("The CUDA compiler does not load (no libnvrtc.so.12); run: pip install")


def test_kernels_demanded_where_there_can_be_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match=r"expected auto or torch on this machine, got cuda; torch sees no CUDA"):
        kernels.implementation()
    with pytest.raises(RuntimeError, match="got cuda"):
        cuda.backend(torch.device("cuda", 0))


@pytest.mark.parametrize("value", ["", "CUDA", "triton"])
def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FASTTHT_KERNELS", value)
    with pytest.raises(ValueError, match=f"FASTTHT_KERNELS: expected one of auto, cuda, torch, got {value}$"):
        kernels.implementation()


def test_the_reason_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, capability in [(False, (7, 0)), (True, (7, 0)), (True, (3, 5))]:
        pretend_gpu(monkeypatch, capability, FakeCompiler())
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        cuda._find.cache_clear()
        cuda._arch.cache_clear()
        reason = kernels.implementation().reason
        assert reason[0].isupper() or reason.startswith("torch ")
        assert reason.endswith(".")
        assert "\n" not in reason


# ---- one call ----------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch, device: torch.device) -> None:
        self.launches.append(launch)


def step(x_adv: torch.Tensor) -> None:
    torch.ops.fasttht.pgd_linf_step_(x_adv, torch.ones_like(x_adv), torch.zeros_like(x_adv), 0.5, 0.25)


def test_cpu_tensors_have_no_backend_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    assert cuda.backend(CPU) is None
    x_adv = torch.zeros(1, 3, 2, 2)
    before = cuda.ran.total()
    ops.pgd_linf_step_(x_adv, torch.ones_like(x_adv), torch.zeros_like(x_adv), eps=0.5, alpha=0.25)
    step(x_adv)
    assert x_adv.unique().tolist() == [0.5]
    assert cuda.ran.total() == before


def test_a_call_that_a_kernel_takes_is_launched_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Recorder()
    monkeypatch.setattr(cuda, "backend", lambda device: backend)
    before = cuda.ran["pgd_linf_step_", "cuda"]
    x_adv = torch.zeros(1, 3, 2, 2)
    step(x_adv)
    (launch,) = backend.launches
    assert (launch.source, launch.kernel) == ("pgd_step", "pgd_step")
    assert launch.defines == (("STATE", "float"), ("GRAD", "float"))
    assert launch.args[0] == x_adv.data_ptr()
    assert not x_adv.any()  # the reference did not run as well
    assert cuda.ran["pgd_linf_step_", "cuda"] == before + 1


def last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


X = last(torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
U8 = (X * 255).to(torch.uint8)
INPUT = ([0.0] * 3, [1.0] * 3, "plain")
RING = (torch.zeros(4, 2), torch.zeros(4).long(), torch.tensor(0))

TALL = X.transpose(2, 3).contiguous().transpose(2, 3)
START = (torch.arange(2), None, 0.1, 0.0, 0, 0, 0)

NOT_TAKEN: list[tuple[str, tuple[Any, ...], str]] = [
    ("pgd_linf_step_", (X.double(), X, X.double(), 0.1, 0.1), "x_adv is torch.float64"),
    ("pgd_linf_step_", (X, X.double(), X, 0.1, 0.1), "grad is torch.float64"),
    ("pgd_linf_step_", (X, X.contiguous(), X, 0.1, 0.1), "the tensors' memory layouts differ"),
    ("pgd_linf_step_", (X[:, :, ::2], X[:, :, ::2], X[:, :, ::2], 0.1, 0.1), "the tensor to be written is not dense"),
    ("model_input_", (X.contiguous(), X, *INPUT), "out is not channels-last"),
    ("pgd_linf_step_input_", (X, X, X.contiguous(), X, 0.1, 0.1, *INPUT), "grad is not channels-last"),
    ("draw_start", (X[:, :, ::2], *START), "the tensors' memory layouts differ"),
    ("draw_start", (TALL, *START), "x is neither contiguous nor channels-last"),
    ("draw_start", (X, torch.arange(4)[::2], *START[1:]), "index or counters is strided"),
    ("free_delta_step_", (X, X.half(), torch.tensor(0.0), 0.1, 0.1), "grad is torch.float16"),
    ("free_delta_step_", (X, X, torch.tensor(0), 0.1, 0.1), "skip is torch.int64"),
    ("u8_to_input", (U8, torch.float64), "out is torch.float64"),
    ("bank_write_", (*RING, torch.eye(2).double(), torch.arange(2)), "feat is torch.float64"),
    ("bank_write_", (*RING, torch.eye(2).t(), torch.arange(2)), "a tensor is strided"),
    ("drelu_add_", (X.double(), None, X.double()), "grad is torch.float64"),
    ("drelu_add_", (X, X.contiguous(), X), "the tensors' memory layouts differ"),
    ("bn_relu", (X.double(), None, *[torch.ones(3).double()] * 4), "x is torch.float64"),
    ("bn_relu", (X, X.contiguous(), *[torch.ones(3)] * 4), "other is not channels-last"),
    ("bn_relu", (X, None, *[torch.ones(3)] * 3, torch.ones(6)[::2]), "bias is strided"),
    ("bn_relu_sums", (X, X.contiguous(), X, torch.ones(3)), "out is not channels-last"),
    ("bn_relu_grad_", (X, None, X.contiguous(), X, X, *[torch.ones(3)] * 3, torch.ones(2, 3)), "grad is not channels-"),
]


@pytest.mark.parametrize(("name", "args", "why"), NOT_TAKEN, ids=[f"{name}: {why}" for name, _, why in NOT_TAKEN])
def test_a_call_no_kernel_takes_runs_the_reference(
    name: str, args: tuple[Any, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is counted; where only kernels will do, it is refused with the reason."""

    def run() -> torch.Tensor:
        # A deep copy keeps the strides of a view; what is copied is copied apart, as in a call of ours.
        copies = [copy.deepcopy(arg) for arg in args]
        result = getattr(torch.ops.fasttht, name)(*copies)
        return copies[0] if result is None else result

    expected = run()
    backend = Recorder()
    monkeypatch.setattr(cuda, "backend", lambda device: backend)
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    with pytest.raises(ValueError, match=f"{name}: expected tensors that its kernel takes, got others: {why}"):
        run()
    monkeypatch.setenv("FASTTHT_KERNELS", "auto")
    before = cuda.ran[name, "torch"]
    found = run()
    assert backend.launches == []
    assert cuda.ran[name, "torch"] == before + 1
    assert torch.equal(found, expected)


# ---- the launch --------------------------------------------------------------------------------------------------


class FakeCore:
    """cuda.core as far as a launch uses it, writing down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def Device(self, index: int) -> Any:
        return SimpleNamespace(set_current=lambda: self.told.append(("current", index)))

    @property
    def ObjectCode(self) -> Any:
        def from_cubin(code: bytes, *, name: str) -> Any:
            return SimpleNamespace(get_kernel=lambda kernel: (kernel, code))

        return SimpleNamespace(from_cubin=from_cubin)

    def LaunchConfig(self, *, grid: int, block: int) -> Any:
        return (grid, block)

    def launch(self, stream: Any, config: Any, kernel: Any, *args: Any) -> None:
        self.told.append((stream.__cuda_stream__(), config, kernel, args))


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A GPU that is not there, with two multiprocessors and a current stream of handle 1234."""
    entered: list[Any] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    properties = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return entered


def test_a_launch_is_on_the_tensors_device_and_the_current_stream(fake_device: list[Any]) -> None:
    core, compiler = FakeCore(), FakeCompiler()
    backend = cuda.CudaCore(core, compiler)
    device = torch.device("cuda", 3)
    launch = Launch("pgd_step", "entry", (("STATE", "float"),), 1000, (17, 18))
    backend.launch(launch, device)
    code = b"pgd_step (('STATE', 'float'),) sm_70 12.9"
    # The device's context is made current before the launch, and torch's device is put back after it.
    assert core.told == [("current", 3), ((0, 1234), (4, 256), ("entry", code), (17, 18))]
    assert fake_device == [device, "left"]


@pytest.mark.parametrize(("items", "blocks"), [(1, 1), (256, 1), (257, 2), (16 * 256, 16), (10**12, 16)])
def test_the_grid_covers_the_work_and_no_more_than_the_device(fake_device: list[Any], items: int, blocks: int) -> None:
    core = FakeCore()
    cuda.CudaCore(core, FakeCompiler()).launch(Launch("pgd_step", "entry", (), items, ()), torch.device("cuda", 0))
    assert core.told[-1][1] == (blocks, 256)


def test_a_kernel_is_loaded_once_per_process(fake_device: list[Any]) -> None:
    core, compiler = FakeCore(), FakeCompiler()
    backend = cuda.CudaCore(core, compiler)
    half, single = (("GRAD", "Half"),), (("GRAD", "float"),)
    for defines in (half, half, single, half):
        backend.launch(Launch("pgd_step", "pgd_step", defines, 10, ()), torch.device("cuda", 0))
    assert compiler.asked == [("pgd_step", half, "sm_70"), ("pgd_step", single, "sm_70")]
    assert len([told for told in core.told if told[0] == (0, 1234)]) == 4


def test_scalars_arrive_as_the_type_they_are_sent_as() -> None:
    """cuda.core's own packing, read back as the driver would; a bare int is a pointer and a bare float a double."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler", reason="needs cuda.core, of the extra cuda12")
    sent = (2**63 - 1, ctypes.c_float(0.1), ctypes.c_int64(-(2**40)), ctypes.c_int32(-7), 0)
    holder = handler.ParamHolder(sent)
    addresses = (ctypes.c_void_p * len(sent)).from_address(holder.ptr)
    types: list[Any] = [ctypes.c_int64, ctypes.c_float, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64]
    read = [kind.from_address(address).value for kind, address in zip(types, addresses, strict=True)]
    assert read == [2**63 - 1, ctypes.c_float(0.1).value, -(2**40), -7, 0]


def test_no_launch_has_an_argument_of_ambiguous_type(samples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Recorder()
    monkeypatch.setattr(cuda, "backend", lambda device: backend)
    for case in samples.all:
        samples.run(case, CPU)
    kinds = {type(arg) for launch in backend.launches for arg in launch.args}
    assert kinds == {int, ctypes.c_float, ctypes.c_int32, ctypes.c_int64}


def test_cuda_core_has_what_a_launch_uses() -> None:
    """The names and keywords of the real library; nothing is run."""
    core = pytest.importorskip("cuda.core", reason="needs cuda.core, of the extra cuda12")
    assert core.LaunchConfig(grid=3, block=256).grid == (3, 1, 1)
    assert core.Stream.from_handle(0).__cuda_stream__() == cuda._Stream(0).__cuda_stream__()
    assert callable(core.launch)
    assert callable(core.Device.set_current)
    code = core.ObjectCode.from_cubin(b"code", name="name")
    assert code.code == b"code"
    assert callable(code.get_kernel)


# ---- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fasttht" / "kernels"


HALF: build.Defines = (("VALUE", "Half"),)


def test_a_second_process_finds_the_code(cache: Path) -> None:
    one, other = FakeCompiler(), FakeCompiler()
    code = build.cubin("drelu_add", HALF, "sm_70", one)
    assert build.cubin("drelu_add", HALF, "sm_70", other) == code
    assert (len(one.asked), len(other.asked)) == (1, 0)
    (file,) = cache.iterdir()  # and nothing half-written beside it
    assert file.name.startswith("drelu_add-sm_70-")


def test_whatever_decides_the_code_decides_the_key(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = FakeCompiler()
    keys = [build.key("drelu_add", HALF, "sm_70", compiler)]
    keys.append(build.key("drelu_add", HALF, "sm_90", compiler))
    keys.append(build.key("drelu_add", (("VALUE", "float"),), "sm_70", compiler))
    keys.append(build.key("free_step", HALF, "sm_70", compiler))
    keys.append(build.key("drelu_add", HALF, "sm_70", FakeCompiler("12.6")))
    with monkeypatch.context() as patch:
        patch.setitem(build.OPTIONS, "fma", True)
        keys.append(build.key("drelu_add", HALF, "sm_70", compiler))
    copy = tmp_path / "src"
    copy.mkdir()
    for path in build.SRC.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SRC", copy)
    assert build.key("drelu_add", HALF, "sm_70", compiler) == keys[0]  # not of the place
    for name in ("drelu_add.cu", "common.cuh"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        keys.append(build.key("drelu_add", HALF, "sm_70", compiler))
    assert len(set(keys)) == len(keys) == 8


@pytest.mark.parametrize("damage", ["empty", "short", "flipped"])
def test_a_damaged_file_is_compiled_again_and_replaced(cache: Path, damage: str) -> None:
    code = build.cubin("drelu_add", HALF, "sm_70", FakeCompiler())
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes({"empty": b"", "short": whole[:-5], "flipped": flipped}[damage])
    compiler = FakeCompiler()
    assert build.cubin("drelu_add", HALF, "sm_70", compiler) == code
    assert len(compiler.asked) == 1
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fasttht").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = FakeCompiler()
    assert build.cubin("drelu_add", HALF, "sm_70", compiler) == build.cubin("drelu_add", HALF, "sm_70", compiler)
    assert len(compiler.asked) == 2


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert build.cache_folder() == tmp_path / ".cache" / "fasttht" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == tmp_path / ".cache" / "fasttht" / "kernels"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert build.cache_folder() is None
    compiler = FakeCompiler()
    assert build.cubin("drelu_add", HALF, "sm_70", compiler).startswith(b"drelu_add")


def test_real_code_comes_back_from_the_cache_as_it_was(cache: Path) -> None:
    try:
        compiler = build.Nvrtc()
    except (ImportError, OSError, RuntimeError) as err:
        pytest.skip(f"needs cuda.core and NVRTC, of the extra cuda12 ({err})")
    code = build.cubin("drelu_add", HALF, "sm_80", compiler)
    assert code[:4] == b"\x7fELF"
    assert build.cubin("drelu_add", HALF, "sm_80", FakeCompiler(compiler.version)) == code
