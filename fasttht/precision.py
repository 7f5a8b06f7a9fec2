"""How convolutions are computed: full float32 in evaluation, the fastest kernels where shapes stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn TF32 off, whose 10-bit mantissa moves logits by more than a late PGD step does, and cuDNN's search.

    Which kernel is the fastest may change from run to run, and the last bits with it.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = kept


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Have cuDNN try its kernels when a shape is new, and keep the fastest: for shapes that come again and again."""
    kept = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = kept
