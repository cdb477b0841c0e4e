"""Statistics that every analysis shares: intervals, a bootstrap for rows that belong to a question and an image, AUC.

Every statistic takes weights [b n], one row a bootstrap replicate, and returns all replicates at once; NaN marks a
replicate in which it does not exist. What is measured is not known here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from gapprobe.errors import DataError

LEVEL = 0.95
Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where it does not exist.

    Attributes:
        value: the statistic on the rows as they are.
        low: lower end of the interval.
        high: upper end of the interval.
        n: rows behind it.
        degenerate: bootstrap replicates in which the statistic did not exist and which were left out.
    """

    value: float
    low: float
    high: float
    n: int
    degenerate: int = 0


def proportion(successes: int, n: int) -> Estimate:
    """Return a share of independent rows with Wilson's score interval (Wilson 1927); NaN for no rows."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def crossed_weights(
    first: Shaped[np.ndarray, " n"], second: Shaped[np.ndarray, " n"], *, replicates: int = 1000, seed: int
) -> Float[np.ndarray, "b n"]:
    """Return bootstrap weights for rows that belong to a group of each of two crossed kinds (question and image).

    Both kinds are resampled with replacement, independently, and a row's weight is the product of how often its two
    groups were drawn: the pigeonhole bootstrap (Owen 2007, doi 10.1214/07-AOAS122). It covers both sources of
    dependence and errs towards wide intervals where rows hardly depend on either.

    Args:
        first: group of each row, any labels.
        second: group of each row of the other kind.
        replicates: number of resamples.
        seed: of the resampling; equal seeds give equal weights.

    Raises:
        DataError: the two label arrays differ in length.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} labels of one kind and {len(second)} of the other: every row wants both")
    rng = np.random.default_rng(seed)
    weights = np.ones((len(first), replicates))
    for labels in (first, second):
        codes = np.unique(labels, return_inverse=True)[1]
        groups = int(codes.max()) + 1 if len(codes) else 0
        if groups:
            weights *= rng.multinomial(groups, np.full(groups, 1 / groups), size=replicates).T[codes]
    return weights.T  # rows contiguous by replicate: statistics walk over n with all replicates side by side


def estimate(
    statistic: Callable[[Float[np.ndarray, "b n"]], Float[np.ndarray, " b"]], weights: Float[np.ndarray, "b n"]
) -> Estimate:
    """Return a weighted statistic on the rows as they are, with its percentile interval over the replicates.

    Args:
        statistic: maps weights [b n] to values [b].
        weights: bootstrap weights, from `crossed_weights`.
    """
    n = weights.shape[1]
    value = float(statistic(np.ones((1, n)))[0]) if n else math.nan
    if math.isnan(value):
        return Estimate(math.nan, math.nan, math.nan, n, len(weights))
    return from_replicates(value, statistic(weights), n)


def from_replicates(value: float, replicates: Float[np.ndarray, " b"], n: int) -> Estimate:
    """Return `value` with the percentile interval of its replicates; those that are NaN are left out and counted."""
    kept = replicates[~np.isnan(replicates)]
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(kept) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high), n, len(replicates) - len(kept))


def weighted_mean(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """Return the mean under each replicate's weights; NaN where they are all zero."""
    return _ratio(values @ weights.T, weights.sum(1))


def mean(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]) -> Estimate:
    """Return the mean of `values` with its bootstrap interval; shares are means of zeros and ones."""
    return estimate(lambda w: weighted_mean(values, w), weights)


def layer_means(values: Float[np.ndarray, "l n"], weights: Float[np.ndarray, "b n"]) -> list[Estimate]:
    """Return the mean over rows at every layer, each with its bootstrap interval; rows that are NaN are left out."""
    out: list[Estimate] = []
    for layer in values:
        kept = ~np.isnan(layer)
        out.append(mean(layer[kept], weights[:, kept]))
    return out


def weighted_auc(
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
    strata: Int[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " b"]:
    """Return the area under the ROC curve: how often a positive scores above a negative, ties counting a half.

    With `strata` only pairs inside one stratum count. Out-of-fold scores come from one fit a fold; across folds their
    offsets differ, and depend on the labels that were held out, so pairs across folds would bias the area downwards.

    Args:
        scores: larger means more likely positive; finite.
        labels: True for positives.
        weights: one row a replicate; a pair counts with the product of its two weights.
        strata: fold of each row, or None for one stratum.

    Returns:
        One area a replicate; NaN where no pair has any weight.
    """
    strata = np.zeros(len(scores), dtype=np.int64) if strata is None else strata
    order = np.lexsort((scores, strata))
    score, stratum, positive = scores[order], strata[order], labels[order]
    # Ranks are positions among the sorted negatives: where the stratum starts, where ties start, and where they end.
    negatives_before = np.concatenate([[0], np.cumsum(~positive)])
    starts = np.flatnonzero(np.r_[True, stratum[1:] != stratum[:-1]]) if len(score) else np.zeros(0, dtype=np.int64)
    tied = (
        np.flatnonzero(np.r_[True, (stratum[1:] != stratum[:-1]) | (score[1:] != score[:-1])]) if len(score) else starts
    )
    which = np.searchsorted(tied, np.flatnonzero(positive), side="right") - 1
    low = negatives_before[tied[which]]
    high = negatives_before[np.r_[tied[1:], len(score)][which]]
    fold = np.searchsorted(starts, np.flatnonzero(positive), side="right") - 1
    first = negatives_before[starts[fold]]
    last = negatives_before[np.r_[starts[1:], len(score)][fold]]

    by_row = weights.T  # [n b]
    below = np.zeros((len(score) - int(positive.sum()) + 1, len(weights)))
    np.cumsum(by_row[order[~positive]], axis=0, out=below[1:])
    own = by_row[order[positive]]
    wins = np.einsum("nb,nb->b", own, below[low] + below[high]) / 2 - np.einsum("nb,nb->b", own, below[first])
    pairs = np.einsum("nb,nb->b", own, below[last] - below[first])
    return _ratio(wins, pairs)


def auc(
    scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"], strata: Int[np.ndarray, " n"] | None = None
) -> float:
    """Return the unweighted area under the ROC curve; NaN where one class is missing. See `weighted_auc`."""
    return float(weighted_auc(scores, labels, np.ones((1, len(scores))), strata)[0])


def _ratio(top: Float[np.ndarray, " b"], bottom: Float[np.ndarray, " b"]) -> Float[np.ndarray, " b"]:
    return np.divide(top, bottom, out=np.full(len(bottom), math.nan), where=bottom > 0)
