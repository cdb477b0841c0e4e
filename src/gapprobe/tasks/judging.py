"""Is an answer right? The published rule, and a sound one that is the default.

The published rule (case-insensitive inclusion either way) lets "1" match "12" and "" match everything. The sound one
looks for the gold answer in the given one, word by word after normalisation (`gapprobe.tasks.normal`). Neither reads
what an answer says about the words: "not Paris" holds Paris. docs/judging.md has what is normalised and what is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from gapprobe.errors import DataError
from gapprobe.tasks.normal import find, words

Judge = Callable[[str, Sequence[str]], bool]


def judge_sound(answer: str, gold: Sequence[str]) -> bool:
    """Return whether any of the `gold` answers (the answer and its aliases) stands in `answer` as whole words."""
    return any(find(answer, option) for option in gold)


def judge_published(answer: str, gold: Sequence[str]) -> bool:
    """Return whether either holds the other, ignoring case (arXiv 2508.18297). An empty answer is always right."""
    given = answer.strip().casefold()
    return any(option.casefold() in given or given in option.casefold() for option in gold)


JUDGES: dict[str, Judge] = {"sound": judge_sound, "published": judge_published}


def judge_answers(
    answers: Mapping[str, object], gold: Mapping[str, Sequence[str]], judges: Mapping[str, Judge] = JUDGES
) -> pd.DataFrame:
    """Judge the same answers by several judges, for `agreement`.

    Args:
        answers: by row id (of a store: `store.rows["answer"].to_dict()`).
        gold: the gold answer and its aliases, by row id; ids without an answer are not looked at.
        judges: by name; each says whether an answer is right.

    Returns:
        One line a row of `answers`: `answer`, `gold` (joined by " | "), and a column of truth values a judge.

    Raises:
        DataError: an answer that is no text, or without gold answers, or with a bare string in place of several.
    """
    lines: list[tuple[object, ...]] = []
    for id_, answer in answers.items():
        right = gold.get(id_, ())
        if not isinstance(answer, str):
            raise DataError(f"the answer of row {id_} is {answer!r} and no text; leave out rows that were not run")
        if not right or isinstance(right, str):
            raise DataError(f"row {id_} has the gold answers {right!r}; give a list of the answer and its aliases")
        lines.append((answer, " | ".join(right), *(judge(answer, right) for judge in judges.values())))
    return pd.DataFrame(lines, index=list(answers), columns=["answer", "gold", *judges])


def majority(answers: Sequence[str]) -> str:
    """Return the answer that most of `answers` agree on after normalisation; of equals, the earliest."""
    keys = [" ".join(words(answer)) for answer in answers]
    counts = Counter(keys)
    return max(zip(answers, keys, strict=True), key=lambda pair: counts[pair[1]])[0]
