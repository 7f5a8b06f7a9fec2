"""What a step must compute and move: the counts against the analytic model's, and the rule that names the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttht.bench import peaks
from fasttht.bench.cost import Step, judge, model_bytes, model_flops
from fasttht.bench.peaks import _size, arithmetic_peak, cache_bytes, copy_bandwidth, known_tflops

CLEAN = Step(that=False)
R50 = ("resnet50", "imagenet", 64, 224)


def analytic_forward(arch_blocks: tuple[int, ...], side: int) -> tuple[float, float]:
    """Return the FLOPs of a bottleneck network's forward and of its first convolution, 2 a multiply-add."""
    side //= 2
    first = 2 * 3 * 64 * 49 * side**2
    total, channels, side = first + 2 * 2048 * 1000, 64, side // 2
    for stage, blocks in enumerate(arch_blocks):
        width = 64 << stage
        for block in range(blocks):
            after = side // 2 if stage and not block else side
            total += 2 * channels * width * side**2 + 2 * 9 * width**2 * after**2 + 2 * 4 * width**2 * after**2
            total += 2 * channels * 4 * width * after**2 if not block else 0
            side, channels = after, 4 * width
    return total, first


def test_flops_are_the_analytic_models() -> None:
    forward, first = analytic_forward((3, 4, 6, 3), 224)
    head = 2 * (2048 * 2048 + 2048 * 128)
    assert model_flops(CLEAN, *R50) == pytest.approx(3 * forward - first, rel=1e-6)
    that = model_flops(Step(that=True, attack_steps=10, engine="fused"), *R50)
    assert that == pytest.approx(10 * 2 * forward + 3 * (forward + head) - first + forward + head, rel=1e-3)
    assert that / model_flops(CLEAN, *R50) == pytest.approx(8.07, abs=0.01)
    free = model_flops(Step(that=True, replay=4), *R50)
    assert free == pytest.approx(4 * 3 * (forward + head) + forward + head, rel=1e-3)


def test_flops_need_no_data_and_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    small = model_flops(CLEAN, "resnet18", "small", 4, 8)
    assert 0 < small < model_flops(Step(that=False), "resnet18", "small", 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_bytes_of_a_step_are_its_parts() -> None:
    clean = model_bytes(CLEAN, *R50, itemsize=2)
    naive = model_bytes(Step(that=True, attack_steps=10, engine="backward"), *R50, itemsize=2)
    assert clean is not None
    assert naive is not None
    assert round(clean / 1e6) == 474
    assert naive / 1e9 == pytest.approx(5.39, abs=0.02)  # the model's own figure for the whole step
    fused = model_bytes(Step(that=True, attack_steps=10, engine="fused"), *R50, itemsize=2)
    assert fused is not None
    assert fused < 0.45 * naive
    assert model_bytes(CLEAN, *R50, itemsize=4) == pytest.approx(2 * clean, abs=1)
    free = model_bytes(Step(that=True, replay=4), *R50, itemsize=2)
    assert free is not None
    assert 4 * clean < free < 5 * clean


def test_a_network_that_the_model_cannot_count_has_no_bytes() -> None:
    assert model_bytes(CLEAN, "resnet50", "small", 64, 32, itemsize=2) is None
    assert model_bytes(CLEAN, "resnet18", "imagenet", 64, 224, itemsize=2) is not None


# A step of one second on a machine of 1 TFLOP/s and 1 GB/s.
STEP: dict[str, Any] = {"seconds": 1.0, "tflops": 1.0, "gb_per_s": 1.0}


@pytest.mark.parametrize(
    ("wait", "host", "flops", "num_bytes", "limit"),
    [
        (6.0, 0.99, 5e11, 4 * 10**8, "data"),
        (5.0, 0.90, 5e11, 4 * 10**8, "launch"),
        (0.0, 0.89, 5e11, 4 * 10**8, "compute"),
        (0.0, None, 3e11, 4 * 10**8, "bandwidth"),
        (0.0, None, 9e10, 9 * 10**7, None),
        (0.0, None, 5e11, None, None),
    ],
)
def test_the_limit(wait: float, host: float | None, flops: float, num_bytes: int | None, limit: str | None) -> None:
    found = judge(data_wait_pct=wait, host_share=host, flops=flops, num_bytes=num_bytes, **STEP)
    assert found["limit"] == limit
    assert found["mfu_pct"] == pytest.approx(flops / 1e10)
    assert found["copy_pct"] == (None if num_bytes is None else pytest.approx(num_bytes / 1e7))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("Tesla V100-SXM2-16GB", 125.0), ("Tesla V100-PCIE-32GB", 112.0), ("Tesla V100-SXM3-32GB", 130.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100 80GB PCIe", 312.0), ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H100 NVL", 835.0), ("NVIDIA H200", 989.0), ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA L40S", 362.0), ("NVIDIA GeForce RTX 3090", 71.0), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None), ("NVIDIA RTX A1000", None), ("NVIDIA A10", None),
    ],
)  # fmt: skip
def test_peaks_by_name_and_none_for_a_name_that_is_only_alike(name: str, peak: float | None) -> None:
    assert known_tflops(name) == peak


def test_the_machines_best_is_measured_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    copy = copy_bandwidth(cpu, windows=3, buffer_bytes=10**5)
    assert 0 < copy["quartiles"][0] <= copy["gb_per_s"] <= copy["quartiles"][1]
    assert copy["buffer_mb"] == pytest.approx(0.1)
    peak = arithmetic_peak(cpu, windows=3, side=16)
    assert peak["tflops"] > 0
    assert peak["source"] in (
        "measured product of 16 x 16, float32", "measured convolution, 3 x 3, 4 channels of 28 x 28, float32",
    )  # fmt: skip
    assert cache_bytes(cpu) >= 2**16


@pytest.mark.parametrize(
    ("product_s", "convolution_s", "tflops", "source"),
    [
        # 2 * 16^3 FLOPs, and 4 * 4 * 9 weights at 28 * 28 pixels: 27.6 times as many.
        (1.0, 50.0, 2 * 16**3 / 1e12, "measured product of 16 x 16, float32"),
        (
            1.0,
            20.0,
            2 * 4 * 4 * 9 * 28 * 28 / 20 / 1e12,
            "measured convolution, 3 x 3, 4 channels of 28 x 28, float32",
        ),
    ],
)
def test_a_cpus_peak_is_the_faster_of_a_product_and_a_convolution(
    monkeypatch: pytest.MonkeyPatch, product_s: float, convolution_s: float, tflops: float, source: str
) -> None:
    found: list[torch.Tensor] = []

    def seconds(job: Callable[[], torch.Tensor], device: torch.device, calls: int, windows: int) -> list[float]:
        found.append(job())
        return [(product_s, convolution_s)[len(found) - 1]] * windows

    monkeypatch.setattr(peaks, "_window_seconds", seconds)
    peak = arithmetic_peak(torch.device("cpu"), windows=3, side=16)
    assert [tuple(out.shape) for out in found] == [(16, 16), (1, 4, 28, 28)]  # what the FLOPs are of
    assert peak == {"tflops": pytest.approx(tflops), "source": source}


@pytest.mark.parametrize(("text", "size"), [("32768K", 2**25), ("1M\n", 2**20), ("512", 512), ("odd", 0)])
def test_the_size_of_a_cache(text: str, size: int, tmp_path: Any) -> None:
    path = tmp_path / "size"
    path.write_text(text)
    assert _size(path) == size
