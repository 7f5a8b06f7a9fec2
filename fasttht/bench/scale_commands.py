"""`bench scale`: words to a call of the scaling model. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts import App

from fasttht.bench.finish import check_output, finish


def register(app: App) -> None:
    """Add the command to `bench`."""
    app.command(scale, name="scale")


def scale(
    *, machine: Literal["v100", "a100", "h100"] = "v100", write: Path | None = None, output: Path | None = None
) -> int:
    """Model how training scales over 8 to 256 GPUs: speed, memory, network and loader. Measures nothing.

    Parameters
    ----------
    machine
        Nodes of eight such GPUs.
    write
        Also write the whole model with its assumptions as Markdown to this file.
    output
        Also append the JSON line to this file.
    """
    check_output(output)
    check_output(write, "--write")
    import torch

    from fasttht import log
    from fasttht.bench.env import environment
    from fasttht.bench.scaling_doc import document, scaling_rows

    rows = scaling_rows(machine)
    log.table(
        f"modelled, not measured: THAT on nodes of eight {machine.upper()}",
        ("network", "training", "GPUs", "img/s", "efficiency %", "loader img/s a node"),
        (
            (
                row["arch"],
                row["kind"],
                row["gpus"],
                f"{row['img_per_s']:,.0f}",
                f"{row['efficiency_pct']:.0f}",
                f"{row['loader_img_per_s']:,.0f}",
            )
            for row in rows
        ),
    )
    if write is not None:
        write.write_text(document(rows, machine))
        log.say(f"written: {write}")
    finish({"bench": "scale", "env": environment(torch.device("cpu")), "rows": rows}, output)
    return 0
