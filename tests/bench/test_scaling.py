"""The scaling model: its parts against formulas, its limits against what must be, its document against its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fasttht import cli
from fasttht.bench import scaling, scaling_doc
from fasttht.bench.cost import Step
from fasttht.bench.ladder import _sizes
from fasttht.bench.scaling import (
    MACHINES,
    Job,
    compute_seconds,
    exchange,
    largest_batch,
    memory_gib,
    simulate,
    sum_seconds,
)

PGD = Step(that=True, attack_steps=10, engine="folded")
FREE = Step(that=True, replay=4)
V100 = MACHINES["v100"]


def test_sum_is_a_ring_in_the_node_and_one_between_nodes() -> None:
    inside = 2 * 7 / 8 * 1e9 / 130e9
    assert sum_seconds(1e9, V100, 1) == pytest.approx(inside)
    assert sum_seconds(1e9, V100, 4) == pytest.approx(inside + 2 * 3 / 4 * 1e9 / 11.2e9 + 2 * 2 * 15e-6)


@pytest.mark.parametrize("step", [PGD, FREE])
def test_ranks_that_never_wait_take_what_one_takes(step: Step) -> None:
    job = Job("resnet50", step, 1024)
    ideal = replace(V100, link_gb_per_s=1e12, net_gb_per_s=1e12, latency_us=0)
    assert simulate(job, ideal, 2, steps=3, spread=0) == pytest.approx(compute_seconds(job, ideal, 64))


def test_slow_ranks_and_slow_networks_cost_time() -> None:
    job = Job("resnet50", FREE, 1024)
    even = simulate(job, V100, 2, steps=20, spread=0)
    assert simulate(job, V100, 2, steps=20, spread=0.05) > even
    assert simulate(job, replace(V100, net_gb_per_s=1), 2, steps=20, spread=0) > even


def test_free_training_pays_its_sums_at_every_replay() -> None:
    slow = replace(V100, net_gb_per_s=1e-3)  # so slow that nothing else counts
    pgd, free = (simulate(Job("resnet50", step, 512), slow, 2, steps=1, spread=0) for step in (PGD, FREE))
    assert free / pgd == pytest.approx(4, rel=0.02)


def test_what_is_on_the_wire_is_gradients_each_replay_and_statistics_once() -> None:
    job = Job("resnet50", FREE, 512)
    model = scaling.network("resnet50")
    gradients = 4 * sum(p.numel() for p in model.parameters())
    statistics = 4 * sum(b.numel() for b in model.buffers())
    features = 512 * (4 * 128 + 8)
    near = replace(V100, latency_us=0)
    bytes_ = 4 * gradients + statistics + features / 2
    assert exchange(job, near, 4).seconds(4) == pytest.approx(sum_seconds(bytes_, near, 4))
    assert exchange(job, replace(near, gpus=1), 1).seconds(4) == 0


def test_activations_are_convolution_outputs_and_what_follows_a_relu() -> None:
    outputs, with_relu, _, sums, pool = _sizes("resnet50", 224, 64)
    expected = outputs + with_relu + sums + pool // 4  # the max-pool's output is a quarter of its input
    inputs = 3 * 224**2
    indices = 4 * pool // 4  # the max-pool keeps int64 indices: counted as elements, not as bytes
    found = scaling._saved_bytes("resnet50", 224) / 2
    assert found == pytest.approx(expected + inputs, rel=0.03, abs=indices)


def test_a_batch_fits_or_the_next_does_not() -> None:
    job = Job("resnet152", PGD, 4096)
    images = largest_batch(job, V100)
    assert sum(memory_gib(job, images).values()) + scaling.RESERVE_GIB <= V100.memory_gib
    assert sum(memory_gib(job, 2 * images).values()) + scaling.RESERVE_GIB > V100.memory_gib
    assert largest_batch(job, replace(V100, memory_gib=1)) == 0


def test_document_holds_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling_doc, "scaling_rows", lambda machine: rows)
    monkeypatch.setattr(scaling_doc, "ARCHS", ("resnet50", "resnet152"))
    rows = [
        {
            "arch": arch, "kind": kind, "machine": "v100", "gpus": 32, "img_per_s": 1000.0 + i, "ms": 100.0,
            "compute_ms": 91.0, "network_ms": 23.0,
            "efficiency_pct": 90.0, "images_per_gpu": 128, "parts": 1, "loader_img_per_s": 250.0,
        }
        for i, (arch, kind) in enumerate((a, k) for a in ("resnet50", "resnet152") for k in scaling_doc.KINDS)
    ]  # fmt: skip
    assert cli.run(["bench", "scale", "--write", str(tmp_path / "s.md"), "--output", str(tmp_path / "s.json")]) == 0
    text = (tmp_path / "s.md").read_text()
    assert all(f"| {row['img_per_s']:,.0f} |" in text for row in rows)
    assert text.count("| 91 | 23 | 100 |") == len(rows)
    assert "not a measurement" in text
    assert cli.run(["bench", "scale", "--write", "missing/folder/s.md"]) == 2
