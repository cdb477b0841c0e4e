"""The data of the store's benchmark: rows as a capture hands them over, and what reading them back must give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Int64
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.store.format import ROLES, StoredRow, StoreHeader

BATCH = 32
POSITION = "last_output"
# float16 and not bfloat16: numpy, h5py, zarr and Arrow know no bfloat16, and every contestant shall store numbers.
DTYPE = torch.float16
_SHORTEST, _LONGEST = 20, 40
_WEIGHTS = "0" * 64


@dataclass(frozen=True)
class Data:
    """Rows of one study, all in memory.

    Attributes:
        rows: in the order in which they are written; each residual `[l t d]` is a tensor of its own.
        offsets: where each row's tokens begin when all are laid one after another, and where the last one's end.
        shard_bytes: size of a file for contestants that write several.
    """

    rows: tuple[StoredRow, ...]
    offsets: NDArray[np.int64]
    shard_bytes: int = 256 << 20

    @property
    def batches(self) -> list[tuple[StoredRow, ...]]:
        """Return the rows in the portions in which a capture would hand them over."""
        return [self.rows[i : i + BATCH] for i in range(0, len(self.rows), BATCH)]

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return self.rows[0].residual.shape[0]

    @property
    def width(self) -> int:
        """Return the width of the residual stream."""
        return self.rows[0].residual.shape[2]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return int(self.offsets[-1])

    @property
    def bytes(self) -> int:
        """Return the bytes of all residuals."""
        return self.tokens * self.layers * self.width * DTYPE.itemsize

    @property
    def header(self) -> StoreHeader:
        """Return what a gapprobe store is told of these rows."""
        return StoreHeader(
            model={"source": "none", "revision": "", "architecture": "none", "family": "none", "weights": _WEIGHTS},
            processor="none",
            attention="eager",
            padding_side="left",
            dtype=str(DTYPE).removeprefix("torch."),
            layers=tuple(range(self.layers)),
            width=self.width,
            positions=("last_input", POSITION),
            generation={},
            versions={"torch": torch.__version__},
        )

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Return one layer of all rows."""
        return concatenated(self.rows, layer)

    def last(self, layer: int) -> Float16[Tensor, "n d"]:
        """Return the last token of every row."""
        return torch.stack([row.residual[layer, -1] for row in self.rows])

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Return all layers and tokens of some rows."""
        return torch.cat([self.rows[row].residual for row in rows], dim=1)

    def shards(self) -> Iterator[list[StoredRow]]:
        """Yield the rows that go into one file of about `shard_bytes`, whole batches each."""
        held: list[StoredRow] = []
        size = 0
        for batch in self.batches:
            more = sum(row.residual.nbytes for row in batch)
            if held and size + more > self.shard_bytes:
                yield held
                held, size = [], 0
            held, size = [*held, *batch], size + more
        yield held


def make_data(size: int, layers: int = 33, width: int = 1024, seed: int = 0) -> Data:
    """Draw rows of 20 to 40 tokens until they hold `size` bytes; the residual stream grows from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, layers).view(layers, 1, 1)
    rows: list[StoredRow] = []
    made = 0
    while made < size:
        tokens = int(torch.randint(_SHORTEST, _LONGEST + 1, (), generator=generator))
        residual = (torch.randn(layers, tokens, width, generator=generator) * scale).to(DTYPE)
        rows.append(_row(len(rows), residual, generator))
        made += residual.nbytes
    offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)], dtype=np.int64)
    return Data(tuple(rows), offsets)


def row_id(number: int) -> str:
    """Return the id of a row in a gapprobe store."""
    return f"row {number:06d}"


def concatenated(rows: Sequence[StoredRow], layer: int) -> Float16[Tensor, "t d"]:
    """Return one layer of some rows, copied into one tensor."""
    return torch.cat([row.residual[layer] for row in rows])


def offsets_of(rows: Sequence[StoredRow]) -> Int64[Tensor, " rows_1"]:
    """Return where each of these rows begins when they are laid one after another, and where the last one ends."""
    return torch.tensor([0, *(len(row.token_ids) for row in rows)]).cumsum(0)


def _row(number: int, residual: Float16[Tensor, "l t d"], generator: torch.Generator) -> StoredRow:
    tokens = residual.shape[1]
    marks = torch.zeros(tokens, dtype=torch.uint8)
    marks[tokens // 2] |= 1
    marks[-1] |= 2
    return StoredRow(
        id=row_id(number),
        columns={"setting": "visual" if number % 2 else "text_only", "answer": f"answer {number}"},
        residual=residual,
        token_ids=torch.randint(0, 32000, (tokens,), generator=generator),
        token_positions=torch.arange(tokens),
        token_roles=torch.full((tokens,), ROLES["question"], dtype=torch.uint8),
        token_marks=marks,
    )
