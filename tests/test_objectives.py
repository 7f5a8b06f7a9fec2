"""Every objective: its loss against numpy, where its gradient flows, the attack it trains against, two steps of it."""

from __future__ import annotations

import copy
import dataclasses
import typing
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.pgd import Draw, evaluating
from fasttht.bank import FeatureBank
from fasttht.build import build_model
from fasttht.config import MethodConfig, TrainConfig
from fasttht.losses import kl_divergence
from fasttht.metrics import means
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.models.mixture_bn import through
from fasttht.models.two_head import CosineClassifier, Outputs
from fasttht.objectives import OBJECTIVES, Views
from fasttht.pipelines.loader import Batch
from fasttht.resolve import resolve
from fasttht.schedule import Schedule
from fasttht.state import TrainState
from fasttht.steps import free_step, standard_step
from fasttht.traits import TRAITS

Array = npt.NDArray[np.float64]
CLASSES, SIDE, DIM, IMAGES = 5, 8, 6, 40
# Objectives that look at clean images beside the attacked ones, and those that may be replayed.
PAIRED = {"at-kl", "alp", "mbn", "mbn-alp", "trades"}
REPLAYED = [name for name, traits in TRAITS.items() if not traits.no_replay]
ATTACKED = [name for name, traits in TRAITS.items() if traits.attacked]


def test_the_dicts_and_the_option_name_the_same_objectives() -> None:
    choices = typing.get_args(typing.get_type_hints(MethodConfig)["objective"])
    assert set(OBJECTIVES) == set(TRAITS) == set(choices)
    assert len(set(choices)) == len(choices) == 12
    for traits in TRAITS.values():
        assert {traits.other, traits.without_bank} - {None} <= set(TRAITS)
        assert traits.has_feature_head == traits.has_clean_encoder  # a head without features to meet would not train


# -- losses ------------------------------------------------------------------------------------------------------------


class Stub(nn.Module):
    """Linear logits and features of the pixels; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.head = (
            torch.randn(rows, 3 * SIDE * SIDE, generator=generator, dtype=torch.float64) * 0.3
            for rows in (CLASSES, DIM)
        )
        self.num_forwards = 0

    def forward(self, x: Tensor) -> Outputs:
        self.num_forwards += 1
        h = x.flatten(1)
        return Outputs(h @ self.weight.T, F.normalize(h @ self.head.T, dim=1))


def log_softmax(z: Array) -> Array:
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def np_ce(z: Array, y: npt.NDArray[np.int64], smoothing: float) -> float:
    target = np.full(z.shape, smoothing / z.shape[1])
    target[np.arange(len(y)), y] += 1 - smoothing
    return float(-(target * log_softmax(z)).sum(axis=1).mean())


def np_kl(z: Array, z_adv: Array) -> float:
    log_p = log_softmax(z)
    return float((np.exp(log_p) * (log_p - log_softmax(z_adv))).sum(axis=1).mean())


def np_cl(u: Array, v: Array, negatives: list[Array], tau: float) -> float:
    positive = np.exp((u * v).sum(axis=1) / tau)
    others = np.array([np.exp(own @ ui / tau).sum() for own, ui in zip(negatives, u, strict=True)])
    return float(-np.log(positive / (positive + others)).mean())


def by_hand(name: str, views: Views, bank: FeatureBank, method: MethodConfig, smoothing: float) -> float:
    """The loss of each objective, as its paper writes it, from logits and features."""
    stub = Stub()
    z, z_adv = (x.flatten(1).numpy() @ stub.weight.numpy().T for x in (views.x, views.x_adv))
    y, index = views.y.numpy(), views.index.numpy()
    ce, ce_adv = np_ce(z, y, smoothing), np_ce(z_adv, y, smoothing)
    square = float(((z - z_adv) ** 2).mean())
    if TRAITS[name].has_clean_encoder:
        assert views.feat_clean is not None
        u = views.x_adv.flatten(1).numpy() @ stub.head.numpy().T
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        v = views.feat_clean.numpy()
        negatives = []
        for row in index:
            own = [bank.features.numpy()[(bank.index.numpy() != row) & (bank.index.numpy() >= 0)]]
            if method.negatives == "both":
                own.append(v[index != row])
            negatives.append(np.concatenate(own))
        return ce_adv + method.lambda_cl * np_cl(u, v, negatives, method.tau)
    return {
        "that-no-cl": ce_adv, "at": ce_adv, "fast": ce_adv, "clean": ce_adv,
        "at-kl": {"clean": ce, "adv": ce_adv, "both": (ce + ce_adv) / 2}[method.ce_on] + 0.7 * np_kl(z, z_adv),
        "alp": (ce + ce_adv) / 2 + 0.4 * square,
        "mbn": ce + ce_adv,
        "mbn-alp": ce + ce_adv + 0.4 * square,
        "trades": ce + 5.0 * np_kl(z, z_adv),
    }[name]  # fmt: skip


def views_of(name: str, rows: int = 4) -> Views:
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.rand(rows, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    x_adv = (x + 0.2 * noise - 0.1).clamp(0, 1) if TRAITS[name].attacked else x
    feat = F.normalize(torch.randn(rows, DIM, generator=generator, dtype=torch.float64), dim=1)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    return Views(x, x_adv, y, torch.arange(rows), feat if TRAITS[name].has_clean_encoder else None)


def bank_of() -> FeatureBank:
    """Seven slots, five of them filled, one with an anchor's own row."""
    bank = FeatureBank(7, DIM, dtype=torch.float64)
    feat = torch.randn(5, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bank.enqueue(feat, torch.tensor([2, 30, 31, 32, 33]))
    return bank


@pytest.mark.parametrize("negatives", ["bank", "both"])
@pytest.mark.parametrize("ce_on", ["clean", "adv", "both"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_equals_the_one_computed_by_hand_in_one_forward(name: str, ce_on: Any, negatives: Any) -> None:
    method = MethodConfig(
        ce_on=ce_on, negatives=negatives, lambda_cl=0.6, tau=0.3, lambda_kl=0.7, lambda_alp=0.4, trades_beta=5.0
    )
    views, bank, stub = views_of(name), bank_of(), Stub()
    terms = OBJECTIVES[name](stub, views, bank, method, smoothing=0.1)  # type: ignore[arg-type]
    assert float(terms.loss) == pytest.approx(by_hand(name, views, bank, method, 0.1), rel=1e-9)
    assert stub.num_forwards == 1
    torch.testing.assert_close(terms.logits, stub(views.x_adv).logits)
    assert {part for part in terms.parts if part.startswith("loss")} == {"loss_cls", *TRAITS[name].parts}


# -- where gradients flow ----------------------------------------------------------------------------------------------


def config_of(name: str, **options: Any) -> TrainConfig:
    """A resolved config of a very small network; options are by their names, whatever their section."""
    config = TrainConfig()
    defaults: dict[str, Any] = {
        "arch": "resnet18", "stem": "small", "width": 4, "feat_dim": DIM, "img_size": SIDE, "bank_size": 20,
        "batch_size": 8, "epochs": 1, "smoothing": 0.0, "warmup_epochs": 0.0, "eps": 0.1, "lr": 0.0625,
        "objective": name, "attack_engine": "eager", "clean_encoder": "momentum",
    }  # fmt: skip
    for key, value in {**defaults, **options}.items():
        section = next(s for s in vars(config).values() if hasattr(s, key))
        setattr(section, key, value)
    return resolve(config)


def state_of(config: TrainConfig, dtype: torch.dtype = torch.float64) -> TrainState:
    """A fresh state with a frozen g; no block is born as an identity, and no two BN branches are equal."""
    model = build_model(config, CLASSES, torch.device("cpu")).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for key, buffer in model.trunk.named_buffers():
            if key.endswith("running_mean"):
                buffer.uniform_(-0.3, 0.3, generator=generator)
    encoder = CleanEncoder(model, frozen=True) if model.feature_head is not None else None
    assert config.optim.lr is not None
    schedule = Schedule(config.optim.lr, milestones=[])
    return TrainState(config, model, encoder, schedule, img_size=SIDE, num_images=IMAGES)


def group_of(name: str) -> str:
    """The part of f that a parameter belongs to."""
    for branch in ("clean", "adversarial"):
        if f".{branch}." in name:
            return f"{branch} branch"
    if name == "classifier.bias":
        return name
    return name.split(".")[0]


def reached(loss: Tensor, model: nn.Module) -> set[str]:
    """Groups of parameters that a loss has a gradient in; a group is reached as a whole or not at all."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    found: dict[str, set[bool]] = {}
    for name, grad in zip(names, grads, strict=True):
        found.setdefault(group_of(name), set()).add(grad is not None and bool(grad.any()))
    assert all(len(values) == 1 for values in found.values()), found
    return {group for group, values in found.items() if values == {True}}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_term_reaches_the_parts_of_f_that_the_paper_says(name: str) -> None:
    config = config_of(name, negatives="both")
    state, views = state_of(config), views_of(name)
    bank = bank_of() if TRAITS[name].has_clean_encoder else None
    terms = OBJECTIVES[name](state.model.train(), views, bank, config.method, smoothing=0.1)
    branches = {"clean branch", "adversarial branch"} if TRAITS[name].mixture_bn else set()
    weights, featured = {"trunk", "classifier"} | branches, {"trunk", "feature_head"}
    classified = weights | ({"classifier.bias"} if TRAITS[name].classifier == "linear" else set())
    assert reached(terms.parts["loss_cls"], state.model) == classified
    if "loss_cl" in terms.parts:
        assert reached(terms.parts["loss_cl"], state.model) == featured
        assert reached(terms.loss, state.model) == classified | featured
    if "loss_kl" in terms.parts:
        assert reached(terms.parts["loss_kl"], state.model) == classified
    if "loss_alp" in terms.parts:  # a difference of logits has no bias
        assert reached(terms.parts["loss_alp"], state.model) == weights
    if "kl_tail" in terms.parts:
        assert not terms.parts["kl_tail"].requires_grad
    if bank is not None:
        assert not bank.features.requires_grad
        assert state.clean_encoder is not None
        assert not any(parameter.requires_grad for parameter in state.clean_encoder.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_term_depends_on_the_images_that_the_paper_says(name: str) -> None:
    """With running statistics, so that images do not meet in BN: which term reads the clean, which the attacked."""
    config = config_of(name)
    state, views = state_of(config), views_of(name)
    x, x_adv = views.x.clone().requires_grad_(True), views.x_adv.clone().requires_grad_(True)
    views = dataclasses.replace(views, x=x, x_adv=x_adv)
    bank = bank_of() if TRAITS[name].has_clean_encoder else None
    terms = OBJECTIVES[name](state.model.eval(), views, bank, config.method, smoothing=0.1)

    def reads(loss: Tensor) -> tuple[bool, bool]:
        grads = torch.autograd.grad(loss, (x, x_adv), allow_unused=True, retain_graph=True)
        return tuple(grad is not None and bool(grad.any()) for grad in grads)  # type: ignore[return-value]

    expected = {"trades": (True, False), "alp": (True, True), "mbn": (True, True), "mbn-alp": (True, True)}
    assert reads(terms.parts["loss_cls"]) == expected.get(name, (False, True))
    for part in ("loss_kl", "loss_alp"):
        if part in terms.parts:
            assert reads(terms.parts[part]) == (True, True)
    if "loss_cl" in terms.parts:
        assert reads(terms.parts["loss_cl"]) == (False, True)


# -- attacks -----------------------------------------------------------------------------------------------------------


def batch_of(step: int = 0, size: int = 8) -> Batch:
    """Images without pixels at the ends of the range, so that no start is clipped."""
    rng = np.random.default_rng(step)
    x = torch.from_numpy(rng.integers(60, 196, (size, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    y = torch.from_numpy(rng.integers(0, CLASSES, size))
    return Batch(x, y, torch.from_numpy(rng.choice(IMAGES, size, replace=False)))


def attack_of(
    name: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[TrainConfig, TrainState, list[tuple[Tensor, Tensor]]]:
    """Take one step; returns the state before it and the arguments of every input gradient."""
    config = config_of(name, **options)
    state, before = state_of(config), state_of(config)
    assert state.engine is not None
    gradient, calls = state.engine.gradient, []

    def spy(x: Tensor, y: Tensor) -> Tensor:
        calls.append((x.clone(), y.clone()))
        return gradient(x, y)

    monkeypatch.setattr(state.engine, "gradient", spy)
    standard_step(state, config, batch_of(), Draw(7), num_classes=CLASSES)
    return config, before, calls


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", [name for name in ATTACKED if name != "trades"])
def test_attacks_are_on_the_classification_loss(name: str, targeted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of at-kl and alp too: they differ from `at` in what is minimised only."""
    _, _, calls = attack_of(name, monkeypatch, targeted=targeted, steps=None if name == "fast" else 3)
    batch = batch_of()
    wanted = kernels.draw_target(batch.y, batch.index, CLASSES, seed=7, epoch=0, step=0) if targeted else batch.y
    assert len(calls) == (1 if name == "fast" else 3)
    assert all(torch.equal(y, wanted) for _, y in calls)
    x = batch.x.double() / 255
    start = kernels.draw_start(
        x, batch.index, eps=0.1, clean_prob=0.0 if name == "fast" else 0.2, seed=7, epoch=0, step=0
    )
    assert torch.equal(calls[0][0], start)


def test_fast_takes_one_step_of_one_and_a_quarter_radii_and_projects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Views] = []

    def spied(model: Any, views: Views, *args: Any, **kwargs: Any) -> Any:
        seen.append(views)
        return objective(model, views, *args, **kwargs)

    objective = OBJECTIVES["fast"]
    monkeypatch.setitem(OBJECTIVES, "fast", spied)
    config, before, calls = attack_of("fast", monkeypatch)
    assert config.attack.alpha == pytest.approx(0.125)
    assert (config.attack.steps, config.attack.targeted, config.attack.start_clean_prob) == (1, False, 0.0)
    ((start, y),) = calls
    assert before.engine is not None
    moved = start + 0.125 * before.engine.gradient(start, y).sign()
    x = batch_of().x.double() / 255
    torch.testing.assert_close(seen[0].x_adv, moved.clamp(x - 0.1, x + 0.1), rtol=0, atol=1e-12)


def test_trades_moves_away_from_the_clean_probabilities_from_a_gaussian_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config, before, calls = attack_of("trades", monkeypatch, steps=3)
    x = batch_of().x.double() / 255
    assert not config.attack.targeted
    with evaluating(before.model), torch.no_grad():
        p = before.model.logits(x).softmax(dim=1)
    assert len(calls) == 3
    for _, y in calls:
        torch.testing.assert_close(y, p, rtol=1e-12, atol=1e-14)
        assert not y.requires_grad
    noise = (calls[0][0] - x).flatten()
    assert 0.0009 < float(noise.std()) < 0.0011
    assert abs(float(noise.mean())) < 1e-4
    assert 0.002 < float(noise.abs().max()) < 0.006
    # Each step ascends the divergence itself.
    log_q = before.model.eval().logits(calls[1][0].requires_grad_(True)).log_softmax(dim=1)
    kl = (p * (p.log() - log_q)).sum()
    assert before.engine is not None
    expected = torch.autograd.grad(kl, calls[1][0])[0]
    torch.testing.assert_close(before.engine.gradient(calls[1][0].detach(), p), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("engine", ["folded", "fused"])
def test_engines_agree_on_the_divergence_from_the_clean_probabilities(engine: str) -> None:
    state, other = (state_of(config_of("trades", attack_engine=name)) for name in ("eager", engine))
    assert state.engine is not None
    assert other.engine is not None
    x = batch_of().x.double() / 255
    x_adv = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = state.engine.probabilities(x)
    torch.testing.assert_close(other.engine.probabilities(x), p, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other.engine.gradient(x_adv, p), state.engine.gradient(x_adv, p), rtol=1e-7, atol=1e-11)
    # At x itself nothing is to be gained: the divergence is zero there, and so is its gradient.
    assert float(state.engine.gradient(x, p).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ATTACKED)
def test_input_gradients_are_those_of_the_evaluated_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation mode, the adversarial branch, the cosine classifier with its scale."""
    _, state, calls = attack_of(name, monkeypatch, steps=1)
    x, y = calls[0]
    model = state.model.train()
    assert state.engine is not None
    found = state.engine.gradient(x, y)
    with evaluating(model):
        leaf = x.clone().requires_grad_(True)
        expected = torch.autograd.grad(F.cross_entropy(model.logits(leaf), y, reduction="sum"), leaf)[0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        if TRAITS[name].mixture_bn:
            with through(model, "clean"):
                other = torch.autograd.grad(F.cross_entropy(model.logits(leaf), y, reduction="sum"), leaf)[0]
            assert float((other.sign() == found.sign()).double().mean()) < 0.95
        if isinstance(model.classifier, CosineClassifier):
            unscaled = F.cross_entropy(model.logits(leaf) / model.classifier.scale, y, reduction="sum")
            other = torch.autograd.grad(unscaled, leaf)[0]
            assert float((other.sign() == found.sign()).double().mean()) < 0.99


# -- steps -------------------------------------------------------------------------------------------------------------

RUNS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"steps": 2} if name != "fast" else {}) for name in OBJECTIVES),
    *((name, {"replay": 2}) for name in REPLAYED),
    ("that", {"steps": 1, "bank_kind": "dataset", "num_negatives": 12}),
    ("that", {"replay": 2, "bank_kind": "dataset", "num_negatives": 12}),
    ("that", {"steps": 1, "denoise": True}),
    ("mbn", {"steps": 1, "denoise": True, "grad_accum_steps": 2}),
    ("that-no-nce", {"steps": 1, "negatives": "batch"}),
    ("trades", {"steps": 2, "grad_accum_steps": 2, "attack_engine": "fused"}),
]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda value: str(value))
def test_two_steps_train_every_part_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    config = config_of(name, **{"attack_engine": "auto", **options})
    state = state_of(config)
    traits, replay = TRAITS[name], config.attack.replay
    model, encoder = state.model, state.clean_encoder
    assert (model.feature_head is not None) == (encoder is not None) == traits.has_clean_encoder
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    frozen = {} if encoder is None else {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    shown: list[int] = []
    model.trunk.register_forward_pre_hook(lambda module, args: shown.append(len(args[0])) if module.training else None)
    for step in range(2):
        if replay > 1:
            free_step(state, config, batch_of(step), Draw(0))
        else:
            standard_step(state, config, batch_of(step), Draw(3, 0, step), num_classes=CLASSES)
    parts = config.optim.grad_accum_steps
    assert shown == [(16 if name in PAIRED else 8) // parts] * (2 * replay * parts)  # one forward for each backward
    for key, tensor in model.state_dict().items():
        # A denoising block's bias is a constant that the BN layers of the next stage take away again.
        assert bool((tensor != before[key]).any()) or (config.model.denoise and key.endswith("bias")), key
    if encoder is not None:
        assert all(torch.equal(tensor, frozen[key]) for key, tensor in encoder.state_dict().items())
        assert all(parameter.grad is None for parameter in encoder.parameters())
    row = means(state.meter.read(), attacked=traits.attacked, parts=traits.parts)
    assert all(np.isfinite(value) for value in row.values())
    assert {key for key in row if key.startswith("loss_")} == {"loss_cls", *traits.parts}
    assert ("kl_tail_pct" in row) == ("loss_kl" in traits.parts)
    assert row["skipped_steps"] == 0
    assert (state.engine is not None) == (traits.attacked and replay == 1)
    if config.model.denoise:
        assert state.engine is not None
        assert state.engine.name == "eager"
    if encoder is None or config.method.negatives == "batch":
        assert state.bank is None
    elif config.method.bank_kind == "queue":  # written once for each minibatch, whatever the replays
        assert state.bank is not None
        assert int(state.bank.state()["ptr"]) == 16
    else:
        assert state.bank is not None
        assert int(state.bank.state()["count"]) == 2
        rows = {int(row) for step in range(2) for row in batch_of(step).index}
        assert set(state.bank.state()["written"].nonzero()[:, 0].tolist()) == rows


@pytest.mark.parametrize("name", ["mbn", "that"])
def test_a_skipped_step_takes_back_the_statistics_of_every_branch_and_block(name: str) -> None:
    config = config_of(name, steps=1, denoise=True, model_ema=True)
    state = state_of(config, torch.float32)
    standard_step(state, config, batch_of(0), Draw(3), num_classes=CLASSES)
    before = {file: {k: v.clone() for k, v in group.items()} for file, group in state.tensors().items()}
    assert state.scaler._scale is not None
    state.scaler._scale.fill_(float("inf"))
    standard_step(state, config, batch_of(1), Draw(3, 0, 1), num_classes=CLASSES)
    assert int(state.meter.read()["skipped"]) == 1
    for file in ("model", "ema"):
        for key, tensor in state.tensors()[file].items():
            assert torch.equal(tensor, before[file][key]), f"{file}: {key}"


def test_share_of_the_tail_in_the_kl_is_that_of_the_images_trained_on() -> None:
    """Many small classes and a large one: the row's figure against numpy."""
    rng = np.random.default_rng(0)
    z, z_adv = (torch.from_numpy(rng.normal(size=(4, 300)) + np.eye(300)[0] * top) for top in (8.0, 4.0))
    found = kl_divergence(z, z_adv)
    p, q = (np.exp(log_softmax(logits.numpy())) for logits in (z, z_adv))
    terms = p * np.log(p / q)
    sums = {"loss": 0.0, "loss_cls": 0.0, "loss_kl": float(found.kl) * 4, "kl_tail": float(found.tail) * 4, "images": 4}
    empty = {"correct": 0.0, "steps": 1.0, "grad_norm": 0.0, "zero_grad": 0.0, "nan_grad": 0.0, "skipped": 0.0}
    row = means({**sums, **empty}, attacked=True, parts=("loss_kl",))
    assert row["kl_tail_pct"] == pytest.approx(100 * terms[p < 0.01].sum() / terms.sum(), rel=1e-9)
    assert row["kl_tail_pct"] < 0  # the attacked image moves probability into the tail, where Eq. 4 has negative terms
    assert means({**sums, **empty, "loss_kl": 0.0}, attacked=True, parts=("loss_kl",))["kl_tail_pct"] == 0


def test_free_delta_of_mixture_bn_ascends_the_attacked_images_cross_entropy_alone() -> None:
    """The clean half does not depend on delta, so that under replay, too, only the adversarial branch is attacked."""
    config = config_of("mbn", replay=2, alpha=0.01)
    state, batch = state_of(config), batch_of()
    twin = copy.deepcopy(state.model).train()
    x = (batch.x.double() / 255).requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(twin.logits(x), batch.y), x)
    deltas: list[Tensor] = []
    assert state.delta is not None
    step_ = state.delta.step_

    def spy(*args: Any, **kwargs: Any) -> None:
        step_(*args, **kwargs)
        assert state.delta is not None
        deltas.append(state.delta.value.clone())

    state.delta.step_ = spy  # type: ignore[method-assign]
    free_step(state, config, batch, Draw(0))
    torch.testing.assert_close(deltas[0], 0.01 * grad.sign(), rtol=0, atol=1e-12)
