"""Calibration error and reliability diagrams."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.selective import calibration_error, reliability


def test_by_hand():
    """Two bins: (0.1 + 0.3) / 2 against 1/2, and (0.6 + 0.9 + 0.9) / 3 = 0.8 against 2/3."""
    probability = np.array([0.1, 0.3, 0.6, 0.9, 0.9])
    correct = np.array([True, False, True, True, False])
    ones = np.ones((1, 5))
    assert calibration_error(probability, correct, ones, bins=2)[0] == pytest.approx((2 * 0.3 + 3 * (0.8 - 2 / 3)) / 5)
    found = reliability(probability, correct, ones, bins=2)
    np.testing.assert_allclose(found["confidence"], [0.2, 0.8])
    np.testing.assert_allclose(found["accuracy"], [1 / 2, 2 / 3])
    assert list(found["n"]) == [2, 3]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 50), bins=st.integers(1, 20), of=st.sampled_from(["width", "mass"]))
def test_it_is_its_definition_whatever_the_order_of_rows(seed, n, bins, of):
    rng = np.random.default_rng(seed)
    probability, correct = np.round(rng.random(n), 2), rng.random(n) < 0.5
    got = calibration_error(probability, correct, np.ones((1, n)), bins=bins, of=of)[0]
    found = reliability(probability, correct, np.ones((1, n)), bins=bins, of=of)
    assert found["n"].sum() == n
    assert got == pytest.approx(((found["accuracy"] - found["confidence"]).abs() * found["n"]).sum() / n, abs=1e-12)
    last = found["bin_high"].max()
    for low, high, count in zip(found["bin_low"], found["bin_high"], found["n"], strict=True):
        inside = (probability >= low) & ((probability < high) | (high == last))
        assert inside.sum() == count
    order = rng.permutation(n)
    again = calibration_error(probability[order], correct[order], np.ones((1, n)), bins=bins, of=of)[0]
    assert again == pytest.approx(got, abs=1e-12)


def test_a_value_on_an_edge_lies_in_the_upper_bin():
    for bins in (3, 10, 15, 100):
        edges = np.arange(bins + 1) / bins
        found = reliability(edges, np.ones(bins + 1, dtype=bool), np.ones((1, bins + 1)), bins=bins)
        assert list(found["n"]) == [1] * (bins - 1) + [2]


def test_bins_of_equal_mass_hold_equally_many():
    probability = np.random.default_rng(0).random(1000) ** 4
    found = reliability(probability, probability > 0.2, np.ones((1, 1000)), bins=10, of="mass")
    assert list(found["n"]) == [100] * 10
    constant = reliability(np.full(5, 0.4), np.ones(5, dtype=bool), np.ones((1, 5)), of="mass")
    assert list(constant["n"]) == [5]


def test_a_calibrated_probability_tends_to_no_error_and_an_overconfident_one_does_not():
    rng = np.random.default_rng(1)
    probability = rng.random(20000)
    correct = rng.random(20000) < probability
    weights = np.ones((1, 20000))
    # 10 bins of 2,000 rows: each off by sqrt(p (1 - p) / 2000) <= 0.011 on average.
    assert calibration_error(probability, correct, weights, bins=10)[0] < 0.011
    assert calibration_error(np.sqrt(probability), correct, weights, bins=10)[0] > 0.1


def test_intervals_are_of_clusters():
    """Rows ten times over say no more: the interval of the clusters is that of the rows once."""
    rng = np.random.default_rng(2)
    probability = rng.random(300)
    correct = rng.random(300) < probability
    once = stats.crossed_weights(np.arange(300), np.zeros(300), replicates=400, seed=0)
    own = np.repeat(np.arange(300), 10)
    often = stats.crossed_weights(own, np.zeros(3000), replicates=400, seed=0)
    single = reliability(probability, correct, once, bins=5)
    tenfold = reliability(probability[own], correct[own], often, bins=5)
    np.testing.assert_allclose(tenfold[["ci_low", "ci_high"]], single[["ci_low", "ci_high"]], atol=1e-12)


def test_refusals():
    correct, ones = np.ones(3, dtype=bool), np.ones((1, 3))
    for bad in (-0.1, 1.2, np.nan):
        with pytest.raises(DataError, match="row 1 has .* which is no probability"):
            calibration_error(np.array([0.1, bad, 0.5]), correct, ones)
    with pytest.raises(ConfigError, match="bins is 0"):
        reliability(np.full(3, 0.5), correct, ones, bins=0)
