"""Class means by problem, and the threshold between them."""

import numpy as np
import torch

from gapprobe.probes.kinds.mean_difference import MeanDifference


def test_it_is_the_difference_of_weighted_means():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=g)
    y = torch.rand(3, 50, generator=g) < 0.5
    weights = torch.rand(3, 50, generator=g).double() * (torch.rand(3, 50, generator=g) < 0.7)
    fits = MeanDifference().fit(x, y, weights, torch.ones(3).double(), 0)
    for i in range(3):
        m0, m1 = (
            np.average(x.double().numpy(), axis=0, weights=(weights[i] * (y[i] == c)).numpy()) for c in (False, True)
        )
        np.testing.assert_allclose(fits.coef[i], m1 - m0, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(fits.intercept[i], -(m1 - m0) @ (m1 + m0) / 2, rtol=1e-10, atol=1e-12)


def test_rows_of_weight_zero_leave_no_trace_at_all():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=g), (torch.arange(20) % 2 == 0)[None]
    weights = (torch.arange(20) < 12).double()[None]
    spoiled = x.clone()
    spoiled[12:] = 1e6
    one = torch.ones(1).double()
    a, b = MeanDifference().fit(x, y, weights, one, 0), MeanDifference().fit(spoiled, y, weights, one, 0)
    assert torch.equal(a.coef, b.coef)
