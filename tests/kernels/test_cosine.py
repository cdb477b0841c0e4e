"""Paired cosines against the float64 definition, PyTorch and scikit-learn: raw, centred and standardised."""

import inspect

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.preprocessing import StandardScaler

from gapprobe.kernels import compiled, cosine

# Products are added up in another order than torch's; beyond that, one rounding.
ORDER, ROUNDING = 4.0, 2.0**-23
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(n, d, dtype, seed=0, massive=0.0):
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, n, d, generator=g) + torch.randn(d, generator=g)
    if massive:
        left[:, d // 2] += massive
        right[:, d // 2] += massive
    left, right = left.to(dtype), right.to(dtype)
    both = torch.cat([left, right]).double()
    return left, right, both.mean(0), both.std(0, correction=0)


def plain(left, right, mean=None, std=None):
    """Compute what anybody would write with torch in float32."""
    a, b = left.float(), right.float()
    if mean is not None:
        a, b = a - mean.float(), b - mean.float()
    if std is not None:
        a, b = a * cosine.inverse(std).float(), b * cosine.inverse(std).float()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def compared(found, left, right, mean, std, like=()):
    """Few rows may be lucky in float32: what it errs by is then that of more rows `like` them, too."""
    samples = [(left, right, mean, std), *like]
    for i, ours in enumerate(vars(found).values()):
        if ours is None:  # not asked for
            continue
        truth = cosine.reference(left, right, *(mean, std)[:i])
        errors = [plain(*each[: 2 + i]) - cosine.reference(*each[: 2 + i]) for each in samples]
        allowed = ORDER * torch.cat(errors).abs().nan_to_num(0.0).amax() + ROUNDING
        assert ours.isnan().equal(truth.isnan())
        assert ((ours - truth).abs().nan_to_num(0.0) <= allowed).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 70),
    d=st.sampled_from([1, 2, 3, 64, 129, 511, 513, 1027, 1536]),
    dtype=st.sampled_from(DTYPES),
    massive=st.sampled_from([0.0, 1e3, 3e4]),
)
def test_no_cosine_errs_more_than_plain_torch_does(seed, n, d, dtype, massive):
    left, right, mean, std = numbers(n, d, dtype, seed, massive)
    for asked in ((), (mean,), (mean, std)):
        found = cosine.paired(left, right, *asked)
        assert sum(each is not None for each in vars(found).values()) == 1 + len(asked)
        compared(found, left, right, mean, std, [numbers(70, d, dtype, seed, massive)])


def test_the_definition_is_that_of_torch_and_of_scikit_learn():
    left, right, mean, std = numbers(50, 33, torch.float64)
    torch.testing.assert_close(cosine.reference(left, right), torch.cosine_similarity(left, right))
    both = np.concatenate([left, right])
    for scaler, setting in ((StandardScaler(with_std=False), (mean,)), (StandardScaler(), (mean, std))):
        a, b = np.split(scaler.fit_transform(both), 2)
        np.testing.assert_allclose(cosine.reference(left, right, *setting), 1 - paired_cosine_distances(a, b))


def test_unlike_digits_have_a_high_raw_cosine_and_none_once_the_mean_is_off():
    digits = load_digits()
    x = torch.from_numpy(digits.data[np.argsort(digits.target, kind="stable")]).half()
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    assert (std == 0).any()  # pixels at the margin never vary
    like, unlike = (cosine.paired(x, x.roll(places, 0), mean, std) for places in (1, 900))
    compared(like, x, x.roll(1, 0), mean, std)
    assert unlike.raw.mean() > 0.5
    for variant in ("centred", "standardised"):
        assert getattr(unlike, variant).mean() < 0.1
        assert getattr(like, variant).mean() > 0.5


def test_a_huge_shared_dimension_inflates_the_raw_cosine_only():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 200, 64, generator=g)
    left[:, 5] += 1000
    right[:, 5] += 1000
    both = torch.cat([left, right]).double()
    found = cosine.paired(left, right, both.mean(0), both.std(0))
    assert found.raw.min() > 0.999
    assert found.centred.abs().mean() < 0.2
    assert found.standardised.abs().mean() < 0.2
    assert cosine.paired(left, right).centred is None


def test_a_dimension_that_varies_most_rules_the_centred_cosine_and_not_the_standardised():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 500, 64, generator=g)
    left[:, 5] = right[:, 5] = 100 * torch.randn(500, generator=g)
    both = torch.cat([left, right]).double()
    found = cosine.paired(left, right, both.mean(0), both.std(0))
    assert found.centred.median() > 0.9
    assert found.standardised.median() < 0.2


def test_centring_nearly_equal_rows_keeps_the_digits_that_differ():
    g = torch.Generator().manual_seed(3)
    row = torch.randn(40, generator=g) * 100
    left, right = row + 1e-3 * torch.randn(2, 300, 40, generator=g)
    mean = torch.cat([left, right]).double().mean(0)
    truth = cosine.reference(left, right, mean)
    off = (cosine.paired(left, right, mean).centred - truth).abs().max()
    # A mean rounded to float32 is off by up to 4e-6 where rows differ by 1e-3; in two parts nothing of that is left.
    assert (plain(left, right, mean) - truth).abs().max() > 1e-5
    assert off <= ORDER * ROUNDING


def test_rows_that_are_only_rounding_have_no_direction():
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(1)) * 7
    same = row.expand(1000, -1)
    mean, std = same.double().mean(0), same.double().std(0, correction=0)
    found = cosine.paired(same, same, mean, std)
    assert found.raw.allclose(torch.ones(1000, dtype=torch.float64))
    assert found.centred.isnan().all()
    assert found.standardised.isnan().all()
    assert cosine.paired(torch.zeros(2, 3), torch.ones(2, 3)).raw.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_is_nan_and_leaves_others_alone(bad):
    left, right, mean, std = numbers(20, 70, torch.bfloat16)
    clean = cosine.paired(left, right, mean, std)
    left[7, 3] = bad
    found = cosine.paired(left, right, mean, std)
    others = [i for i in range(20) if i != 7]
    for mine, theirs in zip(vars(found).values(), vars(clean).values(), strict=True):
        assert mine[7].isnan()
        assert mine[others].equal(theirs[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_no_length_is_too_large_or_too_small(dtype, scale):
    left, right = ((x.double() * scale).to(dtype) for x in numbers(9, 40, dtype)[:2])
    both = torch.cat([left, right]).double()
    compared_to = both.mean(0), both.std(0)
    found = cosine.paired(left, right, *compared_to)
    for ours, setting in zip(vars(found).values(), ((), compared_to[:1], compared_to), strict=True):
        truth = cosine.reference(left, right, *setting)
        assert not truth.isnan().any()
        torch.testing.assert_close(ours, truth, rtol=0, atol=ORDER * ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_and_strides_do_not_show(monkeypatch, dtype):
    left, right, mean, std = numbers(50, 600, dtype)
    whole = cosine.paired(left, right, mean, std)
    apart = [torch.full((50, 700), torch.nan, dtype=dtype)[:, 50:650].copy_(x) for x in (left, right)]
    turned = [x.T.contiguous().T for x in (left, right)]
    monkeypatch.setattr(cosine, "PIECE", 7 * 600)
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for sides in ((left, right), apart, turned, (apart[0], turned[1])):
        again = cosine.paired(*sides, mean, std)
        for mine, theirs in zip(vars(again).values(), vars(whole).values(), strict=True):
            assert mine.equal(theirs)
    first = cosine.paired(left[:1].expand(50, -1), right, mean, std)
    assert first.raw.equal(cosine.paired(left[:1].repeat(50, 1), right, mean, std).raw)


def test_where_nothing_can_be_kept_a_loop_is_compiled_all_the_same():
    made = {}
    exec("def twice(x): return 2 * x", made)  # of no file: numba has nowhere to keep it
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(made["twice"])
    assert compiled.exact(made["twice"])(21) == 42


@pytest.mark.parametrize("other", [torch.float64, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sides_may_differ_in_dtype(dtype, other):
    left, right, mean, std = numbers(20, 77, dtype)
    mixed, alike = cosine.paired(left, right.to(other), mean, std), cosine.paired(left, right, mean, std)
    if other != dtype and other.itemsize == 2:
        alike = cosine.paired(left.float(), right.to(other).float(), mean, std)
    for mine, theirs in zip(vars(mixed).values(), vars(alike).values(), strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("massive", [0.0, 1e3])
def test_the_mean_over_all_other_pairs_is_that_of_every_cosine_by_itself(monkeypatch, dtype, massive):
    left, right, mean, std = numbers(30, 20, dtype, massive=massive)
    left[4], right[9, 2], right[11], left[12] = 0.0, torch.nan, mean, mean + torch.inf
    monkeypatch.setattr(cosine, "PIECE", 7 * 20)
    levels = cosine.apart(left, right, mean, std)
    for level, setting in zip(levels, ((), (mean,), (mean, std)), strict=True):
        each = torch.stack([cosine.reference(row.expand(30, -1), right, *setting) for row in left])
        each.fill_diagonal_(torch.nan)
        for found in (level, cosine.apart(left, right, *setting)[-1]):
            assert float(found) == pytest.approx(float(each.nanmean()), abs=1e-12)
    wide = left.double()
    cosine.apart(wide, wide, mean, std)
    assert wide.nan_to_num().equal(left.double().nan_to_num())  # nothing is written to what is given
    one = left[:1]
    assert cosine.apart(one, one, mean, std).isnan().all()


def test_nothing_is_compared_with_nothing():
    assert cosine.paired(torch.ones(0, 5), torch.ones(0, 5)).raw.shape == (0,)


def test_unequal_sides_are_refused():
    unchecked = inspect.unwrap(cosine.paired)  # the shape checks that run in tests would refuse them first
    with pytest.raises(ValueError, match="equal shapes"):
        unchecked(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="mean is 4 wide"):
        unchecked(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="std is 4 wide"):
        unchecked(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="about a mean"):
        unchecked(torch.ones(2, 3), torch.ones(2, 3), None, torch.ones(3))
