"""Means and variances of the columns of X: of all rows alike, or weighted, of many problems over one X.

A problem is a row of weights. One pass over X serves all problems, in float64; rows of weight 0 leave no trace.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Float64
from torch import Tensor

BLOCK = 1 << 18  # numbers of X handled at once in float64: they should stay in the cache
FAR = 1e-6  # a variance below this share of the mean square about the base has lost six digits: taken again


@dataclass(frozen=True)
class Moments:
    """Of every feature under every problem's weights; NaN where a problem has no weight at all.

    Attributes:
        total: sum of the weights.
        mean: weighted mean.
        variance: weighted mean of (x - mean)^2, of the population.
    """

    total: Float64[Tensor, " p"]
    mean: Float64[Tensor, "p d"]
    variance: Float64[Tensor, "p d"]


def reference(x: Float[Tensor, "n d"], weights: Float[Tensor, "p n"]) -> Moments:
    """Return the same, written for reading: every problem about its own mean."""
    x, weights = x.double(), weights.double()
    total = reduce(weights, "p n -> p", "sum")
    mean = einsum(weights, x, "p n, n d -> p d") / total[:, None]
    away = x[None] - mean[:, None]
    return Moments(total, mean, einsum(weights, away**2, "p n, p n d -> p d") / total[:, None])


def means(
    x: Float[Tensor, "n d"], weights: Float[Tensor, "p n"]
) -> tuple[Float64[Tensor, " p"], Float64[Tensor, "p d"]]:
    """Return every problem's total weight and weighted mean."""
    weights = weights.double()
    out = weights.new_zeros(len(weights), x.shape[1])
    for block in blocks(*x.shape):
        out.addmm_(weights[:, block], x[block].double())
    total = weights.sum(1)
    return total, out / total[:, None]


def class_means(
    x: Float[Tensor, "n d"], y: Bool[Tensor, "p n"], weights: Float[Tensor, "p n"]
) -> tuple[Float64[Tensor, "2 p"], Float64[Tensor, "2 p d"]]:
    """Return the total weight and the mean of every problem's negatives and of its positives, in this order."""
    total, mean = means(x, torch.cat([weights * ~y, weights * y]))
    return total.unflatten(0, (2, -1)), mean.unflatten(0, (2, -1))


def moments(x: Float[Tensor, "n d"], weights: Float[Tensor, "p n"]) -> Moments:
    """Return every problem's total weight, means and variances.

    One pass, about a base near all rows that are used. Where a mean is so far from it that the difference of squares
    has lost its digits, that feature is taken again about its own mean.
    """
    weights = weights.double()
    base = x[torch.nonzero(weights.any(0))[: 1 << 8, 0]].double().mean(0)
    first, second = weights.new_zeros(2, len(weights), x.shape[1])
    for block in blocks(*x.shape):
        away = x[block].double() - base
        first.addmm_(weights[:, block], away)
        second.addmm_(weights[:, block], away.square_())
    total = weights.sum(1)
    near, square = first / total[:, None], second / total[:, None]
    mean, variance = base + near, square - near**2
    for own_mean, own_variance, own_square, own in zip(mean, variance, square, weights, strict=True):
        columns = torch.nonzero(own_variance <= FAR * own_square)[:, 0]
        if len(columns):
            rows = torch.nonzero(own)[:, 0]
            share = own[rows] / own[rows].sum()
            part = x[rows][:, columns].double()
            own_mean[columns] = share @ part
            own_variance[columns] = share @ (part - own_mean[columns]) ** 2
    return Moments(total, mean, variance)


def standard(
    x: Float[Tensor, "n d"], used: Bool[Tensor, "p n"]
) -> tuple[Float64[Tensor, "p d"], Float64[Tensor, "p d"]]:
    """Return mean and deviation of the rows that every problem uses; 1 for a deviation that is only rounding."""
    found = moments(x, used.double())
    eps = torch.finfo(torch.float64).eps
    # scikit-learn's bound on the rounding of a variance (StandardScaler): at or below it the feature is constant.
    bound = found.total[:, None] * eps * found.variance + (found.total[:, None] * found.mean * eps) ** 2
    return found.mean, torch.where(found.variance <= bound, 1.0, found.variance.clamp(min=0.0).sqrt())


def alike(x: Float[Tensor, "n d"]) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Return the mean and variance of all rows, on a CPU, in one pass at the speed of memory; NaN of no row.

    Sums are taken of distances to a rough mean: a dimension with a large mean would lose its variance otherwise. Of a
    few rows they are float32, beyond that float64.
    """
    from gapprobe.kernels import columns_cpu, compiled  # a third of a second to import

    n, d = x.shape
    base = x[:: max(1, n // 8)].float().mean(0)
    out = np.zeros((2, d))
    columns_cpu.sums(*compiled.flat(x), base.numpy(), n, out)
    first, second = torch.from_numpy(out) / (n or torch.nan)
    return base.double() + first, (second - first.square()).clamp_(min=0.0)


def blocks(n: int, d: int) -> Iterator[slice]:
    """Cut rows into parts that stay in the cache."""
    step = max(1, BLOCK // max(1, d))
    return (slice(start, start + step) for start in range(0, n, step))
