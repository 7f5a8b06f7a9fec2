"""From what was asked to what will run: derived options filled in, impossible combinations refused. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

from fasttht.config import TrainConfig
from fasttht.errors import UsageError
from fasttht.ranges import check_sizes
from fasttht.traits import TRAITS, Traits


def passes(config: TrainConfig, epochs: float) -> int:
    """Return how many passes over the data a number of (replayed) epochs is, rounded up."""
    return math.ceil(epochs / config.attack.replay)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what is derived and refuse what cannot be; returns a new config without Nones that matter.

    Raises: UsageError naming the flag, what it expects, what it got and what to do.
    """
    config = dataclasses.replace(
        config, **{f.name: dataclasses.replace(getattr(config, f.name)) for f in dataclasses.fields(config)}
    )
    data, attack, method, optim = config.data, config.attack, config.method, config.optim
    free = attack.replay > 1
    if free and attack.steps is not None:
        raise UsageError(
            f"--replay {attack.replay}: expected no --steps beside it, got --steps {attack.steps}; "
            "free training replays minibatches instead of taking PGD steps: drop one of the two"
        )
    without_bank = TRAITS[method.objective].without_bank
    if without_bank is not None and method.bank_size == 0 and method.negatives == "bank":
        method.objective = without_bank  # type: ignore[assignment]
    traits = TRAITS[method.objective]
    _check_objective(config, traits)
    if attack.attack_bn == "batch" and attack.attack_engine not in ("auto", "eager"):
        raise UsageError(
            f"--attack-engine: expected eager beside --attack-bn batch, got {attack.attack_engine}; "
            "statistics that differ from batch to batch cannot be folded into weights"
        )
    if attack.attack_graph == "on" and (free or attack.attack_engine == "eager" or attack.attack_bn == "batch"):
        got = "--replay" if free else "--attack-engine eager" if attack.attack_bn == "eval" else "--attack-bn batch"
        raise UsageError(
            f"--attack-graph: expected auto or off beside {got}, got on; only PGD on a folded network is captured"
        )
    if attack.norm != "linf" and (free or attack.attack_start == "lattice"):
        got = "--replay" if free else "--attack-start lattice"
        raise UsageError(
            f"--norm: expected linf beside {got}, got {attack.norm}; "
            + ("free training steps along signs" if free else "l2 steps do not end on whole levels: take uniform")
        )
    if free and attack.targeted:
        raise UsageError("--replay: expected an untargeted attack, got --targeted; free training ascends on the label")
    check_ranges(config)

    prescribed = traits.attack
    if attack.eps is None:
        attack.eps = default_eps(attack.norm, free=free)
    if attack.alpha is None and attack.norm != "linf":
        attack.alpha = 2.5 * attack.eps / max((prescribed.steps or 10) if attack.steps is None else attack.steps, 1)
    elif attack.alpha is None:
        attack.alpha = attack.eps if free else attack.eps * prescribed.alpha_ratio
    if attack.attack_start == "lattice":
        for flag, length in (("--eps", attack.eps), ("--alpha", attack.alpha)):
            if free or abs(255 * length - round(255 * length)) > 1e-6:
                got = "--replay" if free else f"{255 * length:g}/255"
                raise UsageError(
                    f"{flag}: expected a whole number of 255ths in standard training beside --attack-start lattice, "
                    f"got {got}; take --attack-start uniform"
                )
    if attack.targeted is None:
        attack.targeted = prescribed.targeted and not free
    if attack.start_clean_prob is None:
        attack.start_clean_prob = prescribed.clean_prob
    if not free and attack.steps is None:
        attack.steps = prescribed.steps or 10
    if config.model.classifier is None:
        config.model.classifier = traits.classifier
    if method.bank_kind == "dataset" and method.num_negatives is None:
        method.num_negatives = 4096
    if optim.epochs is None:
        optim.epochs = 90 if free else 100
    if optim.batch_size is None:
        optim.batch_size = 2048 if free else 4096
    if optim.lr is None:
        optim.lr = 0.1 * optim.batch_size / 256
    if optim.decay_milestones is None:
        if free:  # every ceil(epochs/3/m) passes, said in epochs
            third = passes(config, optim.epochs / 3) * attack.replay
            optim.decay_milestones = (third, 2 * third)
        else:
            optim.decay_milestones = tuple(round(optim.epochs * share) for share in (0.35, 0.6, 0.9))
    _check_progressive(config)
    if config.model.init is not None:
        config.model.init = config.model.init.absolute()
    if data.data is not None:  # a run folder must be readable from any working directory
        data.data = data.data.absolute()
    if method.clean_encoder not in (None, "momentum"):
        method.clean_encoder = str(Path(method.clean_encoder).absolute())
    if optim.batch_size % optim.grad_accum_steps:
        raise UsageError(
            f"--grad-accum-steps: expected a divisor of the batch size {optim.batch_size}, got {optim.grad_accum_steps}"
        )
    if not traits.has_clean_encoder:
        method.clean_encoder = None
    elif method.clean_encoder is None and data.data is not None:
        raise UsageError(
            "--clean-encoder: expected a file, a run folder or `momentum`, got nothing; the contrastive loss pulls "
            "features to a clean encoder's: give a self-supervised one, or `momentum` for the variant of Table 7"
        )
    elif method.clean_encoder is None:
        method.clean_encoder = "momentum"
    return config


def default_eps(norm: str, *, free: bool) -> float:
    """Return the radius that is meant where none is given. Raises: UsageError for a norm that has none."""
    if norm == "l2":
        raise UsageError("--eps: expected a radius beside --norm l2, got nothing; for example --eps 3 at 224 pixels")
    return 0.06 if norm == "l2-relative" else 4 / 255 if free else 16 / 255


def _check_objective(config: TrainConfig, traits: Traits) -> None:
    """Refuse options that contradict the objective. Raises: UsageError naming the flag and what to do."""
    model, attack, method, prescribed = config.model, config.attack, config.method, traits.attack
    name, engine = method.objective, attack.attack_engine
    if attack.replay > 1 and traits.no_replay:
        raise UsageError(f"--objective {name}: expected no --replay, got --replay {attack.replay}; {traits.no_replay}")
    if attack.replay > 1 and name == "at-kl" and method.ce_on == "clean":
        raise UsageError(
            "--ce-on: expected adv or both beside --replay, got clean; delta would ascend nothing but the KL, and "
            "at-kl attacks the classification loss"
        )
    if traits.other is not None and model.classifier not in (None, traits.classifier):
        raise UsageError(
            f"--classifier: expected {traits.classifier} beside --objective {name}, got {model.classifier}; "
            f"with that classifier it is --objective {traits.other}"
        )
    if prescribed.steps is not None and attack.steps not in (None, prescribed.steps):
        raise UsageError(
            f"--steps: expected {prescribed.steps} beside --objective {name}, got {attack.steps}; "
            "for more steps take --objective at"
        )
    if prescribed.loss == "kl":
        prob = attack.start_clean_prob
        for flag, allowed, wrong, found, why in (
            ("--targeted", "no", attack.targeted, "yes", "its attack ascends a KL, which has no target class: add "
             "--no-targeted"),
            ("--attack-start", "uniform", attack.attack_start == "lattice", "lattice", "its attack starts 0.001 "
             "N(0, 1) from the image, less than a level"),
            ("--attack-bn", "eval", attack.attack_bn == "batch", "batch", "p(x) and the attack are taken in evaluation "
             "mode"),
            ("--start-clean-prob", "0", prob, f"{prob}", "at the clean image the KL has no gradient"),
        ):  # fmt: skip
            if wrong:
                raise UsageError(f"{flag}: expected {allowed} beside --objective {name}, got {found}; {why}")
    if model.denoise and model.width < 2:
        raise UsageError(
            f"--width: expected at least 2 beside --denoise, got {model.width}; its blocks halve the channels"
        )
    if model.denoise and engine not in ("auto", "eager"):
        raise UsageError(
            f"--attack-engine: expected eager beside --denoise, got {engine}; denoising blocks cannot be folded"
        )
    if method.bank_kind == "queue" and method.num_negatives is not None:
        raise UsageError(
            f"--num-negatives: expected it beside --bank-kind dataset, got {method.num_negatives} with a queue; "
            "every filled slot of a queue is a negative: take --bank-size"
        )
    if method.bank_kind == "dataset" and method.negatives == "batch":
        raise UsageError(
            "--bank-kind: expected --negatives bank or both beside dataset, got batch; a bank would not be read"
        )


def _check_progressive(config: TrainConfig) -> None:
    """Refuse a ramp of image sizes that cannot be. Raises: UsageError naming the flag and what to do."""
    size, ramp, full = config.optim.progressive_size, config.optim.progressive_epochs, config.data.img_size
    if not size:
        if ramp is not None:
            raise UsageError(
                f"--progressive-epochs: expected --progressive-size beside it, got {ramp[0]} {ramp[1]} alone; "
                "give the size to begin with"
            )
        return
    if config.attack.replay > 1:
        raise UsageError(
            f"--progressive-size: expected no --replay beside it, got --replay {config.attack.replay}; free training "
            "keeps one perturbation for the whole run, which has one shape"
        )
    if not 0 < size < full:
        raise UsageError(f"--progressive-size: expected a size below --img-size {full}, got {size}; 0 disables")
    if ramp is None:
        raise UsageError(
            f"--progressive-epochs: expected two epochs beside --progressive-size {size}, got nothing; "
            "the passes after which the size begins to grow and is --img-size"
        )
    assert config.optim.epochs is not None, "filled in above"
    if not 0 <= ramp[0] <= ramp[1] < config.optim.epochs:
        raise UsageError(
            f"--progressive-epochs: expected 0 <= begin <= end < --epochs {config.optim.epochs}, "
            f"got {ramp[0]} {ramp[1]}; the last passes must see --img-size"
        )


def check_ranges(config: TrainConfig) -> None:
    """Refuse numbers outside their ranges. Raises: UsageError naming the flag, the range and the value."""
    check_sizes(config)
    data, attack, method, optim = config.data, config.attack, config.method, config.optim
    for flag, length in (("--eps", attack.eps), ("--alpha", attack.alpha)):
        if length is not None and not length >= 0:
            raise UsageError(f"{flag}: expected at least 0, got {length:g}")
        if length is not None and length > 1 and attack.norm == "linf":
            raise UsageError(
                f"{flag}: expected a number in [0, 1] or a fraction, got {length:g}; did you mean {length:g}/255?"
            )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.run.device):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {config.run.device}")
    if not config.evaluation.eval_steps:
        raise UsageError("--eval-steps: expected one or more numbers of steps, got none; 0 is the random start alone")
    at_least: list[tuple[str, float | None, float]] = [
        ("--img-size", data.img_size, 1), ("--workers", data.workers, 0), ("--width", config.model.width, 1),
        ("--feat-dim", config.model.feat_dim, 1), ("--steps", attack.steps, 0), ("--replay", attack.replay, 1),
        ("--bank-size", method.bank_size, 0), ("--lambda-cl", method.lambda_cl, 0), ("--epochs", optim.epochs, 1),
        ("--batch-size", optim.batch_size, 1), ("--grad-accum-steps", optim.grad_accum_steps, 1),
        ("--lr", optim.lr, 0), ("--weight-decay", optim.weight_decay, 0), ("--warmup-lr", optim.warmup_lr, 0),
        ("--warmup-epochs", optim.warmup_epochs, 0), ("--decay-rate", optim.decay_rate, 0),
        ("--eval-interval", config.evaluation.eval_interval, 0), ("--scale-init", config.model.scale_init, 1),
        ("--eval-batch-size", config.evaluation.eval_batch_size, 1),
        ("--eval-restarts", config.evaluation.eval_restarts, 1), ("--seed", config.run.seed, 0),
        ("--checkpoint-interval", config.run.checkpoint_interval, 0), ("--max-bad-samples", data.max_bad_samples, 0),
        ("--num-negatives", method.num_negatives, 1), ("--trades-beta", method.trades_beta, 0),
        ("--lambda-kl", method.lambda_kl, 0), ("--lambda-alp", method.lambda_alp, 0),
        ("--jitter", data.jitter, 0), ("--lighting", data.lighting, 0),
        ("--threads", config.run.threads, 0), ("--log-interval", config.run.log_interval, 1),
        ("--checkpoint-minutes", config.run.checkpoint_minutes, 0),
        ("--checkpoint-hist", config.run.checkpoint_hist, 1), ("--eval-steps", min(config.evaluation.eval_steps), 0),
    ]  # fmt: skip
    for flag, value, low in at_least:
        if value is not None and not value >= low:
            raise UsageError(f"{flag}: expected at least {low:g}, got {value:g}")
    shares: list[tuple[str, float | None]] = [
        ("--hflip", data.hflip), ("--start-clean-prob", attack.start_clean_prob), ("--momentum", optim.momentum),
        ("--encoder-momentum", method.encoder_momentum), ("--smoothing", optim.smoothing),
        ("--model-ema-decay", optim.model_ema_decay), ("--crop-pct", data.crop_pct),
    ]  # fmt: skip
    for flag, value in shares:
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{flag}: expected a number in [0, 1], got {value:g}")
    if config.model.bn_group_size < 0 or config.model.bn_group_size == 1:
        raise UsageError(
            f"--bn-group-size: expected 0 or at least 2, got {config.model.bn_group_size}; BN has no statistics of one "
            "image"
        )
    if config.model.sync_bn and (config.model.bn_group_size or attack.attack_bn == "batch"):
        got = "--bn-group-size" if config.model.bn_group_size else "--attack-bn batch"
        raise UsageError(
            f"--sync-bn: expected it without {got}, got both; "
            + ("a group is smaller than a process's images" if config.model.bn_group_size else "processes exchange "
               "nothing inside an attack")
        )  # fmt: skip
    if not config.run.dist_timeout > 0:
        raise UsageError(f"--dist-timeout: expected a positive number of seconds, got {config.run.dist_timeout:g}")
    if not data.crop_pct > 0:
        raise UsageError("--crop-pct: expected more than 0, got 0; 1 keeps the whole short side")
    if not data.stall_timeout > 0:
        raise UsageError(f"--stall-timeout: expected a positive number of seconds, got {data.stall_timeout:g}")
    if not method.tau > 0:
        raise UsageError(f"--tau: expected a positive temperature, got {method.tau:g}")
    if not 0 < data.scale[0] <= data.scale[1] <= 1:
        raise UsageError(f"--scale: expected 0 < low <= high <= 1, got {data.scale[0]:g} {data.scale[1]:g}")
    if not 0 < data.ratio[0] <= data.ratio[1]:
        raise UsageError(f"--ratio: expected 0 < low <= high, got {data.ratio[0]:g} {data.ratio[1]:g}")
    if optim.nesterov and not optim.momentum > 0:
        raise UsageError("--momentum: expected more than 0 with Nesterov momentum, got 0; add --no-nesterov")
