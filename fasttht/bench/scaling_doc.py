"""docs/scaling.md: the scaling model's tables, and what they rest on, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import fill
from typing import Any

from fasttht.bench.cost import Step
from fasttht.bench.hours import IMAGENET_IMAGES
from fasttht.bench.scaling import (
    ARITHMETIC_SHARE,
    BANDWIDTH_SHARE,
    MACHINES,
    Job,
    compute_seconds,
    largest_batch,
    memory_gib,
    scale,
)

GPUS = (8, 16, 32, 64, 128, 256)
KINDS = {
    "PGD-10": (Step(that=True, attack_steps=10, engine="folded"), 4096),
    "free, 4 replays": (Step(that=True, replay=4), 2048),
}
ARCHS = ("resnet50", "resnet101", "resnet152")
MEMORY_IMAGES = (16, 32, 64, 128, 256, 512)
# One core of docs/results/load-cpu.json: 500 x 375 JPEGs of 49 kB to 224 pixels.
CORE_IMG_PER_S = 1480


def scaling_rows(machine: str, gpus: tuple[int, ...] = GPUS) -> list[dict[str, Any]]:
    """Return the rows of every network and kind of training on one kind of machine."""
    return [
        {"arch": arch, "kind": kind, "machine": machine, **scale(Job(arch, step, images), MACHINES[machine], count)}
        for arch in ARCHS
        for kind, (step, images) in KINDS.items()
        for count in gpus
    ]


def document(rows: list[dict[str, Any]], machine: str) -> str:
    """Return the document: assumptions, the paper's run as an example, tables of speed and of memory."""
    node = MACHINES[machine]
    parts = [
        "# Scaling: a model, not a measurement",
        _paragraph(f"""
            Written by `fasttht bench scale --machine {machine} --write docs/scaling.md`. Nothing here was measured on
            a GPU. Bytes and FLOPs are counted on tensors without data; a GPU is taken to reach {BANDWIDTH_SHARE:.0%}
            of its memory bandwidth or {ARITHMETIC_SHARE:.0%} of its tensor cores' peak, whichever takes longer, and
            every rank's step to vary by 2 % (200 simulated steps, fixed seed). Gradients are summed once per replay or
            PGD step, in buckets of 25 MiB that leave while the backward goes on: a ring inside each node, one between
            nodes. The attack has no collective. The attack engine is `folded`, the training pass eager.
        """),
        _paragraph(f"""
            Machine: {node.name}; {node.gb_per_s:g} GB/s and {node.tflops:g} TFLOP/s a GPU, {node.link_gb_per_s:g} GB/s
            in the node, {node.net_gb_per_s:g} GB/s between nodes.
        """),
        "## The paper's run",
        _example(rows, machine),
        "## Speed",
        _paragraph(f"""
            Global batch 4096 for PGD-10, 2048 for free training, split evenly; efficiency against GPUs that never
            wait. Compute: ms of a step that waits for nothing; network: ms on the wire, of which a backward hides what
            it can; step: ms of both, with ranks that differ. Loader: distinct images that one node has to deliver, and
            the cores that this would keep busy at {CORE_IMG_PER_S:,} a second and core (`turbo`, 49 kB images;
            ImageNet's are twice as large).
        """),
        _table(
            ("network", "training", "GPUs", "img/s", "efficiency %", "compute", "network", "step", "images a GPU",
             "micro-batches", "loader img/s", "cores"),
            [
                (row["arch"], row["kind"], row["gpus"], f"{row['img_per_s']:,.0f}", f"{row['efficiency_pct']:.0f}",
                 *(f"{row[key]:,.0f}" for key in ("compute_ms", "network_ms", "ms")),
                 row["images_per_gpu"], row["parts"] or "none fits", f"{row['loader_img_per_s']:,.0f}",
                 f"{row['loader_img_per_s'] / CORE_IMG_PER_S:.1f}")
                for row in rows
            ],
        ),
        "## Memory of one GPU",
        _paragraph("""
            GiB by images at a time: weights, gradients, momentum, half-precision copies, clean encoder, a bank of
            32768; and the half-precision activations that the backward waits for. Gradients in flight and workspaces
            come on top: 2 GiB are kept free of the largest batch (a power of two).
        """),
        _table(("network", "training", *MEMORY_IMAGES, "largest batch"), list(_memory_cells(machine))),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _example(rows: list[dict[str, Any]], machine: str) -> str:
    """Return the paper's own run, 100 epochs of ResNet-152 and PGD-10 on 32 GPUs, reckoned step by step."""
    job = Job("resnet152", *KINDS["PGD-10"])
    row = next(r for r in rows if (r["arch"], r["kind"], r["gpus"]) == (job.arch, "PGD-10", 32))
    alone = compute_seconds(job, MACHINES[machine], 128)
    steps = 100 * (IMAGENET_IMAGES // job.images)
    return _paragraph(f"""
        100 epochs of ResNet-152, PGD-10, batch 4096 on 32 GPUs: 128 images a GPU. One GPU alone would take
        {1e3 * alone:,.0f} ms a step, 32 take {row["ms"]:,.0f} ms ({row["efficiency_pct"]:.0f} %), of which
        {row["network_ms"]:,.0f} ms are on the wire if nothing hides them: what is lost goes to the slowest rank and to
        the last buckets of the gradients. {steps:,} steps are {steps * row["ms"] / 3.6e6:,.1f} hours; evaluation and
        checkpoints come on top. Each node reads {row["loader_img_per_s"]:,.0f} images a second,
        {row["loader_img_per_s"] / CORE_IMG_PER_S:.1f} cores of the loader. The paper does not give its hours.
    """)


def _memory_cells(machine: str) -> Iterator[tuple[object, ...]]:
    for arch in ARCHS:
        for kind, (step, batch) in KINDS.items():
            job = Job(arch, step, batch)
            found = [sum(memory_gib(job, images).values()) for images in MEMORY_IMAGES]
            yield arch, kind, *(f"{gib:.1f}" for gib in found), largest_batch(job, MACHINES[machine])


def _paragraph(text: str) -> str:
    return fill(" ".join(text.split()), 120, break_on_hyphens=False)


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
