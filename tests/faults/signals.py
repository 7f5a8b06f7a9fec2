"""F3: SIGTERM, SIGINT and SIGUSR2 at any moment: exit 75 or 130 before another step begins, then the same bytes."""

from __future__ import annotations

import os
import random
import signal

from tests.faults import kill, moments, runs
from tests.faults.case import Context, Kind

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
AT_MOMENTS, TIMED = 70, 30
# Moments inside of these are drawn more often than their number would have it.
PLACES = (
    "enter train_forward", "enter attack_update", "batch", "save", "tensors", "fsync", "SGD", "open", "evaluation", "",
)  # fmt: skip


def stop(number: int, at: Context) -> str:
    """Signal a run at a moment (the first 70), or at a random time, and resume it."""
    mode = list(runs.MODES)[(number + number // len(PLACES)) % len(runs.MODES)]  # each place meets each mode
    return f"{mode}: " + signalled(mode, number, at, timed=number >= AT_MOMENTS)


def signalled(mode: str, number: int, at: Context, *, timed: bool) -> str:
    """Signal a mode's run, check that it ends as it should, and resume it."""
    base = runs.baseline(mode, at.shared)
    run, sent = at.folder / "run", NUMBERS[number // len(PLACES) % len(NUMBERS)]
    words, draw = runs.command(mode, run), random.Random(number)
    expected = 130 if sent == signal.SIGINT else 75
    if timed:
        step = draw.randint(1, base.steps - kill._GATE - 1)
        begin = base.checkpoint_before(step) if at.short else 0
        runs.begin_from(base, begin, run)
        code, seconds = kill.hit_at_a_time(words, run, step, sent, draw, begin)
        what = f"{sent.name} {seconds:.3f} s after step {step} began"
        assert code == expected, f"{what}: exit {code}: {runs.tail(at.folder / 'said.txt')}"
        # The step whose images were being fetched is still taken: they count as delivered.
        late = moments.begun_after_a_signal(run.with_name("trace.txt"))
        assert late in (0, 1), f"{what}: {late} steps began after it"
        after = begin + moments.begun(run.with_name("trace.txt")) + 1 if at.short else None
        kill.ends_alike(words, base, run, at, after)
        return f"{what}, exit {code}, {late} steps after it"
    place = PLACES[number % len(PLACES)]
    moment = draw.choice([m for m in base.moments if place in m[1] and "half" not in m[1]] or base.moments)
    runs.begin_from(base, base.checkpoint_before(moment[0]) if at.short else 0, run)

    def act(step: int, label: str) -> bool:
        if (step, label) == moment:
            os.kill(os.getpid(), sent)
        return False

    code = runs.train(words, run, moments.Events(act))
    finished = '"final"' in (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else False
    wanted = (expected, 0) if finished else (expected,)
    assert code in wanted, f"{sent.name} at {moment}: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    trace = run.with_name("trace.txt")
    steps = moments.trace_of(trace).keys() if trace.exists() else set()
    # A batch that has come belongs to the step after; before the first step of all, nothing is lost by taking it.
    last = moment[0] + moment[1].startswith(("batch", "leave data_wait"))
    late_ones = [step for step in steps if step > max(last, 1)]
    assert not late_ones, f"{sent.name} at {moment}: step {late_ones[0]} began after it"
    kill.ends_alike(words, base, run, at, moment[0] + 1 if at.short else None)
    return f"{sent.name} at step {moment[0]} {moment[1]}, exit {code}"


KIND = Kind(
    "signal",
    AT_MOMENTS + TIMED,
    "SIGTERM, SIGUSR2 (exit 75) or SIGINT (130), in attacks, evaluations, checkpoints: no further step but the one "
    "whose images were being fetched; then as kill",
    f"the runs of kill; {TIMED} cases are signalled at a random time",
    stop,
)
