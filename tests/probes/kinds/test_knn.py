"""Neighbours against scikit-learn's on standardised rows."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from gapprobe.errors import DataError
from gapprobe.probes.kinds import knn
from gapprobe.probes.kinds.knn import Knn


def drawn(seed, n=70, d=5, p=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.logspace(-2, 2, d, dtype=torch.float64) + 3.0
    y = torch.rand(p, n, generator=g) < 0.4
    used = torch.rand(p, n, generator=g) < 0.7
    used[1:2] = used[0]
    return x, y, used


def test_shares_are_scikit_learns_for_equal_weights(monkeypatch):
    x, y, used = drawn(0)
    strengths = torch.tensor([1.0, 5.0, 5.0, 15.0]).double()
    scores = Knn().fit(x, y, used.double() * 2, strengths, 0).scores(x)
    for i in range(4):
        own = used[i].numpy()
        z = StandardScaler().fit(x.numpy()[own]).transform(x.numpy())
        theirs = KNeighborsClassifier(int(strengths[i])).fit(z[own], y[i].numpy()[own])
        np.testing.assert_allclose(scores[i], 2 * theirs.predict_proba(z)[:, 1] - 1, rtol=0, atol=1e-12)
    monkeypatch.setattr(knn, "ROOM", 200)
    torch.testing.assert_close(Knn().fit(x, y, used.double(), strengths, 0).scores(x), scores)


def test_neighbours_count_with_their_weights():
    x = torch.tensor([[-1.0], [1.0], [9.0]])
    y = torch.tensor([[True, False, False]])
    fits = Knn().fit(x, y, torch.tensor([[3.0, 1.0, 1.0]]).double(), torch.tensor([2.0]).double(), 0)
    assert float(fits.scores(torch.tensor([[0.1]]))) == pytest.approx((3 - 1) / 4)


def test_all_rows_are_neighbours_where_k_is_larger():
    x, y, used = drawn(1, p=2)
    scores = Knn().fit(x, y, used.double(), torch.tensor([500.0, 3.0]).double(), 0).scores(x)
    expected = 2 * float((y[0] & used[0]).sum() / used[0].sum()) - 1
    torch.testing.assert_close(scores[0], torch.full_like(scores[0], expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [0.5, 2.5])
def test_half_a_neighbour_is_refused(k):
    x, y, used = drawn(2, p=1)
    with pytest.raises(DataError, match="whole and above 0"):
        Knn().fit(x, y, used.double(), torch.tensor([k]).double(), 0)
