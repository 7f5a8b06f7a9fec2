"""Momentum contrast, version 2 (He et al. 2020; Chen et al. 2020): the state of a pre-training and its one step.

Two views of each image: the query encoder learns to find its view's twin, as the slow key encoder sees it, among the
keys of other images. As in the original the query encoder is the result, and the keys enter the queue after the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fasttht import kernels
from fasttht.attacks.pgd import Draw
from fasttht.augment import Recipe, augment
from fasttht.bank import FeatureBank
from fasttht.kernels.draws import row_keys
from fasttht.losses import contrastive
from fasttht.metrics import Meter
from fasttht.models.clean_encoder import CleanEncoder, Encoder
from fasttht.pipelines.loader import Batch
from fasttht.pretrain_config import PretrainConfig
from fasttht.schedule import LearningRate
from fasttht.state import GuardedSGD, guarded_update_, new_scaler, update_tensors

STREAM_SHUFFLE = 0x5348


class MocoState:
    """A pre-training between two steps: the query encoder, the key encoder, and everything an update needs."""

    def __init__(
        self,
        config: PretrainConfig,
        encoder: Encoder,
        schedule: LearningRate,
        *,
        amp_dtype: torch.dtype = torch.float32,
    ) -> None:
        parameter = next(encoder.parameters())
        device, dtype = parameter.device, parameter.dtype
        self.device, self.dtype, self.amp_dtype = device, dtype, amp_dtype
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):  # a step updates the running statistics once per group
                module.momentum = 1 - (1 - 0.1) ** (1 / config.moco.shuffle_groups)
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
        self.meter = Meter(device)

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


def moco_step(state: MocoState, config: PretrainConfig, query: Batch, key: Batch, recipe: Recipe, draw: Draw) -> None:
    """Take one step on two views of the same rows. Mutates the state and nothing else; never waits for the device.

    The key encoder follows after the update, which is before the next step's keys, as in the original.
    """
    moco = config.moco
    before = [buffer.clone() for buffer in state.encoder.trunk.buffers()]
    x_query, x_key = (
        augment(kernels.u8_to_input(batch.x, state.dtype), batch.index, recipe, draw, view=view)
        for view, batch in enumerate((query, key))
    )
    with torch.autocast(state.device.type, state.amp_dtype, enabled=state.amp_dtype != torch.float32):
        with torch.no_grad():
            feat_key = shuffled(state.key_encoder, x_key, key.index, moco.shuffle_groups, draw)
        feat = in_groups(state.encoder, x_query, moco.shuffle_groups)
    mask = state.queue.mask(query.index, mask_same_index=moco.mask_same_index)
    loss = contrastive(feat, feat_key, state.queue.features, tau=moco.tau, mask=mask)
    torch.autograd.backward(state.scaler.scale(loss))
    with torch.no_grad():
        images = len(query.index)
        similarity = (feat @ state.queue.features.to(feat.dtype).t()).masked_fill_(~mask, float("-inf"))
        correct = ((feat * feat_key).sum(dim=1) > similarity.amax(dim=1)).sum()
        state.meter.add(loss=loss.detach() * images, correct=correct, images=images)
    taken = guarded_update_(state, state.encoder, state.encoder.trunk, before)
    state.key_encoder.follow_(state.encoder, (1 - moco.key_momentum) * taken)
    state.queue.enqueue(feat_key, key.index)


def in_groups(encoder: Callable[[Tensor], Tensor], x: Tensor, groups: int) -> Tensor:
    """Encode contiguous parts of a batch one after the other: BN normalises each by itself, as on so many GPUs."""
    return encoder(x) if groups == 1 else torch.cat([encoder(part) for part in x.tensor_split(groups)])


def shuffled(encoder: Callable[[Tensor], Tensor], x: Tensor, index: Tensor, groups: int, draw: Draw) -> Tensor:
    """Encode a batch in groups of other images than its queries were grouped with, and return it in its own order.

    Within one process this is what shuffling BN is over several: the statistics that a key was normalised with tell
    nothing about which query is its twin. The permutation is a draw of (seed, epoch, step).
    """
    if groups == 1:
        return encoder(x)
    order = torch.argsort(row_keys(STREAM_SHUFFLE, draw.seed, draw.epoch, draw.step, index), stable=True)
    feat = in_groups(encoder, x[order].contiguous(memory_format=torch.channels_last), groups)
    return torch.empty_like(feat).index_copy_(0, order, feat)


def build_encoder(config: PretrainConfig, device: torch.device) -> Encoder:
    """Build the query encoder with the weights that the seed gives, channels-last; the global RNG is left as it was."""
    settings = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        encoder = Encoder(settings.arch, stem=settings.stem, width=settings.width, feat_dim=settings.feat_dim)
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
