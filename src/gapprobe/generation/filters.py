"""The filters that question-answer pairs pass, one function each: for all pairs, why each must go, "" if it may stay.

Source: arXiv 2508.18297, question generation. Every pair is looked at; none stops the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations

from gapprobe.chat.base import Chat
from gapprobe.chat.forms import Failed, YesOrNo, structured
from gapprobe.generation.asking import ask_closed_book, ask_whether_same, ask_whether_unique
from gapprobe.tasks.judging import judge_sound
from gapprobe.tasks.normal import find, words
from gapprobe.tasks.questions import SLOT, Entity, Question, reason_to_leave_out, with_slot

_LONGEST_RELATION = 60  # characters


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
        text = with_slot(self.question, entity)
        return Question(self.entity, relation_of(text), text, self.answer.strip().rstrip("."))


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
    found: list[str] = []
    for pair in pairs:
        entity = judge.entities[pair.entity]
        found.append(reason_to_leave_out(pair.as_question(entity), entity, judge.reference) or "")
    return found


def unique(pairs: Sequence[Pair], judge: Judge) -> list[str]:
    """Filter 2: the language model judges that no other answer is right."""
    asked = [ask_whether_unique(pair.question, pair.answer, judge.seed) for pair in pairs]
    return [
        f"was not judged: {given.why}" if isinstance(given, Failed) else "not unique" if given.yes else ""
        for given in structured(judge.chat, asked, YesOrNo, progress=judge.progress)
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
    by_entity: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_entity.setdefault(pair.entity, []).append(i)
    alike: list[tuple[int, int]] = []
    for i, j in (both for places in by_entity.values() for both in combinations(places, 2)):
        if found[i] or found[j]:
            continue
        if f" {plain[i]} " in f" {plain[j]} " or f" {plain[j]} " in f" {plain[i]} ":
            found[j] = f"holds or is held by: {pairs[i].question}"
        elif find(pairs[i].answer, pairs[j].answer) or find(pairs[j].answer, pairs[i].answer):
            alike.append((i, j))
    asked = [ask_whether_same(pairs[i].question, pairs[j].question, judge.seed) for i, j in alike]
    for (i, j), given in zip(alike, structured(judge.chat, asked, YesOrNo, progress=judge.progress), strict=True):
        # What could not be judged stays: the answer alone makes no duplicate.
        if not isinstance(given, Failed) and given.yes and not found[i]:
            found[j] = found[j] or f"asks the same as: {pairs[i].question}"
    return found


def relation_of(text: str) -> str:
    """Return what groups questions that are alike but for their entity: the words around its slot."""
    plain = re.sub(r"\W+", " ", text.replace(SLOT, "_").casefold()).strip()
    if len(plain) <= _LONGEST_RELATION:
        return plain
    return f"{plain[:_LONGEST_RELATION].rstrip()} {sha256(plain.encode()).hexdigest()[:8]}"


FILTERS: Mapping[str, Filter] = {"form": well_formed, "unique": unique, "known": known, "duplicate": new}
