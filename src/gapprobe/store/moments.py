"""Count, mean and standard deviation of residuals by layer and position, taken while a shard is written.

A shard keeps them for each marked position, so that standardising needs no pass over the data. Of all tokens they are
taken when asked for (`kernels.moments.alike`): while writing, that would cost more than the disk does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.kernels.memory import fresh

# Fewer numbers than torch (2.13) wakes other threads for, whose waiting costs more than their work gains: the other
# core has a disk to serve. They fit a core's cache, too.
_PIECE = (1 << 15) - 1


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


def moments(x: Float[Tensor, "t d"], tokens: NDArray[np.int64]) -> Moments:
    """Return the moments of some tokens, in one pass.

    Sums are taken of distances to a rough mean: a dimension with a large mean would lose its variance otherwise. Within
    a piece they are float32, over pieces float64.
    """
    count, width = len(tokens), x.shape[1]
    if not count:
        return combine([], width)
    lines, groups = max(1, _PIECE // width), max(1, _PIECE // (2 * width))
    # The same memory for all pieces: touching fresh memory costs more than all the arithmetic.
    chosen, apart = torch.empty(lines, width, dtype=x.dtype), torch.empty(lines, width)

    def some(here: slice) -> Float[Tensor, "n d"]:
        return take(x, tokens[here], chosen)

    rough = some(slice(None, None, -(-count // lines))).float().mean(0)
    sums, total = torch.empty(groups, 2, width), torch.zeros(2, width, dtype=torch.float64)
    done = 0
    for start in range(0, count, lines):
        piece = some(slice(start, start + lines))
        distance = apart[: len(piece)].copy_(piece).sub_(rough)
        torch.sum(distance, 0, out=sums[done, 0])
        torch.sum(distance.square_(), 0, out=sums[done, 1])
        done += 1
        if done == groups or start + lines >= count:
            total += sums[:done].sum(0, dtype=torch.float64)
            done = 0
    first, second = total / count
    return Moments(count, rough.double() + first, (second - first.square()).clamp_(min=0))


def take(
    x: Shaped[Tensor, "*l t d"], tokens: NDArray[np.int64], out: Shaped[Tensor, "*l m d"]
) -> Shaped[Tensor, "*l n d"]:
    """Copy some tokens to the beginning of `out` and return them. In this thread alone, as torch's indexing is not."""
    found = out[..., : len(tokens), :]
    # The mode only keeps numpy from a detour through memory of its own; bytes it copies whatever the dtype.
    source, target = (each.view(torch.uint8).numpy() for each in (x, found))
    np.take(source, tokens, axis=-2, out=target, mode="clip")
    return found


def by_position(
    residual: Float[Tensor, "l t d"], marks: UInt8[Tensor, " t"], positions: int
) -> tuple[Int64[Tensor, " p"], Float32[Tensor, "p l d"], Float32[Tensor, "p l d"]]:
    """Return count, mean and standard deviation of the tokens at each position; zeros where there are none."""
    at = [np.flatnonzero(marks.numpy() >> i & 1) for i in range(positions)]
    # Filled here and not by torch.zeros, which wakes other threads too.
    mean, std = (fresh((positions, len(residual), residual.shape[2]), torch.float32) for _ in range(2))
    for i, tokens in enumerate(at):
        for layer, x in enumerate(residual):
            if len(tokens):
                found = moments(x, tokens)
                mean[i, layer], std[i, layer] = found.mean, found.std
            else:
                mean[i, layer], std[i, layer] = 0, 0
    return torch.tensor([len(tokens) for tokens in at], dtype=torch.int64), mean, std
