"""A few linking failures to look at: the picture, what was asked, and what the model said."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
import PIL.Image

from gapprobe.study.outcomes import counted
from gapprobe.study.results import Json
from gapprobe.tasks.questions import QuestionSet
from gapprobe.tasks.settings import Trial

LARGEST_SIDE = 224  # pixels; larger pictures are shown smaller


def linking_failures(
    trials: Sequence[Trial], outcomes: pd.DataFrame, questions: QuestionSet, *, most: int, seed: int
) -> list[Json]:
    """Draw up to `most` trials that count and whose visual answer is wrong, first of all different relations."""
    by_id = {trial.id: trial for trial in trials}
    failures = counted(outcomes).query("not visual").sample(frac=1, random_state=np.random.default_rng(seed))
    turn = failures.groupby("relation").cumcount()
    drawn = failures.loc[turn.sort_values(kind="stable").index[:most]]
    return [
        {
            "image": data_uri(by_id[str(trial)].image.load()),
            "entity": row["entity"],
            "relation": row["relation"],
            "question": by_id[str(trial)].question.referring(questions.reference),
            "gold": row["gold"],
            "visual_answer": row["visual_answer"],
            "text_answer": row["text_only_answer"],
            "identification_answer": row["identification_answer"],
        }
        for trial, row in drawn.iterrows()
    ]


def data_uri(image: PIL.Image.Image) -> str:
    """Return a picture as a PNG data URI, shrunk to at most 224 pixels a side."""
    image = image.copy()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
