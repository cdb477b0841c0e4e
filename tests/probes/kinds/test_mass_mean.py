"""The mass-mean probe against its definition, written with a pseudo-inverse as in the authors' code."""

import pytest
import torch

from gapprobe.probes.kinds.mass_mean import MassMean


@pytest.mark.parametrize(("n", "d"), [(2000, 6), (400, 12)])
def test_the_direction_is_the_papers(n, d):
    g = torch.Generator().manual_seed(n)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    y = torch.rand(1, n, generator=g) < 0.4
    x = (torch.randn(n, d, generator=g, dtype=torch.float64) + y[0, :, None]) @ mix
    fits = MassMean().fit(x, y, torch.ones(1, n).double(), torch.ones(1).double(), 0)
    m0, m1 = x[~y[0]].mean(0), x[y[0]].mean(0)
    centred = x - torch.where(y[0, :, None], m1, m0)
    paper = torch.linalg.pinv(centred.T @ centred / n, hermitian=True) @ (m1 - m0)
    ours, theirs = fits.scores(x)[0], (x - (m0 + m1) / 2) @ paper
    # The penalty is a thousandth of a deviation's square, the smallest direction here about a hundredth of one.
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.995
    middle = fits.coef[0] @ (m0 + m1) / 2 + fits.intercept[0]
    assert abs(float(middle)) < 1e-9


def test_more_features_than_rows_still_have_an_answer():
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(20) % 2 == 0)[None]
    x = torch.randn(20, 50, generator=g) + 2.0 * y[0, :, None]
    scores = MassMean().fit(x, y, torch.ones(1, 20).double(), torch.ones(1).double(), 0).scores(x)
    assert torch.equal(scores > 0, y)
