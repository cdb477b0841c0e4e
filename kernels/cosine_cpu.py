"""Sweeps of `cosine` on a CPU: every number of both sides is read once, whatever is asked of it."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from gapprobe.kernels.compiled import exact, sweep, wide

SEGMENT = 512  # numbers whose products are added up in float32


@sweep
@no_type_check
def raw(left, left_step, right, right_step, d, first, last, out):  # noqa: ANN001, ANN201 (compiled by the types it gets)
    """Write a.b, a.a and b.b of rows `first` to `last` of two `compiled.flat` sides."""
    for i in range(first, last):
        # A row of its own: the compiler then knows that no index is negative.
        mine, other = left[i * left_step : i * left_step + d], right[i * right_step : i * right_step + d]
        ab, aa, bb = 0.0, 0.0, 0.0
        for start in range(0, d, SEGMENT):
            x, y, z = np.float32(0), np.float32(0), np.float32(0)
            for j in range(start, min(d, start + SEGMENT)):
                a, b = wide(mine[j]), wide(other[j])
                x += a * b
                y += a * a
                z += b * b
            ab += x
            aa += y
            bb += z
        out[0, i], out[1, i], out[2, i] = ab, aa, bb


@exact
@no_type_check
def less(x, high, low):  # noqa: ANN001, ANN201
    """Return a number less a mean in two parts (`cosine.parts`): in this order, or the second is lost."""
    return (x - high) - low


@sweep
@no_type_check
def shifted(left, left_step, right, right_step, high, low, scale, first, last, out):  # noqa: ANN001, ANN201
    """Write the same of the rows as they are, less a mean, and that times a scale."""
    d = len(high)
    for i in range(first, last):
        mine, other = left[i * left_step : i * left_step + d], right[i * right_step : i * right_step + d]
        ab, aa, bb, cd, cc, dd, ef, ee, ff = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for start in range(0, d, SEGMENT):
            x, y, z = np.float32(0), np.float32(0), np.float32(0)
            p, q, r = np.float32(0), np.float32(0), np.float32(0)
            u, v, w = np.float32(0), np.float32(0), np.float32(0)
            for j in range(start, min(d, start + SEGMENT)):
                a, b = wide(mine[j]), wide(other[j])
                x += a * b
                y += a * a
                z += b * b
                c, e = less(a, high[j], low[j]), less(b, high[j], low[j])
                p += c * e
                q += c * c
                r += e * e
                c, e = c * scale[j], e * scale[j]
                u += c * e
                v += c * c
                w += e * e
            ab, aa, bb = ab + x, aa + y, bb + z
            cd, cc, dd = cd + p, cc + q, dd + r
            ef, ee, ff = ef + u, ee + v, ff + w
        out[0, 0, i], out[0, 1, i], out[0, 2, i] = ab, aa, bb
        out[1, 0, i], out[1, 1, i], out[1, 2, i] = cd, cc, dd
        out[2, 0, i], out[2, 1, i], out[2, 2, i] = ef, ee, ff
