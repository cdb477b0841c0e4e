"""Selective prediction: answer only when confident. Confidences, the risk-coverage curve and its measures.

Conventions (Geifman & El-Yaniv 2017, arXiv 1705.08500; Geifman, Uziel & El-Yaniv 2019, arXiv 1805.08206; as in the text
of arXiv 2508.18297): coverage is the share of rows answered, risk the share of wrong answers among those answered. Rows
of equal confidence are answered together, so no measure depends on the order of rows. Where confidences for answers
that were never given come from is not known here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.kernels import logistic
from gapprobe.stats import Estimate

Method = Literal["perplexity", "probe", "ensemble"]
THRESHOLD = 0.5


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
class Selective:
    """How well a confidence tells right answers from wrong ones.

    Attributes:
        coverage: share of rows answered at the threshold.
        risk: share of wrong answers among them; NaN where none is answered.
        aurc: area under the risk-coverage curve: the mean, over rows, of the risk once the row is answered.
        e_aurc: that area less the one of an ideal confidence on the same answers, r + (1 - r) log(1 - r) for risk r.
        curve: the curve itself.
    """

    coverage: Estimate
    risk: Estimate
    aurc: Estimate
    e_aurc: Estimate
    curve: RiskCoverage


def selective_scores(
    mean_log_prob: Float[np.ndarray, " n"],
    probe: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    *,
    balanced: bool = True,
) -> Mapping[Method, Float[np.ndarray, " n"]]:
    """Return each row's probability of a right answer, by three methods, all from fits that did not see the row.

    Source: arXiv 2508.18297, selective prediction. "perplexity" is the mean log-probability of the answer's tokens
    through a logistic regression fitted on the other folds; "probe" is given; "ensemble" is the mean of the two.

    Args:
        mean_log_prob: mean natural log-probability of each answer's tokens.
        probe: out-of-fold probability from a probe; use one whose layer was chosen on training rows.
        correct: whether each answer is right.
        folds: the fold that held each row out when the probe was fitted; the regression uses the same.
        balanced: give both classes the same total weight, as published and as the probe does. The threshold of 0.5
            then lies where right and wrong answers are equally typical, whatever their numbers; without it the
            probability is meant to be calibrated to how often answers are right.

    Raises:
        DataError: NaN in a confidence, or a fold whose training rows are of one class.
    """
    for name, values in (("mean log-probability", mean_log_prob), ("probe's probability", probe)):
        if not np.isfinite(values).all():
            raise DataError(f"{int((~np.isfinite(values)).sum())} rows have no finite {name}; leave them out")
    masks = folds != np.unique(folds)[:, None]
    for mask in masks:
        if correct[mask].all() or not correct[mask].any():
            raise DataError(
                f"the {int(mask.sum())} training rows of a fold are all {'right' if correct[mask].any() else 'wrong'}"
            )
    labels = torch.from_numpy(np.repeat(correct[None], len(masks), axis=0))
    mask = torch.from_numpy(masks)
    x = torch.from_numpy(mean_log_prob.astype(np.float64))[:, None]
    weights = logistic.balanced(labels, mask) if balanced else mask.double()
    fits = logistic.fit(x, labels, weights, tolerance=1e-12)
    probabilities = torch.sigmoid(fits.logits(x)).numpy()
    perplexity = probabilities[np.unique(folds, return_inverse=True)[1], np.arange(len(folds))]
    return {"perplexity": perplexity, "probe": probe, "ensemble": (perplexity + probe) / 2}


def risk_coverage(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> RiskCoverage:
    """Return the risk-coverage curve; empty for no rows."""
    order, ends = _order(confidence)
    answered = ends + 1.0
    wrong = np.cumsum(~correct[order])[ends]
    return RiskCoverage(confidence[order][ends], answered / max(1, len(correct)), wrong / answered)


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
        DataError: a confidence that is NaN.
    """
    if np.isnan(confidence).any():
        raise DataError(f"{int(np.isnan(confidence).sum())} rows have no confidence; leave them out")
    answered = confidence >= threshold
    wrong = (~correct).astype(np.float64)
    return Selective(
        coverage=stats.mean(answered.astype(np.float64), weights),
        risk=stats.mean(wrong[answered], weights[:, answered]),
        aurc=stats.estimate(lambda w: weighted_aurc(confidence, correct, w), weights),
        e_aurc=stats.estimate(
            lambda w: weighted_aurc(confidence, correct, w) - ideal_aurc(stats.weighted_mean(wrong, w)), weights
        ),
        curve=risk_coverage(confidence, correct),
    )


def weighted_aurc(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """Return the area under the risk-coverage curve under each replicate's weights; NaN where they are all zero."""
    order, ends = _order(confidence)
    sorted_weights = weights.T[order]  # [n b]
    answered = np.cumsum(sorted_weights, axis=0)[ends]
    wrong = np.cumsum(sorted_weights * ~correct[order, None], axis=0)[ends]
    risk = np.divide(wrong, answered, out=np.zeros_like(wrong), where=answered > 0)
    entering = np.diff(answered, axis=0, prepend=0.0)
    total = weights.sum(1)
    return np.divide((risk * entering).sum(0), total, out=np.full(len(total), math.nan), where=total > 0)


def ideal_aurc(risk: Float[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
    """Return the area of a confidence that puts every right answer before every wrong one (arXiv 1805.08206)."""
    right = 1.0 - risk
    return risk + right * np.log(right, out=np.zeros_like(right), where=right > 0)


def _order(confidence: Float[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " k"]]:
    """Rows from the most confident down, and the last place of each run of equal confidence."""
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    return order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else order
