"""Confidences: what fits them has not seen the row."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from gapprobe.errors import DataError
from gapprobe.selective import aurc, calibration_error, selective_scores, self_consistency, stacked, tally


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


def test_the_stack_is_scikit_learns_regression_on_the_other_folds():
    correct, folds, first, second = confidences(4)
    got = stacked({"a": first, "b": second}, correct, folds)
    x = np.stack([first, second], axis=1)
    for fold in range(5):
        rest = folds != fold
        mean, scale = x[rest].mean(0), x[rest].std(0)
        fit = LogisticRegression(tol=1e-10).fit((x[rest] - mean) / scale, correct[rest])
        np.testing.assert_allclose(got[~rest], fit.predict_proba((x[~rest] - mean) / scale)[:, 1], atol=1e-5)


def test_a_stack_of_two_views_beats_either_and_is_calibrated():
    """Two views with independent noise: their sum knows more. The mean of scales that differ does not find it."""
    rng = np.random.default_rng(5)
    correct, folds = rng.random(4000) < 0.5, rng.integers(0, 5, 4000)
    views = {"a": correct + rng.normal(size=4000), "b": 100 * correct + 100 * rng.normal(size=4000)}
    both = stacked(views, correct, folds)
    areas = {name: aurc(tally(view, correct))[0] for name, view in (views | {"both": both}).items()}
    assert areas["both"] < min(areas["a"], areas["b"]) - 0.01
    error = calibration_error(both, correct, np.ones((1, 4000)), bins=10)[0]
    # A calibrated bin of n rows is off by about sqrt(p (1 - p) / n): 10 bins of 400 rows, by 0.02 each.
    assert error < 2 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize("score", ["perplexity", "stacked"])
def test_a_rows_own_label_does_not_reach_its_confidence(score):
    correct, folds, log_prob, probe = confidences(1)

    def scored(labels):
        if score == "stacked":
            return stacked({"a": log_prob, "b": probe}, labels, folds)
        return selective_scores(log_prob, probe, labels, folds)["perplexity"]

    before, after = scored(correct), scored(correct ^ (folds == 3))
    np.testing.assert_array_equal(before[folds == 3], after[folds == 3])
    assert (before != after).any()


def test_self_consistency_is_the_share_of_samples_that_agree():
    got = self_consistency(["Paris", "4"], [["paris ", "Lyon", "PARIS"], ["5"]])
    np.testing.assert_allclose(got, [2 / 3, 0])
    near = self_consistency(["Paris"], [["in Paris", "Lyon"]], same=lambda a, b: a in b)
    np.testing.assert_allclose(near, [0.5])


def test_refusals():
    correct, folds, log_prob, probe = confidences(3)
    with pytest.raises(DataError, match="are all wrong"):
        selective_scores(probe, probe, np.zeros(400, dtype=bool), folds)
    log_prob[[2, 5]] = np.nan
    with pytest.raises(DataError, match="2 rows have no finite mean log-probability, the first is row 2"):
        selective_scores(log_prob, probe, correct, folds)
    with pytest.raises(DataError, match="2 rows have no finite a"):
        stacked({"a": log_prob}, correct, folds)
    with pytest.raises(DataError, match="no confidences to stack"):
        stacked({}, correct, folds)
    with pytest.raises(DataError, match="row 1 has no samples"):
        self_consistency(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="2 answers and samples of 1 rows"):
        self_consistency(["a", "b"], [["a"]])
