"""Preemption of runs that torchrun started: the real torchrun, with two processes, and the batch script beside it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttht import checkpoint, preemption, signals
from fasttht.run_folder import RunFolder
from tests.ranks import commands, free_port

ROOT = Path(__file__).parents[1]
TINY = [
    "--width", "4", "--batch-size", "96", "--bank-size", "64", "--eval-steps", "1", "--threads", "1", "--workers", "1",
    "--warmup-epochs", "1", "--log-interval", "1", "--replay", "1", "--steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write the digits once, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        from fasttht.pipelines.splits import open_splits

        open_splits(None)
        yield


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_step(run: Path) -> int:
    rows = RunFolder(run).rows()
    return int(rows[-1]["step"]) if rows else 0


def test_the_script_for_several_gpus_requeues_a_preempted_run_and_goes_on(tmp_path: Path) -> None:
    """The signal of a batch system to torchrun: all workers save one step and exit; torchrun ends with 1."""
    run, script = tmp_path / "run", ROOT / "examples" / "slurm_multi_gpu.sh"
    stubs = {
        "srun": 'echo $$ > "{0}/pid"; exec "$@"',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "{0}/requeued"; fi',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text("#!/bin/sh\n" + text.replace("{0}", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    job = str(free_port() % 10000)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip
    for restart, number in enumerate((signal.SIGUSR2, signal.SIGTERM)):
        before = last_step(run)
        words = ["bash", str(script), str(run), "--epochs", "400", *TINY]
        process = subprocess.Popen(
            words, env={**environment, "SLURM_RESTART_COUNT": str(restart)}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            wait_for(lambda before=before: last_step(run) > before + 1, process)
            assert not (run / preemption.MARKER).exists(), "a new launch forgets the last one's"
            os.kill(int((tmp_path / "pid").read_text()), number)
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
        assert process.returncode == 75, out + err
        assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
        (tmp_path / "requeued").unlink()
        newest = checkpoint.listing(run)[-1]
        checkpoint.verify(newest)
        assert checkpoint.read_meta(newest)["step"] == last_step(run)
        assert f"{number.name} after step {last_step(run)} of" in err
        assert ("resuming" in out) == bool(restart)
        workers = [int(pid) for pid in re.findall(r"Sending process (\d+) closing signal", err)]
        assert len(workers) == 2, err
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_workers_that_torchrun_restarts_after_a_preemption_exit_again(tmp_path: Path) -> None:
    """A signal to one worker alone: torchrun takes its 75 for a failure, and would have the run go on to its end."""
    run, script = tmp_path / "run", tmp_path / "preempted.py"
    script.write_text(
        "import os, signal\n"
        "from fasttht.train import Trainer\n"
        "plain = Trainer._step\n"
        "def step(self, item):\n"
        "    if self.state.step == 5 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    plain(self, item)\n"
        "Trainer._step = step\n"
        "from fasttht.cli import main\n"
        "main()\n"
    )
    words = ["train", "--epochs", "1", *TINY, "--output", str(run)]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
            str(script), *words,
        ],
        env=dict(os.environ), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert said.count("SIGTERM after step") == 2, said
    step = checkpoint.read_meta(checkpoint.listing(run)[-1])["step"]
    assert step in (6, 7), "the step that the signal came in, or the one after it"
    assert last_step(run) == step, "nothing was trained after it"
    assert (run / preemption.MARKER).exists()
    ranks = commands(2, tmp_path / "out", lambda rank: words)
    assert ranks.join() == [0, 0], ranks.text(0) + ranks.text(1)
    assert RunFolder(run).final() is not None
    assert not (run / preemption.MARKER).exists()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def start(run: str, restarts: int, requeued: str = "0") -> None:
        for name, value in (("RUN_ID", run), ("RESTART_COUNT", str(restarts))):
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
        monkeypatch.setenv("SLURM_RESTART_COUNT", requeued)

    return start


def test_the_marker_holds_for_the_launch_that_left_it(tmp_path: Path, started: Callable[..., None]) -> None:
    file = tmp_path / preemption.MARKER
    started("a", 0)
    preemption.mark(tmp_path, signal.SIGINT)
    assert not file.exists(), "Ctrl-C is no preemption"
    for run, restarts, requeued, holds in (
        ("a", 1, "0", True), ("a", 2, "0", True), ("a", 0, "0", False), ("b", 1, "0", False), ("a", 1, "1", False),
    ):  # fmt: skip
        started("a", 0)
        preemption.mark(tmp_path, signal.SIGTERM)
        started(run, restarts, requeued)
        assert preemption.again(tmp_path) is holds
        assert file.exists() is holds


def test_without_torchrun_there_is_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    preemption.mark(tmp_path, signal.SIGTERM)
    assert not list(tmp_path.iterdir())


def test_a_signal_before_the_first_step_leaves_the_marker_as_well(
    tmp_path: Path, started: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started("a", 0)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(signals.Terminated), preemption.marked(tmp_path / "run"):
            raise signals.Terminated("SIGTERM")
        assert (tmp_path / "run" / preemption.MARKER).exists() == (rank == "0")


def test_under_torchrun_a_signal_that_comes_twice_is_one(
    started: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems signal every process of a job, torchrun hands its own signal on: workers get both."""
    started("a", 0)
    monkeypatch.setattr(signals, "_echo_until", 0.0)
    with signals.ending(), signals.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGUSR2
        monkeypatch.setattr(signals, "_echo_until", 1.0)  # long ago
        with pytest.raises(signals.Terminated, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(signals, "_echo_until", 0.0)
    with signals.ending():
        with pytest.raises(signals.Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
