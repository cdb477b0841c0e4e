"""The subspace in which Hessians are exact: leading directions of the features, from all rows or some."""

import math

import pytest
import torch

from gapprobe.kernels import preconditioner
from gapprobe.kernels.preconditioner import Subspace
from gapprobe.kernels.standardised import Standardised


@pytest.mark.parametrize("sample", [200, 100, 67])  # of 200 rows: each, every second, every third
def test_a_subspace_holds_the_leading_directions_of_the_rows_it_saw(sample, monkeypatch):
    monkeypatch.setattr(preconditioner, "SAMPLE", sample)
    g = torch.Generator().manual_seed(0)
    strong = torch.randn(200, 3, generator=g) @ torch.randn(3, 40, generator=g)
    features = Standardised(5 * strong + torch.randn(200, 40, generator=g), torch.ones(1, 200) > 0)
    space = Subspace.of(features, 8)
    stride = math.ceil(200 / sample)
    z = features.shared[::stride, :-1].double()
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    assert space.stride == stride
    assert space.basis is not None
    basis = space.basis.double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(space.seen[:, :-1].double(), z @ basis.T, atol=1e-4, rtol=0)
    assert space.seen[:, -1].eq(1).all()
    # Three directions stand out: they lie in the subspace, and so do their eigenvalues among its own.
    found = (basis @ vectors[:, -3:]).norm(dim=0)
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-4, rtol=0)
    torch.testing.assert_close(space.values[-3:].double(), values[-3:], rtol=1e-4, atol=0)
    rest = z.square().sum() / len(z) - space.values.double().sum()
    assert space.tail == pytest.approx(float(rest) / (40 - 8), rel=1e-3)
