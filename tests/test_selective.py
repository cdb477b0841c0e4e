"""Risk and coverage: conventions, brute force, ideal confidences, and honest confidences."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.selective import ideal_aurc, risk_coverage, selective, selective_scores, weighted_aurc


def ones(n, b=5):
    return np.ones((b, n))


def test_coverage_is_the_share_answered_and_risk_the_share_wrong_among_them():
    """The published code also holds a coverage turned round: there, answering everything covers nothing."""
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    correct = np.array([True, True, False, True, False, False])
    result = selective(confidence, correct, ones(6))
    assert result.coverage.value == pytest.approx(5 / 6)
    assert result.risk.value == pytest.approx(2 / 5)
    assert result.risk.n == 5
    everything = selective(np.ones(6), correct, ones(6))
    assert everything.coverage.value == 1
    assert everything.risk.value == 0.5
    nothing = selective(np.zeros(6), correct, ones(6))
    assert nothing.coverage.value == 0
    assert math.isnan(nothing.risk.value)


def by_hand(confidence, correct, weights):
    """Sum over thresholds, one row at a time."""
    total = 0.0
    for own, weight in zip(confidence, weights, strict=True):
        answered = confidence >= own
        if weight:
            total += weight * (weights * answered * ~correct).sum() / (weights * answered).sum()
    return total / weights.sum()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 40), decimals=st.sampled_from([0, 1, 8]))
def test_the_area_is_its_definition_whatever_the_order_of_rows(seed, n, decimals):
    rng = np.random.default_rng(seed)
    confidence, correct = np.round(rng.random(n), decimals), rng.random(n) < 0.6
    weights = rng.integers(0, 3, (3, n)).astype(float)
    weights[:, 0] = 1
    got = weighted_aurc(confidence, correct, weights)
    np.testing.assert_allclose(got, [by_hand(confidence, correct, w) for w in weights], rtol=1e-12, atol=1e-14)
    order = rng.permutation(n)
    np.testing.assert_allclose(weighted_aurc(confidence[order], correct[order], weights[:, order]), got, atol=1e-14)
    curve = risk_coverage(confidence, correct)
    assert (np.diff(curve.threshold) < 0).all()
    assert curve.coverage[-1] == 1
    assert curve.risk[-1] == pytest.approx((~correct).mean())
    for threshold, coverage, risk in zip(curve.threshold, curve.coverage, curve.risk, strict=True):
        assert coverage == pytest.approx((confidence >= threshold).mean())
        assert risk == pytest.approx((~correct[confidence >= threshold]).mean())


def test_an_ideal_confidence_has_no_excess_and_a_useless_one_has_the_risk():
    correct = np.arange(4000) < 2800
    ideal = selective(-np.arange(4000.0), correct, ones(4000, 1))
    assert ideal.e_aurc.value == pytest.approx(0, abs=1e-3)
    assert ideal.e_aurc.value >= 0
    useless = selective(np.full(4000, 0.7), correct, ones(4000, 1))
    assert useless.aurc.value == pytest.approx(0.3)
    np.testing.assert_allclose(ideal_aurc(np.array([0.0, 1.0, 0.3])), [0, 1, 0.3 + 0.7 * math.log(0.7)])


def test_thinning_keeps_the_end():
    rng = np.random.default_rng(0)
    curve = risk_coverage(rng.random(999), rng.random(999) < 0.5)
    thin = curve.thinned(200)
    assert len(thin.coverage) == 200
    assert thin.coverage[-1] == 1
    assert len(curve.thinned(5000).risk) == 999


def confidences(seed, n=400):
    rng = np.random.default_rng(seed)
    correct, folds = rng.random(n) < 0.3, rng.integers(0, 5, n)
    return correct, folds, correct + rng.normal(size=n), rng.random(n)


@pytest.mark.parametrize("balanced", [True, False])
def test_perplexity_is_scikit_learns_regression_on_the_other_folds(balanced):
    correct, folds, log_prob, probe = confidences(0)
    scores = selective_scores(log_prob, probe, correct, folds, balanced=balanced)
    for fold in range(5):
        rest = folds != fold
        mean, scale = log_prob[rest].mean(), log_prob[rest].std()
        fit = LogisticRegression(tol=1e-10, class_weight="balanced" if balanced else None)
        fit.fit((log_prob[rest, None] - mean) / scale, correct[rest])
        expected = fit.predict_proba((log_prob[~rest, None] - mean) / scale)[:, 1]
        np.testing.assert_allclose(scores["perplexity"][~rest], expected, atol=1e-5)
    np.testing.assert_array_equal(scores["probe"], probe)
    np.testing.assert_allclose(scores["ensemble"], (scores["perplexity"] + probe) / 2)


def test_a_rows_own_label_does_not_reach_its_confidence():
    correct, folds, log_prob, probe = confidences(1)
    before = selective_scores(log_prob, probe, correct, folds)["perplexity"]
    after = selective_scores(log_prob, probe, correct ^ (folds == 3), folds)["perplexity"]
    np.testing.assert_array_equal(before[folds == 3], after[folds == 3])
    assert (before != after).any()


def test_intervals_come_from_the_replicates():
    correct, _, confidence, _ = confidences(2)
    images = np.arange(400) // 4
    weights = stats.crossed_weights(np.arange(400) % 40, images, replicates=300, seed=0)
    result = selective(confidence, correct, weights)
    for part in (result.coverage, result.risk, result.aurc, result.e_aurc):
        assert part.low < part.value < part.high


def test_refusals():
    correct, folds, log_prob, probe = confidences(3)
    log_prob[[2, 5]] = np.nan
    with pytest.raises(DataError, match="2 rows have no finite mean log-probability"):
        selective_scores(log_prob, probe, correct, folds)
    with pytest.raises(DataError, match="are all wrong"):
        selective_scores(probe, probe, np.zeros(400, dtype=bool), folds)
    with pytest.raises(DataError, match="2 rows have no confidence"):
        selective(log_prob, correct, ones(400))
