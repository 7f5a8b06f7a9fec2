"""Every option of a run: its flag, default, unit and the value that disables it. No torch here.

Layers, later ones win: the defaults below, the preset, the configuration file, the flags. A `None` default is
derived from the others by `resolve.resolve`, which also refuses what cannot be; `fasttht config` prints the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter, Token

from fasttht.ranges import short


def parse_pixels(type_: object, tokens: Sequence[Token]) -> float:
    """Parse a pixel-space length: a fraction such as 16/255, or a number. Never `eval`.

    What is too long depends on the norm: `resolve.check_ranges` says so.
    """
    text = tokens[0].value
    try:
        value = pixels_of(text)
    except ValueError:
        got = short(text)
        raise ValueError(f"expected a number in [0, 1] or a fraction, got {got}; for example 16/255") from None
    if value < 0:
        raise ValueError(f"expected a number in [0, 1] or a fraction, got {text}")
    return value


def pixels_of(text: str) -> float:
    """Return the number that `16/255` or `0.06` is. Raises: ValueError for what is none, or not finite."""
    try:
        # Fraction alone would compute 1e999999999 digit by digit.
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ZeroDivisionError, OverflowError):
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {short(text)}")
    return value


Pixels = Annotated[float, Parameter(converter=parse_pixels, n_tokens=1)]
Many = Parameter(consume_multiple=True, negative="")
Pair = Parameter(negative="")


StepEngineName = Literal["auto", "eager", "compiled", "fused", "captured"]


def _section(title: str, order: int) -> Parameter:
    return Parameter(name="*", group=Group(title, sort_key=order))


@dataclass(kw_only=True)
class DataConfig:
    """What is trained on and how it is cut."""

    data: Path | None = None
    "Folder with train.beton and val.beton, or an image tree with train/ and val/. Default: the embedded digits."
    img_size: int = 224
    "Side of the square training image, in pixels."
    scale: Annotated[tuple[float, float], Pair] = (0.08, 1.0)
    "Range of the random crop's share of the image area; 1 1 disables random cropping."
    ratio: Annotated[tuple[float, float], Pair] = (0.75, 1.3333333333333333)
    "Range of the random crop's width over height."
    hflip: float = 0.5
    "Probability of a horizontal flip; 0 disables."
    jitter: float = 0.0
    "Brightness, contrast and saturation each change by a factor of 1 +- this, rounded to 8 bits; 0 disables."
    lighting: float = 0.0
    "Standard deviation of noise along the principal components of colour; 0 disables."
    crop_pct: float = 0.875
    "Share of the short side kept by the evaluation's centre crop."
    workers: int = 0
    "Decoding threads; 0: one per core."
    loader: Literal["auto", "turbo", "ffcv", "dali-cpu", "dali-gpu", "synthetic"] = "auto"
    "Decoder of the training images; evaluation always takes turbo. synthetic: noise on the device, to measure with."
    order: Literal["random", "paged"] = "random"
    "paged: shuffle the pages of train.beton, and images among 64 of them, for files larger than memory."
    on_bad_sample: Literal["error", "replace"] = "error"
    "What a training image does that cannot be decoded or claims over 89,478,485 pixels. replace: another one is shown."
    max_bad_samples: int = 100
    "With --on-bad-sample replace: images that may be bad; one more is an error."
    stall_timeout: float = 600.0
    "Seconds without a batch after which the run stops and says what is stuck."


@dataclass(kw_only=True)
class ModelConfig:
    """The robust encoder f."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    "Trunk."
    stem: Literal["imagenet", "small"] = "imagenet"
    "imagenet: 7x7 stride 2 and a max-pool; small: 3x3 stride 1, for images up to 64 pixels."
    width: int = 64
    "Channels of the first stage; 64 is the standard network."
    classifier: Literal["cosine", "linear"] | None = None
    "Eq. 6's cosine classifier, or a linear one. Default: cosine for that, that-no-cl and clean-con, else linear."
    scale_init: float = 16.0
    "Initial sharpness s = 1/eta of the cosine classifier; learnt, kept in [1, 100]."
    feat_dim: int = 128
    "Size of the feature head's output."
    denoise: bool = False
    "Add a feature denoising block (Xie et al. 2019) behind each of the four stages; the attack is then eager."
    bn_group_size: int = 0
    "Images that BN normalises together in training, as if on a GPU of their own (the paper: 128); 0: all it is given."
    sync_bn: bool = False
    "Of several processes: BN normalises the images of all together, as one process would, not each one's apart."
    init: Path | None = None
    "Start from these weights: a run folder, or a safetensors or PyTorch file of ours or with torchvision's names."


@dataclass(kw_only=True)
class AttackConfig:
    """The attack that is trained against. Lengths are in [0, 1] pixels: write 16/255."""

    norm: Literal["linf", "l2", "l2-relative"] = "linf"
    "Norm of --eps and --alpha. l2-relative: times each image's own l2 norm (Table 4). Under --replay linf only."
    eps: Pixels | None = None
    "Radius of the ball. Default: 16/255, under --replay 4/255; l2-relative 0.06; l2 has none."
    alpha: Pixels | None = None
    "Step size. Default: eps/4, for `fast` 1.25 eps, under --replay eps; in an l2 norm 2.5 eps/steps."
    steps: int | None = None
    "PGD steps of standard adversarial training. Default: 10; `fast` has 1. Not together with --replay."
    replay: int = 1
    "Replays of each minibatch in free adversarial training; 1 disables it (standard training)."
    targeted: bool | None = None
    "Attack a random other class. Default: yes in standard training, no under --replay, for `fast` and for `trades`."
    attack_engine: Literal["auto", "eager", "folded", "compiled", "fused"] = "auto"
    "How standard training computes input gradients; all give the same but for rounding, see attacks/engine.py."
    attack_graph: Literal["auto", "on", "off"] = "auto"
    "Replay each attack as one CUDA graph. auto: on a GPU, for the engines folded and fused."
    attack_bn: Literal["eval", "batch"] = "eval"
    "BN in the attack: running statistics, or (eager only) those of the attacked batch; neither changes the running."
    attack_start: Literal["uniform", "lattice"] = "uniform"
    "uniform: continuous noise, float32 images. lattice: whole 1/255 levels, uint8 images, exact; training only."
    start_clean_prob: float | None = None
    "Share of training minibatches whose attack starts from the clean image. Default: 0.2, for fast and trades 0."


@dataclass(kw_only=True)
class MethodConfig:
    """The objective and, where it has them, its clean encoder and memory bank.

    that: both heads (Eq. 7); that-no-cl, that-no-nce: without the contrastive loss, without the cosine classifier
    (Table 5). at: cross entropy on adversarial images; at-kl: with a KL term (Table 5); alp: with logit pairing; mbn,
    mbn-alp: clean and adversarial images with BN layers of their own; trades; fast: FGSM-RS. clean: cross entropy on
    clean images, no attack; clean-con: with the contrastive loss (R152-Con).
    """

    objective: Literal[
        "that", "that-no-cl", "that-no-nce", "at", "at-kl", "alp", "mbn", "mbn-alp", "trades", "fast", "clean",
        "clean-con",
    ] = "that"  # fmt: skip
    "What is minimised: THAT, its ablations, the paper's baselines. -no-cl: no contrastive loss; -no-nce: no cosines."
    clean_encoder: str | None = None
    "`momentum` (a slow copy of f, Table 7), or a file or run folder to load and freeze. Required for contrastive loss."
    encoder_momentum: float = 0.999
    "Momentum m of the momentum encoder: g <- m g + (1 - m) f after every update."
    tau: float = 0.2
    "Temperature of the contrastive loss (Eq. 5)."
    lambda_cl: float = 1.0
    "Weight of the contrastive loss; 0 keeps the head but gives it no gradient."
    bank_size: int = 32768
    "Clean features kept as negatives; 0 turns `that` into `at`, as in Table 6, and clean-con into clean."
    bank_kind: Literal["queue", "dataset"] = "queue"
    "queue: the newest --bank-size features; dataset: that of every training image (ImageNet: 0.7 GB), some drawn."
    num_negatives: int | None = None
    "With --bank-kind dataset: negatives drawn for each minibatch. Default: 4096."
    negatives: Literal["bank", "batch", "both"] = "bank"
    "Where Eq. 5 takes its negatives from."
    mask_same_index: bool = True
    "Never use an image's own older feature as its negative."
    trades_beta: float = 6.0
    "Weight of the KL term of `trades` (1/lambda in that paper)."
    lambda_kl: float = 1.0
    "Weight of the KL term of `at-kl`."
    lambda_alp: float = 0.5
    "Weight of the squared logit difference of `alp` and `mbn-alp`."
    ce_on: Literal["clean", "adv", "both"] = "adv"
    "Images that the cross entropy of `at-kl` sees; both: the mean of the two."


@dataclass(kw_only=True)
class OptimConfig:
    """SGD and its schedule. An epoch is a replayed one: under --replay m, m of them are one pass over the data."""

    epochs: int | None = None
    "Training length in epochs. Default: 100, under --replay 90 (ceil(90/m) passes)."
    batch_size: int | None = None
    "Images per optimizer step over all GPUs. Default: 4096, under --replay 2048."
    grad_accum_steps: int = 1
    "Split each batch into this many parts to save memory. The bank and delta see the whole batch, BN each part."
    lr: float | None = None
    "Peak learning rate. Default: 0.1 x batch/256."
    momentum: float = 0.9
    "Momentum of SGD."
    nesterov: bool = True
    "Nesterov momentum."
    weight_decay: float = 1e-4
    "Decay of convolution and linear weights; BN, biases and eta do not decay. 0 disables."
    decay_all: bool = False
    "Decay BN and biases as well, as Free's authors do."
    warmup_epochs: float = 5.0
    "Epochs of linear warm-up from --warmup-lr; 0 disables."
    warmup_lr: float = 0.0
    "Learning rate that the warm-up starts from."
    decay_milestones: Annotated[tuple[int, ...] | None, Many] = None
    "Epochs at which the rate drops. Default: 35, 60 and 90 % of --epochs, under --replay each third."
    decay_rate: float = 0.1
    "Factor of each drop."
    smoothing: float = 0.1
    "Label smoothing of the training loss, and so of what --replay's delta ascends; PGD has none. 0 disables."
    amp_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    "Type of the forward and backward passes; auto: fp16 on CUDA, fp32 on CPU. Evaluation is always fp32."
    step_engine: StepEngineName = "auto"
    "How the training forward, backward and update are computed; all equal but for rounding, see step_engine.py."
    model_ema: bool = False
    "Keep an exponential moving average of the weights, and evaluate that."
    model_ema_decay: float = 0.9998
    "Decay of the moving average; ramps up over the first updates."
    progressive_size: int = 0
    "Side of the training images at first; it grows to --img-size (progressive resolution). 0 disables."
    progressive_epochs: Annotated[tuple[int, int] | None, Pair] = None
    "With --progressive-size: passes after which the side begins to grow and is --img-size, in a line between."
    drop_last: bool = True
    "Leave the short last batch out of each pass."


@dataclass(kw_only=True)
class EvalConfig:
    """The evaluation: every held-out image once, float32, from noise, last iterate."""

    eval_steps: Annotated[tuple[int, ...], Many] = (10, 50)
    "PGD lengths to evaluate; --eval-steps 0 is noise alone."
    eval_rule: Literal["ratio", "paper"] = "ratio"
    "Step size for K steps. ratio: 2.5 eps/K; paper: max(1/255, eps/K), in an l2 norm eps/K."
    eval_restarts: int = 1
    "Random starts per attack; above 1 the worst of them for each image is reported as well, as pgd10_r5."
    eval_interval: int = 0
    "Evaluate every so many passes as well as at the end; 0 disables."
    eval_batch_size: int = 256
    "Images per evaluation batch; does not change the draws."


@dataclass(kw_only=True)
class RunConfig:
    """Where a run lives and how it reports."""

    output: Path | None = None
    "Run folder. Default: runs/NAME-HASH, so the same command finds, and resumes, its own run."
    seed: int = 0
    "Seed of the initial weights and of every draw."
    device: str = "auto"
    "cpu, cuda or cuda:N; auto: cuda if there is one, else cpu."
    threads: int = 0
    "CPU threads of torch; 0: torch's own choice. Small networks want 1: more only wait for each other."
    resume: str = "auto"
    "auto: from the newest checkpoint; never: refuse a folder with one; a path: go back to it. Once begun: as auto."
    checkpoint_interval: int = 0
    "Steps between checkpoints, beside the one after every pass; 0 disables."
    checkpoint_minutes: float = 0.0
    "Minutes after which the next step ends with a checkpoint, beside the others; 0 disables."
    checkpoint_hist: int = 2
    "Newest checkpoints kept, beside the one that --eval-interval found best (the highest lowest accuracy)."
    log_interval: int = 50
    "Steps between rows of metrics.jsonl; the only times the host waits for the device."
    tensorboard: bool = False
    "Also write tb/ (needs the `tensorboard` extra)."
    dist_timeout: float = 600.0
    "Of several processes: seconds that one may keep the others waiting, after which the run ends and names it."


@Parameter(name="*")
@dataclass(kw_only=True)
class TrainConfig:
    """All options of a run, in sections."""

    data: Annotated[DataConfig, _section("Data", 1)] = field(default_factory=DataConfig)
    model: Annotated[ModelConfig, _section("Model", 2)] = field(default_factory=ModelConfig)
    attack: Annotated[AttackConfig, _section("Attack", 3)] = field(default_factory=AttackConfig)
    method: Annotated[MethodConfig, _section("Method", 4)] = field(default_factory=MethodConfig)
    optim: Annotated[OptimConfig, _section("Optimisation", 5)] = field(default_factory=OptimConfig)
    evaluation: Annotated[EvalConfig, _section("Evaluation", 6)] = field(default_factory=EvalConfig)
    run: Annotated[RunConfig, _section("Run", 7)] = field(default_factory=RunConfig)
