"""Measures by hand, by brute force, against the formulas of lm-polygraph and fd-shifts, and under symmetries."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.selective import (
    augrc,
    aurc,
    best_threshold,
    coverage_at_risk,
    e_aurc,
    ideal_aurc,
    rejection_ratio,
    reliabilities,
    risk_at_coverage,
    risk_coverage,
    tally,
    trapezoid_aurc,
)

# Sums of n terms of size 1 in float64, each rounded once.
ROUNDING = 1e-12


def rows(seed, n, decimals):
    rng = np.random.default_rng(seed)
    correct = rng.random(n) < 0.6
    return np.round(rng.random(n) + 0.3 * correct, decimals), correct


def everything(counts):
    """Every measure of a tally, by name."""
    return {
        "aurc": aurc(counts),
        "e_aurc": e_aurc(counts),
        "augrc": augrc(counts),
        "prr": rejection_ratio(counts),
        "prr_0.5": rejection_ratio(counts, 0.5),
        "risk@0.5": risk_at_coverage(counts, np.array([0.5]))[0],
        "coverage@0.2": coverage_at_risk(counts, 0.2),
    }


def test_by_hand():
    """Risks 0, 0, 1/3, 1/4, 2/5 on five rows; all numbers by pencil."""
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    correct = np.array([True, True, False, True, False])
    counts = tally(confidence, correct)
    risks = [Fraction(0), Fraction(0), Fraction(1, 3), Fraction(1, 4), Fraction(2, 5)]
    area = sum(risks) / 5
    assert aurc(counts)[0] == pytest.approx(float(area), abs=ROUNDING)
    assert e_aurc(counts)[0] == pytest.approx(float(area) - (0.4 + 0.6 * math.log(0.6)), abs=ROUNDING)
    # Trapezoids below the wrong counts 0, 0, 1, 1, 2 out of 5: (0 + 0 + 1/2 + 1 + 3/2) / 25.
    assert augrc(counts)[0] == pytest.approx(3 / 25, abs=ROUNDING)
    ideal = (Fraction(1, 4) + Fraction(2, 5)) / 5
    assert rejection_ratio(counts)[0] == pytest.approx(float((Fraction(2, 5) - area) / (Fraction(2, 5) - ideal)))
    # Two of five rows may be rejected: k = 4, 5. Ideal risks there are 1/4 and 2/5, as here.
    assert rejection_ratio(counts, 0.4)[0] == pytest.approx(1)
    at = risk_at_coverage(counts, np.array([0.2, 0.4, 0.41, 0.6, 0.8, 1.0]))[:, 0]
    np.testing.assert_allclose(at, [0, 0, 1 / 3, 1 / 3, 1 / 4, 2 / 5])
    assert [coverage_at_risk(counts, r)[0] for r in (0.0, 0.25, 0.3, 0.4)] == [0.4, 0.8, 0.8, 1.0]
    worst_first = tally(-confidence, correct)
    assert coverage_at_risk(worst_first, 0.3)[0] == 0
    assert [reliabilities(confidence, correct, c, 0.6).sum() for c in (1.0, 10.0)] == [2, -7]
    assert best_threshold(confidence, correct, 1.0) == 0.6  # 2 from two rows and from four: the lower threshold
    assert best_threshold(confidence, correct, 2.0) == 0.8
    assert best_threshold(confidence, ~correct, 10.0) == math.inf


def by_threshold(confidence, correct, weights):
    """AURC as it is defined, one row at a time."""
    total = 0.0
    for own, weight in zip(confidence, weights, strict=True):
        answered = confidence >= own
        if weight:
            total += weight * (weights * answered * ~correct).sum() / (weights * answered).sum()
    return total / weights.sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 40), decimals=st.sampled_from([0, 1, 8]))
def test_the_area_is_its_definition_under_any_weights(seed, n, decimals):
    confidence, correct = rows(seed, n, decimals)
    weights = np.random.default_rng(seed).integers(0, 3, (3, n)).astype(float)
    weights[:, 0] = 1
    got = aurc(tally(confidence, correct, weights))
    expected = [by_threshold(confidence, correct, w) for w in weights]
    np.testing.assert_allclose(got, expected, rtol=ROUNDING, atol=ROUNDING)
    curve = risk_coverage(confidence, correct)
    assert (np.diff(curve.threshold) < 0).all()
    assert curve.coverage[-1] == 1
    for threshold, coverage, risk in zip(curve.threshold, curve.coverage, curve.risk, strict=True):
        assert coverage == pytest.approx((confidence >= threshold).mean())
        assert risk == pytest.approx((~correct[confidence >= threshold]).mean())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 40), decimals=st.sampled_from([0, 1, 8]))
def test_a_weight_is_so_many_copies(seed, n, decimals):
    """All measures but those of thresholds under ties see a weight as copies; those see copies as ties, alike."""
    confidence, correct = rows(seed, n, decimals)
    counts = np.random.default_rng(seed).integers(0, 4, n)
    counts[0] += 1
    weighted = everything(tally(confidence, correct, counts[None].astype(float)))
    copied = everything(tally(np.repeat(confidence, counts), np.repeat(correct, counts)))
    for name, value in weighted.items():
        np.testing.assert_allclose(value, copied[name], rtol=1e-9, atol=1e-9, err_msg=name)


def polygraph(uncertainty, quality, max_rejection, chance):
    """Prediction-rejection ratio by lm-polygraph's formula: means of the best k, k over the last places of n."""

    def area(score):
        n = len(score)
        rejected = int(max_rejection * n)
        means = np.cumsum(quality[np.argsort(score)]) / np.arange(1, n + 1)
        return means[n - rejected :].mean()

    return (area(uncertainty) - chance) / (area(-quality) - chance)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(8, 60), share=st.sampled_from([1.0, 0.5, 0.3]))
def test_prr_is_lm_polygraphs_where_no_rows_tie(seed, n, share):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.permutation(n) / n, rng.random(n) < 0.5
    correct[:2] = [True, False]
    got = rejection_ratio(tally(confidence, correct), share)[0]
    quality = correct.astype(float)
    # Its chance level is a mean over shuffles, whose expectation is the accuracy.
    expected = polygraph(-confidence, quality, share, quality.mean())
    # Sums of n terms, off by 1e-12 at most, over the gain of an ideal confidence, which is 1 / n^2 at least.
    assert got == pytest.approx(expected, rel=1e-12 * n**2, abs=1e-12 * n**2)


def test_the_chance_level_of_shuffles_is_the_accuracy():
    rng = np.random.default_rng(0)
    correct = (rng.random(50) < 0.7).astype(float)
    shuffled = np.array([(np.cumsum(rng.permutation(correct)) / np.arange(1, 51)).mean() for _ in range(4000)])
    assert abs(shuffled.mean() - correct.mean()) < 4 * shuffled.std() / math.sqrt(4000)


@pytest.mark.parametrize("confidence", [[3, 2, 2, 2, 1], [1, 1, 1, 1, 1], [2, 2, 1, 1, 1], [2, 2, 2, 1, 1]])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.4])
def test_ties_are_the_mean_over_their_orders(confidence, share):
    """PRR and AUGRC: every order of the tied rows, all equally likely, by enumeration."""
    confidence, correct = np.array(confidence, dtype=float), np.array([True, False, True, False, True])
    ratios, areas = [], []
    for order in permutations(range(5)):
        parted = confidence - 0.01 * np.array(order)
        counts = tally(parted, correct)
        ratios.append(rejection_ratio(counts, share)[0])
        areas.append(augrc(counts)[0])
    assert rejection_ratio(tally(confidence, correct), share)[0] == pytest.approx(np.mean(ratios), abs=1e-9)
    assert augrc(tally(confidence, correct))[0] == pytest.approx(np.mean(areas), abs=ROUNDING)


def shifts(confidence, correct):
    """fd-shifts' AURC and AUGRC, unscaled: trapezoids over coverage from 1 to 0, a point where confidence changes."""
    order = np.argsort(confidence)
    wrong, sorted_ = (~correct)[order], confidence[order]
    n, left = len(order), int(wrong.sum())
    coverage, selective, general = [1.0], [left / n], [left / n]
    for i in range(n - 1):
        left -= int(wrong[i])
        if sorted_[i] != sorted_[i + 1]:
            coverage.append((n - 1 - i) / n)
            selective.append(left / (n - 1 - i))
            general.append(left / n)
    steps = -np.diff([*coverage, 0.0])
    selective, general = np.array([*selective, selective[-1]]), np.array([*general, 0.0])
    return ((selective[1:] + selective[:-1]) / 2) @ steps, ((general[1:] + general[:-1]) / 2) @ steps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), decimals=st.sampled_from([0, 1, 8]))
def test_areas_are_those_of_fd_shifts(seed, n, decimals):
    confidence, correct = rows(seed, n, decimals)
    selective, general = shifts(confidence, correct)
    curve, counts = risk_coverage(confidence, correct), tally(confidence, correct)
    assert trapezoid_aurc(curve) == pytest.approx(selective, abs=ROUNDING)
    assert augrc(counts)[0] == pytest.approx(general, abs=ROUNDING)
    if len(curve.risk) == n:
        assert aurc(counts)[0] - selective == pytest.approx((curve.risk[-1] - curve.risk[0]) / (2 * n), abs=ROUNDING)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(4, 60), decimals=st.sampled_from([0, 1, 8]))
def test_augrc_is_what_the_area_under_the_roc_curve_says(seed, n, decimals):
    confidence, correct = rows(seed, n, decimals)
    correct[:2] = [True, False]
    accuracy = correct.mean()
    expected = (1 - stats.auc(confidence, correct)) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(tally(confidence, correct))[0] == pytest.approx(expected, abs=ROUNDING)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 40), decimals=st.sampled_from([0, 1, 8]))
def test_neither_order_nor_scale_changes_a_measure(seed, n, decimals):
    confidence, correct = rows(seed, n, decimals)
    before = everything(tally(confidence, correct))
    order = np.random.default_rng(seed).permutation(n)
    for again in (tally(confidence[order], correct[order]), tally(7 * confidence - 3, correct)):
        for name, value in everything(again).items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_ideal_constant_and_inverse_confidences():
    correct = np.arange(4000) < 2800
    ideal, constant, inverse = (
        everything(tally(c, correct)) for c in (-np.arange(4000.0), np.full(4000, 0.7), np.arange(4000.0))
    )
    # The published ideal area is the limit of many rows: off by a sum against its integral, at most 1/n here.
    assert 0 <= ideal["e_aurc"][0] < 1 / 4000
    assert ideal["prr"][0] == pytest.approx(1, abs=1e-9)
    assert ideal["prr_0.5"][0] == pytest.approx(1, abs=1e-9)
    assert ideal["augrc"][0] == pytest.approx(0.3**2 / 2)
    assert ideal["coverage@0.2"][0] == 3500 / 4000  # 2,800 right and 700 wrong
    assert constant["aurc"][0] == pytest.approx(0.3)
    assert constant["prr"][0] == pytest.approx(0, abs=1e-9)
    assert constant["augrc"][0] == pytest.approx(0.15)
    assert constant["coverage@0.2"][0] == 0
    for name in ("prr", "prr_0.5"):
        assert inverse[name][0] < -0.5
    assert inverse["aurc"][0] > constant["aurc"][0]
    np.testing.assert_allclose(ideal_aurc(np.array([0.0, 1.0, 0.3])), [0, 1, 0.3 + 0.7 * math.log(0.7)])


def test_an_ideal_confidence_is_ideal_in_every_replicate():
    """Copies of one row tie; were they answered together here, no interval of a perfect confidence would reach 1."""
    correct = np.arange(60) < 40
    weights = stats.crossed_weights(np.arange(60), np.zeros(60), replicates=50, seed=0)
    ratios = rejection_ratio(tally(-np.arange(60.0), correct, weights))
    np.testing.assert_allclose(ratios, 1, atol=1e-9)


def test_shares_that_are_reached_exactly_count():
    """7 of 10 rows cover 0.7, and 3 of 10 wrong are a risk of 0.3, whatever 0.7 and 0.3 are in binary."""
    for n in (10, 100, 1000):
        confidence, correct = -np.arange(float(n)), np.arange(n) % 10 < 7
        counts = tally(confidence, correct)
        shares = np.arange(1, n + 1) / n
        at = risk_at_coverage(counts, shares)[:, 0]
        np.testing.assert_array_equal(at, np.cumsum(~correct) / np.arange(1, n + 1))
        assert coverage_at_risk(counts, 0.3)[0] == 1


def test_all_right_all_wrong_and_no_rows():
    for right in (True, False):
        found = everything(tally(np.arange(5.0), np.full(5, right)))
        assert found["aurc"][0] == found["risk@0.5"][0] == (not right)
        assert math.isnan(found["prr"][0])
    nothing = everything(tally(np.zeros(0), np.zeros(0, dtype=bool)))
    assert all(math.isnan(value[0]) for value in nothing.values())
    assert math.isnan(trapezoid_aurc(risk_coverage(np.zeros(0), np.zeros(0, dtype=bool))))
    unused = everything(tally(np.arange(3.0), np.ones(3, dtype=bool), np.zeros((1, 3))))
    assert all(math.isnan(value[0]) for value in unused.values())


def test_thinning_keeps_the_end():
    rng = np.random.default_rng(0)
    curve = risk_coverage(rng.random(999), rng.random(999) < 0.5)
    thin = curve.thinned(200)
    assert len(thin.coverage) == 200
    assert thin.coverage[-1] == 1
    assert len(curve.thinned(5000).risk) == 999


def test_refusals():
    confidence, correct = np.array([0.1, np.nan, 0.3, np.nan]), np.ones(4, dtype=bool)
    for measured in (tally, risk_coverage):
        with pytest.raises(DataError, match=r"row 1 has no confidence: it is NaN \(2 of 4 rows\)"):
            measured(confidence, correct)
    counts = tally(np.arange(4.0), correct)
    with pytest.raises(ConfigError, match=r"coverage is 0.0"):
        risk_at_coverage(counts, np.array([0.5, 0.0]))
    with pytest.raises(ConfigError, match="risk is 1.5"):
        coverage_at_risk(counts, 1.5)
    with pytest.raises(ConfigError, match="max_rejection is 2"):
        rejection_ratio(counts, 2.0)
