"""`bench attack` and `bench step`: rows of what ran, ratios of what was timed in turn; never who is faster."""

from __future__ import annotations

import gc
import gzip
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttht import cli
from fasttht.bench import attack as bench_attack
from fasttht.bench import attack_commands, attack_peers, commands, step_commands
from fasttht.bench import step as bench_step
from fasttht.bench.calls import count_calls, peak_memory_gib
from fasttht.bench.cost import Step, model_bytes
from fasttht.bench.jobs import summarise_jobs, time_jobs
from fasttht.bench.phases import PHASES

SMALL = {
    "--arch": "resnet18", "--stem": "small", "--width": "4", "--batch-size": "4", "--img-size": "16", "--steps": "2",
    "--windows": "2",
}  # fmt: skip


def small(*words: str) -> list[str]:
    """Return a benchmark's words with those of SMALL that are not among them."""
    name, *rest = words
    missing = [word for flag, value in SMALL.items() if flag not in rest for word in (flag, value)]
    return ["bench", name, "--cpu", *missing, *rest]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a benchmark with small settings and return its last line, parsed."""

    def call(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.run(small(*words)) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return call


def test_jobs_take_turns_after_one_warm_up_each() -> None:
    calls: list[str] = []
    ticks = iter(range(100))
    jobs = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = time_jobs(jobs, torch.device("cpu"), windows=3, clock=lambda: float(next(ticks)))
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_ratios_are_of_the_same_window() -> None:
    rows = summarise_jobs({"a": [1.0, 2.0, 3.0], "b": [0.5, 2.0, 1.0]}, 10, "a")
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert rows[1]["ratio_quartiles"] == [1.5, 2.5]
    assert (rows[1]["img_per_s"], rows[1]["ms"]) == (10.0, 1000.0)


def test_attack_reports_each_engine(report: Callable[..., dict[str, Any]]) -> None:
    names = ["backward", "eager-batch", "eager", "folded", "fused"]
    found = report("attack", "--engines", *names)
    assert found["bench"] == "attack"
    assert found["settings"]["attack"] == "pgd2"
    assert [row["name"] for row in found["rows"]] == names
    assert [row["rung"] for row in found["rows"]] == ["A0", "A1", "A2", "A3", "A5"]
    first = found["rows"][0]
    for row in found["rows"]:
        assert row["ratio_to"] == "eager"
        assert row["img_per_s"] == pytest.approx(4000 / row["ms"])
        assert row["speedup"] == pytest.approx(first["ms"] / row["ms"])
        assert row["speedup_to"] == "A0"
        assert "predicted_speedup" not in row  # the byte model counts networks with the 7x7 stem
        assert row["counted_by"] == ("meta" if row["name"] == "fused" else "dispatch")
        assert row["launches_per_step"] > 20
        assert row["waits_per_step"] == 0
        assert row["gpu_mem_gib"] is None
        assert ("sign_agreement_pct" in row) == (row["name"] not in ("backward", "eager-batch"))
        assert row.get("sign_agreement_pct", 100) > 99
    assert found["rows"][2]["ratio"] == 1
    launches = [row["launches_per_step"] for row in found["rows"]]
    assert launches[0] > launches[1] >= launches[2] > launches[3] > launches[4]


@pytest.mark.parametrize("name", ["attack", "step"])
def test_cudnn_searches_for_what_is_measured_and_the_report_says_so(
    report: Callable[..., dict[str, Any]], name: str
) -> None:
    options = ("--engines", "eager") if name == "attack" else ("--attack-engine", "folded")
    assert report(name, *options, "--windows", "1")["env"]["cudnn_benchmark"] is True
    assert not torch.backends.cudnn.benchmark


def test_the_byte_models_prediction_stands_beside_the_measurement(report: Callable[..., dict[str, Any]]) -> None:
    found = report("attack", "--arch", "resnet50", "--stem", "imagenet", "--engines", "folded", "eager")
    predicted = {row["rung"]: row for row in found["rows"]}
    assert predicted["A2"]["predicted_speedup"] == predicted["A2"]["speedup"] == 1
    ratio = predicted["A2"]["predicted_mb_per_image"] / predicted["A3"]["predicted_mb_per_image"]
    assert predicted["A3"]["predicted_speedup"] == pytest.approx(ratio)
    assert 1 < ratio < 2


def test_a_peer_that_is_not_installed_is_named_and_not_a_zero(
    report: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(attack_peers, "import_module", missing)
    found = report("attack", "--engines", "eager", "torchattacks", "art")
    for row, name in zip(found["rows"][1:], ("torchattacks", "art"), strict=True):
        assert row["name"] == name
        assert "it is not installed" in row["not_run"]
        assert "img_per_s" not in row
    assert report("attack", "--engines", "art")["rows"][0]["not_run"]


@pytest.mark.parametrize("when", ["building", "warm-up", "window", "counting"])
def test_what_memory_does_not_suffice_for_leaves_the_others_rows(
    report: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    """Two runs of a job are its warm-up and its window here; the third is when it is counted."""
    make, alive = bench_attack._job, weakref.WeakSet[Any]()
    last = {"building": 0, "warm-up": 0, "window": 1, "counting": 2}[when]

    def job(name: str, *args: Any) -> Any:
        run, runs = make(name, *args), iter(range(99))

        def limited() -> torch.Tensor:
            if name == "folded" and next(runs) == last:
                raise torch.OutOfMemoryError("20 GiB more")
            return run()

        if name == "folded" and when == "building":
            raise torch.OutOfMemoryError("20 GiB more")
        alive.add(limited)
        return limited

    monkeypatch.setattr(bench_attack, "_job", job)
    found = {
        row["name"]: row for row in report("attack", "--engines", "eager", "folded", "fused", "--windows", "1")["rows"]
    }
    for name in ("eager", "fused"):
        assert found[name]["sign_agreement_pct"] > 99
    if when == "counting":
        assert found["folded"]["img_per_s"] > 0
        assert found["folded"]["not_counted"] == "out of memory"
    else:
        assert found["folded"] == {"name": "folded", "not_run": "out of memory"}
    gc.collect()
    assert not alive  # nothing of any of them is kept


def test_without_memory_for_exact_gradients_what_was_timed_is_kept(
    report: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exact(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("20 GiB more")

    monkeypatch.setattr(bench_attack, "exact_gradient", exact)
    for row in report("attack", "--engines", "backward", "eager-batch", "folded", "--windows", "1")["rows"]:
        assert row["img_per_s"] > 0
        assert row["launches_per_step"] > 20
        assert "sign_agreement_pct" not in row
        # The first two have none in any case.
        assert row.get("not_counted") == ("out of memory" if row["name"] == "folded" else None)


@pytest.mark.parametrize("name", ["attack", "step"])
def test_without_memory_for_a_trace_what_was_timed_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def span(name: str) -> None:
        raise torch.OutOfMemoryError("20 GiB more")

    monkeypatch.setattr(torch.profiler, "record_function", span)
    path = tmp_path / "trace.json"
    options = ("--engines", "eager") if name == "attack" else ("--replay", "2")
    assert cli.run(small(name, *options, "--windows", "1", "--trace", str(path))) == 0
    out = capsys.readouterr().out
    assert "not traced: out of memory" in out
    found = json.loads(out.splitlines()[-1])
    assert found["not_traced"] == "out of memory"
    assert all(row["img_per_s"] > 0 for row in found["rows"])
    assert not path.exists()


def test_each_engine_is_let_go_when_it_has_been_counted(
    report: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, count = bench_attack._job, bench_attack._counted
    alive, seen = weakref.WeakSet[Any](), list[int]()

    def job(*args: Any) -> Any:
        run = make(*args)
        alive.add(own := lambda: run())
        return own

    def counted(*args: Any) -> Any:
        seen.append(len(alive))
        return count(*args)

    monkeypatch.setattr(bench_attack, "_job", job)
    monkeypatch.setattr(bench_attack, "_counted", counted)
    report("attack", "--engines", "eager", "folded", "fused", "--windows", "1")
    assert seen == [3, 2, 1]


def test_exact_gradients_are_taken_some_images_at_a_time_in_full_precision() -> None:
    sizes: list[int] = []

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert not torch.backends.cudnn.allow_tf32
        sizes.append(len(x))
        return x * y.view(-1, 1)

    x, y = torch.arange(140.0).view(70, 2), torch.arange(70)
    assert torch.equal(bench_attack.exact_gradient(gradient, x, y), x * y.view(-1, 1))
    assert sizes == [32, 32, 6]


class FakeArt:
    """The Adversarial Robustness Toolbox as far as it is called, with an attack that asks it for every gradient."""

    __name__ = "art"

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def import_module(self, name: str) -> Any:
        return self

    def PyTorchClassifier(self, model: torch.nn.Module, **options: Any) -> Callable[..., Any]:
        assert options["input_shape"] == (3, 16, 16)
        assert (options["nb_classes"], options["clip_values"], options["device_type"]) == (1000, (0.0, 1.0), "cpu")
        weight = next(p for p in model.parameters() if p.ndim == 4 and p.shape[2] > 1)

        def gradient(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            leaf = torch.from_numpy(images).requires_grad_(True)
            self.seen.append((leaf.is_contiguous(), weight.is_contiguous()))
            loss = options["loss"](model(leaf), torch.from_numpy(labels))
            found: np.ndarray[Any, Any] = torch.autograd.grad(loss, leaf)[0].numpy()
            return found

        return gradient

    def ProjectedGradientDescentPyTorch(self, gradient: Callable[..., Any], **options: Any) -> Any:
        assert options["max_iter"] in (1, 2, 3)
        assert (options["num_random_init"], options["batch_size"]) == (0, 4)
        outer = self

        class Attack:
            def generate(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                x_adv = images.copy()
                for _ in range(options["max_iter"]):
                    x_adv += options["eps_step"] * np.sign(gradient(x_adv, labels))
                    x_adv = np.clip(np.clip(x_adv, images - options["eps"], images + options["eps"]), 0, 1)
                assert outer.seen
                return x_adv.astype(np.float32)

        return Attack()


@pytest.fixture
def art(monkeypatch: pytest.MonkeyPatch) -> FakeArt:
    art = FakeArt()
    monkeypatch.setattr(attack_peers, "import_module", art.import_module)
    return art


def test_a_peer_is_tried_in_four_layouts_and_ends_at_the_same_images(
    art: FakeArt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the median of three short attacks: the third layout has the fastest one, and the second is the fastest."""
    tried: dict[str, int] = {}

    def timed(jobs: dict[str, Callable[[], Any]], device: torch.device, *, windows: int) -> dict[str, list[float]]:
        for name, job in jobs.items():
            before = len(art.seen)
            job()
            tried[name] = len(art.seen) - before
        seconds = iter([[5.0, 5.0, 5.0], [4.0, 3.0, 3.0], [1.0, 9.0, 9.0], [5.0, 5.0, 5.0]])
        assert windows == 3
        return {name: next(seconds) for name in jobs}

    monkeypatch.setattr(attack_peers, "time_jobs", timed)
    settings = bench_attack.Settings(
        engines=(), arch="resnet18", stem="small", width=4, batch_size=4, img_size=16, steps=3, windows=1, cpu=True
    )
    model, x, y = bench_attack.subject(settings, torch.device("cpu"))
    threat = bench_attack.Threat(eps=4 / 255, alpha=1 / 255, steps=3, start="clean")
    expected = bench_attack._job("eager", model, x, y, threat)()
    attack = bench_attack._job("art", model, x, y, threat)
    assert list(tried.values()) == [2] * 4  # short ones
    assert {weights for _, weights in art.seen} == {True, False}
    assert all(images for images, _ in art.seen)  # NumPy's arrays are contiguous; the network lays them out
    art.seen.clear()
    assert ((attack() - expected).abs() > 1e-6).double().mean() < 0.01
    assert len(art.seen) == 3
    assert attack.layout == list(tried)[1] == "weights channels_last, images contiguous"


def test_a_peers_gradient_is_judged_by_the_first_step_of_its_own(
    report: Callable[..., dict[str, Any]], art: FakeArt
) -> None:
    row = next(row for row in report("attack", "--engines", "eager", "art")["rows"] if row["name"] == "art")
    assert row["sign_agreement_pct"] > 99
    assert 0 <= row["zero_grad_pct"] < 1
    assert row["layout"].startswith("weights ")


def test_all_engines_end_the_attack_at_the_same_images() -> None:
    settings = bench_attack.Settings(
        engines=(), arch="resnet18", stem="small", width=4, batch_size=4, img_size=16, steps=3, windows=1, cpu=True
    )
    model, x, y = bench_attack.subject(settings, torch.device("cpu"))
    threat = bench_attack.Threat(eps=4 / 255, alpha=1 / 255, steps=3)
    expected = bench_attack._job("eager", model, x, y, threat)()
    assert (expected - x).abs().max() > 0
    for name in ("folded", "fused"):
        found = bench_attack._job(name, model, x, y, threat)()
        assert ((found - expected).abs() > 1e-6).double().mean() < 0.01


def test_step_reports_costs_in_clean_steps(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = report("step", "--replay", "4", "--trace", str(trace))
    assert [row["name"] for row in found["rows"]] == ["clean", "that-pgd2", "that-free4"]
    assert [row["engine"] for row in found["rows"]] == [None, "folded", None]
    assert found["rows"][0]["clean_steps"] == 1
    for row in found["rows"][1:]:
        assert row["clean_steps"] == pytest.approx(1 / row["ratio"])
        assert row["clean_steps_quartiles"][0] <= row["clean_steps"] <= row["clean_steps_quartiles"][1]
    for row in found["rows"]:
        assert {phase["name"] for phase in row["phases"]} == set(PHASES)
        assert sum(phase["pct"] for phase in row["phases"]) == pytest.approx(100)
        flops = 1e9 * row["model_gflop_per_image"] * row["img_per_s"]
        assert row["mfu_pct"] == pytest.approx(100 * flops / (found["peak"]["tflops"] * 1e12))
        assert row["copy_pct"] is None  # the byte model counts networks with the 7x7 stem
        assert row["limit"] is None
        assert row["gpu_mem_gib"] is None
    gflop = {row["name"]: row["model_gflop_per_image"] for row in found["rows"]}
    assert gflop["clean"] < gflop["that-pgd2"] < gflop["that-free4"]
    assert found["hours"] is None
    assert found["copy"]["gb_per_s"] > 0
    spans = [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    assert spans.count("train_forward") == 1 + 1 + 4
    assert {"clean", "that-pgd2", "that-free4", "attack_forward", "attack_update", "optimizer", "bank"} <= set(spans)


def test_a_step_moves_the_byte_models_bytes(report: Callable[..., dict[str, Any]]) -> None:
    found = report(
        "step",
        "--arch",
        "resnet50",
        "--stem",
        "imagenet",
        "--img-size",
        "32",
        "--attack-engine",
        "fused",
        "--windows",
        "1",
    )
    for row in found["rows"]:
        assert row["copy_pct"] > 0
    per_image = [row["copy_pct"] / row["img_per_s"] for row in found["rows"]]
    clean, that = (
        model_bytes(step, "resnet50", "imagenet", 4, 32, itemsize=4)
        for step in (Step(that=False), Step(that=True, attack_steps=2, engine="fused"))
    )
    assert clean is not None
    assert that is not None
    assert per_image[1] / per_image[0] == pytest.approx(that / clean)


def test_a_report_is_compared_with_an_older_one(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    words = ("attack", "--engines", "eager", "--compare", str(path))
    old = report("attack", "--engines", "eager", "--output", str(path), "--trace", str(tmp_path / "attack.json.gz"))
    found = report(*words)["compare"]
    assert found["date"] == old["env"]["date"]
    assert [row["name"] for row in found["rows"]] == ["eager"]
    assert found["rows"][0]["ratio"] > 0
    with gzip.open(tmp_path / "attack.json.gz", "rt") as file:
        spans = [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert spans.count("attack_update") == 2
    assert cli.run(small(*words, "--steps", "3")) == 2  # another attack


def test_each_step_is_measured_on_each_rung_of_its_ladder() -> None:
    settings = bench_step.Settings(
        arch="resnet18", stem="small", width=4, batch_size=2, img_size=8, steps=1, replay=2, engine="folded",
        windows=1, step_engines=("eager", "fused"), cpu=True, probe_bytes=1000, probe_side=8,
    )  # fmt: skip
    rows = bench_step.measure(settings)["rows"]
    assert [row["name"] for row in rows] == [
        f"{kind}/{engine}" for engine in ("eager", "fused") for kind in ("clean", "that-pgd1", "that-free2")
    ]
    clean = min((row for row in rows if row["name"].startswith("clean")), key=lambda row: row["ms"])
    assert {row["ratio_to"] for row in rows} == {clean["name"]}  # the fastest clean step there is


def test_waits_are_counted_and_memory_is_not_on_a_cpu() -> None:
    cpu, x = torch.device("cpu"), torch.ones(5, 64, 2, 2)

    def job() -> None:
        float((x + 1).sum())

    assert count_calls(job, cpu).per(2) == {
        "launches_per_step": 1.5, "waits_per_step": 0.5, "kernels_per_step": None, "counted_by": "dispatch",
    }  # fmt: skip
    assert peak_memory_gib(job, cpu) is None


def test_without_a_subcommand_all_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    for module, name in (
        (commands, "load"), (attack_commands, "attack"), (step_commands, "step"), (step_commands, "kernels")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda name=name, **options: calls.append((name, options)) or 0)
    assert cli.run(["bench", "--cpu", "--output", str(tmp_path / "all.json")]) == 0
    assert [name for name, _ in calls] == ["load", "attack", "step", "kernels"]
    assert all(options["cpu"] and options["output"] == tmp_path / "all.json" for _, options in calls)
    assert all(options["batch_size"] == 2 for name, options in calls if name != "load")
    monkeypatch.setattr(step_commands, "step", lambda **options: 130)
    calls.clear()
    assert cli.run(["bench", "--cpu"]) == 130
    assert [name for name, _ in calls] == ["load", "attack"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("attack", "--windows", "0"), "--windows: expected 1 or more, got 0"),
        (("step", "--replay", "1"), "--replay: expected 2 or more, got 1"),
        (("attack", "--engines", "none"), "none"),
        (("attack", "--trace", "missing/trace.json"), "--trace: expected a file in an existing folder"),
        (("step", "--trace", "trace.txt"), "--trace: expected a name that ends in .json or .json.gz, got trace.txt"),
        (("step", "--compare", "missing.json"), "--compare: expected a report that can be read"),
        (("step", "--step-engine", "none"), 'Invalid value "none" for --step-engine'),
        (("step", "--preset", "that-r152-pgd10"), "--arch: expected resnet152 beside --preset that-r152-pgd10"),
    ],
)
def test_bad_words_exit_with_2(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
