"""What the doctor says of this machine, and of machines that it is not on."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasttht import cli, doctor
from fasttht.doctor import Finding, examine, judge_gpu
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


def test_this_machine_is_described(tmp_path: Path) -> None:
    findings = examine(tmp_path / "runs")
    assert torch.__version__ in finding(findings, "torch").text
    assert finding(findings, "loader turbo").status == "ok"
    assert finding(findings, "disk").text.endswith(f"free at {tmp_path}")
    assert not (tmp_path / "runs").exists()
    assert all(each.advice for each in findings if each.status == "problem")


def test_what_is_missing_is_absent_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_installed", lambda module: False)
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
