"""Where a signal is noted, where it is seen, and where it ends the command at once; the scripts that send them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from fasttht import guards, signals
from fasttht.errors import NonFiniteError

ROOT = Path(__file__).parents[1]
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_a_signal_is_noted_and_seen_only_where_work_may_be_abandoned(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in ALL]
    with signals.stop_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == number
        signals.check()
        with signals.interruptible(stop), pytest.raises(signals.Stopped):
            signals.check()
        signals.check()
        assert [signal.getsignal(each) for each in ALL] == before, "a second signal must not wait"
    assert [signal.getsignal(each) for each in ALL] == before


@pytest.mark.parametrize("number", ALL[1:], ids=lambda number: number.name)
def test_outside_of_a_loop_it_ends_the_command_and_inside_it_waits(number: signal.Signals) -> None:
    with signals.ending():
        with pytest.raises(signals.Terminated, match=number.name):
            os.kill(os.getpid(), number)
        with signals.stop_signals() as stop:
            os.kill(os.getpid(), number)
            assert stop.signal == number
            with pytest.raises(signals.Terminated):
                os.kill(os.getpid(), number)


def test_forked_workers_ignore_them() -> None:
    with signals.ending(), signals.stop_signals() as stop:
        child = os.fork()
        if child == 0:
            for number in ALL:
                os.kill(os.getpid(), number)
            os._exit(0 if stop.signal is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check(
    guard: guards.FiniteGuard, skipped: int, dtype: torch.dtype = torch.float16, loss: float = 1.0, steps: int = 20
) -> None:
    guard.check(9, loss, {"skipped": skipped, "steps": steps, "before_skip": 15}, 2.0, dtype, [])


def test_a_storm_of_skipped_steps_ends_the_run_and_single_ones_do_not() -> None:
    guard = guards.FiniteGuard()
    for skipped in (20, 20, 9, 0, 0, 0, 20, 20, 9, 0, 0, 0):  # 49 of any 100
        check(guard, skipped)
    guard = guards.FiniteGuard()
    for _ in range(2):
        check(guard, 20)
    with pytest.raises(NonFiniteError, match=r"step 9.*60 steps in a row.*loss scale of 2"):
        check(guard, 20)
    guard = guards.FiniteGuard()
    check(guard, 19)
    check(guard, 19)
    with pytest.raises(NonFiniteError, match="57 of the last 60 steps"):  # one good step now and then hides none
        check(guard, 19)
    with pytest.raises(NonFiniteError, match=r"^step 5: .*got .* 1 steps with a non-finite gradient up to step 9"):
        check(guards.FiniteGuard(), 1, torch.bfloat16)
    with pytest.raises(NonFiniteError, match=r"^step 9: .*got loss inf"):
        check(guards.FiniteGuard(), 0, loss=float("inf"))
    guard = guards.FiniteGuard()
    check(guard, 499, steps=1000)  # less than half of a long row
    with pytest.raises(NonFiniteError, match="500 of the last 1000 steps"):
        check(guard, 500, steps=1000)


def test_the_slurm_script_parses_and_requeues_on_the_exit_code_of_a_preemption(tmp_path: Path) -> None:
    script = ROOT / "examples" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    for name, text in (("srun", 'echo "$@" > {0}/asked; exit $CODE'), ("scontrol", 'echo "$@" > {0}/requeued')):
        (tmp_path / name).write_text("#!/bin/sh\n" + text.format(tmp_path))
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for code in (0, 5, 75):
        done = subprocess.run(
            ["bash", script, "--lr", "0.1"], env={**environment, "CODE": str(code)}, capture_output=True, check=False
        )
        assert done.returncode == code
        assert (tmp_path / "requeued").exists() == (code == 75)
    assert (tmp_path / "asked").read_text().strip().endswith("train --checkpoint-minutes 30 --lr 0.1")
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
