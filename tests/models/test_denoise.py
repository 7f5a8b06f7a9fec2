"""The denoising block against a loop over positions in numpy, and where it sits in the network."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from fasttht.attacks.engine import FoldedEngine, choose_engine
from fasttht.models.clean_encoder import CleanEncoder
from fasttht.models.denoise import DenoisingBlock, has_denoising, remove_denoising_
from fasttht.models.mixture_bn import MixtureBatchNorm2d
from fasttht.models.resnet import ARCHS, ResNet
from fasttht.models.two_head import TwoHead

pytestmark = pytest.mark.changes_rng  # networks are initialised from the global generator

Array = npt.NDArray[np.float64]


def block_of(channels: int = 6) -> DenoisingBlock:
    """A block whose attention is far from uniform and whose BN does something, in evaluation mode."""
    torch.manual_seed(0)
    block = DenoisingBlock(channels).double().eval()
    with torch.no_grad():
        for conv in (block.theta, block.phi):
            conv.weight.normal_(std=1.0)
        assert isinstance(block.bn, nn.BatchNorm2d)
        assert block.bn.running_mean is not None
        assert block.bn.running_var is not None
        for tensor in (block.bn.weight, block.bn.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (block.bn.bias, block.bn.running_mean):
            tensor.normal_()
    return block


def images(channels: int = 6, height: int = 3, width: int = 4) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_position(block: DenoisingBlock, x: Tensor, scale: float) -> Array:
    """y_i = sum_j softmax_j(theta_i . phi_j / scale) x_j, one position after the other; then conv, BN and the sum."""
    theta, phi, conv = (layer.weight.detach()[:, :, 0, 0].numpy() for layer in (block.theta, block.phi, block.conv))
    assert isinstance(block.bn, nn.BatchNorm2d)
    gamma, beta, mean, var = (
        tensor.detach().numpy()  # type: ignore[union-attr]
        for tensor in (block.bn.weight, block.bn.bias, block.bn.running_mean, block.bn.running_var)
    )
    out = x.numpy().copy()
    for n, image in enumerate(x.numpy()):
        h = image.reshape(image.shape[0], -1)
        for i in range(h.shape[1]):
            scores = np.array([(theta @ h[:, i]) @ (phi @ h[:, j]) / scale for j in range(h.shape[1])])
            shares = np.exp(scores) / np.exp(scores).sum()
            y = sum(share * h[:, j] for j, share in enumerate(shares))
            normed = (conv @ y - mean) / np.sqrt(var + block.bn.eps) * gamma + beta
            out[n, :, i // image.shape[2], i % image.shape[2]] += normed
    return out


@pytest.mark.parametrize("channels_last", [False, True])
def test_block_equals_the_loop_over_positions(channels_last: bool) -> None:
    block, x = block_of(), images()
    given = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    np.testing.assert_allclose(block(given).detach().numpy(), by_position(block, x, np.sqrt(3)), rtol=1e-10)


def test_scale_is_the_root_of_the_embedded_channels_and_not_of_all() -> None:
    """A known wrong port divides by sqrt(C); the test above tells the two apart."""
    block, x = block_of(), images()
    wrong = by_position(block, x, np.sqrt(6))
    assert np.abs(block(x).detach().numpy() - wrong).max() > 0.01


def test_there_is_no_relu_behind_the_sum_and_gradients_reach_every_weight() -> None:
    block = block_of()
    out = block(images())
    assert (out < 0).any()
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(bool(parameter.grad is not None and parameter.grad.any()) for parameter in block.parameters())
    assert torch.autograd.gradcheck(block, (images(6, 2, 2).requires_grad_(True),))


def test_a_new_block_is_the_identity_with_small_embeddings_and_no_biases() -> None:
    torch.manual_seed(0)
    block = DenoisingBlock(64)
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x), x)
    assert not block.bn.weight.any()  # type: ignore[union-attr]
    for conv in (block.theta, block.phi):
        assert conv.weight.shape == (32, 64, 1, 1)
        assert float(conv.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert block.conv.weight.shape == (64, 64, 1, 1)
    assert [name for name, _ in block.named_parameters() if "bias" in name] == ["bn.bias"]


@pytest.mark.parametrize("arch", list(ARCHS))
def test_one_block_stands_behind_the_last_of_each_stage(arch: str) -> None:
    """The other keys are as without, their initial weights those of a network without, and so is its output."""
    nets = []
    for denoise in (False, True):
        torch.manual_seed(0)
        nets.append(ResNet(arch, stem="small", width=4, denoise=denoise).eval())
    plain, denoising = nets
    for stage, blocks in enumerate(ARCHS[arch][1], start=1):
        layers = getattr(denoising, f"layer{stage}")
        assert [isinstance(layer, DenoisingBlock) for layer in layers] == [False] * blocks + [True]
        assert layers[-1].conv.weight.shape[0] == 4 * 2 ** (stage - 1) * (4 if ARCHS[arch][0] else 1)
        for name in ("theta", "phi"):  # not what the trunk's own convolutions are drawn from
            assert float(getattr(layers[-1], name).weight.detach().std()) < 0.02
    own = denoising.state_dict()
    assert plain.state_dict().keys() < own.keys()
    extra = {name.split(".")[0] for name in own.keys() - plain.state_dict().keys()}
    assert extra == {"layer1", "layer2", "layer3", "layer4"}
    denoising.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(plain(x), denoising(x))
    assert has_denoising(denoising)
    assert not has_denoising(plain)


def test_blocks_can_be_taken_out_again() -> None:
    torch.manual_seed(0)
    encoder = CleanEncoder(TwoHead("resnet18", 5, stem="small", width=4, feat_dim=6, denoise=True), frozen=True)
    x = torch.rand(2, 3, 8, 8)
    before = encoder(x)
    remove_denoising_(encoder)
    assert not has_denoising(encoder)
    assert not [name for name in encoder.state_dict() if "theta" in name]
    assert torch.equal(encoder(x), before)  # new blocks were identities


def test_mixture_bn_has_a_gamma_of_zero_in_both_branches() -> None:
    block = DenoisingBlock(8, MixtureBatchNorm2d)
    assert isinstance(block.bn, MixtureBatchNorm2d)
    assert not block.bn.clean.weight.any()
    assert not block.bn.adversarial.weight.any()


def test_a_denoising_network_is_attacked_eagerly_and_folding_it_is_refused() -> None:
    torch.manual_seed(0)
    model = TwoHead("resnet18", 5, stem="small", width=4, feat_dim=None, denoise=True)
    found = choose_engine("auto", model, 8, torch.device("cpu"), batch_norm="eval")
    assert found == ("eager", "denoising blocks cannot be folded")
    with pytest.raises(ValueError, match="got DenoisingBlock; take --attack-engine eager"):
        FoldedEngine("folded", model, dtype=torch.float32)
