"""One call of a model: a prompt and an image or a sound.

What it is for stands in `columns`, read by the table of rows alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gapprobe.errors import DataError
from gapprobe.tasks.images import ImageSource
from gapprobe.tasks.sounds import SoundSource

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A prompt without placeholder, the image or sound that goes with it, and columns to keep beside the activations.

    `spans` says what stretches of the text are, as characters from start to end, by token role: `entity`, `reference`,
    `answer_cue`, `system`; the rest of the text is `question`. A token belongs to a stretch if it shares a character
    with it; where stretches overlap, the role named last counts.
    """

    text: str
    image: ImageSource | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict[str, Sequence[Span]])
    sound: SoundSource | None = None

    def __post_init__(self) -> None:
        """Refuse what no model here reads."""
        if self.image is not None and self.sound is not None:
            raise DataError(f"an example has an image ({self.image.name}) or a sound ({self.sound.name}), not both")

    @property
    def medium(self) -> ImageSource | SoundSource | None:
        """Return the image or sound."""
        return self.image or self.sound


def mentions(text: str, phrase: str) -> tuple[Span, ...]:
    """Return where a phrase stands in a text, every time, in any casing, and never inside a longer word.

    >>> mentions("A can can hold; CAN it? Canada can't.", "can")
    ((2, 5), (6, 9), (16, 19), (31, 34))
    """
    if not phrase.strip():
        return ()
    found = re.finditer(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, re.IGNORECASE)
    return tuple(match.span() for match in found)
