"""The gap itself: accuracy by setting, on all trials and on those that count, and what was lost on the way.

Source: arXiv 2508.18297 for the settings and the row filter. Intervals are from the crossed bootstrap of
`gapprobe.stats`, for trials share questions and images.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import binomtest

from gapprobe.stats import Estimate, crossed_weights, estimate, mean, weighted_mean
from gapprobe.study.outcomes import REASONS, counted, right, runnable
from gapprobe.study.results import Json, interval, measured
from gapprobe.tasks.settings import SETTINGS

KINDS = ("entity", "question", "image")  # of what trials share; each alone, beside the crossed bootstrap


def weights_for(trials: pd.DataFrame, replicates: int, seed: int) -> Float[np.ndarray, "b n"]:
    """Return crossed bootstrap weights over questions and images for a table of trials."""
    question, image = trials["question"].to_numpy(dtype=str), trials["image"].to_numpy(dtype=str)
    return crossed_weights(question, image, replicates=replicates, seed=seed)


def measure_gap(outcomes: pd.DataFrame, *, replicates: int, seed: int) -> Json:
    """Measure accuracy by setting, which trials count, and the gap on those; see docs/results.md for the fields."""
    ran, counts = runnable(outcomes), counted(outcomes)
    ran_weights, weights = weights_for(ran, replicates, seed), weights_for(counts, replicates, seed)
    return {
        "raw": {s: measured(mean(right(ran, s), ran_weights), "accuracy") for s in SETTINGS},
        "counted": {
            "n": len(counts),
            "trials": len(outcomes),
            "excluded": {reason: int((outcomes["excluded"] == reason).sum()) for reason in REASONS},
        },
        "settings": {
            s: measured(mean(right(counts, s), weights), "accuracy") for s in SETTINGS if s != "identification"
        },
        "gap": {
            "absolute": measured(_absolute_gap(counts, weights)),
            "relative": measured(_relative_gap(counts, weights)),
            "ci_by": {
                kind: interval(_absolute_gap(counts, _one_kind(counts[kind], replicates, seed))) for kind in KINDS
            },
            "mcnemar": mcnemar(right(counts, "text_only"), right(counts, "visual")),
        },
        "by_relation": _by_relation(counts, replicates, seed),
    }


def mcnemar(told: Float[np.ndarray, " n"], shown: Float[np.ndarray, " n"]) -> Json:
    """Test whether trials that are right in one setting alone lie evenly on both sides: the exact form of McNemar's.

    Source: McNemar 1947 (doi 10.1007/BF02295996), with the binomial's two-sided p-value. It takes trials for
    independent, and they share questions and images: the bootstrap's intervals are the sounder guide.

    Args:
        told: 1.0 where the text-only answer is right.
        shown: 1.0 where the visual answer is right.

    Returns:
        `only_told` and `only_shown`, trials right in that setting alone, and `p`, null where there are none.
    """
    only_told, only_shown = int(((told == 1) & (shown == 0)).sum()), int(((told == 0) & (shown == 1)).sum())
    differing = only_told + only_shown
    p = float(binomtest(only_told, differing).pvalue) if differing else None
    return {"only_told": only_told, "only_shown": only_shown, "p": p}


def _one_kind(labels: pd.Series[str], replicates: int, seed: int) -> Float[np.ndarray, "b n"]:
    codes = labels.to_numpy(dtype=str)
    return crossed_weights(codes, np.zeros(len(codes), dtype=np.int64), replicates=replicates, seed=seed)


def _absolute_gap(trials: pd.DataFrame, weights: Float[np.ndarray, "b n"]) -> Estimate:
    return mean(right(trials, "text_only") - right(trials, "visual"), weights)


def _relative_gap(trials: pd.DataFrame, weights: Float[np.ndarray, "b n"]) -> Estimate:
    text, visual = right(trials, "text_only"), right(trials, "visual")

    def lost(w: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
        told = weighted_mean(text, w)
        return np.divide(told - weighted_mean(visual, w), told, out=np.full(len(told), np.nan), where=told > 0)

    return estimate(lost, weights)


def _by_relation(trials: pd.DataFrame, replicates: int, seed: int) -> list[Json]:
    rows: list[Json] = []
    for relation, group in trials.groupby("relation", sort=True):
        weights = weights_for(group, replicates, seed)
        visual, text = mean(right(group, "visual"), weights), mean(right(group, "text_only"), weights)
        ends = {"ci": interval(visual), "text_only_ci": interval(text)}
        rows.append({"relation": relation, "text_only": text.value, "visual": visual.value, "n": visual.n, **ends})
    return rows
