"""The feature denoising block: self-attention over the positions of a feature map (Xie et al. 2019, section 4)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fasttht.models.mixture_bn import norms


class DenoisingBlock(nn.Module):
    """x + BN(conv(y)), y_i = sum_j softmax_j(theta(x)_i . phi(x)_j / sqrt(C/2)) x_j over the H W positions; no ReLU.

    theta and phi are 1x1 convolutions C -> C/2 without bias, drawn from N(0, 0.01); conv is 1x1, C -> C, without bias
    before its BN. BN starts with gamma 0, so that a new block is the identity.

    Shapes: x (B, C, H, W), C of at least 2; returns the same.
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = norm(channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw theta, phi and conv anew and set every gamma to 0."""
        nn.init.normal_(self.theta.weight, std=0.01)
        nn.init.normal_(self.phi.weight, std=0.01)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        for layer in norms(self.bn):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, value = (h.flatten(2).transpose(1, 2)[:, None] for h in (self.theta(x), self.phi(x), x))
        # One head; torch takes a kernel that keeps no (HW, HW) matrix where it has one.
        mixed = F.scaled_dot_product_attention(theta, phi, value.to(theta.dtype), scale=theta.shape[-1] ** -0.5)
        y = mixed[:, 0].transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.bn(self.conv(y))
        return out


def has_denoising(model: nn.Module) -> bool:
    """Return whether a network has denoising blocks."""
    return any(isinstance(module, DenoisingBlock) for module in model.modules())


def remove_denoising_(model: nn.Module) -> None:
    """Take the denoising blocks out of a network, in place: for weights of a network that had none."""
    for stage in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for name in [name for name, child in stage.named_children() if isinstance(child, DenoisingBlock)]:
            delattr(stage, name)
