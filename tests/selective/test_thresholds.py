"""Thresholds: bounds against their definition, and the guarantee over a thousand calibration sets."""

import math

import numpy as np
import pytest
from scipy.stats import binom

import gapprobe as gp
from gapprobe.errors import ConfigError, DataError
from gapprobe.selective import risk_coverage
from gapprobe.selective.thresholds import p_values, upper_bound

SETS, N, RISK, DELTA = 1000, 400, 0.1, 0.1
# What a procedure that errs with probability DELTA exactly exceeds once in a thousand times.
ALLOWED = binom.ppf(0.999, SETS, DELTA)


class Population:
    """Rows whose confidence u is uniform, and which are wrong with probability w(u): the true risk is an integral."""

    def __init__(self, wrong, levels=None):
        grid = (np.arange(200_000) + 0.5) / 200_000
        if levels:
            grid = np.floor(grid * levels) / levels
        self.wrong, self.levels, self.grid = wrong, levels, grid
        self.tail = np.cumsum(wrong(grid)[::-1])[::-1] / np.arange(len(grid), 0, -1)

    def draw(self, seed, n=N):
        rng = np.random.default_rng(seed)
        confidence = rng.random(n)
        if self.levels:
            confidence = np.floor(confidence * self.levels) / self.levels
        return confidence, rng.random(n) >= self.wrong(confidence)

    def risk(self, threshold):
        """True risk among rows above a threshold."""
        first = np.searchsorted(self.grid, threshold, side="right")
        return self.tail[first] if first < len(self.grid) else 0.0


POPULATIONS = {
    "falling": Population(lambda u: 0.5 * (1 - u)),
    "tied": Population(lambda u: 0.5 * (1 - u), levels=10),
    "useless": Population(lambda u: np.full_like(u, 0.101)),
    "sure and wrong": Population(lambda u: np.where(u > 0.9, 0.3, np.where(u > 0.3, 0.02, 0.4))),
}


def naive(confidence, correct, risk, delta):
    """The widest threshold whose risk on the calibration rows is no more than asked for: no correction."""
    assert delta
    curve = risk_coverage(confidence, correct)
    kept = curve.threshold[curve.risk <= risk]
    return np.nextafter(kept.min(), -1) if len(kept) else math.inf


METHODS = {
    "sgr": lambda *a: gp.sgr_threshold(*a).threshold,
    "ltt": lambda *a: gp.ltt_threshold(*a).threshold,
    "ltt, fixed": lambda *a: gp.ltt_threshold(*a, thresholds=np.arange(40) / 40).threshold,
    "ltt, one start": lambda *a: gp.ltt_threshold(*a, starts=1).threshold,
    "ltt, bounds": lambda *a: gp.ltt_threshold(*a, p_value="hoeffding_bentkus").threshold,
}


def violations(population, method):
    """How many of a thousand calibration sets lead to a true risk above the target, and how often one was found."""
    chosen = np.array([method(*population.draw(seed), RISK, DELTA) for seed in range(SETS)])
    return sum(population.risk(t) > RISK for t in chosen), (chosen < math.inf).mean()


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_the_risk_is_kept_as_often_as_promised(name, method):
    failed, _ = violations(POPULATIONS[name], METHODS[method])
    assert failed <= ALLOWED


@pytest.mark.parametrize("name", ["falling", "tied"])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"ltt, one start"}))
def test_on_enough_rows_a_threshold_is_found(name, method):
    """Answering nothing keeps any promise: of 4,000 rows, on average, half of what a risk of 0.09 covers is had."""
    population = POPULATIONS[name]
    best = max((population.grid > t).mean() for t in np.arange(-1, 100) / 100 if population.risk(t) <= 0.09)
    coverages = []
    for seed in range(10):
        confidence, correct = population.draw(seed, n=4000)
        coverages.append((confidence > METHODS[method](confidence, correct, RISK, DELTA)).mean())
    assert np.mean(coverages) > best / 2


def test_without_correction_the_promise_is_broken():
    """The same simulation sees a method that trusts the calibration rows: it can fail, and does."""
    failed, _ = violations(POPULATIONS["falling"], naive)
    assert failed > 3 * ALLOWED


def test_one_start_at_the_full_level_is_not_wasteful():
    """On a population at the edge, where every threshold has a risk just above the target, errors come up to delta."""
    edge = Population(lambda u: np.full_like(u, RISK + 1e-9))
    failed, _ = violations(edge, lambda *a: gp.ltt_threshold(*a, thresholds=[0.0], starts=1).threshold)
    assert failed <= ALLOWED
    # The level that an exact test of one threshold has for a binomial, for 400 rows: its atoms cost a little.
    level = binom.cdf(binom.ppf(DELTA, N, RISK) - 1, N, RISK)
    assert failed >= binom.ppf(0.001, SETS, level)


@pytest.mark.parametrize(("wrong", "n"), [(0, 1), (0, 30), (3, 30), (29, 30), (17, 1000)])
@pytest.mark.parametrize("delta", [0.2, 0.01, 1e-4])
def test_the_bound_inverts_the_binomial_tail(wrong, n, delta):
    bound = upper_bound(wrong, n, delta)
    # The tail falls by at most n a unit of risk; the bound itself is rounded to float64.
    assert binom.cdf(wrong, n, bound) == pytest.approx(delta, abs=n * 1e-13)
    assert upper_bound(n, n, delta) == upper_bound(0, 0, delta) == 1


def test_p_values_are_their_definitions():
    wrong, n = np.array([0, 3, 10, 50, 0]), np.array([50, 50, 50, 50, 0])
    exact = p_values(wrong, n, 0.2)
    np.testing.assert_allclose(exact, [*binom.cdf(wrong[:4], 50, 0.2), 1], rtol=1e-10)
    assert exact[-1] == 1
    bounds = p_values(wrong, n, 0.2, "hoeffding_bentkus")
    kl = [math.log(1 / 0.8), 0.06 * math.log(0.06 / 0.2) + 0.94 * math.log(0.94 / 0.8)]
    for i in (0, 1):
        expected = min(math.exp(-50 * kl[i]), math.e * binom.cdf(wrong[i], 50, 0.2))
        assert bounds[i] == pytest.approx(expected, rel=1e-10)
    np.testing.assert_array_equal(bounds[2:], 1)
    assert (bounds >= exact - 1e-15).all()


def by_hand_bisection(confidence, correct, risk, delta):
    """SGR, step by step, on masks."""
    candidates = [-math.inf, *np.sort(confidence)]
    n = len(confidence)
    low, high, best = 0, n, None
    while low < high:
        middle = (low + high) // 2
        above = confidence > candidates[middle]
        wrong = int((~correct[above]).sum())
        # Inverse of the tail by halving.
        a, b = 0.0, 1.0
        for _ in range(60):
            m = (a + b) / 2
            a, b = (m, b) if binom.cdf(wrong, above.sum(), m) > delta / math.ceil(math.log2(n + 1)) else (a, m)
        if above.any() and b <= risk:
            high, best = middle, (candidates[middle], above.mean(), b)
        else:
            low = middle + 1
    return best


@pytest.mark.parametrize("name", ["falling", "tied"])
def test_sgr_is_its_steps(name):
    found = 0
    for seed in range(20):
        confidence, correct = POPULATIONS[name].draw(seed, n=333)
        got = gp.sgr_threshold(confidence, correct, 0.15, 0.1)
        expected = by_hand_bisection(confidence, correct, 0.15, 0.1)
        assert got.found == (expected is not None)
        if expected:
            found += 1
            assert (got.threshold, got.coverage) == expected[:2]
            assert got.bound == pytest.approx(expected[2], abs=1e-9)
            assert got.answers(confidence).mean() == got.coverage
            assert got.empirical_risk == (~correct[got.answers(confidence)]).mean()
            assert got.empirical_risk <= got.bound <= 0.15
    assert found > 5


def test_ltt_stops_at_the_first_that_is_not_rejected():
    """Thresholds 3, 2, 1: rejected, not, rejected. The third is not reached from one start, and is from its own."""
    confidence = np.repeat([3.5, 2.5, 1.5, 0.5], [60, 20, 200, 20])
    correct = np.ones(300, dtype=bool)
    correct[60:72] = False
    one = gp.ltt_threshold(confidence, correct, 0.1, 0.1, thresholds=[3.0, 2.0, 1.0], starts=1)
    assert (one.threshold, one.coverage, one.bound) == (3, 60 / 300, 0.1)
    more = gp.ltt_threshold(confidence, correct, 0.1, 0.1, thresholds=[3.0, 2.0, 1.0], starts=3)
    assert (more.threshold, more.coverage) == (1, 280 / 300)
    assert (
        p_values(np.array([12]), np.array([280]), 0.1)[0] < 0.1 / 3 < p_values(np.array([12]), np.array([80]), 0.1)[0]
    )


def test_all_right_answers_everything_and_all_wrong_nothing():
    confidence = np.random.default_rng(0).random(200)
    for method in (gp.sgr_threshold, gp.ltt_threshold):
        everything = method(confidence, np.ones(200, dtype=bool), 0.1)
        assert (everything.threshold, everything.coverage, everything.empirical_risk) == (-math.inf, 1, 0)
        assert everything.answers(confidence).all()
        nothing = method(confidence, np.zeros(200, dtype=bool), 0.1)
        assert not nothing.found
        assert nothing.sentence == (
            "No threshold reaches a risk of 0.1 with probability 0.95 on these 200 rows: answer nothing."
        )
        assert not nothing.answers(confidence).any()
        assert not method(confidence[:5], np.ones(5, dtype=bool), 0.1).found  # too few rows to know


@pytest.mark.parametrize("method", [gp.sgr_threshold, gp.ltt_threshold])
def test_neither_order_nor_scale_changes_what_is_answered(method):
    confidence, correct = POPULATIONS["tied"].draw(3, n=2000)
    before = method(confidence, correct, 0.15)
    assert before.found
    order = np.random.default_rng(0).permutation(2000)
    assert method(confidence[order], correct[order], 0.15) == before
    scaled = method(np.exp(confidence), correct, 0.15)
    np.testing.assert_array_equal(scaled.answers(np.exp(confidence)), before.answers(confidence))
    assert "the risk is at most" in before.sentence


def test_float32_rows_at_the_threshold_are_not_answered():
    confidence = np.round(np.random.default_rng(1).random(300), 2).astype(np.float32)
    got = gp.sgr_threshold(confidence, np.ones(300, dtype=bool) & (confidence > 0.2), 0.05)
    assert got.found
    assert got.answers(confidence).mean() == got.coverage


def test_refusals():
    confidence, correct = np.array([0.1, np.nan]), np.ones(2, dtype=bool)
    for method in (gp.sgr_threshold, gp.ltt_threshold):
        with pytest.raises(DataError, match="row 1 has no confidence"):
            method(confidence, correct, 0.1)
        with pytest.raises(ConfigError, match="risk is 0"):
            method(confidence, correct, 0.0)
        with pytest.raises(ConfigError, match="delta is 1"):
            method(confidence, correct, 0.1, 1.0)
        with pytest.raises(DataError, match="no rows"):
            method(confidence[:0], correct[:0], 0.1)
    with pytest.raises(ConfigError, match="starts is 0"):
        gp.ltt_threshold(confidence[:1], correct[:1], 0.1, starts=0)
    with pytest.raises(ConfigError, match="thresholds is empty"):
        gp.ltt_threshold(confidence[:1], correct[:1], 0.1, thresholds=[])
    with pytest.raises(DataError, match="row 0 has no threshold"):
        gp.ltt_threshold(confidence[:1], correct[:1], 0.1, thresholds=[math.nan])


def test_rows_that_come_in_clusters_are_not_that_many_rows():
    """Ten rows a question, right or wrong together: the promise is of independent rows, one of each question."""

    def rejected(rng, each):
        bad = np.repeat(rng.random(400 // each) < 0.16, each)
        correct = rng.random(400) >= np.where(bad, 0.5, 0.025)  # the true risk is 0.101
        return gp.ltt_threshold(np.ones(400), correct, RISK, DELTA, thresholds=[0.0], starts=1).found

    rngs = [np.random.default_rng(seed) for seed in range(SETS)]
    assert sum(rejected(rng, 1) for rng in rngs) <= ALLOWED
    assert sum(rejected(rng, 10) for rng in rngs) > ALLOWED
