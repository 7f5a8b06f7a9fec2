"""Every variant of every kernel, compiled by NVRTC for three architectures. No GPU, no driver."""

import re
from functools import cache
from typing import Any

import pytest

from fasttht.kernels import build

ARCHS = ["sm_70", "sm_80", "sm_90"]

# 64 registers let four blocks of 256 threads share a multiprocessor's 65536; below that memory latency shows.
MAX_REGISTERS = 80

# The second kernel of the sources that have one.
TWO_KERNELS = {"bank_write": ("bank_advance",), "bn_relu_sums": ("bn_relu_fold",)}


@cache
def _nvrtc() -> build.Nvrtc | str:
    try:
        return build.Nvrtc()
    except (ImportError, OSError, RuntimeError) as err:
        return f"needs cuda.core and NVRTC, of the extra cuda12 ({err})"


@pytest.fixture
def nvrtc() -> build.Nvrtc:
    compiler = _nvrtc()
    if isinstance(compiler, str):
        pytest.skip(compiler)
    return compiler


def resources(log: str) -> list[dict[str, int]]:
    """Read what `ptxas -v` says of each kernel; NVRTC puts it into the program's log."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert len(frames) == len(registers)
    return [
        {"stack": int(stack), "stores": int(stores), "loads": int(loads), "registers": int(used)}
        for (stack, stores, loads), used in zip(frames, registers, strict=True)
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_compiles_without_spills(
    source: str, variants: list[build.Defines], arch: str, nvrtc: build.Nvrtc
) -> None:
    if arch not in nvrtc.archs:
        pytest.skip(f"NVRTC {nvrtc.version} does not compile for {arch}")
    for defines in variants:
        code = nvrtc.compile(source, defines, arch)
        assert code[:4] == b"\x7fELF"
        found = resources(nvrtc.log)
        assert len(found) == (2 if source in TWO_KERNELS else 1), nvrtc.log
        for kernel in found:
            assert (kernel["stack"], kernel["stores"], kernel["loads"]) == (0, 0, 0), (defines, kernel)
            assert 0 < kernel["registers"] <= MAX_REGISTERS, (defines, kernel)


def test_a_spill_would_be_seen(nvrtc: build.Nvrtc, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above reads is there to be read: a kernel with an indexed local array has a stack frame."""
    text = """extern "C" __global__ void spill(float* p, int n) {
        float kept[300];
        for (int i = 0; i < 300; ++i) kept[i] = p[i];
        for (int i = 0; i < 300; ++i) p[i] = kept[(i * n) % 300];
    }"""
    (tmp_path / "spill.cu").write_text(text)
    monkeypatch.setattr(build, "SRC", tmp_path)
    nvrtc.compile("spill", (), "sm_80")
    (kernel,) = resources(nvrtc.log)
    assert kernel["stack"] >= 1200


def test_the_entry_points_carry_their_plain_names(
    source: str, variants: list[build.Defines], nvrtc: build.Nvrtc
) -> None:
    """Launches ask for them by name."""
    code = nvrtc.compile(source, variants[0], "sm_80")
    entries = (source, *TWO_KERNELS.get(source, ()))
    for entry in entries:
        assert b".text." + entry.encode() + b"\0" in code


def test_an_error_in_a_source_names_file_and_architecture(
    nvrtc: build.Nvrtc, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.cu").write_text("no such thing")
    monkeypatch.setattr(build, "SRC", tmp_path)
    with pytest.raises(RuntimeError, match=r"wrong\.cu: expected NVRTC .* to compile it for sm_80"):
        nvrtc.compile("wrong", (), "sm_80")


def _ptx(source: str, defines: build.Defines) -> str:
    from cuda.bindings import nvrtc  # type: ignore[import-not-found,unused-ignore]

    text = (build.SRC / f"{source}.cu").read_bytes()
    options = ["--gpu-architecture=compute_80", "--std=c++17", "--fmad=false", f"-I{build.SRC}"]
    options += [f"-D{name}={value}" for name, value in defines]
    _, program = nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    assert int(status) == 0
    code = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, code)
    return code.decode()


@pytest.mark.parametrize(
    ("kernel", "macros", "load", "store"),
    [
        ("pgd_step", {"STATE": "float", "GRAD": "Half"}, "v4.f32", "v4.f32"),
        ("pgd_step", {"STATE": "Byte", "GRAD": "Half"}, "v4.u32", "v2.u32"),
        ("pgd_step_input", {"STATE": "float", "LAID": "Half", "LAYOUT": "PLAIN"}, "v4.u32", "v4.f32"),
        ("pgd_step_input", {"STATE": "Byte", "LAID": "Half", "LAYOUT": "PAD4"}, "v4.u32", "v4.u32"),
        ("pgd_step_input", {"STATE": "float", "LAID": "Half", "LAYOUT": "S2D"}, "v2.u32", "v2.f32"),
        ("drelu_add", {"VALUE": "Half"}, "v4.u32", "v4.u32"),
        ("bn_relu", {"VALUE": "Half"}, "v4.u32", "v4.u32"),
        ("bn_relu_sums", {"VALUE": "Half"}, "v4.u32", "f32"),
        ("bn_relu_grad", {"VALUE": "float"}, "v4.f32", "v4.f32"),
        ("u8_to_input", {"OUT": "BFloat16"}, "v2.u32", "v4.u32"),
        ("free_step", {}, "v4.f32", "v4.f32"),
        ("draw_start", {"STATE": "float"}, "v4.f32", "v4.f32"),
    ],
)
def test_memory_is_read_in_vectors_and_arithmetic_is_not_contracted(
    kernel: str, macros: dict[str, str], load: str, store: str, nvrtc: build.Nvrtc
) -> None:
    ptx = _ptx(kernel, tuple(macros.items()))
    assert f"ld.global.{load}" in ptx
    assert f"st.global.{store}" in ptx
    assert "fma" not in ptx
    assert ".local" not in ptx
