"""One call for a whole comparison: every method by every measure, intervals, paired differences, curves, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.selective import measures
from gapprobe.selective.calibration import BINS, COLUMNS, calibration_error, reliability

if TYPE_CHECKING:
    import plotly.graph_objects as go

Values = Shaped[np.ndarray, " _"] | pd.Series  # [n]; lengths are compared by name in `_checked`
Measured = dict[str, Float[np.ndarray, " b"]]

CELLS = 1 << 23  # rows times replicates held at once
GRID = np.arange(1, 101) / 100  # coverages at which curves are drawn


@dataclass(frozen=True)
class SelectiveReport:
    """What `gp.selective_report` found. Intervals are 95 % percentile intervals of one bootstrap that all share.

    Attributes:
        table: a row for each method and measure: `value`, `ci_low`, `ci_high`, `n`; NaN where a measure does not exist.
        differences: a row for each pair of methods and measure: `difference`, method less `against`, on the same
            replicates, with `ci_low` and `ci_high`.
        curves: risk over coverage, by method: `coverage`, `risk`, `ci_low`, `ci_high` (of each point by itself).
        reliability: the reliability diagram of each method that is a probability, see `reliability`.
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    reliability: pd.DataFrame

    def plot(self) -> go.Figure:
        """Draw risk-coverage curves with their intervals and, where a method is a probability, reliability diagrams.

        Raises:
            ConfigError: plotly is not installed.
        """
        from gapprobe.selective.plotting import drawn

        return drawn(self.curves, self.reliability)


def selective_report(
    confidences: Mapping[str, Values],
    correct: Values,
    *,
    clusters: tuple[Values, Values] | Values | None = None,
    coverages: Sequence[float] = (0.5, 0.8),
    risks: Sequence[float] = (0.05, 0.1, 0.2),
    costs: Sequence[float] = (1.0, 10.0, 100.0),
    bins: int = BINS,
    folds: int = 5,
    replicates: int = 1000,
    seed: int = 0,
) -> SelectiveReport:
    """Measure several confidences in the same answers, side by side.

    Measures, defined and sourced in `gapprobe.selective.measures`: `risk` (of answering everything), `auroc`, `aurc`,
    `e_aurc`, `augrc`, `prr`, `risk@<coverage>`, `coverage@<risk>`, `phi_<cost>`, and `ece` for probabilities. A row's
    part in phi comes from the threshold that is best on the other folds; the interval holds these thresholds fixed.

    Args:
        confidences: by name, one value a row, larger means more likely right.
        correct: whether each answer is right, True or False.
        clusters: what rows share, for the bootstrap: labels, or two that cross (question and image); each row is its
            own cluster where left out. The folds of phi keep those of the (first) labels together.
        coverages: at which the risk is given.
        risks: at which the coverage is given.
        costs: of a wrong answer, in right ones, for phi.
        bins: of equal width, for the calibration error and the reliability diagram.
        folds: for the thresholds of phi.
        replicates: of the bootstrap.
        seed: of bootstrap and folds.

    Raises:
        DataError: no methods or rows, lengths that differ, a confidence that is NaN (by method and row), answers that
            are not True or False, or clusters too few for two folds.
        ConfigError: a coverage or risk that is no share, fewer than two folds, or no replicates.
    """
    right, scores = _checked(confidences, correct)
    if folds < 2:
        raise ConfigError(f"folds is {folds}; thresholds are chosen on other folds, so there must be two at least")
    if replicates < 1:
        raise ConfigError(f"replicates is {replicates}; the intervals come from at least one, better 1,000")
    n = len(right)
    kinds = clusters if isinstance(clusters, tuple) else (clusters, None)
    first, second = (np.arange(n) if kind is None else np.asarray(kind) for kind in kinds)
    if len(first) != n or len(second) != n:
        raise DataError(f"there are {n} rows and clusters of {len(first)} and {len(second)}; each row wants one")
    weights = stats.crossed_weights(first, second, replicates=replicates, seed=seed)
    fold = _folds(first, folds, seed)
    parts = np.array_split(weights, -(-weights.size // CELLS))
    kept: dict[str, Measured] = {}  # the rows as they are first, then the replicates
    curves: list[pd.DataFrame] = []
    diagrams: list[pd.DataFrame] = []
    for name, score in scores.items():
        probable = bool(((score >= 0) & (score <= 1)).all())
        utilities = {f"phi_{cost:g}": _held_out_utility(score, right, cost, fold) for cost in costs}
        again: list[Measured] = []
        lines: list[Float[np.ndarray, "g b"]] = []
        for w in (np.ones((1, n)), *parts):
            counts = measures.tally(score, right, w)
            at = measures.risk_at_coverage(counts, np.array(coverages, dtype=np.float64))
            again.append(
                {
                    "risk": counts.error,
                    "auroc": stats.weighted_auc(score, right, w),
                    "aurc": measures.aurc(counts),
                    "e_aurc": measures.e_aurc(counts),
                    "augrc": measures.augrc(counts),
                    "prr": measures.rejection_ratio(counts),
                    **{f"risk@{coverage:g}": at[i] for i, coverage in enumerate(coverages)},
                    **{f"coverage@{risk:g}": measures.coverage_at_risk(counts, risk) for risk in risks},
                    **{phi: stats.weighted_mean(utility, w) for phi, utility in utilities.items()},
                    "ece": calibration_error(score, right, w, bins=bins) if probable else np.full(len(w), np.nan),
                }
            )
            lines.append(measures.risk_at_coverage(counts, GRID))
        kept[name] = {key: np.concatenate([part[key] for part in again]) for key in again[0]}
        curves.append(_curve(np.concatenate(lines, axis=1), n).assign(method=name))
        if probable:
            diagrams.append(reliability(score, right, weights, bins=bins).assign(method=name))
    return SelectiveReport(
        table=_table(kept, n),
        differences=_differences(kept, n),
        curves=pd.concat(curves, ignore_index=True),
        reliability=pd.concat(diagrams, ignore_index=True) if diagrams else pd.DataFrame(columns=[*COLUMNS, "method"]),
    )


def _checked(
    confidences: Mapping[str, Values], correct: Values
) -> tuple[Bool[np.ndarray, " n"], dict[str, Float[np.ndarray, " n"]]]:
    right = np.asarray(correct)
    if right.dtype != bool:
        raise DataError(f"correct is of dtype {right.dtype}; each answer is True (right) or False")
    if not confidences or not len(right):
        raise DataError("there is nothing to measure: give at least one confidence and one row")
    scores: dict[str, Float[np.ndarray, " n"]] = {}
    for name, values in confidences.items():
        score = np.asarray(values, dtype=np.float64)
        if score.shape != right.shape:
            raise DataError(f"confidence {name!r} has shape {score.shape}, correct {right.shape}; one value a row")
        measures.refuse_nan(score, f"confidence {name!r}")
        scores[name] = score
    return right, scores


def _folds(labels: Shaped[np.ndarray, " n"], folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """Fold of each row; rows of one label share it."""
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise DataError("all rows are of one cluster; thresholds are chosen on rows of other clusters")
    return (np.random.default_rng(seed).permutation(len(names)) % folds)[codes]


def _held_out_utility(
    score: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], cost: float, fold: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    out = np.zeros(len(score))
    for own in np.unique(fold):
        here = fold == own
        threshold = measures.best_threshold(score[~here], correct[~here], cost)
        out[here] = measures.reliabilities(score[here], correct[here], cost, threshold)
    return out


def _curve(lines: Float[np.ndarray, "g b"], n: int) -> pd.DataFrame:
    points = [_estimate(line, n) for line in lines]
    low, high = [p.low for p in points], [p.high for p in points]
    return pd.DataFrame({"coverage": GRID, "risk": lines[:, 0], "ci_low": low, "ci_high": high})


def _table(kept: Mapping[str, Measured], n: int) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for method, found in kept.items():
        for measure, values in found.items():
            e = _estimate(values, n)
            rows.append(
                {"method": method, "measure": measure, "value": e.value, "ci_low": e.low, "ci_high": e.high, "n": n}
            )
    return pd.DataFrame(rows)


def _differences(kept: Mapping[str, Measured], n: int) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for (method, found), (against, other) in combinations(kept.items(), 2):
        for measure in found:
            e = _estimate(found[measure] - other[measure], n)
            named = {"method": method, "against": against, "measure": measure}
            rows.append({**named, "difference": e.value, "ci_low": e.low, "ci_high": e.high})
    return pd.DataFrame(rows, columns=["method", "against", "measure", "difference", "ci_low", "ci_high"])


def _estimate(values: Float[np.ndarray, " b"], n: int) -> stats.Estimate:
    """The first value, with the interval of the others."""
    return stats.from_replicates(float(values[0]), values[1:], n)
