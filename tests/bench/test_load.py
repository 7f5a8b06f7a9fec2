"""`fasttht bench load`: what it reports is what it measured, in turn and on the same cores; never who is faster."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import simplejpeg
import torch

from fasttht import cli
from fasttht.bench import load as bench_load
from fasttht.bench import overlap as bench_overlap
from fasttht.bench import windows as bench_windows
from fasttht.bench.commands import LOADERS, LoaderName
from fasttht.bench.load import first_batch_times, summarise, time_to_line
from fasttht.bench.overlap import measure_slowdown
from fasttht.bench.peers import NAMES, OurLoader, Repeated, _await_first, open_candidate
from fasttht.bench.windows import Window, interleave, measure_window, pinned, probe, quartiles, stage_speeds
from fasttht.pipelines import DataError
from fasttht.pipelines.backends import DECODERS, why_not
from fasttht.pipelines.beton import BetonFile
from fasttht.pipelines.beton_write import write_beton
from fasttht.pipelines.photographs import photographs
from fasttht.pipelines.samples import Sample
from fasttht.signals import Terminated

Run = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")
NUM = 24
TINY = ("--batch-size", "4", "--img-size", "16", "--windows", "2", "--window-s", "0.01", "--cpu")
FEW = (*TINY, "--workers", "1", "--no-first-batch", "--loaders")
# DALI warns about its own code where it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "train.beton"
    rows = []
    for i in range(NUM):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        jpeg = np.frombuffer(simplejpeg.encode_jpeg(pixels, 90, "RGB", "420"), np.uint8)
        rows.append((Sample("jpg", jpeg, 30, 40), i % 3))
    write_beton(path, rows, NUM)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; returns the exit code, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = cli.run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def report_of(out: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


class FakeClock:
    """A clock that only candidates move, and a diary of what they did."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def __call__(self) -> float:
        return self.now


class Fake:
    """Delivers `batch_size` images every `period` seconds of the fake clock; `error`, if any, after so many."""

    def __init__(self, name: str, clock: FakeClock, period: float, batch_size: int = 4) -> None:
        self.name, self.batch_size, self.clock, self.period = name, batch_size, clock, period
        self.spent = 0.0

    def batches(self) -> Generator[int]:
        self.clock.events.append(f"open {self.name}")
        try:
            while True:
                self.clock.now += self.period
                self.spent += self.period / 2
                yield self.batch_size
        finally:
            self.clock.events.append(f"close {self.name}")

    def seconds(self) -> dict[str, float]:
        return {"decode": self.spent}


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_a_window_counts_what_arrives_between_two_deliveries() -> None:
    clock = FakeClock()
    window = measure_window(Fake("a", clock, period=0.25), 0.6, clock)
    assert window.images == 12  # deliveries at 0.25, 0.5 and 0.75 s, the first at or after 0.6
    assert window.seconds == pytest.approx(0.75)
    assert window.stages == {"decode": pytest.approx(0.375)}  # not what was spent before the window opened
    assert clock.events == ["open a", "close a"]


def test_a_window_holds_one_batch_at_least() -> None:
    clock = FakeClock()
    assert measure_window(Fake("a", clock, period=2.0), 1e-9, clock).images == 4


def test_windows_take_turns_and_nobody_works_in_anothers() -> None:
    clock = FakeClock()
    found = interleave([Fake("a", clock, 0.5), Fake("b", clock, 0.25)], 3, 1.0, clock)
    assert clock.events == ["open a", "close a", "open b", "close b"] * 3
    assert [len(windows) for windows in found.values()] == [3, 3]
    assert {window.images / window.seconds for window in found["a"]} == {8.0}
    assert {window.images / window.seconds for window in found["b"]} == {16.0}


def test_a_window_is_closed_after_an_error() -> None:
    clock = FakeClock()

    def broken() -> float:
        raise RuntimeError("clock")

    with pytest.raises(RuntimeError, match="clock"):
        measure_window(Fake("a", clock, 1.0), 1.0, broken)
    assert clock.events == ["open a", "close a"]


def test_the_fastest_batch_size_is_kept() -> None:
    clock = FakeClock()

    class Peaked(Fake):
        def batches(self) -> Generator[int]:
            slow = 1.0 if len(clock.events) >= 6 else 8.0  # the first window of each is disturbed
            self.period = slow * {32: 1.0, 64: 0.5, 128: 4.0}[self.batch_size]
            yield from super().batches()

    candidate = Peaked("a", clock, 1.0)
    assert probe(candidate, (32, 64, 128), 1.0, clock) == {"32": 32.0, "64": 128.0, "128": 32.0}
    assert candidate.batch_size == 64


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], (5, 5, 5)),
        ([4.0, 1.0], (1.75, 2.5, 3.25)),
        ([3.0, 1.0, 2.0], (1.5, 2, 2.5)),
        ([7.0, 1.0, 3.0, 5.0, 9.0], (3, 5, 7)),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], (2.5, 4, 5.5)),
    ],
)
def test_quartiles(values: list[float], expected: tuple[float, ...]) -> None:
    assert quartiles(values) == expected


def windows_of(*speeds: int) -> list[Window]:
    return [Window(2 * speed, 2.0, {}) for speed in speeds]


def test_ratios_are_to_the_median_of_stock_ffcv() -> None:
    rows = summarise({"turbo": windows_of(30, 10, 20), "ffcv-stock": windows_of(8, 9, 7)}, workers=3)
    assert rows[0] == {
        "name": "turbo", "workers": 3, "img_per_s": 20.0, "quartiles": [15.0, 25.0], "ratio": 2.5,
        "ratio_to": "ffcv-stock", "windows": [30.0, 10.0, 20.0], "stages": {},
    }  # fmt: skip
    assert rows[1]["ratio"] == 1


def test_without_stock_ffcv_ratios_are_to_turbo_and_say_so() -> None:
    rows = summarise({"ffcv": windows_of(10), "turbo": windows_of(40)}, workers=1)
    assert [(row["ratio"], row["ratio_to"]) for row in rows] == [(0.25, "turbo"), (1.0, "turbo")]


def test_without_a_reference_there_is_no_ratio() -> None:
    (row,) = summarise({"synthetic": windows_of(10)}, workers=1)
    assert not {"ratio", "ratio_to"} & set(row)


def test_stage_speeds_are_images_over_thread_seconds() -> None:
    windows = [
        Window(30, 1.0, {"decode": 2.0, "read": 0.5, "copy": 0.0}),
        Window(10, 1.0, {"decode": 3.0, "resize": 4.0}),
    ]
    assert stage_speeds(windows) == {"decode": 8.0, "read": 80.0, "resize": 10.0}


# -- cores -------------------------------------------------------------------------------------------------------------


def affinities() -> dict[int, set[int]]:
    found = {}
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # another test's, just ending
            found[int(thread)] = os.sched_getaffinity(int(thread))
    return found


def test_every_thread_is_pinned_and_restored_also_after_an_error() -> None:
    stop = threading.Event()
    old, new = threading.Thread(target=stop.wait), threading.Thread(target=stop.wait)
    old.start()
    before = affinities()
    assert len(before) > 1
    first = min(os.sched_getaffinity(0))
    try:
        with pytest.raises(RuntimeError, match="inside"), pinned(1) as cores:  # noqa: PT012 -- looks around inside
            assert cores == 1
            new.start()
            inside = affinities()
            assert new.native_id in inside
            assert set(map(frozenset, inside.values())) == {frozenset({first})}
            raise RuntimeError("inside")
        after = affinities()
        assert {thread: after[thread] for thread in before if thread in after} == before
        assert after[new.native_id or 0] == os.sched_getaffinity(0), "a thread that was born there is freed too"
    finally:
        stop.set()
        old.join()
        new.join()


def test_where_cores_are_missing_all_are_used_and_it_is_said(run: Run, beton: Path) -> None:
    have = len(os.sched_getaffinity(0))
    with pinned(have + 5) as cores:
        assert cores == have
    wanted = have + 1
    words = ("bench", "load", "--data", beton, *TINY, "--workers", str(wanted), "--no-first-batch")
    code, out, err = run(*words, "--loaders", "synthetic")
    assert code == 0, err
    assert f"workers {wanted}: only {have} cores are there, and all of them were used" in out
    assert report_of(out)["rows"][0]["cores"] == have


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_knows_every_candidate() -> None:
    assert sorted(LOADERS) == sorted(NAMES) == sorted(get_args(LoaderName))


def test_the_last_line_is_the_report(run: Run, beton: Path) -> None:
    before, threads = affinities(), torch.get_num_threads()
    words = ("bench", "load", "--data", beton.parent, *FEW, "turbo", "dali-gpu", "synthetic", "torchvision-cuda")
    code, out, err = run(*words, "--output", "rows.json")
    assert code == 0, err
    after = affinities()
    assert {thread: after[thread] for thread in before if thread in after} == before
    assert torch.get_num_threads() == threads
    report = report_of(out)
    assert report["bench"] == "load"
    assert report["env"]["torch"] == torch.__version__
    assert report["env"]["cores"] == len(os.sched_getaffinity(0))
    assert {"simplejpeg", "ffcv", "dali", "cpu", "gpu", "date"} <= set(report["env"])
    assert report["settings"] == {
        "workers": [1], "batch_size": 4, "img_size": 16, "windows": 2, "window_s": 0.01, "device": "cpu",
    }  # fmt: skip
    data = report["data"]
    assert (data["source"], data["images"], data["median_size"]) == (str(beton.parent), NUM, [30, 40])
    assert data["mean_bytes"] == BetonFile(beton).stored()[1].mean()
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["turbo", "dali-gpu", "synthetic", "torchvision-cuda"]
    for name in ("turbo", "synthetic"):
        row = rows[name]
        assert (row["workers"], row["cores"], row["batch_size"], row["ratio_to"]) == (1, 1, 4, "turbo")
        assert len(row["windows"]) == 2
        assert row["img_per_s"] == quartiles(row["windows"])[1] > 0
        assert row["quartiles"] == [quartiles(row["windows"])[0], quartiles(row["windows"])[2]]
        assert row["ratio"] == row["img_per_s"] / rows["turbo"]["img_per_s"]
    assert {"read", "decode", "resize"} <= set(rows["turbo"]["stages"])
    assert rows["turbo"]["version"].startswith("simplejpeg ")
    for name in ("dali-gpu", "torchvision-cuda"):
        assert set(rows[name]) == {"name", "workers", "not_run"}, "no figure that was not measured"
        assert rows[name]["not_run"]
    table = " ".join(out[out.rindex("not run") :].split())
    assert all(word in table for word in ("dali-gpu", "torchvision-cuda", "CUDA device"))
    assert len(report["skipped"]) == 2
    assert all(f"not measured: {skipped}" in out for skipped in report["skipped"])
    assert not {"first_batch", "attack"} & set(report)
    assert run(*words, "--output", "rows.json")[0] == 0
    lines = Path("rows.json").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0]) == report


def test_every_decoder_has_a_row_for_each_number_of_workers(run: Run, beton: Path) -> None:
    words = ("bench", "load", "--data", beton, *TINY, "--workers", "1", "2", "--no-first-batch", "--loaders", *DECODERS)
    code, out, err = run(*words)
    assert code == 0, err
    rows = report_of(out)["rows"]
    assert [(row["name"], row["workers"]) for row in rows] == [(name, w) for w in (1, 2) for name in DECODERS]
    for row in rows:
        assert ("img_per_s" in row) != ("not_run" in row)
        if (reason := why_not(row["name"], CPU)) is not None:
            assert row["not_run"] == reason
        else:
            assert row["img_per_s"] > 0, row


@pytest.mark.slow
def test_stock_ffcv_runs_with_its_best_batch_size_and_is_the_reference(run: Run, beton: Path) -> None:
    pytest.importorskip("ffcv", reason='the peer of this benchmark; run: pip install "fasttht[ffcv]"')
    threads = torch.get_num_threads()
    code, out, err = run("bench", "load", "--data", beton, *FEW, "ffcv-stock", "turbo")
    assert code == 0, err
    stock, turbo = report_of(out)["rows"]
    assert (stock["name"], stock["ratio"], turbo["ratio_to"]) == ("ffcv-stock", 1, "ffcv-stock")
    assert turbo["ratio"] == turbo["img_per_s"] / stock["img_per_s"]
    assert stock["version"].startswith("ffcv ")
    probed = stock["probed_batch_sizes"]
    assert sorted(map(int, probed)) == [32, 64, 128, 256]
    assert probed[str(stock["batch_size"])] == max(probed.values())
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "EpochIterator"]


def test_a_peer_that_fails_is_not_run_with_its_words(run: Run, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: OurLoader) -> Generator[int]:
        if self.name == "ffcv":
            raise OSError("no such\nlibrary")
        yield from batches(self)

    batches = OurLoader.batches
    monkeypatch.setattr(OurLoader, "batches", fails)
    monkeypatch.setattr("fasttht.bench.load.unable", lambda name, device: None)
    code, out, err = run("bench", "load", "--data", beton, *FEW, "turbo", "ffcv", "torchvision-cuda")
    assert code == 0, err
    turbo, ffcv, torchvision = report_of(out)["rows"]
    assert turbo["img_per_s"] > 0
    assert ffcv == {"name": "ffcv", "workers": 1, "not_run": "OSError: no such library"}
    assert "img_per_s" not in torchvision
    assert torchvision["not_run"]


def test_an_error_of_our_own_is_a_bug_and_frees_the_cores(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: OurLoader) -> Generator[int]:
        assert len(os.sched_getaffinity(0)) == 1
        raise RuntimeError("bug")

    monkeypatch.setattr(OurLoader, "batches", fails)
    before, threads = affinities(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="bug"):
        cli.run(["bench", "load", "--data", str(beton), *FEW, "turbo"])
    after = affinities()
    assert {thread: after[thread] for thread in before if thread in after} == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt, 130), (Terminated, 75)])
def test_bench_alone_begins_with_the_loaders_in_few_windows_on_a_cpu(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: type[KeyboardInterrupt], expected: int
) -> None:
    asked = []

    def interrupted(settings: bench_load.Settings, **_: object) -> dict[str, Any]:
        asked.append(settings)
        raise error

    monkeypatch.setattr(bench_load, "measure", interrupted)
    code, _, err = run("bench", "--cpu")
    assert (code, err) == (expected, "fasttht: stopped; nothing was kept\n")
    assert run("bench", "load", "--cpu")[0] == expected
    assert asked[0].loaders == asked[1].loaders == LOADERS
    assert asked[0].windows * asked[0].window_s * len(asked[0].workers) < 3


def test_made_up_images_are_called_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttht.pipelines.photographs._find", dict)
    monkeypatch.setattr("fasttht.pipelines.photographs.photographs", lambda: photographs(8))
    code, out, err = run("bench", "load", *FEW, "synthetic")
    assert code == 0, err
    assert report_of(out)["data"]["source"] == "made-up"
    assert "the images are noise" in out


def test_what_was_measured_before_an_end_by_force_is_kept(
    run: Run, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("bench", "load", "--data", beton, *FEW, "turbo", "--output", "rows.json")
    with monkeypatch.context() as patch:
        patch.setattr(bench_load, "_more", lambda *args: raise_(KeyboardInterrupt()))
        code, _, err = run(*words)
    assert code == 130
    assert "rows.json.partial" in err
    (row,) = json.loads(Path("rows.json.partial").read_text())["rows"]
    assert row["name"] == "turbo"
    assert row["img_per_s"] > 0
    assert run(*words)[0] == 0
    assert sorted(path.name for path in Path().glob("rows.json*")) == ["rows.json"]


def test_what_an_earlier_run_left_is_not_taken_for_what_was_measured(
    run: Run, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rows.json.partial").write_text("of an earlier run\n")
    monkeypatch.setattr(bench_load, "measure", lambda *args, **options: raise_(KeyboardInterrupt()))
    code, _, err = run("bench", "load", "--data", beton, *FEW, "turbo", "--output", "rows.json")
    assert (code, err) == (130, "fasttht: stopped; nothing was kept\n")
    assert not Path("rows.json.partial").exists()


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--loaders", "turbo", "tubro"), ("tubro", "turbo")),
        (("--workers", "0"), ("--workers", "1 or more", "got 0")),
        (("--workers", "two"), ("--workers", "two")),
        (("--batch-size", "0"), ("--batch-size", "got 0")),
        (("--img-size", "-1"), ("--img-size", "got -1")),
        (("--windows", "0"), ("--windows", "got 0")),
        (("--window-s", "0"), ("--window-s", "got 0")),
        (("--window-s", "nan"), ("--window-s", "got nan")),
        (("--window-s", "inf"), ("--window-s", "got inf")),
        (("--output", "missing/rows.json"), ("--output", "missing/rows.json")),
        (("--dta", "x"), ("--dta", "--data")),
    ],
    ids=lambda words: " ".join(words),
)
def test_wrong_words_exit_with_2(run: Run, words: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    code, out, err = run("bench", "load", *words)
    assert (code, out) == (2, "")
    assert err.startswith("fasttht: ")
    assert err.count("\n") == 1
    assert all(fragment in err for fragment in fragments), err


def test_an_unknown_benchmark_exits_with_2(run: Run) -> None:
    code, _, err = run("bench", "laod")
    assert code == 2
    assert "laod" in err


def test_data_that_are_not_there_or_damaged_exit_with_3(run: Run) -> None:
    Path("bad.beton").write_bytes(bytes(5000))
    Path("empty").mkdir()
    for data in ("missing", "empty", "bad.beton"):
        code, _, err = run("bench", "load", "--data", data, *FEW, "turbo")
        assert code == 3
        assert data in err
        assert err.count("\n") == 1


def test_refusing_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys; from fasttht import cli; print(cli.run(sys.argv[1:]), 'torch' in sys.modules)"
    words = [sys.executable, "-c", code, "bench", "load", "--windows", "0"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


# -- the first batch ---------------------------------------------------------------------------------------------------


def test_a_process_is_timed_to_its_line_or_gives_its_last_words() -> None:
    good = time_to_line("import os; print('chatter', flush=True); os.write(1, b'first batch\\n'); input()")
    assert isinstance(good, float)
    assert good > 0
    assert time_to_line("raise SystemExit('no luck')") == "no luck"
    assert "not a word" in str(time_to_line("pass"))


def test_starts_take_turns_beside_a_bare_import(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0, "broken", 5.0, 4.0, 3.0, 9.0])
    codes = []

    def timed(code: str) -> float | str:
        codes.append(code)
        return next(seconds)

    monkeypatch.setattr(bench_load, "time_to_line", timed)
    rows = first_batch_times({"a": "A", "b": "B"}, lambda what: None)
    assert rows == [
        {"name": "import torch", "seconds": 3.0, "runs": [1.0, 5.0, 3.0]},
        {"name": "a", "seconds": 4.0, "runs": [2.0, 4.0, 9.0]},
        {"name": "b", "not_run": "broken"},
    ]
    assert codes[1:3] + codes[4::2] == ["A", "B", "A", "A"]
    assert codes[0] == codes[3] == codes[5]
    assert "import os, torch" in codes[0]


@pytest.mark.slow
def test_the_time_to_the_first_batch_is_in_the_report(run: Run, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_load, "_STARTS", 1)
    code, out, err = run("bench", "load", "--data", beton.name, *TINY, "--workers", "1", "--loaders", "turbo")
    assert code == 3, "a relative path that is not there"
    os.chdir(beton.parent)
    code, out, err = run("bench", "load", "--data", beton.name, *TINY, "--workers", "1", "--loaders", "turbo")
    assert code == 0, err
    torch_row, turbo = report_of(out)["first_batch"]
    assert (torch_row["name"], turbo["name"]) == ("import torch", "turbo")
    assert turbo["seconds"] > 0
    assert "import torch" in out


# -- the attack --------------------------------------------------------------------------------------------------------


def test_the_attack_is_timed_alone_and_beside_each_decoder(run: Run, beton: Path) -> None:
    code, out, err = run("bench", "load", "--data", beton, *FEW, "turbo", "synthetic", "--slowdown")
    assert code == 0, err
    found = report_of(out)["attack"]
    assert found["alone"]["step_ms"] > 0
    (row,) = found["rows"]  # synthetic batches cost nothing: there is nothing to be beside
    assert row["name"] == "turbo"
    assert row["step_ms"] > 0
    assert row["img_per_s"] > 0
    assert row["ratio"] == row["step_ms"] / found["alone"]["step_ms"]
    assert "pgd10 on resnet18" in out


def test_attack_windows_take_turns_and_the_decoder_ends_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    clock = FakeClock()

    def make_step(*args: Any) -> Callable[[], None]:
        def step() -> None:
            decoding = [thread for thread in threading.enumerate() if thread.name == "fasttht-bench-consumer"]
            events.append("beside" if decoding else "alone")
            clock.now += 3.0 if decoding else 2.0

        return step

    monkeypatch.setattr(bench_overlap, "_attack_step", make_step)
    options: dict[str, Any] = {"workers": 1, "batch_size": 4, "img_size": 8, "windows": 2, "seconds": 4.0}
    candidate = Fake("a", FakeClock(), 1.0)
    found = measure_slowdown([candidate], CPU, **options, clock=clock)
    # Warm-up, then two steps alone and two beside, twice: 4 s hold two steps of 2 s, and two of 3 s.
    assert events == ["alone", *(["alone"] * 2 + ["beside"] * 2) * 2]
    assert found["alone"] == {"step_ms": 2000.0, "quartiles": [2000.0, 2000.0]}
    assert found["rows"][0]["step_ms"] == 3000.0
    assert found["rows"][0]["ratio"] == 1.5
    assert candidate.clock.events == ["open a", "close a"] * 2


def test_a_decoder_that_fails_beside_the_attack_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Fake):
        error: Exception = RuntimeError("no\nbatch")

        def batches(self) -> Generator[int]:
            raise self.error
            yield 0

    monkeypatch.setattr(bench_overlap, "_attack_step", lambda *args: lambda: None)
    options: dict[str, Any] = {"workers": 1, "batch_size": 4, "img_size": 8, "windows": 2, "seconds": 0.0}
    candidates = [Broken("a", FakeClock(), 1.0), Fake("b", FakeClock(), 1.0)]
    rows = measure_slowdown(candidates, CPU, **options)["rows"]
    assert rows[0] == {"name": "a", "not_run": "RuntimeError: no batch"}
    assert rows[1]["step_ms"] > 0
    Broken.error = DataError("the data")
    with pytest.raises(DataError, match="the data"):
        measure_slowdown(candidates, CPU, **options)


def test_an_error_of_the_attack_is_not_the_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        if any(thread.name == "fasttht-bench-consumer" for thread in threading.enumerate()):
            raise RuntimeError("attack")

    monkeypatch.setattr(bench_overlap, "_attack_step", lambda *args: broken)
    options: dict[str, Any] = {"workers": 1, "batch_size": 4, "img_size": 8, "windows": 1, "seconds": 0.0}
    candidate = Fake("a", FakeClock(), 1.0)
    with pytest.raises(RuntimeError, match="attack"):
        measure_slowdown([candidate], CPU, **options)
    assert candidate.clock.events == ["open a", "close a"]


# -- candidates --------------------------------------------------------------------------------------------------------


def test_a_short_file_is_repeated_so_that_no_window_meets_the_end_of_an_epoch(beton: Path) -> None:
    file = BetonFile(beton)
    many = Repeated(file)
    assert len(many) >= 1 << 16
    assert len(many) % NUM == 0
    index = np.array([0, NUM - 1, NUM, 5 * NUM + 7])
    assert many.labels[index].tolist() == file.labels[index % NUM].tolist()
    assert [sizes.tolist() for sizes in many.sizes(index)] == [sizes.tolist() for sizes in file.sizes(index % NUM)]
    assert many.sample(5 * NUM + 7).data.tobytes() == file.sample(7).data.tobytes()
    assert many.where(NUM) == file.where(0)


def test_a_candidate_leaves_no_thread_at_work(beton: Path) -> None:
    before = set(threading.enumerate())
    candidate = open_candidate("turbo", beton, workers=2, batch_size=4, img_size=16, device=CPU)
    for _ in range(2):  # it can be opened again
        batches = candidate.batches()
        assert [next(batches) for _ in range(3)] == [4, 4, 4]
        assert set(threading.enumerate()) > before
        batches.close()
        assert set(threading.enumerate()) == before


def test_an_ffcv_thread_that_dies_ends_the_wait_for_its_batch() -> None:
    """FFCV's own `next` would wait for ever."""
    epoch: Any = threading.Thread(target=lambda: None)
    epoch.output_queue = queue.Queue()
    epoch.start()
    with pytest.raises(RuntimeError, match="thread ended"):
        _await_first(epoch)
    epoch.output_queue.put("batch")
    _await_first(epoch)


def test_the_lead_covers_every_slot_that_is_filled_before_memory_is_used_again() -> None:
    assert bench_windows._LEAD >= 6, "ours: prefetch 3, two under way, one in hand; stock FFCV: batches_ahead 3 + 2"


@pytest.mark.gpu
@pytest.mark.slow
def test_on_cuda_everything_is_measured_or_has_a_reason(run: Run, beton: Path) -> None:
    words = [word for word in TINY if word != "--cpu"]
    code, out, err = run("bench", "load", "--data", beton, *words, "--workers", "1", "--no-first-batch")
    assert code == 0, err
    report = report_of(out)
    assert report["settings"]["device"] == "cuda"
    assert report["env"]["gpu"]
    assert [row["name"] for row in report["rows"]] == list(LOADERS)
    assert all(("img_per_s" in row) != bool(row.get("not_run")) for row in report["rows"])
    assert report["attack"]["network"] == "resnet50"
    assert all(row["ratio"] > 0 for row in report["attack"]["rows"])
    if importlib.util.find_spec("torchvision") is None:
        assert "not_run" in report["rows"][-1]


def test_a_report_of_loaders_is_compared_with_an_older_one(run: Run, beton: Path, tmp_path: Path) -> None:
    words = ("bench", "load", *FEW, "synthetic", "--data", beton)
    assert run(*words, "--output", tmp_path / "old.json")[0] == 0
    code, out, err = run(*words, "--compare", tmp_path / "old.json")
    assert code == 0, err
    assert [row["name"] for row in report_of(out)["compare"]["rows"]] == ["synthetic, 1 workers"]
    other = ["2" if word == "4" else word for word in words]
    code, _, err = run(*other, "--compare", tmp_path / "old.json")
    assert code == 2
    assert "--compare: expected a report of the same settings, got batch_size 4 where this run has 2" in err
