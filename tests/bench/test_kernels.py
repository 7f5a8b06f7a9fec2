"""`bench kernels`: every op is in it, cases call the op and its reference alike, and figures fit each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttht import cli, kernels
from fasttht.bench import kernels as bench_kernels
from fasttht.bench.kernel_cases import CASES, Shapes, which_ran, without_case
from fasttht.bench.kernels import _operand_sets, time_calls

CPU = torch.device("cpu")
SHAPES = Shapes(2, 8, 8, CPU, torch.float32)


def settings(*ops: str, compiled: bool = False) -> bench_kernels.Settings:
    return bench_kernels.Settings(
        ops=ops, batch_size=2, img_size=8, channels=8, windows=3, window_s=1e-4, compiled=compiled, cpu=True,
        cache_bytes=20_000,
    )  # fmt: skip


def test_every_op_has_a_case() -> None:
    assert without_case() == []
    assert set(CASES) <= set(kernels.__all__)


@pytest.mark.parametrize("name", CASES)
def test_a_case_calls_the_op_and_its_reference_alike(name: str) -> None:
    case = CASES[name]
    ours, theirs = case.make(SHAPES), case.make(SHAPES)
    before = [tensor.clone() for tensor in ours]
    found, expected = case.op(*ours), case.reference(*theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    changed = any(not torch.equal(a, b) for a, b in zip(ours, before, strict=True))
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)  # type: ignore[arg-type]
        assert changed == (name == "bn_relu"), "it moves the running statistics"
    else:
        assert changed, "an op in place that changes nothing is not at work"
    read = sum(tensor.numel() * tensor.element_size() for tensor in before)
    assert 0 < case.moved(ours) <= 2 * read + 5 * ours[0].numel() * ours[0].element_size()


def test_rows_are_consistent() -> None:
    report = bench_kernels.measure(settings("pgd_linf_step_", "u8_to_input"))
    assert report["implementation"] == {"name": "torch", "reason": "CPU tensors always get the reference."}
    assert [row["name"] for row in report["rows"]] == ["pgd_linf_step_", "u8_to_input"]
    for row in report["rows"]:
        assert (row["implementation"], row["ran"], row["ratio"]) == ("reference", "torch", 1)
        assert row["gb_per_s"] == pytest.approx(1000 * row["traffic_mb"] / row["us"])
        assert row["copy_pct"] == pytest.approx(100 * row["gb_per_s"] / report["copy"]["gb_per_s"])
        assert row["quartiles_us"][0] <= row["us"] <= row["quartiles_us"][1]
        assert row["cold"]
    assert report["rows"][0]["traffic_mb"] == pytest.approx(4 * 2 * 3 * 64 * 4 / 1e6)


def test_compiled_references_are_rows_too_and_one_that_does_not_compile_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile_some(function: Callable[..., object], *, dynamic: bool) -> Callable[..., object]:
        assert not dynamic
        if function is CASES["u8_to_input"].reference:
            return function

        def fail(*args: object) -> None:
            raise RuntimeError("no compiler\nand a second line")

        return fail

    monkeypatch.setattr(torch, "compile", compile_some)
    rows = bench_kernels.measure(settings("u8_to_input", "drelu_add_", compiled=True))["rows"]
    assert [(row["name"], row["implementation"]) for row in rows] == [
        ("u8_to_input", "reference"), ("u8_to_input", "compiled"),
        ("drelu_add_", "reference"), ("drelu_add_", "compiled"),
    ]  # fmt: skip
    assert rows[1]["ran"] == "inductor"
    assert rows[3]["not_run"] == "it does not compile (no compiler)"


def test_calls_take_turns_over_windows_and_sets() -> None:
    now = 0.0
    calls: list[tuple[str, float]] = []

    def call(name: str, seconds: float) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            nonlocal now
            now += seconds
            calls.append((name, x.item()))

        return run

    sets = [(torch.tensor(float(i)),) for i in range(3)]
    found = time_calls(
        {"slow": call("slow", 0.5), "fast": call("fast", 0.25)}, sets, CPU, windows=2, window_s=1.0, clock=lambda: now
    )
    assert found == {"slow": [0.5, 0.5], "fast": [0.25, 0.25]}
    kept = calls[4:]  # behind two calls of each to warm up and to find out how many fill a window
    assert [name for name, _ in kept] == (["slow"] * 2 + ["fast"] * 4) * 2
    assert [number for _, number in kept[:6]] == [0, 1, 0, 1, 2, 0]


def test_sets_are_larger_than_the_cache_together_and_separate() -> None:
    sets = _operand_sets(CASES["u8_to_input"], SHAPES, cache=10_000)
    assert sum(x.numel() for (x,) in sets) >= 20_000
    assert len({x.data_ptr() for (x,) in sets}) == len(sets)


def test_what_ran_is_told() -> None:
    case = CASES["pgd_linf_step_"]
    operands = case.make(SHAPES)
    assert which_ran("pgd_linf_step_", lambda: case.op(*operands)) == "torch"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--batch-size", "2", "--img-size", "8", "--channels", "8", "--windows", "2", "--window-s", "0.0001"]
    assert cli.run(["bench", "kernels", "--cpu", "--ops", "model_input_", *words]) == 0
    out = capsys.readouterr().out
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert report["bench"] == "kernels"
    assert [row["name"] for row in report["rows"]] == ["model_input_"]
    assert "CPU tensors always get the reference." in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ops", "nothing"), "--ops: expected names of"),
        (("--channels", "6"), "--channels: expected a multiple of 4, got 6"),
        (("--window-s", "0"), "--window-s: expected seconds above 0 and below 60, got 0"),
        (("--batch-size", "0"), "--batch-size: expected 1 or more, got 0"),
    ],
)
def test_bad_words_exit_with_2(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "kernels", *words]) == 2
    assert said in capsys.readouterr().err
