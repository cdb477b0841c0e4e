"""Features that every problem standardises by its own rows: the copies, and the products with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.kernels import compiled, standardised
from gapprobe.kernels.moments import standard
from gapprobe.kernels.standardised import Standardised

SIZES = [(1, 1), (5, 3), (63, 64), (64, 65), (65, 63), (130, 150)]


def drawn(n, d, dtype, seed=0):
    """Return features whose means and spreads differ, in rows that lie apart, and three problems' rows."""
    g = torch.Generator().manual_seed(seed)
    room = torch.full((n, d + 5), torch.nan, dtype=dtype)
    room[:, :d] = (5 * torch.randn(d, generator=g) + torch.rand(d, generator=g) * torch.randn(n, d, generator=g)).to(
        dtype
    )
    used = torch.rand(3, n, generator=g) < 0.8
    used[:, 0] = True
    return room[:, :d], used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mapped", [1, 1 << 40])
@pytest.mark.parametrize("size", SIZES)
def test_both_copies_hold_each_number_rounded_once(dtype, mapped, size, monkeypatch):
    monkeypatch.setattr(standardised, "MAPPED", mapped)
    x, used = drawn(*size, dtype)
    features = Standardised(x, used)
    true = ((x.double() - features.centre) / features.spread).float()
    assert features.shared[:, :-1].equal(true)
    assert features.across[:-1].equal(true.T)
    assert features.shared[:, -1].eq(1).all()
    assert features.across[-1].eq(1).all()
    assert {features.shared.stride(0) % 16, features.across.stride(0) % 16} == {0}


def test_copies_are_the_same_by_several_threads(monkeypatch):
    x, used = drawn(200, 90, torch.float32)
    alone = Standardised(x, used)
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = Standardised(x, used)
    assert together.shared.equal(alone.shared)
    assert together.across.equal(alone.across)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None)  # the first call compiles
@given(n=st.integers(2, 90), d=st.integers(1, 90), c=st.integers(1, 3), seed=st.integers(0, 99))
def test_products_are_those_of_what_a_problem_standardises(dtype, n, d, c, seed):
    x, used = drawn(n, d, torch.float64, seed)
    g = torch.Generator().manual_seed(seed)
    weights, residual = torch.randn(3, c, d + 1, generator=g).to(dtype), torch.randn(3, c, n, generator=g).to(dtype)
    features = Standardised(x, used)
    view = features.view(torch.arange(3), dtype)
    mean, deviation = standard(x, used)
    ones = torch.ones(n, 1, dtype=torch.float64)
    for i in range(3):
        z = torch.cat([(x - mean[i]) / deviation[i], ones], 1)
        # A problem's own mean is taken off after the product. Sums of k products err by at most k roundings of the
        # terms' sizes (Higham 2002, eq. 3.5), a few more are of the terms themselves, and raw numbers are float64.
        far, scale = (part[features.group[i]] for part in (features.mean, features.scale))
        terms = (((x - features.centre) / features.spread).abs() + far.abs()) / scale * torch.finfo(dtype).eps
        terms += x.abs().maximum(mean[i].abs()) / deviation[i] * torch.finfo(torch.float64).eps
        bound = (max(n, d) + 6) * torch.cat([terms, torch.finfo(dtype).eps * ones], 1)
        ahead, back = weights[i].double(), residual[i].double()
        assert bool(((view.logits(weights)[i] - ahead @ z.T).abs() <= ahead.abs() @ bound.T).all())
        assert bool(((view.pull(residual)[i] - back @ z).abs() <= back.abs() @ bound).all())
