"""Areas against scikit-learn, intervals against simulation: an interval that does not cover is worse than none."""

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gapprobe import stats
from gapprobe.errors import DataError


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 60),
    decimals=st.sampled_from([0, 1, 8]),
    folds=st.integers(1, 5),
    b=st.integers(1, 4),
)
def test_areas_are_scikit_learns_within_each_stratum(seed, n, decimals, folds, b):
    rng = np.random.default_rng(seed)
    scores, labels = np.round(rng.normal(size=n), decimals), rng.random(n) < 0.4
    strata, weights = rng.integers(0, folds, n), rng.integers(0, 3, (b, n)).astype(float)
    got = stats.weighted_auc(scores, labels, weights, strata)
    for i in range(b):
        wins = pairs = 0.0
        for fold in range(folds):
            rows = (strata == fold) & (weights[i] > 0)
            positive, negative = weights[i][rows & labels].sum(), weights[i][rows & ~labels].sum()
            if positive * negative:
                area = roc_auc_score(labels[rows], scores[rows], sample_weight=weights[i][rows])
                wins, pairs = wins + area * positive * negative, pairs + positive * negative
        if pairs:
            assert got[i] == pytest.approx(wins / pairs, abs=1e-12)
        else:
            assert math.isnan(got[i])


def test_pairs_across_folds_would_bias_an_area_downwards():
    """A fold's training rate falls as its held-out rate rises: that alone pulls a pooled area of noise below 1/2."""
    rng = np.random.default_rng(0)
    pooled, within = [], []
    for _ in range(100):
        labels, folds = rng.random(100) < 0.5, np.repeat(np.arange(10), 10)
        scores = np.array([labels[folds != fold].mean() for fold in folds]) + 1e-3 * rng.normal(size=100)
        pooled.append(stats.auc(scores, labels))
        within.append(stats.auc(scores, labels, folds))
    assert np.mean(pooled) < 0.4
    assert np.mean(within) == pytest.approx(0.5, abs=0.02)


def test_an_area_that_does_not_exist_is_nan_and_counted():
    labels = np.array([True, False, False, False])
    weights = np.array([[1.0, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0], [2, 1, 0, 0]])
    result = stats.estimate(lambda w: stats.weighted_auc(np.array([3.0, 1, 2, 4]), labels, w), weights)
    assert result.value == pytest.approx(2 / 3)
    assert result.degenerate == 2
    assert math.isnan(stats.auc(np.zeros(0), np.zeros(0, dtype=bool)))


def test_crossed_weights_resample_both_kinds():
    first, second = np.array(["a", "a", "b", "b", "b"]), np.array([1, 2, 1, 2, 2])
    weights = stats.crossed_weights(first, second, replicates=4000, seed=3)
    assert weights.shape == (4000, 5)
    np.testing.assert_array_equal(weights, stats.crossed_weights(first, second, replicates=4000, seed=3))
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.1)
    np.testing.assert_array_equal(weights[:, 3], weights[:, 4])  # same question, same image
    # Two groups of each kind, each drawn 0, 1 or 2 times: a row's weight is a product of two such counts.
    assert set(np.unique(weights)) == {0, 1, 2, 4}
    with pytest.raises(DataError, match="every row wants both"):
        inspect.unwrap(stats.crossed_weights)(first, second[:4], seed=0)


def crossed_sample(rng, questions, images, effect):
    """Each image gets every question; both leave a mark on all their rows."""
    question, image = (axis.ravel() for axis in np.meshgrid(range(questions), range(images)))
    mark = effect * (rng.normal(size=questions)[question] + rng.normal(size=images)[image])
    return question, image, mark


def test_crossed_intervals_cover_where_intervals_of_rows_do_not():
    rng, covered, naive = np.random.default_rng(1), 0, 0
    for seed in range(200):
        question, image, mark = crossed_sample(rng, 20, 25, 1.0)
        values = mark + rng.normal(size=len(mark))
        result = stats.mean(values, stats.crossed_weights(question, image, replicates=300, seed=seed))
        covered += result.low <= 0 <= result.high
        naive += abs(values.mean()) <= stats.Z * values.std() / math.sqrt(len(values))
    assert covered / 200 >= 0.9
    assert naive / 200 < 0.6


def test_crossed_intervals_of_an_area_cover():
    rng, covered = np.random.default_rng(2), 0
    for seed in range(150):
        question, image, mark = crossed_sample(rng, 15, 20, 1.0)
        labels = mark + rng.normal(size=len(mark)) > 0
        scores = rng.normal(size=15)[question] + rng.normal(size=20)[image]  # nothing to do with the labels: 1/2
        weights = stats.crossed_weights(question, image, replicates=300, seed=seed)
        result = stats.estimate(lambda w, s=scores, y=labels: stats.weighted_auc(s, y, w), weights)
        covered += result.low <= 0.5 <= result.high
    assert covered / 150 >= 0.9


def test_proportions_have_wilsons_interval():
    result = stats.proportion(8, 10)
    assert (result.value, result.n) == (0.8, 10)
    assert result.low == pytest.approx(0.490, abs=1e-3)
    assert result.high == pytest.approx(0.943, abs=1e-3)
    assert stats.proportion(0, 5).low == 0
    assert stats.proportion(5, 5).high == 1
    assert math.isnan(stats.proportion(0, 0).value)


def test_layer_means_leave_out_what_does_not_exist():
    values = np.array([[1.0, 3.0, np.nan], [np.nan, np.nan, np.nan]])
    some, none = stats.layer_means(values, np.ones((10, 3)))
    assert (some.value, some.low, some.high, some.n) == (2, 2, 2, 2)
    assert math.isnan(none.value)
    assert none.n == 0
