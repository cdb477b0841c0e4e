"""Paired cosines against the float64 definition and PyTorch, raw and centred."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.kernels import cosine


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 70),
    d=st.sampled_from([2, 3, 64, 129]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    centred=st.booleans(),
)
def test_cosines_are_their_definition(seed, n, d, dtype, centred):
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(n, d, generator=g).to(dtype), torch.randn(n, d, generator=g).to(dtype)
    centre = cosine.common_centre(left, right) if centred else None
    ours, truth = cosine.paired(left, right, centre), cosine.reference(left, right, centre)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-6, equal_nan=True)
    if not centred:
        expected = torch.nn.functional.cosine_similarity(left.double(), right.double())
        torch.testing.assert_close(truth, expected)


def test_a_huge_shared_dimension_inflates_the_raw_cosine_only():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 64, generator=g), torch.randn(200, 64, generator=g)
    left[:, 5] += 1000
    right[:, 5] += 1000
    assert cosine.paired(left, right).min() > 0.999
    centred = cosine.paired(left, right, cosine.common_centre(left, right))
    assert centred.abs().mean() < 0.2
    torch.testing.assert_close(
        centred.double(), cosine.reference(left, right, cosine.common_centre(left, right)), rtol=0, atol=1e-5
    )


def test_rows_that_are_only_rounding_have_no_direction():
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(1)) * 7
    same = row.expand(1000, -1)
    assert cosine.paired(same, same).allclose(torch.ones(1000))
    assert cosine.paired(same, same, cosine.common_centre(same, same)).isnan().all()
    assert cosine.paired(torch.zeros(2, 3), torch.ones(2, 3)).isnan().all()


def test_row_blocks_do_not_show(monkeypatch):
    g = torch.Generator().manual_seed(2)
    left, right = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g)
    whole = cosine.paired(left, right)
    monkeypatch.setattr(cosine, "ROW_BLOCK", 7)
    torch.testing.assert_close(cosine.paired(left, right), whole)


def test_unequal_sides_are_refused():
    unchecked = inspect.unwrap(cosine.paired)  # the shape checks that run in tests would refuse them first
    with pytest.raises(ValueError, match="equal shapes"):
        unchecked(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="the centre is 4 wide"):
        unchecked(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4))
