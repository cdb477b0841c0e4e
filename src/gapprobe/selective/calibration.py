"""Is a probability of being right what it says? Expected calibration error, and the bins of a reliability diagram."""

from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError

Bins = Literal["width", "mass"]
BINS = 15
COLUMNS = ["bin_low", "bin_high", "confidence", "accuracy", "ci_low", "ci_high", "n"]


def calibration_error(
    probability: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
    *,
    bins: int = BINS,
    of: Bins = "width",
) -> Float[np.ndarray, " b"]:
    """Return the expected calibration error under each replicate's weights.

    ECE = sum over bins of (n_j / n) |accuracy_j - mean probability_j| (Guo et al. 2017, arXiv 1706.04599, equation 3).
    Rows of equal probability share a bin. ECE is above 0 even for a calibrated probability, the more so the fewer rows
    a bin has; a bootstrap adds that once more, so its interval lies high (Kumar, Liang & Ma 2019, arXiv 1909.10155).

    Args:
        probability: of being right, between 0 and 1.
        correct: whether each answer is right.
        weights: one row a replicate, from `stats.crossed_weights`.
        bins: number of bins.
        of: "width": bins of equal width, a value on an edge in the upper one; "mass": edges at the quantiles.

    Raises:
        DataError: a probability that is NaN or outside [0, 1], by row.
        ConfigError: no bins.
    """
    which = _bin(probability, _edges(probability, bins, of))
    inside = which[:, None] == np.arange(bins)
    excess = (weights * (correct - probability)) @ inside
    total = weights.sum(1)
    return np.divide(np.abs(excess).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)


def reliability(
    probability: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
    *,
    bins: int = BINS,
    of: Bins = "width",
) -> pd.DataFrame:
    """Return the points of a reliability diagram, a row for each bin that holds any row.

    Columns: `bin_low`, `bin_high`, `confidence` (mean probability), `accuracy` (share right) with `ci_low` and
    `ci_high` from the weights, `n`. Arguments, errors and source as `calibration_error`.
    """
    edges = _edges(probability, bins, of)
    which = _bin(probability, edges)
    rows: list[dict[str, float]] = []
    for j in np.unique(which):
        own = which == j
        accuracy = stats.mean(correct[own].astype(np.float64), weights[:, own])
        rows.append(
            {
                "bin_low": float(edges[j]),
                "bin_high": float(edges[j + 1]),
                "confidence": float(probability[own].mean()),
                "accuracy": accuracy.value,
                "ci_low": accuracy.low,
                "ci_high": accuracy.high,
                "n": accuracy.n,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _edges(probability: Float[np.ndarray, " n"], bins: int, of: Bins) -> Float[np.ndarray, " e"]:
    if bins < 1:
        raise ConfigError(f"bins is {bins}; there must be at least one")
    bad = np.flatnonzero(~((probability >= 0) & (probability <= 1)))
    if len(bad):
        raise DataError(
            f"row {bad[0]} has {probability[bad[0]]}, which is no probability ({len(bad)} of {len(probability)} rows)"
        )
    even = np.arange(bins + 1) / bins  # quotients, not multiples: 0.3 lies on the edge 3/10
    if of == "width" or not len(probability):
        return even
    edges = np.unique(np.quantile(probability, even))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def _bin(probability: Float[np.ndarray, " n"], edges: Float[np.ndarray, " e"]) -> Int[np.ndarray, " n"]:
    return np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, len(edges) - 2)
