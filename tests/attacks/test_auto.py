"""AutoAttack through pyautoattack: what the library finds, for any split of the images, whatever is killed."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttht.alarms import Alarm
from fasttht.attacks import auto
from fasttht.attacks.auto import Budget, evaluate
from fasttht.attacks.auto_results import Done
from fasttht.attacks.auto_warnings import as_alarms
from fasttht.config_file import from_flat, read_preset
from fasttht.errors import UsageError
from fasttht.pipelines import ResourceError
from fasttht.pipelines.samples import Samples
from fasttht.pipelines.splits import Splits, open_splits
from fasttht.resolve import resolve
from fasttht.subject import Subject

BUDGET = Budget(n_iter=3, n_queries=8)
ROWS = torch.arange(3, 25)  # 22 images: with chunks of 8, the last one short
CHUNK = 8
BOTH = ["apgd", "autoattack"]
NAMES = ["apgd_ce", "apgd_dlr", "apgd", "aa_apgd_ce", "aa_apgd_t", "aa_fab_t", "aa_square", "autoattack"]


class Small(nn.Module):
    """Random ReLU features and a classifier fitted to the training images by least squares."""

    def __init__(self, samples: Samples, classes: int = 10) -> None:
        super().__init__()
        x, y = pictures(samples)
        x, y = x[y < classes], y[y < classes]
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(192, 96, generator=generator) / 8)
        self.out = nn.Parameter(torch.zeros(96, classes))
        with torch.no_grad():
            h = (x.flatten(1) @ self.hidden).relu()
            self.out.copy_(torch.linalg.solve(h.T @ h + torch.eye(96), h.T @ nn.functional.one_hot(y, classes).float()))
        self.forwards = 0
        self.die_at: int | None = None

    def logits(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return 20 * (x.flatten(1) @ self.hidden).relu() @ self.out


def pictures(samples: Samples, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 8, 8) in [0, 1] and labels, decoded by nothing of ours."""
    index = range(len(samples)) if rows is None else rows.tolist()
    raw = np.stack([samples.sample(i).data.reshape(8, 8, 3) for i in index])
    return torch.from_numpy(raw).permute(0, 3, 1, 2).contiguous().float() / 255, torch.from_numpy(
        samples.labels[list(index)].copy()
    )


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Splits]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield open_splits(None)


@pytest.fixture
def subject(splits: Splits) -> Subject:
    return subject_of(splits, Small(splits.train))


def subject_of(splits: Any, model: nn.Module, **options: Any) -> Subject:
    flat = {**read_preset("quickstart"), "objective": "at", "eps": 0.04, **options}
    config = resolve(from_flat(flat, where="test"))
    return Subject(Path("run"), cast(Any, model), config, splits, torch.device("cpu"), "model", "step-00000001")


def run(subject: Subject, folder: Path, names: list[str] = BOTH, **options: Any) -> dict[str, Tensor]:
    said: list[str] = options.pop("said", [])
    return evaluate(subject, ROWS, names, folder, said.append, **{"chunk": CHUNK, "budget": BUDGET, **options})


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_results_are_cumulative_and_by_position(subject: Subject, tmp_path: Path) -> None:
    hits = run(subject, tmp_path)
    assert list(hits) == NAMES
    assert all(found.shape == (22,) and found.dtype == torch.bool for found in hits.values())
    x, y = pictures(subject.splits.val, ROWS)
    with torch.no_grad():
        clean = subject.model.logits(x).argmax(1) == y
    chain = [clean, *(hits[name] for name in ("aa_apgd_ce", "aa_apgd_t", "aa_fab_t", "aa_square"))]
    assert all(not (after & ~before).any() for before, after in itertools.pairwise(chain))
    assert torch.equal(hits["autoattack"], hits["aa_square"])
    assert torch.equal(hits["apgd"], hits["apgd_ce"] & hits["apgd_dlr"])
    assert torch.equal(hits["apgd_ce"], hits["aa_apgd_ce"])
    assert 0 < hits["autoattack"].sum() < hits["apgd_ce"].sum() < clean.sum()  # the case has something to tell


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_chunk_is_what_the_library_finds_by_itself(splits: Splits, tmp_path: Path, norm: str) -> None:
    """The library in one call, with its own constructors for the budget, against one chunk."""
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    eps = 0.04 if norm == "linf" else 0.4
    subject = subject_of(splits, Small(splits.train), norm=norm, eps=eps, alpha=eps / 4)
    hits = run(subject, tmp_path, ["autoattack"], chunk=64)
    x, y = pictures(splits.val, ROWS)
    library, own = {"linf": "Linf", "l2": "L2"}[norm], subject.model.logits
    seeds = iter([auto._seed(0, 0, attack) for attack in ("apgd-ce", "apgd-t", "fab-t", "square")])
    direct = AutoAttack(own, norm=library, eps=eps, seed=0, device="cpu")
    direct.get_seed = lambda: next(seeds)
    budget = {"n_iter": 3, "norm": library, "n_restarts": 1, "eps": eps, "eot_iter": 1, "rho": 0.75, "device": "cpu"}
    direct.apgd = APGDAttack(own, logger=direct.logger, **budget)
    direct.apgd_targeted = APGDAttack_targeted(own, n_target_classes=9, logger=direct.logger, **budget)
    direct.fab.n_iter, direct.square.n_queries = 3, 8
    with torch.random.fork_rng():
        _, predicted = direct.run_standard_evaluation(x, y, batch_size=64)
    suffix = "" if norm == "linf" else "_l2"
    assert torch.equal(hits[f"autoattack{suffix}"], predicted == y)
    assert list(hits) == [f"{name}{suffix}" for name in NAMES[3:]]
    assert 0 < hits[f"autoattack{suffix}"].sum() < len(y)
    with pytest.raises(StopIteration):
        next(seeds)


def test_the_evaluation_batch_size_changes_nothing(subject: Subject, tmp_path: Path) -> None:
    found = []
    for size in (3, 360):
        subject.config.evaluation.eval_batch_size = size
        found.append(run(subject, tmp_path / str(size)))
    assert same(*found)


@pytest.mark.parametrize("world", [2, 5])
def test_the_union_over_processes_is_the_result_of_one(subject: Subject, tmp_path: Path, world: int) -> None:
    alone = run(subject, tmp_path / "alone")
    parts = [run(subject, tmp_path / "shared", shard=(rank, world)) for rank in range(world)]
    assert same({name: torch.stack([part[name] for part in parts]).any(0) for name in NAMES}, alone)
    for k in range(3):  # a rank knows of its own chunks only
        others = [part["aa_apgd_ce"][8 * k : 8 * k + 8].any() for rank, part in enumerate(parts) if k % world != rank]
        assert not any(others)


def test_more_images_keep_the_chunks_that_are_done(subject: Subject, tmp_path: Path) -> None:
    fewer = evaluate(subject, ROWS[:16], BOTH, tmp_path, [].append, chunk=CHUNK, budget=BUDGET)
    said: list[str] = []
    more = run(subject, tmp_path, said=said)
    assert said[0] == "apgd, autoattack: 2 of 3 chunks were there"
    assert same({name: more[name][:16] for name in NAMES}, fewer)


def test_the_model_and_the_settings_of_torch_are_left_as_they_were(subject: Subject, tmp_path: Path) -> None:
    """The global random state is watched by the guard around every test."""
    model = subject.model.train()
    model.hidden.requires_grad_(False)
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    run(subject, tmp_path)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert before == (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    assert sys.gettrace() is None or "pyautoattack" not in repr(sys.gettrace())


def test_nothing_is_printed_and_progress_is_said(
    subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    hits = run(subject, tmp_path, said=said)
    assert capsys.readouterr() == ("", "")
    assert [line.split("  ")[0] for line in said] == [f"apgd, autoattack {n}/22 images" for n in (8, 16, 22)]
    assert f"square {100 * hits['autoattack'].float().mean():.2f} %" in said[-1]
    assert said[-1].endswith("ETA 0:00:00")


def in_child(work: Callable[[], object]) -> int:
    """Run work in a child process; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_run_killed_at_random_points_ends_with_the_uninterrupted_result(splits: Splits, tmp_path: Path) -> None:
    model = Small(splits.train)
    subject = subject_of(splits, model)
    whole = run(subject, tmp_path / "whole")
    total, model.forwards = model.forwards, 0
    points = torch.randint(total // 12, total // 6, (5,), generator=torch.Generator().manual_seed(7)).tolist()
    for point in points:
        model.die_at = point
        status = in_child(lambda: run(subject, tmp_path / "killed"))
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
    model.die_at = None
    assert same(run(subject, tmp_path / "killed"), whole)
    assert model.forwards < total  # it began where the killed ones had come to
    names = [sorted(path.name for path in (tmp_path / run).glob("[0-9]*.json")) for run in ("whole", "killed")]
    assert names[0] == names[1]


def test_a_run_killed_before_a_result_has_its_name_does_not_trust_it(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(subject, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        status = in_child(lambda: run(subject, tmp_path / "killed"))
    assert os.WIFSIGNALED(status)
    (left,) = (tmp_path / "killed").iterdir()
    assert left.name.startswith(".000000-apgd-ce")
    assert same(run(subject, tmp_path / "killed"), whole)


def test_a_damaged_result_counts_as_none(subject: Subject, tmp_path: Path) -> None:
    whole = run(subject, tmp_path)
    files = sorted(tmp_path.iterdir())
    cut, flipped, empty, other, binary, replaced = (files[i] for i in (0, 3, 5, 7, 9, 12))
    cut.write_text(cut.read_text()[:60])
    text = flipped.read_text()
    first = text.index('"hits": "') + 9
    flipped.write_text(text[:first] + "10"[int(text[first])] + text[first + 1 :])
    empty.write_text("")
    other.write_text("[1, 2]")
    binary.write_bytes(b"\xff\xfe")
    replaced.write_bytes(files[11].read_bytes())
    said: list[str] = []
    assert same(run(subject, tmp_path, said=said), whole)
    assert {line.split(":")[0] for line in said if "run again" in line} == {
        str(path) for path in (cut, flipped, empty, other, binary, replaced)
    }


@pytest.mark.parametrize("change", ["weights", "eps", "seed", "chunk", "budget", "rows", "version"])
def test_a_result_of_something_else_is_not_taken(
    subject: Subject, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(subject, tmp_path, ["apgd"])
    before = {path.name for path in tmp_path.iterdir()}
    options: dict[str, Any] = {}
    if change == "weights":
        with torch.no_grad():
            subject.model.out[0, 0] += 1e-6
    elif change == "eps":
        subject.config.attack.eps = 0.0401
    elif change == "seed":
        subject.config.run.seed = 1
    elif change == "chunk":
        options = {"chunk": 9}
    elif change == "budget":
        options = {"budget": Budget(3, 9)}
    elif change == "version":
        monkeypatch.setattr("pyautoattack.__version__", "0.0.0")
    rows = ROWS.flip(0) if change == "rows" else ROWS
    said: list[str] = []
    evaluate(subject, rows, ["apgd"], tmp_path, said.append, **{"chunk": CHUNK, "budget": BUDGET, **options})
    assert not any("were there" in line for line in said)
    assert len({path.name for path in tmp_path.iterdir()} - before) == 6


class Odd(nn.Module):
    """Logits that a function of the images gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = function


def test_what_is_robust_by_construction_stays_right(splits: Splits, tmp_path: Path) -> None:
    """It says 3 whatever it sees; the library's warning of zero gradients is passed on, also from kept results."""
    constant = torch.arange(10.0).roll(4)  # class 3 is 9, class 2 is 8, ...
    subject = subject_of(splits, Odd(lambda x: constant + 0 * x.sum((1, 2, 3))[:, None]))
    _, y = pictures(splits.val, ROWS)
    for _ in range(2):
        alarms: list[Alarm] = []
        hits = run(subject, tmp_path, alarms=alarms)
        assert (y == 3).any()
        assert all(torch.equal(found, y == 3) for found in hits.values())
        assert [alarm.name for alarm in alarms] == ["aa_zero_gradient"]
        assert "apgd-dlr, apgd-t" in alarms[0].text
        assert "Croce & Hein 2020" in alarms[0].text


@pytest.mark.changes_rng
def test_the_librarys_warnings_become_alarms(splits: Splits, tmp_path: Path) -> None:
    small = Small(splits.train)

    def noisy(x: Tensor) -> Tensor:
        return small.logits(x) + torch.randn(len(x), 10)

    def names(function: Callable[[Tensor], Tensor], folder: str) -> set[str]:
        alarms: list[Alarm] = []
        run(subject_of(splits, Odd(function)), tmp_path / folder, ["apgd"], alarms=alarms)
        return {alarm.name for alarm in alarms}

    assert names(noisy, "noisy") == {"aa_randomized"}
    assert names(lambda x: small.logits(x).softmax(1), "probabilities") == {"aa_probabilities"}
    assert names(small.logits, "plain") == set()


@pytest.mark.parametrize(
    ("attack", "points", "text"),
    [
        ("apgd-dlr", 4, None),
        ("apgd-dlr", 5, "zero at 10 starting points"),
        ("apgd-t", 1, "in apgd-t, 2 of 2 chunks: the gradient of the DLR loss was exactly zero at 2 starting points"),
    ],
)
def test_zero_gradients_of_untargeted_dlr_may_be_few(attack: str, points: int, text: str | None) -> None:
    """With the label's logit in the third place DLR is constant: 4 or 5 of the 90 images of each of two chunks."""
    warning = f"there are {points} points with zero gradient! See flags_doc.md for details."
    done = {(k, attack): Done(torch.ones(90, dtype=torch.bool), (warning,)) for k in range(2)}
    alarms = as_alarms(done, 2)
    assert [alarm.name for alarm in alarms] == ([] if text is None else ["aa_zero_gradient"])
    assert text is None or text in alarms[0].text


def test_fewer_classes_have_fewer_targets(splits: Splits, tmp_path: Path) -> None:
    """The library warns where there are more targets than classes; that would be an alarm."""
    model = Small(splits.train, classes=5)
    subject = subject_of(SimpleNamespace(val=splits.val, num_classes=5), model, eps=0.06)
    rows = torch.from_numpy(np.flatnonzero(splits.val.labels < 5)[:22])
    alarms: list[Alarm] = []
    hits = evaluate(subject, rows, ["autoattack"], tmp_path, [].append, budget=BUDGET, alarms=alarms)
    assert alarms == []
    assert 0 < hits["autoattack"].sum() < hits["aa_apgd_ce"].sum()


def test_no_images_are_no_result(subject: Subject, tmp_path: Path) -> None:
    hits = evaluate(subject, torch.zeros(0, dtype=torch.int64), BOTH, tmp_path, [].append)
    assert list(hits) == NAMES
    assert all(found.shape == (0,) and found.dtype == torch.bool for found in hits.values())


@pytest.mark.parametrize(
    ("name", "hint"), [("autoatack", "did you mean autoattack"), ("agpd", "did you mean apgd"), ("knn", "one of these")]
)
def test_an_unknown_suite_is_refused(subject: Subject, tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"--suites: expected some of apgd, autoattack, got {name}; .*{hint}"):
        run(subject, tmp_path / "none", [name])
    assert not (tmp_path / "none").exists()


def test_what_the_library_cannot_do_is_refused(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: Any = SimpleNamespace(val=subject.splits.val, num_classes=3)
    with pytest.raises(UsageError, match=r"at least 4 classes for autoattack.*got 3"):
        run(dataclasses.replace(subject, splits=few), tmp_path, ["autoattack"])
    few.num_classes = 2
    with pytest.raises(UsageError, match=r"at least 3 classes for apgd.*got 2"):
        run(dataclasses.replace(subject, splits=few), tmp_path, ["apgd"])
    subject.config.attack.norm = "l2-relative"
    with pytest.raises(UsageError, match=r"--norm: expected linf or l2 .*got l2-relative"):
        run(subject, tmp_path)
    subject.config.attack.norm, subject.config.data.img_size = "l2", 4
    with pytest.raises(UsageError, match="at least 5 pixels"):
        run(subject, tmp_path)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(UsageError, match=r'pip install "fasttht\[eval\]"'):
        run(subject, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room: out of memory"), RuntimeError("can't allocate memory")]
)
def test_a_chunk_too_large_for_the_memory_is_a_sentence(
    error: Exception, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        torch.manual_seed(5)  # the guard around the test sees that this, too, is undone
        raise error

    monkeypatch.setattr("pyautoattack.AutoAttack.run_standard_evaluation", fail)
    with pytest.raises(ResourceError, match="apgd-ce: expected room for a chunk of 8 images on cpu"):
        run(subject, tmp_path)
    assert all(parameter.requires_grad for parameter in subject.model.parameters())
