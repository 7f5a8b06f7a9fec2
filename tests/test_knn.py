"""The nearest-neighbour defence end to end: its bank, its figures, its attacks, what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fasttht import knn_bank, log
from fasttht.attacks.pgd import Draw, attack, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.build import build_model
from fasttht.config import TrainConfig
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import CheckpointError, UsageError
from fasttht.evaluate import Tally, walk
from fasttht.knn import Defence, neighbours
from fasttht.knn_bank import bank_network, bank_source, open_index
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.pipelines.splits import open_splits
from fasttht.resolve import resolve
from fasttht.run_folder import RunFolder
from fasttht.subject import Subject, images, open_run
from fasttht.train import Trainer

THREAT = Threat(eps=0.15, alpha=0.0375, steps=10)
NAMES = ["knn_clean", "knn_pgd10_transfer", "knn_pgd10_feature", "knn_pgd10_adaptive", "knn_pgd10_worst"]
ROWS = torch.arange(360)


def silent(line: str) -> None:
    pass


def evaluate(subject: Subject, rows: Tensor, *threats: Threat, **options: Any) -> dict[str, Tensor]:
    return Defence(subject, threats, **options).evaluate(rows)


def config_of(**options: Any) -> TrainConfig:
    return resolve(from_flat({**read_preset("quickstart"), "width": 8, **options}, where="test"))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `that` with a momentum encoder: robust enough that some images survive each attack."""
    folder = tmp_path_factory.mktemp("run") / "that"
    assert Trainer(config_of(replay=4, epochs=12, eval_steps=[0], output=folder)).fit() is not None
    return folder


@pytest.fixture(scope="module")
def subject(trained: Path) -> Subject:
    return open_run(trained, RunFolder(trained).config())


def untrained(path: Path, **options: Any) -> Subject:
    config, splits = config_of(**options), open_splits(None)
    model = build_model(config, splits.num_classes, torch.device("cpu"))
    return Subject(path, model, config, splits, torch.device("cpu"), "model", "step-00000000")


def pixels(subject: Subject, split: str, rows: Any) -> Tensor:
    samples = getattr(subject.splits, split)
    found = torch.stack([torch.from_numpy(samples.sample(int(i)).data.copy()).view(8, 8, 3) for i in rows])
    return found.permute(0, 3, 1, 2).float() / 255


def head(network: Any, x: Tensor) -> np.ndarray[Any, Any]:
    """The features of a network in evaluation mode, by its own layers."""
    with torch.no_grad():
        h = network.eval().trunk(network.normalize(x))
        layers = network.feature_head
        feat = layers[2](layers[1](layers[0](h)))
        return F.normalize(feat, dim=1).double().numpy()


def momentum_encoder(subject: Subject) -> CleanEncoder:
    encoder = CleanEncoder(subject.model, frozen=False)
    folder = subject.path / "checkpoints" / subject.checkpoint
    encoder.load_state_dict(load_file(folder / "clean_encoder.safetensors"))
    return encoder


def voted(u: np.ndarray[Any, Any], v: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], k: int) -> list[int]:
    """Eq. 8, image by image."""
    out = []
    for query in u:
        products = v @ query
        confidence = np.zeros(10)
        for j in np.argsort(-products, kind="stable")[:k]:
            confidence[labels[j]] += products[j]
        out.append(int(confidence.argmax()))
    return out


def test_clean_and_transferred_figures_are_those_of_a_plain_loop(subject: Subject) -> None:
    """f's features ask those of the momentum encoder; the images are those that the classifier is attacked with."""
    hits = evaluate(subject, ROWS, THREAT, k=50, say=silent)
    assert list(hits) == NAMES
    assert all(found.shape == (360,) and found.dtype == torch.bool for found in hits.values())
    train, val = subject.splits.train, subject.splits.val
    bank = head(momentum_encoder(subject), pixels(subject, "train", range(len(train))))
    x, y = pixels(subject, "val", ROWS), torch.from_numpy(val.labels.copy())
    subject.model.eval()
    made = attack(input_gradient(subject.model.logits), x, y, ROWS, THREAT, Draw(0), num_classes=10).x_adv
    for name, shown in (("knn_clean", x), ("knn_pgd10_transfer", made)):
        expected = np.array(voted(head(subject.model, shown), bank, train.labels, 50)) == val.labels
        assert (hits[name].numpy() != expected).sum() <= 1, name  # one image may lie within rounding of another class
    assert hits["knn_clean"].sum() > 300
    assert torch.equal(
        hits["knn_pgd10_worst"],
        hits["knn_pgd10_transfer"] & hits["knn_pgd10_feature"] & hits["knn_pgd10_adaptive"],
    )


@pytest.mark.parametrize("weighting", ["similarity", "exponential"])
def test_the_adaptive_attack_is_no_weaker_than_the_transferred_one(subject: Subject, weighting: Any) -> None:
    hits = evaluate(subject, ROWS, THREAT, weighting=weighting, say=silent)
    adaptive, transfer, clean = (int(hits[NAMES[i]].sum()) for i in (3, 1, 0))
    assert adaptive <= transfer < clean
    noise = evaluate(subject, ROWS, dataclasses.replace(THREAT, steps=0), weighting=weighting, say=silent)
    assert int(hits["knn_pgd10_feature"].sum()) < int(noise["knn_pgd0_feature"].sum())


def test_figures_do_not_depend_on_the_batch_size_nor_on_which_rows_are_asked_together(subject: Subject) -> None:
    config = dataclasses.replace(subject.config)
    config.evaluation = dataclasses.replace(config.evaluation, eval_batch_size=77)
    small = dataclasses.replace(subject, config=config)
    for threat, differ in ((dataclasses.replace(THREAT, steps=0), 0), (THREAT, 2)):
        whole = evaluate(subject, ROWS[:160], threat, say=silent)
        split = evaluate(small, ROWS[:160], threat, say=silent)
        some = torch.tensor([100, 3, 159, 3, 20])
        few = evaluate(subject, some, threat, say=silent)
        for name, found in whole.items():
            assert (found != split[name]).sum() <= differ, name
            assert (found[some] != few[name]).sum() <= min(differ, 1), name


def test_a_targeted_threat_is_scored_under_its_own_name_and_attacks(subject: Subject) -> None:
    hits = evaluate(subject, ROWS, dataclasses.replace(THREAT, targeted=True), say=silent)
    assert list(hits)[1:] == [f"knn_pgd10_targeted_{kind}" for kind in ("transfer", "feature", "adaptive", "worst")]
    clean = int(hits["knn_clean"].sum())
    for kind in ("transfer", "feature", "adaptive"):
        assert int(hits[f"knn_pgd10_targeted_{kind}"].sum()) < clean - 10, kind


def test_a_least_likely_threat_aims_at_the_class_that_the_classifier_finds_least_likely(subject: Subject) -> None:
    """Beside a drawn one: transferred from a plain loop's images, and named by what it is."""
    threat = dataclasses.replace(THREAT, targeted=True, target="least-likely")
    hits = evaluate(subject, ROWS[:90], threat, k=50, say=silent)
    assert list(hits)[1:] == [f"knn_pgd10_least_likely_{kind}" for kind in ("transfer", "feature", "adaptive", "worst")]
    x, y = pixels(subject, "val", ROWS[:90]), torch.from_numpy(subject.splits.val.labels[:90].copy())
    with torch.no_grad():
        logits = subject.model.eval().logits(x)
    logits[torch.arange(90), y] = torch.inf
    gradient = input_gradient(subject.model.logits)
    made = attack(gradient, x, y, ROWS[:90], threat, Draw(0), num_classes=10, target=logits.argmin(dim=1)).x_adv
    bank = head(momentum_encoder(subject), pixels(subject, "train", range(len(subject.splits.train))))
    expected = np.array(voted(head(subject.model, made), bank, subject.splits.train.labels, 50)) == y.numpy()
    assert (hits["knn_pgd10_least_likely_transfer"].numpy() != expected).sum() <= 1


def noted_screens(monkeypatch: pytest.MonkeyPatch) -> list[log.Screen]:
    """The screens that are opened from now on."""
    opened: list[log.Screen] = []
    original = log.Screen.__enter__
    monkeypatch.setattr(log.Screen, "__enter__", lambda self: (opened.append(self), original(self))[1])
    return opened


def test_several_threats_are_scored_as_each_alone_and_one_twice_named_is_made_once(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's radius that is the evaluation's own has the same hits; the progress counts every pass to the end."""
    shorter, wide = dataclasses.replace(THREAT, steps=2), dataclasses.replace(THREAT, steps=2, named_eps=True)
    each = [evaluate(subject, ROWS[:60], threat, say=silent) for threat in (THREAT, shorter)]
    screens = noted_screens(monkeypatch)
    whole = evaluate(subject, ROWS[:60], THREAT, shorter, wide, say=silent)
    (screen,) = screens
    assert screen.done == screen.total == 60 * (2 + 3 * (11 + 3))
    for name, found in (each[0] | each[1]).items():
        assert torch.equal(whole[name], found), name
    assert torch.equal(whole["knn_pgd2_eps0.15_adaptive"], whole["knn_pgd2_adaptive"])
    assert len(whole) == 1 + 3 * 4
    with pytest.raises(ValueError, match="expected threats on the cross entropy, got pgd10_dlr"):
        evaluate(subject, ROWS, dataclasses.replace(THREAT, loss="dlr"), say=silent)


def test_what_the_walk_over_the_classifier_made_is_not_made_again(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    threats = [dataclasses.replace(THREAT, steps=3), dataclasses.replace(THREAT, steps=3, targeted=True)]
    expected = Defence(subject, threats, say=silent).evaluate(ROWS[5:65])
    defence = Defence(subject, threats, say=silent)
    tally = Tally(threats, 360, subject.device, restarts=1, branches=False)
    walk(
        subject.model, images(subject, "val", ROWS[5:65], 23), threats, tally, seed=0, num_classes=10,
        on_attacked=defence.saw,
    )  # fmt: skip

    def refuse(*args: Any) -> None:
        raise AssertionError("attacked the classifier again")

    monkeypatch.setattr("fasttht.knn.input_gradient", lambda logits: refuse)
    screens = noted_screens(monkeypatch)
    found = defence.evaluate(ROWS[5:65])
    assert screens[0].done == screens[0].total == 60 * (2 + 2 * 2 * 4)
    for name, hits in expected.items():
        assert (found[name] != hits).sum() <= 1, name
    assert found["knn_pgd3_transfer"].any()


def test_networks_and_precision_are_left_as_they_were(subject: Subject) -> None:
    subject.model.train()
    torch.backends.cudnn.allow_tf32 = True
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    evaluate(subject, ROWS[:40], dataclasses.replace(THREAT, steps=2), say=silent)
    assert all(module.training for module in subject.model.modules())
    assert torch.backends.cudnn.allow_tf32
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_neighbours_are_the_nearest_training_rows(subject: Subject) -> None:
    x = pixels(subject, "val", range(30))
    rows, similarity = neighbours(subject, x, 5, say=silent)
    assert (rows.dtype, rows.shape, similarity.shape) == (torch.int64, (30, 5), (30, 5))
    bank = head(momentum_encoder(subject), pixels(subject, "train", range(len(subject.splits.train))))
    products = head(subject.model, x) @ bank.T
    np.testing.assert_allclose(similarity.numpy(), -np.sort(-products, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(products, rows.numpy(), axis=1), atol=1e-5)


def test_a_bank_is_built_once_and_a_damaged_one_again(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    open_index(subject, "head", silent)
    first = open_index(subject, "head", lines.append)
    assert lines == []
    (file,) = [path for path in (subject.path / "knn").iterdir() if load_file(path)["features"].shape[1] == 128]
    whole = file.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b"", b"no safetensors"):
        file.write_bytes(damage)
        lines.clear()
        again = open_index(subject, "head", lines.append)
        assert torch.equal(again.features, first.features)
        assert len(lines) == 2
        assert str(file) in lines[0]
        assert "anew" in lines[0]
        assert "1,437 features by the momentum clean encoder" in lines[1]
        assert file.read_bytes() == whole
    assert not list(file.parent.glob(".partial*"))
    assert first.features.shape == (1437, 128)
    torch.testing.assert_close(first.features.norm(dim=1), torch.ones(1437))
    assert torch.equal(first.labels, torch.from_numpy(subject.splits.train.labels.copy()))

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    file.unlink()
    monkeypatch.setattr(knn_bank, "save_file", refuse)
    lines.clear()
    assert torch.equal(open_index(subject, "head", lines.append).features, first.features)
    assert "No space left on device" in lines[1]
    assert not file.exists()


def test_a_long_build_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_bank, "PROGRESS_S", 0.0)
    lines: list[str] = []
    open_index(untrained(tmp_path, objective="at", eval_batch_size=1000), "trunk", lines.append)
    assert [line.rsplit(", ", 1)[0] for line in lines[1:]] == [
        "bank 1,000/1,437 images",
        "bank 1,437/1,437 images",
    ]


def test_prototypes_are_the_directions_of_class_means(tmp_path: Path) -> None:
    index = open_index(untrained(tmp_path, objective="at"), "trunk", silent)
    found = index.prototypes(11)
    for c in range(10):
        mean = index.features[index.labels == c].double().mean(dim=0)
        torch.testing.assert_close(found[c], F.normalize(mean, dim=0).float())
    assert not found[10].any()


def test_a_bank_is_another_one_for_other_weights_images_or_features(subject: Subject) -> None:
    network = momentum_encoder(subject)
    seen = [knn_bank.fingerprint(subject, network, "head"), knn_bank.fingerprint(subject, network, "trunk")]
    config = dataclasses.replace(subject.config, data=dataclasses.replace(subject.config.data, crop_pct=0.9))
    seen.append(knn_bank.fingerprint(dataclasses.replace(subject, config=config), network, "head"))
    swapped = dataclasses.replace(subject.splits, train=subject.splits.val)
    seen.append(knn_bank.fingerprint(dataclasses.replace(subject, splits=swapped), network, "head"))
    again = knn_bank.fingerprint(subject, momentum_encoder(subject), "head")
    with torch.no_grad():
        network.trunk.conv1.weight[0, 0, 0, 0] += 1e-6
    seen.append(knn_bank.fingerprint(subject, network, "head"))
    assert len(set(seen)) == 5
    assert again == seen[0]


def test_whose_features_are_the_bank(subject: Subject, tmp_path: Path) -> None:
    """g's where f was trained to agree with them, else f's own; said so."""
    for kind in ("head", "trunk"):
        network = bank_network(subject, kind)  # type: ignore[arg-type]
        assert isinstance(network, CleanEncoder)
        assert bank_source(subject, kind) == ("momentum g", "the momentum clean encoder")  # type: ignore[arg-type]
    own = momentum_encoder(subject).state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items())
    assert not torch.equal(network.trunk.conv1.weight, subject.model.trunk.conv1.weight)
    frozen = untrained(tmp_path, clean_encoder=str(subject.path))
    network = bank_network(frozen, "head")
    assert bank_source(frozen, "head") == ("frozen g", "the frozen clean encoder")
    assert torch.equal(network.trunk.conv1.weight, momentum_encoder(subject).trunk.conv1.weight)
    plain = untrained(tmp_path, objective="at")
    told = [dataclasses.replace(subject, origin=origin) for origin in ("export", "file")]
    for one, kind, why in (
        (frozen, "trunk", "other axes"),
        (plain, "trunk", "its objective has no clean encoder"),
        (told[0], "head", "an export holds no clean encoder"),
        (told[1], "head", "a file of weights holds no clean encoder"),
    ):
        assert bank_network(one, kind) is one.model  # type: ignore[arg-type]
        source, title = bank_source(one, kind)  # type: ignore[arg-type]
        assert source == "f"
        assert title.endswith(why)


@pytest.mark.parametrize("objective", ["at", "mbn"])
def test_without_a_feature_head_the_trunk_serves_and_the_head_is_refused(tmp_path: Path, objective: str) -> None:
    plain = untrained(tmp_path, objective=objective)
    with pytest.raises(UsageError, match=r"--knn-features: expected trunk, .* no feature head, got head"):
        evaluate(plain, ROWS, THREAT, features="head", say=silent)
    rows, similarity = neighbours(plain, pixels(plain, "train", [5, 900]), 1, say=silent)
    torch.testing.assert_close(similarity, torch.ones(2, 1))  # each finds itself, or its equal, in f's own bank
    bank = open_index(plain, "trunk", silent).features
    torch.testing.assert_close(bank[rows[:, 0]], bank[[5, 900]])
    hits = evaluate(plain, ROWS[:50], dataclasses.replace(THREAT, steps=1), features="trunk", say=silent)
    assert list(hits) == [name.replace("pgd10", "pgd1") for name in NAMES]


def test_what_cannot_be_is_refused_before_the_bank_is_built(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--knn-k: expected 1 to 1437, the number of training images, got 1438"):
        evaluate(subject, ROWS, THREAT, k=1438, say=silent)
    with pytest.raises(UsageError, match="--knn-k"):
        neighbours(subject, torch.zeros(1, 3, 8, 8), 0, say=silent)
    exported = dataclasses.replace(subject, path=tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="whose checkpoint holds the momentum clean encoder"):
        evaluate(exported, ROWS, THREAT, say=silent)
    assert not (tmp_path / "knn").exists()


def test_the_bank_of_what_is_no_run_lies_in_a_cache_or_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exported folder is meant for others; the same bank is found again, whatever the path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "export").mkdir()
    plain = untrained(tmp_path / "export", objective="at")
    lines: list[str] = []
    first = open_index(dataclasses.replace(plain, origin="export"), "trunk", lines.append)
    assert not list((tmp_path / "export").iterdir())
    file = dataclasses.replace(plain, origin="file", path=tmp_path / "model.safetensors")
    monkeypatch.setattr(knn_bank, "encoded", None)
    assert torch.equal(open_index(file, "trunk", lines.append).features, first.features)
    assert len(lines) == 1
    monkeypatch.undo()
    open_index(file, "trunk", silent, tmp_path / "told" / "knn")
    assert len(list((tmp_path / "told" / "knn").iterdir())) == 1


def test_a_folder_that_takes_no_bank_is_said_and_no_more(tmp_path: Path) -> None:
    plain = untrained(tmp_path, objective="at")
    (tmp_path / "knn").write_text("in the way")
    lines: list[str] = []
    assert len(open_index(plain, "trunk", lines.append).features) == 1437
    assert "expected to keep the bank here, got" in lines[1]


def test_features_that_are_not_finite_are_refused_and_not_kept(tmp_path: Path) -> None:
    broken = untrained(tmp_path, objective="at")
    with torch.no_grad():
        broken.model.trunk.conv1.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="expected finite features from the network itself"):
        open_index(broken, "trunk", silent)
    assert not (tmp_path / "knn").exists()
