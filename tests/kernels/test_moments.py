"""Moments against their readable reference, numpy and scikit-learn's StandardScaler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from gapprobe.kernels import moments as kernel
from gapprobe.kernels.moments import class_means, means, moments, reference, standard


def drawn(seed, n, d, p, *, offset=0.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=g, dtype=torch.float64) + offset) * torch.logspace(-3, 3, d, dtype=torch.float64)
    weights = torch.rand(p, n, generator=g, dtype=torch.float64)
    weights *= torch.rand(p, n, generator=g) < 0.7
    weights[:, :2] = 1.0
    return x.to(dtype), weights


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 60),
    d=st.integers(1, 40),
    p=st.integers(1, 5),
    offset=st.sampled_from([0.0, 100.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_the_fast_path_is_the_reference(seed, n, d, p, offset, dtype):
    x, weights = drawn(seed, n, d, p, offset=offset, dtype=dtype)
    if not bool(torch.isfinite(x).all()):
        return
    ours, theirs = moments(x, weights), reference(x, weights)
    torch.testing.assert_close(ours.total, theirs.total)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-10, atol=1e-10 * float(x.double().abs().max()))
    # The difference of squares may lose up to six digits (FAR) of sixteen, and the reference rounds a mean once.
    slack = 1e-13 * theirs.mean**2
    assert ((ours.variance - theirs.variance).abs() <= 1e-8 * theirs.variance + slack).all()
    total, mean = means(x, weights)
    torch.testing.assert_close(total, theirs.total)
    torch.testing.assert_close(mean, theirs.mean, rtol=1e-10, atol=1e-10 * float(x.double().abs().max()))


def test_blocks_change_nothing(monkeypatch):
    x, weights = drawn(0, 50, 7, 3)
    whole = moments(x, weights)
    monkeypatch.setattr(kernel, "BLOCK", 20)
    torch.testing.assert_close(moments(x, weights).variance, whole.variance, rtol=1e-10, atol=0)


def test_class_means_are_those_of_each_class():
    x, weights = drawn(1, 30, 4, 2)
    y = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.5
    total, mean = class_means(x, y, weights)
    for i in range(2):
        for label in (False, True):
            own = weights[i].numpy() * (y[i].numpy() == label)
            np.testing.assert_allclose(mean[int(label), i], np.average(x.numpy(), axis=0, weights=own), rtol=1e-10)
            assert float(total[int(label), i]) == pytest.approx(own.sum())


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_deviations_are_scikit_learns_and_constants_have_none(offset):
    x, weights = drawn(3, 60, 5, 2)
    x = x + offset
    x[:, 2] = 0.1
    used = weights > 0
    mean, scale = standard(x, used)
    for i in range(2):
        theirs = StandardScaler().fit(x[used[i]].numpy())
        np.testing.assert_allclose(mean[i], theirs.mean_, rtol=1e-12)
        # Both take the variance of numbers that were rounded at the offset: eps * 1e7 of a deviation of 1e-3.
        np.testing.assert_allclose(scale[i], theirs.scale_, rtol=1e-9 if offset == 0.0 else 1e-5)
    assert (scale[:, 2] == 1.0).all()


def test_rows_of_weight_zero_leave_no_trace():
    x, weights = drawn(4, 40, 3, 2)
    weights[0, 20:] = 0.0
    spoiled = x.clone()
    spoiled[20:] = 1e9
    a, b = moments(x, weights), moments(spoiled, weights)
    torch.testing.assert_close(a.mean[0], b.mean[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(a.variance[0], b.variance[0], rtol=1e-9, atol=0)


def test_no_weight_at_all_is_nan():
    assert moments(torch.ones(3, 2), torch.zeros(1, 3)).mean.isnan().all()
