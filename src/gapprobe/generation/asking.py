"""What a language model is asked while questions are made, and the forms of its replies.

The wording is ours; the steps are those of arXiv 2508.18297.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, StringConstraints

from gapprobe.chat.base import Request
from gapprobe.chat.forms import Form

Line = Annotated[str, StringConstraints(strip_whitespace=True, max_length=500, pattern=r"^[^\x00-\x08]*$")]
_PAIR = re.compile(
    r"^\W*(?:\d+\W+)?(?:question[\W\d]*?:[*_\s]*)?(\S.*\?)[*_ \t]*\n+"
    r"\W*(?:the )?answer[\W\d]*?(?::|is\b)[*_ \t]*(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*(\S.*)$", re.MULTILINE)
MOST = 20  # pairs or wrong answers of one reply


class ProposedPair(Form):
    """A question and its answer."""

    question: Line
    answer: Line


class Proposed(Form):
    """What a passage gave."""

    pairs: Annotated[list[ProposedPair], Field(max_length=MOST)]

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read lines of "Question: …?" and "Answer: …", or "… ?" and "The answer is …"."""
        found = [{"question": q, "answer": a} for q, a in _PAIR.findall(text)]
        return {"pairs": found[:MOST]} if found else None


class Distractors(Form):
    """Wrong answers."""

    distractors: Annotated[list[Line], Field(max_length=MOST)]

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read a list with a number or a dash before each item."""
        found = _ITEM.findall(text)
        return {"distractors": found[:MOST]} if found else None


def ask_for_article(entity: str, seed: int) -> Request:
    """Return the request to write an article of the model's own."""
    return Request(
        f"Write a short encyclopedia article about: {entity}. State facts about {entity} in plain sentences.",
        max_tokens=500,
        seed=seed,
    )


def ask_for_pairs(entity: str, passage: str, seed: int) -> Request:
    """Return the request for questions that a passage answers."""
    return Request(
        "Write questions about facts in the passage. Every question names the subject and makes sense without the "
        "passage. Every answer is one to four words long and does not name the subject.\n\n"
        "Subject: Big Ben\nPassage: Big Ben is a clock tower in London. It was completed in 1859.\n"
        "Question: In which city is Big Ben?\nAnswer: London\n"
        "Question: In which year was Big Ben completed?\nAnswer: 1859\n\n"
        "Subject: kiwi\nPassage: The kiwi is a bird that cannot fly. Kiwis live in New Zealand.\n"
        "Question: In which country does the kiwi live?\nAnswer: New Zealand\n"
        "Question: What kind of animal is the kiwi?\nAnswer: bird\n\n"
        f"Subject: {entity}\nPassage: {passage}\n",
        max_tokens=200,
        seed=seed,
    )


def ask_whether_unique(question: str, answer: str, seed: int) -> Request:
    """Return the request to judge whether a question has another right answer."""
    return Request(
        f"Question: {question}\nAnswer: {answer}\n\n"
        "Could another answer be right, too? Reply with one word, yes or no.",
        max_tokens=20,
        seed=seed,
    )


def ask_closed_book(question: str, seed: int) -> Request:
    """Return the question alone, for the model to answer from what it knows."""
    return Request(
        "Answer in a few words.\n\nQuestion: What is the capital of France?\nAnswer: Paris\n\n"
        f"Question: {question}\nAnswer:",
        max_tokens=20,
        seed=seed,
        stop=("\n",),
    )


def ask_whether_same(first: str, second: str, seed: int) -> Request:
    """Return the request to judge whether two questions ask the same."""
    return Request(
        f"First question: {first}\nSecond question: {second}\n\n"
        "Do the two questions ask for the same fact? Reply with one word, yes or no.",
        max_tokens=20,
        seed=seed,
    )


def ask_for_distractors(question: str, answer: str, seed: int) -> Request:
    """Return the request for three wrong answers of the right one's kind."""
    return Request(
        "Write three wrong answers to the question, as a numbered list. They are of the same kind as the right answer "
        f"and as short.\n\nQuestion: {question}\nRight answer: {answer}\n",
        max_tokens=60,
        seed=seed,
    )
