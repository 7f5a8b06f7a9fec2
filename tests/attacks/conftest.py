"""Networks and images that the tests of whole attacks share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttht.models.two_head import TwoHead

Build = Callable[..., TwoHead]
Images = Callable[..., Tensor]


@pytest.fixture
def build() -> Build:
    """Build a network whose BN layers all do something; stem `imagenet` takes squares of pixels, `small` does not."""

    def network(stem: str = "imagenet", dtype: torch.dtype = torch.float32, num_classes: int = 7) -> TwoHead:
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TwoHead("resnet18", num_classes, stem=stem, width=8, feat_dim=None)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor in model.trunk.state_dict().values():
                if tensor.ndim == 1:
                    tensor.uniform_(0.3, 1.3, generator=generator)
        return model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    return network


@pytest.fixture
def images() -> Images:
    """Random images, float in [0, 1] or uint8, channels-last; the seed is another set."""

    def draw(num: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 * size + seed)
        levels = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
        x = levels if dtype == torch.uint8 else levels.to(dtype) / 255
        return x.contiguous(memory_format=torch.channels_last)

    return draw
