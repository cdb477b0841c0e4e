"""Estimators against scikit-learn itself."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import LinearSVC

from gapprobe.errors import ConfigError, DataError
from gapprobe.probes.adapters import from_sklearn
from tests.probes.problems import drawn


@pytest.mark.parametrize("jobs", [None, 2])
def test_estimators_are_fitted_as_by_hand(jobs):
    x, y, weights, strengths = drawn()
    probe = from_sklearn(LinearSVC(dual=False), strength="C", jobs=jobs)
    assert (probe.name, probe.calibrated, len(probe.strengths)) == ("LinearSVC", False, 6)
    scores = probe.fit(x, y, weights, strengths, 0).scores(x)
    for i in range(3):
        used = weights[i].numpy() > 0
        z = StandardScaler().fit(x.numpy()[used]).transform(x.numpy())
        own = LinearSVC(C=float(strengths[i]), dual=False, random_state=0)
        own.fit(z[used], y[i].numpy()[used], sample_weight=weights[i].numpy()[used])
        # Two standardisations that differ in rounding, and an iteration that stops at 1e-4.
        np.testing.assert_allclose(scores[i], own.decision_function(z), rtol=1e-6, atol=1e-6)
    assert not hasattr(probe.estimator, "coef_")


def test_probabilities_become_finite_log_odds_by_seed():
    x, y, weights, strengths = drawn()
    probe = from_sklearn(RandomForestClassifier(20), name="forest")
    assert (probe.name, probe.calibrated, probe.strengths) == ("forest", True, (1.0,))
    scores = [probe.fit(x, y, weights, strengths, seed).scores(x) for seed in (0, 0, 1)]
    assert bool(torch.isfinite(scores[0]).all())
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_regressors_and_pipelines_are_probes_too():
    x, y, weights, strengths = drawn()
    line = from_sklearn(Ridge(), strength="alpha", standardise=False).fit(x, y, weights, strengths, 0).scores(x)
    used = weights[0].numpy() > 0
    own = Ridge(alpha=0.1).fit(x.numpy()[used], 2.0 * y[0].numpy()[used] - 1, sample_weight=weights[0].numpy()[used])
    np.testing.assert_allclose(line[0], own.predict(x.numpy()), rtol=1e-8, atol=1e-8)
    curved = make_pipeline(PolynomialFeatures(2), LogisticRegression())
    with pytest.warns(UserWarning, match="takes no sample_weight"):
        from_sklearn(curved, strength="logisticregression__C").fit(x, y, weights, strengths, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_sklearn(LinearDiscriminantAnalysis()).fit(x, y, (weights > 0).double() * 2, strengths, 0)


def test_what_is_no_estimator_is_refused():
    with pytest.raises(ConfigError, match="has no parameter 'C'; it has .*shrinkage"):
        from_sklearn(LinearDiscriminantAnalysis(), strength="C")
    with pytest.raises(ConfigError, match="gives no scores"):
        from_sklearn(StandardScaler())
    with pytest.raises(ConfigError, match="is no scikit-learn estimator"):
        from_sklearn(3)
    x, y, weights, strengths = drawn()
    with pytest.raises(DataError, match="LinearSVC cannot fit problem 0"):
        from_sklearn(LinearSVC(penalty="l1", loss="hinge")).fit(x, y, weights, strengths, 0)
