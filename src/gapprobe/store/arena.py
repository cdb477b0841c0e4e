"""Memory for the rows of one shard, laid out as the shard will be: a layer's tokens side by side.

Copying a row in is the only copy between the caller's tensors and the file, and there is none where the caller asks
for the place of rows before they are made. An arena is used again and again, for the first touch of fresh memory costs
as much as writing it to a disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor

from gapprobe.kernels.memory import fresh
from gapprobe.store.format import StoredRow, StoreHeader, Value
from gapprobe.store.moments import take

# Rows without tokens take no room in a shard, but their columns do in memory.
MAX_ROWS = 1 << 16
# Of the columns of a shard's rows, far below what its table may take.
MAX_COLUMN_BYTES = 256 << 20
_SIZED = {str, list}


def token_bytes(header: StoreHeader) -> int:
    """Return how much of a shard a token takes."""
    return len(header.layers) * header.width * header.torch_dtype.itemsize + 18


def table_bytes(rows: Sequence[StoredRow]) -> int:
    """Return about how much memory the table of some rows takes, rather more than less."""
    names = set[str]().union(*(row.columns for row in rows))
    return _cell_bytes(len(rows), names) + sum(_content_bytes(row.id, row.columns) for row in rows)


def _cell_bytes(rows: int, names: Collection[str]) -> int:
    # In a table, each row has a cell in each column, also in those that only others have.
    return 8 * rows * len(names)


def _content_bytes(id_: str, columns: Mapping[str, Value]) -> int:
    return _value_bytes(id_) + sum(_value_bytes(value) for value in columns.values() if isinstance(value, str | list))


def _value_bytes(value: Sequence[object]) -> int:
    # Lists of numbers may be long, and are told by their types alone.
    if isinstance(value, str) or _SIZED.isdisjoint(map(type, value)):
        return 8 * len(value)
    return 8 * len(value) + sum(_value_bytes(item) for item in value if isinstance(item, str | list))


def _as_bytes(residual: Shaped[Tensor, "l t d"]) -> UInt8[np.ndarray, "l t b"]:
    given = residual.detach().cpu()
    if given.stride(-1) != 1:
        # A copy, not `contiguous`: the stride of an axis of length one may be anything, and a view as bytes minds it.
        given = given.clone(memory_format=torch.contiguous_format)
    return given.view(torch.uint8).numpy()


class _Line(NamedTuple):
    """A row: its id and columns, and where its tokens end."""

    id: str
    columns: Mapping[str, Value]
    end: int


class Arena:
    """Room for `capacity` tokens, which takes memory only as it is filled.

    What is in it is one list of rows, so that whoever is interrupted has added a batch or nothing.
    """

    def __init__(self, header: StoreHeader, capacity: int) -> None:
        self.capacity = capacity
        self._positions = len(header.positions)
        # No huge pages: rows come a few tokens at a time and would touch one in every layer, and touching it costs more
        # than the small pages of what is used (0.85 s against 0.23 s for 327 MB in 31 layers, in a virtual machine).
        shape = len(header.layers), capacity, header.width
        self._residual = fresh(shape, header.torch_dtype, huge=False)
        self._bytes = self._residual.view(torch.uint8).numpy()
        self._numbers = torch.empty(2, capacity, dtype=torch.int64)
        self._codes = torch.empty(2, capacity, dtype=torch.uint8)
        self.clear()

    def clear(self) -> None:
        """Forget all rows; the memory stays."""
        self._lines: list[_Line] = []
        self._names: set[str] = set()
        self._content_bytes = 0

    def fits(self, rows: Sequence[StoredRow]) -> bool:
        """Return whether these rows, together, have room."""
        count, names = self.rows + len(rows), self._names.union(*(row.columns for row in rows))
        content = self._content_bytes + sum(_content_bytes(row.id, row.columns) for row in rows)
        return (
            self.tokens + sum(len(row.token_ids) for row in rows) <= self.capacity
            and count <= MAX_ROWS
            and _cell_bytes(count, names) + content <= MAX_COLUMN_BYTES
        )

    @property
    def full(self) -> bool:
        """Return whether no row with tokens would fit any more."""
        return self.tokens >= self.capacity or self.rows >= MAX_ROWS

    def place(self, tokens: int) -> Shaped[Tensor, "l t d"]:
        """Return where the next so many tokens go, if they fit."""
        return self._residual[:, self.tokens : self.tokens + tokens]

    def add(self, rows: Sequence[StoredRow]) -> None:
        """Copy rows that fit; residuals that stand at their place already are left there."""
        ends = self.tokens + np.cumsum([len(row.token_ids) for row in rows])
        places = [slice(int(end) - len(row.token_ids), int(end)) for end, row in zip(ends, rows, strict=True)]
        moved = [k for k, row in enumerate(rows) if not self._stands(row.residual, places[k])]
        # What stands elsewhere in here must not be written over before it has moved.
        given = [r.clone() if self._holds(r) else r for r in (rows[k].residual for k in moved)]
        for k, residual in zip(moved, given, strict=True):
            # numpy copies in the calling thread; torch would wake threads that sealing needs.
            self._bytes[:, places[k]] = _as_bytes(residual)
        whole = slice(self.tokens, int(ends[-1]))
        self._numbers[0, whole].copy_(torch.cat([row.token_ids for row in rows]))
        self._numbers[1, whole].copy_(torch.cat([row.token_positions for row in rows]))
        self._codes[0, whole].copy_(torch.cat([row.token_roles for row in rows]))
        self._codes[1, whole].copy_(torch.cat([row.token_marks for row in rows]))
        # Last, and at once: what fails or is stopped on the way has added nothing.
        self._enter([_Line(row.id, dict(row.columns), end) for row, end in zip(rows, ends.tolist(), strict=True)])

    def _holds(self, residual: Tensor) -> bool:
        return residual.untyped_storage().data_ptr() == self._residual.untyped_storage().data_ptr()

    def _stands(self, residual: Shaped[Tensor, "l t d"], here: slice) -> bool:
        place = self._residual[:, here]
        return (residual.data_ptr(), residual.stride()) == (place.data_ptr(), place.stride())

    def claim(self, ids: Sequence[str], lengths: Sequence[int]) -> slice:
        """Take room for rows without columns; return which tokens are theirs, to be filled through the views below."""
        first, ends = self.tokens, self.tokens + np.cumsum(lengths, dtype=np.int64)
        self._enter([_Line(id_, {}, end) for id_, end in zip(ids, ends.tolist(), strict=True)])
        return slice(first, self.tokens)

    def drop(self, ids: Collection[str]) -> None:
        """Take rows out and close the gaps."""
        lines = self._lines
        self.clear()
        for line, first in zip(lines, [0, *(line.end for line in lines)], strict=False):
            if line.id in ids:
                continue
            here = slice(self.tokens, self.tokens + line.end - first)
            for tensor in (self._residual, self._numbers, self._codes):
                # Rows only move towards the front, but may overlap where they were.
                tensor[:, here] = tensor[:, first : line.end].clone()
            self._enter([line._replace(end=here.stop)])

    def _enter(self, lines: list[_Line]) -> None:
        for line in lines:
            self._names.update(line.columns)
            self._content_bytes += _content_bytes(line.id, line.columns)
        self._lines += lines

    @property
    def rows(self) -> int:
        """Return how many rows there are."""
        return len(self._lines)

    @property
    def tokens(self) -> int:
        """Return how many tokens are taken."""
        return self._lines[-1].end if self._lines else 0

    @property
    def ids(self) -> list[str]:
        """Return the rows' ids."""
        return [line.id for line in self._lines]

    @property
    def columns(self) -> list[Mapping[str, Value]]:
        """Return the rows' columns."""
        return [line.columns for line in self._lines]

    @property
    def _ends(self) -> list[int]:
        return [0, *(line.end for line in self._lines)]

    @property
    def offsets(self) -> Int64[Tensor, " n_1"]:
        """Return where each row's tokens begin, and where the last one's end."""
        return torch.tensor(self._ends)

    @property
    def residual(self) -> Shaped[Tensor, "l t d"]:
        """Return the residuals, each layer of them contiguous."""
        return self._residual[:, : self.tokens]

    @property
    def token_ids(self) -> Int64[Tensor, " t"]:
        """Return the tokens' numbers in the vocabulary."""
        return self._numbers[0, : self.tokens]

    @property
    def token_positions(self) -> Int64[Tensor, " t"]:
        """Return the tokens' places in their sequences."""
        return self._numbers[1, : self.tokens]

    @property
    def token_roles(self) -> UInt8[Tensor, " t"]:
        """Return the tokens' roles."""
        return self._codes[0, : self.tokens]

    @property
    def token_marks(self) -> UInt8[Tensor, " t"]:
        """Return which positions the tokens are marked as."""
        return self._codes[1, : self.tokens]

    def at_position(self, position: int) -> Shaped[Tensor, "l n d"]:
        """Return the residuals of each row's one token at a position; zeros where it has none or several."""
        tokens = np.flatnonzero(self.token_marks.numpy() >> position & 1)
        before = np.searchsorted(tokens, self._ends)
        single = np.flatnonzero(np.diff(before) == 1)
        shape = len(self._residual), self.rows, self._residual.shape[2]
        result = fresh(shape, self._residual.dtype)
        if len(single) == self.rows:
            return take(self._residual, tokens, result)
        result.zero_()[:, single] = take(self._residual, tokens[before[single]], torch.empty_like(result))
        return result
