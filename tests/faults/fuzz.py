"""F7: command lines and configuration files that cannot be: exit 2, one line, no traceback, nothing written."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import signal
import string
import subprocess
import sys
import threading
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttht.config import TrainConfig
from fasttht.loop import Loop
from fasttht.pretrain_config import PretrainConfig
from tests.faults import runs
from tests.faults.case import Context, Kind

PLANNED = 2000
PLAIN_EVERY = 20  # so many cases apart, one goes through a process of its own
JUNK = [
    "x",
    "1e",
    "--",
    "1,5",
    "½",
    "1/0",
    "nan?",
    "Nothing",  # None itself is how an option without a value is written
    "true!",
    "../..",
    "\u202e1",
    "1 2",
    "{}",
    "[]",
    "'",
    '"',
    "$(id)",
    "__import__('os')",
    "a" * 5000,
    "1" * 5000 + "x",
    "\n",
    "\t",
    "é",
    "%s%n",
    "0;",
    "#",
]


def options(config: type) -> dict[str, tuple[str, object]]:
    """Return every option: flag -> name and type."""
    found = {}
    for section in dataclasses.fields(config):
        section_type = typing.get_type_hints(config)[section.name]
        for name, hint in typing.get_type_hints(section_type).items():
            found["--" + name.replace("_", "-")] = (name, hint)
    return found


TRAIN, PRETRAIN = options(TrainConfig), options(PretrainConfig)
NUMBERS = [flag for flag, (_, hint) in TRAIN.items() if hint in (int, float, int | None, float | None)]
WHOLE = [flag for flag, (_, hint) in TRAIN.items() if hint in (int, int | None)]
CHOICES = [flag for flag, (_, hint) in TRAIN.items() if typing.get_origin(hint) is typing.Literal]
BELOW = [
    "--epochs 0",
    "--batch-size 0",
    "--lr -1",
    "--width 0",
    "--img-size 0",
    "--bank-size -1",
    "--replay 0",
    "--steps -1",
    "--workers -1",
    "--tau 0",
    "--hflip 2",
    "--hflip -0.1",
    "--momentum 1.5",
    "--crop-pct 0",
    "--scale 0 1",
    "--scale 1 0.5",
    "--ratio 2 1",
    "--checkpoint-hist 0",
    "--log-interval 0",
    "--seed -1",
    "--eps -1",
    "--eps 2",
    "--eps 16",
    "--alpha 3",
    "--smoothing 2",
    "--stall-timeout 0",
    "--eval-restarts 0",
    "--eval-batch-size 0",
    "--threads -1",
    "--feat-dim 0",
    "--bn-group-size 1",
    "--lr inf",
    "--lr nan",
    "--tau nan",
    "--tau inf",
    "--weight-decay -1",
    "--warmup-epochs -1",
    "--checkpoint-minutes -1",
    "--checkpoint-minutes nan",
    "--grad-accum-steps 0",
    "--grad-accum-steps 7",
    "--eval-steps -1",
    "--scale-init 0",
    "--jitter -1",
    "--resume sometimes",
    "--device tpu",
    "--device cuda:x",
    "--num-negatives 5",
    "--replay 4 --steps 3",
    "--replay 4 --targeted",
    "--objective clean --replay 4",
    "--progressive-size 4",
]


def _typo(draw: random.Random) -> list[str]:
    flag = draw.choice(list(TRAIN))
    place = draw.randrange(2, len(flag))
    words = {
        0: flag[:place] + flag[place + 1 :],
        1: flag[:place] + draw.choice(string.ascii_letters) + flag[place:],
        2: flag + "s-",
        3: "---" + flag,
        4: flag.replace("-", "_"),
        5: "--" + "".join(draw.choices(string.printable[:62], k=9)),
    }
    wrong = words[draw.randrange(len(words))]
    known = {other.lower().replace("_", "-") for other in TRAIN} | {"--preset", "--config", "--help", "--version"}
    bare = wrong.lower().replace("_", "-")
    if len(wrong) < 4 or bare in known or (bare.startswith("--no-") and "--" + bare[5:] in known):
        wrong = "--no-such-flag"
    return [wrong, draw.choice(["1", "x", "0.5"])]


def _number(draw: random.Random) -> list[str]:
    if draw.random() < 0.4:
        return [draw.choice(WHOLE), draw.choice(["1.5", "1e-3", "nan", "inf", "-inf", *JUNK])]
    return [draw.choice(NUMBERS), draw.choice(JUNK)]


def _choice(draw: random.Random) -> list[str]:
    return [draw.choice(CHOICES), draw.choice(["none", "resnet", "", "AUTO!", *JUNK])]


def _range(draw: random.Random) -> list[str]:
    return draw.choice(BELOW).split()


def _missing(draw: random.Random) -> list[str]:
    return [draw.choice(NUMBERS + CHOICES)]


def _surplus(draw: random.Random) -> list[str]:
    return draw.choices(["surplus", "train", "12", "=", "a=b", "\u0000"[:0] + "ø"], k=draw.randint(1, 4))


def _preset(draw: random.Random) -> list[str]:
    return ["--preset", draw.choice(["quickstar", "../quickstart", "/etc/passwd", "", "that-r50", *JUNK])]


def _value(draw: random.Random) -> str:
    return draw.choice(
        ["1979-05-27", "[1, [2, [3]]]", '"x"', "{a = 1}", "[[]]", "-1", "''", "nan", "[true]", '["a", 1]']
    )


def _file(draw: random.Random) -> bytes:
    """Return a configuration file that is none."""
    name = draw.choice([TRAIN[flag][0] for flag in WHOLE])
    texts: list[Callable[[], bytes]] = [
        lambda: bytes(draw.randrange(256) for _ in range(draw.randint(1, 400))) + b"\xff=",
        lambda: f"{name} = ".encode(),
        lambda: f"{name} = [1, 2".encode(),
        lambda: f"{name} = '1979-05-27'\n".encode(),
        lambda: f"{name} = 1979-05-27\n".encode(),
        lambda: f"{name} = {{a = 1}}\n".encode(),
        lambda: f"{name} = [[1]]\n".encode(),
        lambda: f"{name} = 1\n{name} = 2\n".encode(),
        lambda: f"[{name}]\nx = 1\n".encode(),
        lambda: f"[run]\n{name} = 1\n".encode(),
        lambda: f"{name} = ".encode() + b"[" * 100_000,
        lambda: f"{name} = ".encode() + b"9" * 5000,
        lambda: f"{name} = ".encode() + b"{a=" * 2000,
        lambda: b".".join([b"a"] * 5000) + b" = 1",
        lambda: f"{name}x = 1\n".encode(),
        lambda: f"{name} = {_value(draw)}\n".encode().replace(b"-1\n", b"-7\n") + b"no_such_option = 1\n",
        lambda: "\ufeff".encode("utf-16"),
        lambda: b"\x00",
        lambda: f"{name}: 1\nobjective: !!python/object/apply:os.system ['touch pwned']\n".encode(),
        lambda: b"<<: *a",
    ]
    return draw.choice(texts)()


WRONG = (_typo, _number, _choice, _range, _missing, _surplus, _preset)


LARGE_EVERY = 8  # so many cases apart, one is a number that is too large for a machine
HUGE = (
    "10000000000000000000",
    str(2**63),
    str(2**63 - 1),
    "-" + str(2**63),
    "1" + "0" * 400,
    "1e19",
    "1e300",
    "-1e300",
)
_MORE_THREADS, _MORE_BYTES = 64, 3 * 2**30


def _large(number: int, at: Context) -> str:
    """A number that fits no machine is refused, or it works: two steps are taken, in two seconds at most."""
    draw = random.Random(number)
    flags = TRAIN if number % (3 * LARGE_EVERY) else PRETRAIN
    numeric = [
        flag for flag, (_, hint) in flags.items() if any(t in (int, float) for t in (hint, *typing.get_args(hint)))
    ]
    command, flag, value = "pretrain" if flags is PRETRAIN else "train", draw.choice(numeric), draw.choice(HUGE)
    pair = typing.get_args(flags[flag][1])[1:2] in ((float,), (int,))
    run = at.folder / "here" / "run"
    (at.folder / "here").mkdir()
    (at.folder / "victim").write_text("a user's own file\n")
    words = [command, flag, value, *([value] if pair else []), "--output", str(run)]
    for own, small in (("--width", "4"), ("--workers", "1"), ("--threads", "1")):
        words += [] if own == flag else [own, small]
    what = f"{command} {flag} {value[:24]}"
    code, out, err = runs.call(words, at.folder, _two_steps)
    if code not in (0, 77):
        line = runs.one_line((code, out, err), 2, 3, 4, 5, 6)
        assert code != 2 or not run.exists(), f"{what}: refused, and written"
    else:
        line = "works"
    found = {path.name for path in at.folder.iterdir()}
    assert found == {"here", "victim", "out.txt", "err.txt"}, f"{what}: {found}"
    assert {path.name for path in (at.folder / "here").iterdir()} <= {"run"}, f"{what}: written beside the run"
    return f"{what}: {line[:160]}"


def _two_steps() -> None:
    """Take two steps and end with 0, or with 77 where they take longer than two seconds; keep what is huge from it."""
    fit, start, here = Loop.fit, threading.Thread.start, threading.active_count()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_BYTES, resource.RLIM_INFINITY))

    def two(self: Loop[Any], **_: object) -> None:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(77))
        signal.alarm(2)
        fit(self, stop_at=2)
        os._exit(0)

    def started(self: threading.Thread) -> None:
        if threading.active_count() > here + _MORE_THREADS:
            os._exit(78)
        start(self)

    set_num_threads = torch.set_num_threads

    def set_threads(number: int) -> None:
        if number > _MORE_THREADS:
            os._exit(78)
        set_num_threads(number)

    Loop.fit = two  # type: ignore[method-assign]
    threading.Thread.start = started  # type: ignore[method-assign]
    torch.set_num_threads = set_threads


def fuzz(number: int, at: Context) -> str:
    if number % LARGE_EVERY == 1:
        return _large(number, at)
    draw = random.Random(number)
    here = at.folder / "here"
    here.mkdir()
    words, kept = _words(number, draw, at.folder)
    for path in (here,):
        os.chdir(path)
    before = sorted(at.folder.rglob("*"))
    if number % PLAIN_EVERY == 0:
        done = subprocess.run(
            [sys.executable, "-m", "fasttht", *words],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
            timeout=60,
        )
        said = done.returncode, done.stdout, done.stderr
    else:
        said = runs.call(words, at.folder, _accepts_nothing)
    line = runs.one_line(said, 2)
    written = [p for p in sorted(at.folder.rglob("*")) if p not in before and p.name not in ("out.txt", "err.txt")]
    assert not written, f"{kept}: written: {written}"
    return f"{kept}: {line[:160]}"


def _words(number: int, draw: random.Random, folder: Path) -> tuple[list[str], str]:
    command = draw.choice(["train", "train", "train", "config", "pretrain"])
    if command == "pretrain":
        wrong = draw.choice(
            [
                ["--queue-size", "0"],
                ["--nonsense", "1"],
                ["--epochs", "x"],
                ["--hue", "2"],
                ["--tau", "0"],
                ["--preset", "x"],
            ]
        )
    elif number % 4 == 3:
        path = folder / "options.toml"
        path.write_bytes(_file(draw))
        wrong = ["--config", draw.choice([str(path)] * 8 + [str(folder), str(folder / "missing.toml")])]
    elif number % 101 == 5:
        return [
            draw.choice(["trian", "Train", "", "eval --", "x" * 3000, "data", "--version=3"]),
            *draw.choices(JUNK, k=2),
        ], "command"
    else:
        wrong = draw.choice(WRONG)(draw)
    flags = draw.sample(
        [["--lr", "0.1"], ["--width", "4"], ["--log-interval", "5"], ["--no-nesterov"], ["--model-ema"]],
        draw.randint(0, 3),
    )
    fine = [word for flag in flags if flag[0] not in wrong for word in flag]
    # What comes last may lack its value.
    words = [command, *fine, *wrong]
    return words, " ".join(words)[:200]


def _accepts_nothing() -> None:
    """A line that is accepted after all must not begin to train."""

    def accepted(self: object, **_: object) -> None:
        sys.stderr.write("accepted\n")
        sys.stderr.flush()
        os._exit(77)

    Loop.fit = accepted  # type: ignore[method-assign]


KIND = Kind(
    "fuzz",
    PLANNED,
    "exit 2, one line, no traceback, nothing written; a number too large for a machine: that, exit 3 to 6, or it works",
    f"command lines and files of train, config and pretrain; every {PLAIN_EVERY}th by a Python of its own",
    fuzz,
    limit_s=60,
)
