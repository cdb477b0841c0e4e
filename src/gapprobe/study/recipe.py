"""The published probe as published, and how much of its accuracy is leakage.

Source: arXiv 2508.18297: rows whose full-information answer is right, the residual at the last output token, layers 1,
4, …, 28, random rows 80/20, standardised, L2 logistic regression with C = 1 and balanced classes; accuracy on the 20 %.
A question stands on both sides of such a split, with other images. The same fits with questions (or entities) kept
together say what is left of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.study.analysis import cut
from gapprobe.study.config import StudyConfig
from gapprobe.study.gap import weights_for
from gapprobe.study.outcomes import runnable
from gapprobe.study.results import Json, interval, measured, number

if TYPE_CHECKING:
    from gapprobe.store.reader import Store

LAYERS = range(1, 29, 3)
FOLDS = 5  # each holds out 20 %
GROUPS = ("question", "entity")


def published_recipe(store: Store, outcomes: pd.DataFrame, config: StudyConfig, progress: bool = False) -> Json:
    """Fit the published probe, and the same on splits that keep questions or entities together.

    Returns:
        `n` rows, `layers`, `majority` (accuracy of always saying the commoner class), `accuracy[]` by layer on one
        random fifth of the rows, as published, and under `by.<random|question|entity>`: `accuracy[]` on all rows held
        out in turn, with `ci[]`. `leakage.<question|entity>` is at the layer that is best by the published figure, as
        one would report it: `layer`, `published`, `grouped` and their `difference`, from the same replicates. Groups
        that are too few for five folds are left out. Where nothing can be fitted, `why_not` says why.
    """
    from gapprobe.probes.sweep import sweep_probes

    rows = runnable(outcomes)
    rows = rows[rows["full_information"].astype(bool)]
    answered = (store.rows["answer"].fillna("") != "").reindex(rows["visual_row"]).to_numpy()
    rows = rows[answered].set_index("visual_row")
    right = rows["visual"].to_numpy(dtype=bool)
    layers = [layer for layer in LAYERS if layer in store.header.layers] or list(store.header.layers)
    nothing: Json = {"n": len(rows), "layers": layers, "majority": None, "accuracy": None, "by": {}, "leakage": {}}
    if not len(rows):
        return nothing | {"why_not": "no trial has a right full-information answer"}
    splits, refused = cut(rows, ("random", *GROUPS), FOLDS, config.seed)
    if "random" not in splits:
        return nothing | {"why_not": refused["random"]}
    try:
        sweep = sweep_probes(
            store,
            rows["visual"].astype(bool),
            position="last_output",
            layers=layers,
            splits=splits,
            controls=[],
            folds=FOLDS,
            strengths=[1.0],
            seed=config.seed,
            replicates=config.probe.replicates,
            progress=progress,
        )
    except DataError as error:
        return nothing | {"why_not": str(error)}
    weights = weights_for(rows, config.probe.replicates, config.seed)
    hits: dict[str, Bool[np.ndarray, "l n"]] = {
        split: (sweep.cell(split=split).scores[:, 0] > 0) == right for split in splits
    }
    fifth = sweep.cell(split="random").folds.outer == 0
    published = hits["random"][:, fifth].mean(1)
    best = int(published.argmax())
    means = {split: [stats.mean(line.astype(np.float64), weights) for line in found] for split, found in hits.items()}
    return {
        "n": len(rows),
        "layers": layers,
        "majority": float(max(right.mean(), 1 - right.mean())),
        "accuracy": [number(value) for value in published],
        "by": {
            split: {"accuracy": [number(e.value) for e in found], "ci": [interval(e) for e in found]}
            for split, found in means.items()
        },
        "leakage": {
            group: {
                "layer": layers[best],
                "published": measured(means["random"][best], "accuracy"),
                "grouped": measured(means[group][best], "accuracy"),
                "difference": measured(
                    stats.mean(hits["random"][best].astype(np.float64) - hits[group][best], weights), "value"
                ),
            }
            for group in GROUPS
            if group in splits
        },
    }
