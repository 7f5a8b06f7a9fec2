"""The `export` command: words to a call. No logic, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    run: Path,
    /,
    *,
    checkpoint: str = "last",
    output: Path | None = None,
    kind: Literal["exact", "torchvision"] = "exact",
    onnx: bool = False,
    name: str | None = None,
    limit: int = 0,
    force: bool = False,
    device: str = "auto",
) -> int:
    """Write a run's network for others to load, with a model card, and keep it only if it predicts what the run does.

    Parameters
    ----------
    run
        Run folder of `fasttht train`; of its weights the moving average is exported, if it keeps one.
    checkpoint
        last, best (the highest lowest accuracy in an evaluation while it trained), or one's name.
    output
        Folder to write. Default: export/KIND in the run folder.
    kind
        exact: the network as it is, for evaluation and attacks. torchvision: the keys of torchvision's ResNets, the
        same predictions; not for attack evaluation.
    onnx
        Also write model.onnx (exact only; needs the `onnx` extra).
    name
        Name of the model. Default: architecture and objective.
    limit
        Held-out images to compare and score, evenly spaced; 0: all.
    force
        Replace an export that is there.
    device
        cpu, cuda or cuda:N; auto: cuda if there is one, else cpu.
    """
    from fasttht.export_run import export_run

    export_run(
        run, which=checkpoint, output=output, kind=kind, onnx=onnx, name=name, limit=limit, force=force, device=device
    )
    return 0
