"""Selective prediction in a study: which confidences there are, and the part of results.json that they fill.

The mathematics is in `selective`; here rows are chosen and numbers named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from gapprobe.errors import DataError
from gapprobe.selective import (
    THRESHOLD,
    Guarantee,
    ltt_threshold,
    selective,
    selective_report,
    selective_scores,
    self_consistency,
    sgr_threshold,
    stacked,
)
from gapprobe.study.analysis import probe_rows
from gapprobe.study.config import StudyConfig
from gapprobe.study.gap import weights_for
from gapprobe.study.results import Json, interval, number, records

if TYPE_CHECKING:
    from gapprobe.store.reader import Store

CURVE_POINTS = 200
METHODS = ("perplexity", "probe", "ensemble", "stacked")
RISKS = (0.1, 0.2)
DELTA = 0.05


def measure_selective(
    store: Store,
    outcomes: pd.DataFrame,
    scores: Mapping[str, Any] | None,
    samples: Mapping[str, Sequence[str]] | None,
    config: StudyConfig,
) -> Json:
    """Answer only when confident: by perplexity, probe, both, a stack of them, and agreement with drawn answers.

    On the rows and folds of the probe. A trial whose visual answer is empty has no token to take a log-probability of,
    and is left out.

    Args:
        store: with the answers.
        outcomes: of the trials.
        scores: of the probe step; None where no probe was fitted.
        samples: further answers by visual row; None where none were drawn.
        config: of the study.
    """
    if scores is None:
        return _nothing("Selective prediction needs the probe, and no probe was fitted.")
    rows = probe_rows(outcomes, store, config)
    log_probs = store.rows["answer_logprobs"].reindex(rows.index)
    answered = log_probs.map(len).to_numpy() > 0
    if samples is not None:
        answered &= np.array([bool(samples.get(row)) for row in rows.index])
    rows, log_probs = rows[answered], log_probs[answered]
    right = rows["visual"].to_numpy(dtype=bool)
    own = {"mean_log_prob": np.array([float(np.mean(values)) for values in log_probs])}
    probability, folds = np.array(scores["probability"])[answered], np.array(scores["fold"])[answered]
    if samples is not None:
        own["self_consistency"] = self_consistency(rows["visual_answer"].tolist(), [samples[row] for row in rows.index])
    try:
        confidences: dict[str, Float[np.ndarray, " n"]] = {
            **selective_scores(own["mean_log_prob"], probability, right, folds),
            "stacked": stacked(own | {"probe": probability}, right, folds),
        }
        if samples is not None:
            confidences["self_consistency"] = own["self_consistency"]
        report = selective_report(
            confidences,
            right,
            clusters=(rows["question"], rows["image"]),
            replicates=config.probe.replicates,
            seed=config.seed,
        )
    except DataError as error:
        return _nothing(f"Selective prediction was not measured: {error}.")
    weights = weights_for(rows, config.probe.replicates, config.seed)
    apart = independent_rows(rows["question"], rows["image"], config.seed)
    return {
        "n": len(rows),
        "left_out": int((~answered).sum()),
        "split": scores["split"],
        "operating_point": f"answer when the probability of being right is at least {THRESHOLD}",
        **{name: at_threshold(confidence, right, weights) for name, confidence in confidences.items()},
        "measures": measure_lines(report.table),
        "differences": measure_lines(report.differences),
        "guarantees": [
            {"confidence": name, "by": by, **_promised(found)}
            for name, confidence in own.items()
            for risk in RISKS
            for by, choose in (("sgr", sgr_threshold), ("ltt", ltt_threshold))
            for found in [choose(confidence[apart], right[apart], risk, DELTA)]
        ],
    }


def independent_rows(first: pd.Series[str], second: pd.Series[str], seed: int) -> Bool[np.ndarray, " n"]:
    """Return which rows to take so that no two share a label of either kind: drawn in random order, greedily."""
    taken: tuple[set[str], set[str]] = (set(), set())
    found = np.zeros(len(first), dtype=bool)
    labels = list(zip(first, second, strict=True))
    for i in np.random.default_rng(seed).permutation(len(labels)).tolist():
        if not any(label in seen for label, seen in zip(labels[i], taken, strict=True)):
            found[i] = True
            for label, seen in zip(labels[i], taken, strict=True):
                seen.add(label)
    return found


def at_threshold(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Json:
    """Return coverage, risk, areas and curve of one confidence, with intervals."""
    found = selective(confidence, right, weights)
    parts = {"coverage": found.coverage, "risk": found.risk, "aurc": found.aurc, "e_aurc": found.e_aurc}
    curve = found.curve.thinned(CURVE_POINTS)
    return {
        **{name: number(part.value) for name, part in parts.items()},
        "n": len(right),
        "ci": {name: interval(part) for name, part in parts.items()},
        "curve": {"coverage": curve.coverage.tolist(), "risk": curve.risk.tolist()},
    }


def measure_lines(table: pd.DataFrame) -> list[Json]:
    """Return a table's rows, the two ends of an interval as one, and NaN as None."""
    told = records(table.drop(columns=["ci_low", "ci_high"]))
    ends = zip(table["ci_low"], table["ci_high"], strict=True)
    return [row | {"ci": [number(low), number(high)]} for row, (low, high) in zip(told, ends, strict=True)]


def _promised(found: Guarantee) -> Json:
    return {
        "risk": found.risk,
        "delta": found.delta,
        "n": found.n,
        "threshold": number(found.threshold),
        "coverage": found.coverage,
        "empirical_risk": number(found.empirical_risk),
        "bound": number(found.bound),
        "sentence": found.sentence,
    }


def _nothing(why_not: str) -> Json:
    nothing: Json = {
        **dict.fromkeys(("coverage", "risk", "aurc", "e_aurc")),
        "n": 0,
        "ci": dict.fromkeys(("coverage", "risk", "aurc", "e_aurc"), [None, None]),
        "curve": {"coverage": [], "risk": []},
    }
    return {
        "n": 0,
        "why_not": why_not,
        **dict.fromkeys(METHODS, nothing),
        **{part: [] for part in ("measures", "differences", "guarantees")},
    }
