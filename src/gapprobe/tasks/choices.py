"""Multiple choice: questions with options, and which option an answer chooses: by letter, by text, by log-probability.

An answer that chooses none, or more than one, is no answer; no rule favours one letter over another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gapprobe.errors import DataError
from gapprobe.tasks.normal import find
from gapprobe.tasks.questions import Entity, Question, leaks

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """The options of one question, in the order in which they are shown.

    Attributes:
        options: what can be chosen.
        right: which one is the gold answer.
    """

    options: tuple[str, ...]
    right: int

    @property
    def letter(self) -> str:
        """Return the letter of the right option."""
        return LETTERS[self.right]

    def ask(self, question: str) -> str:
        """Return a question with its options, each on a line with its letter."""
        return "\n".join([question, *(f"{a}. {o}" for a, o in zip(LETTERS, self.options, strict=False))])


def make_choices(
    questions: Sequence[Question],
    distractors: Mapping[str, Sequence[str]] | None = None,
    *,
    entities: Sequence[Entity] = (),
    options: int = 4,
    leave_out: bool = False,
    seed: int = 0,
) -> dict[str, Choices]:
    """Return the options of every question, by its id: the gold answer among distractors.

    Source: arXiv 2508.18297, the multiple-choice form. Over all questions the gold answer stands at each place equally
    often, give or take one, so a model that always says "A" scores one over the number of options.

    Args:
        questions: the questions.
        distractors: wrong answers by question id. Where left out, other entities' answers to the same relation are
            drawn. Those that hold a right answer or another distractor, or stand in one, are passed over.
        entities: what the questions are about; a distractor that names its question's entity is passed over then, for
            it would give away what is only shown.
        options: how many options a question has.
        leave_out: leave out a question that cannot be asked so, in place of refusing them all.
        seed: of the drawing, the order and the places.

    Raises:
        DataError: fewer than two or more than 26 options, or a question with too few distractors, or whose answer names
            its entity ("zéro" and zero).
    """
    if not 2 <= options <= len(LETTERS):
        raise DataError(f"{options} options: a question needs 2 to {len(LETTERS)} of them")
    rng = np.random.default_rng(seed)
    named = {entity.name: entity for entity in entities}
    by_relation: dict[str, list[str]] = {}
    for question in questions:
        by_relation.setdefault(question.relation, []).append(question.answer)
    found: dict[str, list[str]] = {}
    for question in questions:
        pool = by_relation[question.relation] if distractors is None else distractors.get(question.id, ())
        entity = named.get(question.entity)
        drawn: list[str] = []
        for candidate in rng.permutation(np.array(pool, dtype=object)).tolist():
            others = (*question.answers, *drawn)
            known = any(find(candidate, o) or find(o, candidate) for o in others)
            if len(drawn) < options - 1 and not known and not (entity and leaks(candidate, entity)):
                drawn.append(candidate)
        why_not = ""
        if len(drawn) < options - 1:
            why_not = (
                f"has {len(drawn)} distractors that differ from its answer and from each other and do not name its "
                f"entity, and needs {options - 1}; give some, or ask for fewer options"
            )
        elif entity and leaks(question.answer, entity):
            why_not = f"has an answer, {question.answer!r}, that would name its entity among the options; leave it out"
        if not why_not:
            found[question.id] = drawn
        elif not leave_out:
            raise DataError(f"question {question.id} {why_not}")
    turns = -(-len(found) // options)
    places = np.concatenate([rng.permutation(options) for _ in range(turns)]) if turns else np.zeros(0, dtype=int)
    places = rng.permutation(places[: len(found)]).tolist()
    gold = {question.id: question.answer for question in questions}
    return {
        id_: Choices((*drawn[:right], gold[id_], *drawn[right:]), right)
        for (id_, drawn), right in zip(found.items(), places, strict=True)
    }


def chosen_letter(answer: str, options: Sequence[str]) -> int | None:
    """Return the option whose letter an answer gives: "B", "(b)", "B.", "B) Paris", "Answer: B", "the answer is (B)".

    A letter counts where it stands alone, in brackets, before a dot, bracket or colon, or after "answer", "option" or
    "choice". "A or B", two such letters, and a letter without an option choose nothing. "A dog" is an article.
    """
    text = re.sub(r"[*_`\"']", "", answer).strip().casefold()
    last = LETTERS[: len(options)].casefold()[-1]
    one = rf"[(\[]?(?<!\w)([a-{last}])(?!\w)[)\]]?"
    if re.search(rf"{one}\s*(?:,|/|&|\bor\b|\band\b)\s*{one}", text):
        return None
    ends = r"(?=\W*$|\s*[.,:;!)\]]|\s+(?:is|because|since)\b)"
    marked = (
        rf"^\W*([a-{last}])\W*$",
        rf"[(\[]([a-{last}])[)\]]",
        rf"(?<!\w)([a-{last}])\s?[.):\]](?!\w)",
        rf"\b(?:answer|option|choice)(?:\s+is)?(?:\s+option)?\s*:?\s*[(\[]?([a-{last}]){ends}",
    )
    letters = {match[1] for pattern in marked for match in re.finditer(pattern, text)}
    return LETTERS.casefold().index(letters.pop()) if len(letters) == 1 else None


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the option whose text stands in an answer as whole words, as the sound judge finds it.

    An option that is only named as part of a longer one ("York" in "New York") is not named.
    """
    spans = [(start, end, i) for i, option in enumerate(options) for start, end in find(answer, option)]
    named = {
        i for start, end, i in spans if not any(a <= start and end <= b and end - start < b - a for a, b, _ in spans)
    }
    return named.pop() if len(named) == 1 else None


def chosen_either(answer: str, options: Sequence[str]) -> int | None:
    """Return the option that an answer names by letter, by text or by both; none where the two differ."""
    found = {chosen_letter(answer, options), chosen_option(answer, options)} - {None}
    return found.pop() if len(found) == 1 else None


def chosen_by_log_prob(log_prob: Float[np.ndarray, " options"]) -> int | None:
    """Return the option with the highest log-probability; none where several share it.

    Options of more tokens have lower sums: give sums, means over tokens, or sums less those without the question
    (arXiv 2005.14165, section 2.4), and say which.

    Raises:
        DataError: a log-probability that is NaN, or no options.
    """
    if not len(log_prob) or np.isnan(log_prob).any():
        raise DataError(f"log-probabilities of the options are {log_prob.tolist()}; every option needs a number")
    best = np.flatnonzero(log_prob == log_prob.max())
    return int(best[0]) if len(best) == 1 else None


CHOICE_JUDGES: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "letter": chosen_letter,
    "option": chosen_option,
    "either": chosen_either,
}
