"""What is asked of a model that only answers, and what it replies. Nothing is sent from here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Request:
    """One message to a model.

    Attributes:
        text: of the user.
        image: an encoded picture (PNG, JPEG, …), shown before the text.
        system: instruction that stands before the user's message; none if empty.
        max_tokens: length limit of the reply.
        temperature: 0 takes the most probable token, as far as a server lets one.
        seed: of what is drawn; a server may pay no heed to it.
        stop: texts that end a reply and are no part of it.
        schema: JSON schema that the reply is asked to follow. Whether it does is for whoever reads it to check.
        log_probs: ask for the log-probabilities of the reply's tokens.
    """

    text: str
    image: bytes | None = None
    system: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    schema: Mapping[str, object] | None = None
    log_probs: bool = False

    @cached_property
    def key(self) -> str:
        """Return a hash of all that is asked, by which a kept reply is found again."""
        image = None if self.image is None else hashlib.sha256(self.image).hexdigest()
        parts = (self.text, image, self.system, self.max_tokens, float(self.temperature), self.seed)
        # In ASCII: a lone half of a surrogate pair, as damaged files have it, is no UTF-8.
        told = json.dumps([*parts, self.stop, self.schema, self.log_probs], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What a model said, or why it did not.

    Attributes:
        text: of the reply; "" where there is none.
        error: what went wrong, in words; "" where nothing did.
        error_kind: one word for it: `refused` (the model or a filter would not), `request` (the server cannot use it),
            `server`, `network`, `reply` (not of the form that was agreed on).
        log_probs: natural logarithms of the probabilities of the reply's tokens, where they were asked for and given.
        prompt_tokens: read by the model, where it says so.
        completion_tokens: written by the model, where it says so.
        model: that answered, by the server's account.
        cut: the reply reached its length limit, and may end in the middle.
    """

    text: str = ""
    error: str = ""
    error_kind: str = ""
    log_probs: tuple[float, ...] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    cut: bool = False


@runtime_checkable
class Chat(Protocol):
    """A model that answers."""

    def ask(self, requests: Sequence[Request], *, progress: bool = False) -> Iterator[tuple[int, Reply]]:
        """Yield the replies as they come, each with the index of its request.

        A request that fails for good gives a reply with an error. What would fail every request (a wrong key, no such
        model) raises ModelError.
        """
        ...
