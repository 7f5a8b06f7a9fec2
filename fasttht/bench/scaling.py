"""How a THAT run should scale over 8 to 256 GPUs: a model and a simulation of it, no GPU needed, nothing measured.

A step of one GPU takes the longer of two times: its activation bytes over a share of the memory bandwidth, its FLOPs
over a share of the arithmetic peak. On top comes what the ranks wait for each other: gradients of a backward leave in
buckets, each summed over all ranks (a ring within the node, one between the nodes) as soon as every rank has it and the
bucket before is through. The slowest rank of each step sets the pace, so the simulation draws every rank's time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fasttht.bench.cost import Step, model_bytes, model_flops
from fasttht.models.two_head import TwoHead

# Eager training of ResNets moves its bytes at 56 to 63 % of the peak on V100 and A100 (published img/s times the byte
# model), and half of the tensor cores' peak is a good large-batch convolution.
BANDWIDTH_SHARE, ARITHMETIC_SHARE = 0.6, 0.5
# What a memory allocator, workspaces and the CUDA context keep beside the tensors that are counted here.
RESERVE_GIB = 2.0
BUCKET_BYTES = 25 * 2**20
NUM_CLASSES, FEAT_DIM, BANK = 1000, 128, 32768


@dataclass(frozen=True)
class Machine:
    """A kind of node. gb_per_s: memory bandwidth of a GPU; tflops: dense half precision of a GPU; memory_gib: of a GPU.

    link_gb_per_s: what a ring inside the node reaches at each GPU; net_gb_per_s: what one node sends to another;
    latency_us: of one hop between nodes.
    """

    name: str
    gpus: int
    gb_per_s: float
    tflops: float
    memory_gib: float
    link_gb_per_s: float
    net_gb_per_s: float
    latency_us: float = 15.0


# Peaks of data sheets; links as NCCL's own tests report them on such nodes, networks at 90 % of the line rate.
MACHINES = {
    "v100": Machine("8 x V100 32 GB, NVLink, 100 Gbit/s", 8, 900, 125, 32, 130, 11.2),
    "a100": Machine("8 x A100 80 GB, NVSwitch, 8 x 200 Gbit/s", 8, 2039, 312, 80, 230, 180),
    "h100": Machine("8 x H100 80 GB, NVSwitch, 8 x 400 Gbit/s", 8, 3350, 989, 80, 360, 360),
}


@dataclass(frozen=True)
class Job:
    """What trains. engine: of the attack; images: of the global batch."""

    arch: str
    step: Step
    images: int
    img_size: int = 224


@cache
def network(arch: str) -> TwoHead:
    """Return the network on the meta device: shapes without data; linear, because autocast knows no such device."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return TwoHead(arch, NUM_CLASSES, classifier="linear", feat_dim=FEAT_DIM)


def compute_seconds(job: Job, machine: Machine, images: int) -> float:
    """Return the time of one step of `images` on one GPU without any other."""
    num_bytes = model_bytes(job.step, job.arch, "imagenet", 64, job.img_size, 2)
    assert num_bytes is not None, "the byte model knows the 7x7 stem"
    flops = model_flops(job.step, job.arch, "imagenet", 64, job.img_size)
    return images * max(
        num_bytes / (BANDWIDTH_SHARE * machine.gb_per_s * 1e9), flops / (ARITHMETIC_SHARE * machine.tflops * 1e12)
    )


def sum_seconds(num_bytes: float, machine: Machine, nodes: int) -> float:
    """Return the time to sum `num_bytes` over all GPUs of some nodes: reduce inside, sum between, share out inside."""
    gpus = machine.gpus
    inside = 2 * (gpus - 1) / gpus * num_bytes / (machine.link_gb_per_s * 1e9)
    if nodes == 1:
        return inside
    between = 2 * (nodes - 1) / nodes * num_bytes / (machine.net_gb_per_s * 1e9)
    return inside + between + 2 * math.log2(nodes) * machine.latency_us * 1e-6


def backward_share(job: Job) -> float:
    """Return the share of a replay (or of a PGD step) that its backward takes: what sums can hide behind.

    A forward counts one, a backward two, one for input gradients alone one.
    """
    passes = 3 * job.step.replay + 2 * job.step.attack_steps + (1 if job.step.that else 0)
    return 2 * job.step.replay / passes


@dataclass(frozen=True)
class Exchange:
    """What the ranks of one step exchange, in seconds: `bucket` for one of `buckets` of every backward's gradients,
    `rest` for the clean features and the BN statistics at the end."""

    bucket: float
    buckets: int
    rest: float

    def seconds(self, rounds: int) -> float:
        """Return the time on the wire of a step with so many backwards, hidden or not."""
        return rounds * self.buckets * self.bucket + self.rest


def exchange(job: Job, machine: Machine, nodes: int) -> Exchange:
    """Return what a step over `nodes` nodes exchanges."""
    model = network(job.arch)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    statistics = 4 * sum(b.numel() for b in model.buffers())
    features = job.images * (4 * FEAT_DIM + 8)
    buckets = max(1, math.ceil(gradients / BUCKET_BYTES))
    if nodes * machine.gpus == 1:
        return Exchange(0.0, buckets, 0.0)
    # Features are gathered and not summed: half of a sum's way.
    rest = sum_seconds(statistics, machine, nodes) + sum_seconds(features / 2, machine, nodes)
    return Exchange(sum_seconds(gradients / buckets, machine, nodes), buckets, rest)


def simulate(job: Job, machine: Machine, nodes: int, *, steps: int = 200, spread: float = 0.02, seed: int = 0) -> float:
    """Return the mean seconds of a step over `nodes` nodes; each rank's compute varies by `spread` from step to step.

    Every replay sums the gradients once, a PGD step once in all: the attack has no collective. The clean features'
    gather and the BN statistics' average come at the end of a step.
    """
    ranks = nodes * machine.gpus
    images = job.images / ranks
    rng = np.random.default_rng(seed)
    sent = exchange(job, machine, nodes)
    base, share, rounds = compute_seconds(job, machine, math.ceil(images)), backward_share(job), job.step.replay
    total = 0.0
    for _ in range(steps):
        start = 0.0
        for _ in range(rounds):
            times = base / rounds * np.maximum(1 + spread * rng.standard_normal(ranks), 0.5)
            begin = times * (1 - share)  # of the backward
            free = 0.0
            for bucket in range(sent.buckets):
                ready = start + float((begin + (times - begin) * (bucket + 1) / sent.buckets).max())
                free = max(free, ready) + sent.bucket
            start = free
        total += start + sent.rest
    return total / steps


def memory_gib(job: Job, images: int) -> dict[str, float]:
    """Return GiB on one GPU for `images` at a time: fixed tensors, and activations that the backward waits for.

    Counted on tensors without data, half-precision activations; the attack on a folded network keeps fewer.
    """
    model = network(job.arch)
    weights = 4 * sum(p.numel() for p in model.parameters())
    fixed = 3 * weights + weights / 2  # float32 weights, gradients, momentum; autocast's half-precision copies
    fixed += weights / 2 if job.step.attack_steps else 0  # the folded network
    fixed += weights + 4 * BANK * FEAT_DIM if job.step.that else 0  # g, and the bank
    fixed += 4 * 3 * job.img_size**2 * images * (1 if job.step.replay > 1 else 2)  # delta, or x and x_adv
    return {"fixed": fixed / 2**30, "activations": images * _saved_bytes(job.arch, job.img_size) / 2**30}


@cache
def _saved_bytes(arch: str, img_size: int) -> float:
    """Return the bytes that autograd keeps for one image, each storage once; weights are not among them."""
    model, images = network(arch), 2
    own = {id(p) for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that no two of them can have one id

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own and tensor.dim() == 4 and tensor.shape[0] == images:
            kept.append(tensor)
            sizes[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    x = torch.empty(images, 3, img_size, img_size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)
        loss = F.cross_entropy(outputs.logits, torch.empty(images, dtype=torch.int64, device="meta"))
    del loss
    return 2 * sum(sizes.values()) / images


def largest_batch(job: Job, machine: Machine) -> int:
    """Return the largest power of two of images that fits on one GPU, 0 if not even one does."""
    images = 1024
    while images and sum(memory_gib(job, images).values()) + RESERVE_GIB > machine.memory_gib:
        images //= 2
    return images


def scale(job: Job, machine: Machine, gpus: int) -> dict[str, Any]:
    """Return one row: what `gpus` GPUs reach together, and what they ask of memory, network and loader.

    compute_ms: of a step that waits for nothing; network_ms: on the wire, mostly behind a backward.
    efficiency_pct: against as many GPUs that never wait. loader_img_per_s: distinct images that one node trains on.
    parts: micro-batches that a rank's share of the batch must be cut into, to fit.
    """
    nodes = gpus // machine.gpus
    seconds = simulate(job, machine, nodes)
    alone = compute_seconds(job, machine, math.ceil(job.images / gpus))
    images = math.ceil(job.images / gpus)
    fits = largest_batch(job, machine)
    return {
        "gpus": gpus, "img_per_s": job.images / seconds, "ms": 1e3 * seconds,
        "compute_ms": 1e3 * alone, "network_ms": 1e3 * exchange(job, machine, nodes).seconds(job.step.replay),
        "efficiency_pct": 100 * alone / seconds, "images_per_gpu": images,
        "parts": math.ceil(images / fits) if fits else None,
        "loader_img_per_s": job.images / seconds / nodes,
    }  # fmt: skip
