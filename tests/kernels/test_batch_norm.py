"""The fused batch norm against nn.BatchNorm2d, an addition and a ReLU: results, all gradients, running statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttht import kernels
from fasttht.kernels import batch_norm, bn_reference

SHAPES = [(4, 6, 5, 3), (2, 8, 1, 1), (3, 1, 7, 7)]
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def layer(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, momentum=0.3, eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        for i, tensor in enumerate((bn.weight, bn.bias, bn.running_mean, bn.running_var)):
            assert tensor is not None
            tensor.copy_(draw((channels,), i).abs() + 0.1)
    return bn


def statistics(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    return bn.running_mean, bn.running_var


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_function_equals_the_layers(shape: tuple[int, ...], added: bool) -> None:
    plain, fused = layer(shape[1]), layer(shape[1])
    found, expected = [], []
    for bn, results in ((plain, expected), (fused, found)):
        x = draw(shape, 1).requires_grad_(True)
        other = draw(shape, 2).requires_grad_(True) if added else None
        for step in range(2):  # the second step averages into statistics that the first has moved
            if bn is plain:
                total = bn(x) if other is None else bn(x) + other
                out = total.relu()
            else:
                out = kernels.bn_relu(x, other, bn.weight, bn.bias, *statistics(bn), momentum=0.3, eps=1e-3)
            leaves = [leaf for leaf in (x, other, bn.weight, bn.bias) if leaf is not None]
            results += [out.detach(), *torch.autograd.grad(out, leaves, draw(shape, 3 + step))]
        results += statistics(bn)
    for one, other_ in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other_, **CLOSE)
    assert bool((expected[0] == 0).any())  # the ReLU clips something
    assert not torch.equal(statistics(fused)[0], statistics(layer(shape[1]))[0])


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_equal_autograd_of_the_layers(shape: tuple[int, ...], added: bool) -> None:
    """The three ops themselves, which CPU tensors bypass, put together as on a GPU."""
    bn, x, grad = layer(shape[1]), draw(shape, 1).requires_grad_(True), draw(shape, 3)
    other = draw(shape, 2).requires_grad_(True) if added else None
    expected = (bn(x) if other is None else bn(x) + other).relu()
    leaves = [leaf for leaf in (x, bn.weight, bn.bias, other) if leaf is not None]
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    twin, data, beside = layer(shape[1]), x.detach(), None if other is None else other.detach()
    weight = twin.weight.detach()
    out, mean, invstd = batch_norm.forward_by_ops(
        data, beside, weight, twin.bias.detach(), *statistics(twin), 0.3, 1e-3
    )
    dx, dother, dweight, dbias = batch_norm.backward_by_ops(grad, out, data, mean, invstd, weight, added=added)
    torch.testing.assert_close(out, expected, **CLOSE)
    found = [dx, dweight, dbias] if dother is None else [dx, dweight, dbias, dother]
    for one, two in zip(found, expected_grads, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    for one, two in zip(statistics(twin), statistics(bn), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_kernels_differentiate_a_real_layer(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, sums over many rows in two rounds included; the reference in float64 is the measure."""
    for name in ("_sums", "_grad"):  # CPU tensors would go straight to the reference
        monkeypatch.setattr(batch_norm, name, getattr(batch_norm, name)._op)
    shape = (8, 12, 40, 40)
    x, grad, other = (draw(shape, seed, torch.float32) for seed in range(3))
    mean, invstd = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0).rsqrt()
    weight, bias = draw((12,), 4, torch.float32), draw((12,), 5, torch.float32)
    out = torch.ops.fasttht.bn_relu(x, other, mean, invstd, weight, bias)
    # Laid out as no kernel takes it: it is brought into order first.
    found = batch_norm.backward_by_ops(grad.contiguous(), out, x, mean, invstd, weight, added=True)
    assert host.launched == ["bn_relu", "bn_relu_sums", "bn_relu_fold", "bn_relu_fold", "bn_relu_grad"]
    wide = [t.double() for t in (grad, out, x, mean, invstd, weight)]
    sums = bn_reference.bn_relu_sums(*wide[:4])
    dx, dother = torch.empty_like(wide[2]), torch.empty_like(wide[2])
    bn_reference.bn_relu_grad_(dx, dother, *wide, sums)
    expected = (dx, dother, sums[1] * wide[4], sums[0])
    for one, two in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), two, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("added", [True, False])
def test_a_gpu_would_make_four_passes(added: bool) -> None:
    """On tensors without data, which like a GPU's take the ops: the large tensors are seen by these and no others."""
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.split("::")[1]
            if any(isinstance(a, Tensor) and a.ndim == 4 for a in args) and name not in ("empty_like", "detach"):
                seen.append(name)
            return out

    x = torch.empty(4, 16, 8, 8, device="meta").contiguous(memory_format=torch.channels_last).requires_grad_(True)
    other = torch.empty_like(x).requires_grad_(True) if added else None
    weight, bias = (torch.ones(16, device="meta", requires_grad=True) for _ in range(2))
    running = torch.zeros(16, device="meta"), torch.ones(16, device="meta")
    with Log():
        out = kernels.bn_relu(x, other, weight, bias, *running, momentum=0.1, eps=1e-5)
        torch.autograd.backward(out, torch.empty_like(out))
    assert seen == ["bn_statistics_", "bn_relu", "bn_relu_sums", "bn_relu_grad_"]
    for leaf in [x, weight, bias] if other is None else [x, other, weight, bias]:
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_the_statistics_pass_opcheck_and_are_those_of_the_layer() -> None:
    x, bn = draw((4, 6, 5, 3), 1), layer(6)
    torch.library.opcheck(torch.ops.fasttht.bn_statistics_, (*statistics(layer(6)), x, 0.3))
    twin = layer(6)
    mean, var = torch.ops.fasttht.bn_statistics_(*statistics(twin), x, 0.3)
    bn(x)
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), **CLOSE)
    torch.testing.assert_close(var, x.var(dim=(0, 2, 3), correction=0), **CLOSE)
    for one, two in zip(statistics(twin), statistics(bn), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_half_precision_keeps_statistics_and_parameters_in_float32() -> None:
    x = draw((4, 6, 5, 3), 1).to(torch.bfloat16).requires_grad_(True)
    bn = layer(6).float()
    out = kernels.bn_relu(x, x.detach(), bn.weight, bn.bias, *statistics(bn), momentum=0.3, eps=1e-3)
    assert out.dtype == torch.bfloat16
    twin = layer(6).float()
    expected = (twin(x.float()) + x.detach().float()).relu()
    torch.testing.assert_close(out.float(), expected.detach(), rtol=2e-2, atol=2e-2)
    for tensor in torch.autograd.grad(out.float().sum(), (x, bn.weight)):
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 4 else torch.float32)


def test_it_is_differentiable_once_and_says_so() -> None:
    bn, x = layer(6), draw((4, 6, 5, 3), 1).requires_grad_(True)
    out = kernels.bn_relu(x, None, bn.weight, bn.bias, *statistics(bn), momentum=0.1, eps=1e-5)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(grad.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_function_on_a_gpu_equals_the_layers_in_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's statistics and the kernels together, against the layers in float64."""
    monkeypatch.setenv("FASTTHT_KERNELS", "cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    shape = (32, 64, 28, 28)
    data, beside, grad = (draw(shape, seed).to(device, dtype) for seed in range(3))
    results = []
    for wide in (True, False):
        kind = torch.float64 if wide else dtype
        x, other = (t.to(kind, copy=True).requires_grad_(True) for t in (data, beside))
        bn = layer(64).to(device, torch.float64 if wide else torch.float32)
        if wide:
            out = (bn(x) + other).relu()
        else:
            out = kernels.bn_relu(x, other, bn.weight, bn.bias, *statistics(bn), momentum=0.3, eps=1e-3)
        grads = torch.autograd.grad(out, (x, other, bn.weight, bn.bias), grad.to(kind))
        results.append([out.detach(), *grads, *statistics(bn)])
    for one, two in zip(*results, strict=True):
        # At the clip a rounding decides whether a gradient passes: there, and in the sums, a few elements differ.
        far = (one - two.to(one.dtype)).abs() > 2e-2 * (1 + one.abs())
        assert float(far.double().mean()) < 1e-3
