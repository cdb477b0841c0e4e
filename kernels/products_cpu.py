"""Matrix products of a few rows with many, compiled for this machine's CPU.

The products of a fit are narrow: a few problems before thousands of rows. A BLAS first copies what it multiplies into
an order of its own, which pays for wide products, and the one that torch brings uses half a vector where the CPU is not
of its maker. Here a tile of the result is held in registers while the rows stream by as they lie, in 16 bits if so they
are (Goto & van de Geijn 2008, without the packing). Every number of a result is added up in the same order whatever is
computed beside it, by however many threads: a fit's way does not depend on the problems that share its products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import no_type_check

from jaxtyping import Float
from torch import Tensor

from gapprobe.kernels import tiles
from gapprobe.kernels.compiled import by_rows, exact, memory
from gapprobe.kernels.tiles import BYTES, COMBINED, DOTS, address

CHUNK = 4096  # bytes of a row that are multiplied at once, about: the right side's rows stay in the first cache
DEPTH = 64  # rows that are added up at once, for the same reason
PANEL = 48  # rows of the left side whose chunks stay in the second cache
WORTH_A_THREAD = 1 << 27  # products: less takes no longer than handing it over


def dots(
    left: Float[Tensor, "p e"],
    right: Float[Tensor, "n e"],
    centre: Float[Tensor, " e"] | None = None,
    out: Float[Tensor, "p n"] | None = None,
) -> Float[Tensor, "p n"]:
    """Return left @ (right - centre).T.

    Args:
        left: float32 or float64, as are `centre` and the result.
        right: in any precision up to that one.
        centre: taken off every row of `right`.
        out: where to write; its rows may lie apart.
    """
    (p, e), n = left.shape, len(right)
    out = left.new_zeros(p, n) if out is None else out.zero_()
    a, (a_step, _) = memory(left)
    b, (b_step, _) = memory(right)
    less = None if centre is None else centre.numpy()
    result, (step, _) = memory(out)

    def run(first: int, last: int) -> None:
        loop_dots(a, a_step, p, b, b_step, first, last, e, less, result, step)

    if out.numel() and e:
        by_rows(run, n, p * e, WORTH_A_THREAD)
    return out


def add_combined(
    left: Float[Tensor, "p n"],
    right: Float[Tensor, "n d"],
    out: Float[Tensor, "p d"],
    centre: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "p d"]:
    """Add left @ (right - centre) to `out`, and return it.

    Args:
        left: as `out`; a transposed matrix is as good as any.
        right: in any precision up to that one.
        out: float32 or float64, changed in place; its rows may lie apart.
        centre: as `out`, taken off every row of `right`.
    """
    (p, n), d = left.shape, right.shape[1]
    a, (a_row, a_step) = memory(left, straight=False)
    b, (b_step, _) = memory(right)
    less = None if centre is None else centre.numpy()
    result, (step, _) = memory(out)
    width = COMBINED[1] * (BYTES // out.itemsize)

    def run(first: int, last: int) -> None:
        loop_combined(a, a_row, a_step, p, b, b_step, n, first * width, min(d, last * width), less, result, step)

    if out.numel() and n:
        by_rows(run, -(-d // width), p * n * width, WORTH_A_THREAD)
    return out


def add_each_dots(
    left: Float[Tensor, "g p e"], right: Float[Tensor, "g n e"], out: Float[Tensor, "g p n"]
) -> Float[Tensor, "g p n"]:
    """Add left[i] @ right[i].T to out[i] for every i, and return it; all in one precision, each in one piece."""
    return _each(_add_each_dots, left, right, out, (left.shape[1], right.shape[1], left.shape[2]))


def add_each_combined(
    left: Float[Tensor, "g p n"], right: Float[Tensor, "g n d"], out: Float[Tensor, "g p d"]
) -> Float[Tensor, "g p d"]:
    """Add left[i] @ right[i] to out[i] for every i, and return it; all in one precision, each in one piece."""
    return _each(_add_each_combined, left, right, out, (left.shape[1], right.shape[1], right.shape[2]))


def _each(loop: Callable[..., None], left: Tensor, right: Tensor, out: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    if out.numel() and left.numel():
        lines = [each.view(-1).numpy() for each in (left, right, out)]
        by_rows(lambda first, last: loop(*lines, *sizes, first, last), len(out), math.prod(sizes), WORTH_A_THREAD)
    return out


@exact
@no_type_check
def loop_dots(left, left_step, p, right, right_step, first, last, e, centre, out, out_step):
    """Add as `dots` does, with rows `first` to `last` of the right side; all in one line of memory each."""
    # Chunks are whole vectors and about as long as each other: a last one of an intercept alone would cost a sweep.
    lanes = BYTES // out.itemsize
    most = CHUNK // out.itemsize
    chunks = max(1, (e + most // 2) // most)
    chunk = ((e + chunks - 1) // chunks + lanes - 1) // lanes * lanes
    for panel in range(0, p, PANEL):
        count = min(PANEL, p - panel)
        passes = (count + DOTS[0] - 1) // DOTS[0]
        fetches = max(1, (DOTS[1] + passes - 1) // passes)
        for start in range(0, e, chunk):
            length = min(chunk, e - start)
            less = address(centre, start)
            for i in range(first, last, DOTS[1]):
                mine = address(right, i * right_step + start)
                across = min(DOTS[1], last - i)
                for t in range(passes):
                    row, stop = panel + count * t // passes, panel + count * (t + 1) // passes
                    # Every pass fetches some of the rows that come next; an address beyond the last one does no harm.
                    soon = i + DOTS[1] + min(DOTS[1] * t // passes, DOTS[1] - fetches)
                    tiles.add_dots(
                        stop - row,
                        address(left, row * left_step + start),
                        left_step,
                        mine,
                        right_step,
                        across,
                        address(right, soon * right_step + start),
                        fetches,
                        less,
                        length,
                        address(out, row * out_step + i),
                        out_step,
                    )


@exact
@no_type_check
def loop_combined(left, left_row, left_step, p, right, right_step, n, first, last, centre, out, out_step):
    """Add as `add_combined` does, to columns `first` to `last`; all in one line of memory each."""
    lanes = BYTES // out.itemsize
    passes = (p + COMBINED[0] - 1) // COMBINED[0]
    fetches = max(1, (COMBINED[1] + passes - 1) // passes)
    for start in range(0, n, DEPTH):
        depth = min(DEPTH, n - start)
        for column in range(first, last, COMBINED[1] * lanes):
            at = start * right_step + column
            less = address(centre, column)
            for t in range(passes):
                row, stop = p * t // passes, p * (t + 1) // passes
                # Every pass fetches some of the vectors that come next, of every row.
                soon = at + (COMBINED[1] + min(COMBINED[1] * t // passes, COMBINED[1] - fetches)) * lanes
                tiles.add_combined(
                    stop - row,
                    address(left, row * left_row + start * left_step),
                    left_row,
                    left_step,
                    address(right, at),
                    right_step,
                    last - column,
                    address(right, soon),
                    fetches,
                    less,
                    depth,
                    address(out, row * out_step + column),
                    out_step,
                )


@exact
@no_type_check
def _add_each_dots(left, right, out, p, n, e, first, last):
    for i in range(first, last):
        loop_dots(left[i * p * e :], e, p, right[i * n * e :], e, 0, n, e, None, out[i * p * n :], n)


@exact
@no_type_check
def _add_each_combined(left, right, out, p, n, d, first, last):
    for i in range(first, last):
        loop_combined(left[i * p * n :], n, 1, p, right[i * n * d :], d, n, 0, d, None, out[i * p * d :], d)
