"""Ridge against scikit-learn on standardised rows, and against its own readable reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from gapprobe.kernels import ridge


def drawn(seed, n, d, p):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(-2, 2, d, dtype=torch.float64) + 3.0
    targets = torch.randn(p, n, generator=g, dtype=torch.float64)
    weights = torch.rand(p, n, generator=g, dtype=torch.float64) + 0.1
    weights *= torch.rand(p, n, generator=g) < 0.7
    weights[:, :3] = 1.0
    return x, targets, weights


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(4, 50), d=st.integers(1, 60), alpha=st.sampled_from([1e-2, 1.0, 1e3]))
def test_coefficients_are_scikit_learns(seed, n, d, alpha):
    x, targets, weights = drawn(seed, n, d, 2)
    coef, free = ridge.fit(x, targets, weights, torch.full((2,), alpha, dtype=torch.float64))
    for i in range(2):
        used = weights[i].numpy() > 0
        scaler = StandardScaler().fit(x.numpy()[used])
        # Its default factors z'z in float64 as we do; by singular values there is nothing to square.
        theirs = Ridge(alpha=alpha, solver="svd")
        theirs.fit(scaler.transform(x.numpy()[used]), targets[i].numpy()[used], sample_weight=weights[i].numpy()[used])
        expected = theirs.predict(scaler.transform(x.numpy()))
        # A squared condition of 1e4 / alpha in float64 leaves ten digits.
        np.testing.assert_allclose((x @ coef[i] + free[i]).numpy(), expected, rtol=1e-8, atol=1e-8)
        readable, intercept = ridge.reference(x, targets[i], weights[i], alpha)
        np.testing.assert_allclose((x @ readable + intercept).numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (20, 60)])
def test_problems_share_what_they_share_and_nothing_else(n, d):
    x, targets, weights = drawn(5, n, d, 3)
    weights[1] = weights[0]
    alpha = torch.tensor([0.1, 10.0, 0.1]).double()
    together, free = ridge.fit(x, targets, weights, alpha)
    for i in range(3):
        alone, intercept = ridge.fit(x, targets[i : i + 1], weights[i : i + 1], alpha[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(free[i], intercept[0], rtol=1e-9, atol=1e-12)


def test_rows_of_weight_zero_leave_no_trace_at_all():
    x, targets, weights = drawn(6, 40, 5, 1)
    spoiled, other = x.clone(), targets.clone()
    spoiled[weights[0] == 0], other[weights == 0] = 1e9, 1e9
    one = torch.ones(1)
    assert torch.equal(ridge.fit(x, targets, weights, one)[0], ridge.fit(spoiled, other, weights, one)[0])


def test_a_constant_feature_gets_no_weight():
    x, targets, weights = drawn(7, 40, 5, 1)
    x[:, 2] = 1e5
    coef, _ = ridge.fit(x, targets, weights, torch.ones(1))
    assert abs(float(coef[0, 2])) < 1e-12
