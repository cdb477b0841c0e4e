"""Which calls make up a run, in which batches, and whether the disk has room. No model is run here.

Batches are cut from the full list of examples, never from what is missing in the store: a row's last bits depend on
its batch, and results must not depend on where a run was stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gapprobe.errors import DataError, OutputError
from gapprobe.files import require_room, told_bytes
from gapprobe.models.sites import IN_TOWER
from gapprobe.store.format import DTYPES
from gapprobe.tasks.examples import Example
from gapprobe.tasks.images import ImageSource
from gapprobe.tasks.sounds import SoundSource
from gapprobe.tracing.answers import Decoding
from gapprobe.tracing.batch import Batches
from gapprobe.tracing.positions import Position

# Of one row, beside its residuals: text, answer, log-probabilities and the caller's columns, before compression.
TABLE_BYTES = 2048
# Examples that are encoded before the start, to know how many tokens a row keeps.
SAMPLE = 16
# Of a site in the tower, examples that are run.
RUN_SAMPLE = 2


def row_ids(examples: Sequence[Example], positions: Sequence[Position], decoding: Decoding) -> list[str]:
    """Return the id of each call: a SHA-256 over its text, its image's bytes, the positions and how it is answered.

    What cannot be read counts by its name, so that mending it makes another row. What stretches of the text
    are (`Example.spans`) counts where a position asks for roles.
    """
    names = [f"{p.name}={p.rule}" if p.renamed else p.name for p in positions]
    settings = json.dumps([names, dict(decoding.described)], sort_keys=True)
    by_role = any(position.by_role for position in positions)
    media: dict[ImageSource | SoundSource | None, str] = {None: "none"}
    ids: list[str] = []
    for example in examples:
        if example.medium not in media:
            media[example.medium] = _identity(example.medium)
        # JSON keeps the parts apart, whatever characters they hold.
        parts: list[object] = [settings, media[example.medium], example.text]
        if by_role and example.spans:
            parts.append({role: sorted(map(list, spans)) for role, spans in example.spans.items()})
        ids.append(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())
    return ids


def _identity(medium: ImageSource | SoundSource | None) -> str:
    if medium is None:
        return "none"
    try:
        return hashlib.sha256(medium.read()).hexdigest()
    except DataError:
        return f"unreadable {medium.name}"


def batches(examples: Sequence[Example], ids: Sequence[str], batch_size: int) -> list[list[int]]:
    """Return the indices of examples by batch, each id once (its first example counts).

    A batch has pictures (or sounds) throughout or none; rows are gathered by length of text, so that little is padded.
    """
    first = {id_: index for index, id_ in reversed(list(enumerate(ids)))}
    order = sorted(first.values(), key=lambda i: (examples[i].medium is None, len(examples[i].text), i))
    found: list[list[int]] = []
    for index in order:
        last = found[-1] if found else []
        if last and len(last) < batch_size and (examples[last[0]].medium is None) == (examples[index].medium is None):
            last.append(index)
        else:
            found.append([index])
    return found


@dataclass(frozen=True)
class Need:
    """What rows will take: on disk, and in memory while a batch of them is captured.

    Attributes:
        rows: how many rows are missing.
        layers: how many layers each keeps.
        tokens: how many tokens each keeps, on average.
        longest: the most tokens that a row of the sample keeps.
        width: of the residual stream.
        dtype: of what is stored.
        batch_size: rows run at once.
    """

    rows: int
    layers: int
    tokens: float
    longest: int
    width: int
    dtype: str
    batch_size: int

    @classmethod
    def of(
        cls, run: Batches, examples: Sequence[Example], ids: Sequence[str], missing: Sequence[int], batch_size: int
    ) -> Need:
        """Return the need of the missing examples, from a sample of them.

        It is encoded but not run; of a site in the tower, where only the model knows how many tokens there are, a few
        are run.
        """
        count = RUN_SAMPLE if run.site in IN_TOWER else SAMPLE
        sample = [missing[i] for i in sorted({len(missing) * k // count for k in range(count)})] if missing else []
        kept: list[int] = []
        for with_medium in (True, False):
            some = [i for i in sample if (examples[i].medium is not None) == with_medium]
            if some:
                kept += run.sizes([examples[i] for i in some], [ids[i] for i in some])
        mean = sum(kept) / max(len(kept), 1)
        return cls(len(missing), len(run.layers), mean, max(kept, default=0), run.width, run.dtype, batch_size)

    @property
    def what(self) -> str:
        """Return what there is to keep, in words."""
        size = f"{self.layers} layers x {self.tokens:,.1f} tokens x {self.width} wide"
        return f"{self.rows:,} rows x {size} in {self.dtype}"

    @property
    def bytes(self) -> int:
        """Return the estimate for all rows on disk."""
        return self._disk_bytes(self.dtype)

    @property
    def batch_bytes(self) -> int:
        """Return the estimate for what a batch keeps in main memory: as traced, and as rows."""
        return 2 * self.batch_size * self.layers * self.longest * self.width * DTYPES[self.dtype][1].itemsize

    def require(self, folder: Path, memory: int) -> None:
        """Raise OutputError, with the numbers and a smaller setting, when disk or memory have too little room."""
        require_room(folder, self.bytes, self.what, self._smaller)
        if self.batch_bytes > memory:
            fit = self.batch_size * memory // self.batch_bytes
            mend = f"Use batch_size={fit}." if fit else "Keep fewer layers or fewer tokens, or use dtype='bfloat16'."
            raise OutputError(
                f"{folder}: {self.batch_size} rows at once x {self.layers} layers x {self.longest:,} tokens x "
                f"{self.width} wide in {self.dtype} take about {told_bytes(self.batch_bytes)} of memory, and "
                f"{told_bytes(memory)} are free. {mend}"
            )

    def _layer_bytes(self, dtype: str) -> float:
        return self.tokens * self.width * DTYPES[dtype][1].itemsize

    def _disk_bytes(self, dtype: str) -> int:
        return round(self.rows * (self._layer_bytes(dtype) * self.layers + TABLE_BYTES))

    def _smaller(self, free: int) -> str:
        half = self._disk_bytes("bfloat16")
        if DTYPES[self.dtype][1].itemsize > 2 and half <= free:
            return f"Use dtype='bfloat16' ({told_bytes(half)}), or free some space."
        layer = self._layer_bytes("bfloat16")
        fit = int((free / max(self.rows, 1) - TABLE_BYTES) // max(layer, 1))
        if fit >= 1:
            return f"Use dtype='bfloat16' and at most {fit} layers, or free some space."
        return f"Even one layer in bfloat16 fits for {int(free // (layer + TABLE_BYTES)):,} rows only; free some space."
