"""Is an answer right? The published rule, and a sound one that is the default.

The published rule (case-insensitive inclusion either way) lets "1" match "12" and "" match everything. The sound
one compares whole words after normalisation, with numbers as words or digits, and only looks for the gold answer in
the given one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()  # noqa: SIM905 (a list of quoted words is harder to read and check)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUE = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """Split `text` into normalised words: casefolded, no punctuation or articles, numbers below 100 as digits."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    raw = re.findall(r"\w+", folded)
    result: list[str] = []
    previous_is_tens = False
    for word in raw:
        value = _VALUE.get(word)
        if value is not None and previous_is_tens and 0 < value < 10:
            result[-1] = str(int(result[-1]) + value)
        elif word not in _ARTICLES or len(raw) == 1:
            result.append(word if value is None else str(value))
        previous_is_tens = word in _TENS
    return result


def judge_sound(answer: str, gold: Sequence[str]) -> bool:
    """Return whether any of the `gold` answers stands in `answer` as whole words."""
    given = words(answer)
    for option in gold:
        wanted = words(option)
        if wanted and any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1)):
            return True
    return False


def judge_published(answer: str, gold: Sequence[str]) -> bool:
    """Return whether either holds the other, ignoring case (arXiv 2508.18297). An empty answer is always right."""
    given = answer.strip().casefold()
    return any(option.casefold() in given or given in option.casefold() for option in gold)


JUDGES: dict[str, Callable[[str, Sequence[str]], bool]] = {"sound": judge_sound, "published": judge_published}


def majority(answers: Sequence[str]) -> str:
    """Return the answer that most of `answers` agree on after normalisation; of equals, the earliest."""
    keys = [" ".join(words(answer)) for answer in answers]
    counts = Counter(keys)
    return max(zip(answers, keys, strict=True), key=lambda pair: counts[pair[1]])[0]
