"""Cosines over a store: pairing, centring, and refusals."""

import numpy as np
import pytest
import torch

from gapprobe.errors import DataError
from gapprobe.similarity import cosine

IDS = tuple(f"row-{i}" for i in range(12))


def test_pairs_are_compared_in_their_order_at_every_layer(store_of):
    x = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(0)) + 5
    left, right = [IDS[4], IDS[0], IDS[11]], [IDS[1], IDS[2], IDS[3]]
    result = cosine(store_of(x, IDS), left, right, position="last_input")
    assert result.layers == (0, 1, 2)
    a, b = x[:, [4, 0, 11]].double(), x[:, [1, 2, 3]].double()
    np.testing.assert_allclose(result.raw, torch.cosine_similarity(a, b, dim=2), rtol=1e-5)
    centre = torch.cat([a, b], dim=1).mean(1, keepdim=True)
    np.testing.assert_allclose(result.centred, torch.cosine_similarity(a - centre, b - centre, dim=2), atol=1e-5)


def test_a_layer_that_is_the_same_for_all_rows_has_no_centred_cosine(store_of):
    x = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(1))
    x[0] = x[0, 0]
    result = cosine(store_of(x, IDS), IDS[:6], IDS[6:], position="last_input", layers=[0])
    np.testing.assert_allclose(result.raw, 1, rtol=1e-6)
    assert np.isnan(result.centred).all()


def test_rows_without_partner_are_refused(store_of):
    store = store_of(torch.ones(2, 12, 6), IDS)
    with pytest.raises(DataError, match="3 rows on the left and 2 on the right"):
        cosine(store, IDS[:3], IDS[:2], position="last_input")
    with pytest.raises(DataError, match="at least one"):
        cosine(store, [], [], position="last_input")
