"""Rows of a store at one layer and position, read a few at a time from the memory map: no copy of them all is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from gapprobe.kernels.moments import alike
from gapprobe.store.moments import Moments, take
from gapprobe.store.reader import MappedRows

BLOCK = 1 << 21  # numbers that are gathered at once


class Side:
    """Rows of one side at one layer and position, to be read some at a time."""

    def __init__(self, parts: Sequence[MappedRows]) -> None:
        n = sum(len(part.at) for part in parts)
        self._parts = parts
        self._part, self._line = np.empty(n, np.int64), np.empty(n, np.int64)
        for i, part in enumerate(parts):
            self._part[part.places], self._line[part.places] = i, part.at
        self._room = parts[0].lines.new_empty(0, parts[0].lines.shape[1])

    def rows(self, which: slice | Int64[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
        """Return some rows: as they lie in the map if they lie evenly, else in memory that the next call takes."""
        part, line = self._part[which], self._line[which]
        lines = self._parts[part[0]].lines
        if (part == part[0]).all():
            # Every so many lines, as where the settings of a trial lie side by side.
            step = int(line[1] - line[0]) if len(line) > 1 else 1
            if step > 0 and (np.diff(line) == step).all():
                return lines[line[0] : line[-1] + 1 : step]
            return take(lines, line, self._taken(len(line)))
        room = self._taken(len(line))[: len(line)]
        for i in np.unique(part).tolist():
            own = np.flatnonzero(part == i)
            room[own] = self._parts[i].lines[line[own]]
        return room

    def moments(self) -> Iterator[Moments]:
        """Yield the moments of the rows, block by block: of those that are numbers, for one that is not has no centre.

        Blocks follow the order of the rows, never that of shards: where a run was stopped must not show in any bit.
        """
        step = max(1, BLOCK // self._room.shape[1])
        for start in range(0, len(self._part), step):
            x = self.rows(slice(start, start + step))
            mean, variance = alike(x)
            if not bool(variance.isfinite().all()):
                x = x[x.isfinite().all(1)]
                mean, variance = alike(x)
            yield Moments(len(x), mean, variance)

    def _taken(self, count: int) -> Float[Tensor, "m d"]:
        if len(self._room) < count:
            self._room = self._room.new_empty(count, self._room.shape[1])
        return self._room
