"""The perceptron finds what no line can."""

import torch

from gapprobe.probes.kinds.mlp import Mlp
from gapprobe.stats import auc


def test_it_learns_an_exclusive_or():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 4, generator=g)
    y = (x[:, 0] * x[:, 1] > 0)[None]
    weights = (torch.arange(800) < 600).double()[None]
    scores = Mlp().fit(x, y, weights, torch.ones(1).double(), 0).scores(x)
    assert auc(scores[0, 600:].numpy(), y[0, 600:].numpy()) > 0.9
