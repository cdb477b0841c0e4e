"""What a sweep reads of a store, and how each kind of probe sees it: rows, tokens of rows, or rows and their contrasts.

What a probe cannot read is refused here, before any fit.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.probes.base import Probe, reads
from gapprobe.probes.controls import projected
from gapprobe.probes.tokens import Position, Tokens
from gapprobe.store.columns import aligned
from gapprobe.store.reader import Store

Features = Float[Tensor, "n _"] | Tokens


class Reading:
    """Rows of a store at some positions, beside their contrasts where there are any.

    Args:
        store: activations.
        positions: which may be pooled; see `Position`.
        rows: ids, in the order wanted.
        contrast: id of the row that contrasts each.

    Attributes:
        width: features of a row.
        vectors: residuals of a layer that are in memory together, at most: rows, or their tokens.

    Raises:
        DataError: contrasts of rows with several tokens, which are not pooled.
        StoreError: the store lacks a row or position, or a row has no such token.
    """

    def __init__(
        self, store: Store, positions: Sequence[str], rows: Sequence[str], contrast: Sequence[str] | None = None
    ) -> None:
        self.places = {name: Position(store, name, rows) for name in positions}
        self.beside = {name: Position(store, name, contrast) for name in positions} if contrast is not None else {}
        for name, place in (*self.places.items(), *self.beside.items()):
            if self.beside and place.several:
                raise DataError(f"contrast: rows have several tokens at {name!r}; {_pool(name)}")
        self.width = store.header.width * (2 if self.beside else 1)
        self.vectors = max(int(p.lengths.sum()) if p.several else len(rows) for p in self.places.values())

    def __call__(self, position: str, layer: int) -> Features:
        """Return the residuals of all rows at a position and after a layer, each beside its contrast."""
        x = self.places[position].layer(layer)
        if not self.beside:
            return x
        both = (x, self.beside[position].layer(layer))
        return torch.cat([half for half in both if isinstance(half, Tensor)], dim=1)

    def refuse(self, probes: Sequence[Probe]) -> None:
        """Refuse probes that cannot read what there is.

        Raises:
            DataError: a probe of pairs without contrasts, or one of rows at a position of several tokens.
        """
        for probe in probes:
            if reads(probe) == "pairs" and not self.beside:
                raise DataError(
                    f"the probe {probe.name!r} reads pairs: give contrast=, for each row the id of the row that "
                    "contrasts it, as a series or a column of the store's table"
                )
            for name, place in self.places.items():
                if reads(probe) != "tokens" and place.several:
                    raise DataError(_several(probe, name))


def contrasts(table: pd.DataFrame, given: pd.Series | str, ids: Sequence[str]) -> tuple[str, ...]:
    """Return the id of the row that contrasts each row.

    Args:
        table: of the store.
        given: contrasts by row id, or a column of the table.
        ids: rows that are probed.

    Raises:
        DataError: a row without contrast, a contrast that the store lacks, or one that is probed itself: a pair would
            then be counted twice, and could stand on both sides of a split.
    """
    found = tuple(str(i) for i in aligned(table, given, ids, "contrast"))
    stored, probed = set(table.index.astype(str)), set(ids)
    if lost := [i for i in found if i not in stored]:
        raise DataError(f"contrast: the store lacks {len(lost)} of its rows, such as {lost[0]}; give ids of the store")
    if twice := [i for i in found if i in probed]:
        raise DataError(
            f"contrast: {len(twice)} contrasting rows have labels of their own, such as {twice[0]}; label one row of "
            "each pair, so that a pair cannot stand on both sides of a split"
        )
    return found


def seen(probe: Probe, x: Features, position: str, dimensions: int | None, seed: int) -> Features:
    """Return residuals as a probe reads them, or a random projection of them to so many dimensions.

    Rows of one token each are tokens to a probe that reads tokens. Both halves of a pair are projected alike.

    Raises:
        DataError: the probe reads one vector a row, and rows have several tokens.
    """
    kind = reads(probe)
    if isinstance(x, Tokens) and kind != "tokens":
        raise DataError(_several(probe, position))
    if dimensions is not None and isinstance(x, Tokens):
        x = Tokens(projected(x.values, dimensions, seed), x.offsets)
    elif dimensions is not None and isinstance(x, Tensor):
        halves = x.chunk(2, dim=1) if kind == "pairs" else (x,)
        x = torch.cat([projected(half, dimensions, seed) for half in halves], dim=1)
    return Tokens.single(x) if kind == "tokens" and isinstance(x, Tensor) else x


def _several(probe: Probe, position: str) -> str:
    return (
        f"the probe {probe.name!r} reads one vector a row, and rows have several tokens at {position!r}: "
        f"{_pool(position)}, or take a probe that reads tokens, such as attention"
    )


def _pool(position: str) -> str:
    return f"pool them, position='mean({position})' (or max, or last)"
