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
from jaxtyping import Bool, Float, Float32, Float64
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
    sums = _measured(left, right, mean, std)
    return Cosines(*(sums[:, 0] / sums[:, 1:].prod(1).sqrt()))


def apart(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None = None,
    std: Float[Tensor, " d"] | None = None,
) -> Float64[Tensor, " v"]:
    """Return the mean cosine of `left[i]` with `right[j]` over all i != j: what a cosine is without being a pair.

    In time linear in n: with unit rows u and v, the sum over all i and j of u_i.v_j is (sum u).(sum v). Of one set with
    itself it is the mean pairwise cosine, the anisotropy of Ethayarajh 2019 (arXiv 1909.00512). Rows
    without a direction are left out; NaN where no two are left. Arguments and variants are those of `paired`.
    """
    pieces = zip(left.split(_step(left)), right.split(_step(right)), strict=True)
    sums = _directed(torch.cat([_exact(*both, mean, std) for both in pieces], dim=2))
    weights = sums[:, 1:].rsqrt()  # that make a row a unit row
    there = ~weights.isnan()
    matched = (sums[:, 0] * weights.prod(1)).nansum(1)
    weights = weights.nan_to_num(0.0)
    units = weights.new_zeros(*weights.shape[:2], left.shape[1])  # their sum, by variant and side
    for i, side in enumerate((left, right)):
        parts = (each.split(_step(side), dim=-1) for each in (weights[:, i], there[0, i]))
        for rows, own, directed in zip(side.split(_step(side)), *parts, strict=True):
            units[:, i] += own @ rows.double().masked_fill(~directed[:, None], 0.0)
    if mean is not None:
        units[1:] -= weights[1:].sum(2, keepdim=True) * mean.double()
    if std is not None:
        units[2:] *= inverse(std)
    count = there.double().sum(2).prod(1) - there.all(1).sum(1)
    return (units.prod(1).sum(1) - matched) / torch.where(count > 0, count, torch.nan)


def _measured(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None,
    std: Float[Tensor, " d"] | None,
) -> Float64[Tensor, "v 3 n"]:
    """Return a.b, a.a and b.b of every pair in every variant; a square is NaN where its row has no direction."""
    if on_gpu(left):
        from gapprobe.kernels import cosine_triton  # not everywhere installed, and a third of a second to import

        sums = cosine_triton.sums(left, right, mean, std)
    else:
        sums = sums_on_cpu(left, right, mean, std)
    # What float32 does not hold is taken again in float64; where centring leaves nothing there is nothing to take.
    squares = sums[:, 1:]
    doubtful = ~squares.isfinite() | (squares < FAINT)
    odd = (doubtful[0] | doubtful & _left_over(squares)).flatten(0, 1).any(0)
    for rows in torch.nonzero(odd)[:, 0].split(_step(left)):
        if len(rows):
            sums[:, :, rows] = _exact(left[rows], right[rows], mean, std)
    return _directed(sums)


def _exact(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"] | None,
    std: Float[Tensor, " d"] | None,
) -> Float64[Tensor, "v 3 n"]:
    """Return a.b, a.a and b.b in float64."""
    a, b = left.double(), right.double()
    variants = [(a, b)]
    if mean is not None:
        a, b = a - mean, b - mean
        variants.append((a, b))
    if std is not None:
        scale = inverse(std)
        variants.append((a * scale, b * scale))
    dot = torch.linalg.vecdot
    return torch.stack([torch.stack([dot(a, b), dot(a, a), dot(b, b)]) for a, b in variants])


def _directed(sums: Float64[Tensor, "v 3 n"]) -> Float64[Tensor, "v 3 n"]:
    """Turn the squares of rows without a direction into NaN, in place."""
    squares = sums[:, 1:]
    squares.masked_fill_(~_left_over(squares), torch.nan)
    return sums


def _left_over(squares: Float64[Tensor, "v 2 n"]) -> Bool[Tensor, "v 2 n"]:
    """Say which rows have a direction: of what centring leaves, it must be more than rounding."""
    bound = ROUNDING**2 * squares[0]
    return torch.stack([squares[min(i, 1)] > bound for i in range(len(squares))])


def _step(rows: Float[Tensor, "n d"]) -> int:
    return max(1, PIECE // max(1, rows.shape[1]))


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
