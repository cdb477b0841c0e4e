"""From the examples of a batch to the tensors that the model reads. No model is run here.

What cannot be run is told by why. Two threads may prepare at once if each has a `Preparation` of its own model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.models.model import Medium, Model
from gapprobe.models.sites import IN_TOWER, Site
from gapprobe.tasks.examples import Example
from gapprobe.tracing.positions import Position
from gapprobe.tracing.tokens import TokenTable, plain_table, token_tables


@dataclass(frozen=True)
class Failure:
    """Why an example cannot be run, as the columns of its row tell it; and how many tokens it has, where known."""

    error: str
    kind: str
    tokens: int | None = None


@dataclass(frozen=True)
class Prompts:
    """The examples of a batch that can be run: their tensors, and what their tokens are."""

    numbers: tuple[int, ...]
    inputs: dict[str, Tensor]
    tables: tuple[TokenTable, ...]
    marks: tuple[NDArray[np.uint8], ...]
    """By example and token, bit i is set where position i chose the token."""


@dataclass(frozen=True)
class Prepared:
    """A batch: the examples that can be run, if any, and by number why the others cannot."""

    prompts: Prompts | None
    failed: Mapping[int, Failure]


@dataclass(frozen=True)
class Preparation:
    """What a run makes of the examples of a batch before the model reads them.

    Attributes:
        model: for its processor, and for what it can read.
        positions: what tokens to keep.
        new_tokens: longest answer.
        site: where in the model states are read.
    """

    model: Model
    positions: tuple[Position, ...]
    new_tokens: int
    site: Site

    def apart(self) -> Preparation:
        """Return the same with a processor of its own, for another thread.

        A tokenizer's padding is a state of its own, and parts of a batch are encoded anew where memory lacks.
        """
        return replace(self, model=replace(self.model, processor=copy.deepcopy(self.model.processor)))

    def __call__(self, examples: Sequence[Example]) -> Prepared:
        """Return a batch, encoded in main memory."""
        failed: dict[int, Failure] = {}
        media = self._media(examples, failed)
        inputs = self._encode(examples, media, failed)
        if inputs is None:
            return Prepared(None, failed)
        reasons = self.model.unfit(inputs, self.new_tokens)
        if any(reasons):
            lengths = inputs["attention_mask"].sum(1).tolist()
            for i, length, reason in zip(list(media), lengths, reasons, strict=True):
                if reason is not None:
                    failed[i] = Failure(reason, "prompt", length)
                    del media[i]
            inputs = self._encode(examples, media, failed)
        return Prepared(None if inputs is None else self._prompts(examples, media, inputs), failed)

    def _media(self, examples: Sequence[Example], failed: dict[int, Failure]) -> dict[int, Medium | None]:
        """Return the pictures or sounds of the examples that can be read, and put the others into `failed`."""
        media: dict[int, Medium | None] = {}
        for i, example in enumerate(examples):
            kind = "prompt"
            try:
                self.model.refuse_text(example.text)
                kind = "sound" if example.sound else "image"
                if example.medium is None and self.site in IN_TOWER:
                    raise DataError(
                        f"there is no picture or sound, and without one the site {self.site!r} does not run"
                    )
                medium = example.medium.load() if example.medium else None
                if medium is not None:
                    self.model.refuse_medium(medium)
                media[i] = medium
            except DataError as error:
                failed[i] = Failure(str(error), kind)
        return media

    def _encode(
        self, examples: Sequence[Example], media: dict[int, Medium | None], failed: dict[int, Failure]
    ) -> dict[str, Tensor] | None:
        """Return the tensors of the examples in `media`; who spoils them moves to `failed`."""

        def encoded(numbers: Sequence[int]) -> dict[str, Tensor]:
            some = [medium for i in numbers if (medium := media[i]) is not None]
            # Not on a GPU: its memory is the model's, which may be running.
            return self.model.encode([examples[i].text for i in numbers], some or None, device="cpu")

        if not media:
            return None
        # Processors answer pictures they cannot use (an edge of one pixel, say) with nearly any exception.
        try:
            return encoded(list(media))
        except Exception:
            for i in list(media):
                try:
                    encoded([i])
                except Exception as error:
                    told = f"the processor cannot use it: {type(error).__name__}: {error}"
                    failed[i] = Failure(told, "processor")
                    del media[i]
        return encoded(list(media)) if media else None

    def _prompts(
        self, examples: Sequence[Example], media: Mapping[int, Medium | None], inputs: dict[str, Tensor]
    ) -> Prompts:
        ends_only = all(p.of in ("prompt", "answer") and p.part == slice(-1, None) for p in self.positions)
        real = inputs["attention_mask"].bool().numpy()
        ids = [tokens[there] for tokens, there in zip(inputs["input_ids"].numpy(), real, strict=True)]
        if ends_only:
            tables = [plain_table(tokens) for tokens in ids]
        else:
            each = enumerate(media.values())
            boxes = [None if medium is None else self.model.boxes(inputs, row, medium) for row, medium in each]
            tables = token_tables(self.model, [examples[i] for i in media], ids, boxes)
        marks = [marked(len(table), [position.in_prompt(table) for position in self.positions]) for table in tables]
        return Prompts(tuple(media), inputs, tuple(tables), tuple(marks))


def marked(size: int, chosen: Sequence[NDArray[np.int64]]) -> UInt8[np.ndarray, " t"]:
    """Return by token which positions chose it: bit i is set for position i."""
    marks = np.zeros(size, dtype=np.uint8)
    for number, tokens in enumerate(chosen):
        marks[tokens] |= 1 << number
    return marks
