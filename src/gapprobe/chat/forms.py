"""Replies of an agreed form, checked against it.

A server that takes a schema holds the model to JSON. Other models, small ones above all, do better at plain lines,
which are read into the same form and pass the same checks. A reply that is neither is asked for again, with other
seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gapprobe.chat.base import Chat, Request

ATTEMPTS = 3
AGAIN_AT = 0.7  # temperature of a request that is sent again: the most probable reply was no use
# What a server that holds a model to a schema may not know; replies are checked for these here in any case.
_CHECKED_HERE = ("title", "description", "pattern", "maxLength", "maxItems")


class Form(BaseModel):
    """What a reply is to hold. Subclasses are forms."""

    model_config = ConfigDict(extra="ignore")

    @classmethod
    def in_words(cls, text: str) -> object:
        """Return what a reply in plain words says, in the form's own terms; None if it says nothing clear."""
        del text
        return None


class YesOrNo(Form):
    """One word."""

    yes: bool

    @classmethod
    def in_words(cls, text: str) -> object:
        """Read yes or no at the start of a reply; a brace begins JSON of another form, whose key "yes" says nothing."""
        found = re.match(r"[^\w{]*(yes|true|no|false)\b", text, re.IGNORECASE)
        return None if found is None else {"yes": found[1].lower() in ("yes", "true")}


F = TypeVar("F", bound=Form)


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


def schema_of(form: type[Form]) -> dict[str, Any]:
    """Return the JSON schema of a form as servers take it: no other fields, nothing that many of them do not know."""

    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return [plain(each) for each in part]
        if not isinstance(part, dict):
            return part
        kept = {key: plain(value) for key, value in part.items() if key not in _CHECKED_HERE}
        return kept | {"additionalProperties": False} if kept.get("type") == "object" else kept

    return plain(form.model_json_schema())


def _attempt(request: Request, form: type[F], attempt: int) -> Request:
    temperature = max(request.temperature, AGAIN_AT) if attempt else request.temperature
    return replace(request, schema=schema_of(form), seed=request.seed + attempt, temperature=temperature)
