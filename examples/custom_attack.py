"""Attack any torch module, here a small one trained on the spot: `python examples/custom_attack.py`.

The network takes [0, 1] pixels (put the normalisation inside). For a network of fasttht's, `attacks.engine` has faster
sources of the same gradient.
"""

import numpy as np
import torch
from torch import nn

from fasttht.attacks.pgd import Draw, attack, evaluating, input_gradient
from fasttht.attacks.threat import Threat
from fasttht.pipelines.datasets import digits


def tensors(split):
    source = digits(split)
    pixels = np.stack([source.sample(i).data.reshape(8, 8, 3) for i in range(len(source))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, torch.from_numpy(source.labels.copy())


torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
x, y = tensors("train")
network(x[:2])
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(30):
    nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()

x, y = tensors("val")
with evaluating(network):  # every module comes back in the mode it had
    print(f"clean: {100 * (network(x).argmax(1) == y).float().mean():.1f} %")
    for steps in (0, 10, 50):
        threat = Threat(eps=0.15, alpha=2.5 * 0.15 / max(steps, 1), steps=steps, targeted=False)
        found = attack(input_gradient(network), x, y, torch.arange(len(y)), threat, Draw(seed=0), num_classes=10)
        print(f"PGD-{steps}: {100 * (network(found.x_adv).argmax(1) == y).float().mean():.1f} %")
