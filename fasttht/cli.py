"""The commands: words to a configuration, a configuration to a call, an error to an exit code. No logic.

Importing this module, parsing and validating never import torch; each command imports what it needs.
"""

from __future__ import annotations

import os
import sys
import traceback
import typing
from pathlib import Path
from typing import Annotated

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

import fasttht
from fasttht import config_file
from fasttht.bench.commands import bench_app
from fasttht.config import Many, TrainConfig
from fasttht.data_commands import data_app
from fasttht.errors import UsageError
from fasttht.eval_commands import evaluate
from fasttht.exits import code_of
from fasttht.export_commands import export
from fasttht.plot_commands import plot_app
from fasttht.pretrain_config import PretrainConfig, resolve_pretrain
from fasttht.ranges import short
from fasttht.resolve import resolve
from fasttht.signals import ending

app = App(
    name="fasttht",
    help="Train adversarially robust classifiers with Two Head Adversarial Training (THAT), fast.",
    version=fasttht.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` says what to do next
)
app.command(data_app)
app.command(bench_app)
app.command(evaluate, name="eval")
app.command(export)
app.command(plot_app)

Config = Annotated[TrainConfig, Parameter(name="*")]
Preset = Annotated[
    str | None,
    Parameter(
        help=f"Named recipe to start from: {', '.join(config_file.preset_names())}. "
        "Default: quickstart on the embedded digits, none with --data."
    ),
]
ConfigFile = Annotated[Path | None, Parameter(name="--config", help="TOML file with options, over the preset's.")]


@app.command
def train(*, preset: Preset = None, config_path: ConfigFile = None, config: Config | None = None) -> int:
    """Train a network, evaluate it, and keep everything in a run folder.

    The same command again resumes where it stopped, or prints the result of a finished run.
    Without --data it trains on 1,437 embedded handwritten digits: `fasttht train --replay 4`.
    """
    chosen = resolve(config or TrainConfig())
    if chosen.data.data is None and preset not in (None, config_file.QUICKSTART):
        raise UsageError(f"--preset {preset}: expected --data beside it, got none; the embedded digits take quickstart")
    from fasttht import log
    from fasttht.build import open_device
    from fasttht.distributed import open_world
    from fasttht.preemption import marked
    from fasttht.run_folder import RunFolder
    from fasttht.train import Trainer, default_output

    folder = RunFolder(chosen.run.output or default_output(chosen))
    device, timeout_s = open_device(chosen, several=True), chosen.run.dist_timeout
    with marked(folder.path), open_world(device, timeout_s=timeout_s) as world:
        row = world.on_main("the run folder", lambda: folder.result(chosen))
        if row is not None:
            log.say(f"{folder.path} is finished; this is its result (give another --output or --seed to train again)")
        else:
            trainer = Trainer(chosen, world=world)
            log.say(trainer.describe())
            splits = (trainer.splits.train, trainer.splits.val)
            unchecked = [str(split.path) for split in splits if not getattr(split, "has_manifest", True)]
            if unchecked:
                what = " and ".join(unchecked)
                log.say(f"{what}: no manifest, so damaged images may go unseen; see fasttht data verify")
            row = trainer.fit()
        assert row is not None, "a run that was not stopped has a final row"
        log.scores(f"{row['images']} held-out images, {config_file.radius_text(chosen)}", row)
        log.say(f"run folder: {folder.path}")
    return 0


@app.command
def pretrain(
    *,
    preset: Annotated[
        str | None,
        Parameter(
            help=f"Named recipe to start from: {', '.join(config_file.preset_names(pretrain=True))}. "
            "Default: pretrain on the embedded digits, none with --data."
        ),
    ] = None,
    config_path: ConfigFile = None,
    print_config: bool = False,
    config: Annotated[PretrainConfig | None, Parameter(name="*")] = None,
) -> int:
    """Train a clean encoder with MoCo v2, without labels, for `train --clean-encoder RUN`.

    The same command again resumes where it stopped, or prints the result of a finished run.

    Parameters
    ----------
    print_config
        Print the resolved configuration as TOML, and train nothing.
    """
    chosen = resolve_pretrain(config or PretrainConfig())
    if print_config:
        sys.stdout.write(config_file.to_toml(chosen))
        return 0
    if chosen.data.data is None and preset not in (None, config_file.PRETRAIN):
        raise UsageError(f"--preset {preset}: expected --data beside it, got none; the embedded digits take pretrain")
    from fasttht import log
    from fasttht.build import open_device
    from fasttht.distributed import open_world
    from fasttht.preemption import marked
    from fasttht.pretrain import Pretrainer, default_output
    from fasttht.run_folder import RunFolder

    folder = RunFolder(chosen.run.output or default_output(chosen))
    device, timeout_s = open_device(chosen, several=True), chosen.run.dist_timeout
    with marked(folder.path), open_world(device, timeout_s=timeout_s) as world:
        row = world.on_main("the run folder", lambda: folder.result(chosen))
        if row is None:
            trainer = Pretrainer(chosen, world=world)
            log.say(trainer.describe())
            row = trainer.fit()
        assert row is not None, "a run that was not stopped has a final row"
        top1, images = row["knn_top1"], row["images"]
        log.say(f"{chosen.evaluation.knn_k} nearest neighbours: {top1:.2f} % of {images} held-out images")
        log.say(f"next: fasttht train --clean-encoder {folder.path}")
    return 0


@app.command
def compare(
    *train_options: Annotated[str, Parameter(allow_leading_hyphen=True)],
    methods: Annotated[tuple[str, ...], Many] = ("at", "that"),
    seeds: Annotated[tuple[int, ...], Many] = (0, 1, 2),
    output: Path = Path("runs/compare"),
    eval_steps: Annotated[tuple[int, ...], Many] = (10, 50),
    eval_restarts: int = 5,
    jobs: int = 1,
) -> int:
    """Train several methods over several seeds, evaluate them alike, and test their differences image by image.

    The same command again continues: runs that are finished are not trained again. Ends with a table of mean and
    standard deviation over the seeds, and with what the images separate (McNemar's exact test on all seeds' images,
    corrected for the number of tests); the same as JSON in the output folder.

    Parameters
    ----------
    train_options
        After --: options of `fasttht train` for every run, such as -- --epochs 24.
    methods
        Objectives, each with `-free` behind it for free training (--replay 4). The first is what others are tested
        against.
    seeds
        One run of each method for each.
    output
        Folder of the run folders.
    eval_steps
        PGD lengths, untargeted.
    eval_restarts
        Random starts of each attack; the worst of them for each image is a column of its own.
    jobs
        Runs at a time.
    """
    from fasttht import log
    from fasttht.compare import Plan, cells, sentences, write_report
    from fasttht.compare import compare as run_all

    for flag, values in (("--methods", methods), ("--seeds", seeds), ("--eval-steps", eval_steps)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{flag}: expected one or more, each once, got {' '.join(map(str, values)) or 'none'}")
    if jobs < 1 or eval_restarts < 1:
        raise UsageError(f"--jobs and --eval-restarts: expected at least 1, got {jobs} and {eval_restarts}")
    plan = Plan(methods, seeds, output, eval_steps, eval_restarts, train_options, jobs)
    report = run_all(plan, log.say)
    log.table(
        f"{report['images']} held-out images, seeds {' '.join(map(str, seeds))}: top-1 %, mean and standard deviation",
        ["method", *report["rows"][0]["scores"]],
        [cells(row) for row in report["rows"]],
    )
    for sentence in sentences(report["paired"]):
        log.say(sentence)
    write_report(report, output / "compare.json")
    log.say(f"report: {output / 'compare.json'}")
    return 0


@app.command
def doctor(*, output: Path = Path("runs")) -> int:
    """Look at this machine: what is there, what is wrong, and what to type.

    Ends with 6 if something will keep a run from working, else with 0.

    Parameters
    ----------
    output
        Where run folders would lie.
    """
    from fasttht import log
    from fasttht.doctor import examine

    findings = examine(output)
    for finding in findings:
        log.say(f"{finding.status:7}  {finding.part}: {finding.text}")
        if finding.advice and finding.status != "ok":
            log.say(f"         {finding.advice}")
    return 6 if any(finding.status == "problem" for finding in findings) else 0


@app.command(name="config")
def show_config(*, preset: Preset = None, config_path: ConfigFile = None, config: Config | None = None) -> int:
    """Print the resolved configuration as TOML: what `train` with the same words would run.

    A preset for data of one's own, without --data, comes without the clean encoder that `train` will ask for.
    """
    given = config or TrainConfig()
    chosen, asked = resolve(given), given.data.data is None and given.method.clean_encoder is None
    if preset not in (None, config_file.QUICKSTART) and asked and chosen.method.clean_encoder is not None:
        chosen.method.clean_encoder = None  # the embedded digits' default, which is no one else's
        sys.stdout.write("# train asks for --data and --clean-encoder beside this\n")
    sys.stdout.write(config_file.to_toml(chosen))
    return 0


def layers(tokens: list[str]) -> list[Dict]:
    """Return the configuration layers under the flags, strongest first: the file, then the preset.

    Raises: UsageError for a preset or file that is not there.
    """
    preset, path, data = (_value(tokens, flag) for flag in ("--preset", "--config", "--data"))
    found = []
    file = config_file.read_config_file(Path(path)) if path else {}
    if path:
        found.append(Dict(file, use_commands_as_keys=False, source=path))
    pretrains = tokens[:1] == ["pretrain"]
    if preset is None and data is None and "data" not in file:
        preset = config_file.PRETRAIN if pretrains else config_file.QUICKSTART
    if preset is not None:
        options = config_file.read_preset(preset, pretrain=pretrains)
        found.append(Dict(options, use_commands_as_keys=False, source=f"preset {preset}"))
    return found


def check_whole(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse a broken number where a whole one is meant: the parser would round it. Raises: UsageError."""
    for argument in arguments:
        if int not in (argument.hint, *typing.get_args(argument.hint)):
            continue
        for token in argument.tokens:
            try:
                number = float(token.value)
            except ValueError:
                continue  # no number at all: the parser says so
            if token.value.strip("+-_0123456789") and not number.is_integer():
                raise UsageError(f"{argument.name}: expected a whole number, got {short(token.value)}")


def _value(tokens: list[str], flag: str) -> str | None:
    """Return what follows a flag, before the words are parsed: the layers below them must be known first."""
    for i, token in enumerate(tokens):
        if token == flag and i + 1 < len(tokens):
            return tokens[i + 1]
        if token.startswith(flag + "="):
            return token.removeprefix(flag + "=")
    return None


def main(tokens: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    tokens = sys.argv[1:] if tokens is None else tokens
    try:
        code = run(tokens)
    except BaseException:
        _exit_at_once(1, traceback.format_exc())
        raise
    _exit_at_once(code, "")
    sys.exit(code)


def _exit_at_once(code: int, trace: str) -> None:
    """End a process that lost the others of its group here: what it still waits for in threads will never come."""
    distributed = sys.modules.get("fasttht.distributed")
    if distributed is None or not distributed.lost:
        return
    sys.stderr.write(trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(tokens: list[str]) -> int:
    """Run one command and return its exit code; a user's mistake prints one line to stderr, no traceback."""
    try:
        with ending():
            configured = tokens[:1] in (["train"], ["config"], ["pretrain"])
            below = layers(tokens) if configured else []
            if configured and _value(tokens, "--config"):
                # A flag hides the file's value from the parser; a wrong one is to be said all the same.
                app.config = [*below[:1], check_whole]
                app.parse_args(tokens[:1], exit_on_error=False, print_error=False)
            app.config = [*below, check_whole]
            result = app(tokens, exit_on_error=False, print_error=False)
        return int(result or 0)
    except BaseException as error:
        code = code_of(error, tokens)
        if code is None:
            raise
        return code
