"""Which calls make up a run, in which batches, and whether the disk has room. No model is run here.

Batches are cut from the full list of examples, never from what is missing in the store: a row's last bits depend on
its batch, and results must not depend on where a run was stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gapprobe.errors import DataError
from gapprobe.files import require_room, told_bytes
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageSource

# Of one row, beside its residuals: text, answer, log-probabilities and the caller's columns, before compression.
TABLE_BYTES = 2048
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def row_id(example: Example, positions: Sequence[str], generation: Mapping[str, str | int | float]) -> str:
    """Return the id of one call: a SHA-256 over its text, its image's bytes, the positions and how it is answered.

    An image that cannot be read counts by its name, so that mending it makes another row.
    """
    return row_ids([example], positions, generation)[0]


def row_ids(
    examples: Sequence[Example], positions: Sequence[str], generation: Mapping[str, str | int | float]
) -> list[str]:
    """Return `row_id` of each example, reading each image once."""
    settings = json.dumps([list(positions), dict(generation)], sort_keys=True)
    images: dict[ImageSource | None, str] = {None: "none"}
    ids: list[str] = []
    for example in examples:
        if example.image not in images:
            images[example.image] = _identity(example.image)
        # JSON keeps the parts apart, whatever characters they hold.
        whole = json.dumps([settings, images[example.image], example.text])
        ids.append(hashlib.sha256(whole.encode()).hexdigest())
    return ids


def _identity(image: ImageSource | None) -> str:
    if image is None:
        return "none"
    try:
        return hashlib.sha256(image.read()).hexdigest()
    except DataError:
        return f"unreadable {image.name}"


def batches(examples: Sequence[Example], ids: Sequence[str], batch_size: int) -> list[list[int]]:
    """Return the indices of examples by batch, each id once (its first example counts).

    A batch has images throughout or none; rows are gathered by length of text, so that little is padded.
    """
    first = {id_: index for index, id_ in reversed(list(enumerate(ids)))}
    order = sorted(first.values(), key=lambda i: (examples[i].image is None, len(examples[i].text), i))
    found: list[list[int]] = []
    for index in order:
        last = found[-1] if found else []
        if last and len(last) < batch_size and (examples[last[0]].image is None) == (examples[index].image is None):
            last.append(index)
        else:
            found.append([index])
    return found


@dataclass(frozen=True)
class DiskNeed:
    """What rows will take on disk: residuals, and the table beside them."""

    rows: int
    layers: int
    positions: int
    width: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Return the estimate in bytes."""
        return self.rows * (self.layers * self.positions * self.width * BYTES[self.dtype] + TABLE_BYTES)

    def require(self, folder: Path) -> None:
        """Raise OutputError, with the numbers and a smaller setting, when the disk of `folder` has too little room."""
        what = f"{self.rows:,} rows x {self.layers} layers x {self.positions} positions x {self.width} wide"
        require_room(folder, self.bytes, f"{what} in {self.dtype}", self._smaller)

    def _smaller(self, free: int) -> str:
        half = DiskNeed(self.rows, self.layers, self.positions, self.width, "bfloat16")
        if BYTES[self.dtype] > 2 and half.bytes <= free:
            return f"Use dtype='bfloat16' ({told_bytes(half.bytes)}), or free some space."
        layer = DiskNeed(self.rows, 1, self.positions, self.width, "bfloat16")
        fit = (free // max(self.rows, 1) - TABLE_BYTES) // (layer.bytes // max(self.rows, 1) - TABLE_BYTES)
        if fit >= 1:
            return f"Use dtype='bfloat16' and at most {fit} layers, or free some space."
        per_row = (layer.bytes // max(self.rows, 1)) or 1
        return f"Even one layer in bfloat16 fits for {free // per_row:,} rows only; free some space."
