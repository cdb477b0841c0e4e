"""What the tokens of a prompt are: image, question, entity, …, told after the processor has expanded the image token.

The prompt as text is tokenised once more, with the characters of each token, and laid beside what the model reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray

from gapprobe.models.model import Model
from gapprobe.store.format import ROLES
from gapprobe.tasks.examples import Example

ROLE_NAMES = tuple(ROLES)


# Tokens, and the first character of each with that behind its last.
Told = tuple[Int[np.ndarray, " _"], Int[np.ndarray, "_ 2"]]
# Roles of text, the later the stronger where a token touches two of them.
TEXT_ROLES = ("other", "system", "question", "answer_cue", "reference", "entity")


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one prompt as the model reads them, without padding.

    Attributes:
        ids: numbers in the vocabulary.
        roles: values of `store.format.ROLES`.
        spell: from numbers to what tokens stand for.
        boxes: place in the picture of each image token, left, top, right, bottom as shares of its width and height;
            no area where a token has none.
    """

    ids: Int[np.ndarray, " t"]
    roles: UInt8[np.ndarray, " t"]
    spell: Callable[[list[int]], Sequence[str]] = field(repr=False)
    boxes: Float[np.ndarray, "t 4"]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Return what each token stands for."""
        return tuple(self.spell(self.ids.tolist()))

    def where(self, role: str) -> NDArray[np.int64]:
        """Return the positions of the tokens of a role."""
        return np.flatnonzero(self.roles == ROLES[role])

    def frame(self) -> pd.DataFrame:
        """Return one line a token: position (the index), id, text, role, and place in the picture."""
        left, top, right, bottom = self.boxes.T
        return pd.DataFrame(
            {
                "id": self.ids,
                "text": self.texts,
                "role": [ROLE_NAMES[role] for role in self.roles],
                **{"left": left, "top": top, "right": right, "bottom": bottom},
            },
            index=pd.RangeIndex(len(self), name="position"),
        )


def token_tables(
    model: Model,
    examples: Sequence[Example],
    ids: Sequence[Int[np.ndarray, " _"]],
    boxes: Sequence[Float[np.ndarray, "_ 4"] | None],
) -> list[TokenTable]:
    """Return what the tokens of some prompts are.

    Args:
        model: the model, for its processor.
        examples: the prompts as the user gave them.
        ids: of each, the tokens that the model reads, unpadded.
        boxes: of each, places of the image tokens, in their order; None where they have none, and without a picture.
    """
    media = -1 if model.media_token_id is None else model.media_token_id
    prompts = [
        model.render(example.text, with_image=media in tokens) for example, tokens in zip(examples, ids, strict=True)
    ]
    told = _told(model, prompts)
    return [_table(model, *each) for each in zip(examples, ids, boxes, prompts, told, strict=True)]


def _told(model: Model, prompts: list[str]) -> list[Told]:
    """Return the tokens of rendered prompts, and from which character to which each goes. As `encode` makes them."""
    told = cast(Any, model.tokenizer)(
        prompts, return_offsets_mapping=True, add_special_tokens=not model.begun(prompts[0])
    )
    each = zip(told["input_ids"], told["offset_mapping"], strict=True)
    return [(np.array(tokens), np.array(offsets).reshape(-1, 2)) for tokens, offsets in each]


def _table(
    model: Model,
    example: Example,
    ids: Int[np.ndarray, " t"],
    boxes: Float[np.ndarray, "k 4"] | None,
    prompt: str,
    told: Told,
) -> TokenTable:
    media = ids == (-1 if model.media_token_id is None else model.media_token_id)
    roles = np.zeros(len(ids), dtype=np.uint8)
    roles[media] = ROLES["query" if model.family.queries else "audio" if model.family.modality == "audio" else "image"]
    theirs, offsets = told
    written = _written(model, prompt, example, with_image=bool(media.any()))
    ours, words = np.flatnonzero(~media), np.flatnonzero(theirs != model.media_token_id)
    strongest = _strongest(written, offsets)
    # Image tokens apart, both are the same tokens but for what processors add: separators, a newline at the end.
    blocks = [(0, 0, len(words))]
    if not np.array_equal(theirs[words], ids[ours]):
        match = SequenceMatcher(None, theirs[words].tolist(), ids[ours].tolist(), autojunk=False)
        blocks = [(block.a, block.b, block.size) for block in match.get_matching_blocks()]
    for first, place, size in blocks:
        roles[ours[place : place + size]] = strongest[words[first : first + size]]
    if sum(size for _, _, size in blocks) < len(words) // 2:
        warnings.warn(
            f"{model.source}: the tokens of a prompt are not those of its text, so most of them have no role",
            stacklevel=2,
        )
    order = np.array([ROLES[name] for name in TEXT_ROLES], dtype=np.uint8)
    roles[~media] = order[roles[~media]]
    # What the answer follows is its cue, whatever it says.
    roles[-1] = ROLES["answer_cue"]
    places = np.zeros((len(ids), 4))
    if boxes is not None and len(boxes) == media.sum():
        places[media] = boxes
    return TokenTable(ids, roles, cast(Any, model.tokenizer).convert_ids_to_tokens, places)


def plain_table(ids: Int[np.ndarray, " t"]) -> TokenTable:
    """Return a table that knows no roles but that of the last token: all that the ends of a prompt need."""
    roles = np.zeros(len(ids), dtype=np.uint8)
    roles[-1:] = ROLES["answer_cue"]
    return TokenTable(ids, roles, lambda _: (), np.zeros((len(ids), 4)))


def _strongest(written: UInt8[np.ndarray, " c"], offsets: Int[np.ndarray, "w 2"]) -> UInt8[np.ndarray, " w"]:
    """Return for each token the strongest role that any of its characters has; a token of none (BOS) has none."""
    if not len(offsets):
        return np.zeros(0, dtype=np.uint8)
    # The largest between each start and its end; what lies between an end and the next start is passed over.
    largest = np.maximum.reduceat(np.append(written, np.uint8(0)), offsets.ravel())[::2]
    return np.where(offsets[:, 0] < offsets[:, 1], largest, 0).astype(np.uint8)


def _written(model: Model, prompt: str, example: Example, *, with_image: bool) -> UInt8[np.ndarray, " c"]:
    """Return the role of every character of the rendered prompt, as a number of `TEXT_ROLES`."""
    text = example.text
    start, end = model.text_start(with_image=with_image), len(text)
    if start is None:
        return np.zeros(len(prompt), dtype=np.uint8)
    if prompt[start : start + len(text)] != text:
        # Some templates strip what they are given.
        start, end = start - (len(text) - len(text.lstrip())), len(text.rstrip())
    written = np.full(len(prompt), TEXT_ROLES.index("answer_cue"), dtype=np.uint8)
    written[: max(start, 0)] = TEXT_ROLES.index("system")
    written[max(start, 0) : start + end] = TEXT_ROLES.index("question")
    for role, stretches in example.spans.items():
        for a, b in stretches:
            written[max(start + a, 0) : max(start + min(b, end), 0)] = TEXT_ROLES.index(role)
    return written
