"""The kernel against scikit-learn's saga and its own readable reference, its certificate, and what is known by hand."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gapprobe.kernels import elastic
from gapprobe.kernels.certified import NotConvergedError
from gapprobe.kernels.losses import Binary
from gapprobe.kernels.standardised import Standardised


def drawn(seed, n, d, p=1, *, kind="plain"):
    """Features, labels of a few of them, and weights of which a fifth is 0; each class keeps a row of weight 1."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    direction = torch.randn(d, generator=g, dtype=torch.float64) * (torch.arange(d) < 4)
    value = z @ direction + (0.0 if kind == "separable" else 1.0) * torch.randn(p, n, generator=g, dtype=torch.float64)
    y = value > value.median(1, keepdim=True).values
    x = (z + 3.0) * torch.logspace(-2, 2, d, dtype=torch.float64)
    if kind == "columns twice":
        x[:, d // 2 :] = x[:, : d - d // 2].clone()
    if kind == "rows twice":
        x[n // 2 :] = x[: n - n // 2].clone()
    if kind == "massive":
        x[:, 0], x[:, -1] = x[:, 0] * 1e4 + 1e6, 7.0
    weights = torch.rand(p, n, generator=g, dtype=torch.float64) + 0.2
    weights *= torch.rand(p, n, generator=g) < 0.8
    for labels, own in zip(y, weights, strict=True):
        own[int(torch.nonzero(labels)[0])] = own[int(torch.nonzero(~labels)[0])] = 1.0
    return x, y, weights


def objective(x, y, weights, c, l1_ratio, coef, intercept):
    used = weights > 0
    size = coef * torch.from_numpy(StandardScaler().fit(x[used].numpy()).scale_)
    margin = (2.0 * y - 1) * (x @ coef + intercept)
    loss = (weights * torch.logaddexp(torch.zeros_like(margin), -margin)).sum()
    return float(c * loss + l1_ratio * size.abs().sum() + (1 - l1_ratio) / 2 * (size**2).sum())


def by_saga(x, y, weights, c, l1_ratio, steps):
    """Fit standardised rows of weight > 0 by scikit-learn; coefficients folded back to raw coordinates."""
    used = weights.numpy() > 0
    scaler = StandardScaler().fit(x.numpy()[used])
    fit = LogisticRegression(C=c, l1_ratio=l1_ratio, solver="saga", tol=1e-10, max_iter=steps, random_state=0)
    fit.fit(scaler.transform(x.numpy()[used]), y.numpy()[used], sample_weight=weights.numpy()[used])
    coef = torch.from_numpy(fit.coef_[0] / scaler.scale_)
    return coef, float(fit.intercept_[0]) - float(coef @ torch.from_numpy(scaler.mean_))


KINDS = ["plain", "separable", "columns twice", "rows twice", "massive"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(8, 80),
    d=st.integers(1, 70),
    c=st.sampled_from([1e-2, 0.1, 1.0, 30.0, 1e3]),
    l1_ratio=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    kind=st.sampled_from(KINDS),
)
def test_nobody_comes_below_what_is_certified(seed, n, d, c, l1_ratio, kind):
    x, y, weights = drawn(seed, n, d, kind=kind)
    fits = elastic.fit(x, y, weights, c, l1_ratio, tolerance=1e-9)
    problem = x, y[0], weights[0], c, l1_ratio
    ours = objective(*problem, fits.coef[0], fits.intercept[0])
    # What folding the standardisation in costs: a mean of 1e6 deviations leaves ten digits to a feature.
    assert float(fits.objective[0]) == pytest.approx(ours, rel=1e-8)
    for coef, intercept in (by_saga(*problem, 500), elastic.reference(*problem, steps=500)):
        theirs = objective(*problem, coef, intercept)
        assert ours * (1 - 1e-9) <= theirs * (1 + 1e-8)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize(("n", "d", "c"), [(200, 12, 0.05), (200, 12, 0.2), (40, 60, 0.3)])
def test_where_the_optimum_is_well_determined_weights_and_support_are_theirs(n, d, c, l1_ratio):
    x, y, weights = drawn(1, n, d)
    fits = elastic.fit(x, y, weights, c, l1_ratio, tolerance=1e-13)
    scale = torch.from_numpy(StandardScaler().fit(x[weights[0] > 0].numpy()).scale_)
    for coef, intercept in (
        by_saga(x, y[0], weights[0], c, l1_ratio, 100_000),
        elastic.reference(x, y[0], weights[0], c, l1_ratio, 5000),
    ):
        # An objective that curves by 1e-2 or more is at a gap of 1e-13 within 5e-6 of its place; saga stops at 1e-10.
        np.testing.assert_allclose(fits.coef[0] * scale, coef * scale, rtol=0, atol=1e-5)
        assert torch.equal(fits.coef[0] != 0, (coef * scale).abs() > 1e-5)
        assert float(fits.intercept[0] - intercept + x.mean(0) @ (fits.coef[0] - coef)) == pytest.approx(0, abs=1e-4)
    assert bool((fits.coef[0] == 0).any())


@pytest.mark.parametrize("l1_ratio", [1.0, 0.3])
def test_the_first_weight_appears_where_theory_puts_it(l1_ratio):
    """At w = 0 the gradient is sum_i s_i (y_i - mean) z_i: the largest of its entries times C must exceed r."""
    x, y, weights = drawn(2, 100, 20)
    z = (x - x[weights[0] > 0].mean(0)) / x[weights[0] > 0].std(0, correction=0)
    mean = (weights[0] * y[0]).sum() / weights[0].sum()
    pull = ((weights[0] * (y[0].double() - mean)) @ z).abs()
    threshold = l1_ratio / float(pull.max())
    below = elastic.fit(x, y, weights, threshold * 0.999, l1_ratio)
    above = elastic.fit(x, y, weights, threshold * 1.001, l1_ratio, tolerance=1e-10)
    assert not below.coef.any()
    assert float(below.intercept[0]) == pytest.approx(float(torch.log(mean / (1 - mean))), abs=1e-9)
    assert torch.nonzero(above.coef[0])[:, 0].tolist() == [int(pull.argmax())]


def test_every_problem_of_a_batch_is_fitted_as_if_alone():
    """Strengths of a problem start from each other, in whatever order they come; labels and rows are kept apart."""
    x, y, weights = drawn(3, 120, 10, p=3)
    c = torch.tensor([3.0, 0.02, 0.3, 3.0, 0.3, 0.02]).double()
    which = torch.tensor([0, 0, 0, 1, 2, 1])
    together = elastic.fit(x, y[which], weights[which], c, 0.8, tolerance=1e-13)
    assert int(together.steps.max()) <= 12
    for i, own in enumerate(which.tolist()):
        alone = elastic.fit(x, y[own : own + 1], weights[own : own + 1], float(c[i]), 0.8, tolerance=1e-13)
        torch.testing.assert_close(together.coef[i], alone.coef[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(together.intercept[i], alone.intercept[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centrings", [elastic.CENTRINGS, 0])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.9, 0.2])
def test_the_gap_bounds_the_true_distance_from_the_optimum(l1_ratio, centrings, monkeypatch):
    """Whatever the weights are, and with an intercept that is left where it was, too."""
    x, y, weights = drawn(4, 90, 8)
    features, loss = Standardised(x, weights > 0), Binary.of(y, weights, torch.float64)
    fits, one = elastic.fit(x, y, weights, 1.0, l1_ratio, tolerance=1e-14), torch.zeros(1).long()
    scale = features.scale[0] * features.spread
    centre = features.mean[0] * features.spread + features.centre
    best = torch.cat([fits.coef[0] * scale, fits.intercept + fits.coef[0] @ centre])[None, None]
    monkeypatch.setattr(elastic, "CENTRINGS", centrings)
    g = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-6, 1e-3, 0.1, 3.0) + 20 * (0.02,):
        moved = best + size * torch.randn(best.shape, generator=g, dtype=torch.float64)
        _, value, bound, *_ = elastic.certify(features, loss, moved, one, l1_ratio)
        true = float((value - fits.objective[0]) / value)
        assert true <= float(bound) + 1e-14
        assert float(bound) < 1e-12 if size == 0.0 else float(bound) > 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 40), rank=st.integers(1, 60), ridge=st.sampled_from([0.0, 0.1]))
def test_the_quadratic_problem_is_solved_to_its_optimality_conditions(seed, k, rank, ridge):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, k, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, k, dtype=torch.float64)
    a[:, k // 2] = a[:, 0]
    hessian = a.T @ a + ridge * torch.eye(k)
    start = torch.randn(k, generator=g, dtype=torch.float64) * (torch.rand(k, generator=g) < 0.4)
    # A slope in the range of H: without it a problem of low rank may have no minimum.
    slope = hessian @ torch.randn(k, generator=g, dtype=torch.float64) * 3
    l1 = torch.ones(k, dtype=torch.float64)
    l1[-1] = 0.0
    v = elastic._quadratic(hessian.clone(), slope, start, l1)
    at = slope + hessian @ (v - start)
    wrong = torch.where((v != 0) | (l1 == 0), (at + l1 * v.sign()).abs(), (at.abs() - l1).clamp(min=0))
    # Solved by a factor that had up to 1e-11 of the diagonal added, where features are there twice.
    assert float(wrong.max()) <= 1e-9 * (1 + float(slope.abs().max()))


def test_many_weights_leave_and_join_the_quadratic_problem_at_once(monkeypatch):
    """Of 150 correlated features most must change: one at a time they would take a hundred changes."""
    monkeypatch.setattr(elastic, "CHANGES", 25)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 150, generator=g, dtype=torch.float64) + torch.randn(400, 1, generator=g, dtype=torch.float64)
    hessian, start = a.T @ a, torch.randn(150, generator=g, dtype=torch.float64)
    slope, l1 = hessian @ start - 30 * torch.randn(150, generator=g, dtype=torch.float64), torch.full_like(start, 20.0)
    v = elastic._quadratic(hessian, slope, start, l1)
    at = slope + hessian @ (v - start)
    assert 20 < int((v != 0).sum()) < 100
    assert float(torch.where(v != 0, (at + l1 * v.sign()).abs(), (at.abs() - l1).clamp(min=0)).max()) < 1e-8


def test_rows_of_weight_zero_leave_no_trace():
    x, y, weights = drawn(6, 60, 5, p=2)
    weights[:, :7] = 0.0
    spoiled = x.clone()
    spoiled[weights[0] == 0] = 1e6
    one = slice(0, 1)
    a = elastic.fit(x, y[one], weights[one], 3.0)
    b = elastic.fit(spoiled, y[one] ^ (weights[one] == 0), weights[one], 3.0)
    torch.testing.assert_close(a.coef, b.coef, rtol=0, atol=1e-12)
    both = elastic.fit(x, y ^ (weights == 0), weights, 3.0)
    torch.testing.assert_close(a.coef, both.coef[one], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["NEW", "ROOM"])
def test_small_working_sets_and_little_room_change_nothing(name, monkeypatch):
    x, y, weights = drawn(7, 60, 40, p=4)
    c = torch.tensor([1.0, 10.0, 1.0, 10.0])
    which = torch.tensor([0, 0, 1, 2])
    usual = elastic.fit(x, y[which], weights[which], c, 0.5, tolerance=1e-13)
    monkeypatch.setattr(elastic, name, 1)
    little = elastic.fit(x, y[which], weights[which], c, 0.5, tolerance=1e-13)
    torch.testing.assert_close(usual.coef, little.coef, rtol=1e-5, atol=1e-7)


def test_a_fit_that_does_not_reach_the_tolerance_says_so(monkeypatch):
    x, y, weights = drawn(8, 60, 5)
    monkeypatch.setattr(elastic, "STEPS", 1)
    with pytest.raises(NotConvergedError, match=r"problem 0 ended .* lower c"):
        elastic.fit(x, y, weights, 100.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_features_are_taken_as_they_are(dtype):
    x, y, weights = drawn(9, 60, 5)
    x = x.to(dtype)
    torch.testing.assert_close(elastic.fit(x, y, weights).coef, elastic.fit(x.double(), y, weights).coef)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y, w: (x.index_fill(0, torch.tensor([3]), torch.nan), y, w, 1.0), "row 3 of x holds NaN"),
        (lambda x, y, w: (x, torch.ones_like(y), w, 1.0), "problem 0 has no row of class False"),
        (lambda x, y, w: (x, y, w, 0.0), "c must be above 0"),
        (lambda x, y, w: (x, y, w, 1.0, 0.0), "l1_ratio must be above 0"),
        (lambda x, y, w: (x, y, w, 1.0, 1.5), "at most 1, got 1.5"),
        (lambda x, y, w: (x, y, w, 1.0, float("nan")), "at most 1, got nan"),
    ],
)
def test_bad_input_is_refused_by_name(spoil, message):
    x, y, weights = drawn(10, 12, 2)
    # Without the shape checks that run in tests: users run without them.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(elastic.fit)(*spoil(x, y, weights))


def test_no_problem_at_all():
    assert elastic.fit(torch.ones(4, 3), torch.ones(0, 4).bool(), torch.ones(0, 4)).coef.shape == (0, 3)
