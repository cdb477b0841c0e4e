"""One call of a model: a prompt and an image. What it is for stands in `columns`, read by the table of rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gapprobe.tasks.images import ImageSource


@dataclass(frozen=True)
class Example:
    """A prompt without image placeholder, the image or None, and columns to keep beside the activations."""

    text: str
    image: ImageSource | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
