"""F8: a run folder continued as another run, or with another run's parts: refused, with both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fasttht import checkpoint
from tests.faults import runs
from tests.faults.case import Context, Kind

# Flags that decide what a run computes, with another value than the run's, and the name that must be said.
FLAGS = [
    ("--arch resnet34", "arch resnet18 (now resnet34)"),
    ("--width 8", "width 4 (now 8)"),
    ("--seed 1", "seed 0 (now 1)"),
    ("--bank-size 301", "bank_size 300 (now 301)"),
    ("--feat-dim 64", "feat_dim 128 (now 64)"),
    ("--batch-size 35", "batch_size 70 (now 35)"),
    ("--lr 0.2", "lr 0.1 (now 0.2)"),
    ("--eps 0.1", "eps"),
    ("--alpha 0.01", "alpha"),
    ("--tau 0.1", "tau 0.2 (now 0.1)"),
    ("--objective at", "objective that (now at)"),
    ("--amp-dtype bf16", "amp_dtype auto (now bf16)"),
    ("--img-size 12", "img_size 8 (now 12)"),
    ("--classifier cosine --scale-init 8", "scale_init 16.0 (now 8.0)"),
    ("--momentum 0.8", "momentum 0.9 (now 0.8)"),
    ("--weight-decay 0", "weight_decay"),
    ("--epochs 4", "epochs 3 (now 4)"),
    ("--no-model-ema", "model_ema True (now False)"),
    ("--grad-accum-steps 2", "grad_accum_steps 1 (now 2)"),
    ("--no-nesterov", "nesterov True (now False)"),
    ("--negatives both", "negatives bank (now both)"),
    ("--lambda-cl 2", "lambda_cl 1.0 (now 2.0)"),
    ("--smoothing 0.1", "smoothing 0.0 (now 0.1)"),
    ("--hflip 0.5", "hflip 0.0 (now 0.5)"),
    ("--encoder-momentum 0.5", "encoder_momentum 0.99 (now 0.5)"),
    ("--step-engine fused", "step_engine"),
    ("--steps 3", "steps 2 (now 3)"),
    ("--eval-steps 3", "eval_steps"),
    ("--decay-rate 0.5", "decay_rate 0.1 (now 0.5)"),
    ("--stem imagenet", "stem small (now imagenet)"),
]


def edited(folder: Path, change: Callable[[Path], None]) -> None:
    """Change a checkpoint and write its manifest anew: as another program would, not as damage does."""
    change(folder)
    sums = {path.name: checkpoint._sha256(path) for path in sorted(folder.iterdir()) if path.name != "MANIFEST.json"}
    (folder / "MANIFEST.json").write_text(json.dumps(sums))


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None], file: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        tensors = load_file(folder / file)
        key = next(key for key in sorted(tensors) if key.startswith(name))
        found = change(tensors.pop(key))
        save_file(tensors if found is None else tensors | {key: found.contiguous()}, folder / file)

    return work


def _meta(**changes: object) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        meta = json.loads((folder / "state.json").read_text())
        for key, value in changes.items():
            meta[key] = meta[key] | value if isinstance(value, dict) else value
        (folder / "state.json").write_text(json.dumps(meta))

    return work


# What is changed in every checkpoint, of a free run where it says so, the exit code and the words that must be said.
EDITS: list[tuple[str, Callable[[Path], None], int]] = [
    ("another version", _meta(version=99), 4),
    ("another loader version", _meta(loader={"version": 99}), 3),
    ("other data", _meta(loader={"fingerprint": "0" * 16}), 3),
    ("another seed of the order", _meta(loader={"seed": 7}), 3),
    ("another batch size of the order", _meta(loader={"batch_size": 64}), 3),
    ("a bank of another size", _tensor("bank.features", lambda t: t[:100], "training.safetensors"), 4),
    ("free: a delta of another batch", _tensor("delta", lambda t: t[:10], "training.safetensors"), 4),
    ("a weight missing", _tensor("trunk.conv1", lambda t: None, "model.safetensors"), 4),
    ("a weight of another type", _tensor("trunk.conv1", lambda t: t.double(), "model.safetensors"), 4),
    ("momentum missing", _tensor("momentum.", lambda t: None, "training.safetensors"), 4),
    ("another clean encoder", _tensor("trunk.conv1", lambda t: t[:2], "clean_encoder.safetensors"), 4),
]


def mismatch(number: int, at: Context) -> str:
    mode = "free fp32" if number >= len(FLAGS) and EDITS[number - len(FLAGS)][0].startswith("free") else "standard fp32"
    base = runs.baseline(mode, at.shared)
    run = at.folder / "run"
    runs.begin_from(base, 40, run)
    words = runs.command(mode, run)
    if number < len(FLAGS):
        flags, name = FLAGS[number]
        # A flag given twice is refused for that: what the run has is left out.
        kept, new = list(words), flags.split()
        for flag in [word for word in new if word.startswith("--")]:
            if flag in kept:
                place = kept.index(flag)
                del kept[place : place + 2]
        if new[0] == "--no-model-ema":
            kept.remove("--model-ema")
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        line = runs.one_line(runs.call([*kept, *new], at.folder), 4)
        assert name in line, f"{flags}: expected {name}, got: {line}"
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "something was changed"
        return f"{flags}: {line[:140]}"
    what, change, code = EDITS[number - len(FLAGS)]
    for folder in checkpoint.listing(run):
        edited(folder, change)
    line = runs.one_line(runs.call(words, at.folder), code)
    return f"{what}: {line[:140]}"


KIND = Kind(
    "mismatch",
    len(FLAGS) + len(EDITS),
    "exit 4 (3 for the data) in one line with both values",
    "the standard fp32 run of kill, stopped at step 40, and for a delta the free one",
    mismatch,
)
