"""Evaluation: exact counts, draws keyed by image, a model left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttht.attacks.threat import Threat
from fasttht.build import build_loader, build_model
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.evaluate import Score, evaluate, record, step_size, threats
from fasttht.models.mixture_bn import MixtureBatchNorm2d, through
from fasttht.pipelines.splits import Splits, open_splits
from fasttht.resolve import resolve

ATTACKS = [
    Threat(eps=0.15, alpha=0.1, steps=0),
    Threat(eps=0.15, alpha=0.1, steps=3),
    Threat(eps=0.15, alpha=0.1, steps=3, targeted=True),
]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield open_splits(None)


def config_of(**options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), "width": 4, **options}, where="test"))


def run(splits: Splits, batch_size: int, seed: int = 0) -> tuple[dict[str, Score], list[torch.Tensor]]:
    """Evaluate an untrained model; returns the scores and every batch of images that it was shown."""
    config = config_of(eval_batch_size=batch_size)
    model = build_model(config, 10, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    shown = model.logits

    def logits(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return shown(x)

    model.logits = logits  # type: ignore[method-assign]
    loader = build_loader(config, splits, torch.device("cpu"), train=False)
    return evaluate(model, loader, ATTACKS, seed=seed, num_classes=10), seen


def test_every_held_out_image_counts_once_for_any_batch_size(splits: Splits) -> None:
    for batch_size in (1000, 360, 77):
        scores, _ = run(splits, batch_size)
        assert list(scores) == ["clean", "pgd0", "pgd3", "pgd3_targeted"]
        assert {score.images for score in scores.values()} == {360}


def test_random_starts_are_bit_identical_for_any_batch_size(splits: Splits) -> None:
    """Iterates after a gradient step may differ by rounding; the draws may not."""
    whole, split = run(splits, 360)[1], run(splits, 77)[1]
    passes_per_batch = len(whole)
    parts = [split[i::passes_per_batch] for i in range(passes_per_batch)]
    start = 1  # pass 0 is the clean images, pass 1 the start of the attack without steps
    assert torch.equal(torch.cat(parts[start]), whole[start])
    assert not torch.equal(whole[start], whole[0])
    other_seed = run(splits, 360, seed=1)[1]
    assert torch.equal(other_seed[0], whole[0])
    assert not torch.equal(other_seed[start], whole[start])


def test_scores_agree_over_batch_sizes_within_one_image(splits: Splits) -> None:
    whole, split = run(splits, 360)[0], run(splits, 77)[0]
    for name, score in whole.items():
        assert abs(score.correct - split[name].correct) <= 1, name


def test_counts_are_those_of_a_plain_loop(splits: Splits) -> None:
    config = config_of()
    model = build_model(config, 10, torch.device("cpu")).train()
    loader = build_loader(config, splits, torch.device("cpu"), train=False)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    done: list[int] = []
    scores = evaluate(model, loader, [], seed=0, num_classes=10, on_batch=done.append)
    assert model.training
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert done == [360]
    model.eval()
    val = splits.val
    pixels = torch.stack([torch.from_numpy(val.sample(i).data.copy()).view(8, 8, 3) for i in range(len(val))])
    with torch.no_grad():
        predicted = model.logits(pixels.permute(0, 3, 1, 2).float() / 255).argmax(dim=1)
    assert scores["clean"].correct == int((predicted == torch.from_numpy(val.labels.copy())).sum())


def test_a_network_with_mixture_bn_is_attacked_and_scored_through_its_adversarial_branch(splits: Splits) -> None:
    """The clean images' accuracy through the clean branch stands beside it, under its own name."""
    config = config_of(objective="mbn")
    model = build_model(config, 10, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # without a gamma, neither branch sees its images: one says 5, the other something else
        for layer in model.modules():
            if isinstance(layer, MixtureBatchNorm2d):
                layer.clean.weight.zero_()
                layer.adversarial.weight.zero_()
                layer.clean.bias.fill_(1.0)
                layer.adversarial.bias.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():
        x = torch.zeros(1, 3, 8, 8)
        logits = model.eval().logits(x)[0]
        model.classifier.bias += 1e-4 * torch.nn.functional.one_hot(torch.tensor(5), 10) - logits
        with through(model, "clean"):
            seen = int(model.logits(x).argmax())
    loader = build_loader(config, splits, torch.device("cpu"), train=False)
    scores = evaluate(model, loader, ATTACKS[:2], seed=0, num_classes=10)
    assert list(scores) == ["clean", "pgd0", "pgd3", "clean_branch_clean"]
    labels = torch.from_numpy(splits.val.labels.copy())
    assert scores["clean"].correct == scores["pgd3"].correct == int((labels == 5).sum())
    assert scores["clean_branch_clean"].correct == int((labels == seen).sum())
    assert seen != 5


def test_rows_are_percent_with_the_number_of_images() -> None:
    scores = {"clean": Score(torch.tensor([1, 0, 1, 1]) > 0), "pgd10": Score(torch.tensor([0, 0, 1]) > 0)}
    assert record(scores) == {"clean_top1": 75.0, "pgd10_top1": 33.3333, "images": 4}


def test_restarts_keep_what_every_start_left_right(splits: Splits) -> None:
    """The worst of R is the conjunction of R evaluations, each from its own starts; the first is the plain one."""
    config = config_of(eval_batch_size=77)
    model = build_model(config, 10, torch.device("cpu"))
    loader = build_loader(config, splits, torch.device("cpu"), train=False)
    threat = Threat(eps=0.15, alpha=0.1, steps=1)

    def scored(restarts: int) -> dict[str, Score]:
        return evaluate(model, loader, [threat], seed=3, num_classes=10, restarts=restarts)

    one, three, five = scored(1), scored(3), scored(5)
    assert list(three) == ["clean", "pgd1", "pgd1_r3"]
    assert torch.equal(one["pgd1"].hits, three["pgd1"].hits)
    worst_of_three, worst_of_five = three["pgd1_r3"].hits, five["pgd1_r5"].hits
    assert not (worst_of_three & ~one["pgd1"].hits).any()
    assert not (worst_of_five & ~worst_of_three).any()
    assert five["pgd1_r5"].correct < one["pgd1"].correct
    assert one["clean"].images == 360


@pytest.mark.parametrize(
    ("rule", "steps", "alpha"), [("ratio", 10, 0.25 * 0.15), ("paper", 10, 0.015), ("paper", 1000, 1 / 255)]
)
def test_step_size_follows_the_rule(rule: str, steps: int, alpha: float) -> None:
    assert step_size(0.15, steps, rule) == pytest.approx(alpha)


def test_a_targeted_run_is_scored_both_ways_and_an_untargeted_one_never_as_targeted() -> None:
    names = [threat.name for threat in threats(config_of(targeted=True, eval_steps=[10, 50]))]
    assert names == ["pgd10", "pgd50", "pgd10_targeted", "pgd50_targeted"]
    assert [threat.name for threat in threats(config_of(eval_steps=[10]))] == ["pgd10"]
    assert all(threat.clean_prob == 0 for threat in threats(config_of(start_clean_prob=0.5)))


def test_evaluating_a_run_adds_its_row_to_the_folder_and_nothing_else(tmp_path: Path, splits: Splits) -> None:
    from fasttht.evaluate import evaluate_run
    from fasttht.train import Trainer

    options = {
        "epochs": 1,
        "batch_size": 700,
        "steps": 1,
        "objective": "at",
        "eval_steps": [3],
        "output": tmp_path / "r",
    }
    row = Trainer(config_of(**options)).fit()
    assert row is not None
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    again = evaluate_run(
        tmp_path / "r", changes={}, goal="run", output=tmp_path / "row.json", per_image=tmp_path / "hits.npz"
    )
    with np.load(tmp_path / "hits.npz") as hits:
        assert sorted(hits) == ["clean", "pgd3"]
        assert {name: 100 * hits[name].mean() for name in hits} == pytest.approx(
            {"clean": row["clean_top1"], "pgd3": row["pgd3_top1"]}, abs=1e-4
        )
    assert again["clean_top1"] == row["clean_top1"]
    assert again["pgd3_top1"] == row["pgd3_top1"]
    after = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    kept = after.pop(tmp_path / "r" / "eval" / "evaluations.jsonl")
    assert after == before
    assert kept == (tmp_path / "row.json").read_bytes()
    assert kept.count(b"\n") == 1
