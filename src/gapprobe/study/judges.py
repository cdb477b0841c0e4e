"""What every judge makes of the same answers: the gap by each, how far they agree, and where they differ, to read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from gapprobe.study.gap import measure_gap
from gapprobe.study.outcomes import runnable
from gapprobe.study.results import Json, records
from gapprobe.tasks.agreement import agreement
from gapprobe.tasks.settings import SETTINGS

DISAGREEMENTS = 12  # rows given to read


def compare_judges(outcomes: Mapping[str, pd.DataFrame], *, replicates: int, seed: int) -> Json:
    """Measure the gap by every judge, and their agreement on all answers but identifications.

    An answer that several trials share (the text-only one of all images of a size) is one row of the agreement.

    Args:
        outcomes: of the same trials, by judge.
        replicates: of the bootstrap.
        seed: of the bootstrap, and of which disagreements are given.

    Returns:
        `by_judge`: `n` trials that count, accuracies and absolute gap; `agreement`: a row a pair of judges; and
        `disagreements`, of which there are `differ` among `answers`.
    """
    by_judge: Json = {}
    for judge, table in outcomes.items():
        found = measure_gap(table, replicates=replicates, seed=seed)
        by_judge[judge] = {
            "n": found["counted"]["n"],
            **{setting: found["settings"][setting] for setting in ("text_only", "visual")},
            "gap": found["gap"]["absolute"],
        }
    answers = _answers(outcomes)
    if answers.empty or len(outcomes) < 2:
        return {"by_judge": by_judge, "agreement": [], "answers": len(answers), "differ": 0, "disagreements": []}
    found = agreement(answers, ("question", "image"), replicates=replicates, seed=seed)
    differ = found.disagreements
    some = np.sort(np.random.default_rng(seed).permutation(len(differ))[:DISAGREEMENTS])
    return {
        "by_judge": by_judge,
        "agreement": records(found.table),
        "answers": len(answers),
        "differ": len(differ),
        "disagreements": records(differ.iloc[some]),
    }


def _answers(outcomes: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one line a different answer to a question: what was asked, said and meant, and each judge's verdict."""
    first = runnable(next(iter(outcomes.values())))
    parts = [
        pd.DataFrame(
            {
                "setting": setting,
                "row": first[f"{setting}_row"],
                **{name: first[name] for name in ("question", "image", "gold")},
                "answer": first[f"{setting}_answer"],
                **{judge: table.loc[first.index, setting].astype(bool) for judge, table in outcomes.items()},
            }
        )
        for setting in SETTINGS
        if setting != "identification"
    ]
    # The majority answer of a trivial setting belongs to its question, the size of the image and the gold answer.
    return pd.concat(parts).drop_duplicates(["setting", "row", "question", "gold"]).drop(columns="row")
