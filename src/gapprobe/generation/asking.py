"""What a language model is asked while questions are made, and replies of an agreed form, checked against it.

The wording is ours; the steps are those of arXiv 2508.18297. A server that takes a schema holds the model to JSON.
Other models, small ones above all, do better at the plain lines that the examples show, which are read into the same
form and pass the same checks. A reply that is neither is asked for again, then recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from gapprobe.chat.base import Chat, Request

ATTEMPTS = 3
AGAIN_AT = 0.7  # temperature of a request that is sent again: the most probable reply was no use

Line = Annotated[str, StringConstraints(strip_whitespace=True, max_length=500, pattern=r"^[^\x00-\x08]*$")]


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore")

    @classmethod
    def in_words(cls, text: str) -> object:
        """Return what a reply in plain words says, in the form's own terms; None if it says nothing clear."""
        del text
        return None


class ProposedPair(_Form):
    """A question and its answer."""

    question: Line
    answer: Line


class Proposed(_Form):
    """What a passage gave."""

    pairs: Annotated[list[ProposedPair], Field(max_length=20)]

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read lines of "Question: …?" and "Answer: …", or "… ?" and "The answer is …"."""
        found = [{"question": q, "answer": a} for q, a in _PAIR.findall(text)]
        return {"pairs": found[:20]} if found else None


class Another(_Form):
    """Whether another answer is right too."""

    another_right: bool

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read yes or no."""
        said = _yes_or_no(text)
        return None if said is None else {"another_right": said}


class Same(_Form):
    """Whether two questions ask the same."""

    same: bool

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read yes or no."""
        said = _yes_or_no(text)
        return None if said is None else {"same": said}


class Distractors(_Form):
    """Wrong answers."""

    distractors: Annotated[list[Line], Field(max_length=20)]

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read a list with a number or a dash before each item."""
        found = _ITEM.findall(text)
        return {"distractors": found[:20]} if found else None


F = TypeVar("F", bound=_Form)
_PAIR = re.compile(
    r"^\W*(?:\d+\W+)?(?:question[\W\d]*?:[*_\s]*)?(\S.*\?)[*_ \t]*\n+"
    r"\W*(?:the )?answer[\W\d]*?(?::|is\b)[*_ \t]*(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Failed:
    """No reply of the agreed form: why, and what was said last."""

    why: str
    said: str = ""


def structured(
    chat: Chat, requests: Sequence[Request], form: type[F], *, attempts: int = ATTEMPTS, progress: bool = False
) -> list[F | Failed]:
    """Ask for replies of a form, in the order of `requests`; those of another form again, drawn with other seeds."""
    found: list[F | Failed] = [Failed("not asked")] * len(requests)
    left = list(range(len(requests)))
    for attempt in range(attempts):
        asked = [_attempt(requests[i], form, attempt) for i in left]
        for k, reply in chat.ask(asked, progress=progress):
            # The client has tried again already what may pass.
            found[left[k]] = Failed(reply.error) if reply.error else read(reply.text, form, reply.cut)
        left = [i for i in left if isinstance(given := found[i], Failed) and given.said]
        if not left:
            break
    return found


def _attempt(request: Request, form: type[F], attempt: int) -> Request:
    temperature = max(request.temperature, AGAIN_AT) if attempt else request.temperature
    return replace(request, schema=form.model_json_schema(), seed=request.seed + attempt, temperature=temperature)


def read(text: str, form: type[F], cut: bool = False) -> F | Failed:
    """Return the first JSON object of a form in a reply, which may have words or a fence around it; else its words.

    The last line of a reply that was `cut` off is not taken for what it was to be.
    """
    decoder = json.JSONDecoder()
    why = "no JSON object in the reply"
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
            return form.model_validate(value)
        except (ValidationError, ValueError, RecursionError) as error:
            why = f"not of the agreed form: {' '.join(str(error).split())[:200]}"
        start = text.find("{", start + 1)
    if (told := form.in_words(text.rpartition("\n")[0] if cut else text)) is not None:
        try:
            return form.model_validate(told)
        except ValidationError as error:
            why = f"not of the agreed form: {' '.join(str(error).split())[:200]}"
    return Failed(why, text or "(nothing)")


def _yes_or_no(text: str) -> bool | None:
    found = re.match(r"\W*(yes|true|no|false)\b", text, re.IGNORECASE)
    return None if found is None else found[1].lower() in ("yes", "true")


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
