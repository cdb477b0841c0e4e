"""The report: its numbers are the measures', its intervals cover, its differences are paired."""

import numpy as np
import pandas as pd
import pytest

import gapprobe as gp
from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.selective import (
    augrc,
    aurc,
    calibration_error,
    coverage_at_risk,
    e_aurc,
    rejection_ratio,
    risk_at_coverage,
    tally,
)


def drawn(seed, n=300):
    """Rows of 30 questions and 10 images: a good probability, a poor score that is none, and answers."""
    rng = np.random.default_rng(seed)
    question, image = np.arange(n) % 30, np.arange(n) // 30
    chance = np.clip(0.6 + 0.25 * rng.normal(size=30)[question] + 0.2 * rng.normal(size=n), 0.01, 0.99)
    correct = rng.random(n) < chance
    return {"good": chance, "poor": 3 * chance + 2 * rng.normal(size=n)}, correct, (question, image)


@pytest.fixture(scope="module")
def made():
    confidences, correct, clusters = drawn(0)
    return gp.selective_report(confidences, correct, clusters=clusters, replicates=300, seed=1)


def test_the_table_holds_the_measures_and_their_bootstrap(made):
    confidences, correct, clusters = drawn(0)
    weights = stats.crossed_weights(*clusters, replicates=300, seed=1)
    for method, confidence in confidences.items():

        def of(w, confidence=confidence):
            counts = tally(confidence, correct, w)
            return {
                "risk": stats.weighted_mean((~correct).astype(float), w),
                "auroc": stats.weighted_auc(confidence, correct, w),
                "aurc": aurc(counts),
                "e_aurc": e_aurc(counts),
                "augrc": augrc(counts),
                "prr": rejection_ratio(counts),
                "risk@0.8": risk_at_coverage(counts, np.array([0.8]))[0],
                "coverage@0.2": coverage_at_risk(counts, 0.2),
            }

        value, again = of(np.ones((1, 300))), of(weights)
        own = made.table[made.table["method"] == method].set_index("measure")
        for measure in value:
            expected = stats.from_replicates(float(value[measure][0]), again[measure], 300)
            got = own.loc[measure, ["value", "ci_low", "ci_high"]]
            np.testing.assert_allclose(got.astype(float), [expected.value, expected.low, expected.high], atol=1e-12)
    good, poor = (made.table[made.table["method"] == m].set_index("measure") for m in confidences)
    assert good.loc["ece", "value"] == pytest.approx(
        calibration_error(confidences["good"], correct, np.ones((1, 300)))[0]
    )
    assert np.isnan(poor.loc["ece", "value"])
    assert set(made.reliability["method"]) == {"good"}
    assert made.reliability["n"].sum() == 300


def test_differences_are_paired(made):
    """The interval of a difference on shared replicates is narrower than of two that know nothing of each other."""
    area = made.differences.set_index("measure").loc["aurc"]
    table = made.table.pivot(index="measure", columns="method", values=["value", "ci_low", "ci_high"])
    assert area["difference"] == pytest.approx(
        table.loc["aurc", ("value", "good")] - table.loc["aurc", ("value", "poor")]
    )
    widths = [table.loc["aurc", ("ci_high", m)] - table.loc["aurc", ("ci_low", m)] for m in ("good", "poor")]
    assert area["ci_high"] - area["ci_low"] < np.hypot(*widths)
    assert area["ci_high"] < 0
    confidences, correct, clusters = drawn(0)
    twice = gp.selective_report(
        {"a": confidences["good"], "b": 5 * confidences["good"]}, correct, clusters=clusters, replicates=50
    )
    rest = twice.differences[twice.differences["measure"] != "ece"]
    np.testing.assert_array_equal(rest[["difference", "ci_low", "ci_high"]], 0)


def test_chunks_of_replicates_change_nothing(made, monkeypatch):
    from gapprobe.selective import report

    confidences, correct, clusters = drawn(0)
    monkeypatch.setattr(report, "CELLS", 300 * 7)
    again = gp.selective_report(confidences, correct, clusters=clusters, replicates=300, seed=1)
    pd.testing.assert_frame_equal(again.table, made.table, check_exact=False, rtol=1e-12)
    pd.testing.assert_frame_equal(again.curves, made.curves, check_exact=False, rtol=1e-12)


def test_the_threshold_of_phi_has_not_seen_the_row():
    """A useless confidence of half-right answers: any gain comes from looking; on other folds there is none."""
    gains = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = gp.selective_report({"noise": rng.random(60)}, rng.random(60) < 0.5, replicates=2, seed=seed)
        gains.append(found.table.set_index("measure").loc["phi_1", "value"])
    # A row's part is 1, -1 or 0, and 0 on average: four deviations of the mean over 40 sets of 60 rows.
    assert abs(np.mean(gains)) < 4 / np.sqrt(40 * 60)


def test_phi_of_a_sure_and_right_confidence_is_the_accuracy():
    correct = np.arange(200) % 4 > 0
    found = gp.selective_report({"oracle": correct.astype(float)}, correct, replicates=20)
    table = found.table.set_index("measure")["value"]
    for cost in (1, 10, 100):
        assert table[f"phi_{cost}"] == 0.75
    assert (table["prr"], table["auroc"], table["ece"]) == (pytest.approx(1), 1, 0)


def test_intervals_cover_the_true_area():
    """The area of a population, known from two hundred thousand rows, lies in about 95 of 100 intervals."""

    def rows(seed, n):
        rng = np.random.default_rng(seed)
        confidence = rng.random(n)
        return confidence, rng.random(n) < confidence

    confidence, correct = rows(10**6, 200_000)
    truth = aurc(tally(confidence, correct))[0]
    inside = 0
    for seed in range(100):
        confidence, correct = rows(seed, 200)
        weights = stats.crossed_weights(np.arange(200), np.zeros(200), replicates=200, seed=seed)
        e = stats.estimate(lambda w, c=confidence, r=correct: aurc(tally(c, r, w)), weights)
        inside += e.low <= truth <= e.high
    # Percentile intervals of 200 rows: 95 % but for a binomial's 0.1 % quantile, and 2 points for the few rows.
    assert inside >= 85


def test_series_are_taken_and_seeds_decide():
    confidences, correct, clusters = drawn(0)
    series = {name: pd.Series(values) for name, values in confidences.items()}
    kinds = tuple(pd.Series(c) for c in clusters)
    one = gp.selective_report(series, pd.Series(correct), clusters=kinds, replicates=50, seed=3)
    two = gp.selective_report(confidences, correct, clusters=clusters, replicates=50, seed=3)
    pd.testing.assert_frame_equal(one.table, two.table)
    other = gp.selective_report(confidences, correct, clusters=clusters, replicates=50, seed=4)
    assert (other.table["ci_low"] != two.table["ci_low"]).any()


def test_the_figure_shows_every_method(made):
    figure = made.plot()
    names = {trace.name for trace in figure.data if trace.name}
    assert names == {"good", "poor"}
    lines = [t for t in figure.data if t.name == "good" and t.xaxis == "x"]
    np.testing.assert_array_equal(lines[0].y, made.curves.query("method == 'good'")["risk"])
    assert any(t.xaxis == "x2" and t.name == "good" for t in figure.data)
    assert not any(t.xaxis == "x2" and t.name == "poor" for t in figure.data)
    confidences, correct, _ = drawn(0)
    alone = gp.selective_report({"<poor>": confidences["poor"]}, correct, replicates=10)
    assert len(alone.reliability) == 0
    assert {t.name for t in alone.plot().data if t.name} == {"&lt;poor&gt;"}


def test_refusals():
    confidences, correct, clusters = drawn(0)
    bad = confidences["good"].copy()
    bad[7] = np.nan
    with pytest.raises(DataError, match="row 7 has no confidence 'bad'"):
        gp.selective_report({"bad": bad}, correct)
    with pytest.raises(DataError, match="'short' has shape"):
        gp.selective_report({"short": np.zeros(3)}, correct)
    with pytest.raises(DataError, match="correct is of dtype int64"):
        gp.selective_report(confidences, correct.astype(int))
    with pytest.raises(DataError, match="nothing to measure"):
        gp.selective_report({}, correct)
    with pytest.raises(DataError, match="clusters of 3 and 300"):
        gp.selective_report(confidences, correct, clusters=(np.zeros(3), clusters[0]))
    with pytest.raises(DataError, match="all rows are of one cluster"):
        gp.selective_report(confidences, correct, clusters=np.zeros(300))
    with pytest.raises(ConfigError, match="folds is 1"):
        gp.selective_report(confidences, correct, folds=1)
    with pytest.raises(ConfigError, match="replicates is 0"):
        gp.selective_report(confidences, correct, replicates=0)
    with pytest.raises(ConfigError, match=r"risk is 2"):
        gp.selective_report(confidences, correct, risks=[2.0])
