"""Our probes keep scikit-learn's own contract, and give what it gives."""

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from gapprobe.probes.estimator import ProbeClassifier


def not_kept(estimator):
    """Return the clauses that a probe breaks by what it is, each with its reason."""
    if estimator.probe == "mean_difference":
        return {
            "check_class_weight_classifiers": "the threshold lies halfway between the means, whatever classes weigh"
        }
    # A weight of 2 is two rows to the loss, and one to the standardisation: as in a pipeline with StandardScaler.
    return {
        f"check_sample_weight_equivalence_on_{kind}_data": "features are standardised by rows, not by weights"
        for kind in ("dense", "sparse")
    }


ESTIMATORS = [ProbeClassifier(), ProbeClassifier("ridge"), ProbeClassifier("mean_difference")]


@parametrize_with_checks(ESTIMATORS, expected_failed_checks=not_kept)
def test_scikit_learns_own_checks_pass(estimator, check, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")  # without it the check with arrays of another library is left out
    check(estimator)


def test_it_is_logistic_regression_with_a_standardisation():
    x, y = make_classification(300, 20, random_state=0)
    x = x * np.logspace(-2, 2, 20)
    ours = ProbeClassifier(strength=0.5, class_weight="balanced").fit(x, y)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-10, class_weight="balanced")).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-3)
    assert ours.coef_.shape == (1, 20)
    np.testing.assert_allclose(x @ ours.coef_[0] + ours.intercept_[0], ours.decision_function(x), atol=1e-9)


def test_it_is_searched_like_any_other():
    x, y = make_classification(200, 30, random_state=1)
    search = GridSearchCV(ProbeClassifier(), {"strength": [1e-3, 1e-1, 10.0]}, cv=3).fit(x, y)
    assert search.best_score_ > 0.7


@pytest.mark.parametrize(("labels", "message"), [([0, 1, 2] * 4, "two"), ([1] * 12, "1 class")])
def test_other_than_two_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        ProbeClassifier().fit(np.random.default_rng(0).normal(size=(12, 3)), labels)
