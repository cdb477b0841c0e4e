"""A language model as a third judge: is the given answer right, by its word? Its verdicts stand beside the others'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from gapprobe.chat.base import Chat, Request
from gapprobe.chat.forms import Failed, YesOrNo, structured
from gapprobe.study.outcomes import judge_trials
from gapprobe.tasks.examples import Example
from gapprobe.tasks.judging import majority
from gapprobe.tasks.questions import QuestionSet
from gapprobe.tasks.settings import Trial

if TYPE_CHECKING:
    import pandas as pd

Asked = tuple[str, tuple[str, ...], str]  # question, right answers, the given one


def judge_by_model(
    trials: Sequence[Trial],
    row_of: Callable[[Example], str],
    rows: pd.DataFrame,
    questions: QuestionSet,
    chat: Chat,
    *,
    seed: int = 0,
    progress: bool = False,
) -> tuple[pd.DataFrame, int]:
    """Judge every trial in every setting by a language model; an answer that several trials share is asked about once.

    It is told the question with the entity's name, and never which setting an answer is from.

    Args:
        trials: see `judge_trials`, and so the next two.
        row_of: the row id of a call.
        rows: the answers by row id.
        questions: for the names of the entities.
        chat: the language model.
        seed: of requests.
        progress: show bars.

    Returns:
        What `judge_trials` returns, and how many different answers it gave no verdict on, which count as wrong. An
        empty answer is wrong without being asked about.

    Raises:
        ModelError: the language model cannot be asked.
    """

    def asked(trial: Trial, setting: str, answers: Mapping[str, str]) -> Asked:
        question = trial.question
        if setting == "identification":
            told = questions.identify, questions.entity(question.entity).names
        else:
            told = question.naming(question.entity), question.answers
        return (*told, majority(list(answers.values())))

    wanted: dict[Asked, None] = {}

    def collect(trial: Trial, setting: str, answers: Mapping[str, str]) -> tuple[str, bool]:
        wanted[asked(trial, setting, answers)] = None
        return "", False

    judge_trials(trials, row_of, rows, collect)
    spoken = [item for item in wanted if item[2].strip()]
    given = structured(chat, [ask_whether_right(*item, seed) for item in spoken], YesOrNo, progress=progress)
    right = {item: not isinstance(said, Failed) and said.yes for item, said in zip(spoken, given, strict=True)}

    def verdict(trial: Trial, setting: str, answers: Mapping[str, str]) -> tuple[str, bool]:
        item = asked(trial, setting, answers)
        return item[2], right.get(item, False)

    return judge_trials(trials, row_of, rows, verdict), sum(isinstance(said, Failed) for said in given)


def ask_whether_right(question: str, right: Sequence[str], answer: str, seed: int) -> Request:
    """Return the request to judge an answer."""
    return Request(
        f"Question: {question}\nRight answer: {' or '.join(right)}\nGiven answer: {answer}\n\n"
        "Does the given answer say the same as the right answer? Reply with one word, yes or no.",
        max_tokens=20,
        seed=seed,
    )
