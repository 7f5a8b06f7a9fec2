"""What the doctor says of this machine, and of machines that it is not on."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttht import cli, doctor
from fasttht.doctor import Finding, examine, judge_gpu
from fasttht.kernels import build
from fasttht.pipelines import backends

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def finding(findings: list[Finding], part: str) -> Finding:
    (found,) = [each for each in findings if each.part == part]
    return found


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 0), CU126, True), ((7, 0), CU130, False), ((7, 5), CU130, True), ((8, 0), CU130, True),
        ((8, 9), CU130, True), ((9, 0), CU130, True), ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((8, 0), ["sm_86"], False), ((12, 1), CU130, True), ((10, 0), CU130, True), ((8, 0), [], False),
        ((9, 0), ["sm_90a"], True), ((1, 2), ["sm_120"], False),
    ],
)  # fmt: skip
def test_a_gpu_needs_code_of_its_own_generation(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    found = judge_gpu("gpu 0", "Some GPU", capability, 16 << 30, built_for)
    assert found.status == ("ok" if runs else "problem")
    assert f"compute capability {capability[0]}.{capability[1]}, 16 GiB" in found.text
    assert runs or found.advice != ""


def test_a_v100_under_a_torch_without_volta_is_told_which_torch_to_take() -> None:
    assert "torch==2.10.*" in judge_gpu("gpu 0", "Tesla V100", (7, 0), 16 << 30, CU130).advice


@pytest.mark.parametrize("value", ["cuda", "nonsense"])
def test_kernels_that_were_asked_for_and_cannot_be_are_a_problem(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTTHT_KERNELS", value)
    assert finding(list(doctor._kernels()), "kernels").status == "problem"
    monkeypatch.setenv("FASTTHT_KERNELS", "torch")
    assert finding(list(doctor._kernels()), "kernels").status == "absent"


class FakeNvrtc:
    version, archs = "12.9", frozenset({"sm_70", "sm_90", "sm_120"})

    def __init__(self) -> None:
        self.asked: list[str] = []

    def compile(self, source: str, defines: Any, arch: str) -> bytes:
        assert arch == "sm_120"
        return b"code"


def test_the_compiler_is_seen_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "Nvrtc", FakeNvrtc)
    (found,) = doctor._nvrtc()
    assert found.status == "ok"
    assert found.text.startswith("12.9 through cuda-core ")
    assert found.text.endswith(" compiles for sm_70 to sm_120")


@pytest.mark.parametrize(
    ("error", "gpu", "status"),
    [
        (ModuleNotFoundError("no cuda.core"), True, "absent"), (RuntimeError("no libnvrtc\nand"), True, "problem"),
        (RuntimeError("no libnvrtc\nand"), False, "absent"),
    ],
)  # fmt: skip
def test_a_compiler_that_is_missing_or_broken_says_what_to_install(
    error: Exception, gpu: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken is a problem where there is a GPU for it; without the kernels a run there crawls."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for place, name in ((build, "Nvrtc"), (FakeNvrtc, "compile")):
        monkeypatch.setattr(build, "Nvrtc", FakeNvrtc)
        monkeypatch.setattr(place, name, fail)
        (found,) = doctor._nvrtc()
        assert found == Finding("nvrtc", status, str(error).split("\n")[0], 'pip install "fasttht[cuda13]"')  # type: ignore[arg-type]


def libcuda(version: int, code: int = 0) -> Callable[[str], Any]:
    """libcuda.so.1 as far as it is asked."""

    def get(pointer: Any) -> int:
        pointer._obj.value = version
        return code

    return lambda name: SimpleNamespace(cuDriverGetVersion=get)


@pytest.mark.parametrize(
    ("file", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Jan 1\nGCC version: 12.2.0", "580.159.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        (None, "of unknown release"),
    ],
)
def test_the_driver_has_a_line_with_its_release(
    file: str | None, release: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.ctypes, "CDLL", libcuda(12080))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(doctor, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    if file is not None:
        (tmp_path / "version").write_text(file)
    assert list(doctor._driver()) == [Finding("driver", "ok", f"{release}, for CUDA up to 12.8")]


def test_a_driver_too_old_for_torch_and_none_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_driver_release", lambda: "535.54")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.ctypes, "CDLL", libcuda(12020))
    (found,) = doctor._driver()
    assert (found.status, "this torch is built for CUDA 13.0" in found.text) == ("problem", True)
    assert found.advice == "update the driver, or install a torch built for CUDA 12"
    monkeypatch.setattr(doctor.ctypes, "CDLL", libcuda(0, code=100))
    assert finding(list(doctor._driver()), "driver").status == "absent"


@pytest.mark.parametrize("name", ["ffcv", "dali-cpu", "dali-gpu"])
def test_a_loader_that_is_installed_and_broken_is_a_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is found, and its library does not load."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_installed", lambda module: True)
    monkeypatch.setattr(doctor, "_is_installed", lambda package: True)
    monkeypatch.setattr(backends, "why_not", lambda name, device: "it does not load; take turbo")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: (8, 0))
    for module in ("ffcv", "ffcv.libffcv", "nvidia.dali", "nvidia.dali.backend"):
        monkeypatch.setitem(sys.modules, module, None)  # as an import that fails
    monkeypatch.setattr("fasttht.pipelines.decode_ffcv.load_decode_into", broken)
    found = finding(list(doctor._decoders()), f"loader {name}")
    assert found.status == "problem"
    assert "does not load: " in found.text
    assert found.advice.startswith("pip install --force-reinstall ")


def broken() -> None:
    raise OSError("libopencv_core.so.406: cannot open shared object file")


def test_this_machine_is_described(tmp_path: Path) -> None:
    findings = examine(tmp_path / "runs")
    assert torch.__version__ in finding(findings, "torch").text
    assert finding(findings, "loader turbo").status == "ok"
    assert finding(findings, "disk").text.endswith(f"free at {tmp_path}")
    assert not (tmp_path / "runs").exists()
    assert all(each.advice for each in findings if each.status == "problem")


def test_what_is_missing_is_absent_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_installed", lambda module: False)
    monkeypatch.setattr(doctor, "_is_installed", lambda package: False)
    findings = examine(tmp_path)
    for part, extra in (("loader ffcv", "ffcv"), ("loader dali-cpu", "dali")):
        assert finding(findings, part).status == "absent"
        assert finding(findings, part).advice == f'pip install "fasttht[{extra}]"'


def test_a_full_disk_an_unwritable_folder_and_few_open_files_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    findings = examine(tmp_path)
    assert finding(findings, "disk").status == "problem"
    assert finding(findings, "open files") == Finding("open files", "problem", "up to 256", "ulimit -n 4096")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in finding(examine(tmp_path), "disk").text


def test_a_driver_without_a_device_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert finding(examine(tmp_path), "gpu").status == "problem"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert finding(examine(tmp_path), "gpu").status == "absent"


@pytest.mark.parametrize("status", ["ok", "absent", "problem"])
def test_the_exit_code_says_whether_something_is_wrong(
    status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Finding("part", status, "its text", "the advice")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "examine", lambda folder: [found])
    assert cli.run(["doctor"]) == (6 if status == "problem" else 0)
    out = capsys.readouterr().out
    assert "part: its text" in out
    assert ("the advice" in out) == (status != "ok")
