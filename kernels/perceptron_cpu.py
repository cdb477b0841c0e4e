"""Steps of Adam for plain perceptrons on a CPU: a member's step is one call, and what it makes stays in the cache.

A member's parameters are one line of numbers. Layers hold one row a unit and one column a row of X, so that every
product is a sum of rows as they lie, or of dot products of such rows; `tiles` multiplies them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int64
from numba import types
from numba.extending import overload
from torch import Tensor

from gapprobe.kernels import tiles
from gapprobe.kernels.compiled import by_rows, exact, sweep
from gapprobe.kernels.exponential_cpu import log_of_one_and
from gapprobe.kernels.line_cpu import sides
from gapprobe.kernels.products_cpu import WORTH_A_THREAD, loop_combined, loop_dots
from gapprobe.kernels.tiles import BYTES, address

TILE = 64  # rows, of which a product takes whole tiles
CHUNK = 1 << 16  # numbers of rows that are gone through at once
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam (Kingma & Ba 2015, algorithm 1; torch's defaults)
INPUTS, OUTPUTS, WEIGHT, BIAS, UNIT, RECTIFIED = range(6)  # columns of `Shape.table`


@dataclass(frozen=True)
class Shape:
    """Linear layers, the last with one output.

    Attributes:
        widths: of the features, and of what every layer makes.
        biased: whether a layer has a bias, for every layer.
        rectified: whether negative outputs become 0, for every layer.
    """

    widths: tuple[int, ...]
    biased: tuple[bool, ...]
    rectified: tuple[bool, ...]

    @cached_property
    def table(self) -> np.ndarray:
        """Return a row a layer: inputs, outputs, where its weight and bias (or -1) and its units begin, rectified."""
        rows, at, unit = [], 0, 0
        for (inputs, outputs), biased, rectified in zip(
            pairwise(self.widths), self.biased, self.rectified, strict=True
        ):
            bias = at + inputs * outputs
            rows.append((inputs, outputs, at, bias if biased else -1, unit, rectified))
            at, unit = bias + outputs * biased, unit + outputs
        return np.array(rows, dtype=np.int64)

    @property
    def size(self) -> int:
        """Return the parameters of a member."""
        return sum(o * (i + b) for (i, o), b in zip(pairwise(self.widths), self.biased, strict=True))


@dataclass(frozen=True)
class Batch:
    """Rows for members.

    Attributes:
        z: rows as groups see them.
        counts: those that some member of a group counts.
        share: of the rows in the loss of every member, sum of |share| log(1 + exp(-sign(share) f)).
        rows: those of this batch.
        members: whom it is for, those of a group one after the other.
        group: of each of these.
    """

    z: Float[Tensor, "g n d"]
    counts: Bool[Tensor, "g n"]
    share: Float[Tensor, "p n"]
    rows: Int64[Tensor, " b"]
    members: Int64[Tensor, " m"]
    group: Int64[Tensor, " m"]


def step(
    shape: Shape, state: Float[Tensor, "3 p e"], batch: Batch, decay: Float[Tensor, " p"], rate: float, count: int
) -> None:
    """Take a step of Adam with the members that the batch is for, in place.

    Args:
        shape: of all members.
        state: their parameters, and Adam's means of gradients and of their squares; 0 before the first step.
        batch: rows.
        decay: times weights: what is added to their gradients.
        rate: of learning.
        count: steps up to this one, from 1.
    """
    first, second = BETAS
    rates = (1 - first, second, 1 - second, rate / (1 - first**count), 1 / math.sqrt(1 - second**count), EPSILON)
    _by_members(shape, state, batch, decay, state.new_tensor(rates))


def loss(shape: Shape, state: Float[Tensor, "3 p e"], batch: Batch) -> Float[Tensor, " p"]:
    """Return the members' losses, 0 of those that the batch is not for."""
    told = state.new_zeros(state.shape[1])
    _by_members(shape, state, batch, told, state.new_zeros(0))
    return told


def _by_members(
    shape: Shape,
    state: Float[Tensor, "3 p e"],
    batch: Batch,
    of_members: Float[Tensor, " p"],
    rates: Float[Tensor, " r"],
) -> None:
    lines = (state.view(-1), *(each.contiguous().view(-1) for each in (batch.z, batch.counts, batch.share)))
    arrays = [each.numpy() for each in (*lines, batch.rows, batch.members, batch.group, of_members, rates)]
    sizes = (*state.shape[1:], *batch.z.shape[1:], max(shape.widths[1:]))

    def run(first: int, last: int) -> None:
        _run(shape.table, *arrays, *sizes, first, last)

    by_rows(run, len(batch.members), 2 * len(batch.rows) * shape.size, WORTH_A_THREAD)


@exact
@no_type_check
def _run(layers, state, z, counts, share, batch, members, group, of_members, rates, p, e, n, d, widest, first, last):
    """Take a step with `members[first:last]`, or tell their losses where there are no rates."""
    learn, lanes, top = len(rates) > 0, BYTES // z.itemsize, layers[len(layers) - 1, UNIT]
    # Few enough rows at once for them and all that is made of them to stay in the cache; whole tiles.
    most = min(len(batch), max(1, CHUNK // d // TILE) * TILE)
    room, deep = (most + lanes - 1) // lanes * lanes, (d + lanes - 1) // lanes * lanes
    apart = deep + lanes  # not a power of two: rows would get into each other's way in the cache
    units, spare = np.empty((top + 1) * room, z.dtype), np.empty(widest * room, z.dtype)
    rows, across = np.empty(room * apart, z.dtype), np.empty(deep * room, z.dtype)
    chosen, own = np.empty(len(batch), np.uintp), np.empty(most, z.dtype)
    gradient = np.empty(0, z.dtype)
    start = first
    while start < last:
        stop = start + 1
        while stop < last and group[stop] == group[start]:
            stop += 1
        if learn:
            gradient = np.zeros((stop - start) * e, z.dtype)
        block = group[start] * n
        count = _choose(batch, counts[block : block + n], chosen)
        for begin in range(0, count, most):
            some = chosen[begin : min(begin + most, count)]
            c = len(some)
            wide = (c + lanes - 1) // lanes * lanes
            _pick(z[block * d : (block + n) * d], some, d, rows, apart)
            rows[c * apart : wide * apart] = z.dtype.type(0)
            _turn(rows, apart, across, wide, deep)
            for k in range(start, stop):
                who = members[k]
                mine = state[who * e : (who + 1) * e]
                _pick(share[who * n : (who + 1) * n], some, 1, own, 1)
                _forward(layers, mine, across, wide, units)
                logits = units[top * wide : (top + 1) * wide]
                if learn:
                    _slopes(logits, own[:c])
                    down = gradient[(k - start) * e : (k - start + 1) * e]
                    _backward(layers, mine, rows, apart, c, wide, units, spare, down)
                else:
                    of_members[who] += _loss(logits, own[:c])
        if learn:
            for k in range(start, stop):
                who, down = members[k], gradient[(k - start) * e : (k - start + 1) * e]
                _descend(layers, state, who * e, p * e, down, of_members[who], rates)
        start = stop


@exact
@no_type_check
def _choose(batch, counts, chosen):
    """Write down the rows that count; return how many there are."""
    count = 0
    for j in range(len(batch)):
        row = np.uintp(batch[j])
        if counts[row]:
            chosen[count] = row
            count += 1
    return count


@exact
@no_type_check
def _pick(lines, some, d, to, apart):
    for j in range(np.uintp(len(some))):
        at, here = some[j] * np.uintp(d), j * np.uintp(apart)
        for i in range(np.uintp(d)):
            to[here + i] = lines[at + i]


@exact
@no_type_check
def _turn(rows, apart, across, wide, deep):
    lanes = BYTES // rows.itemsize
    for j in range(0, wide, lanes):
        for k in range(0, deep, lanes):
            tiles.turn(address(rows, j * apart + k), apart, address(across, k * wide + j), wide)


@exact
@no_type_check
def _forward(layers, mine, across, wide, units):
    before = across
    for k in range(len(layers)):
        inputs, made, weight, bias = layers[k, INPUTS], layers[k, OUTPUTS], layers[k, WEIGHT], layers[k, BIAS]
        here = units[layers[k, UNIT] * wide : (layers[k, UNIT] + made) * wide]
        for u in range(made):
            here[u * wide : (u + 1) * wide] = mine[bias + u] if bias >= 0 else mine.dtype.type(0)
        loop_combined(mine[weight:], inputs, 1, made, before, wide, inputs, 0, wide, None, here, wide)
        if layers[k, RECTIFIED]:
            _rectify(here)
        before = here


@exact
@no_type_check
def _backward(layers, mine, rows, apart, c, wide, units, spare, gradient):
    """Add to the gradient, given the slopes of the loss in place of the last units; units become slopes."""
    top = layers[len(layers) - 1]
    if top[BIAS] >= 0:
        gradient[top[BIAS]] += _sum(units[top[UNIT] * wide : (top[UNIT] + 1) * wide])
    for k in range(len(layers) - 1, 0, -1):
        inputs, made, weight, bias = layers[k, INPUTS], layers[k, OUTPUTS], layers[k, WEIGHT], layers[k - 1, BIAS]
        slopes = units[layers[k, UNIT] * wide : (layers[k, UNIT] + made) * wide]
        below = units[layers[k - 1, UNIT] * wide : (layers[k - 1, UNIT] + inputs) * wide]
        rectified = layers[k - 1, RECTIFIED] != 0
        if made == 1:
            _pass_on(below, inputs, wide, slopes, 0, mine, weight, gradient, bias, rectified)
            continue
        loop_dots(slopes, wide, made, below, wide, 0, inputs, wide, None, gradient[weight:], inputs)
        spare[: inputs * wide] = mine.dtype.type(0)
        loop_combined(mine[weight:], 1, inputs, inputs, slopes, wide, made, 0, wide, None, spare, wide)
        _pass_on(below, inputs, wide, spare, wide, mine, weight, gradient, bias, rectified)
    d, made, down = layers[0, INPUTS], layers[0, OUTPUTS], gradient[layers[0, WEIGHT] :]
    loop_combined(units, wide, 1, made, rows, apart, c, 0, d, None, down, d)


@exact
@no_type_check
def _rectify(units):
    nothing = units.dtype.type(0)
    for j in range(np.uintp(len(units))):
        units[j] = nothing if units[j] < nothing else units[j]  # NaN stays


@sweep
@no_type_check
def _sum(line):
    total = line.dtype.type(0)
    for j in range(np.uintp(len(line))):
        total += line[j]
    return total


@sweep
@no_type_check
def _pass_on(units, count, wide, slopes, apart, mine, weight, gradient, bias, rectified):
    """Put slopes in place of what units made, and add their sums to the gradient by the units' biases.

    Where all have one line of slopes, of an only output, these are times the units' weights, and the gradient by the
    weights is added to as well.
    """
    nothing, one = mine.dtype.type(0), mine.dtype.type(1)
    for u in range(count):
        at, of = np.uintp(u * wide), np.uintp(u * apart)
        factor = one if apart else mine[weight + u]
        product = total = nothing
        if rectified:
            for j in range(np.uintp(wide)):
                product += units[at + j] * slopes[of + j]
                slope = nothing if units[at + j] <= nothing else factor * slopes[of + j]
                total += slope
                units[at + j] = slope
        else:
            for j in range(np.uintp(wide)):
                product += units[at + j] * slopes[of + j]
                slope = factor * slopes[of + j]
                total += slope
                units[at + j] = slope
        if not apart:
            gradient[weight + u] += product
        if bias >= 0:
            gradient[bias + u] += total


@exact
@no_type_check
def _slopes(logits, share):
    """Put the loss's slopes in place of logits, and 0 where there is no row."""
    for j in range(np.uintp(len(share))):
        logits[j] = -share[j] * _parts(logits[j] if share[j] > 0 else -logits[j])[0]
    logits[len(share) :] = logits.dtype.type(0)


@exact
@no_type_check
def _loss(logits, share):
    total = 0.0
    for j in range(np.uintp(len(share))):
        total += abs(share[j]) * _parts(logits[j] if share[j] > 0 else -logits[j])[1]
    return total


@exact
@no_type_check
def _descend(layers, state, at, apart, gradient, decay, rates):
    """Change a member's parameters, which begin at `at`, and its means, each `apart` from what lies before it."""
    for k in range(len(layers)):
        weight, bias = layers[k, WEIGHT], layers[k, BIAS]
        _adam(state, at, apart, gradient, weight, weight + layers[k, INPUTS] * layers[k, OUTPUTS], decay, rates)
        if bias >= 0:
            _adam(state, at, apart, gradient, bias, bias + layers[k, OUTPUTS], state.dtype.type(0), rates)


@exact
@no_type_check
def _adam(state, at, apart, gradient, first, last, decay, rates):
    near, old, new, rate, root, epsilon = rates[0], rates[1], rates[2], rates[3], rates[4], rates[5]
    down = gradient[first:last]
    parameters = state[at + first : at + last]
    means = state[at + apart + first : at + apart + last]
    squares = state[at + 2 * apart + first : at + 2 * apart + last]
    for j in range(np.uintp(len(down))):
        slope = down[j] + decay * parameters[j]
        mean = means[j] + near * (slope - means[j])
        square = old * squares[j] + new * slope * slope
        means[j], squares[j] = mean, square
        parameters[j] -= rate * mean / (np.sqrt(square) * root + epsilon)


@no_type_check
def _parts(m: Any) -> Any:
    """Return the probability of the wrong label and the loss, given the logit of the right one."""
    raise NotImplementedError  # compiled code alone calls it, below


@overload(_parts)
@no_type_check
def _parts_of(m: Any) -> Any:
    if m == types.float32:

        def single(m: Any) -> Any:
            e, wrong, _ = sides(m)
            return wrong, log_of_one_and(e) + (np.float32(0) if m > 0 else -m)

        return single

    def double(m: Any) -> Any:
        e = math.exp(-abs(m))
        return (e / (1 + e) if m > 0 else 1 / (1 + e)), math.log1p(e) + (0.0 if m > 0 else -m)

    return double
