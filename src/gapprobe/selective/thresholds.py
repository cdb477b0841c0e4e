"""Thresholds with a guarantee: on new rows of the same kind the risk is at most what was asked for, but for chance.

Both look at rows with known answers, which no part of the confidence was fitted on, and answer where the confidence is
above (not at) a threshold. Given that a threshold is one of the rows' own confidences, and how many rows lie above it,
those rows are independent draws from above it: the number of wrong ones is binomial with the true risk, whatever the
confidences, tied or not. The row that lends the threshold is not among them.

All of this is for independent rows. Rows that share a question or an image are not: give one row of each, or the risk
is exceeded more often than promised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtr, betaincinv

from gapprobe.errors import ConfigError, DataError
from gapprobe.selective.measures import refuse_nan

STEPS = 200
PValue = Literal["binomial", "hoeffding_bentkus"]


@dataclass(frozen=True)
class Guarantee:
    """A threshold above which answers are given, and what is known of its risk.

    Attributes:
        threshold: rows of a confidence above it are answered; minus infinity for all, infinity for none.
        coverage: share of the calibration rows above it.
        empirical_risk: share of wrong answers among those; NaN where there are none.
        bound: the true risk is at most this, with probability 1 - delta over calibration sets; NaN where none is
            answered.
        risk: what was asked for.
        delta: what was allowed.
        n: calibration rows.
    """

    threshold: float
    coverage: float
    empirical_risk: float
    bound: float
    risk: float
    delta: float
    n: int

    @property
    def found(self) -> bool:
        """Whether any threshold reaches the risk."""
        return self.threshold < math.inf

    @property
    def sentence(self) -> str:
        """The result in words."""
        sure = f"with probability {1 - self.delta:g}"
        if not self.found:
            return f"No threshold reaches a risk of {self.risk:g} {sure} on these {self.n} rows: answer nothing."
        return (
            f"Answer where the confidence is above {self.threshold:.6g}: {sure} the risk is at most {self.bound:.4g} "
            f"(coverage {self.coverage:.3f} and risk {self.empirical_risk:.4g} on these {self.n} rows)."
        )

    def answers(self, confidence: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return which rows to answer.

        Raises:
            DataError: a confidence that is NaN, by row.
        """
        refuse_nan(confidence)
        return confidence.astype(np.float64) > self.threshold


def sgr_threshold(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], risk: float, delta: float = 0.05
) -> Guarantee:
    """Return the threshold of selection with guaranteed risk, SGR.

    Geifman & El-Yaniv 2017, arXiv 1705.08500, algorithm 1: bisection over the sorted confidences; at each of its
    k = ceil(log2(n + 1)) steps the wrong answers above the threshold give an upper bound b on the true risk r by
    inverting the binomial tail, P(Bin(N, b) <= wrong) = delta / k, and the step goes to more coverage where
    b <= `risk`. All k bounds hold at once with probability 1 - delta, so the widest threshold that passed is returned.

    Differences from the published algorithm: answering everything is among the candidates (k is larger by one where n
    is a power of two), the row that lends the threshold is not counted, and a last step that failed is not returned.
    The published proof takes the thresholds of the steps as given, though a step depends on the ones before;
    `ltt_threshold` with `thresholds` has no such gap.

    Args:
        confidence: of calibration rows, which must be independent: one of each question and image.
        correct: whether each answer is right.
        risk: largest true risk wanted, in (0, 1).
        delta: probability with which it may be exceeded, in (0, 1).

    Raises:
        DataError: a confidence that is NaN, by row, or no rows.
        ConfigError: a risk or delta outside (0, 1).
    """
    above, wrong, candidates = _prepared(confidence, correct, risk, delta)
    n = len(confidence)
    steps = math.ceil(math.log2(n + 1))
    low, high, bound = 0, n, math.nan  # candidate n answers nothing: the place where the search ends if none passes
    while low < high:
        middle = (low + high) // 2
        reached = upper_bound(int(wrong[middle]), int(above[middle]), delta / steps)
        if reached <= risk:
            high, bound = middle, reached
        else:
            low = middle + 1
    if math.isnan(bound):
        return _nothing(risk, delta, n)
    share = float(wrong[high] / above[high])
    return Guarantee(float(candidates[high]), float(above[high] / n), share, bound, risk, delta, n)


def ltt_threshold(
    confidence: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    risk: float,
    delta: float = 0.05,
    *,
    thresholds: Sequence[float] | Float[np.ndarray, " k"] | None = None,
    starts: int = 5,
    p_value: PValue = "binomial",
) -> Guarantee:
    """Return the widest threshold that Learn-then-Test certifies.

    Angelopoulos et al. 2021, arXiv 2110.01052: for each threshold the hypothesis "its risk exceeds `risk`" is tested
    with a p-value, and fixed-sequence testing keeps the chance of any false rejection below delta: from each of
    `starts` places, evenly spread, thresholds are tested from high to low at level delta / starts until one is not
    rejected. The widest rejected one is returned; its `bound` is `risk`.

    Args:
        confidence: of calibration rows, which must be independent: one of each question and image.
        correct: whether each answer is right.
        risk: largest true risk wanted, in (0, 1).
        delta: probability with which it may be exceeded, in (0, 1).
        thresholds: tested ones, chosen without these rows. The guarantee is then exact, for any number of rows and any
            confidence. Left out, up to 200 of the rows' own confidences, at ranks that grow by equal factors and
            depend on n, `risk`, delta and `starts` alone; it is then exact where the true risk does not fall as
            coverage grows, as of any sensible confidence.
        starts: places where a sequence starts: more of them get past a bad stretch, each at a smaller level.
        p_value: "binomial", P(Bin(N, risk) <= wrong), exact; "hoeffding_bentkus", the smaller of exp(-N kl(share wrong,
            risk)) and e P(Bin(N, risk) <= wrong), as published for any bounded loss, and never smaller than the exact.

    Raises:
        DataError: a confidence or threshold that is NaN, or no rows.
        ConfigError: a risk or delta outside (0, 1), no starts, or no thresholds.
    """
    if starts < 1:
        raise ConfigError(f"starts is {starts}; there must be at least one")
    above, wrong, candidates = _prepared(confidence, correct, risk, delta)
    n = len(confidence)
    if thresholds is None:
        # Fewer rows than these reject nothing, even without a wrong one among them.
        least = math.ceil(math.log(delta / starts) / math.log1p(-risk))
        ranks = np.geomspace(least, n, STEPS).round().astype(int) if n >= least else np.zeros(0, dtype=int)
        kept = np.unique(n - ranks)
    else:
        chosen = np.unique(np.asarray(thresholds, dtype=np.float64))
        if not len(chosen):
            raise ConfigError("thresholds is empty; give some, or leave it out")
        refuse_nan(chosen, "threshold")
        # What lies above a threshold lies above the largest candidate that is not above it.
        kept = np.searchsorted(candidates, chosen, side="right") - 1
        candidates, above, wrong = chosen, above[kept], wrong[kept]
        kept = np.arange(len(chosen))
    values = p_values(wrong[kept], above[kept], risk, p_value)[::-1]  # from high thresholds to low
    passed = values <= delta / starts
    widest = -1
    for start in np.unique(np.linspace(0, len(kept), starts, endpoint=False).astype(int)):
        run = passed[start:]
        widest = max(widest, start + (len(run) if run.all() else int(run.argmin())) - 1 if len(run) and run[0] else -1)
    if widest < 0:
        return _nothing(risk, delta, n)
    at = kept[::-1][widest]
    share = float(wrong[at] / above[at])
    return Guarantee(float(candidates[at]), float(above[at] / n), share, risk, risk, delta, n)


def upper_bound(wrong: int, n: int, delta: float) -> float:
    """Return the largest risk under which so few wrong answers among n have at least probability delta; 1 for none.

    The inverse of the binomial tail: P(Bin(n, bound) <= wrong) = delta (arXiv 1705.08500; Clopper & Pearson 1934).
    """
    return 1.0 if wrong >= n else float(betaincinv(wrong + 1, n - wrong, 1 - delta))


def p_values(
    wrong: Int[np.ndarray, " k"], n: Int[np.ndarray, " k"], risk: float, kind: PValue = "binomial"
) -> Float[np.ndarray, " k"]:
    """Return p-values of "the true risk exceeds `risk`" for wrong answers among n; 1 where n is 0.

    Source: arXiv 2110.01052; see `ltt_threshold`.
    """
    exact = np.where(n > 0, bdtr(wrong.astype(np.float64), n, risk), 1.0)
    if kind == "binomial":
        return exact
    share = np.divide(wrong, n, out=np.ones(len(n)), where=n > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(share > 0, share * np.log(share / risk), 0.0)
        divergence += np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - risk)), 0.0)
    hoeffding = np.where(share < risk, np.exp(-n * divergence), 1.0)
    return np.minimum(hoeffding, np.minimum(1.0, math.e * exact))


def _prepared(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], risk: float, delta: float
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Rows above each candidate threshold, wrong ones among them, the candidates: minus infinity and all rows' own."""
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} is {value}; it must lie between 0 and 1")
    if not len(confidence):
        raise DataError("there are no rows to choose a threshold on")
    refuse_nan(confidence)
    order = np.argsort(confidence, kind="stable")
    ordered = confidence[order].astype(np.float64)
    wrong_from = np.append(np.cumsum(~correct[order][::-1])[::-1], 0)
    first_above = np.append(0, np.searchsorted(ordered, ordered, side="right"))
    return len(ordered) - first_above, wrong_from[first_above], np.append(-math.inf, ordered)


def _nothing(risk: float, delta: float, n: int) -> Guarantee:
    return Guarantee(math.inf, 0.0, math.nan, math.nan, risk, delta, n)
