"""The filters that question-answer pairs pass, one function each: for all pairs, why each must go, "" if it may stay.

Source: arXiv 2508.18297, question generation. Every pair is looked at; none stops the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from gapprobe.chat.base import Chat
from gapprobe.generation.asking import (
    Another,
    Failed,
    Same,
    ask_closed_book,
    ask_whether_same,
    ask_whether_unique,
    structured,
)
from gapprobe.tasks.judging import judge_sound
from gapprobe.tasks.normal import find, words
from gapprobe.tasks.questions import Entity, Question, leaks, reason_to_drop, with_slot


@dataclass(frozen=True)
class Pair:
    """A question in plain words with its answer, and where it is from: `page` or `model`, and the passage."""

    entity: str
    question: str
    answer: str
    source: str
    passage: str

    def as_question(self, entity: Entity) -> Question:
        """Return it with the slot where its entity was named, its relation made of the words around the slot."""
        return Question(self.entity, "", with_slot(self.question, entity), self.answer.strip().rstrip("."))


@dataclass(frozen=True)
class Judge:
    """Who judges, and about what.

    Attributes:
        chat: the language model.
        entities: by name.
        reference: stands in place of an entity's name when it is only shown.
        seed: of requests.
        progress: show bars.
    """

    chat: Chat
    entities: Mapping[str, Entity]
    reference: str
    seed: int
    progress: bool


Filter = Callable[[Sequence[Pair], Judge], list[str]]


def well_formed(pairs: Sequence[Pair], judge: Judge) -> list[str]:
    """Filter 1: both non-empty, a short answer without the entity, a question that names it and can hide it."""

    def reason(pair: Pair) -> str:
        entity = judge.entities[pair.entity]
        question = pair.as_question(entity)
        if why := reason_to_drop(question, entity):
            return why
        return "question names the entity twice" if leaks(question.referring(judge.reference), entity) else ""

    return [reason(pair) for pair in pairs]


def unique(pairs: Sequence[Pair], judge: Judge) -> list[str]:
    """Filter 2: the language model judges that no other answer is right."""
    asked = [ask_whether_unique(pair.question, pair.answer, judge.seed) for pair in pairs]
    return [
        f"was not judged: {given.why}" if isinstance(given, Failed) else "not unique" if given.another_right else ""
        for given in structured(judge.chat, asked, Another, progress=judge.progress)
    ]


def known(pairs: Sequence[Pair], judge: Judge) -> list[str]:
    """Filter 3: the language model answers it right without the passage."""
    asked = [ask_closed_book(pair.question, judge.seed) for pair in pairs]
    found = [""] * len(pairs)
    for i, reply in judge.chat.ask(asked, progress=judge.progress):
        if reply.error:
            found[i] = f"was not answered: {reply.error}"
        elif not judge_sound(reply.text, [pairs[i].answer]):
            found[i] = f"answered wrong closed-book: {reply.text[:60] or '(nothing)'}"
    return found


def new(pairs: Sequence[Pair], judge: Judge) -> list[str]:
    """Filter 4: no earlier question of the entity holds it or is held by it, or asks the same by the model's judgement.

    The language model is asked only of questions with one answer: those with different ones ask for different facts.
    """
    found = [""] * len(pairs)
    plain = [" ".join(words(pair.question)) for pair in pairs]
    alike: list[tuple[int, int]] = []
    for i, j in combinations(range(len(pairs)), 2):
        if pairs[i].entity != pairs[j].entity or found[i] or found[j]:
            continue
        if f" {plain[i]} " in f" {plain[j]} " or f" {plain[j]} " in f" {plain[i]} ":
            found[j] = f"holds or is held by: {pairs[i].question}"
        elif find(pairs[i].answer, pairs[j].answer) or find(pairs[j].answer, pairs[i].answer):
            alike.append((i, j))
    asked = [ask_whether_same(pairs[i].question, pairs[j].question, judge.seed) for i, j in alike]
    for (i, j), given in zip(alike, structured(judge.chat, asked, Same, progress=judge.progress), strict=True):
        # What could not be judged stays: the answer alone makes no duplicate.
        if not isinstance(given, Failed) and given.same and not found[i]:
            found[j] = found[j] or f"asks the same as: {pairs[i].question}"
    return found


FILTERS: Mapping[str, Filter] = {"form": well_formed, "unique": unique, "known": known, "duplicate": new}
