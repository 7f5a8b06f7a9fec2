"""An exact export as ONNX: [0, 1] pixels in, logits out, any batch size."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttht.errors import UsageError

INPUT, OUTPUT = "pixels", "logits"


def require_onnx() -> None:
    """Refuse before any work is done. Raises: UsageError naming the package that is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(
                f'--onnx: expected the {package} package, got none; run: pip install "fasttht[onnx]"'
            ) from None


def write_onnx(model: nn.Module, img_size: int, file: Path) -> None:
    """Write a network in evaluation mode, on the CPU, as one ONNX file with a free batch dimension.

    Above 2 GB ONNX keeps weights in a file of their own; no architecture here comes near.
    """
    x = torch.zeros(2, 3, img_size, img_size)  # two: an exporter may take a batch of one for a constant
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            model,
            (x,),
            file,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def open_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images (B, 3, H, W) to logits (B, C), both on the CPU, that onnxruntime computes."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def logits(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.cpu().contiguous().numpy()})[0])

    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own progress and versions from the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
