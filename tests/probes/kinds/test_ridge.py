"""The kind asks the kernel for what its strengths mean: scikit-learn's RidgeClassifier on standardised rows."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from gapprobe.errors import DataError
from gapprobe.probes.kinds.ridge import Ridge


def test_scores_are_ridge_classifiers():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 9, generator=g).double() * 30 + 5, torch.rand(2, 60, generator=g) < 0.4
    weights = torch.rand(2, 60, generator=g).double() * (torch.rand(2, 60, generator=g) < 0.8)
    strengths = torch.tensor([0.1, 1e-3]).double()
    scores = Ridge().fit(x, y, weights, strengths, 0).scores(x)
    for i in range(2):
        used = weights[i].numpy() > 0
        z = StandardScaler().fit(x.numpy()[used]).transform(x.numpy())
        theirs = RidgeClassifier(alpha=1 / float(strengths[i]), solver="svd")
        theirs.fit(z[used], y[i].numpy()[used], sample_weight=weights[i].numpy()[used])
        np.testing.assert_allclose(scores[i], theirs.decision_function(z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y, w, s: (x / 0, y, w, s), "row 0 of x holds NaN"),
        (lambda x, y, w, s: (x, y, -w, s), "not negative"),
        (lambda x, y, w, s: (x, ~y | y, w, s), "no row of class False"),
        (lambda x, y, w, s: (x, y, w, -s), "strengths must be above 0, got -1"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(spoil, message):
    x, y = torch.randn(8, 2), (torch.arange(8) % 2 == 0)[None]
    with pytest.raises(DataError, match=message):
        Ridge().fit(*spoil(x, y, torch.ones(1, 8).double(), torch.ones(1).double()), 0)
