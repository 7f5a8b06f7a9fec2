"""F9: numbers that are not finite, put into gradients, activations, features, the bank and the perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fasttht import checkpoint
from fasttht.state import TrainState
from fasttht.train import Trainer
from tests.faults import runs
from tests.faults.case import Context, Kind

BAD = (float("nan"), float("inf"), -float("inf"), 3e38)


def _gradient(state: TrainState, value: float) -> None:
    parameter = list(state.model.parameters())[5]
    handle: Any = parameter.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, value))[1])


def _activation(state: TrainState, value: float) -> None:
    # The objective's own forward, not the attack's: that one has gradients of parameters.
    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        handle.remove()
        return output.masked_fill(torch.ones_like(output, dtype=torch.bool), value)

    handle = state.model.trunk.bn1.register_forward_hook(hook)


def _features(state: TrainState, value: float) -> None:
    original = state.clean_features

    def bad(x: torch.Tensor) -> torch.Tensor | None:
        state.clean_features = original  # type: ignore[method-assign]
        found = original(x)
        return None if found is None else found * value

    state.clean_features = bad  # type: ignore[method-assign]


def _bank(state: TrainState, value: float) -> None:
    assert state.bank is not None
    state.bank.state()["features"][3] = value


def _delta(state: TrainState, value: float) -> None:
    assert state.delta is not None
    state.delta.value[2] = value


PLACES: dict[str, Callable[[TrainState, float], None]] = {
    "gradient": _gradient, "activation": _activation, "clean features": _features, "bank": _bank, "delta": _delta,
}  # fmt: skip


def check_finite(run: Path, what: str, but: str) -> None:
    """Check that every checkpoint's numbers are finite, all but what was poisoned itself and the row's sums."""
    for folder in checkpoint.listing(run):
        checkpoint.verify(folder)
        for path in sorted(folder.glob("*.safetensors")):
            for key, tensor in load_file(path).items():
                if key == "meter" or (but and key.startswith(but)) or not tensor.is_floating_point():
                    continue
                assert tensor.isfinite().all(), f"{what}: {folder.name} {path.name} {key}"


def nan(number: int, at: Context) -> str:
    """Poison one step (the first 36), or every step under a float16 scaler, or a run by its learning rate."""
    if number >= 36:
        return _storm(number, at)
    turn = number // len(PLACES)
    mode = list(runs.MODES)[turn % len(runs.MODES)]
    base = runs.baseline(mode, at.shared)
    run = at.folder / "run"
    name = list(PLACES)[number % len(PLACES)]
    if name == "delta" and not mode.startswith("free"):
        name = "gradient"
    value, poisoned = BAD[(turn + turn // len(BAD)) % len(BAD)], 41 + number % 9
    if value == 3e38 and name != "gradient":
        value = BAD[0]
    runs.begin_from(base, 40, run)

    def prepare() -> None:
        step = Trainer._step

        def bad(self: Trainer, item: Any) -> None:
            if self.state.step + 1 == poisoned:
                PLACES[name](self.state, value)
            step(self, item)

        Trainer._step = bad  # type: ignore[method-assign]

    what = f"{mode}: {value:g} in {name} at step {poisoned}"
    code, out, err = runs.call(runs.command(mode, run), at.folder, prepare)
    if code == 0 and ((name, value) == ("activation", -math.inf) or (name == "delta" and math.isinf(value))):
        check_finite(run, what, "")  # a ReLU makes 0 of the one, the other is clipped as any perturbation
        return f"{what}: finite from there on, and harmless"
    check_finite(run, what, name if name in ("bank", "delta") else "")
    line = runs.one_line((code, out, err), 5)
    assert "step " in line, line
    return f"{what}: {line[:120]}; {_continued(mode, poisoned, base, at)}"


def _continued(mode: str, poisoned: int, base: runs.Baseline, at: Context) -> str:
    """Go on without the fault: from the newest checkpoint, or, where that one knows of it, from that before it."""
    run = at.folder / "run"
    words = runs.command(mode, run)
    before = [path for path in checkpoint.listing(run) if checkpoint.step_of(path) < poisoned]
    assert before, "no checkpoint from before it is left"
    knows = before[-1] != checkpoint.listing(run)[-1]
    code = runs.train(words, run, until=50)
    assert code == 0 or (knows and code == 5), f"resumed: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    if code == 5:
        code = runs.train([*words, "--resume", str(before[-1])], run, until=50)
        assert code == 0, f"{before[-1].name} resumed: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    runs.same(run, base.snapshot(50))
    return f"{before[-1].name} resumed, the same bytes"


def _storm(number: int, at: Context) -> str:
    run, mode = at.folder / "run", ("standard fp32", "free fp32")[number // 2 % 2]
    words = runs.command(mode, run)
    if number % 2:
        line = runs.one_line(runs.call([*words, "--lr", "1e30"], at.folder), 5)
        check_finite(run, "--lr 1e30", "")
        return f"{mode}, --lr 1e30: {line[:120]}"

    def prepare() -> None:
        step = Trainer._step

        def bad(self: Trainer, item: Any) -> None:
            list(self.state.model.parameters())[5].register_hook(lambda grad: torch.full_like(grad, float("inf")))
            step(self, item)

        Trainer._step = bad  # type: ignore[method-assign]

    line = runs.one_line(runs.call([*words, "--amp-dtype", "fp16"], at.folder, prepare), 5)
    assert "in a row" in line, line
    check_finite(run, "float16", "")
    return f"{mode}, float16, every gradient infinite: {line[:120]}"


KIND = Kind(
    "nan",
    40,
    "no update from what is not finite: all numbers of every checkpoint are, but for the poisoned ones themselves; "
    "exit 5 in one line with the step; a checkpoint from before it is left and gives the same bytes",
    "the runs of kill from step 40, one step of 41 to 49 poisoned; two whole runs with every gradient infinite in fp16 "
    "and two with a learning rate of 1e30",
    nan,
)
