"""Two Head Adversarial Training (THAT, arXiv 2103.13612) in plain PyTorch: Algorithm 1, and its free variant.

The specification: fasttht's two trainers equal it step by step, which tests/test_train_steps.py checks.
f(x) gives (logits, feature), g(x) gives a feature; features have unit norm, pixels are in [0, 1].
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class Bank:
    """The memory bank of Eq. 5: a ring of clean features and of the dataset rows they came from."""

    def __init__(self, size, dim, dtype=torch.float32):
        self.feat, self.index, self.ptr = torch.zeros(size, dim, dtype=dtype), torch.full((size,), -1), 0

    def enqueue(self, feat, index):
        for row, i in zip(feat, index, strict=True):
            self.feat[self.ptr], self.index[self.ptr] = row, i
            self.ptr = (self.ptr + 1) % len(self.feat)


def contrastive_loss(u, v, index, bank, tau):
    """Eq. 5: -log of the positive's share. Empty slots and the image's own older features are no negatives."""
    usable = (bank.index >= 0) & (bank.index != index[:, None])
    negatives = (u @ bank.feat.T / tau).exp() * usable
    positive = ((u * v).sum(1) / tau).exp()
    return -(positive / (positive + negatives.sum(1))).log().mean()


def pgd_attack(f, x, y, noise, *, eps, alpha, steps, target=None):
    """Eq. 7's delta: K signed steps from x + noise, uphill on the label or downhill on a target class."""
    f.eval()  # running BN statistics, which the attack must not change
    x_adv = (x + noise).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        loss = F.cross_entropy(f(x_adv)[0], y if target is None else target)
        step = (alpha if target is None else -alpha) * torch.autograd.grad(loss, x_adv)[0].sign()
        x_adv = torch.min(torch.max(x_adv.detach() + step, x - eps), x + eps).clamp(0, 1)
    f.train()
    return x_adv.detach()


def that_loss(f, x_adv, y, v, index, bank, tau):
    """Eq. 7: normalized cross entropy (Eq. 6; f's logits are cosines / eta) plus the contrastive loss."""
    logits, u = f(x_adv)
    return F.cross_entropy(logits, y) + contrastive_loss(u, v, index, bank, tau)


def update(f, g, optimizer, momentum):
    """Step the optimizer, keep 1/eta in [1, 100], and let a momentum g (Table 7) follow f."""
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        f.classifier.scale.clamp_(1, 100)
        if momentum is not None:
            of_f = dict(f.named_parameters())
            for name, p in g.named_parameters():
                p += (1 - momentum) * (of_f[name] - p)


def standard_step(f, g, optimizer, bank, x, y, index, noise, *, eps, alpha, steps, tau, target=None, momentum=None):
    """One step of Algorithm 1."""
    with torch.no_grad():
        v = g(x)
    x_adv = pgd_attack(f, x, y, noise, eps=eps, alpha=alpha, steps=steps, target=target)
    that_loss(f, x_adv, y, v, index, bank, tau).backward()
    update(f, g, optimizer, momentum)
    bank.enqueue(v, index)


def free_step(f, g, optimizer, bank, delta, x, y, index, *, eps, alpha, replay, tau, momentum=None):
    """One minibatch of free training: each backward moves the weights and delta, which lives on in place."""
    with torch.no_grad():
        v = g(x)
    for _ in range(replay):
        leaf = delta[: len(x)].clone().requires_grad_(True)
        that_loss(f, (x + leaf).clamp(0, 1), y, v, index, bank, tau).backward()
        update(f, g, optimizer, momentum)
        delta[: len(x)] = (delta[: len(x)] + alpha * leaf.grad.sign()).clamp(-eps, eps)
    bank.enqueue(v, index)


class Net(nn.Module):
    """A small f, to run this file; fasttht's is a ResNet with the same two heads."""

    def __init__(self, classes):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten())
        self.feature_head = nn.Sequential(nn.Linear(32 * 36, 32), nn.ReLU(), nn.Linear(32, 16))
        self.classifier = nn.Linear(32 * 36, classes, bias=False)
        self.classifier.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, x):
        h = self.trunk(x)
        cosines = F.normalize(h, dim=1) @ F.normalize(self.classifier.weight, dim=1).T
        return self.classifier.scale * cosines, F.normalize(self.feature_head(h), dim=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    y = torch.arange(512) % 4  # the class is which quarter of the image is brighter
    x = torch.rand(512, 3, 8, 8) * 0.7 + 0.3 * (torch.arange(8).view(8, 1) // 2 == y.view(-1, 1, 1, 1))
    for free in (False, True):
        f, bank, delta = Net(4), Bank(256, 16), torch.zeros(64, 3, 8, 8)
        g = copy.deepcopy(f).eval()  # stands in for a self-supervised network, frozen
        state = (f, lambda z, g=g: g(z)[1], torch.optim.SGD(f.parameters(), lr=0.02, momentum=0.9), bank)
        for _ in range(40):
            i = torch.randperm(512)[:64]
            if free:
                free_step(*state, delta, x[i], y[i], i, eps=0.1, alpha=0.1, replay=4, tau=0.2)
            else:
                noise = torch.empty(64, 3, 8, 8).uniform_(-0.1, 0.1)
                standard_step(*state, x[i], y[i], i, noise, eps=0.1, alpha=0.025, steps=10, tau=0.2)
        attacked = pgd_attack(f, x, y, torch.zeros_like(x), eps=0.1, alpha=0.025, steps=10)
        clean, robust = (100 * (f.eval()(z)[0].argmax(1) == y).float().mean() for z in (x, attacked))
        print(f"{'free' if free else 'standard'}: clean {clean:.1f} %, PGD-10 {robust:.1f} %")
