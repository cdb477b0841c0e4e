"""Measures of a confidence on rows with known answers: curves, areas, and what a threshold costs.

Every measure of a `Tally` returns one value a replicate of the bootstrap, [b]; NaN where it does not exist. Weights
count copies of a row; equal ones, the default, are the rows as they are.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import digamma

from gapprobe.errors import ConfigError, DataError


@dataclass(frozen=True)
class RiskCoverage:
    """Risk at every coverage that some threshold reaches: one point for each distinct confidence, largest first."""

    threshold: Float[np.ndarray, " k"]
    coverage: Float[np.ndarray, " k"]
    risk: Float[np.ndarray, " k"]

    def thinned(self, points: int) -> "RiskCoverage":
        """Return at most `points` of the curve's points, evenly spread, the last one kept."""
        k = len(self.threshold)
        kept = np.unique(np.linspace(0, k - 1, min(points, k)).round().astype(int))
        return RiskCoverage(self.threshold[kept], self.coverage[kept], self.risk[kept])


@dataclass(frozen=True)
class Tally:
    """What all measures are made of: rows answered, and wrong among them, down to each distinct confidence.

    Attributes:
        answered: total weight of the rows whose confidence is at least the k-th largest distinct one.
        wrong: weight of the wrong answers among them.
    """

    answered: Float[np.ndarray, "k b"]
    wrong: Float[np.ndarray, "k b"]

    @property
    def total(self) -> Float[np.ndarray, " b"]:
        """Weight of all rows."""
        return self.answered[-1] if len(self.answered) else np.zeros(self.answered.shape[1])

    @property
    def error(self) -> Float[np.ndarray, " b"]:
        """Risk when everything is answered."""
        return _ratio(self.wrong[-1], self.total) if len(self.wrong) else np.full(self.wrong.shape[1], math.nan)


def tally(
    confidence: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"] | None = None,
) -> Tally:
    """Sort rows by confidence and count.

    Args:
        confidence: larger means more likely right; infinities are allowed.
        correct: whether each answer is right.
        weights: from `stats.crossed_weights`; every row once if left out.

    Raises:
        DataError: a confidence that is NaN, by row.
    """
    refuse_nan(confidence)
    order, ends = _order(confidence)
    by_row = (np.ones((1, len(correct))) if weights is None else weights).T[order]
    wrong = np.cumsum(by_row * ~correct[order, None], axis=0)[ends]
    return Tally(np.cumsum(by_row, axis=0)[ends], wrong)


def risk_coverage(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> RiskCoverage:
    """Return the risk-coverage curve; empty for no rows.

    phi(t) = mean of [g >= t], r(t) = sum of [g >= t, wrong] / sum of [g >= t], for confidence g and every threshold t
    among its values (Geifman & El-Yaniv 2017, arXiv 1705.08500, section 2). Ties are answered together.

    Raises:
        DataError: a confidence that is NaN, by row.
    """
    counts = tally(confidence, correct)
    answered, wrong = counts.answered[:, 0], counts.wrong[:, 0]
    order, ends = _order(confidence)
    return RiskCoverage(confidence[order][ends], answered / max(1, len(correct)), wrong / answered)


def aurc(counts: Tally) -> Float[np.ndarray, " b"]:
    """Return the area under the risk-coverage curve: the mean over rows of the risk once the row is answered.

    AURC = 1/n sum_i r(g_i) (Geifman, Uziel & El-Yaniv 2019, arXiv 1805.08206). Ties are answered together:
    no threshold parts them. `trapezoid_aurc` is the other rule in use.
    """
    entering = np.diff(counts.answered, axis=0, prepend=0.0)
    return _ratio((_risk(counts) * entering).sum(0), counts.total)


def ideal_aurc(risk: Float[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
    """Return the area of a confidence that puts every right answer before every wrong one, for many rows.

    r + (1 - r) log(1 - r) (arXiv 1805.08206).
    """
    right = 1.0 - risk
    return risk + right * np.log(right, out=np.zeros_like(right), where=right > 0)


def e_aurc(counts: Tally) -> Float[np.ndarray, " b"]:
    """Return the area above the ideal one: AURC - (r + (1 - r) log(1 - r)) (arXiv 1805.08206).

    The ideal area is its limit for many rows, as published; on few rows even an ideal confidence has an excess, of
    order 1/n.
    """
    return aurc(counts) - ideal_aurc(counts.error)


def trapezoid_aurc(curve: RiskCoverage) -> float:
    """Return the area under the curve by trapezoids, the risk below the first point being the first point's.

    This is the area of fd-shifts (Jaeger et al. 2023, arXiv 2211.15259), which prints it times 1,000. Without ties it
    differs from `aurc` by (r(g_first) - r(g_last)) / (2n).
    """
    if not len(curve.risk):
        return math.nan
    return float(np.trapezoid(np.r_[curve.risk[0], curve.risk], np.r_[0.0, curve.coverage]))


def augrc(counts: Tally) -> Float[np.ndarray, " b"]:
    """Return the area under the generalised risk-coverage curve: how often a row is answered and wrong, over coverage.

    The integral, over coverage, of P(wrong, g >= t), by trapezoids from (0, 0) (Traub et al. 2024, arXiv 2407.01032).
    It equals (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 for accuracy a (ibid.), on any number of rows. The
    trapezoid is the mean over all orders of tied rows. Between 0 and 0.5; 0.25 means half of the rows are wrong and
    the confidence says nothing.
    """
    entering = np.diff(counts.answered, axis=0, prepend=0.0)
    before = counts.wrong - np.diff(counts.wrong, axis=0, prepend=0.0)
    return _ratio((entering * (before + counts.wrong) / 2).sum(0), counts.total**2)


def rejection_ratio(counts: Tally, max_rejection: float = 1.0) -> Float[np.ndarray, " b"]:
    """Return the prediction-rejection ratio: how much of an ideal confidence's gain over chance is reached.

    PRR = (A - A_random) / (A_ideal - A_random), A the mean, over the k most confident rows for k in (n - m, n], of the
    share right among them, m = floor(max_rejection n) (Malinin & Gales 2021, arXiv 2002.07650; lm-polygraph,
    arXiv 2406.15627). 1 is ideal, 0 is chance, below 0 is worse than chance; NaN where all answers are right or all are
    wrong, or m < 2. The mean over all orders of tied rows, copies of one row in a replicate among them; A_random is the
    accuracy, which lm-polygraph estimates from 1,000 shuffles.

    Args:
        counts: from `tally`.
        max_rejection: largest share of rows that is rejected; lm-polygraph's "prr_0.5" is 0.5.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    _share("max_rejection", max_rejection)
    n, wrong = counts.total, counts.error * counts.total
    least = n - np.floor(max_rejection * n)
    own = _expected_risks(counts.answered, counts.wrong, least)
    right = n - wrong
    ideal = _expected_risks(np.stack([right, n]), np.stack([np.zeros_like(wrong), wrong]), least)
    chance = _ratio(wrong, n) * (n - least)
    # With all rows alike, or none rejected, there is nothing to gain: rounding over rounding.
    mixed = (wrong > 0) & (right > 0) & (n - least >= 2)
    return np.divide(chance - own, chance - ideal, out=np.full(len(n), math.nan), where=mixed)


def risk_at_coverage(counts: Tally, coverages: Float[np.ndarray, " g"]) -> Float[np.ndarray, "g b"]:
    """Return the risk when just enough of the most confident rows are answered to cover a share.

    r(t) for the largest t with phi(t) >= coverage (Geifman & El-Yaniv 2017). Ties are answered together, so that more
    than the share may be covered.

    Raises:
        ConfigError: a coverage outside (0, 1].
    """
    for coverage in coverages:
        _share("coverage", float(coverage))
    total = counts.total
    out = np.full((len(coverages), len(total)), math.nan)
    risk = _risk(counts)
    for replicate in np.flatnonzero(total > 0):
        # Quotients of whole numbers are rounded once, as the literal of a share is: 7 of 10 rows do cover 0.7.
        first = np.searchsorted(counts.answered[:, replicate] / total[replicate], coverages)
        out[:, replicate] = risk[first, replicate]
    return out


def coverage_at_risk(counts: Tally, risk: float) -> Float[np.ndarray, " b"]:
    """Return the largest coverage at which the risk is no more than asked for; 0 where no threshold reaches it.

    C@R = max over t with r(t) <= R of phi(t) (Whitehead et al. 2022, arXiv 2204.13631). Ties are answered
    together. The threshold is chosen on the very rows: for one that holds on new rows see `sgr_threshold`.

    Raises:
        ConfigError: a risk outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ConfigError(f"risk is {risk}; it is a share between 0 and 1")
    allowed = (counts.answered > 0) & (_risk(counts) <= risk)
    return _ratio((counts.answered * allowed).max(axis=0, initial=0.0), counts.total)


def reliabilities(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], cost: float, threshold: float
) -> Float[np.ndarray, " n"]:
    """Return each row's effective reliability: 1 answered and right, -cost answered and wrong, 0 not answered.

    Its mean is Phi_c (Whitehead et al. 2022, arXiv 2204.13631), for answers that are right or wrong. Rows
    whose confidence is at least `threshold` are answered. For a calibrated probability the best threshold is
    c / (1 + c); `best_threshold` chooses one for any confidence.
    """
    return np.where(confidence >= threshold, np.where(correct, 1.0, -float(cost)), 0.0)


def best_threshold(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], cost: float) -> float:
    """Return the threshold of largest Phi_c on these rows; infinity where answering nothing is best.

    Use it on other rows than those it was chosen on; arXiv 2204.13631 takes a validation split. Of equal ones the
    lowest.

    Raises:
        DataError: a confidence that is NaN, by row.
    """
    counts = tally(confidence, correct)
    gain = counts.answered[:, 0] - (1 + cost) * counts.wrong[:, 0]
    if not len(gain) or gain.max() < 0:
        return math.inf
    order, ends = _order(confidence)
    return float(confidence[order][ends][np.flatnonzero(gain == gain.max())[-1]])


def refuse_nan(confidence: Float[np.ndarray, " n"], name: str = "confidence") -> None:
    """Raise DataError, naming the first row, where a confidence is NaN."""
    bad = np.flatnonzero(np.isnan(confidence))
    if len(bad):
        raise DataError(f"row {bad[0]} has no {name}: it is NaN ({len(bad)} of {len(confidence)} rows); leave them out")


def _order(confidence: Float[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " k"]]:
    """Rows from the most confident down, and the last place of each run of equal confidence."""
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    return order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else order


def _risk(counts: Tally) -> Float[np.ndarray, "k b"]:
    """Risk at each threshold, 0 where a replicate has no row there yet."""
    out = np.zeros_like(counts.wrong)
    return np.divide(counts.wrong, counts.answered, out=out, where=counts.answered > 0)


def _expected_risks(
    answered: Float[np.ndarray, "k b"], wrong: Float[np.ndarray, "k b"], least: Float[np.ndarray, " b"]
) -> Float[np.ndarray, " b"]:
    """Sum over places k above `least` of the risk of the first k rows, its mean over all orders of tied rows.

    Inside a run of ties with a share q wrong, M rows and W wrong ones before it, that risk is (W + (k - M) q) / k =
    q + (W - q M) / k, and the sum of 1/k is a difference of digammas.
    """
    size, bad = np.diff(answered, axis=0, prepend=0.0), np.diff(wrong, axis=0, prepend=0.0)
    share = np.divide(bad, size, out=np.zeros_like(bad), where=size > 0)
    reached = np.maximum(answered, least)
    start = least[None]
    places = np.diff(reached, axis=0, prepend=start)
    harmonic = np.diff(digamma(reached + 1), axis=0, prepend=digamma(start + 1))
    return (share * places + ((wrong - bad) - share * (answered - size)) * harmonic).sum(0)


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name} is {value}; it is a share above 0 and at most 1")


def _ratio(top: Float[np.ndarray, " b"], bottom: Float[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
    return np.divide(top, bottom, out=np.full(len(bottom), math.nan), where=bottom > 0)
