"""From a configuration to the objects of a run: device, data, networks, state. Nothing is written to disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from fasttht import kernels
from fasttht.config import TrainConfig
from fasttht.config_file import AnyConfig
from fasttht.distributed import SOLO, World, processes
from fasttht.errors import UsageError
from fasttht.models.clean_encoder import CleanEncoder, load_frozen
from fasttht.models.initial import load_initial_
from fasttht.models.sync_bn import synchronise_
from fasttht.models.two_head import TwoHead
from fasttht.pipelines import backends
from fasttht.pipelines.loader import Loader
from fasttht.pipelines.plan import Augment, EpochPlan
from fasttht.pipelines.samples import Paged
from fasttht.pipelines.splits import Splits
from fasttht.resolve import passes
from fasttht.schedule import ProgressiveSize, Schedule
from fasttht.signals import check
from fasttht.state import TrainState
from fasttht.traits import TRAITS

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def open_device(config: AnyConfig, *, several: bool = False) -> torch.device:
    """Return the device that the run asks for, and give torch the number of CPU threads that it asks for.

    several: whether the caller can be one of several processes; on CUDA each then has the device of its LOCAL_RANK.

    Raises: UsageError if there is no such device, or if several processes were started for what takes one.
    """
    if processes() > 1 and not several:
        raise UsageError(
            f"WORLD_SIZE: expected one process, got {processes()}; only `fasttht train`, `pretrain` and `eval` take "
            "several: start this one without torchrun"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    name = config.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes() > 1:
        name = _device_of_this_process(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {name}")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count() > 0:
        raise UsageError(
            f"--device: expected one of {torch.cuda.device_count()} CUDA devices, counted from 0, got {name}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device: expected a device that torch can use, got {name}; there is no CUDA device")
    return device


def _device_of_this_process(name: str) -> str:
    if name.startswith("cuda:"):
        raise UsageError(f"--device: expected cpu or cuda beside several processes, got {name}; each takes its own")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"LOCAL_RANK: expected one process for each of {torch.cuda.device_count()} CUDA devices, got number "
            f"{local_rank}, counted from 0; lower torchrun's --nproc-per-node"
        )
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        return f"cuda:{local_rank}"
    return name


def amp_dtype_of(config: AnyConfig, device: torch.device) -> torch.dtype:
    """Return the type of the forward and backward passes: as asked, else fp16 on CUDA and fp32 elsewhere."""
    name = config.optim.amp_dtype
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return _DTYPES[name]


def build_model(config: TrainConfig, num_classes: int, device: torch.device) -> TwoHead:
    """Build f with the weights that the seed gives, channels-last; the global RNG is left as it was."""
    settings, traits = config.model, TRAITS[config.method.objective]
    assert settings.classifier is not None, "the config was not resolved"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = TwoHead(
            settings.arch,
            num_classes,
            stem=settings.stem,
            width=settings.width,
            classifier=settings.classifier,
            scale_init=settings.scale_init,
            feat_dim=settings.feat_dim if traits.has_feature_head else None,
            denoise=settings.denoise,
            mixture_bn=traits.mixture_bn,
            bn_group_size=settings.bn_group_size,
        )
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def build_clean_encoder(config: TrainConfig, model: TwoHead) -> CleanEncoder | None:
    """Build g as `--clean-encoder` says, or return None if the objective has none."""
    if not TRAITS[config.method.objective].has_clean_encoder:
        return None
    if config.method.clean_encoder == "momentum":
        return CleanEncoder(model, frozen=False)
    assert config.method.clean_encoder is not None, "the config was not resolved"
    path = Path(config.method.clean_encoder)
    if not path.exists():
        raise UsageError(
            "--clean-encoder: expected `momentum`, a safetensors file, a MoCo v2 checkpoint or a run folder, "
            f"got {path}: not there"
        )
    return load_frozen(model, path, config.model.arch)


def describe_kernels(device: torch.device) -> str:
    """Return which implementation of the fused ops this device gets, and why.

    Raises: UsageError if FASTTHT_KERNELS asks for one that there is not.
    """
    if device.type != "cuda":
        return f"kernels torch: tensors on the {device.type.upper()} get plain torch"
    try:
        found = kernels.implementation(torch.cuda.current_device() if device.index is None else device.index)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{error}; unset it for the default") from None
    return f"kernels {found.name}: {found.reason.removesuffix('.')}"


def describe_loader(config: AnyConfig, splits: Splits, device: torch.device) -> str:
    """Return which decoder trains and why, and, if the file is larger than memory, how to read it."""
    name, reason = backends.choose(config.data.loader, device, splits.train)
    text = f"loader {name}, {_workers(config)} threads: {reason}"
    if name == "synthetic":
        text += "; its images are noise, so this run measures speed and trains nothing"
    path = splits.train.path
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.data.order == "random" and path.is_file() and path.stat().st_size > memory:
        text += f"; {path} is larger than memory: --order paged reads each part of it once per pass"
    return text


def _workers(config: AnyConfig) -> int:
    return config.data.workers or len(os.sched_getaffinity(0))


def check_parts(images: int, batch_size: int, parts: int, world: World, *, drop_last: bool) -> None:
    """Refuse parts of one image, which has no batch statistics, and ranks with other numbers of parts.

    Raises: UsageError.
    """
    for batch in [batch_size] + ([] if drop_last or not images % batch_size else [images % batch_size]):
        counts = world.counts(batch)
        sizes = [-(-count // parts) for count in counts]
        if world.size > 1 and (
            any(size < 2 or count % size == 1 for size, count in zip(sizes, counts, strict=True))
            or len({-(-count // size) for size, count in zip(sizes, counts, strict=True)}) > 1
        ):
            raise UsageError(
                f"--batch-size and --grad-accum-steps: expected as many parts on each of {world.size} processes, of at "
                f"least two images, got a batch of {batch}: {min(counts)} or {max(counts)} for each in {parts}; BN "
                "needs more: change one of them, or leave the short last batch out (--drop-last)"
            )
        if world.size == 1 and (sizes[0] == 1 or batch % sizes[0] == 1):
            raise UsageError(
                f"--batch-size and --grad-accum-steps: expected at least two images in every part, got one in a batch "
                f"of {batch}; BN needs more: change one of them, or leave the short last batch out (--drop-last)"
            )


def build_loader(
    config: AnyConfig,
    splits: Splits,
    device: torch.device,
    *,
    train: bool,
    view: int = 0,
    report: Callable[[str], None] | None = None,
    world: World = SOLO,
) -> Loader:
    """Build the training loader, or that of another view of the same images, or the evaluation loader.

    Of several ranks each has its slice of every batch: of --batch-size images in training, in evaluation of
    --eval-batch-size for each of them. The evaluation's always decodes with turbo: published numbers must not depend on
    the decoder. `report` is told of every bad image that was replaced.

    Raises: UsageError if the training split does not fill one batch, or if the loader that was asked for cannot run.
    """
    data, optim = config.data, config.optim
    assert optim.batch_size is not None, "the config was not resolved"
    samples = splits.train if train else splits.val
    name, _ = backends.choose(data.loader, device, samples) if train else ("turbo", "")
    obstacle = backends.why_not(name, device)
    if obstacle is not None:
        raise UsageError(f"--loader: expected a decoder that can run here, got {name}; {obstacle}")
    paged = train and data.order == "paged"
    if paged and not isinstance(samples, Paged):
        raise UsageError(f"--order: expected random for an image tree, got paged; write {samples.path} as .beton first")
    if train and optim.drop_last and len(samples) < optim.batch_size:
        raise UsageError(
            f"--batch-size: expected at most the {len(samples)} training images, got {optim.batch_size}; "
            "make it smaller or add --no-drop-last"
        )
    if train:
        parts = config.optim.grad_accum_steps if isinstance(config, TrainConfig) else 1
        check_parts(len(samples), optim.batch_size, parts, world, drop_last=optim.drop_last)
    plan = EpochPlan(
        num_samples=len(samples),
        batch_size=optim.batch_size if train else _eval_batch(config, len(samples), world),
        seed=config.run.seed,
        augment=Augment(scale=data.scale, ratio=data.ratio, hflip=data.hflip) if train else None,
        drop_last=train and optim.drop_last,
        crop_pct=data.crop_pct,
        rank=world.rank,
        world=world.size,
        view=view,
        pages=samples.pages if paged and isinstance(samples, Paged) else None,
    )
    return Loader(
        samples,
        plan,
        img_size=data.img_size,
        size_of=progressive_size(config) if train else None,
        device=device,
        decoder=name,
        workers=_workers(config),
        on_bad=data.on_bad_sample,
        max_bad=data.max_bad_samples,
        report=report,
        stall_s=data.stall_timeout,
        # A second view is asked for after the first one has been taken: no place to stop.
        waiting=check if not view else lambda: None,
    )


def _eval_batch(config: AnyConfig, images: int, world: World) -> int:
    """Return the images of an evaluation batch over all ranks, so that none of them has none of the last.

    Raises: UsageError if there are more ranks than images.
    """
    if images < world.size:
        raise UsageError(
            f"WORLD_SIZE: expected at most as many processes as the {images} held-out images, got {world.size}"
        )
    size = config.evaluation.eval_batch_size * world.size
    while world.size > 1 and 0 < images % size < world.size:
        size += 1
    return size


def progressive_size(config: AnyConfig) -> ProgressiveSize | None:
    """Return the side of the training images as a function of the pass, or None if it is always the same."""
    if not isinstance(config, TrainConfig) or not config.optim.progressive_size:
        return None
    assert config.optim.progressive_epochs is not None, "the config was not resolved"
    return ProgressiveSize(config.optim.progressive_size, config.data.img_size, *config.optim.progressive_epochs)


def build_schedule(config: TrainConfig, steps_per_pass: int) -> Schedule:
    """Turn epochs into optimizer updates: under replay m, one pass is m epochs and m updates per batch."""
    optim, replay = config.optim, config.attack.replay
    assert optim.lr is not None, "the config was not resolved"
    assert optim.decay_milestones is not None, "the config was not resolved"
    updates_per_pass = steps_per_pass * replay
    return Schedule(
        optim.lr,
        warmup_updates=round(optim.warmup_epochs / replay * updates_per_pass),
        warmup_lr=optim.warmup_lr,
        milestones=[passes(config, epoch) * updates_per_pass for epoch in optim.decay_milestones],
        rate=optim.decay_rate,
    )


def build_state(
    config: TrainConfig,
    splits: Splits,
    device: torch.device,
    steps_per_pass: int,
    *,
    resumed: bool = False,
    world: World = SOLO,
    report: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """Build the whole state of a fresh run, or, if it is `resumed`, one that a checkpoint will be copied into.

    Only a fresh one reads `--init`. report: told in one line what was taken from there, and of a step engine that does
    not work.
    """
    model = build_model(config, splits.num_classes, device)
    if config.model.init is not None and not resumed:
        report(load_initial_(model, config.model.init))
    if config.model.sync_bn and world.size > 1:
        synchronise_(model, world)
    return TrainState(
        config,
        model,
        build_clean_encoder(config, model),
        build_schedule(config, steps_per_pass),
        img_size=config.data.img_size,
        amp_dtype=amp_dtype_of(config, device),
        num_images=len(splits.train),
        world=world,
        report=report,
    )
