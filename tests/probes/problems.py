"""Problems that tests of several probes fit, and a module that fits them."""

import torch
from torch import nn


class Line(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.map = nn.Linear(d, 1)

    def forward(self, x):
        return self.map(x)[:, 0]


def drawn(seed=0, n=90, d=5, p=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, d, dtype=torch.float64) + 2.0
    y = (x @ torch.randn(d, p, generator=g, dtype=torch.float64) + torch.randn(n, p, generator=g)).T
    y = y > y.median(1, keepdim=True).values
    weights = torch.rand(p, n, generator=g).double() * (torch.rand(p, n, generator=g) < 0.8)
    return x, y, weights, torch.tensor([0.1, 1.0, 10.0]).double()[:p]
