"""From answers to outcomes: what was right in each setting, which rows count, and the gap between text and picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from gapprobe.tasks.examples import Example
from gapprobe.tasks.judging import JUDGES, majority
from gapprobe.tasks.questions import QuestionSet
from gapprobe.tasks.settings import SETTINGS, Trial

COUNTED = ""
REASONS = ("could not be run", "identification wrong", "full information wrong", "guess control right")


# Of a trial and setting, with the answers to its calls by row: the answer that counts, and is it right?
Verdict = Callable[[Trial, str, Mapping[str, str]], tuple[str, bool]]


def by_judge(judge: str, questions: QuestionSet) -> Verdict:
    """Return the verdict of a judge, `sound` or `published`, on free answers: the majority one counts."""
    is_right = JUDGES[judge]

    def verdict(trial: Trial, setting: str, answers: Mapping[str, str]) -> tuple[str, bool]:
        entity = questions.entity(trial.question.entity)
        answer = majority(list(answers.values()))
        return answer, is_right(answer, entity.names if setting == "identification" else trial.question.answers)

    return verdict


def judge_trials(
    trials: Sequence[Trial], row_of: Callable[[Example], str], rows: pd.DataFrame, verdict: Verdict
) -> pd.DataFrame:
    """Judge every trial in every setting; one row a trial, in the order of `trials`.

    Args:
        trials: the trials of the study.
        row_of: the store's row id of a call.
        rows: the store's table of rows, indexed by id, with the columns `answer` and `error`.
        verdict: what is right: from `by_judge`, or of multiple choice.

    Returns:
        A table with the columns `question`, `relation`, `entity`, `image`, `gold`, `excluded` (the reason why the row
        does not count, "" if it does), and for each setting `<setting>` (right or not; False where it could not be
        run), `<setting>_answer` and `<setting>_row` (row id; of the first trivial image where there are several).
    """
    answers = rows["answer"].fillna("").to_dict()
    failed = rows["error"].notna().to_dict()
    table: list[dict[str, object]] = []
    for trial in trials:
        record: dict[str, object] = {
            "trial": trial.id,
            "question": trial.question.id,
            "relation": trial.question.relation,
            "entity": trial.question.entity,
            "image": trial.image.name,
            "gold": trial.question.answer,
        }
        runnable = True
        for setting in SETTINGS:
            calls: Example | tuple[Example, ...] = getattr(trial, setting)
            ids = [row_of(call) for call in ((calls,) if isinstance(calls, Example) else calls)]
            ran = bool(ids) and not any(failed[i] for i in ids)
            answer, correct = verdict(trial, setting, {i: answers[i] for i in ids}) if ran else ("", False)
            record[setting] = correct
            record[f"{setting}_answer"] = answer
            record[f"{setting}_row"] = ids[0] if ids else ""
            runnable = runnable and ran
        record["excluded"] = _why_excluded(record, runnable)
        table.append(record)
    return pd.DataFrame(table).set_index("trial")


def _why_excluded(record: dict[str, object], runnable: bool) -> str:
    if not runnable:
        return REASONS[0]
    if not record["identification"]:
        return REASONS[1]
    if not record["full_information"]:
        return REASONS[2]
    return REASONS[3] if record["guess_control"] else COUNTED


def counted(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that count: identification and full information right, guess control wrong."""
    return outcomes[outcomes["excluded"] == COUNTED]


def runnable(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that could be run in every setting."""
    return outcomes[outcomes["excluded"] != REASONS[0]]


def right(outcomes: pd.DataFrame, setting: str) -> np.ndarray:
    """Return whether each trial was right in `setting`, as 0.0 and 1.0."""
    return outcomes[setting].to_numpy(dtype=np.float64)
