"""The kernel against scipy in float64, against scikit-learn where its intercept costs nothing, and its certificate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.svm import LinearSVC

from gapprobe.kernels import svm
from gapprobe.kernels.certified import NotConvergedError
from gapprobe.kernels.losses import SquaredHinge
from gapprobe.kernels.standardised import Standardised


def drawn(seed, n, d, p=1, *, separable=False, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    value = z @ torch.randn(d, generator=g, dtype=torch.float64)
    value = value + (0.0 if separable else d**0.5) * torch.randn(p, n, generator=g, dtype=torch.float64)
    y = value > value.median(1, keepdim=True).values
    weights = torch.rand(p, n, generator=g, dtype=torch.float64) + 0.2
    weights *= torch.rand(p, n, generator=g) < 0.8
    for labels, own in zip(y, weights, strict=True):
        own[int(torch.nonzero(labels)[0])] = own[int(torch.nonzero(~labels)[0])] = 1.0
    return (z + offset) * torch.logspace(-2, 2, d, dtype=torch.float64), y, weights


def standardised(x, weights):
    used = x[weights > 0]
    deviation = used.std(0, correction=0)
    return used.mean(0), torch.where(deviation > 1e-12 * used.mean(0).abs(), deviation, 1.0)


def objective(x, y, weights, c, coef, intercept):
    _, scale = standardised(x, weights)
    slack = (1 - (2.0 * y - 1) * (x @ coef + intercept)).clamp(min=0)
    return float(c * (weights * slack**2).sum() + ((coef * scale) ** 2).sum() / 2)


def by_scipy(x, y, weights, c):
    mean, scale = standardised(x, weights)
    used = (weights > 0).numpy()
    z, sign, s = ((x - mean) / scale).numpy()[used], 2.0 * y.numpy()[used] - 1, weights.numpy()[used]

    def value(w):
        slack = np.maximum(0, 1 - sign * (z @ w[:-1] + w[-1]))
        pull = -2 * c * s * slack * sign
        return c * (s * slack**2).sum() + w[:-1] @ w[:-1] / 2, np.append(w[:-1] + pull @ z, pull.sum())

    return minimize(
        value, np.zeros(x.shape[1] + 1), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 20_000}
    ).fun


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(8, 60),
    d=st.integers(1, 70),
    c=st.sampled_from([1e-3, 1.0, 100.0]),
    separable=st.booleans(),
    offset=st.sampled_from([0.0, 50.0]),
)
def test_the_optimum_is_scipys(seed, n, d, c, separable, offset):
    x, y, weights = drawn(seed, n, d, separable=separable, offset=offset)
    fits = svm.fit(x, y, weights, c, tolerance=1e-10)
    ours = objective(x, y[0], weights[0], c, fits.coef[0], fits.intercept[0])
    assert float(fits.objective[0]) == pytest.approx(ours, rel=1e-9)
    theirs = by_scipy(x, y[0], weights[0], c)
    # From below our certificate holds; from above scipy's own end, gtol^2 / 2 where it did not lose precision.
    assert ours * (1 - 1e-10) <= theirs * (1 + 1e-12)
    assert ours <= theirs * (1 + 1e-9)


def test_the_scores_are_scikit_learns_where_its_intercept_is_all_but_free():
    x, y, weights = drawn(1, 80, 6)
    mean, scale = standardised(x, weights[0])
    z = ((x - mean) / scale).numpy()
    theirs = LinearSVC(C=0.5, dual=False, tol=1e-12, intercept_scaling=1e4, max_iter=100_000)
    theirs.fit(z, y[0].numpy(), sample_weight=weights[0].numpy())
    fits = svm.fit(x, y, weights, 0.5, tolerance=1e-13)
    # An intercept that costs 1e-8 of its square, and liblinear's own tolerance.
    np.testing.assert_allclose(x @ fits.coef[0] + fits.intercept[0], theirs.decision_function(z), rtol=1e-4, atol=1e-4)


def test_every_problem_of_a_batch_is_fitted_as_if_alone():
    x, y, weights = drawn(2, 90, 8, p=4)
    c = torch.tensor([1e-3, 0.1, 1.0, 30.0])
    together = svm.fit(x, y, weights, c, tolerance=1e-13)
    for i in range(4):
        alone = svm.fit(x, y[i : i + 1], weights[i : i + 1], float(c[i]), tolerance=1e-13)
        torch.testing.assert_close(together.coef[i], alone.coef[0], rtol=1e-5, atol=1e-7)


def test_the_gap_bounds_the_true_distance_from_the_optimum():
    x, y, weights = drawn(3, 80, 5)
    features, loss = Standardised(x, weights > 0), SquaredHinge.of(y, weights, torch.float64)
    fits, one = svm.fit(x, y, weights, tolerance=1e-13), torch.zeros(1).long()
    scale = features.scale[0] * features.spread
    centre = features.mean[0] * features.spread + features.centre
    best = torch.cat([fits.coef[0] * scale, fits.intercept + fits.coef[0] @ centre])[None, None]
    g = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-6, 1e-3, 0.1, 3.0):
        moved = best + size * torch.randn(best.shape, generator=g, dtype=torch.float64)
        _, value, bound = svm.certify(features, loss, moved, one)
        true = float((value - fits.objective[0]) / value)
        assert true <= float(bound) * (1 + 1e-6) + 1e-13
        assert float(bound) < 1e-12 if size == 0.0 else float(bound) > 0


def test_a_fit_that_does_not_reach_the_tolerance_says_so(monkeypatch):
    x, y, weights = drawn(4, 40, 5)
    monkeypatch.setattr(svm, "STEPS", 1)
    monkeypatch.setattr(svm, "NEWTON", 0)
    with pytest.raises(NotConvergedError, match=r"problem 0 ended .* lower c"):
        svm.fit(x, y, weights, 100.0)


def test_problems_that_do_not_fit_side_by_side_are_fitted_in_turn(monkeypatch):
    x, y, weights = drawn(5, 50, 6, p=5)
    together = svm.fit(x, y, weights, tolerance=1e-12)
    monkeypatch.setattr(svm, "ROOM", 1000)
    torch.testing.assert_close(svm.fit(x, y, weights, tolerance=1e-12).coef, together.coef, rtol=1e-4, atol=1e-6)


def test_rows_of_weight_zero_leave_no_trace():
    x, y, weights = drawn(6, 50, 4)
    spoiled = x.clone()
    spoiled[weights[0] == 0] = 1e6
    a, b = svm.fit(x, y, weights), svm.fit(spoiled, y ^ (weights == 0), weights)
    torch.testing.assert_close(a.coef, b.coef, rtol=0, atol=1e-12)


def test_no_problem_at_all():
    assert svm.fit(torch.ones(4, 3), torch.ones(0, 4).bool(), torch.ones(0, 4)).coef.shape == (0, 3)


def test_large_strengths_take_few_steps_of_newtons_method_from_one_another(monkeypatch):
    """Each from scratch would take dozens; a row whose margin is within rounding must not keep it going."""
    monkeypatch.setattr(svm, "STEPS", 0)
    x, y, weights = drawn(7, 300, 150)
    c = torch.tensor([1e4, 1e-2, 1.0, 100.0])
    fits = svm.fit(x, y.expand(4, -1), weights.expand(4, -1), c, tolerance=1e-9)
    assert int(fits.steps.sum()) <= 40  # 25; without what the last strength found, 60
    assert int(svm.fit(x, y, weights, 1e4, tolerance=1e-9).steps) <= 25  # 16; straight from nothing, 39
