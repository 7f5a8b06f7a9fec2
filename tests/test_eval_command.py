"""`fasttht eval` whole: every attack by every batch size, what a row says against the images behind it, its files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fasttht import kernels, log
from fasttht.attacks.threat import Threat
from fasttht.cli import run
from fasttht.eval_attacks import GOALS, image_steps, threats
from fasttht.evaluate import Request, Tally, evaluate_run, walk
from fasttht.models.two_head import TwoHead
from fasttht.pipelines.splits import open_splits
from fasttht.subject import Subject, images
from fasttht.subject_file import open_subject

pytestmark = pytest.mark.changes_rng

Clean = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file of a network that knows the digits roughly; the digits' cache stays for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        samples = open_splits(None).train
        pixels = [torch.from_numpy(samples.sample(i).data.copy()).view(8, 8, 3) for i in range(len(samples))]
        whole = torch.stack(pixels).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x, y = kernels.u8_to_input(whole), torch.from_numpy(samples.labels.copy())
        torch.manual_seed(0)
        model = TwoHead("resnet18", 10, stem="small", width=4, classifier="linear", feat_dim=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i in range(42):
            part = torch.arange(100 * i, 100 * (i + 1)) % len(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]).logits, y[part]).backward()
            optimizer.step()
        path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
        yield path


@pytest.fixture(autouse=True)
def no_alarms(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Alarms that note what they are shown and find what a test puts there."""
    shown: list[dict[str, Any]] = []

    def look(row: dict[str, Any], **about: Any) -> list[Any]:
        shown.append({**row, **about})
        return [SimpleNamespace(name="too_good", text="it is")] if row["clean_top1"] > 50 else []

    missing = SimpleNamespace(look=look, missing=lambda row: ["not checked: the moon"])
    monkeypatch.setattr("fasttht.eval_report.alarms", missing)
    return shown


def every_attack(subject: Subject) -> list[Threat]:
    subject.config.evaluation.eval_steps = (0, 2)
    return threats(subject.config, GOALS["all"], losses=("ce", "margin", "dlr"), eps_sweep=(0.12,))


def tallied(subject: Subject, attacks: list[Threat], batch_size: int, rows: Tensor | None = None) -> Tally:
    tally = Tally(attacks, 360, subject.device, restarts=2, branches=False)
    batches = images(subject, "val", rows, batch_size)
    walk(subject.model, batches, attacks, tally, seed=4, num_classes=10, restarts=2)
    return tally


@pytest.mark.parametrize("norm", ["linf", "l2-relative"])
def test_results_do_not_depend_on_the_batch_size(weights: Path, norm: str) -> None:
    """Random numbers are bit-identical; rounding may move one image."""
    subject = open_subject(weights, {"eps": 0.06, "norm": norm})
    attacks = every_attack(subject)
    whole, split = (tallied(subject, attacks, size, torch.arange(5, 105)) for size in (100, 37))
    assert len(whole.hits) == 1 + 2 * 2 * 2 * 3 * 3
    for name, hits in whole.hits.items():
        assert int((hits != split.hits[name]).sum()) <= 1, name
        if name.startswith("pgd0"):
            assert torch.equal(hits, split.hits[name])
    shares, other = whole.zero_grad_pct(), split.zero_grad_pct()
    assert shares.keys() == {threat.name for threat in attacks if threat.steps}
    assert shares == pytest.approx(other, abs=0.5)
    assert max(shares.values()) < 5  # where DLR is done its gradient is zero; such images do not count


def test_a_walk_over_parts_adds_up_to_the_whole(weights: Path) -> None:
    """As ranks do it: rows of their own, tallies of the same size."""
    subject = open_subject(weights, {"eps": 0.06})
    attacks = every_attack(subject)[:4]
    whole = tallied(subject, attacks, 60)
    parts = [tallied(subject, attacks, 60, torch.arange(rank, 360, 3)) for rank in range(3)]
    assert [int(part.seen.sum()) for part in parts] == [120, 120, 120]
    for name, hits in whole.hits.items():
        added = torch.stack([part.hits[name] for part in parts]).sum(dim=0)
        assert int((added != hits.long()).sum()) <= 1
    for name, total in whole.zero_grad.items():
        assert float(sum(part.zero_grad[name] for part in parts)) == pytest.approx(float(total), abs=1)


def test_goals_and_losses_do_what_they_say(weights: Path) -> None:
    subject = open_subject(weights, {"eps": 0.08, "eval_steps": (5,)})
    attacks = threats(subject.config, GOALS["all"], losses=("ce", "margin", "dlr"), eps_sweep=(0.08, 0.5))
    tally = tallied(subject, attacks, 360, torch.arange(120))
    right = {name: int(hits.sum()) for name, hits in tally.hits.items()}
    assert right["clean"] > 60
    for loss in ("", "_margin", "_dlr"):
        assert right[f"pgd5{loss}"] < right["clean"] - 30
        assert right[f"pgd5{loss}"] < right[f"pgd5_targeted{loss}"] < right["clean"]
        assert right[f"pgd5_least_likely{loss}"] > right[f"pgd5_targeted{loss}"]  # the farthest class is hardest
        assert right[f"pgd5{loss}_eps0.5"] < right[f"pgd5{loss}_eps0.08"]
        assert torch.equal(tally.hits[f"pgd5{loss}_eps0.08"], tally.hits[f"pgd5{loss}"])
    assert (tally.hits["pgd5_r2"] <= tally.hits["pgd5"]).all()


def test_a_saturated_network_has_gradients_of_zero_and_says_so(weights: Path) -> None:
    subject = open_subject(weights, {"eps": 0.06, "eval_steps": (3,)})
    with torch.no_grad():
        subject.model.classifier.weight *= 1e5
        assert isinstance(subject.model.classifier.bias, Tensor)
        subject.model.classifier.bias *= 1e5
    attacks = threats(subject.config, losses=("ce", "margin"))
    shares = tallied(subject, attacks, 100).zero_grad_pct()
    assert shares["pgd3"] > 90
    assert shares["pgd3_margin"] < 5


def evaluated(weights: Path, tmp_path: Path, **request: Any) -> dict[str, Any]:
    return evaluate_run(
        weights, changes={"eval_steps": (0, 4), "eval_restarts": 2}, goal="both", eps=0.08,
        output=tmp_path / "rows.json", per_image=tmp_path / "hits.npz", request=Request(**request),
    )  # fmt: skip


def test_a_row_says_what_the_images_say(weights: Path, tmp_path: Path) -> None:
    row = evaluated(weights, tmp_path, losses=("ce", "margin"), eps_sweep=(0.5,), csv=tmp_path / "rows.csv")
    with np.load(tmp_path / "hits.npz") as archive:
        hits = {name: archive[name] for name in archive}
    assert row == json.loads((tmp_path / "rows.json").read_text())
    clean = hits["clean"]
    attacks = {name: found for name, found in hits.items() if name != "clean"}
    for name, found in attacks.items():
        assert row[f"{name}_top1"] == pytest.approx(100 * found.mean(), abs=1e-4)
        assert row[f"{name}_asr"] == pytest.approx(100 * (clean & ~found).sum() / clean.sum(), abs=1e-4)
    within = [found for name, found in attacks.items() if "_eps" not in name]
    assert len(attacks) == 2 * len(within) == 32
    worst = np.logical_and.reduce([clean, *within])
    assert row["worst_top1"] == pytest.approx(100 * worst.mean(), abs=1e-4)
    assert row["worst_top1"] <= row["pgd4_r2_top1"]
    assert row["worst_asr"] == pytest.approx(100 * (clean & ~worst).sum() / clean.sum(), abs=1e-4)
    assert row["noise_top1"] == row["pgd0_top1"]
    assert row["eps_sweep"] == [0.5]
    assert row["alarms"] == [{"name": "too_good", "text": "it is"}]
    assert row["not_checked"] == ["not checked: the moon"]
    assert (row["restarts"], row["limit"], row["images_file"]) == (2, None, None)
    assert row["alpha"] == {
        f"pgd4{goal}{loss}{radius}": alpha
        for goal in ("", "_targeted") for loss in ("", "_margin") for radius, alpha in (("", 0.05), ("_eps0.5", 0.3125))
    }  # fmt: skip
    assert {name for name in row if name.endswith("_zero_grad_pct")} <= {
        f"pgd4{goal}{loss}{eps}_zero_grad_pct"
        for goal in ("", "_targeted") for loss in ("", "_margin") for eps in ("", "_eps0.5")
    }  # fmt: skip
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["attack"]: float(line["top1"]) for line in lines} == {
        name.removesuffix("_top1"): value for name, value in row.items() if name.endswith("_top1")
    }
    assert {line["attack"]: float(line["asr"]) for line in lines if line["asr"]} == {
        name.removesuffix("_asr"): value for name, value in row.items() if name.endswith("_asr")
    }
    assert {(line["images"], line["eps"], line["norm"]) for line in lines} == {("360", "0.08", "linf")}
    alphas = {line["attack"]: line["alpha"] for line in lines}
    assert [alphas[name] for name in ("clean", "pgd0", "pgd4_r2", "pgd4_margin_eps0.5_r2")] == [
        "",
        "",
        "0.05",
        "0.3125",
    ]
    assert {(line["restarts"], line["knn_k"]) for line in lines} == {("2", "")}


def test_a_subset_is_scored_as_within_the_whole(weights: Path, tmp_path: Path) -> None:
    """The same images by --limit and by a list, with the hits that they have among all."""
    evaluated(weights, tmp_path)
    with np.load(tmp_path / "hits.npz") as archive:
        whole = {name: archive[name] for name in archive}
    row = evaluated(weights, tmp_path, limit=50, csv=tmp_path / "rows.csv")
    assert row["images"] == 50
    with np.load(tmp_path / "hits.npz") as archive:
        part = {name: archive[name] for name in archive}
    labels = open_splits(None).val.labels
    (tmp_path / "list").write_text("359\n7\n300\n")
    assert evaluated(weights, tmp_path, images_file=tmp_path / "list", csv=tmp_path / "rows.csv")["images"] == 3
    with np.load(tmp_path / "hits.npz") as archive:
        for name, found in archive.items():
            assert int((found != whole[name][[7, 300, 359]]).sum()) <= 1, name
    assert all(len(found) == 50 for found in part.values())
    assert len(labels) == 360
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert sum(line.startswith("run,") for line in lines) == 1
    assert len(lines) == 1 + 2 * len([name for name in row if name.endswith("_top1")])


def test_suites_get_the_rows_and_their_hits_join_the_row(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    seen: set[str] = set()

    def auto(
        subject: Subject,
        rows: Tensor,
        names: list[str],
        folder: Path,
        say: Any,
        *,
        shard: Any,
        alarms: Any,
        together: Any,
    ) -> dict[str, Tensor]:
        assert shard == (0, 1)
        with together(1) as meeting:
            meeting.meet()
        calls.append((list(names), rows.tolist(), folder))
        return {"apgd": rows % 2 == 0, "autoattack": rows % 4 == 0}

    class Knn:
        def __init__(self, subject: Subject, threats: list[Threat], **options: Any) -> None:
            assert (options.pop("world").size, options.pop("stop").signal) == (1, None)
            options.pop("say")
            calls.append(([threat.name for threat in threats], options))

        def saw(self, threat: Threat, batch: Any, x_adv: Tensor) -> None:
            seen.add(threat.name)

        def evaluate(self, rows: Tensor, on_batch: Callable[[int], None]) -> dict[str, Tensor]:
            on_batch(len(rows))
            return {"knn_clean": rows >= 0, "knn_pgd4_transfer": rows < 0}

    checked: list[str] = []
    suite = SimpleNamespace(evaluate=auto, check=lambda subject, names: checked.extend(names))
    monkeypatch.setitem(sys.modules, "fasttht.attacks.auto", suite)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "fasttht.knn", SimpleNamespace(Defence=Knn))  # type: ignore[arg-type]
    (tmp_path / "list").write_text("1\n2\n3\n4\n")
    words = ["eval", str(weights), "--eps", "0.001", "--suites", "autoattack", "knn", "apgd",
             "--images-file", str(tmp_path / "list"), "--output", str(tmp_path / "rows.json"), "--knn-k", "7",
             "--knn-weighting", "exponential", "--knn-features", "trunk", "--alarms", "off",
             "--csv", str(tmp_path / "rows.csv")]  # fmt: skip
    assert run([*words, "--eval-steps", "4"]) == 0
    row = json.loads((tmp_path / "rows.json").read_text())
    assert (row["apgd_top1"], row["autoattack_top1"], row["knn_clean_top1"]) == (50, 25, 100)
    assert row["worst_top1"] <= 25  # of the classifier; the neighbours are another defence
    assert "knn_pgd4_transfer_asr" not in row
    assert "alarms" not in row
    assert checked == ["autoattack", "apgd"]
    assert seen == {"pgd4"}
    options = {"k": 7, "weighting": "exponential", "features": "trunk", "search": "exact", "folder": None}
    assert calls == [
        (["pgd4"], options),
        (["autoattack", "apgd"], [1, 2, 3, 4], weights.with_name("digits-eval")),
    ]
    assert row["images_file"] == str(tmp_path / "list")
    said = {"k": 7, "weighting": "exponential", "features": "trunk", "search": "exact", "bank": "f"}
    assert {name.removeprefix("knn_"): value for name, value in row.items() if name[:5] in ("knn_k", "knn_w", "knn_f",
            "knn_s", "knn_b")} == said  # fmt: skip
    with (tmp_path / "rows.csv").open() as file:
        of = {line["attack"]: line for line in csv.DictReader(file)}
    assert {name: of["knn_pgd4_transfer"][f"knn_{name}"] for name in said} == {**said, "k": "7"}
    assert of["knn_pgd4_transfer"]["alpha"] == of["pgd4"]["alpha"] == "0.000625"
    assert of["apgd"]["knn_k"] == ""
    assert (
        "knn: k 7, exponential weights, trunk features, bank by the network itself, as a file of weights holds no"
        in (capsys.readouterr().out.replace("\n", " "))
    )
    calls.clear()
    more = ["--eval-steps", "0", "4", "--losses", "dlr", "--goal", "both", "--work-dir", str(tmp_path / "work")]
    assert run([*words, *more]) == 0
    assert calls == [
        (["pgd4", "pgd4_targeted"], options | {"folder": tmp_path / "work" / "knn"}),
        (["autoattack", "apgd"], [1, 2, 3, 4], tmp_path / "work"),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--knn-features", "trunk", "--knn-k", "1438"], "--knn-k: expected 1 to 1437, the number of training images"),
        (["--knn-features", "trunk", "--knn-k", "0"], "--knn-k: expected 1 to 1437"),
        (
            ["--knn-features", "trunk", "--knn-search", "faiss"],
            "--knn-search: expected exact, or faiss with its package",
        ),
        ([], "--knn-features: expected trunk for a network without a feature head, got head"),
    ],
    ids=str,
)
def test_what_a_suite_cannot_do_is_said_before_the_attacks(
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("fasttht.evaluate.walk", None)
    monkeypatch.setattr("fasttht.knn_bank.encoded", None)
    monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    assert run(["eval", str(weights), "--eps", "0.1", "--suites", "knn", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_table_of_other_columns_is_refused_before_the_attacks(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttht.evaluate.walk", None)
    (tmp_path / "rows.csv").write_text("run,attack,top1\na,b,1\n")
    assert run(["eval", str(weights), "--eps", "0.1", "--csv", str(tmp_path / "rows.csv")]) == 2
    assert "--csv: expected a new file or one with the columns of this version" in capsys.readouterr().err


def test_alarms_are_said_and_what_was_not_looked_for(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_alarms: list[dict[str, Any]]
) -> None:
    words = ["eval", str(weights), "--eps", "0.02", "--eval-steps", "2", "--limit", "40", "--output"]
    assert run([*words, str(tmp_path / "cheap.json")]) == 0
    out = capsys.readouterr().out
    assert "alarm too_good: it is" in out
    assert "1 signs of masked gradients were not looked for; --alarms full" in out
    assert "pgd2_dlr_top1" not in no_alarms[-1]
    assert (no_alarms[-1]["classifier"], no_alarms[-1]["chance"]) == ("linear", 10)
    assert run([*words, str(tmp_path / "full.json"), "--alarms", "full"]) == 0
    assert "not checked: the moon" in capsys.readouterr().out
    measured = {name.removesuffix("_top1") for name in no_alarms[-1] if name.endswith("_top1")}
    assert measured == {
        "clean", "pgd2", "pgd0", "pgd1", "pgd10", "pgd2_margin", "pgd2_dlr", "pgd2_targeted", "pgd2_eps0.01",
        "pgd2_eps0.04", "pgd2_eps1", "noise", "worst",
    }  # fmt: skip


def test_dlr_with_too_few_classes_ends_in_a_sentence(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / "tree" / split / label / "0.png")
    model = TwoHead("resnet18", 2, stem="small", width=4, classifier="linear", feat_dim=None)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "two")
    words = ["eval", str(tmp_path / "two"), "--data", str(tmp_path / "tree"), "--img-size", "8", "--eps", "0.1"]
    assert run([*words, "--losses", "dlr"]) == 2
    assert "--losses: expected at least 3 classes for dlr, got 2" in capsys.readouterr().err
    assert run([*words, "--losses", "margin", "--eval-steps", "1", "--alarms", "full"]) == 0


def test_progress_counts_passes_and_says_how_long_is_left(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line every thirty seconds of a pipe, by a clock on which a hundred passes of 60 images take 1 s each."""
    now, advanced = [0.0], []
    screen = log.EvalScreen(60 * 100, lambda: {"pgd10": "40.00 %"}, clock=lambda: now[0])
    with screen:
        for _ in range(100):
            now[0] += 1
            screen.advance(60)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        f"evaluate {done}/6000 image steps" for done in (1800, 3600, 5400)
    ]
    assert "image steps/s 60" in lines[0]
    assert "ETA 0:01:10" in lines[0]
    assert "pgd10 40.00 %" in lines[0]

    original = log.EvalScreen.advance
    monkeypatch.setattr(
        log.EvalScreen, "advance", lambda self, num: (advanced.append((self, num)), original(self, num))[1]
    )
    evaluate_run(
        weights, changes={"eval_steps": (3, 2), "eval_restarts": 2}, goal="both", eps=0.1,
        request=Request(limit=30, eps_sweep=(0.1, 0.2)),
    )  # fmt: skip
    subject = open_subject(weights, {"eps": 0.1, "eval_steps": (3, 2)})
    passes = image_steps(threats(subject.config, GOALS["both"], eps_sweep=(0.1, 0.2)), 2)
    assert sum(num for _, num in advanced) == 30 * passes == 30 * (1 + 2 * 2 * (4 + 3) * 2)
