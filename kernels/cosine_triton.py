"""Triton kernel of `cosine`, for CUDA and ROCm.

A program takes a few rows of both sides and walks along them once: products of the rows as they are, less the mean, and
over the deviation are all added up from the same numbers, in float32, one lane for every `width`-th dimension. Sums are
added in a fixed order, and there are no atomics: equal bytes in, equal bytes out. Offsets of rows are 64 bits wide.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64
from torch import Tensor

from gapprobe.kernels.cosine import inverse, parts

ROWS = 4
OPTIONS: dict[str, Any] = {"num_warps": 4}


def width(variants: int) -> int:
    """Return how many numbers of a row are taken at once; three, six or nine sums stay in registers."""
    return 1024 if variants == 1 else 256


@triton.jit(do_not_specialize=["n"])
@no_type_check
def sums_kernel(
    left, right, high, low, scale, out,
    n, d, left_row, right_row,
    VARIANTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write a.b, a.a and b.b of a few rows: raw, then centred, then standardised, as many VARIANTS as asked for."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    left_at = left + rows.to(tl.int64)[:, None] * left_row + columns[None, :]
    right_at = right + rows.to(tl.int64)[:, None] * right_row + columns[None, :]
    ab = tl.zeros((ROWS, WIDTH), tl.float32)
    aa = tl.zeros((ROWS, WIDTH), tl.float32)
    bb = tl.zeros((ROWS, WIDTH), tl.float32)
    if VARIANTS > 1:
        ab_centred = tl.zeros((ROWS, WIDTH), tl.float32)
        aa_centred = tl.zeros((ROWS, WIDTH), tl.float32)
        bb_centred = tl.zeros((ROWS, WIDTH), tl.float32)
    if VARIANTS > 2:
        ab_scaled = tl.zeros((ROWS, WIDTH), tl.float32)
        aa_scaled = tl.zeros((ROWS, WIDTH), tl.float32)
        bb_scaled = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, d, WIDTH):
        inside = columns < d - start
        both = (rows < n)[:, None] & inside[None, :]
        a = tl.load(left_at, mask=both, other=0.0).to(tl.float32)
        b = tl.load(right_at, mask=both, other=0.0).to(tl.float32)
        ab += a * b
        aa += a * a
        bb += b * b
        if VARIANTS > 1:
            # Behind the end of a row everything is 0, the mean too.
            first = tl.load(high + start + columns, mask=inside, other=0.0)[None, :]
            rest = tl.load(low + start + columns, mask=inside, other=0.0)[None, :]
            a = (a - first) - rest
            b = (b - first) - rest
            ab_centred += a * b
            aa_centred += a * a
            bb_centred += b * b
        if VARIANTS > 2:
            times = tl.load(scale + start + columns, mask=inside, other=0.0)[None, :]
            a = a * times
            b = b * times
            ab_scaled += a * b
            aa_scaled += a * a
            bb_scaled += b * b
        left_at += WIDTH
        right_at += WIDTH
    at, used = out + rows, rows < n
    line = n.to(tl.int64)
    tl.store(at, tl.sum(ab, axis=1), mask=used)
    tl.store(at + line, tl.sum(aa, axis=1), mask=used)
    tl.store(at + 2 * line, tl.sum(bb, axis=1), mask=used)
    if VARIANTS > 1:
        tl.store(at + 3 * line, tl.sum(ab_centred, axis=1), mask=used)
        tl.store(at + 4 * line, tl.sum(aa_centred, axis=1), mask=used)
        tl.store(at + 5 * line, tl.sum(bb_centred, axis=1), mask=used)
    if VARIANTS > 2:
        tl.store(at + 6 * line, tl.sum(ab_scaled, axis=1), mask=used)
        tl.store(at + 7 * line, tl.sum(aa_scaled, axis=1), mask=used)
        tl.store(at + 8 * line, tl.sum(bb_scaled, axis=1), mask=used)


def sums(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None = None,
    std: Float[Tensor, " d"] | None = None,
) -> Float64[Tensor, "v 3 n"]:
    """Launch `sums_kernel`; the same as `cosine.sums_on_cpu`."""
    n, d = left.shape
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (left, right))
    variants = 1 + (mean is not None) + (std is not None)
    high, low = (None, None) if mean is None else parts(mean)
    scale = None if std is None else inverse(std).float()
    out = left.new_empty(variants, 3, n, dtype=torch.float32)
    if n:
        sums_kernel[(triton.cdiv(n, ROWS),)](
            a, b, high, low, scale, out,
            n, d, a.stride(0), b.stride(0),
            VARIANTS=variants, ROWS=ROWS, WIDTH=width(variants), **OPTIONS,
        )  # fmt: skip
    return out.double()
