"""The copies of `Standardised` in one compiled sweep over the features."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from gapprobe.kernels.compiled import by_rows, exact, wide
from gapprobe.kernels.products_cpu import memory

SIDE = 64  # rows and features that are turned at once: they stay in the first cache


def fill(
    x: Float[Tensor, "n d"],
    centre: Float64[Tensor, " d"],
    spread: Float64[Tensor, " d"],
    shared: Float32[Tensor, "n e"],
    across: Float32[Tensor, "e n"],
) -> None:
    """Write (x - centre) / spread into all but the last column of `shared`, or row of `across`."""
    (n, d), (rows, (step, _)) = x.shape, memory(x)
    by_row, (along, _) = memory(shared)
    by_column, (apart, _) = memory(across)

    def run(first: int, last: int) -> None:
        _fill(rows, step, d, centre.numpy(), spread.numpy(), by_row, along, by_column, apart, first, last)

    by_rows(run, n, d)


@exact
@no_type_check
def _fill(rows, step, d, centre, spread, by_row, along, by_column, apart, first, last):
    for i in range(first, last, SIDE):
        height = min(SIDE, last - i)
        for start in range(0, d, SIDE):
            width = min(SIDE, d - start)
            middle, unit = centre[start : start + width], spread[start : start + width]
            for r in range(i, i + height):
                mine = rows[r * step + start : r * step + start + width]
                to = by_row[r * along + start : r * along + start + width]
                for c in range(np.uintp(width)):  # of an index that might be negative the compiler would make a gather
                    to[c] = (np.float64(wide(mine[c])) - middle[c]) / unit[c]
            for c in range(start, start + width):
                column = by_row[i * along + c :]
                to = by_column[c * apart + i : c * apart + i + height]
                for r in range(np.uintp(height)):
                    to[r] = column[r * np.uintp(along)]
