"""How a run computes: what it says of its kernels, and when cuDNN may look for the fastest of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fasttht import kernels, train
from fasttht.build import describe_kernels
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import UsageError
from fasttht.precision import fastest_kernels, full_precision
from fasttht.regions import watched
from fasttht.resolve import resolve
from fasttht.train import Trainer

TINY: dict[str, Any] = {
    "objective": "at", "width": 4, "batch_size": 700, "epochs": 2, "steps": 1, "eval_steps": [1], "eval_interval": 1,
}  # fmt: skip
CUDA = torch.device("cuda", 0)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Trainer(resolve(from_flat({**read_preset("quickstart"), **TINY, "output": str(tmp_path / "run")}, where="")))


def test_training_says_which_kernels_run(trainer: Trainer) -> None:
    assert "\nkernels torch: tensors on the CPU get plain torch\n" in trainer.describe()


def test_on_a_gpu_the_reason_is_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.Implementation("cuda", "NVRTC 12.9 compiles the kernels for sm_70.")
    monkeypatch.setattr(kernels, "implementation", lambda device: found)
    assert describe_kernels(CUDA) == "kernels cuda: NVRTC 12.9 compiles the kernels for sm_70"


@pytest.mark.parametrize("value", ["cuda", "triton"])
def test_kernels_that_cannot_be_are_a_users_mistake(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTTHT_KERNELS", value)
    with pytest.raises(UsageError, match=f"FASTTHT_KERNELS: expected .*, got {value}"):
        describe_kernels(CUDA)


def test_cudnn_searches_while_training_and_never_while_evaluating(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's shapes come again and again; figures must not depend on what was the fastest today."""
    seen: list[tuple[str, bool]] = []
    step, evaluate = train.standard_step, train.evaluate

    def watch_step(*args: Any, **options: Any) -> Any:
        seen.append(("step", torch.backends.cudnn.benchmark))
        return step(*args, **options)

    def watch_evaluation(model: Any, *args: Any, **options: Any) -> Any:
        found = seen.append
        hook = model.trunk.register_forward_hook(lambda *_: found(("evaluation", torch.backends.cudnn.benchmark)))
        try:
            return evaluate(model, *args, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(train, "standard_step", watch_step)
    monkeypatch.setattr(train, "evaluate", watch_evaluation)
    trainer.fit()
    assert set(seen) == {("step", True), ("evaluation", False)}
    assert not torch.backends.cudnn.benchmark


def test_both_ways_of_computing_end_where_they_began() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    with fastest_kernels():
        assert cudnn.benchmark
        with full_precision():
            assert not cudnn.benchmark
            assert not cudnn.allow_tf32
        assert cudnn.benchmark
    assert before == (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)


def test_training_waits_for_its_images_in_a_region(trainer: Trainer) -> None:
    class Diary:
        names: ClassVar[list[str]] = []

        def enter(self, name: str) -> None:
            self.names.append(name)

        def leave(self) -> None:
            pass

    with watched(Diary()):
        trainer.fit(stop_at=1)
    assert Diary.names[0] == "data_wait"
    assert {"attack", "train_step", "optimizer"} < set(Diary.names)
