"""The robust encoder: normalisation inside, a cosine classifier that is Eq. 6, a feature of unit norm."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttht.models.two_head import CosineClassifier, TwoHead, decay_groups

# Of the ImageNet training set, as torchvision documents them.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def _keep_rng() -> Iterator[None]:
    """Initial weights come from the global generator: it is seeded here and restored behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small(**options: Any) -> TwoHead:
    defaults: dict[str, Any] = {"stem": "small", "width": 4, "feat_dim": 6}
    model = TwoHead("resnet18", 5, **{**defaults, **options})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # no block is an identity
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
    return model.eval()


def images(rows: int = 4, **options: Any) -> Tensor:
    return torch.rand(rows, 3, 8, 8, **options)


def cosine_logits(h: Tensor, weight: Tensor, scale: float) -> Any:
    """Eq. 6's exponent in numpy, in float64."""
    one, two = h.detach().double().numpy(), weight.detach().double().numpy()
    norms = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(two, axis=1)[None, :]
    return scale * (one @ two.T) / norms


def test_normalisation_is_the_models_first_operation() -> None:
    model, x = small().double(), images(dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    seen = []
    model.trunk.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    out = model(x)
    model.logits(x)
    assert len(seen) == 2
    for normalised in seen:
        torch.testing.assert_close(normalised, (x - mean) / std, rtol=1e-6, atol=1e-6)  # float32 constants
    h = model.trunk((x - mean) / std)
    torch.testing.assert_close(out.logits, model.classifier(h), rtol=1e-5, atol=1e-5)


def test_statistics_of_the_images_are_not_saved() -> None:
    assert not [name for name in small().state_dict() if name.startswith("normalize")]


def test_feature_has_unit_norm_and_follows_both_layers() -> None:
    model, x = small().double(), images(dtype=torch.float64)
    feat = model(x).feat
    h = model.trunk(model.normalize(x))
    assert feat is not None
    assert model.feature_head is not None
    first, _, second = model.feature_head
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    inner = np.maximum((h @ first.weight.T + first.bias).detach().numpy(), 0)
    outer = inner @ second.weight.detach().numpy().T + second.bias.detach().numpy()
    expected = outer / np.linalg.norm(outer, axis=1, keepdims=True)
    torch.testing.assert_close(feat.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)
    np.testing.assert_allclose(feat.detach().numpy(), expected, rtol=1e-10)


def test_cosine_logits_equal_the_closed_form() -> None:
    h, classifier = torch.randn(7, 9, dtype=torch.float64) * 30, CosineClassifier(9, 5, 12.5).double()
    with torch.no_grad():
        classifier.weight.mul_(torch.tensor([1e-3, 1, 7, 100, 0.5])[:, None])  # Only the direction counts.
    np.testing.assert_allclose(
        classifier(h).detach().numpy(), cosine_logits(h, classifier.weight, 12.5), rtol=1e-10, atol=1e-12
    )
    assert float(classifier(h).detach().abs().max()) <= 12.5


def test_model_logits_are_the_classifier_of_the_trunk() -> None:
    model, x = small(scale_init=20.0).double(), images(dtype=torch.float64)
    h = model.trunk(model.normalize(x))
    out = model(x)
    assert isinstance(model.classifier, CosineClassifier)
    expected = cosine_logits(h, model.classifier.weight, 20.0)
    np.testing.assert_allclose(out.logits.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(model.logits(x), out.logits)


def test_gradient_flows_through_both_normalisations_and_the_scale() -> None:
    classifier = CosineClassifier(6, 4).double()

    def function(h: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        values = {"weight": weight, "scale": scale}
        found: Tensor = torch.func.functional_call(classifier, values, h)
        return found

    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (h, weight, scale))
    gradients = torch.autograd.grad(function(h, weight, scale)[:, 1].sum(), (h, weight, scale))
    assert all(bool(gradient.any()) for gradient in gradients)
    # A cosine does not change along its own vector: each gradient is orthogonal to it.
    for vector, gradient in zip((h, weight), gradients, strict=False):
        assert float((vector * gradient).sum(dim=1).detach().abs().max()) < 1e-12


def test_gradient_of_the_feature_flows_through_its_normalisation() -> None:
    head = small().double().feature_head
    assert head is not None
    h = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (h,))
    assert bool(torch.autograd.grad(head(h)[:, 0].sum(), h)[0].any())


@pytest.mark.parametrize(("value", "expected"), [(0.3, 1.0), (-5.0, 1.0), (1.0, 1.0), (50.0, 50.0), (250.0, 100.0)])
def test_scale_is_brought_back_into_its_bounds_in_place(value: float, expected: float) -> None:
    classifier = CosineClassifier(6, 4, scale_init=value)
    assert float(classifier.scale.detach()) == pytest.approx(value)
    scale, weight = classifier.scale, classifier.weight.detach().clone()
    classifier.clamp_scale_()
    assert classifier.scale is scale
    assert float(scale.detach()) == expected
    assert scale.requires_grad
    assert torch.equal(classifier.weight, weight)


def test_class_weights_start_with_unit_norm_in_random_directions() -> None:
    classifier = CosineClassifier(512, 1000)
    torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(1000))
    cosines = (classifier.weight @ classifier.weight.T).fill_diagonal_(0)
    assert float(cosines.detach().abs().max()) < 0.3
    assert float(classifier.scale.detach()) == 16


def test_linear_classifier_starts_small_without_bias() -> None:
    classifier = TwoHead("resnet18", 100, classifier="linear", width=16, feat_dim=None).classifier
    assert isinstance(classifier, nn.Linear)
    assert not classifier.bias.any()
    assert float(classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize("feat_dim", [None, 6])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_only_the_heads_asked_for_are_built(classifier: Any, feat_dim: int | None) -> None:
    model = small(classifier=classifier, feat_dim=feat_dim)
    heads = {name for name in model.state_dict() if not name.startswith("trunk.")}
    expected = {"classifier.weight", "classifier.scale" if classifier == "cosine" else "classifier.bias"}
    if feat_dim is not None:
        expected |= {f"feature_head.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    assert heads == expected
    logits, feat = model(images())
    assert logits.shape == (4, 5)
    assert (None if feat is None else feat.shape) == (None if feat_dim is None else (4, 6))
    terms = [logits.sum(), *([] if feat is None else [feat[:, 0].sum()])]
    torch.autograd.backward(terms)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("feat_dim", [None, 6])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_exactly_convolution_and_linear_weights_decay(classifier: Any, feat_dim: int | None) -> None:
    model = small(classifier=classifier, feat_dim=feat_dim)
    expected = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear | CosineClassifier)
    }
    decayed, kept = decay_groups(model, 1e-4)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (1e-4, 0.0)
    found: list[list[int]] = [[id(p) for p in group["params"]] for group in (decayed, kept)]  # type: ignore[attr-defined]
    assert sorted(found[0]) == sorted(expected)
    assert sorted(found[0] + found[1]) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_outputs_are_float32_under_bfloat16_autocast(device: torch.device, classifier: Any) -> None:
    model = small(classifier=classifier).to(device)
    x = images().to(device)
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.autocast(device.type, torch.bfloat16):
        out, alone = model(x), model.logits(x)
    assert [h.dtype for h in seen] == [torch.bfloat16] * 2  # the trunk did run in bfloat16
    assert out.feat is not None
    assert (out.logits.dtype, alone.dtype, out.feat.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(out.feat.norm(dim=1), torch.ones(4, device=device), rtol=1e-6, atol=1e-6)
    if classifier == "cosine":
        # At s = 16 a cosine taken in bfloat16 would be off by up to 0.06.
        expected = cosine_logits(seen[0].cpu(), model.classifier.weight.cpu(), 16.0)
        np.testing.assert_allclose(out.logits.detach().cpu().numpy(), expected, rtol=0, atol=1e-4)
