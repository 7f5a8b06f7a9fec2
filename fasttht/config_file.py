"""Configurations on disk: presets and files read in, a run's own written out and told apart."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fasttht.config import TrainConfig, pixels_of
from fasttht.errors import CheckpointError, UsageError
from fasttht.pretrain_config import PretrainConfig
from fasttht.pretrain_config import check_ranges as check_pretrain_ranges
from fasttht.resolve import check_ranges
from fasttht.traits import TRAITS

AnyConfig = TrainConfig | PretrainConfig
_Config = TypeVar("_Config", TrainConfig, PretrainConfig)

QUICKSTART = "quickstart"

# Presets of `fasttht pretrain` begin with this; the one of the embedded digits has nothing behind it.
PRETRAIN = "pretrain"

# Options that change where or how a run is computed, but not what is computed: a resume may change them.
_NOT_IDENTITY = {
    "output", "workers", "device", "resume", "checkpoint_interval", "checkpoint_minutes", "checkpoint_hist",
    "log_interval", "eval_batch_size", "tensorboard", "attack_graph", "threads", "max_bad_samples", "stall_timeout",
    "dist_timeout",
}  # fmt: skip

# Options that nobody leaves out of what a run writes: what `resolve` fills in.
_DERIVED = {
    "eps", "alpha", "targeted", "start_clean_prob", "classifier", "epochs", "batch_size", "lr", "decay_milestones",
}  # fmt: skip


def flat(config: AnyConfig) -> dict[str, Any]:
    """Return every option by its name, without sections; paths become strings."""
    out: dict[str, Any] = {}
    for section in dataclasses.fields(config):
        for key, value in dataclasses.asdict(getattr(config, section.name)).items():
            out[key] = str(value) if isinstance(value, Path) else value
    return out


def identity(config: AnyConfig) -> dict[str, Any]:
    """Return the options that decide what a run computes: two runs with equal ones are the same run."""
    return json.loads(  # type: ignore[no-any-return]
        json.dumps({k: v for k, v in sorted(flat(config).items()) if k not in _NOT_IDENTITY})
    )


def digest(config: AnyConfig) -> str:
    """Return eight hex digits of the identity, the end of a run folder's default name."""
    return hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()[:8]


def to_toml(config: AnyConfig) -> str:
    """Return the configuration as a file that `--config` reads back to the same run."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"# {section.name}")
        for key, value in dataclasses.asdict(getattr(config, section.name)).items():
            if value is not None:
                lines.append(f"{key} = {_toml_value(key, value)}")
        lines.append("")
    return "\n".join(lines)


def pixels_text(value: float) -> str:
    """Return a pixel-space length as people write it, 16/255 where it is one, so that it parses back exactly."""
    levels = Fraction(value).limit_denominator(255 * 64)
    if float(levels) == value and 255 % levels.denominator == 0 and levels.denominator > 1:
        return f"{levels * 255}/255"
    return repr(value)


def length_text(norm: str, value: float) -> str:
    """Return eps or alpha as people write it in this norm: `16/255`, or in l2 `0.06`."""
    return pixels_text(value) if norm == "linf" else f"{value:g}"


def radius_text(config: TrainConfig) -> str:
    """Return norm and radius of a resolved configuration's attacks: `linf eps 16/255`."""
    assert config.attack.eps is not None, "the config was not resolved"
    return f"{config.attack.norm} eps {length_text(config.attack.norm, config.attack.eps)}"


def _toml_value(key: str, value: Any) -> str:
    if key in ("eps", "alpha"):
        return json.dumps(pixels_text(value))
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value("", item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value) if isinstance(value, Path) else value)


def preset_names(*, pretrain: bool = False) -> list[str]:
    """Return the names of the presets that come with the package, those of `train` or of `pretrain`."""
    files = resources.files("fasttht.presets").iterdir()
    names = sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))
    return [name for name in names if name.startswith(PRETRAIN) == pretrain]


def read_preset(name: str, *, pretrain: bool = False) -> dict[str, Any]:
    """Return the options of a preset of `train` or of `pretrain`.

    Raises: UsageError with the known names, the nearest first.
    """
    names = preset_names(pretrain=pretrain)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"--preset: expected the name of a preset, got {name}; {hint}")
    return tomllib.loads(resources.files("fasttht.presets").joinpath(f"{name}.toml").read_text())


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file.

    Raises: UsageError if there is no such file, or if it is not TOML, or has tables.
    """
    try:
        options = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config: expected a readable file, got {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, no text, or a number of too many digits
        raise UsageError(f"--config: expected TOML in {path}, got: {error}") from None
    for name, value in options.items():
        if isinstance(value, dict):
            raise UsageError(
                f"--config: expected options without tables in {path}, got a table {name}; write name = value"
            )
    return options


def from_flat(options: dict[str, Any], *, where: str) -> TrainConfig:
    """Build a configuration of `train` from options by name, as `to_toml` writes them.

    Raises: UsageError naming an option that does not exist or has a value that is none of its own.
    """
    try:
        return _fill(TrainConfig(), options)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def stored(path: Path) -> AnyConfig:
    """Read the configuration that a run wrote, of whichever command.

    Raises: CheckpointError if it is not one; OSError if it cannot be read.
    """
    config: AnyConfig
    try:
        options = tomllib.loads(path.read_text())
        if "queue_size" in options:  # an option of every pre-training, and of nothing else
            config, derived = _fill(PretrainConfig(), options), _DERIVED & {"lr"}
            check_pretrain_ranges(config)
        else:
            config, derived = _fill(TrainConfig(), options), _DERIVED
            check_ranges(config)
        missing = sorted(name for name in derived if flat(config)[name] is None)
        if missing:
            raise ValueError(f"expected a whole configuration, got none of {', '.join(missing)}")
    except (ValueError, RecursionError, UsageError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: expected the configuration that the run wrote, got another file ({said}); restore it, or give "
            "another --output"
        ) from None
    return config


def _fill(config: _Config, options: dict[str, Any]) -> _Config:
    """Set options by name, in place. Raises: ValueError naming the first that is wrong, or all that are unknown."""
    left = dict(options)
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        hints = get_type_hints(type(part))
        for option in dataclasses.fields(part):
            if option.name in left:
                setattr(part, option.name, _value_of(option.name, left.pop(option.name), hints[option.name]))
    if left:
        raise ValueError(f"expected only known options, got {', '.join(sorted(left))}")
    return config


def _value_of(name: str, value: Any, hint: Any) -> Any:
    """Return a TOML value as what the option holds. Raises: ValueError naming the option."""
    if name in ("eps", "alpha") and isinstance(value, str):
        try:
            return pixels_of(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if isinstance(value, list):
        value = tuple(value)
    if name == "objective" and value in TRAITS:  # one of somebody's own, entered there
        return value
    if not _fits(value, hint):
        words = getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
        raise ValueError(f"{name}: expected {words}, got {value!r:.80}")
    is_path = isinstance(value, str) and Path in (hint, *get_args(hint))
    return Path(value) if is_path else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand for an option of this type; a whole number may for a broken one, a text for a path."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        many = inner[-1] is Ellipsis
        each = inner[:1] * len(value) if many and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if inner:  # of two types, or of one and None
        return any(_fits(value, one) for one in inner)
    if hint is float:
        return type(value) in (int, float)
    if hint is Path:
        return isinstance(value, str | Path)
    return type(value) is hint
