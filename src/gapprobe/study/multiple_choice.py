"""The multiple-choice form of a study: options, which one each call chooses, and the gap by each way of reading that.

Source: arXiv 2508.18297, multiple choice. The rules of the study stay: a trial counts where the entity is identified
(an open question), full information is right and the guess control is wrong. A guess is right once in so many options,
so fewer trials count than in the open form.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from gapprobe.errors import ConfigError
from gapprobe.study.gap import measure_gap
from gapprobe.study.outcomes import by_judge, judge_trials
from gapprobe.study.results import Json
from gapprobe.tasks.choices import CHOICE_JUDGES, LETTERS, Choices, chosen_by_log_prob
from gapprobe.tasks.examples import Example
from gapprobe.tasks.questions import QuestionSet
from gapprobe.tasks.settings import Trial

if TYPE_CHECKING:
    import pandas as pd

    from gapprobe.models.model import Model
    from gapprobe.store.reader import Store


@dataclass(frozen=True)
class Compared:
    """How probable the options were.

    Attributes:
        log_probs: of a row's options, in nats.
        what: was compared, in words; "" if nothing.
        why_not: where nothing was.
    """

    log_probs: Mapping[str, Float[np.ndarray, " options"]]
    what: str
    why_not: str


def read_distractors(path: Path) -> dict[str, list[str]]:
    """Read wrong answers by question id from a CSV with the columns `question` and `distractor`, one a line.

    Raises:
        ConfigError: the file is missing, is no CSV in UTF-8, or lacks a column.
    """
    found: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["question"].strip(), []).append(row["distractor"].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"distractors {path} cannot be read: {error}") from error
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"distractors {path} need the columns question and distractor") from error
    return found


def measure_choices(
    trials: Sequence[Trial],
    choices: Mapping[str, Choices],
    row_of: Callable[[Example], str],
    rows: pd.DataFrame,
    compared: Compared,
    questions: QuestionSet,
    *,
    judge: str,
    replicates: int,
    seed: int,
) -> Json:
    """Measure the gap in multiple choice by every way to read which option an answer chooses.

    Args:
        trials: built with `choices`.
        choices: by question id.
        row_of: the row id of a call.
        rows: the answers by row id, with the columns `answer` and `error`.
        compared: how probable the options were.
        questions: for the names of the entities.
        judge: of the identification, an open question.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `options`, `questions`, and under `by.<letter|option|either|log_prob>` what `measure_gap` gives, with `none`:
        the share of calls that chose no option or several. `log_prob_of` says what was compared, `by.log_prob` is null
        and `why_not` says why where it cannot be.
    """
    open_form = by_judge(judge, questions)

    def measured(choose: Callable[[Trial, str, str], int | None]) -> Json:
        read: Counter[bool] = Counter()

        def verdict(trial: Trial, setting: str, answers: Mapping[str, str]) -> tuple[str, bool]:
            if setting == "identification":
                return open_form(trial, setting, answers)
            options = choices[trial.question.id]
            chosen = [choose(trial, row, answer) for row, answer in answers.items()]
            read.update(c is None for c in chosen)
            # Of several trivial images the option that most of them choose; of equals, the earliest.
            counts = Counter(c for c in chosen if c is not None)
            best = max(counts, key=lambda c: counts[c]) if counts else None
            return "" if best is None else options.options[best], best == options.right

        outcomes = judge_trials(trials, row_of, rows, verdict)
        gap = measure_gap(outcomes, replicates=replicates, seed=seed)
        return {**gap, "none": read[True] / max(read.total(), 1)}

    def by_text(read: Callable[[str, Sequence[str]], int | None]) -> Callable[[Trial, str, str], int | None]:
        return lambda trial, _, answer: read(answer, choices[trial.question.id].options)

    found: Json = {name: measured(by_text(read)) for name, read in CHOICE_JUDGES.items()}
    log_probs = compared.log_probs
    if compared.what:
        found["log_prob"] = measured(
            lambda _, row, __: chosen_by_log_prob(log_probs[row]) if row in log_probs else None
        )
    return {
        "options": len(next(iter(choices.values())).options),
        "questions": len(choices),
        "by": {"log_prob": None} | found,
        "log_prob_of": compared.what,
        "why_not": compared.why_not,
    }


def compare_options(
    trials: Sequence[Trial],
    choices: Mapping[str, Choices],
    row_of: Callable[[Example], str],
    store: Store,
    model: Model,
) -> Compared:
    """Read how probable a model found the options, from its last layer at the last input token.

    Args:
        trials: built with `choices`.
        choices: by question id.
        row_of: the store's row id of a call.
        store: of these calls.
        model: that made it.
    """
    tokens, what, why_not = _tokens(choices, model)
    return Compared(_log_probs(trials, tokens, row_of, store, model) if tokens else {}, what, why_not)


def _tokens(choices: Mapping[str, Choices], model: Model) -> tuple[dict[str, list[int]], str, str]:
    """Return the tokens to compare by question, what they are, and why not where there are none.

    Letters, if the model has a token for each of them; else the options' first tokens, if no question has one twice.
    """
    most = max(len(c.options) for c in choices.values())
    letters = [model.first_token(letter) for letter in LETTERS[:most]]
    if len(set(letters)) == most:
        return {q: letters[: len(c.options)] for q, c in choices.items()}, "the letters", ""
    found = {q: [model.first_token(o) for o in c.options] for q, c in choices.items()}
    if twice := [q for q, tokens in found.items() if len(set(tokens)) < len(tokens)]:
        return {}, "", f"letters are no tokens of this model, and two options of {twice[0]} begin with the same token"
    return found, "the first tokens of the options", ""


def _log_probs(
    trials: Sequence[Trial],
    tokens: Mapping[str, Sequence[int]],
    row_of: Callable[[Example], str],
    store: Store,
    model: Model,
) -> dict[str, Float[np.ndarray, " options"]]:
    """Return the log-probabilities of a question's tokens behind its prompt, in nats, by row that ran.

    A row whose residual is no number has none: it chooses nothing, and the others are read.
    """
    from gapprobe.lens.logit import logit_lens

    failed = store.rows["error"].notna()
    asked = {
        row: tokens[trial.question.id]
        for trial in trials
        for call in trial.calls
        if call.columns["setting"] != "identification"
        for row in [row_of(call)]
        if not failed[row]
    }
    most = max(map(len, tokens.values()))
    read = logit_lens(
        store,
        model,
        np.array([[*t, *[-1] * (most - len(t))] for t in asked.values()], dtype=np.int64),
        rows=list(asked),
        position="last_input",
        layers=[model.n_layers],
        top_k=0,
        divergence=False,
    )
    found = {row: read.log_prob[0, i, : len(asked[row])] for i, row in enumerate(asked)}
    return {row: values for row, values in found.items() if not np.isnan(values).any()}
