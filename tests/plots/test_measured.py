"""What is measured for pictures: against plain loops, kept, and drawn with names on everything."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttht.attacks.threat import Threat
from fasttht.errors import UsageError
from fasttht.eval_rows import choose_rows
from fasttht.evaluate import evaluate_run
from fasttht.knn_search import vote
from fasttht.plots import images as drawing
from fasttht.plots import place, samples, sweep
from fasttht.plots.landscape import surface
from fasttht.plots.style import png, styled
from fasttht.subject import Subject, images


@pytest.fixture(scope="module")
def subject(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A copy: evaluations leave their rows in the run's folder, and the other tests count what is there."""
    copy = shutil.copytree(trained, tmp_path_factory.mktemp("measured") / trained.name)
    return place.open_subject(copy, "cpu")


def threat_of(subject: Subject, steps: int = 2) -> Threat:
    assert subject.config.attack.eps is not None
    return sweep.threat_of(subject, steps=steps, eps=subject.config.attack.eps, targeted=False)


def pixels(subject: Subject, row: int) -> Tensor:
    """The stored digit, read without the loader."""
    stored = subject.splits.val.sample(row)
    return torch.from_numpy(stored.data.copy()).view(1, 8, 8, 3).permute(0, 3, 1, 2).float() / 255


def test_points_are_those_of_the_evaluation_and_are_measured_once(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / sweep.FILE, []
    attacks = [threat_of(subject, 2), threat_of(subject, 1)]
    first = sweep.measure(subject, attacks, file, on_point=lambda p, fresh: seen.append((p["steps"], fresh)))
    row = evaluate_run(subject.path, changes={"eval_steps": (1, 2)}, goal="untargeted")
    assert [sweep.top1(p) for p in first] == pytest.approx([row["pgd2_top1"], row["pgd1_top1"]], abs=1e-4)
    assert sweep.top1(first[0], "clean_correct") == pytest.approx(row["clean_top1"], abs=1e-4)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(sweep, "evaluate", refuse)
    assert (
        sweep.measure(subject, attacks[::-1], file, on_point=lambda p, fresh: seen.append((p["steps"], fresh)))
        == (first[::-1])
    )
    assert seen == [(2, True), (1, True), (1, False), (2, False)]
    for other in ({"limit": 10}, {"attacks": [threat_of(subject, 3)]}):
        with pytest.raises(AssertionError, match="measured again"):
            sweep.measure(subject, other.get("attacks", attacks), file, limit=other.get("limit"))


def test_a_limited_sweep_counts_the_same_images_as_the_whole_one(subject: Subject, tmp_path: Path) -> None:
    """Draws are keyed by the dataset's row, so that each image meets the attack that it meets among all."""
    evaluate_run(subject.path, changes={"eval_steps": (2,)}, goal="untargeted", per_image=tmp_path / "hits.npz")
    rows = choose_rows(subject.splits.val, limit=100, images_file=None, seed=subject.config.run.seed).numpy()
    (point,) = sweep.measure(subject, [threat_of(subject)], tmp_path / sweep.FILE, limit=100)
    with np.load(tmp_path / "hits.npz") as hits:
        assert point["images"] == 100
        assert point["clean_correct"] == int(hits["clean"][rows].sum())
        assert abs(point["correct"] - int(hits["pgd2"][rows].sum())) <= 1


def test_a_surface_is_the_loss_at_every_offset(subject: Subject) -> None:
    eps, row = 0.15, 7
    found = surface(subject, row, eps=eps, points=5)
    x, y = pixels(subject, row), torch.tensor([int(subject.splits.val.labels[row])])
    model = subject.model.eval()
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.logits(leaf), y), leaf)
    with torch.no_grad():
        middle, alone = (
            float(F.cross_entropy(model.logits(at), y)) for at in (x, (x - eps * gradient.sign()).clamp(0, 1))
        )
    assert found.offsets == pytest.approx([-eps, -eps / 2, 0, eps / 2, eps])
    assert found.adversarial[2, 2] == pytest.approx(middle, rel=1e-4)
    assert found.random[2, 2] == pytest.approx(middle, rel=1e-4)
    assert found.adversarial[2, 0] == pytest.approx(alone, rel=1e-4)  # b = 0, a = -eps: downhill alone
    assert found.adversarial[2, 4] > found.adversarial[2, 0]
    np.testing.assert_allclose(found.adversarial[:, 2], found.random[:, 2], rtol=1e-4)  # a = 0: the same direction
    again = surface(subject, row, eps=eps, points=5)
    np.testing.assert_array_equal(again.random, found.random)
    with pytest.raises(UsageError, match=r"--image: expected rows of the held-out images, 0 to 359, got 360"):
        surface(subject, 360, eps=eps, points=5)


def test_a_surface_is_drawn_with_named_axes_and_a_row_for_each_run(subject: Subject) -> None:
    found = [surface(subject, row, eps=0.1, points=4) for row in (1, 2)]
    with styled():
        fig, words = drawing.surfaces(["a", "b"], found, str)
        content = png(fig, words)
    panels = [ax for ax in fig.axes if ax.get_xlabel()]
    assert [ax.get_xlabel() for ax in panels] == ["adversarial direction (1/255)", "random direction 2 (1/255)"] * 2
    assert {ax.get_ylabel() for ax in panels} == {"random direction 1 (1/255)"}
    assert "cross entropy" in {ax.get_ylabel() for ax in fig.axes}
    with styled():
        assert content == png(*drawing.surfaces(["a", "b"], found, str))


def test_a_flat_surface_can_be_drawn(subject: Subject) -> None:
    found = surface(subject, 0, eps=0.1, points=3)
    flat = type(found)(0, 0, 0, found.offsets, np.zeros((3, 3)), np.zeros((3, 3)))
    with styled():
        assert len(png(*drawing.surfaces(["a"], [flat], str))) > 1000


def test_examples_show_what_the_network_says_of_both_images(subject: Subject) -> None:
    found, factor = samples.examples(subject, threat_of(subject), [3, 200, 3])
    assert factor == pytest.approx(0.5 / 0.15)
    for one, row in zip(found, (3, 200, 3), strict=True):
        with torch.no_grad():
            share, predicted = subject.model.eval().logits(pixels(subject, row)).softmax(dim=1).max(dim=1)
        assert (one.row, one.label) == (row, subject.splits.val.labels[row])
        assert one.predicted[0] == int(predicted)
        assert one.confidence[0] == pytest.approx(float(share), rel=1e-4)
        moved = one.attacked.astype(float) - one.clean.astype(float)
        assert 0 < abs(moved).max() <= 0.15 * 255 + 1
        np.testing.assert_allclose(one.noise, 127.5 + factor * moved, atol=factor + 1)
    with styled():
        fig, words = drawing.examples(found, factor, "title", str)
        assert len(fig.axes) == 9
        assert f"x {factor:.3g}" in fig.axes[6].get_ylabel()
        assert all(ax.get_xlabel()[0] in "✓✗" for ax in fig.axes[:6])
        assert png(fig, words) == png(*drawing.examples(found, factor, "title", str))
    with pytest.raises(UsageError, match=r"--images: expected rows .* got -1"):
        samples.examples(subject, threat_of(subject), [2, -1])


def test_without_a_perturbation_nothing_is_amplified(subject: Subject) -> None:
    assert samples.noise_factor(Threat(eps=0.0, alpha=0.0, steps=1), 0.0) == 1.0
    assert samples.noise_factor(Threat(eps=3.0, alpha=0.1, steps=1, norm="l2"), 0.25) == 2.0


def test_picked_examples_are_flipped_and_held_in_equal_parts(subject: Subject) -> None:
    attack = threat_of(subject)
    rows = samples.pick(subject, attack, 6)
    found, _ = samples.examples(subject, attack, rows)
    flipped = [one.predicted[0] == one.label != one.predicted[1] for one in found]
    assert len(set(rows)) == 6
    assert flipped == [True] * 3 + [False] * 3
    noise = sweep.threat_of(subject, steps=0, eps=0.0, targeted=False)
    assert len(set(samples.pick(subject, noise, 6))) == 6  # nothing is flipped: six that are not


def nearest_pixels(subject: Subject, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Stand-in for the search: cosines of pixels."""
    bank = torch.cat([batch.x.float().flatten(1) for batch in images(subject, "train")])
    similarities = F.normalize(x.flatten(1), dim=1) @ F.normalize(bank, dim=1).t()
    found = similarities.topk(k, dim=1)
    return found.indices, found.values


def test_a_gallery_shows_the_training_images_that_the_search_found(subject: Subject) -> None:
    found, tried = samples.retrieve(
        subject, threat_of(subject), nearest_pixels, shown=4, successes=2, failures=1, limit=200
    )
    assert [one.success for one in found] == [True, True, False]
    assert 0 < tried <= 200
    for one in found:
        assert list(one.similarities) == sorted(one.similarities, reverse=True)
        for row, label, picture in zip(one.rows, one.labels, one.pictures, strict=True):
            assert label == subject.splits.train.labels[row]
            stored = subject.splits.train.sample(row).data.reshape(8, 8, 3)
            np.testing.assert_array_equal(picture, stored)
    with styled():
        fig, words = drawing.gallery(found, "title", str)
        assert len(fig.axes) == 3 * 6
        assert [fig.axes[6 * i].get_ylabel() for i in range(3)] == ["success", "success", "failure"]
        assert f"{found[0].similarities[0]:.2f}" in fig.axes[2].get_xlabel()
        content = png(fig, words)
        assert content == png(*drawing.gallery(found, "title", str))
    assert len(io.BytesIO(content).getvalue()) < 150_000


def test_the_gallery_votes_as_the_defence_does_where_all_neighbours_point_away(subject: Subject) -> None:
    """Eq. 8 as it is: a class without a neighbour (0) comes before those whose neighbours count negative."""
    labels = torch.from_numpy(subject.splits.train.labels.copy())
    ones = (labels == 0).nonzero()[: samples.VOTERS, 0]

    def away(subject: Subject, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return ones.expand(len(x), k), torch.full((len(x), k), -0.25)

    found, _ = samples.retrieve(subject, threat_of(subject), away, shown=1, successes=1, failures=1, limit=60)
    expected = vote(torch.ones(1, 1), torch.full((1, 1), -0.25), torch.zeros(1, dtype=torch.int64), k=1, num_classes=10)
    assert {one.predicted for one in found} == {int(expected)} == {1}


def test_pictures_are_computed_in_full_precision(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is off in every pass, as in an evaluation, and as it was afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        subject.model, "logits",
        lambda x, own=subject.model.logits: (
            seen.append((matmul.allow_tf32, cudnn.allow_tf32)), own(x),
        )[1],
    )  # fmt: skip
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        surface(subject, 1, eps=0.1, points=3)
        passes = len(seen)
        samples.examples(subject, threat_of(subject), [1])
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    assert len(seen) > passes > 0
    assert set(seen) == {(False, False)}


def test_classes_have_their_names_where_the_data_have_them(subject: Subject) -> None:
    names = subject.splits.train.class_names
    assert samples.class_name(subject, 3) == (names[3] if names else "3")
    assert samples.class_name(subject, 1000) == "1000"
