"""A sweep's numbers as tables: areas by layer with intervals, areas by strength, what a threshold of 0 gives."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import stdtrit

from gapprobe import stats
from gapprobe.probes.plan import HeldOut, Problems, choose
from gapprobe.stats import Estimate


def areas_by_strength(split: Problems, by_layer: Mapping[int, HeldOut], strengths: Sequence[float]) -> pd.DataFrame:
    """Return the probe's area at every layer and strength."""
    return pd.DataFrame(
        [
            (layer, strength, stats.auc(scores, split.target, split.cut.outer))
            for layer, held_out in by_layer.items()
            for strength, scores in zip(strengths, held_out.scores, strict=True)
        ],
        columns=["layer", "strength", "auc"],
    )


def areas_by_layer(
    split: Problems,
    by_layer: Mapping[int, HeldOut],
    strengths: tuple[float, ...],
    baselines: Mapping[str, Float[np.ndarray, " n"]],
    by_view: Mapping[str, Mapping[int, HeldOut]],
    weights: Float[np.ndarray, "b n"],
    calibrated: bool,
) -> pd.DataFrame:
    """Lay out the areas of the probe and of every control, by layer, each with its interval.

    Args:
        split: the fits.
        by_layer: what those of the probe said.
        strengths: of the probe.
        baselines: out-of-fold scores of controls that know no layer.
        by_view: what the probe said of the layers that a control puts in their place.
        weights: bootstrap weights.
        calibrated: whether scores are log-odds.
    """
    folds, target = split.cut.outer, split.target

    def area(scores: np.ndarray) -> Estimate:
        return stats.estimate(lambda w: stats.weighted_auc(scores, target, w, folds), weights)

    constant = {kind: area(scores) for kind, scores in baselines.items()}
    lines: list[tuple[str, int, Estimate, dict[str, float]]] = []
    for layer, held_out in by_layer.items():
        own = choose({layer: held_out}, strengths, split.cut)
        values, counts = np.unique(own.strengths, return_counts=True)
        measures = {"strength": float(values[counts.argmax()]), **_measures(own.scores, target, calibrated)}
        lines.append(("probe", layer, area(own.scores), measures))
        if len(split.shuffled):
            runs = zip(own.shuffled, split.shuffled, strict=True)
            areas = np.array([stats.auc(scores, labels, folds) for scores, labels in runs])
            lines.append(("shuffled", layer, _next_run(areas, len(target)), {}))
        for kind, held in by_view.items():
            lines.append((kind, layer, area(choose({layer: held[layer]}, strengths, split.cut).scores), {}))
        lines += [(kind, layer, estimate, {}) for kind, estimate in constant.items()]
    return pd.DataFrame(
        [
            {"kind": kind, "layer": layer, "auc": e.value, "ci_low": e.low, "ci_high": e.high, "n": e.n}
            | {"positives": int(target.sum())}
            | measures
            for kind, layer, e, measures in sorted(lines, key=lambda line: line[0] != "probe")
        ]
    )


def _measures(scores: Float[np.ndarray, " n"], target: Bool[np.ndarray, " n"], calibrated: bool) -> dict[str, float]:
    """Return what a threshold of 0 gives, and how well log-odds are calibrated (ten bins of equal width)."""
    right = (scores > 0) == target
    out = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float((right[target].mean() + right[~target].mean()) / 2),
    }
    if not calibrated:
        return out
    probability = (1.0 + np.tanh(scores / 2.0)) / 2.0
    bins = np.minimum((probability * 10).astype(int), 9)
    off = np.abs(np.bincount(bins, probability - target, minlength=10)).sum() / len(target)
    loss = float(np.logaddexp(0.0, np.where(target, -scores, scores)).mean())
    return out | {"log_loss": loss, "ece": float(off)}


def _next_run(areas: Float[np.ndarray, " m"], n: int) -> Estimate:
    """Mean over runs, with Student's prediction interval: one more run falls into it in 95 % of cases."""
    m = len(areas)
    centre = float(areas.mean())
    half = float(stdtrit(m - 1, 0.975)) * float(areas.std(ddof=1)) * math.sqrt(1 + 1 / m) if m > 1 else math.nan
    return Estimate(centre, max(0.0, centre - half), min(1.0, centre + half), n)
