"""Coverage and risk at one threshold, and intervals from replicates."""

import math

import numpy as np
import pytest

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.selective import selective


def ones(n, b=5):
    return np.ones((b, n))


def test_coverage_is_the_share_answered_and_risk_the_share_wrong_among_them():
    """The published code also holds a coverage turned round: there, answering everything covers nothing."""
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])
    correct = np.array([True, True, False, True, False, False])
    result = selective(confidence, correct, ones(6))
    assert result.coverage.value == pytest.approx(5 / 6)
    assert result.risk.value == pytest.approx(2 / 5)
    assert result.risk.n == 5
    everything = selective(np.ones(6), correct, ones(6))
    assert everything.coverage.value == 1
    assert everything.risk.value == 0.5
    nothing = selective(np.zeros(6), correct, ones(6))
    assert nothing.coverage.value == 0
    assert math.isnan(nothing.risk.value)


def test_intervals_come_from_the_replicates():
    rng = np.random.default_rng(2)
    correct = rng.random(400) < 0.3
    confidence = rng.random(400)
    weights = stats.crossed_weights(np.arange(400) % 40, np.arange(400) // 4, replicates=300, seed=0)
    result = selective(confidence, correct, weights)
    for part in (result.coverage, result.risk, result.aurc, result.e_aurc):
        assert part.low < part.value < part.high


def test_nan_is_refused_by_row():
    with pytest.raises(DataError, match="row 2 has no confidence"):
        selective(np.array([0.1, 0.2, np.nan]), np.ones(3, dtype=bool), ones(3))
