"""Sums down the columns of many rows, in one sweep over memory."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from gapprobe.kernels.compiled import sweep, wide

ROWS = 16  # whose numbers are added up in float32


@sweep
@no_type_check
def sums(rows, step, base, n, out):
    """Add to `out` what every column of n rows of `compiled.flat` is above a base, and the squares of that."""
    d = base.shape[0]
    first, second = np.empty(d, np.float32), np.empty(d, np.float32)
    for start in range(0, n, ROWS):
        first[:], second[:] = 0, 0
        stop = min(n, start + ROWS)
        fours = stop - (stop - start) % 4
        # Four rows at once: what is added to lies in memory, too.
        for i in range(start * step, fours * step, 4 * step):
            w, x, y, z = rows[i : i + d], rows[i + step :], rows[i + 2 * step :], rows[i + 3 * step :]
            for j in range(d):
                p, q = wide(w[j]) - base[j], wide(x[j]) - base[j]
                r, s = wide(y[j]) - base[j], wide(z[j]) - base[j]
                first[j] += (p + q) + (r + s)
                second[j] += (p * p + q * q) + (r * r + s * s)
        for i in range(fours * step, stop * step, step):
            row = rows[i : i + d]
            for j in range(d):
                p = wide(row[j]) - base[j]
                first[j] += p
                second[j] += p * p
        for j in range(d):
            out[0, j] += first[j]
            out[1, j] += second[j]
