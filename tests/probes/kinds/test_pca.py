"""The principal direction against scikit-learn's PCA of standardised rows."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from gapprobe.errors import DataError
from gapprobe.probes.kinds.pca import Pca


def one(n):
    return torch.ones(1, n).double(), torch.ones(1).double(), 0


@pytest.mark.parametrize(("n", "d"), [(60, 5), (60, 80), (200, 50)])
def test_the_direction_is_scikit_learns(n, d):
    g = torch.Generator().manual_seed(d)
    y = torch.rand(1, n, generator=g) < 0.4
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * 9 + 20.0 * y[0, :, None]
    scores = Pca().fit(x, y, *one(n)).scores(x)[0].numpy()
    z = StandardScaler().fit_transform(x.numpy())
    theirs = PCA(1, svd_solver="full", whiten=True).fit_transform(z)[:, 0]
    theirs *= np.sign(theirs[y[0].numpy()].mean() - theirs[~y[0].numpy()].mean())
    theirs -= (theirs[y[0].numpy()].mean() + theirs[~y[0].numpy()].mean()) / 2
    # whiten divides by the deviation of a sample, ours is the rows' own. A residual of 1e-8 is divided by the gap.
    np.testing.assert_allclose(scores, theirs * np.sqrt(n / (n - 1)), rtol=1e-6, atol=1e-6)


def test_labels_only_sign_it():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 40, generator=g), torch.rand(1, 50, generator=g) < 0.5
    weights = torch.ones(2, 50).double()
    fits = Pca().fit(x, torch.cat([y, ~y]), weights, torch.ones(2).double(), 0)
    assert torch.equal(fits.coef[0], -fits.coef[1])


def test_rows_that_do_not_vary_have_none():
    with pytest.raises(DataError, match="no feature varies"):
        Pca().fit(torch.ones(6, 3), (torch.arange(6) < 3)[None], *one(6))
