"""Count, mean and standard deviation of residuals by layer and position, taken while a shard is written.

A shard keeps them for all its tokens and for each marked position, so that standardising needs no pass over the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

# As many numbers as fit a core's cache in float32.
_PIECE = 1 << 17


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
    size = min(count, max(64, _PIECE // width))
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
) -> tuple[Int64[Tensor, " g"], Float32[Tensor, "g l d"], Float32[Tensor, "g l d"]]:
    """Return count, mean and standard deviation of all tokens (group 0) and of those at each position (1 and on)."""
    layers, tokens, width = residual.shape
    at = [(marks >> i & 1).nonzero()[:, 0] for i in range(positions)]
    # Where most tokens are marked, those marked alike go together, so that each is read once whatever groups it is in.
    # Where few are, reading these twice is cheaper than picking the others.
    kinds = {int(kind): (marks == kind).nonzero()[:, 0] for kind in marks.unique()}
    whole = len(kinds) == 1 or 2 * sum(map(len, at)) <= tokens
    members = [list(kinds), *([kind for kind in kinds if kind >> i & 1] for i in range(positions))]
    count = torch.tensor([tokens, *map(len, at)])
    mean, std = torch.zeros(2, positions + 1, layers, width)
    for layer in range(layers):
        x = residual[layer]
        if whole:
            found = [moments(x), *(moments(x, here) for here in at)]
        else:
            parts = {kind: moments(x, here) for kind, here in kinds.items()}
            found = [combine([parts[kind] for kind in group], width) for group in members]
        for g, group in enumerate(found):
            if group.count:
                mean[g, layer], std[g, layer] = group.mean.float(), group.std.float()
    return count, mean, std
