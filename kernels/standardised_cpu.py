"""What `Standardised` does to every number, in compiled sweeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from gapprobe.kernels.compiled import by_rows, exact, memory, sweep, wide

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


def to_shared(
    weights: Float[Tensor, "p c e"], mean: Float[Tensor, "p 1 d"], scaling: Float[Tensor, "p 1 d"]
) -> Float[Tensor, "p c e"]:
    """Return the weights that are to shared features what `weights` are to a problem's own."""
    out = torch.empty_like(weights)
    _by_problem(_to_shared, mean, scaling, weights, out)
    return out


def to_own(pulled: Float[Tensor, "p c e"], mean: Float[Tensor, "p 1 d"], scaling: Float[Tensor, "p 1 d"]) -> None:
    """Make of sums over shared features those over a problem's own, in place."""
    _by_problem(_to_own, mean, scaling, pulled)


def _by_problem(
    loop: Callable[..., None],
    mean: Float[Tensor, "p 1 d"],
    scaling: Float[Tensor, "p 1 d"],
    *all_of: Float[Tensor, "p c e"],
) -> None:
    (p, c, _), d = all_of[0].shape, mean.shape[2]
    told = [each.view(-1).numpy() for each in (mean.contiguous(), scaling.contiguous(), *all_of)]
    by_rows(lambda first, last: loop(c, d, *told, first, last), p, c * d)


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


@sweep
@no_type_check
def _to_shared(c, d, mean, scaling, weights, out, first, last):
    for i in range(first, last):
        middle, factor = mean[i * d : (i + 1) * d], scaling[i * d : (i + 1) * d]
        for k in range(i * c, (i + 1) * c):
            at = k * (d + 1)
            mine, to = weights[at : at + d], out[at : at + d]
            total = weights[at + d]
            for j in range(np.uintp(d)):
                to[j] = mine[j] * factor[j]
                total -= to[j] * middle[j]
            out[at + d] = total


@sweep
@no_type_check
def _to_own(c, d, mean, scaling, pulled, first, last):
    for i in range(first, last):
        middle, factor = mean[i * d : (i + 1) * d], scaling[i * d : (i + 1) * d]
        for k in range(i * c, (i + 1) * c):
            at = k * (d + 1)
            mine, total = pulled[at : at + d], pulled[at + d]
            for j in range(np.uintp(d)):
                mine[j] = (mine[j] - total * middle[j]) * factor[j]
