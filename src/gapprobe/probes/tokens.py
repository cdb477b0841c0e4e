"""Rows of many tokens: what a position names, reading it layer by layer, and pooling it to one vector a row.

A position is a set of tokens ("image"), or that set pooled ("mean(image)"). Pooling walks the shards in blocks: one
layer of a store may be larger than memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import DataError, StoreError
from gapprobe.kernels.memory import fresh
from gapprobe.store.format import ROLES, layer_name
from gapprobe.store.gather import Part
from gapprobe.store.memory import enough_memory
from gapprobe.store.reader import Store
from gapprobe.store.shard import Shard

Pool = Literal["mean", "max", "last"]
Index = slice | Int64[Tensor, " k"] | Bool[Tensor, " n"]
POOLED = re.compile(r"(mean|max|last)\((.+)\)")
BLOCK = 1 << 21  # numbers of a shard pooled at once in float64, 16 MB; a single row may have more


@dataclass(frozen=True)
class Tokens:
    """Tokens of n rows, one row after another, without padding: what a probe gets whose `reads` is "tokens".

    Attributes:
        values: residuals of all tokens.
        offsets: row i has the tokens `offsets[i]` up to but not including `offsets[i + 1]`, at least one.

    Raises:
        DataError: offsets that do not rise from 0 to the number of tokens.
    """

    values: Shaped[Tensor, "t d"]
    offsets: Int64[Tensor, " n_1"]

    def __post_init__(self) -> None:
        """Refuse offsets of other tokens, and rows without any."""
        ends = (int(self.offsets[0]), int(self.offsets[-1])) if len(self.offsets) else None
        if ends != (0, len(self.values)) or not bool((self.offsets.diff() > 0).all()):
            raise DataError(f"offsets must rise from 0 to the {len(self.values)} tokens, one token a row at least")

    @classmethod
    def single(cls, x: Shaped[Tensor, "n d"]) -> Tokens:
        """Return rows of one token each."""
        return cls(x, torch.arange(len(x) + 1))

    @property
    def lengths(self) -> Int64[Tensor, " n"]:
        """Return how many tokens each row has."""
        return self.offsets.diff()

    @property
    def row(self) -> Int64[Tensor, " t"]:
        """Return which row each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, rows: Index) -> Tokens:
        """Return a copy of some rows, as `x[rows]` does of a tensor."""
        chosen = torch.arange(len(self))[rows]
        lengths = self.lengths[chosen]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = self.offsets[chosen] - offsets[:-1]
        return Tokens(self.values[torch.arange(int(offsets[-1])) + shift.repeat_interleave(lengths)], offsets)

    def clone(self) -> Tokens:
        """Return a copy."""
        return Tokens(self.values.clone(), self.offsets.clone())

    def to(self, dtype: torch.dtype) -> Tokens:
        """Return the same in another dtype."""
        return Tokens(self.values.to(dtype), self.offsets)

    def blocks(self, most: int) -> Iterator[slice]:
        """Cut the rows into parts of about `most` tokens, one row at least."""
        return _cuts(self.offsets.numpy(), most)

    def pooled(self, pool: Pool) -> Float[Tensor, "n d"]:
        """Return one vector a row: the mean of its tokens, of each feature the largest, or the last token.

        Means are taken in float64. float64 stays float64, all else becomes float32, in which every narrower value is
        exact; a mean rounded back to bfloat16 would not be.
        """
        out = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        if pool == "last":
            return self.values[self.offsets[1:] - 1].to(out)
        if not len(self):
            return self.values.to(out)
        return torch.segment_reduce(self.values.double(), pool, lengths=self.lengths).to(out)


class Position:
    """What a position names of some rows of a store: which tokens, and how they become one, if they do.

    Args:
        store: activations.
        name: a set of tokens, or `mean(...)`, `max(...)` or `last(...)` of one. A set is one of the store's positions;
            or a role (`gapprobe.store.format.ROLES`), such as "question"; or "all" tokens that the store has of a row.
            Of a position and a role with one name the position is meant.
        rows: ids, in the order wanted; all rows in the order of sealing by default.

    Attributes:
        name: as given.
        pool: how a row's tokens become one vector; None where they do not.
        lengths: tokens of each row, before pooling.

    Raises:
        StoreError: the store lacks a row or the set, or a row has no such token; before any residual is read.
    """

    def __init__(self, store: Store, name: str, rows: Iterable[str] | None = None) -> None:
        self.store, self.name = store, name
        found = None if name in store.header.positions else POOLED.fullmatch(name)
        self.pool: Pool | None = cast(Pool, found[1]) if found else None
        self.chosen = found[2] if found else name
        if self.chosen not in (*store.header.positions, *ROLES, "all"):
            raise StoreError(
                f"{store.path} has no position {self.chosen!r}; it has {', '.join(store.header.positions) or 'none'}. "
                f"Or give a role ({', '.join(ROLES)}), all, or mean(...), max(...) or last(...) of one of these"
            )
        self.ids = store.ids if rows is None else tuple(rows)
        self.parts = [_in_order(part) for part in store.parts(self.ids)]
        self.lengths = np.zeros(len(self.ids), np.int64)
        for part in self.parts:
            _, first, stop = self._bounds(part)
            self.lengths[part.places] = stop - first
        if missing := np.flatnonzero(self.lengths == 0).tolist():
            raise StoreError(
                f"{store.path}: row {self.ids[missing[0]]!r:.80} has no token at {self.chosen!r} ({len(missing)} of "
                f"{len(self.ids)} rows have none). Leave such rows out"
            )

    @property
    def several(self) -> bool:
        """Return whether rows are read as `Tokens`: nothing is pooled, and some row has more tokens than one."""
        return self.pool is None and bool((self.lengths > 1).any())

    @enough_memory()
    def layer(self, layer: int) -> Shaped[Tensor, "n d"] | Tokens:
        """Return the residual stream after one layer: one vector a row, or all tokens where there are several.

        Pooled rows are float32 (see `Tokens.pooled`), all else is in the store's dtype. Only pooled rows, never all of
        their tokens, are in memory at once.

        Raises:
            StoreError: the store lacks the layer, or a file is damaged.
        """
        header = self.store.header
        header.layer_index(layer, self.store.path)
        if self.pool is None and not self.several and self.chosen in header.positions:
            return self.store.layer(layer, position=self.chosen, rows=self.ids)  # a map, or its dense copy
        offsets = np.concatenate([np.zeros(1, np.int64), self.lengths.cumsum()])
        pooled = self.pool is not None
        shape = (1, len(self.ids) if pooled else int(offsets[-1]), header.width)
        out = fresh(shape, torch.float32 if pooled else header.torch_dtype)
        names, rows = [layer_name(layer)], max(1, BLOCK // header.width)
        for part in self.parts:
            for lines, counts, places in self._blocks(part, rows):
                if self.pool is None:
                    part.shard.take(names, lines, out, _within(counts) + np.repeat(offsets[places], counts))
                    continue
                read = torch.empty(1, len(lines), header.width, dtype=header.torch_dtype)
                part.shard.take(names, lines, read, np.arange(len(lines)))
                ends = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), counts.cumsum()]))
                out[0, torch.from_numpy(places)] = Tokens(read[0], ends).pooled(self.pool)
        return Tokens(out[0], torch.from_numpy(offsets)) if self.several else out[0]

    def _bounds(self, part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the lines of a shard that belong to the set, and where among them each row's begin and end."""
        lines = np.flatnonzero(self._marked(part.shard))
        bounds = np.searchsorted(lines, part.shard.offsets)
        return lines, bounds[part.rows], bounds[part.rows + 1]

    def _blocks(
        self, part: Part, most: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Cut a shard's rows into blocks of about `most` tokens: lines of the tokens, tokens by row, places of rows."""
        lines, first, stop = self._bounds(part)
        if self.pool == "last":
            first = stop - 1  # no other token needs to be read
        counts = stop - first
        for some in _cuts(np.concatenate([np.zeros(1, np.int64), counts.cumsum()]), most):
            own = counts[some]
            yield lines[_within(own) + np.repeat(first[some], own)], own, part.places[some]

    def _marked(self, shard: Shard) -> NDArray[np.bool_]:
        """Return which tokens of a shard belong to the set."""
        if self.chosen in self.store.header.positions:
            return (shard.marks >> self.store.header.position_index(self.chosen, shard.path) & 1).astype(bool)
        if self.chosen in ROLES:
            return shard.read("token_roles").numpy() == ROLES[self.chosen]
        return np.ones(shard.tokens, bool)


def _cuts(offsets: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Cut rows into parts of about `most` tokens, one row at least."""
    at = 0
    while at < len(offsets) - 1:
        end = max(at + 1, int(np.searchsorted(offsets, offsets[at] + most, side="right")) - 1)
        yield slice(at, end)
        at = end


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the tokens of each row from 0."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _in_order(part: Part) -> Part:
    """Return the rows of a shard in the order in which they lie on the disk."""
    order = np.argsort(part.rows, kind="stable")
    return replace(part, rows=part.rows[order], places=part.places[order])


def read_position(
    store: Store, layer: int, position: str, rows: Iterable[str] | None = None
) -> Shaped[Tensor, "n d"] | Tokens:
    """Return the residual stream after one layer at a position, which may be pooled: "mean(image)", "last(entity)".

    Args:
        store: activations.
        layer: one of the store's.
        position: tokens, or how they become one; see `Position`.
        rows: ids, in the order wanted; all rows in the order of sealing by default.

    Returns:
        One vector a row; `Tokens` where nothing is pooled and rows have several.

    Raises:
        StoreError: the store lacks the layer, a row or the position, or a row has no such token.
    """
    return Position(store, position, rows).layer(layer)


def finite_rows(x: Shaped[Tensor, "n d"] | Tokens) -> Bool[Tensor, " n"]:
    """Return which rows hold neither NaN nor infinity."""
    if not isinstance(x, Tokens):
        return torch.isfinite(x).all(1)
    bad = ~torch.isfinite(x.values).all(1)
    out = torch.ones(len(x), dtype=torch.bool)
    out[x.row[bad]] = False
    return out
