"""The kernel against scikit-learn at tolerance 1e-12, against its own readable reference, and its certificate."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gapprobe.kernels import descent, logistic, preconditioner
from gapprobe.kernels.losses import Binary, Multinomial
from gapprobe.kernels.preconditioner import Own, Shared, Subspace, kin_of_classes
from gapprobe.kernels.standardised import Standardised


def problem(seed, n, d, *, spread=0.0, separable=False, constant=False, offset=0.0):
    """Features with scales over `spread` orders of magnitude around a common offset, and noisy or separable labels."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    direction = torch.randn(d, generator=g, dtype=torch.float64)
    noise = torch.randn(n, generator=g, dtype=torch.float64) * (0.0 if separable else d**0.5)
    value = z @ direction + noise
    y = value > value.median()
    x = (z + offset) * torch.logspace(-spread, spread, d, dtype=torch.float64)
    if constant:
        x[:, 0] = 3.7
    return x, y


def several(seed, n, d, classes, *, spread=0.0):
    """Features as in `problem`, labels of several classes, each on at least one row; Bool for two."""
    x, y = problem(seed, n, d, spread=spread)
    if classes == 2:
        return x, y
    g = torch.Generator().manual_seed(seed)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    logits = z @ torch.randn(d, classes, generator=g, dtype=torch.float64) / d**0.5
    y = (logits + torch.randn(n, classes, generator=g, dtype=torch.float64)).argmax(1)
    y[:classes] = torch.arange(classes)
    return x, y


def by_sklearn(x, y, weights, c):
    """Fit by scikit-learn on standardised rows of weight > 0; coefficients folded back to raw coordinates."""
    used = weights.numpy() > 0
    scaler = StandardScaler().fit(x.numpy()[used])
    fit = LogisticRegression(C=c, tol=1e-12, solver="newton-cholesky", max_iter=10_000)
    fit.fit(scaler.transform(x.numpy()[used]), y.numpy()[used], sample_weight=weights.numpy()[used])
    coef = fit.coef_[0] / scaler.scale_
    return coef, fit.intercept_[0] - coef @ scaler.mean_


def objective(x, y, weights, c, coef, intercept):
    used = weights > 0
    scale = torch.from_numpy(StandardScaler().fit(x[used].numpy()).scale_)
    margin = (2.0 * y[used] - 1) * (x[used] @ coef + intercept)
    loss = (weights[used] * torch.logaddexp(torch.zeros_like(margin), -margin)).sum()
    return float(c * loss + ((coef * scale) ** 2).sum() / 2)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(8, 60),
    d=st.integers(1, 90),
    c=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    spread=st.sampled_from([0.0, 3.0]),
    separable=st.booleans(),
    constant=st.booleans(),
    offset=st.sampled_from([0.0, 50.0]),
)
def test_the_optimum_is_scikit_learns(seed, n, d, c, spread, separable, constant, offset):
    x, y = problem(seed, n, d, spread=spread, separable=separable, constant=constant, offset=offset)
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.uniform(0.2, 2.0, n) * (rng.random(n) < 0.8))
    for label in (True, False):  # both classes must keep a row
        weights[int(torch.nonzero(y == label)[0])] = 1.0
    fits = logistic.fit(x, y[None], weights[None], c, tolerance=1e-10)
    coef, intercept = by_sklearn(x, y, weights, c)

    theirs = objective(x, y, weights, c, torch.from_numpy(coef), float(intercept))
    ours = objective(x, y, weights, c, fits.coef[0], float(fits.intercept[0]))
    assert ours <= theirs * (1 + 1e-9)
    assert float(fits.objective[0]) == pytest.approx(ours, rel=1e-9)
    expected = x.numpy() @ coef + intercept
    np.testing.assert_allclose(fits.logits(x)[0].numpy(), expected, rtol=1e-4, atol=1e-4 * (1 + np.abs(expected).max()))

    readable, free = logistic.reference(x, y, weights, c)
    assert objective(x, y, weights, c, readable[0], float(free[0])) <= theirs * (1 + 1e-9)


def test_every_problem_of_a_batch_is_fitted_as_if_alone():
    x, y = problem(0, 120, 9)
    g = torch.Generator().manual_seed(1)
    labels = torch.stack([y, ~y, torch.rand(120, generator=g) < 0.5, y])
    mask = torch.rand(4, 120, generator=g) < torch.tensor([[0.9], [0.5], [0.7], [0.3]])
    weights = logistic.balanced(labels, mask)
    together = logistic.fit(x, labels, weights, tolerance=1e-13)
    for i in range(4):
        coef, intercept = by_sklearn(x, labels[i], weights[i], 1.0)
        np.testing.assert_allclose(together.coef[i].numpy(), coef, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(float(together.intercept[i]), intercept, rtol=1e-5, atol=1e-7)


def test_rows_of_weight_zero_leave_no_trace():
    x, y = problem(2, 50, 6)
    weights = torch.ones(50, dtype=torch.float64)
    weights[40:] = 0.0
    spoiled = x.clone()
    spoiled[40:] = 1e6
    a, b = logistic.fit(x, y[None], weights[None]), logistic.fit(spoiled, ~y[None] ^ (weights > 0), weights[None])
    torch.testing.assert_close(a.coef, b.coef, rtol=0, atol=1e-12)


def test_balanced_weights_are_scikit_learns():
    _, y = problem(3, 40, 2)
    y[:15] = True
    mask = torch.arange(40) < 31
    ours = logistic.balanced(y[None], mask[None])[0]
    used = y[mask]
    expected = torch.where(used, 31 / (2 * used.sum()), 31 / (2 * (~used).sum())).double()
    torch.testing.assert_close(ours[mask], expected)
    assert not ours[~mask].any()


def losses_of(y, weights, classes):
    if classes == 2:
        return Binary.of(y[None], weights[None], torch.float64)
    return Multinomial.of(y[None], classes, weights[None], torch.float64)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gap_bounds_the_true_distance_from_the_optimum(classes):
    x, y = several(4, 80, 5, classes)
    weights = torch.full((80,), 3.0, dtype=torch.float64)
    fits = logistic.fit(x, y[None], weights[None], tolerance=1e-13)
    features, loss, one = Standardised(x, weights[None] > 0), losses_of(y, weights, classes), torch.zeros(1).long()
    scale = features.scale[0] * features.spread
    coef = fits.coef[0].reshape(-1, 5)
    best = torch.cat([coef * scale, (fits.intercept[0].reshape(-1, 1) + coef @ features.centre[:, None])], dim=1)
    g = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-6, 1e-3, 0.1, 3.0):
        moved = best[None] + size * torch.randn(best[None].shape, generator=g, dtype=torch.float64)
        _, value, bound = logistic.certify(features, loss, moved, one)
        true = float((value - fits.objective[0]) / value)
        assert true <= float(bound) * (1 + 1e-6) + 1e-13
        assert float(bound) < 1e-12 if size == 0.0 else float(bound) > 0


def test_a_fit_that_does_not_reach_the_tolerance_says_so(monkeypatch):
    x, y = problem(5, 40, 3)
    monkeypatch.setattr(logistic, "STEPS", 1)
    monkeypatch.setattr(logistic, "BRIEF", 0)
    monkeypatch.setattr(logistic, "NEWTON", 0)
    with pytest.raises(logistic.NotConvergedError, match=r"problem 0 ended .* lower c"):
        logistic.fit(x, y[None], torch.ones(1, 40), 100.0)


def test_what_float32_cannot_reach_is_taken_up_in_float64(monkeypatch):
    x, y = problem(9, 60, 12, separable=True)
    x[:, 6:] = x[:, :6] * (1 + 1e-7)
    wide = logistic.fit(x, y[None], torch.ones(1, 60), 1e6, tolerance=1e-9)
    monkeypatch.setattr(logistic, "STEPS", 0)
    alone = logistic.fit(x, y[None], torch.ones(1, 60), 1e6, tolerance=1e-9)
    torch.testing.assert_close(wide.logits(x), alone.logits(x), rtol=1e-4, atol=1e-4)


def test_a_feature_that_only_an_outlier_moves_is_still_fitted_exactly():
    """All rows standardise the shared float32 copy: a huge row that one problem leaves out must not cost it digits."""
    x, y = problem(10, 60, 4)
    x[0, 1] = 1e9
    weights = torch.ones(2, 60)
    weights[0, 0] = 0.0
    fits = logistic.fit(x, torch.stack([y, y]), weights, 10.0, tolerance=1e-10)
    coef, _ = by_sklearn(x, y, weights[0].double(), 10.0)
    np.testing.assert_allclose(fits.coef[0].numpy(), coef, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(20, 70),
    d=st.integers(1, 60),
    classes=st.integers(3, 10),
    c=st.sampled_from([1e-3, 1.0, 100.0]),
    spread=st.sampled_from([0.0, 3.0]),
)
def test_several_classes_reach_scikit_learns_optimum(seed, n, d, classes, c, spread):
    x, y = several(seed, n, d, classes, spread=spread)
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.uniform(0.2, 2.0, n) * (rng.random(n) < 0.8))
    for label in range(classes):
        weights[int(torch.nonzero(y == label)[0])] = 1.0
    fits = logistic.fit(x, y[None], weights[None], c, tolerance=1e-11)
    used = weights.numpy() > 0
    scaler = StandardScaler().fit(x.numpy()[used])
    theirs = LogisticRegression(C=c, tol=1e-12, solver="newton-cholesky", max_iter=10_000)
    theirs.fit(scaler.transform(x.numpy()[used]), y.numpy()[used], sample_weight=weights.numpy()[used])
    expected = theirs.predict_log_proba(scaler.transform(x.numpy()))
    ours = torch.log_softmax(fits.logits(x)[0], 0).T.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * (1 + np.abs(expected).max()))
    loss = -(weights.numpy() * expected[np.arange(n), y.numpy()]).sum()
    assert float(fits.objective[0]) <= (c * loss + (theirs.coef_**2).sum() / 2) * (1 + 1e-9)

    readable, free = logistic.reference(x, y, weights, c)
    logits = readable @ x.T + free[:, None]
    np.testing.assert_allclose(torch.log_softmax(logits, 0).T.numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("spoil", ["rows twice", "columns twice", "far from 0", "few rows"])
def test_no_penalty_to_speak_of_is_still_fitted(spoil, classes):
    """What descent cannot reach, in float32 or float64, is left to Newton's method: a weak penalty on awkward rows."""
    n, d = (18, 120) if spoil == "few rows" else (120, 105)
    x, y = several(15, n, d, classes, spread=2.0)
    if spoil == "rows twice":
        x[n // 2 :] = x[: n // 2].clone()
    if spoil == "columns twice":
        x[:, ::3] = x[:, :1].clone()
    if spoil == "far from 0":
        x += 1e3 * x.std()
    strengths = torch.tensor([1e-4, 3e2, 3e4])
    fits = logistic.fit(x.float(), y.expand(3, n), torch.ones(3, n), strengths)
    assert float(fits.gap.max()) <= 1e-6
    assert bool(fits.coef.isfinite().all())


def test_strengths_are_given_a_problem():
    x, y = problem(11, 50, 6)
    strengths = torch.tensor([1e-2, 1.0, 50.0])
    together = logistic.fit(x, y.expand(3, 50), torch.ones(3, 50), strengths, tolerance=1e-12)
    for i, c in enumerate(strengths.tolist()):
        alone = logistic.fit(x, y[None], torch.ones(1, 50), c, tolerance=1e-12)
        torch.testing.assert_close(together.coef[i], alone.coef[0], rtol=1e-5, atol=1e-8)


def test_problems_that_do_not_fit_side_by_side_are_fitted_in_turn(monkeypatch):
    x, y = problem(12, 50, 6)
    weights = torch.rand(7, 50, generator=torch.Generator().manual_seed(0))
    together = logistic.fit(x, y.expand(7, 50), weights, tolerance=1e-12)
    monkeypatch.setattr(logistic, "ROOM", 1000)
    apart = logistic.fit(x, y.expand(7, 50), weights, tolerance=1e-12)
    torch.testing.assert_close(apart.coef, together.coef, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curved", [False, True])
def test_preconditioners_are_the_inverse_hessian_where_the_subspace_is_everything(curved):
    """Curvature alike in all rows: `Shared` is exact. Curvature of a row's own: `Own` is exact, up to float32."""
    x, _ = problem(13, 90, 7)
    used = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.8
    features = Standardised(x, torch.ones(2, 90) > 0 if not curved else used)
    space = Subspace.of(features, 10_000)  # as large as it can be
    view = features.view(torch.arange(2), torch.float32)
    curvature = torch.full((2, 90), 30.0)
    if curved:
        curvature = 100 * torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) * used
    made = Own.of(space, view, curvature) if curved else Shared.of(space, curvature.sum(1))
    gradient = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    for i in range(2):
        group = features.group[i]
        mean, scale = features.mean[group] * features.spread + features.centre, features.scale[group] * features.spread
        z = torch.cat([(x - mean) / scale, torch.ones(90, 1)], dim=1)
        hessian = z.T @ (curvature[i][:, None].double() * z)
        hessian[range(7), range(7)] += 1.0
        exact = torch.linalg.solve(hessian, gradient[i].double())
        # The penalty is taken to be 1 in shared coordinates: a few per cent of it, beside a curvature of thousands.
        # And 1 - V V' leaves rounding behind, which the curvature does not divide.
        bound = 1e-2 if curved else 2e-3
        assert float((made.apply(gradient)[i] - exact).norm() / exact.norm()) < bound


def test_kin_have_the_inverse_of_their_mean_hessian(monkeypatch):
    x, _ = problem(17, 400, 20)
    kin = torch.tensor([4, 2, 4, 2, 0, 0])
    used = torch.rand(6, 400, generator=torch.Generator().manual_seed(1)) < 0.8
    used[4:] = used[[0, 2]]
    features = Standardised(x, used)
    view = features.view(torch.arange(6), torch.float32)
    shape = 100 * torch.rand(5, 400, generator=torch.Generator().manual_seed(2))
    shape[0] = shape[4] / 20  # alike but for a factor: forming is shared, the inverse is not
    curvature = shape[kin] * used
    on = torch.tensor([True, True, False, True, True, True])  # one has reached its goal
    monkeypatch.setattr(preconditioner, "MOST", 400)  # all rows
    made = Own.together(view, curvature, kin, 1000)  # of so few problems it would not pay
    assert made is not None
    made = made.keep(on)
    gradient = torch.randn(6, 21, generator=torch.Generator().manual_seed(3))[on]
    for at, i in enumerate(torch.nonzero(on)[:, 0].tolist()):
        z = (x.double() - features.centre) / features.spread
        z = torch.cat(
            [(z - features.mean[features.group[i]]) / features.scale[features.group[i]], z.new_ones(400, 1)], 1
        )
        own = curvature[kin == kin[i]].double().mean(0)
        hessian = z.T @ (own[:, None] * z)
        hessian[range(20), range(20)] += 1.0
        exact = torch.linalg.solve(hessian, gradient[at].double())
        assert float((made.apply(gradient)[at] - exact).norm() / exact.norm()) < 1e-2  # as above


@pytest.mark.parametrize("whole", [False, True])
def test_kin_share_the_mean_of_their_hessians_in_a_subspace(whole):
    x, _ = problem(17, 400, 20)
    kin = torch.tensor([4, 2, 4, 2, 0, 0, 7])
    used = torch.rand(7, 400, generator=torch.Generator().manual_seed(1)) < 0.8
    features = Standardised(x, used)
    view = features.view(torch.arange(7), torch.float32)
    space = Subspace.whole(features) if whole else Subspace.of(features, 8)
    curvature = 100 * torch.rand(7, 400, generator=torch.Generator().manual_seed(2)) * used
    shared = Own.of(space, view, curvature, kin)
    assert len(shared.factor) == 4
    means = torch.stack([curvature[kin == number].mean(0) for number in kin])
    alone = Own.of(space, view, means)
    gradient = torch.randn(7, 21, generator=torch.Generator().manual_seed(3))
    on = torch.tensor([True, True, False, True, True, True, False])  # some have reached their goal, one kin wholly
    for got, wanted in (
        (shared, alone),
        (shared.keep(on), alone.keep(on)),
        (shared.keep(on).keep(on[on]), alone.keep(on)),
    ):
        given = gradient if len(got.kin) == 7 else gradient[on]
        # Outside of the subspace a problem's own curvature counts, in it its kin's; here all are about as large.
        torch.testing.assert_close(got.apply(given), wanted.apply(given), rtol=2e-2, atol=2e-4)
    assert len(shared.keep(on).factor) == 3


def test_kin_of_classes_are_the_same_class_of_kin():
    numbers = kin_of_classes(torch.tensor([3, 1, 3]), 2)
    assert numbers[:2].equal(numbers[4:])
    assert len(numbers.unique()) == 4


def test_all_of_a_small_space_is_its_own_basis():
    """A problem's Hessian in all dimensions, and what it gives: no subspace, nothing outside."""
    x, _ = problem(13, 90, 7)
    used = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.8
    features = Standardised(x, used)
    view, gradient = features.view(torch.arange(2), torch.float32), torch.randn(2, 8)
    curvature = 100 * torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) * used
    every = (Own.of(space, view, curvature) for space in (Subspace.whole(features), Subspace.of(features, 7)))
    whole, turned = (each.apply(gradient) for each in every)
    torch.testing.assert_close(whole, turned, rtol=1e-3, atol=1e-5)


def test_features_that_are_constant_but_for_rounding_have_a_subspace():
    """Their squares are below what float32's solvers of eigenvalues can tell apart."""
    x = torch.full((80, 16), 0.1, dtype=torch.float64) + 1e-17 * torch.randn(80, 16, dtype=torch.float64)
    features = Standardised(x, torch.ones(1, 80) > 0)
    features.shared[:, :-1] = 1e-22 * torch.randn(80, 16)
    space = Subspace.of(features, 16)
    assert bool(space.seen.isfinite().all())


def test_folds_of_many_rows_share_a_hessian_and_take_fewer_steps(monkeypatch):
    x, y = problem(19, 2600, 640)
    # As activations are: most of the variance in a few directions, which are no single features.
    turn, _ = torch.linalg.qr(torch.randn(640, 640, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    x = (x * torch.arange(1, 641) ** -0.8) @ turn
    fold = torch.arange(2600) % 5
    weights = torch.stack([fold != i for i in range(5)]).repeat(2, 1).double()
    strengths = torch.tensor([1.0, 100.0]).repeat_interleave(5)

    def fitted():
        return logistic.fit(x, y.expand(10, -1), weights, strengths)

    together = fitted()
    monkeypatch.setattr(Own, "together", lambda *_: None)
    alone = fitted()
    assert float(together.steps.double().mean()) < 0.8 * float(alone.steps.double().mean())
    for each in (together, alone):
        assert float(each.gap.max()) <= 1e-6
    torch.testing.assert_close(together.objective, alone.objective, rtol=2e-6, atol=0.0)


def test_kins_of_like_curvature_share_a_hessian_but_for_a_factor():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 50, generator=g)
    assert preconditioner._leaders(torch.stack([a, 3 * a, b, 2 * a, 1.01 * b])) == {1: 1, 3: 1, 0: 1, 4: 4, 2: 4}


def test_a_hessian_is_shared_only_where_it_pays():
    g = torch.Generator().manual_seed(0)
    x, curvature = torch.randn(2000, 240, generator=g), torch.rand(10, 2000, generator=g)

    def made(rows, kin):
        view = Standardised(x[:rows], torch.ones(10, rows) > 0).view(torch.arange(10), torch.float32)
        return Own.together(view, curvature[:, :rows], kin, 40)

    folds, strangers = torch.zeros(10).long(), torch.arange(10)
    assert made(2000, folds) is not None
    assert made(2000, strangers) is None
    assert made(900, folds) is None


def test_alike_rows_are_fitted_in_their_own_small_span():
    """Nine different rows of forty features, many times each, hardly penalised: float32 cannot reach the optimum."""
    g = torch.Generator().manual_seed(3)
    few = torch.randn(9, 40, generator=g) * torch.logspace(0, 4, 40)
    which = torch.randint(9, (200,), generator=g)
    y = torch.rand(200, generator=g) < (which / 9)
    fits = logistic.fit(few[which], y[None], torch.ones(1, 200), 1e6, tolerance=1e-12)
    coef, intercept = logistic.reference(few[which], y, torch.ones(200), 1e6)
    torch.testing.assert_close(fits.logits(few)[0], few.double() @ coef[0] + intercept, rtol=1e-4, atol=1e-4)


def test_constant_features_change_nothing():
    x, y = problem(6, 60, 4)
    padded = torch.cat([x, torch.full((60, 1), 1e5), torch.zeros(60, 1)], dim=1)
    weights = torch.ones(1, 60)
    a = logistic.fit(x, y[None], weights, tolerance=1e-13)
    b = logistic.fit(padded, y[None], weights, tolerance=1e-13)
    torch.testing.assert_close(a.logits(x), b.logits(padded), rtol=1e-5, atol=1e-6)
    assert not b.coef[0, 4:].abs().gt(1e-12).any()


def test_a_feature_that_is_constant_in_one_problem_alone_gets_no_weight_there():
    x, y = problem(14, 300, 3)
    x = torch.cat([x, torch.zeros(300, 1)], dim=1)
    x[200:, 3] = torch.linspace(0, 1, 100)  # 0 in all rows of the first problem, and not in the mean of all
    weights = torch.ones(2, 300)
    weights[0, 200:] = 0.0
    fits = logistic.fit(x, y.expand(2, 300), weights, tolerance=1e-12)
    assert abs(float(fits.coef[0, 3])) < 1e-6 < 1e-3 < abs(float(fits.coef[1, 3]))
    alone = logistic.fit(x[:200, :3], y[None, :200], torch.ones(1, 200), tolerance=1e-12)
    torch.testing.assert_close(fits.coef[0, :3], alone.coef[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_features_are_taken_as_they_are(dtype):
    x, y = problem(7, 60, 5)
    x = x.to(dtype)
    torch.testing.assert_close(
        logistic.fit(x, y[None], torch.ones(1, 60)).coef, logistic.fit(x.double(), y[None], torch.ones(1, 60)).coef
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y, w: (x.index_fill(0, torch.tensor([3]), torch.nan), y, w, 1.0), "row 3 of x holds NaN"),
        (lambda x, y, w: (x, torch.ones_like(y), w, 1.0), "problem 0 has no row of class False"),
        (lambda x, y, w: (x, y, w, 0.0), "c must be above 0"),
        (lambda x, y, w: (x, y, -w, 1.0), "not negative"),
        (lambda x, y, w: (x[:9], y, w, 1.0), r"must be \[p, 9\]"),
        (lambda x, y, w: (x[:, :0], y, w, 1.0), r"x \(10, 0\) has no features"),
    ],
)
def test_bad_input_is_refused_by_name(spoil, message):
    x, y = problem(8, 10, 2)
    # Without the shape checks that run in tests: users run without them.
    given = spoil(x, y[None], torch.ones(1, 10))
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(logistic.fit)(*given)


def test_no_problem_at_all():
    assert logistic.fit(torch.ones(4, 3), torch.ones(0, 4).bool(), torch.ones(0, 4)).coef.shape == (0, 3)


def test_what_float32_leaves_over_takes_few_steps_in_float64(monkeypatch):
    """A problem's Hessian in all dimensions is Newton's method: a few steps, where the subspace alone takes many."""
    x, y = problem(5, 400, 250)
    weights, strengths = torch.ones(3, 400), torch.tensor([10.0, 100.0, 1000.0])
    monkeypatch.setattr(logistic, "STEPS", 3)
    at_once = logistic.fit(x, y.expand(3, 400), weights, strengths)
    monkeypatch.setattr(descent, "ROOM", 0)
    later = logistic.fit(x, y.expand(3, 400), weights, strengths)
    assert int(at_once.steps.max()) < int(later.steps.max()) / 2
    for fits in (at_once, later):
        assert float(fits.gap.max()) <= 1e-6
