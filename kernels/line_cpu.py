"""The line search of `descent` for the logistic loss on a CPU, a problem after the other, its rows in the cache."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from gapprobe.kernels.compiled import by_rows, dot, larger, sweep
from gapprobe.kernels.exponential_cpu import FAINTEST, exponential, log_of_one_and
from gapprobe.kernels.losses import Point

SEGMENT = 2048  # rows that are added up in float32


def walk_all(
    turned: Float32[Tensor, "p 1 n"],
    along: Float32[Tensor, "p 1 n"],
    weight: Float32[Tensor, "p 1 n"],
    line: Float32[Tensor, "p 4"],
    point: Point,
    trials: int,
) -> tuple[Float32[Tensor, " p"], Float32[Tensor, " p"], Float32[Tensor, " p"]]:
    """Walk, overwriting `turned` and `point`; return steps, losses and sums of curvatures."""
    p, _, n = turned.shape
    told = line.new_empty(3, p)
    rows = (each.view(-1).numpy() for each in (turned, along, weight, point.residual, point.share))
    mine, way, own, residual, share = rows
    arrays = (mine, way, own, n, line.numpy(), residual, share, told.numpy(), trials)
    by_rows(lambda first, last: walk(*arrays, first, last), p, 16 * n)
    return told[0], told[1], told[2]


def aim(
    direction: Float[Tensor, "p c e"], gradient: Float[Tensor, "p c e"], weights: Float[Tensor, "p c e"]
) -> Float[Tensor, "3 p"]:
    """Turn directions downhill in place; return the penalty's slope and bend along them, and the slope of all."""
    p, c, e = direction.shape
    told = direction.new_empty(3, p)
    arrays = (each.view(-1).numpy() for each in (direction, gradient, weights))
    _aim(*arrays, c, e, told.numpy())
    return told


@sweep
@no_type_check
def _aim(direction, gradient, weights, c, e, told):
    nothing = direction.dtype.type(0)
    for i in range(told.shape[1]):
        way = direction[i * c * e : (i + 1) * c * e]
        slope = -dot(way, gradient[i * c * e : (i + 1) * c * e])
        if slope < 0:
            for j in range(np.uintp(len(way))):
                way[j] = -way[j]
        else:
            way[:] = nothing
        linear, quadratic = 0.0, 0.0
        for k in range(i * c, (i + 1) * c):
            part = direction[k * e : (k + 1) * e - 1]
            linear += dot(weights[k * e : (k + 1) * e - 1], part)
            quadratic += dot(part, part)
        told[0, i], told[1, i], told[2, i] = linear, quadratic, slope


@sweep
@no_type_check
def walk(turned, along, weight, n, line, residual, share, told, trials, first, last):
    """Find the steps of problems `first` to `last` and go there; see `line_search`.

    Args:
        turned: logits of all problems, one after the other; those at the step's end when it returns.
        along: what a step of 1 adds.
        weight: of the rows.
        n: rows a problem.
        line: of each problem, the slope of the penalty at the start, its bend, the slope wanted, and the step tried.
        residual: written.
        share: written.
        told: written: of each problem the step, the loss at its end, and the sum of curvatures there.
        trials: after the first.
        first: problem.
        last: problem after the last.
    """
    for i in range(first, last):
        mine, way, own = turned[i * n : (i + 1) * n], along[i * n : (i + 1) * n], weight[i * n : (i + 1) * n]
        linear, quadratic, bound, t = line[i]
        low, high = 0.0, np.inf
        for trial in range(trials + 1):
            down, bend = slopes(mine, way, own, np.float32(t))
            rise = linear + t * quadratic - down
            if abs(rise) <= bound or trial == trials:
                break
            if rise < 0:
                low = t
            else:
                high = t
            newton = t - rise / (quadratic + bend)
            if newton > low and newton < high and newton < 8 * t:
                t = newton
            elif high == np.inf:
                t *= 4
            else:
                t = (low + high) / 2
        told[0, i] = t
        told[1, i], told[2, i] = arrive(
            mine, way, own, np.float32(t), residual[i * n : (i + 1) * n], share[i * n : (i + 1) * n]
        )


@sweep
@no_type_check
def slopes(turned, along, weight, t):
    """Return how fast the loss falls at the end of a step, and how it bends there."""
    down, bend = 0.0, 0.0
    for start in range(0, len(turned), SEGMENT):
        stop = start + SEGMENT
        mine, way, own = turned[start:stop], along[start:stop], weight[start:stop]
        a, b = np.float32(0), np.float32(0)
        for j in range(len(mine)):
            _, wrong, right = sides(mine[j] + t * way[j])
            pull = own[j] * wrong * way[j]
            a += pull
            b += pull * right * way[j]
        down += a
        bend += b
    return down, bend


@sweep
@no_type_check
def arrive(turned, along, weight, t, residual, share):
    """Go to the end of a step; return the loss and the sum of curvatures there."""
    value, curved = 0.0, 0.0
    for start in range(0, len(turned), SEGMENT):
        stop = start + SEGMENT
        mine, way, own = turned[start:stop], along[start:stop], weight[start:stop]
        into, all_wrong = residual[start:stop], share[start:stop]
        a, b = np.float32(0), np.float32(0)
        for j in range(len(mine)):
            m = mine[j] + t * way[j]
            e, wrong, right = sides(m)
            pull = own[j] * wrong
            a += own[j] * (log_of_one_and(e) + larger(-m, np.float32(0)))
            b += pull * right
            mine[j], into[j], all_wrong[j] = m, pull, wrong
        value += a
        curved += b
    return value, curved


@sweep
@no_type_check
def sides(m):
    """Return exp(-|m|) of turned logits, and the probabilities of the wrong label and of the right one."""
    e = exponential(larger(-abs(m), FAINTEST))
    larger_one = np.float32(1) / (np.float32(1) + e)
    smaller_one = e * larger_one
    return e, smaller_one if m > 0 else larger_one, larger_one if m > 0 else smaller_one
