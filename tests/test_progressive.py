"""Growing images: one side per pass, the same after a resume, and engines that take every side."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttht import checkpoint
from fasttht.attacks.engine import FoldedEngine
from fasttht.attacks.pgd import Draw
from fasttht.attacks.threat import Threat
from fasttht.build import build_loader
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import UsageError
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.datasets import digits
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.plan import Augment, EpochPlan
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import resolve
from fasttht.schedule import ProgressiveSize
from fasttht.step_engine import Captured, CompiledLoss
from fasttht.train import Trainer


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@settings(deadline=None, max_examples=200)
@given(full=st.integers(2, 400), first=st.integers(1, 399), begin=st.integers(0, 20), length=st.integers(0, 20))
def test_the_side_never_shrinks_and_is_in_between_a_multiple(full: int, first: int, begin: int, length: int) -> None:
    first = min(first, full - 1)
    size = ProgressiveSize(first, full, begin, begin + length)
    sides = [size(epoch) for epoch in range(begin + length + 3)]
    assert sides == sorted(sides)
    assert all(side == first for side in sides[:begin])
    assert all(side == full for side in sides[begin + length :])
    step = 32 if full >= 128 else 4
    for epoch, side in enumerate(sides):
        assert side in (first, full) or side % step == 0
        if begin <= epoch < begin + length:
            exact = first + (full - first) * (epoch - begin) / length
            assert abs(side - exact) <= step / 2


def test_imagenet_grows_in_steps_of_32() -> None:
    size = ProgressiveSize(128, 224, 2, 10)
    assert [size(epoch) for epoch in range(12)] == [128, 128, 128, 128, 160, 160, 192, 192, 192, 224, 224, 224]


@pytest.mark.parametrize("decoder", ["turbo", "synthetic"])
def test_the_loader_gives_one_side_per_epoch_and_resumes_in_the_middle(decoder: str) -> None:
    samples = digits("val")
    plan = EpochPlan(num_samples=len(samples), batch_size=100, seed=1, augment=Augment(), drop_last=True)
    sides = (4, 4, 8, 12)

    def make() -> Loader:
        return Loader(samples, plan, img_size=12, size_of=sides.__getitem__, decoder=decoder, workers=2)

    with closing(make()) as whole:
        passes = [[batch.x.clone() for batch in whole] for _ in sides]
    assert [[tuple(x.shape) for x in batches] for batches in passes] == [[(100, 3, s, s)] * 3 for s in sides]
    if decoder == "turbo":  # each pass is what a loader of that side gives
        for epoch, side in enumerate(sides):
            with closing(Loader(samples, plan, img_size=side)) as plain:
                plain.load_state_dict({**plain.state_dict(), "epoch": epoch})
                for own, theirs in zip(passes[epoch], plain, strict=True):
                    assert torch.equal(own, theirs.x)
    with closing(make()) as first:
        while first.epoch < 2:
            list(first)
        next(iter(first))
        state = first.state_dict()
    with closing(make()) as second:
        second.load_state_dict(state)
        rest = [batch.x for batch in second]
    assert len(rest) == 2
    for own, theirs in zip(rest, passes[2][1:], strict=True):
        assert torch.equal(own, theirs)


TINY: dict[str, Any] = {
    "width": 4, "batch_size": 400, "epochs": 4, "log_interval": 3, "eval_steps": [1], "bank_size": 700, "steps": 1,
    "img_size": 12, "progressive_size": 4, "progressive_epochs": [0, 2], "jitter": 0.2,
}  # fmt: skip


def config_of(output: Path, **options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), **TINY, **options, "output": str(output)}, where="test"))


def test_a_run_grows_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Trainer(config_of(tmp_path / "whole"))
    assert "images of 4 pixels, growing to 12 in passes 0 to 2" in whole.describe()
    row = whole.fit()
    assert row is not None
    rows = [entry["img_size"] for entry in whole.folder.rows() if entry["kind"] == "train"]
    assert rows == [4, 8, 12, 12]
    assert Trainer(config_of(tmp_path / "run")).fit(stop_at=4) is None  # within the second pass
    assert Trainer(config_of(tmp_path / "run")).fit() == row
    own, theirs = (checkpoint.listing(tmp_path / name)[-1] for name in ("run", "whole"))
    for path in theirs.glob("*.safetensors"):
        assert (own / path.name).read_bytes() == path.read_bytes()


def test_evaluation_always_sees_the_final_side(tmp_path: Path) -> None:
    loader = build_loader(config_of(tmp_path), open_splits(None), torch.device("cpu"), train=False)
    with closing(loader):
        assert next(iter(loader)).x.shape[-1] == 12


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replay": 2, "steps": None}, "--progressive-size: expected no --replay beside it, got --replay 2; .* one shape"),
    ({"progressive_size": 12}, "--progressive-size: expected a size below --img-size 12, got 12"),
    ({"progressive_size": -1}, "--progressive-size: expected a size below"),
    (
        {"progressive_epochs": None},
        "--progressive-epochs: expected two epochs beside --progressive-size 4, got nothing",
    ),
    ({"progressive_epochs": (3, 1)}, "--progressive-epochs: expected 0 <= begin <= end < --epochs 4, got 3 1"),
    ({"progressive_epochs": (0, 4)}, "end < --epochs 4, got 0 4; the last passes must see --img-size"),
    ({"progressive_size": 0}, "--progressive-epochs: expected --progressive-size beside it, got 0 2 alone"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    changed = {**TINY, **options}
    flat = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(UsageError, match=said):
        resolve(from_flat({**read_preset("quickstart"), **flat, "output": str(tmp_path)}, where="test"))


@pytest.mark.changes_rng
def test_the_compiled_attack_takes_more_sides_than_torch_keeps_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone: the limit is its own, and so is the error behind it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    model = TwoHead("resnet18", 5, stem="small", width=4, feat_dim=None)
    y, index = torch.tensor([0, 1]), torch.arange(2)
    threat = Threat(eps=0.1, alpha=0.05, steps=1, targeted=False)
    engines = [FoldedEngine(name, model, dtype=torch.float32) for name in ("compiled", "folded")]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            for side in (4, 6, 8, 10, 4, 10):
                x = torch.rand(2, 3, side, side, generator=generator)
                found = [engine.attack(x, y, index, threat, Draw(0), num_classes=5).x_adv for engine in engines]
                torch.testing.assert_close(*found)
    finally:
        torch.compiler.reset()


class Recorder:
    def __init__(self) -> None:
        self.recorded = 0

    def warm(self, work: Any) -> None:
        work()

    def record(self, work: Any) -> Any:
        self.recorded += 1
        return work


def test_the_captured_step_is_recorded_at_the_final_side_and_plain_at_others() -> None:
    seen: list[tuple[int, int]] = []
    recorder = Recorder()
    captured = Captured(recorder, 2, pytest.fail, lambda: None, side=8)
    for side in (4, 4, 6, 8, 8, 8, 4):
        inputs = {"x": torch.full((2, 3, side, side), float(side)), "y": torch.zeros(2)}
        captured(lambda got: seen.append((got["x"].shape[-1], int(got["x"].mean()))), inputs)
    assert seen == [(side, side) for side in (4, 4, 6, 8, 8, 8, 4)]
    assert recorder.recorded == 1


def test_the_compiled_step_is_plain_at_other_sides() -> None:
    from fasttht.objectives import Terms, Views

    def plain(views: Views) -> Terms:
        return Terms(views.x.sum(), {}, views.x[:, 0, :, 0])

    loss = CompiledLoss(plain, 2, pytest.fail, backend="eager", side=8)
    compiled: list[int] = []
    kept = loss._compiled
    loss._compiled = lambda x, *rest: compiled.append(x.shape[-1]) or kept(x, *rest)  # type: ignore[func-returns-value]
    rng = np.random.default_rng(0)
    for side in (4, 8, 6, 8):
        x = torch.from_numpy(rng.random((2, 3, side, side)))
        y = torch.zeros(2, dtype=torch.int64)
        terms = loss(Views(x, x, y, y, None))
        torch.testing.assert_close(terms.loss, x.sum())
    assert compiled == [8, 8]
