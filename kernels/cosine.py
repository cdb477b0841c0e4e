"""Cosine similarity of paired rows: raw, less a common centre, and standardised, all from one pass over the rows.

Mathematics: cos(a, b) = a.b / (|a| |b|), of the rows as they are, of a - m and b - m, and of (a - m) / s and
(b - m) / s, with the mean m and the deviation s of every dimension. Raw residual streams share a few huge dimensions
that push every cosine towards one; a centred cosine compares what differs between rows, a standardised one gives all
dimensions the same say. Whitening by the whole covariance is left out on purpose: with fewer rows than dimensions it
shows its shrinkage.

Numbers are widened to float32 as they come from memory and are read once; products are summed in float32 over a few
hundred of them and in float64 beyond. A row that is nothing but rounding after centring, and one that holds NaN or an
infinity, has no direction: its cosine is NaN. A CPU sweeps over the rows in `cosine_cpu`, CUDA and ROCm in a Triton
kernel (`cosine_triton`). Pairing rows is the caller's work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from gapprobe.kernels.products import on_gpu

PIECE = 1 << 17  # numbers of a side that are widened to float64 at once
ROUNDING = 1e-6  # of a float32 row's own length: below it, what is left after centring is not signal
FAINT = 1e-30  # a float32 sum of squares below it may have lost terms to underflow


@dataclass(frozen=True)
class Cosines:
    """Of each pair; NaN where a row has no direction. What was not asked for is None."""

    raw: Float64[Tensor, " n"]
    centred: Float64[Tensor, " n"] | None = None
    standardised: Float64[Tensor, " n"] | None = None


def reference(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None = None,
    std: Float[Tensor, " d"] | None = None,
) -> Float64[Tensor, " n"]:
    """Compute the cosines in float64, all at once: the definition, for reading, for tests and for odd rows."""
    return einsum(units(left, mean, std), units(right, mean, std), "n d, n d -> n")


def units(
    rows: Float[Tensor, "n d"], mean: Float[Tensor, " d"] | None = None, std: Float[Tensor, " d"] | None = None
) -> Float64[Tensor, "n d"]:
    """Return the rows at length 1, in float64; NaN where a row has no direction."""
    x = rows.to(torch.float64, copy=True)
    length = x.norm(dim=1)
    if mean is not None:
        x -= mean.double()
        length = torch.where(x.norm(dim=1) > ROUNDING * length, length, torch.nan)
    if std is not None:
        x *= inverse(std)
    # A length of 0 leaves NaN.
    return x.div_(torch.where(length.isnan(), torch.nan, x.norm(dim=1))[:, None])


def inverse(std: Float[Tensor, " d"]) -> Float64[Tensor, " d"]:
    """Return 1 / std, and 0 for a dimension that never varies: it tells no row from another."""
    return torch.where(std > 0, 1.0 / std.double(), 0.0)


def paired(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None = None,
    std: Float[Tensor, " d"] | None = None,
) -> Cosines:
    """Return the cosine of each row of `left` with the same row of `right`, reading each once. Rows may be strided.

    Args:
        left: float32, bfloat16 or float16, such as a memory map of a store.
        right: as many rows of the same width.
        mean: common centre of the dimensions, for `centred`.
        std: their deviations about it, for `standardised`; wants `mean`.

    Raises:
        ValueError: the two sides differ in shape, or mean or std in width, or there is a std without mean.
    """
    if left.shape != right.shape:
        raise ValueError(f"paired rows want equal shapes, got {tuple(left.shape)} and {tuple(right.shape)}")
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and given.shape[0] != left.shape[1]:
            raise ValueError(f"{name} is {given.shape[0]} wide, the rows are {left.shape[1]} wide")
    if std is not None and mean is None:
        raise ValueError("std is about a mean: give both")
    if on_gpu(left):
        from gapprobe.kernels import cosine_triton  # not everywhere installed, and a third of a second to import

        sums = cosine_triton.sums(left, right, mean, std)
    else:
        sums = sums_on_cpu(left, right, mean, std)
    squares = sums[:, 1:]
    # What float32 does not hold is taken again in float64; where centring leaves nothing there is nothing to take.
    odd = (~squares.isfinite() | (squares < FAINT)).any(1)
    found = sums[:, 0] / squares.prod(1).sqrt()
    for i, setting in enumerate(((None, None), (mean, None), (mean, std))[: len(sums)]):
        kept = (squares[min(i, 1)] > ROUNDING**2 * squares[0]).all(0)
        found[i][~kept] = torch.nan
        for rows in torch.nonzero(odd[0] | (odd[i] & kept))[:, 0].split(max(1, PIECE // max(1, left.shape[1]))):
            found[i][rows] = reference(left[rows], right[rows], *setting)
    return Cosines(*found)


def apart(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None = None,
    std: Float[Tensor, " d"] | None = None,
) -> float:
    """Return the mean cosine of `left[i]` with `right[j]` over all i != j: what a cosine is without being a pair.

    In time linear in n: with unit rows u and v, the sum over all i and j of u_i.v_j is (sum u).(sum v). Of one set with
    itself it is the mean pairwise cosine, the anisotropy of Ethayarajh 2019 (arXiv 1909.00512). Rows
    without a direction are left out; NaN where no two are left.
    """
    sums = left.new_zeros(2, left.shape[1], dtype=torch.float64)
    kept = left.new_zeros(3, dtype=torch.float64)  # of left, of right, of both
    # Small enough for memory that is used again and again.
    matched, step = 0.0, max(1, PIECE // 8 // max(1, left.shape[1]))
    for both in zip(left.split(step), right.split(step), strict=True):
        u, v = (units(x, mean, std) for x in both)
        there = torch.stack([~u.sum(1).isnan(), ~v.sum(1).isnan()])
        for x, own in zip((u, v), there, strict=True):
            x[~own] = 0.0
        sums += torch.stack([u.sum(0), v.sum(0)])
        matched += float(torch.linalg.vecdot(u, v).sum())
        kept += torch.stack([*there.sum(1), there.all(0).sum()])
    pairs = float(kept[0] * kept[1] - kept[2])
    return (float(sums[0] @ sums[1]) - matched) / pairs if pairs else float("nan")


def sums_on_cpu(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None = None,
    std: Float[Tensor, " d"] | None = None,
) -> Float64[Tensor, "v 3 n"]:
    """Return a.b, a.a and b.b of every pair: raw, and centred and standardised where these are asked for."""
    from gapprobe.kernels import compiled, cosine_cpu  # a third of a second to import

    n, d = left.shape
    shift = None if mean is None else torch.stack(parts(mean)).numpy()
    scale = None if std is None else inverse(std).float().numpy()
    out = np.empty((1 + (mean is not None) + (std is not None), 3, n))
    sides = (*compiled.flat(left), *compiled.flat(right))
    compiled.by_rows(lambda a, b: cosine_cpu.sums(*sides, d, shift, scale, a, b, out), n, d)
    return torch.from_numpy(out)


def parts(mean: Float[Tensor, " d"]) -> list[Float32[Tensor, " d"]]:
    """Cut a mean into two float32 that are taken off one after the other, with no more error than float64 leaves.

    Near the mean the first difference is exact (Sterbenz); far from it, its rounding is relative to what is left.
    """
    high = mean.float()
    return [high, (mean.double() - high.double()).float()]
