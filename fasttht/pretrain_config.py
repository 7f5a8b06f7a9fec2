"""Every option of `fasttht pretrain`, as config.py has those of `train`. The defaults are MoCo v2's. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path  # noqa: F401 -- cyclopts looks up the inherited options' types here
from typing import Annotated, ClassVar, Literal

from cyclopts import Group, Parameter

from fasttht.config import DataConfig, Many, Pair, RunConfig
from fasttht.errors import UsageError
from fasttht.ranges import check_sizes


def _section(title: str, order: int) -> Parameter:
    return Parameter(name="*", group=Group(title, sort_key=order))


@dataclass(kw_only=True)
class PretrainDataConfig(DataConfig):
    """What is trained on and how the two views are made."""

    scale: Annotated[tuple[float, float], Pair] = (0.2, 1.0)
    "Range of the random crop's share of the image area; 1 1 disables random cropping."
    jitter: float = 0.4
    "Brightness, contrast and saturation each change by a factor of 1 +- this; 0 disables."
    lighting: float = 0.0
    "Standard deviation of noise along the principal components of colour; 0 disables."
    hue: float = 0.1
    "Hue turns by up to this share of the colour circle; 0 disables."
    jitter_prob: float = 0.8
    "Probability of the jitter and the hue together."
    grayscale: float = 0.2
    "Probability of losing all colour; 0 disables."
    blur: float = 0.5
    "Probability of a Gaussian blur; 0 disables."
    blur_sigma: Annotated[tuple[float, float], Pair] = (0.1, 2.0)
    "Range of the blur's standard deviation, in pixels."


@dataclass(kw_only=True)
class EncoderConfig:
    """The encoder that becomes g; f must then have the same."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    "Trunk."
    stem: Literal["imagenet", "small"] = "imagenet"
    "imagenet: 7x7 stride 2 and a max-pool; small: 3x3 stride 1, for images up to 64 pixels."
    width: int = 64
    "Channels of the first stage; 64 is the standard network."
    feat_dim: int = 128
    "Size of the projection's output."


@dataclass(kw_only=True)
class MocoConfig:
    """Momentum contrast."""

    tau: float = 0.2
    "Temperature of the contrastive loss."
    queue_size: int = 65536
    "Keys kept as negatives. The queue starts empty and fills, instead of starting with noise."
    key_momentum: float = 0.999
    "Momentum m of the key encoder: k <- m k + (1 - m) q after every update."
    shuffle_groups: int = 8
    "Groups of a batch that BN normalises apart, as on so many GPUs; the keys' are shuffled. 1 disables."
    mask_same_index: bool = False
    "Never use an image's own older key as its negative. The original does."


@dataclass(kw_only=True)
class PretrainOptimConfig:
    """SGD and its schedule."""

    epochs: int = 200
    "Passes over the data."
    batch_size: int = 256
    "Images per step, over all processes; a multiple of --shuffle-groups."
    lr: float | None = None
    "Peak learning rate. Default: 0.03 x batch/256."
    momentum: float = 0.9
    "Momentum of SGD, without Nesterov's correction."
    weight_decay: float = 1e-4
    "Decay of every parameter, BN's and biases too, as the original has it; 0 disables."
    sched: Literal["cosine", "step"] = "cosine"
    "cosine: to 0 at the end; step: times --decay-rate at each of --decay-milestones."
    decay_milestones: Annotated[tuple[int, ...] | None, Many] = None
    "With --sched step: passes at which the rate drops. Default: 60 and 80 % of --epochs."
    decay_rate: float = 0.1
    "With --sched step: factor of each drop."
    amp_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    "Type of the forward and backward passes; auto: fp16 on CUDA, fp32 on CPU."

    drop_last: ClassVar[bool] = True  # no option: a short batch would leave BN's groups without statistics


@dataclass(kw_only=True)
class KnnConfig:
    """A check of the features: each held-out image takes the class of its nearest training images."""

    knn_k: int = 20
    "Neighbours that vote, weighted by their cosine."
    eval_interval: int = 0
    "Check every so many passes as well as at the end; 0 disables."
    eval_batch_size: int = 256
    "Images per batch of the check."


@Parameter(name="*")
@dataclass(kw_only=True)
class PretrainConfig:
    """All options of a pre-training, in sections."""

    data: Annotated[PretrainDataConfig, _section("Data", 1)] = field(default_factory=PretrainDataConfig)
    model: Annotated[EncoderConfig, _section("Encoder", 2)] = field(default_factory=EncoderConfig)
    moco: Annotated[MocoConfig, _section("Momentum contrast", 3)] = field(default_factory=MocoConfig)
    optim: Annotated[PretrainOptimConfig, _section("Optimisation", 4)] = field(default_factory=PretrainOptimConfig)
    evaluation: Annotated[KnnConfig, _section("Evaluation", 5)] = field(default_factory=KnnConfig)
    run: Annotated[RunConfig, _section("Run", 6)] = field(default_factory=RunConfig)


def resolve_pretrain(config: PretrainConfig) -> PretrainConfig:
    """Fill in what is derived and refuse what cannot be; returns a new config.

    Raises: UsageError naming the flag, what it expects, what it got and what to do.
    """
    config = dataclasses.replace(
        config, **{f.name: dataclasses.replace(getattr(config, f.name)) for f in dataclasses.fields(config)}
    )
    data, moco, optim = config.data, config.moco, config.optim
    check_ranges(config)
    if optim.batch_size < 2 * moco.shuffle_groups:
        raise UsageError(
            f"--shuffle-groups: expected at least two images in each of its groups, got {moco.shuffle_groups} groups "
            f"of a batch of {optim.batch_size}; BN has no statistics of one image"
        )
    if optim.batch_size % moco.shuffle_groups:
        raise UsageError(
            f"--batch-size: expected a multiple of the {moco.shuffle_groups} --shuffle-groups, which have the same "
            f"number of images, got {optim.batch_size}; change one of them"
        )
    if not config.run.dist_timeout > 0:
        raise UsageError(f"--dist-timeout: expected a positive number of seconds, got {config.run.dist_timeout:g}")
    if optim.lr is None:
        optim.lr = 0.03 * optim.batch_size / 256
    if optim.sched == "cosine" and optim.decay_milestones is not None:
        raise UsageError("--decay-milestones: expected --sched step beside it, got cosine; drop one of the two")
    if optim.sched == "step" and optim.decay_milestones is None:
        optim.decay_milestones = tuple(round(optim.epochs * share) for share in (0.6, 0.8))
    if data.data is not None:  # a run folder must be readable from any working directory
        data.data = data.data.absolute()
    return config


def check_ranges(config: PretrainConfig) -> None:
    """Refuse numbers outside their ranges. Raises: UsageError naming the flag, the range and the value."""
    check_sizes(config)
    data, model, moco, optim, run = config.data, config.model, config.moco, config.optim, config.run
    at_least: list[tuple[str, float | None, float]] = [
        ("--img-size", data.img_size, 1), ("--workers", data.workers, 0), ("--width", model.width, 1),
        ("--max-bad-samples", data.max_bad_samples, 0), ("--jitter", data.jitter, 0), ("--lighting", data.lighting, 0),
        ("--feat-dim", model.feat_dim, 1), ("--queue-size", moco.queue_size, 1), ("--epochs", optim.epochs, 1),
        ("--shuffle-groups", moco.shuffle_groups, 1), ("--batch-size", optim.batch_size, 2), ("--lr", optim.lr, 0),
        ("--weight-decay", optim.weight_decay, 0), ("--decay-rate", optim.decay_rate, 0), ("--seed", run.seed, 0),
        ("--knn-k", config.evaluation.knn_k, 1), ("--eval-batch-size", config.evaluation.eval_batch_size, 1),
        ("--eval-interval", config.evaluation.eval_interval, 0), ("--threads", run.threads, 0),
        ("--checkpoint-interval", run.checkpoint_interval, 0), ("--checkpoint-hist", run.checkpoint_hist, 1),
        ("--log-interval", run.log_interval, 1), ("--checkpoint-minutes", run.checkpoint_minutes, 0),
    ]  # fmt: skip
    for flag, value, low in at_least:
        if value is not None and not value >= low:
            raise UsageError(f"{flag}: expected at least {low:g}, got {value:g}")
    shares = [
        ("--hflip", data.hflip), ("--crop-pct", data.crop_pct), ("--jitter-prob", data.jitter_prob),
        ("--grayscale", data.grayscale), ("--blur", data.blur), ("--momentum", optim.momentum),
        ("--key-momentum", moco.key_momentum),
    ]  # fmt: skip
    for flag, share in shares:
        if not 0 <= share <= 1:
            raise UsageError(f"{flag}: expected a number in [0, 1], got {share:g}")
    if not 0 <= data.hue <= 0.5:
        raise UsageError(f"--hue: expected a number in [0, 0.5], half the colour circle, got {data.hue:g}")
    for flag, positive in (
        ("--crop-pct", data.crop_pct), ("--stall-timeout", data.stall_timeout), ("--tau", moco.tau),
    ):  # fmt: skip
        if not positive > 0:
            raise UsageError(f"{flag}: expected more than 0, got {positive:g}")
    if not 0 < data.scale[0] <= data.scale[1] <= 1:
        raise UsageError(f"--scale: expected 0 < low <= high <= 1, got {data.scale[0]:g} {data.scale[1]:g}")
    for flag, (low, high) in (("--ratio", data.ratio), ("--blur-sigma", data.blur_sigma)):
        if not 0 < low <= high:
            raise UsageError(f"{flag}: expected 0 < low <= high, got {low:g} {high:g}")
