"""Count, mean and standard deviation of residuals by layer and position, taken while a shard is written.

A shard keeps them for each marked position, so that standardising needs no pass over the data. Of all tokens they are
taken when asked for: while writing, that would cost more than the disk does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

# So few numbers are left to one thread by torch, and fit its core's cache; the other core has a disk to serve.
_PIECE = 1 << 15


@dataclass(frozen=True)
class Moments:
    """Mean and variance (of the population) of some tokens at one layer, by dimension; of no token they are NaN."""

    count: int
    mean: Float64[Tensor, " d"]
    variance: Float64[Tensor, " d"]

    @property
    def std(self) -> Float64[Tensor, " d"]:
        """Return the standard deviation."""
        return self.variance.sqrt()

    @property
    def mean_square_norm(self) -> float:
        """Return the mean of the squared length of the residual vectors."""
        return float((self.mean.square() + self.variance).sum())


def combine(parts: Iterable[Moments], width: int) -> Moments:
    """Return the moments of all tokens of several groups (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    count, mean, squares = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for part in parts:
        if part.count:
            count += part.count
            apart = part.mean - mean
            mean = mean + apart * (part.count / count)
            squares += part.variance * part.count + apart.square() * (part.count * (count - part.count) / count)
    if not count:
        return Moments(0, torch.full_like(mean, torch.nan), torch.full_like(mean, torch.nan))
    return Moments(count, mean, squares / count)


def moments(x: Float[Tensor, "t d"], tokens: Int64[Tensor, " n"] | None = None) -> Moments:
    """Return the moments of some tokens, or of all, in one pass.

    Sums are taken of distances to a rough mean: a dimension with a large mean would lose its variance otherwise. Within
    a piece they are float32, over pieces float64.
    """
    count = len(x) if tokens is None else len(tokens)
    width = x.shape[1]
    if not count:
        return combine([], width)
    every = max(1, count // 32)
    rough = (x[::every] if tokens is None else x[tokens[::every]]).float().mean(0)
    size = min(count, max(8, _PIECE // width))
    # The same memory for all pieces: touching fresh memory costs more than all the arithmetic.
    chosen, apart = torch.empty(size, width, dtype=x.dtype), torch.empty(size, width)
    first, total = torch.zeros(2, width, dtype=torch.float64)
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        n = here.stop - start
        piece = x[here] if tokens is None else torch.index_select(x, 0, tokens[here], out=chosen[:n])
        distance = apart[:n].copy_(piece).sub_(rough)
        first += distance.sum(0)
        total += distance.square_().sum(0)
    first /= count
    return Moments(count, rough.double() + first, (total / count - first.square()).clamp_(min=0))


def by_position(
    residual: Float[Tensor, "l t d"], marks: UInt8[Tensor, " t"], positions: int
) -> tuple[Int64[Tensor, " p"], Float32[Tensor, "p l d"], Float32[Tensor, "p l d"]]:
    """Return count, mean and standard deviation of the tokens at each position; zeros where there are none."""
    at = [(marks >> i & 1).nonzero()[:, 0] for i in range(positions)]
    mean, std = torch.zeros(2, positions, len(residual), residual.shape[2])
    for i, here in enumerate(at):
        for layer in range(len(residual) if len(here) else 0):
            found = moments(residual[layer], here)
            mean[i, layer], std[i, layer] = found.mean.float(), found.std.float()
    return torch.tensor([len(here) for here in at], dtype=torch.int64), mean, std
