"""F1 and F2: SIGKILL at every step and moment of a run; what resumes must end in the same bytes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from tests.faults import moments, runs
from tests.faults.case import Context, Kind, Result

# 105 for each mode: the 210 of a plan (standard, free) are enough for each of its two hundred labels.
SINGLE, MULTIPLE, TIMED, PLAIN = 420, 50, 30, 20
Moment = tuple[int, str]


def kill(number: int, at: Context) -> str:
    """Numbers: one kill at a chosen moment, then two or three, then at a random time, then of the plain command."""
    if number < SINGLE:
        return _at_moments(number, 1, at)
    if number < SINGLE + MULTIPLE:
        return _at_moments(number, 2 + number % 2, at)
    if number < SINGLE + MULTIPLE + TIMED:
        return _timed(number, at)
    return _plain(number, at)


def targets(shared: Path, mode: str) -> list[Moment]:
    """Return the moments of a mode's single kills.

    With those of the plan's other precision they hold every label and every step of the two: the rarest label first,
    each at the step that had the fewest so far; what is left repeats labels at such steps.
    """
    modes = [other for other in runs.MODES if other.split()[0] == mode.split()[0]]
    each = SINGLE // len(runs.MODES)
    places: dict[str, dict[str, set[int]]] = {}
    for name in modes:
        places[name] = defaultdict(set)
        for step, label in runs.baseline(name, shared).moments:
            places[name][label].add(step)
    labels = {label for found in places.values() for label in found}
    by_rarity = sorted(labels, key=lambda label: (max(len(found[label]) for found in places.values()), label))
    found: dict[str, list[Moment]] = {name: [] for name in modes}
    hit: Counter[int] = Counter()
    turn = itertools.cycle(modes)
    for label in [*by_rarity, *reversed(by_rarity)]:
        open_ = [name for name in (next(turn), *modes) if len(found[name]) < each and places[name][label]]
        if not open_:
            continue
        step = min(places[open_[0]][label], key=lambda step: (hit[step], step))
        hit[step] += 1
        found[open_[0]].append((step, label))
    own = found[mode]
    assert len(own) == each, "too few moments"
    random.Random(0).shuffle(own)  # a slice of the cases is to hold rare and common ones
    return own


def at_moment(moment: Moment) -> moments.Events:
    def act(step: int, label: str) -> bool:
        if (step, label) == moment:
            if label.startswith("half "):
                return True
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    return moments.Events(act)


def _at_moments(number: int, times: int, at: Context) -> str:
    mode = list(runs.MODES)[number % len(runs.MODES)]
    base = runs.baseline(mode, at.shared)
    chosen = targets(at.shared, mode)
    moment = chosen[number // len(runs.MODES) % len(chosen)]
    said = killed(moment, times, runs.command(mode, at.folder / "run"), base, random.Random(number), at)
    if times == 1:
        at.noted.update(mode=mode, step=moment[0], label=moment[1])
        at.noted["labels"] = len({label for _, label in base.moments})
    return f"{mode}: {said}"


def killed(moment: Moment, times: int, words: list[str], base: runs.Baseline, draw: random.Random, at: Context) -> str:
    """Kill a run at a moment, then again while it starts anew or soon after; resume it and compare."""
    run = at.folder / "run"
    runs.begin_from(base, base.checkpoint_before(moment[0]) if at.short else 0, run)
    code = runs.train(words, run, at_moment(moment))
    assert code == -signal.SIGKILL, f"{moment}: was not reached, exit {code}: {runs.tail(at.folder / 'said.txt')}"
    found, ended = [moment], False
    for _ in range(1, times):
        nearby = [m for m in base.moments if m[0] == -1 or moment[0] <= m[0] <= moment[0] + 3]
        nearby += moments.RESUMING
        found.append(draw.choice(nearby))
        code = runs.train(words, run, at_moment(found[-1]))
        ended |= code == 0  # the moment lay before the checkpoint that it went on from
        assert code in (-signal.SIGKILL, 0), f"{found}: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    ends_alike(words, base, run, at, max(found)[0] + 1 if at.short and not ended else None)
    return "killed at " + ", then ".join(f"step {step} {label}" for step, label in found)


def ends_alike(words: list[str], base: runs.Baseline, run: Path, at: Context, after: int | None) -> None:
    """Resume to the end, or to the first checkpoint after a step, and compare."""
    until = None if after is None else base.checkpoint_after(after)
    code = runs.train(words, run, until=until)
    assert code == 0, f"resumed: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    runs.same(run, base.folder if until is None else base.snapshot(until))
    trace = moments.trace_of(run.with_name("trace.txt"))
    for step, digest in trace.items():
        assert base.trace[step] == digest, f"step {step} met other images than in the uninterrupted run"
    if not at.short:
        assert trace.keys() == base.trace.keys(), "a step is missing"


# A run at the mercy of a clock waits here, so many steps after the one that was awaited, until it is hit.
_GATE = 10


def hit_at_a_time(
    words: list[str], run: Path, step: int, number: signal.Signals, draw: random.Random, begin: int = 0
) -> tuple[int, float]:
    """Run, wait until a step has begun (0: until the process has) and some time more, and send the signal.

    begin: the step that the run goes on from. Returns exit code and that time, less than four steps' on average.
    """
    trace = run.with_name("trace.txt")

    def gate(at: int, label: str) -> bool:
        while at >= step + _GATE and label == "data 1" and moments.begun_after_a_signal(trace) is None:
            time.sleep(0.002)
        return False

    child = os.fork()
    if child == 0:
        code = 99
        try:
            runs.quiet(run.with_name("said.txt"))
            moments.install(moments.Events(gate), run, trace)
            code = runs.cli.run(words)
        except BaseException as error:
            sys.stderr.write(f"raised {error!r}\n")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    first = time.monotonic()
    while begin + (begun := moments.begun(trace)) < step:
        first = first if begun else time.monotonic()
        if os.waitpid(child, os.WNOHANG)[0]:
            raise AssertionError(f"ended before step {step}: {runs.tail(run.with_name('said.txt'))}")
        time.sleep(0.002)
    one = (time.monotonic() - first) / (begun - 1) if begun > 1 else 0.05
    seconds = draw.uniform(0, 4 * one)
    time.sleep(seconds)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seconds


def _timed(number: int, at: Context) -> str:
    mode = list(runs.MODES)[number % len(runs.MODES)]
    base = runs.baseline(mode, at.shared)
    run, draw = at.folder / "run", random.Random(number)
    words, step = runs.command(mode, run), draw.randrange(base.steps - _GATE)
    begin = base.checkpoint_before(step) if at.short else 0
    runs.begin_from(base, begin, run)
    code, seconds = hit_at_a_time(words, run, step, signal.SIGKILL, draw, begin)
    assert code == -signal.SIGKILL, f"{mode}: exit {code}: {runs.tail(at.folder / 'said.txt')}"
    ends_alike(words, base, run, at, begin + moments.begun(run.with_name("trace.txt")) + 1 if at.short else None)
    return f"{mode}: killed {seconds:.3f} s after step {step} began"


def _plain(number: int, at: Context) -> str:
    """Kill `python -m fasttht` when a checkpoint has appeared, and resume it the same way."""
    mode = list(runs.MODES)[number % len(runs.MODES)]
    base = runs.baseline(mode, at.shared)
    run, draw = at.folder / "run", random.Random(number)
    words = [sys.executable, "-m", "fasttht", *runs.command(mode, run)]
    begin = 30 if at.short else 0
    awaited = begin + runs.INTERVAL * (2 if at.short else draw.randint(2, 7))
    runs.begin_from(base, begin, run)

    def newest() -> int:
        return max((runs.checkpoint.step_of(path) for path in runs.checkpoint.listing(run)), default=0)

    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait(process, lambda: newest() > begin)
    first = time.monotonic()
    _wait(process, lambda: newest() >= awaited)
    # At most as long as two of the four or more checkpoints that are left have taken so far.
    time.sleep(draw.uniform(0, 2 * (time.monotonic() - first) / ((awaited - begin) // runs.INTERVAL - 1)))
    process.kill()
    code = process.wait()
    assert code == -signal.SIGKILL, f"{mode}: exit {code}"
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    runs.same(run, base.folder)
    return f"{mode}: plain command killed after step {awaited}"


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.005)


def reached(results: list[Result]) -> list[str]:
    """Say how many of the steps and labels of each plan single kills have hit; step -1 is before the first."""
    lines = []
    for plan in dict.fromkeys(mode.split()[0] for mode in runs.MODES):
        own = [result.noted for result in results if result.noted and result.noted["mode"].split()[0] == plan]
        if own:
            steps, labels = {note["step"] for note in own}, {note["label"] for note in own}
            lines.append(
                f"{plan}: {len(own)} single kills, at {len(steps)} of 61 steps (the start counts as one) and "
                f"{len(labels)} of {max(note['labels'] for note in own)} moments of a step"
            )
    return lines


KIND = Kind(
    "kill",
    SINGLE + MULTIPLE + TIMED + PLAIN,
    "SIGKILL, then the same command: tensors, position and rows equal the uninterrupted run's byte for byte",
    f"60 steps of a width-4 ResNet-18 on the embedded digits, standard and free, fp32 and bf16; {MULTIPLE} cases are "
    f"killed two or three times, {TIMED} at a random time, {PLAIN} as `python -m fasttht` in processes of their own",
    kill,
    summary=reached,
)
