"""PGD: closed forms on linear models, its geometry after every step, and everything it must leave as it was."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttht import kernels
from fasttht.attacks.pgd import FP16_LOSS_SCALE, Attacked, Draw, attack, evaluating, input_gradient, pgd_linf
from fasttht.attacks.threat import Threat
from fasttht.models.two_head import TwoHead

Logits = Callable[[Tensor], Tensor]
DRAW = Draw(seed=5, epoch=1, step=4)
COUNTERS = {"seed": 5, "epoch": 1, "step": 4}
CLASSES = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(rows: int, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pixels, some of them on the borders of the image range."""
    x = torch.rand(rows, 3, side, side, generator=generator(rows), dtype=dtype)
    return ((x - 0.5) * 1.2 + 0.5).clamp(0, 1)


def labels(rows: int) -> Tensor:
    return torch.arange(rows) % CLASSES


@pytest.fixture(scope="module")
def trained() -> TwoHead:
    """A small network whose blocks are no identities and whose BN statistics are those of no batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = TwoHead("resnet18", CLASSES, stem="small", width=4, feat_dim=6).double()
        with torch.no_grad():
            for tensor in model.trunk.state_dict().values():
                if tensor.ndim == 1:
                    tensor.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def model(trained: TwoHead) -> TwoHead:
    return copy.deepcopy(trained)


@pytest.fixture
def smooth() -> Iterator[nn.Module]:
    """Twice differentiable: a small step along the gradient's sign cannot lower the loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Softplus(), nn.Linear(32, CLASSES)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)
        yield model


def direction(side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight per pixel, (3, side, side); every seventh is exactly zero."""
    weight = torch.randn(3, side, side, generator=generator(9), dtype=dtype)
    weight.view(-1)[::7] = 0
    return weight


def last_class_along(weight: Tensor, num_classes: int) -> Logits:
    """Linear logits (0, ..., 0, w.x): more w.x makes the last class, and only that, more likely.

    The gradient of the cross entropy is (p_last - 1) w for the last class and p_last w for any other.
    """

    def logits(x: Tensor) -> Tensor:
        score = (x * weight).flatten(1).sum(dim=1, keepdim=True)
        return torch.cat([torch.zeros_like(score).expand(-1, num_classes - 1), score], dim=1)

    return logits


def corner(x: Tensor, start: Tensor, signs: Tensor, eps: float) -> Tensor:
    """clip(x +- eps, 0, 1) along the signs; where the sign is zero, the start."""
    ends = torch.where(signs > 0, (x + eps).clamp(max=1), (x - eps).clamp(min=0))
    return torch.where(signs == 0, start, ends)


@pytest.mark.parametrize("clean_prob", [0.0, 1.0], ids=["from noise", "from clean"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attack_on_a_linear_model_ends_in_the_corner_of_the_ball(
    device: torch.device, dtype: torch.dtype, num_classes: int, targeted: bool, clean_prob: float
) -> None:
    """Bit for bit: with steps * alpha over the ball's diameter the projection decides."""
    eps, index = 16 / 255, torch.arange(10, device=device) + 70
    x, weight = images(10, dtype=dtype).to(device), direction(dtype=dtype).to(device)
    y = torch.arange(10, device=device) % num_classes
    threat = Threat(eps=eps, alpha=eps / 4, steps=9, targeted=targeted, clean_prob=clean_prob)
    logits = last_class_along(weight, num_classes)
    attacked = attack(input_gradient(logits), x, y, index, threat, DRAW, num_classes=num_classes)
    start = kernels.draw_start(x, index, eps=eps, clean_prob=clean_prob, **COUNTERS)
    wanted = kernels.draw_target(y, index, num_classes, **COUNTERS) if targeted else y
    # Away from the last class, or towards any other, is down along w.
    towards = wanted == num_classes - 1
    up = (towards if targeted else ~towards).view(-1, 1, 1, 1)
    assert bool(up.any())
    assert not bool(up.all())
    expected = corner(x, start, torch.where(up, weight.sign(), -weight.sign()), eps)
    assert torch.equal(attacked.x_adv, expected)
    assert float(attacked.zero_grad) == pytest.approx(float((weight == 0).double().mean()))
    assert float(attacked.nan_grad) == 0


def test_each_step_moves_every_pixel_by_alpha_until_the_border() -> None:
    eps, x, weight = 0.2, images(4, dtype=torch.float64) * 0.2 + 0.4, direction(dtype=torch.float64)
    for steps in range(5):
        threat = Threat(eps=eps, alpha=0.0625, steps=steps)
        found = pgd_linf(
            input_gradient(last_class_along(weight, 2)), x, torch.zeros(4, dtype=torch.int64), threat, x
        ).x_adv
        expected = x + weight.sign() * min(steps * 0.0625, eps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(
    ("eps", "alpha"), [(4 / 255, 1 / 255), (16 / 255, 4 / 255), (0.3, 0.25), (0.01, 0.5), (1, 0.3)]
)
def test_every_iterate_is_inside_the_ball_and_the_image_range(
    model: TwoHead, eps: float, alpha: float, targeted: bool
) -> None:
    """In the interval form, evaluated in the images' own type: |x_adv - x| <= eps fails by rounding."""
    model.float().eval()
    x, seen = images(4), []

    def logits(image: Tensor) -> Tensor:
        seen.append(image.detach().clone())
        return model.logits(image)

    threat = Threat(eps=eps, alpha=alpha, steps=4, targeted=targeted)
    attacked = attack(input_gradient(logits), x, labels(4), torch.arange(4), threat, DRAW, num_classes=CLASSES)
    seen.append(attacked.x_adv)
    assert len(seen) == 5
    for iterate in seen:
        assert iterate.dtype == torch.float32
        inside = (iterate >= x - eps) & (iterate <= x + eps) & (iterate >= 0) & (iterate <= 1)
        assert bool(inside.all())
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))
    assert torch.equal(x, images(4))


def never(_x: Tensor) -> Tensor:
    raise AssertionError("no forward was needed")


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_no_steps_give_the_random_start_without_a_forward(targeted: bool) -> None:
    x, index = images(5), torch.arange(5) * 3
    threat = Threat(eps=0.1, alpha=0.1, steps=0, targeted=targeted)
    attacked = attack(input_gradient(never), x, labels(5), index, threat, DRAW, num_classes=CLASSES)
    assert torch.equal(attacked.x_adv, kernels.draw_start(x, index, eps=0.1, clean_prob=0, **COUNTERS))
    assert not torch.equal(attacked.x_adv, x)
    assert (float(attacked.zero_grad), float(attacked.nan_grad)) == (0, 0)


def test_a_ball_of_radius_zero_gives_the_image_itself(model: TwoHead) -> None:
    x = images(5, dtype=torch.float64)
    threat = Threat(eps=0, alpha=0.1, steps=3)
    attacked = attack(
        input_gradient(model.eval().logits), x, labels(5), torch.arange(5), threat, DRAW, num_classes=CLASSES
    )
    assert torch.equal(attacked.x_adv, x)
    assert attacked.x_adv.data_ptr() != x.data_ptr()


def test_the_start_is_not_written_to(smooth: nn.Module) -> None:
    x = images(3, dtype=torch.float64)
    start = x.clone()
    attacked = pgd_linf(input_gradient(smooth), x, labels(3), Threat(eps=0.1, alpha=0.1, steps=2), start)
    assert torch.equal(start, x)
    assert not torch.equal(attacked.x_adv, x)
    assert not attacked.x_adv.requires_grad


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_the_loss_of_no_image_is_lower_at_the_end_than_at_the_start(smooth: nn.Module, targeted: bool) -> None:
    """Of the cross entropy to the label; targeted, that to the target is not higher."""
    x, index = images(16, dtype=torch.float64), torch.arange(16)
    threat = Threat(eps=0.05, alpha=0.005, steps=10, targeted=targeted)
    attacked = attack(input_gradient(smooth), x, labels(16), index, threat, DRAW, num_classes=CLASSES)
    start = kernels.draw_start(x, index, eps=0.05, clean_prob=0, **COUNTERS)
    y = kernels.draw_target(labels(16), index, CLASSES, **COUNTERS) if targeted else labels(16)
    losses = [F.cross_entropy(smooth(at), y, reduction="none") for at in (start, attacked.x_adv)]
    gain = (losses[0] - losses[1] if targeted else losses[1] - losses[0]).detach()
    assert float(gain.min()) > 0


class StateOf:
    """What an attack may not change: weights, gradients, buffers, modes, the global random state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.grads = {
            name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        }
        self.needs = {name: p.requires_grad for name, p in model.named_parameters()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        self.rng = torch.get_rng_state()
        self.grad_enabled = torch.is_grad_enabled()

    def check(self) -> None:
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self.tensors[name]), name
        for name, parameter in self.model.named_parameters():
            kept, value = self.grads[name]
            assert parameter.grad is kept, name
            if kept is not None and value is not None:
                assert torch.equal(value, kept), name
            assert parameter.requires_grad == self.needs[name], name
        assert {name: module.training for name, module in self.model.named_modules()} == self.modes
        assert torch.equal(torch.get_rng_state(), self.rng)
        assert torch.is_grad_enabled() == self.grad_enabled


@pytest.fixture
def mixed(model: TwoHead) -> TwoHead:
    """Some gradients set and some not, some weights frozen, modes that differ from module to module."""
    model.train()
    model.trunk.layer2.eval()
    model.trunk.layer3[1].eval()
    assert model.feature_head is not None
    model.feature_head.eval()
    for i, parameter in enumerate(model.parameters()):
        if i % 2:
            parameter.grad = torch.full_like(parameter, float(i))
        parameter.requires_grad_(i % 3 != 0)
    return model


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_attack_leaves_gradients_buffers_modes_and_rng_as_they_were(
    mixed: TwoHead, targeted: bool, grad_enabled: bool
) -> None:
    x = images(4, dtype=torch.float64)
    threat = Threat(eps=0.1, alpha=0.05, steps=3, targeted=targeted, clean_prob=0.5)
    with torch.set_grad_enabled(grad_enabled):
        before = StateOf(mixed)
        with evaluating(mixed):
            assert not any(module.training for module in mixed.modules())
            attacked = attack(
                input_gradient(mixed.logits), x, labels(4), torch.arange(4), threat, DRAW, num_classes=CLASSES
            )
        before.check()
    assert not torch.equal(attacked.x_adv, x)


@pytest.mark.parametrize("failing", [1, 3])
def test_attack_that_raises_midway_leaves_everything_as_it_was(mixed: TwoHead, failing: int) -> None:
    calls = []

    def logits(x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        return mixed.logits(x)

    before = StateOf(mixed)
    threat = Threat(eps=0.1, alpha=0.05, steps=3)
    x = images(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out of memory"), evaluating(mixed):
        attack(input_gradient(logits), x, labels(4), torch.arange(4), threat, DRAW, num_classes=CLASSES)
    assert len(calls) == failing
    before.check()


def poisoned(logits: Logits, where: Tensor, value: float) -> Logits:
    """The same logits with some elements of the input gradient replaced."""

    def function(x: Tensor) -> Tensor:
        x = x * 1
        x.register_hook(lambda grad: grad.masked_fill(where, value))  # type: ignore[no-untyped-call]
        return logits(x)

    return function


@pytest.mark.parametrize("value", [float("nan"), 0.0], ids=["nan", "zero"])
def test_gradients_that_are_nan_or_zero_move_nothing_and_are_counted(smooth: nn.Module, value: float) -> None:
    x = images(4, dtype=torch.float64) * 0.8 + 0.1
    where = torch.rand(x.shape, generator=generator()) < 0.3
    threat = Threat(eps=0.05, alpha=0.02, steps=3)
    attacked = pgd_linf(input_gradient(poisoned(smooth, where, value)), x, labels(4), threat, x)
    share = float(where.double().mean())
    zero, nan = (share, 0.0) if value == 0 else (0.0, share)
    assert float(attacked.zero_grad) == pytest.approx(zero)
    assert float(attacked.nan_grad) == pytest.approx(nan)
    assert torch.equal(attacked.x_adv == x, where)
    assert bool(attacked.x_adv.isfinite().all())


@pytest.mark.parametrize(("bad_calls", "expected"), [({0, 1}, 0.0), ({2}, 1.0)])
def test_health_is_that_of_the_last_gradient(smooth: nn.Module, bad_calls: set[int], expected: float) -> None:
    x = images(2, dtype=torch.float64)
    bad = poisoned(smooth, torch.ones_like(x, dtype=torch.bool), 0.0)
    calls: list[int] = []

    def logits(at: Tensor) -> Tensor:
        calls.append(len(calls))
        found: Tensor = bad(at) if calls[-1] in bad_calls else smooth(at)
        return found

    attacked = pgd_linf(input_gradient(logits), x, labels(2), Threat(eps=0.05, alpha=0.02, steps=3), x)
    assert float(attacked.zero_grad) == expected


def test_infinite_gradients_step_by_alpha_like_any_other(smooth: nn.Module) -> None:
    x = images(2, dtype=torch.float64) * 0.8 + 0.1
    where = torch.ones_like(x, dtype=torch.bool)
    attacked = pgd_linf(
        input_gradient(poisoned(smooth, where, float("-inf"))), x, labels(2), Threat(eps=0.05, alpha=0.02, steps=1), x
    )
    torch.testing.assert_close(attacked.x_adv, x - 0.02, rtol=0, atol=1e-15)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_result_does_not_depend_on_how_the_batch_is_cut(model: TwoHead, targeted: bool) -> None:
    """Draws bit for bit; iterates in float64 to rounding. The loss is a sum, so no image sees the batch's size."""
    model.eval()
    x, y, index = images(5, dtype=torch.float64), labels(5), torch.arange(5) * 5 + 2

    def run(rows: Tensor, steps: int) -> Attacked:
        threat = Threat(eps=0.1, alpha=0.03, steps=steps, targeted=targeted, clean_prob=0.5)
        return attack(input_gradient(model.logits), x[rows], y[rows], index[rows], threat, DRAW, num_classes=CLASSES)

    everything = torch.arange(5)
    whole = {steps: run(everything, steps).x_adv for steps in (0, 3)}
    assert not torch.equal(whole[0], whole[3])
    for rows in (everything[:3], everything[3:], everything[4:], everything.flip(0)):
        assert torch.equal(run(rows, 0).x_adv, whole[0][rows])
        torch.testing.assert_close(run(rows, 3).x_adv, whole[3][rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss_scale", [2.0**-20, 0.5, FP16_LOSS_SCALE, 2.0**40])
def test_loss_scale_of_a_power_of_two_does_not_change_the_result(model: TwoHead, loss_scale: float) -> None:
    model.eval()
    x, threat = images(4, dtype=torch.float64), Threat(eps=0.1, alpha=0.03, steps=3)
    one, two = (
        attack(input_gradient(model.logits, scale), x, labels(4), torch.arange(4), threat, DRAW, num_classes=CLASSES)
        for scale in (1.0, loss_scale)
    )
    assert torch.equal(one.x_adv, two.x_adv)
    assert torch.equal(one.zero_grad, two.zero_grad)


def test_attack_in_float16_does_not_stall_where_a_mean_loss_would() -> None:
    """A confident network: 1 - p is about 1e-5, and a mean over 64 images takes it below float16's 6e-8."""
    x, y = images(64), torch.zeros(64, dtype=torch.int64)
    weight = direction().half() / 64

    def logits(image: Tensor) -> Tensor:
        score = (image.half() * weight).flatten(1).sum(dim=1, keepdim=True)
        confident = torch.cat([torch.full_like(score, 11.5), score], dim=1)
        return confident.float()

    leaf = x.clone().requires_grad_(True)
    (of_mean,) = torch.autograd.grad(F.cross_entropy(logits(leaf), y), leaf)
    assert float((of_mean == 0).float().mean()) > 0.9  # this is what would have happened
    threat = Threat(eps=16 / 255, alpha=4 / 255, steps=10)
    attacked = pgd_linf(input_gradient(logits, FP16_LOSS_SCALE), x, y, threat, x)
    no_weight = float((weight == 0).float().mean())
    assert float(attacked.zero_grad) == pytest.approx(no_weight, abs=0.01)
    signs = weight.float().sign().expand_as(x)
    reached = attacked.x_adv == corner(x, x, signs, 16 / 255)
    assert float(reached.float().mean()) > 0.98


@pytest.mark.parametrize("field", ["seed", "epoch", "step"])
def test_start_and_target_follow_every_counter_of_the_draw(field: str) -> None:
    x, index = images(40), torch.arange(40)
    threat = Threat(eps=0.1, alpha=0.1, steps=0)
    one = attack(input_gradient(never), x, labels(40), index, threat, DRAW, num_classes=CLASSES)
    other = Draw(**{**COUNTERS, field: COUNTERS[field] + 1})
    two = attack(input_gradient(never), x, labels(40), index, threat, other, num_classes=CLASSES)
    assert float((one.x_adv == two.x_adv).float().mean()) < 0.2  # equal where both are clipped at 0 or 1
    seen: dict[Draw, Tensor] = {}
    for draw in (DRAW, other):
        # One big step to the target from the middle of the range: the sign tells which class was drawn.
        gray = torch.full((40, 3, 1, 1), 0.5, dtype=torch.float64)
        logits = last_class_along(torch.ones(3, 1, 1, dtype=torch.float64), CLASSES)
        step = Threat(eps=0.25, alpha=0.5, steps=1, targeted=True)
        moved = attack(
            input_gradient(logits), gray, torch.zeros(40, dtype=torch.int64), index, step, draw, num_classes=CLASSES
        )
        seen[draw] = moved.x_adv[:, 0, 0, 0] > 0.5
        counters: dict[str, Any] = vars(draw)
        target = kernels.draw_target(torch.zeros(40, dtype=torch.int64), index, CLASSES, **counters)
        assert torch.equal(seen[draw], target == CLASSES - 1)
    assert not torch.equal(seen[DRAW], seen[other])


GOOD: dict[str, Any] = {"eps": 0.1, "alpha": 0.05, "steps": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps": 16}, r"eps in \[0, 1\], got 16; pixels are in \[0, 1\], so 16 is 16/255"),
        ({"eps": -0.1}, r"eps in \[0, 1\], got -0.1"),
        ({"eps": float("nan")}, r"eps in \[0, 1\], got nan"),
        ({"alpha": -0.1}, "alpha and steps of at least 0, got -0.1 and 3"),
        ({"steps": -1}, "alpha and steps of at least 0, got 0.05 and -1"),
        ({"clean_prob": 1.1}, r"clean_prob in \[0, 1\], got 1.1"),
        ({"clean_prob": -0.1}, r"clean_prob in \[0, 1\], got -0.1"),
    ],
    ids=str,
)
def test_threats_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"threat: expected {words}"):
        Threat(**{**GOOD, **changes})


def test_threats_at_the_ends_of_their_ranges_are_allowed() -> None:
    assert Threat(eps=0, alpha=0, steps=0, clean_prob=1).eps == 0
    assert Threat(eps=1, alpha=5, steps=1, clean_prob=0).alpha == 5


def test_threat_is_named_after_its_steps_and_goal() -> None:
    assert Threat(eps=0.1, alpha=0.1, steps=10).name == "pgd10"
    assert Threat(eps=0.1, alpha=0.1, steps=50, targeted=True).name == "pgd50_targeted"


# -- the 8-bit lattice -------------------------------------------------------------------------------------------------


def levels_of(num: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    x = torch.randint(0, 256, (num, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.changes_rng
@pytest.mark.parametrize("targeted", [False, True])
def test_ten_lattice_steps_equal_integer_arithmetic_in_numpy(model: TwoHead, targeted: bool) -> None:
    x, index = levels_of(), torch.arange(4)
    threat = Threat(eps=16 / 255, alpha=4 / 255, steps=10, targeted=targeted)
    gradients: list[Tensor] = []
    plain = input_gradient(model.eval().logits)

    def gradient(images: Tensor, y: Tensor) -> Tensor:
        gradients.append(plain(images, y))
        return gradients[-1]

    found = attack(gradient, x, labels(4), index, threat, DRAW, num_classes=CLASSES).x_adv
    state = kernels.draw_lattice_start(x, index, eps=16, clean_prob=0.0, **COUNTERS).numpy().astype(np.int64)
    low, high = (np.clip(x.numpy().astype(np.int64) + offset, 0, 255) for offset in (-16, 16))
    for grad in gradients:
        state = np.clip(state + (-4 if targeted else 4) * np.sign(grad.numpy()).astype(np.int64), low, high)
    assert len(gradients) == 10
    assert np.array_equal(found.numpy(), (state / 255).astype(np.float32))
    assert found.dtype == torch.float32
    assert np.abs(state - x.numpy().astype(np.int64)).max() == 16


@pytest.mark.changes_rng
def test_lattice_attacks_start_from_whole_levels_and_do_not_depend_on_the_batch(model: TwoHead) -> None:
    x, index = levels_of(8), torch.arange(8)
    threat = Threat(eps=3 / 255, alpha=1 / 255, steps=0)
    whole = attack(input_gradient(never), x, labels(8), index, threat, DRAW, num_classes=CLASSES).x_adv
    offsets = (whole * 255).round() - x.float()
    assert set(offsets.unique().tolist()) == set(range(-3, 4))
    halves = [
        attack(input_gradient(never), x[rows], labels(8)[rows], index[rows], threat, DRAW, num_classes=CLASSES).x_adv
        for rows in (slice(0, 3), slice(3, 8))
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_broken_levels_are_refused() -> None:
    x = levels_of()
    with pytest.raises(ValueError, match=r"expected eps and alpha of whole 255ths, got 1.5/255"):
        attack(
            input_gradient(never),
            x,
            labels(4),
            torch.arange(4),
            Threat(eps=1.5 / 255, alpha=1 / 255, steps=1),
            DRAW,
            num_classes=CLASSES,
        )
    with pytest.raises(ValueError, match=r"got 0.5/255"):
        attack(
            input_gradient(never),
            x,
            labels(4),
            torch.arange(4),
            Threat(eps=2 / 255, alpha=0.5 / 255, steps=1),
            DRAW,
            num_classes=CLASSES,
        )
