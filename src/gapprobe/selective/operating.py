"""The study's view of a confidence: coverage and risk at one threshold, the areas, and the curve."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from gapprobe import stats
from gapprobe.selective.measures import RiskCoverage, aurc, e_aurc, refuse_nan, risk_coverage, tally
from gapprobe.stats import Estimate

THRESHOLD = 0.5


@dataclass(frozen=True)
class Selective:
    """How well a confidence tells right answers from wrong ones.

    Attributes:
        coverage: share of rows answered at the threshold.
        risk: share of wrong answers among them; NaN where none is answered.
        aurc: area under the risk-coverage curve, see `measures.aurc`.
        e_aurc: that area less the one of an ideal confidence, see `measures.e_aurc`.
        curve: the curve itself.
    """

    coverage: Estimate
    risk: Estimate
    aurc: Estimate
    e_aurc: Estimate
    curve: RiskCoverage


def selective(
    confidence: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
    *,
    threshold: float = THRESHOLD,
) -> Selective:
    """Measure a confidence, answering where it is at least `threshold`; intervals from bootstrap weights.

    Args:
        confidence: larger means more likely right.
        correct: whether each answer is right.
        weights: from `stats.crossed_weights`.
        threshold: operating point of coverage and risk.

    Raises:
        DataError: a confidence that is NaN, by row.
    """
    refuse_nan(confidence)
    answered = confidence >= threshold
    wrong = (~correct).astype(np.float64)
    return Selective(
        coverage=stats.mean(answered.astype(np.float64), weights),
        risk=stats.mean(wrong[answered], weights[:, answered]),
        aurc=stats.estimate(lambda w: aurc(tally(confidence, correct, w)), weights),
        e_aurc=stats.estimate(lambda w: e_aurc(tally(confidence, correct, w)), weights),
        curve=risk_coverage(confidence, correct),
    )
