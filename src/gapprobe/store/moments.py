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
_PIECE = 1 << 18


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


def moments(x: Float[Tensor, "t d"]) -> Moments:
    """Return the moments of tokens, in one pass.

    Sums are taken of distances to the first token: a dimension with a large mean would lose its variance otherwise.
    Within a piece they are float32, over pieces float64.
    """
    count, width = x.shape
    first, total = torch.zeros(2, width, dtype=torch.float64)
    if not count:
        return combine([], width)
    origin = x[0].float()
    for piece in x.split(max(64, _PIECE // width)):
        apart = piece.float() - origin
        first += apart.sum(0)
        total += apart.square_().sum(0)
    first /= count
    return Moments(count, origin.double() + first, (total / count - first.square()).clamp_(min=0))


def by_position(
    residual: Float[Tensor, "l t d"], marks: UInt8[Tensor, " t"], positions: int
) -> tuple[Int64[Tensor, " g"], Float32[Tensor, "g l d"], Float32[Tensor, "g l d"]]:
    """Return count, mean and standard deviation of all tokens (group 0) and of those at each position (1 and on)."""
    layers, _, width = residual.shape
    # Tokens marked alike go together, so that each is read once whatever groups it is in.
    kinds = {int(kind): (marks == kind).nonzero()[:, 0] for kind in marks.unique()}
    members = [list(kinds), *([kind for kind in kinds if kind >> i & 1] for i in range(positions))]
    count = torch.tensor([sum(len(kinds[kind]) for kind in group) for group in members])
    mean, std = torch.zeros(2, len(members), layers, width)
    for layer in range(layers):
        alone = len(kinds) == 1
        parts = {k: moments(residual[layer] if alone else residual[layer][rows]) for k, rows in kinds.items()}
        for g, group in enumerate(members):
            if group:
                found = combine([parts[kind] for kind in group], width)
                mean[g, layer], std[g, layer] = found.mean.float(), found.std.float()
    return count, mean, std
