"""The sweep of `cosine` on a CPU: every number of both sides is read once, whatever is asked of it."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from gapprobe.kernels.compiled import exact, sweep, wide

SEGMENT = 512  # numbers whose products are added up in float32


@sweep
@no_type_check
def sums(left, left_step, right, right_step, d, shift, scale, first, last, out):
    """Write a.b, a.a and b.b of rows `first` to `last` of two `compiled.flat` sides.

    First as they are, then less a mean (`shift`, in two parts), then also times `scale`. A part that is None is not
    asked for: numba compiles the loop without it.
    """
    for i in range(first, last):
        ab, aa, bb, cd, cc, dd, ef, ee, ff = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for start in range(0, d, SEGMENT):
            x, y, z = np.float32(0), np.float32(0), np.float32(0)
            p, q, r = np.float32(0), np.float32(0), np.float32(0)
            u, v, w = np.float32(0), np.float32(0), np.float32(0)
            # A segment of its own, counted from 0: else an index might be negative, counted from the end for all that
            # the compiler knows, and where there are gathers it makes one of every number.
            stop = min(d, start + SEGMENT)
            mine = left[i * left_step + start : i * left_step + stop]
            other = right[i * right_step + start : i * right_step + stop]
            if shift is not None:
                high, low = shift[0, start:stop], shift[1, start:stop]
            if scale is not None:
                by = scale[start:stop]
            for j in range(stop - start):
                a, b = wide(mine[j]), wide(other[j])
                x += a * b
                y += a * a
                z += b * b
                if shift is not None:
                    a, b = less(a, high[j], low[j]), less(b, high[j], low[j])
                    p += a * b
                    q += a * a
                    r += b * b
                if scale is not None:
                    a, b = a * by[j], b * by[j]
                    u += a * b
                    v += a * a
                    w += b * b
            ab, aa, bb = ab + x, aa + y, bb + z
            cd, cc, dd = cd + p, cc + q, dd + r
            ef, ee, ff = ef + u, ee + v, ff + w
        out[0, 0, i], out[0, 1, i], out[0, 2, i] = ab, aa, bb
        if shift is not None:
            out[1, 0, i], out[1, 1, i], out[1, 2, i] = cd, cc, dd
        if scale is not None:
            out[2, 0, i], out[2, 1, i], out[2, 2, i] = ef, ee, ff


@exact
@no_type_check
def less(x, high, low):
    """Return a number less a mean in two parts (`cosine.parts`): in this order, or the second is lost."""
    return (x - high) - low
