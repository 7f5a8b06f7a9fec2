"""One MoCo step against the method in plain torch and NumPy; the queue, the shuffle, the views and the vote."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fasttht.attacks.pgd import Draw
from fasttht.augment import Recipe, augment
from fasttht.distributed import SOLO
from fasttht.key_shuffle import STREAM_SHUFFLE, draw_shuffle
from fasttht.moco import MocoState, build_encoder, finished, moco_step
from fasttht.models.clean_encoder import Encoder
from fasttht.pipelines.loader import Batch, Loader
from fasttht.pipelines.plan import Augment, EpochPlan, hash_rows
from fasttht.pipelines.splits import open_splits
from fasttht.pretrain import TwoViews, build_schedule
from fasttht.pretrain_config import PretrainConfig, resolve_pretrain
from fasttht.schedule import CosineSchedule

SIDE = 8
NOTHING = Recipe()
FULL = Recipe(jitter=0.4, hue=0.1, jitter_prob=0.8, grayscale=0.2, blur=0.5, blur_sigma=(0.1, 1.0))


def tiny_config(**options: Any) -> PretrainConfig:
    config = PretrainConfig()
    defaults: dict[str, Any] = {
        "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": 6, "img_size": SIDE, "queue_size": 20,
        "batch_size": 8, "epochs": 2, "key_momentum": 0.75, "lr": 0.125, "shuffle_groups": 1, "weight_decay": 0.01,
    }  # fmt: skip
    for name, value in {**defaults, **options}.items():
        section = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(section, name, value)
    return resolve_pretrain(config)


def tiny_state(config: PretrainConfig) -> MocoState:
    encoder = build_encoder(config, torch.device("cpu")).double()
    return MocoState(config, encoder, CosineSchedule(0.125, total=10))


def views(step: int, size: int = 8) -> tuple[Batch, Batch]:
    rng = np.random.default_rng(step)
    rows = torch.from_numpy(rng.choice(40, size, replace=False))
    y = torch.zeros(size, dtype=torch.int64)
    one, two = (
        torch.from_numpy(rng.integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
        for _ in range(2)
    )
    return Batch(one, y, rows), Batch(two, y, rows)


def info_nce(q: np.ndarray, k: np.ndarray, negatives: np.ndarray, tau: float) -> float:
    """The published loss, one query at a time."""
    total = 0.0
    for i in range(len(q)):
        scores = np.array([q[i] @ k[i], *(q[i] @ n for n in negatives)]) / tau
        total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[0]
    return total / len(q)


class Plain:
    """MoCo v2 as its pseudo-code has it: a key encoder, a deque of keys, SGD written out."""

    def __init__(self, encoder: Encoder, groups: int) -> None:
        self.query, self.key = copy.deepcopy(encoder), copy.deepcopy(encoder)
        self.queue: deque[np.ndarray] = deque(maxlen=20)
        self.momentum = [torch.zeros_like(p) for p in self.query.parameters()]
        self.groups = groups

    def encode(self, encoder: nn.Module, x: Tensor, order: np.ndarray) -> Tensor:
        """As on so many GPUs that start with the same running statistics, and average them."""
        feats: dict[int, Tensor] = {}
        found = []
        for part in np.split(order, self.groups):
            own = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
            feats |= dict(zip(part.tolist(), torch.func.functional_call(encoder, own, x[part]), strict=True))
            found.append(own)
        for name, buffer in encoder.named_buffers():
            buffer.copy_(torch.stack([own[name].double() for own in found]).mean(dim=0))
        return torch.stack([feats[i] for i in range(len(x))])

    def step(self, x_query: Tensor, x_key: Tensor, rows: Tensor, draw: Draw, lr: float) -> float:
        with torch.no_grad():
            for own, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                own.mul_(0.75).add_(theirs, alpha=0.25)
        order = np.arange(len(rows))
        if self.groups > 1:
            hashed = hash_rows(STREAM_SHUFFLE, draw.seed, draw.epoch, draw.step, order).view(np.int64)
            order = np.argsort(hashed, kind="stable")
        with torch.no_grad():
            k = self.encode(self.key, x_key, order)
        q = self.encode(self.query, x_query, np.arange(len(rows)))
        negatives = torch.from_numpy(np.array(self.queue).reshape(-1, 6))
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / 0.2
        loss = F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.int64))
        gradients = torch.autograd.grad(loss, list(self.query.parameters()))
        with torch.no_grad():
            for parameter, gradient, buffer in zip(self.query.parameters(), gradients, self.momentum, strict=True):
                buffer.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter.sub_(buffer, alpha=lr)
        self.queue.extend(k.numpy())
        assert abs(loss.item() - info_nce(q.detach().numpy(), k.numpy(), negatives.numpy(), 0.2)) < 1e-12
        return loss.item()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_equal_the_published_method(groups: int) -> None:
    """Of 16 images: in groups of 2 the last stage, one pixel large, is -1 and 1, and its gradients rounding errors."""
    config = tiny_config(shuffle_groups=groups, batch_size=16)
    state = tiny_state(config)
    plain = Plain(tiny_state(tiny_config()).encoder, groups)  # its BN is torch's own
    losses = []
    for step in range(5):
        query, key = views(step, 16)
        draw = Draw(0, 0, step)
        moco_step(state, config, query, key, NOTHING, draw)
        rate = float(np.float32(0.125 * 0.5 * (1 + np.cos(np.pi * step / 10))))  # the device holds it in float32
        losses.append(plain.step(query.x.double() / 255, key.x.double() / 255, query.index, draw, rate))
    assert losses[0] == 0, "the queue is empty"
    assert min(losses[1:]) > 0
    sums = state.meter.read()
    assert sums["loss"] / 16 == pytest.approx(sum(losses), rel=1e-9)
    for name, own in state.encoder.state_dict().items():
        torch.testing.assert_close(own, plain.query.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)
    for name, buffer in state.key_encoder.named_buffers():
        torch.testing.assert_close(buffer, plain.key.get_buffer(name), rtol=1e-8, atol=1e-10, msg=name)
    # ours has followed after the last update already
    for own, theirs, source in zip(
        state.key_encoder.parameters(), plain.key.parameters(), plain.query.parameters(), strict=True
    ):
        torch.testing.assert_close(own, 0.75 * theirs + 0.25 * source, rtol=1e-8, atol=1e-10)
    newest = (int(state.queue.ptr) - 1 - np.arange(20)) % 20
    expected = np.array(plain.queue)[::-1].copy()
    torch.testing.assert_close(state.queue.features[newest], torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


def test_running_statistics_move_once_per_step_however_many_groups() -> None:
    x = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for groups in (1, 2):
        config = tiny_config(shuffle_groups=groups)
        state = tiny_state(config)
        query, key = views(0)
        both = (torch.cat([x, x]) * 255).to(torch.uint8)  # every group has the same images, so the same statistics
        moco_step(state, config, Batch(both, query.y, query.index), key, NOTHING, Draw(0))
        found.append(state.encoder.trunk.bn1.running_mean.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert found[0].abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_a_step_whose_gradient_is_not_finite_changes_no_weight(value: float) -> None:
    """Nor one whose gradient is finite and so large that the momentum, 1.9 times that, would not be."""
    config = tiny_config()
    state = tiny_state(config)
    for step in range(2):
        moco_step(state, config, *views(step), NOTHING, Draw(0, 0, step))
    kept = {name: t.clone() for name, t in state.encoder.state_dict().items()}
    key = [parameter.clone() for parameter in state.key_encoder.parameters()]
    updates = int(state.updates)
    handle = state.encoder.trunk.conv1.weight.register_hook(lambda gradient: gradient.fill_(value))
    moco_step(state, config, *views(2), NOTHING, Draw(0, 0, 2))
    handle.remove()
    assert all(torch.equal(t, kept[name]) for name, t in state.encoder.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(state.key_encoder.parameters(), key, strict=True))
    assert int(state.updates) == updates
    assert state.meter.read()["skipped"] == 1
    moco_step(state, config, *views(3), NOTHING, Draw(0, 0, 3))
    assert int(state.updates) == updates + 1


def test_keys_that_overflow_cost_their_own_step_only() -> None:
    config = tiny_config()
    state = tiny_state(config)
    moco_step(state, config, *views(0), NOTHING, Draw(0, 0, 0))
    handle = state.key_encoder.feature_head[2].register_forward_hook(lambda module, x, out: out * float("inf"))
    moco_step(state, config, *views(1), NOTHING, Draw(0, 0, 1))
    handle.remove()
    assert state.meter.read()["skipped"] == 1
    assert bool(state.queue.features.isfinite().all())
    moco_step(state, config, *views(2), NOTHING, Draw(0, 0, 2))
    sums = state.meter.read()
    assert sums["skipped"] == 0
    assert np.isfinite(sums["loss"])


def test_an_older_key_of_the_same_image_is_a_negative_unless_masked() -> None:
    """The same rows twice: with the mask the second step still has no negative at all."""
    for mask, zero in ((True, True), (False, False)):
        config = tiny_config(mask_same_index=mask, batch_size=2)
        state = tiny_state(config)
        for step in range(2):
            query, key = (Batch(b.x[:2], b.y[:2], torch.tensor([3, 3])) for b in views(step))
            state.meter.read()
            moco_step(state, config, query, key, NOTHING, Draw(0, 0, step))
        assert (state.meter.read()["loss"] == 0) == zero


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_views_are_augmented_by_draws_of_their_own_in_full_precision(
    amp_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shuffle_groups=2, width=8)
    encoder = build_encoder(config, torch.device("cpu"))
    state = MocoState(config, encoder, CosineSchedule(0.125, total=10), amp_dtype=amp_dtype)
    seen: list[Tensor] = []
    monkeypatch.setattr(state.encoder.normalize, "forward", lambda x: (seen.append(x), x)[1])
    monkeypatch.setattr(state.key_encoder.normalize, "forward", lambda x: (seen.append(x), x)[1])
    query, _ = views(0)
    draw = Draw(0, 1, 2)
    moco_step(state, config, query, query, FULL, draw)
    x = query.x.float() / 255
    x_key, x_query = (augment(x, query.index, FULL, draw, view=view) for view in (1, 0))
    assert torch.equal(seen[0], x_key[draw_shuffle(8, draw, SOLO).order])
    assert torch.equal(seen[1], x_query)
    assert not torch.equal(x_key, x_query)


def test_a_shuffle_gives_back_the_order_and_puts_other_images_together_at_every_step() -> None:
    x = torch.arange(32, dtype=torch.uint8).view(32, 1, 1, 1).expand(32, 3, 2, 2)
    seen = []
    for step in range(3):
        shuffle = draw_shuffle(32, Draw(0, 0, step), SOLO)
        dealt = shuffle.deal(x)
        assert dealt.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(shuffle.gather(dealt.flatten(1) * 2), x.flatten(1) * 2)
        assert torch.equal(shuffle.at_my_places(torch.arange(32)), dealt[:, 0, 0, 0].long())
        groups = [sorted(group.tolist()) for group in dealt[:, 0, 0, 0].split(8)]
        assert sorted(value for group in groups for value in group) == list(range(32))
        assert [0, 1, 2, 3, 4, 5, 6, 7] not in groups
        seen.append(groups)
    assert seen[0] != seen[1] != seen[2]


class CountSyncs(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device() -> None:
    config = tiny_config(shuffle_groups=2)
    state = tiny_state(config)
    batch = views(0)
    with CountSyncs() as counter:
        moco_step(state, config, *batch, FULL, Draw(0))
    # on CPU the fused optimizer itself reads found_inf; nothing of ours may
    ours = [name for name in counter.found if "_local_scalar_dense" not in name]
    assert ours == []
    assert len(counter.found) <= 2, counter.found


@pytest.mark.gpu
def test_a_step_on_the_device_does_not_wait_for_it() -> None:
    config = tiny_config(shuffle_groups=2)
    encoder = build_encoder(config, torch.device("cuda"))
    state = MocoState(config, encoder, CosineSchedule(0.125, total=10), amp_dtype=torch.float16)
    batches = [[Batch(b.x.cuda(), b.y.cuda(), b.index.cuda()) for b in views(step)] for step in range(4)]
    for step, (query, key) in enumerate(batches):
        if step == 3:  # libraries are loaded
            torch.cuda.set_sync_debug_mode("error")
        try:
            moco_step(state, config, query, key, FULL, Draw(0, 0, step))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(state.meter.read()["loss"])


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_half_precision_keeps_weights_features_and_loss_in_float32(amp_dtype: torch.dtype) -> None:
    config = tiny_config(shuffle_groups=2)
    encoder = build_encoder(config, torch.device("cpu"))
    state = MocoState(config, encoder, CosineSchedule(0.125, total=10), amp_dtype=amp_dtype)
    seen: list[torch.dtype] = []
    encoder.trunk.layer2.register_forward_hook(lambda module, x, out: seen.append(out.dtype))
    for step in range(3):
        moco_step(state, config, *views(step), FULL, Draw(0, 0, step))
    assert set(seen) == {amp_dtype}
    assert {t.dtype for t in state.encoder.parameters()} == {torch.float32}
    assert state.queue.features.dtype == torch.float32
    torch.testing.assert_close(state.queue.features.norm(dim=1), torch.ones(20))
    sums = state.meter.read()
    assert sums["skipped"] == 0
    assert 0 < sums["loss"] / sums["images"] < np.log(21) + 10


def test_the_finished_encoder_is_the_query_encoder_frozen() -> None:
    config = tiny_config()
    state = tiny_state(config)
    moco_step(state, config, *views(0), NOTHING, Draw(0))
    g = finished(state)
    assert g.frozen
    assert all(torch.equal(t, state.encoder.state_dict()[name]) for name, t in g.state_dict().items())
    assert all(parameter.requires_grad for parameter in state.encoder.parameters())
    x = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(g(x)[:1], g(x[:1]))


def test_blocks_do_not_start_as_the_identity_and_the_seed_decides() -> None:
    config = tiny_config()
    one, two = (build_encoder(config, torch.device("cpu")) for _ in range(2))
    other = build_encoder(tiny_config(seed=1), torch.device("cpu"))
    block: Any = one.trunk.layer1[0]
    assert torch.equal(block.bn2.weight, torch.ones(4))
    assert torch.equal(one.trunk.conv1.weight, two.trunk.conv1.weight)
    assert not torch.equal(one.trunk.conv1.weight, other.trunk.conv1.weight)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_another_view_has_the_order_and_other_windows_and_flips() -> None:
    one, two = (EpochPlan(num_samples=64, batch_size=8, epoch=3, augment=Augment(), view=view) for view in (0, 1))
    rows, size = one.order(), np.full(64, 50)
    assert np.array_equal(rows, two.order())
    same = (one.windows(rows, size, size) == two.windows(rows, size, size)).all(axis=1)
    assert same.mean() < 0.1
    assert 10 < (one.flips(rows) != two.flips(rows)).sum() < 54
    assert one.replacement(5, 0) == two.replacement(5, 0)


def test_two_views_walk_the_same_rows_and_continue_where_they_were() -> None:
    samples = open_splits(None).train

    def feed() -> TwoViews:
        return TwoViews(
            *(
                Loader(samples, EpochPlan(num_samples=len(samples), batch_size=400, augment=Augment(), drop_last=True,
                                          view=view), img_size=SIDE)
                for view in (0, 1)
            )
        )  # fmt: skip

    whole = feed()
    seen = [list(whole), list(whole)]
    assert whole.epoch == 2
    assert [len(epoch) for epoch in seen] == [3, 3]
    for query, key in seen[0] + seen[1]:
        assert torch.equal(query.index, key.index)
        assert not torch.equal(query.x, key.x)
    first = feed()
    walk = iter(first)
    next(walk), next(walk)
    position = first.state_dict()
    first.close()
    second = feed()
    second.load_state_dict(position)
    assert second.step == 2
    for (query, key), (query_then, key_then) in zip([*second, *second], seen[0][2:] + seen[1], strict=True):
        assert torch.equal(query.x, query_then.x)
        assert torch.equal(key.x, key_then.x)
    whole.close()
    second.close()


def test_the_rate_falls_along_half_a_cosine_or_in_steps() -> None:
    rates = [float(CosineSchedule(0.6, total=4).at(torch.tensor(step))) for step in range(6)]
    np.testing.assert_allclose(rates, [0.6 * 0.5 * (1 + np.cos(np.pi * min(s, 4) / 4)) for s in range(6)], atol=1e-15)
    stepped = build_schedule(tiny_config(sched="step", epochs=10), 3)
    assert [round(float(stepped.at(torch.tensor(s))), 6) for s in (0, 17, 18, 24)] == [0.125, 0.125, 0.0125, 0.00125]


def test_defaults_are_those_of_the_published_recipe() -> None:
    config = resolve_pretrain(PretrainConfig())
    assert config.optim.lr == 0.03
    assert (config.optim.epochs, config.optim.batch_size, config.optim.weight_decay) == (200, 256, 1e-4)
    assert (config.moco.queue_size, config.moco.key_momentum, config.moco.tau) == (65536, 0.999, 0.2)
    data = config.data
    assert (data.scale, data.hflip, data.jitter, data.hue) == ((0.2, 1.0), 0.5, 0.4, 0.1)
    assert (data.jitter_prob, data.grayscale, data.blur, data.blur_sigma) == (0.8, 0.2, 0.5, (0.1, 2.0))
