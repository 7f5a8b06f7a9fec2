"""Momentum contrast, version 2 (He et al. 2020; Chen et al. 2020): the state of a pre-training and its one step.

Two views of each image: the query encoder learns to find its view's twin, as the slow key encoder sees it, among the
keys of other images. As in the original the query encoder is the result, and the keys enter the queue after the update.

BN normalises groups of a global batch apart: ghost BN's, of which each rank has its share (key_shuffle.py), so that any
number of ranks trains the same network. A step exchanges its rows, its keys' images and their features once, and, as
training does, gradients and running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasttht import kernels
from fasttht.attacks.pgd import Draw
from fasttht.augment import Recipe, augment
from fasttht.bank import FeatureBank
from fasttht.distributed import SOLO, World
from fasttht.errors import UsageError
from fasttht.gradients import Reducer
from fasttht.key_shuffle import draw_shuffle
from fasttht.losses import contrastive
from fasttht.metrics import Meter
from fasttht.models.clean_encoder import CleanEncoder, Encoder
from fasttht.pipelines.loader import Batch
from fasttht.pretrain_config import PretrainConfig
from fasttht.schedule import LearningRate
from fasttht.state import GuardedSGD, guarded_update_, new_scaler, update_tensors

ROWS = "batch rows"


class MocoState:
    """A pre-training between two steps: the query encoder, the key encoder, and everything an update needs.

    Everything in it is the same on all ranks but the meter's sums.
    """

    def __init__(
        self,
        config: PretrainConfig,
        encoder: Encoder,
        schedule: LearningRate,
        *,
        amp_dtype: torch.dtype = torch.float32,
        world: World = SOLO,
    ) -> None:
        parameter = next(encoder.parameters())
        device, dtype = parameter.device, parameter.dtype
        self.device, self.dtype, self.amp_dtype = device, dtype, amp_dtype
        self.world = world
        self.encoder = encoder
        self.key_encoder = CleanEncoder(encoder, frozen=False)
        self.lr = torch.zeros((), device=device)
        groups: list[dict[str, object]] = [
            {"params": list(encoder.parameters()), "weight_decay": config.optim.weight_decay}
        ]
        self.optimizer = GuardedSGD(groups, momentum=config.optim.momentum, nesterov=False, lr=self.lr)
        self.scaler = new_scaler(device, amp_dtype)
        self.schedule = schedule
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.queue = FeatureBank(config.moco.queue_size, config.model.feat_dim, device=device, dtype=dtype)
        self.step = 0
        self.meter = Meter(device, world=world)
        self.reducer: Reducer | None = None
        if world.size > 1:
            buffers = [*self.encoder.trunk.buffers(), *self.key_encoder.trunk.buffers()]
            moved = [buffer for buffer in buffers if buffer.is_floating_point()]
            self.reducer = Reducer(world, list(encoder.parameters()), moved)

    def depends_on(self) -> dict[str, str]:
        """Return nothing: a checkpoint holds all that the steps read."""
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return every tensor a checkpoint holds, by file and name; they are the live ones, not copies.

        The query encoder's file has the name that `--clean-encoder RUN` looks for.
        """
        training = update_tensors(self, self.encoder)
        training |= {f"queue.{name}": tensor for name, tensor in self.queue.state().items()}
        return {
            "clean_encoder": dict(self.encoder.state_dict()),
            "key_encoder": dict(self.key_encoder.state_dict()),
            "training": training,
        }

    def to_save(self) -> dict[str, dict[str, Tensor]] | None:
        """Return `tensors` as a checkpoint holds them, that of one process, on rank 0; None elsewhere."""
        files = self.tensors()
        files["training"]["meter"] = self.meter.total()
        return files if self.world.main else None

    @contextmanager
    def to_load(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Give the tensors to fill with a checkpoint's, whatever number of ranks wrote it."""
        yield self.tensors()
        if not self.world.main:
            self.meter.sums.zero_()


def moco_step(
    state: MocoState,
    config: PretrainConfig,
    query: Batch,
    key: Batch,
    recipe: Recipe,
    draw: Draw,
    *,
    total: int | None = None,
) -> None:
    """Take one step on two views of the same rows. Mutates the state and nothing else; never waits for the device.

    The key encoder follows after the update, which is before the next step's keys, as in the original. total: images of
    the global batch, of which `query` and `key` are this rank's slice; None: they are all of it.
    """
    moco, world, images = config.moco, state.world, len(query.index)
    total = images if total is None else total
    share = images / total
    before = [buffer.clone() for buffer in state.encoder.trunk.buffers()]
    index = world.gather_rows(ROWS, key.index, world.counts(total))
    shuffle = draw_shuffle(total, draw, world) if moco.shuffle_groups > 1 else None
    x, own = key.x, key.index
    if shuffle is not None:
        x, own = shuffle.deal(x), shuffle.at_my_places(index)
    x_key = augment(kernels.u8_to_input(x, state.dtype), own, recipe, draw, view=1)
    x_query = augment(kernels.u8_to_input(query.x, state.dtype), query.index, recipe, draw)
    with torch.autocast(state.device.type, state.amp_dtype, enabled=state.amp_dtype != torch.float32):
        feat_keys: Tensor = state.key_encoder(x_key)  # without gradient
        feat = state.encoder(x_query)
    if shuffle is not None:
        feat_keys = shuffle.gather(feat_keys)
    feat_key = feat_keys[world.rows(total)]
    mask = state.queue.mask(query.index, mask_same_index=moco.mask_same_index)
    loss = contrastive(feat, feat_key, state.queue.features, tau=moco.tau, mask=mask)
    scaled: Tensor = state.scaler.scale(loss * share)
    if state.reducer is not None:
        state.reducer.begin(share)
    torch.autograd.backward(scaled)
    with torch.no_grad():
        similarity = (feat @ state.queue.features.to(feat.dtype).t()).masked_fill_(~mask, float("-inf"))
        correct = ((feat * feat_key).sum(dim=1) > similarity.amax(dim=1)).sum()
        state.meter.add(loss=loss.detach() * images, correct=correct, images=images)
    if state.reducer is not None:
        state.reducer.finish_()
    taken = guarded_update_(state, state.encoder, state.encoder.trunk, before)
    state.key_encoder.follow_(state.encoder, (1 - moco.key_momentum) * taken)
    state.queue.enqueue(feat_keys, index)


def check_groups(config: PretrainConfig, world: World) -> None:
    """Refuse ranks that would not all have the same number of whole BN groups. Raises: UsageError."""
    groups = config.moco.shuffle_groups
    if groups % world.size:
        raise UsageError(
            f"--shuffle-groups: expected a multiple of the {world.size} processes, each of which normalises its share "
            f"of the groups, got {groups}; change it, or the number of processes"
        )


def build_encoder(config: PretrainConfig, device: torch.device) -> Encoder:
    """Build the query encoder with the weights that the seed gives, channels-last; the global RNG is left as it was."""
    settings, groups = config.model, config.moco.shuffle_groups
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        encoder = Encoder(
            settings.arch, stem=settings.stem, width=settings.width, feat_dim=settings.feat_dim,
            bn_group_size=0 if groups == 1 else config.optim.batch_size // groups,
        )  # fmt: skip
    return encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def recipe_of(config: PretrainConfig) -> Recipe:
    """Return the augmentation that a configuration asks for."""
    data = config.data
    return Recipe(
        jitter=data.jitter, hue=data.hue, jitter_prob=data.jitter_prob, lighting=data.lighting,
        grayscale=data.grayscale, blur=data.blur, blur_sigma=data.blur_sigma,
    )  # fmt: skip


def finished(state: MocoState) -> CleanEncoder:
    """Return the query encoder as `train --clean-encoder` would load it: frozen, evaluation-mode BN."""
    return CleanEncoder(state.encoder, frozen=True)
