"""Shrunk discriminants against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import StandardScaler

from gapprobe.errors import DataError
from gapprobe.probes.kinds.lda import Lda


def drawn(seed, n, d, p=1):
    g = torch.Generator().manual_seed(seed)
    y = torch.rand(p, n, generator=g) < 0.4
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(-2, 2, d, dtype=torch.float64) + 3.0
    x = x + y[0, :, None] * x.std(0)
    weights = (torch.rand(p, n, generator=g) < 0.8).double()
    return x, y, weights


@pytest.mark.parametrize(("n", "d"), [(80, 6), (30, 50)])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 0.95])
def test_scores_are_scikit_learns(n, d, shrinkage):
    x, y, weights = drawn(0, n, d)
    used = weights[0].numpy() > 0
    z = StandardScaler().fit(x.numpy()[used]).transform(x.numpy())
    labels = y[0].numpy()
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(z[used], labels[used])
    centred = np.concatenate([z[used & (labels == c)] - z[used & (labels == c)].mean(0) for c in (False, True)])
    scale = shrinkage * centred.var(0).mean()
    # (1 - s) S + s m = (1 - s) (S + 1 / strength): the direction's scores are 1 - s of ours, the prior's part is alike.
    fits = Lda().fit(x, y, weights, torch.tensor([(1 - shrinkage) / scale]).double(), 0)
    prior = np.log(labels[used].mean() / (1 - labels[used].mean()))
    ours = (fits.scores(x)[0].numpy() - prior) / (1 - shrinkage) + prior
    # 1 - c r'v in the denominator loses what the classes are apart: three digits here.
    np.testing.assert_allclose(ours, theirs.decision_function(z), rtol=1e-8, atol=1e-8)


def test_whole_weights_are_rows_that_many_times():
    x, y, _ = drawn(1, 40, 5)
    counts = torch.randint(1, 4, (40,), generator=torch.Generator().manual_seed(3))
    # Standardisation sees a row once, whatever its weight: only where the ratio to it is undone are the two alike.
    z = (x - x.mean(0)) / x.std(0, correction=0)
    weighted = Lda().fit(z, y, counts[None].double(), torch.full((1,), 1e6).double(), 0).scores(z)
    again = z.repeat_interleave(counts, 0)
    repeated = Lda().fit(
        again, y.repeat_interleave(counts, 1), torch.ones(1, len(again)).double(), torch.full((1,), 1e6).double(), 0
    )
    # A penalty of 1e-6 stands on features of slightly different deviations.
    torch.testing.assert_close(weighted, repeated.scores(z), rtol=1e-4, atol=1e-4)


def test_problems_of_the_same_rows_are_fitted_as_if_alone():
    x, y, weights = drawn(2, 60, 8, p=3)
    weights[:] = weights[0]
    strengths = torch.tensor([1.0, 1.0, 100.0]).double()
    together = Lda().fit(x, y, weights, strengths, 0).scores(x)
    for i in range(3):
        alone = Lda().fit(x, y[i : i + 1], weights[i : i + 1], strengths[i : i + 1], 0).scores(x)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-10, atol=1e-10)


def test_a_strength_of_zero_is_refused():
    x, y, weights = drawn(3, 20, 3)
    with pytest.raises(DataError, match="strengths must be above 0"):
        Lda().fit(x, y, weights, torch.zeros(1).double(), 0)
