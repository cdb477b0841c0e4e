"""One call of a model: a prompt and an image. What it is for stands in `columns`, read by the table of rows alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gapprobe.tasks.images import ImageSource

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A prompt without image placeholder, the image or None, and columns to keep beside the activations.

    `spans` says what stretches of the text are, as characters from start to end, by token role: `entity`, `reference`,
    `answer_cue`, `system`; the rest of the text is `question`. A token belongs to a stretch if it shares a character
    with it; where stretches overlap, the role named last counts.
    """

    text: str
    image: ImageSource | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict[str, Sequence[Span]])


def mentions(text: str, phrase: str) -> tuple[Span, ...]:
    """Return where a phrase stands in a text, every time, in any casing, and never inside a longer word.

    >>> mentions("A can can hold; CAN it? Canada can't.", "can")
    ((2, 5), (6, 9), (16, 19), (31, 34))
    """
    if not phrase.strip():
        return ()
    found = re.finditer(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, re.IGNORECASE)
    return tuple(match.span() for match in found)
