"""How far to go along a direction: many problems at once, logits alone, without a look at X.

Logits are linear along a step. A convex function's slope only grows along a line, so its root is bracketed and Newton's
method on it is safe. The slope decides, not the value: near the optimum float32 cannot tell two values apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gapprobe.kernels.losses import Binary, Loss, Point

SLOPE = 0.2  # a step is taken when the slope at its end is this share of the slope at its start
GROWTH = 3.0  # of a step over the last one, at most, before a longer one is tried
TRIALS = 20


@dataclass
class Place:
    """Where problems stand.

    Attributes:
        turned: logits.
        point: slope and bend of the loss there.
        value: of the loss.
        curved: sum of the curvatures of a logit's rows.
    """

    turned: Float[Tensor, "p c n"]
    point: Point
    value: Float[Tensor, " p"]
    curved: Float[Tensor, "p c"]

    @classmethod
    def of(cls, loss: Loss, turned: Float[Tensor, "p c n"]) -> Place:
        """Look around at turned logits."""
        point = loss.at(turned)
        return cls(turned, point, loss.value(turned), loss.curvature(point).sum(-1))

    def keep(self, problems: Tensor) -> Place:
        """Return the place of some problems."""
        parts = self.turned[problems], self.point.keep(problems), self.value[problems], self.curved[problems]
        return Place(*parts)


@dataclass(frozen=True)
class Line:
    """What is known of each problem along its direction.

    Attributes:
        linear: slope of the penalty at the start.
        quadratic: bend of the penalty.
        slope: of the whole objective at the start, below zero.
    """

    linear: Float[Tensor, " p"]
    quadratic: Float[Tensor, " p"]
    slope: Float[Tensor, " p"]


def aim(direction: Float[Tensor, "p c e"], gradient: Float[Tensor, "p c e"], weights: Float[Tensor, "p c e"]) -> Line:
    """Turn what points uphill downhill, in place, and return what is known along it.

    Where it does not point uphill, only rounding is left: the direction becomes 0, its slope tells.
    """
    if direction.device.type == "cpu":
        from gapprobe.kernels import line_cpu  # a third of a second to import

        return Line(*line_cpu.aim(direction, gradient, weights))
    slope = -torch.linalg.vecdot(gradient, direction).sum(1)
    direction.neg_().masked_fill_(~(slope < 0)[:, None, None], 0.0)
    own, way = weights[..., :-1], direction[..., :-1]
    return Line(torch.linalg.vecdot(own, way).sum(1), torch.linalg.vecdot(way, way).sum(1), slope)


def walk(
    loss: Loss, place: Place, along: Float[Tensor, "p c n"], line: Line, last: Float[Tensor, " p"]
) -> tuple[Float[Tensor, " p"], Place]:
    """Find for each problem a step at whose end the slope has fallen to `SLOPE` of its start; return it and its end.

    Tried first is 1, or somewhat more than the last step where that was short. `place` must not be used any more.
    """
    size = (GROWTH * last).clamp(max=1.0)
    bound = SLOPE * line.slope.abs()
    if isinstance(loss, Binary) and along.dtype == torch.float32 and along.device.type == "cpu":
        from gapprobe.kernels import line_cpu  # a third of a second to import

        told = torch.stack([line.linear, line.quadratic, bound, size], 1)
        size, value, curved = line_cpu.walk_all(place.turned, along, loss.weight, told, place.point, TRIALS)
        return size, Place(place.turned, place.point, value, curved[:, None])
    size, point = _search(loss, place.turned, along, line, bound, size)
    turned = place.turned.addcmul(size[:, None, None], along)
    return size, Place(turned, point, loss.value(turned), loss.curvature(point).sum(-1))


def _search(
    loss: Loss,
    turned: Float[Tensor, "p c n"],
    along: Float[Tensor, "p c n"],
    line: Line,
    bound: Float[Tensor, " p"],
    size: Float[Tensor, " p"],
) -> tuple[Float[Tensor, " p"], Point]:
    linear, quadratic = line.linear, line.quadratic
    point = loss.at(turned.addcmul(size[:, None, None], along))
    rise = linear + size * quadratic - torch.linalg.vecdot(point.residual, along).sum(1)
    bad = rise.abs() > bound
    if not bool(bad.any()):
        return size, point
    i = torch.nonzero(bad)[:, 0]
    part, start, way, t, rise, at = loss.keep(i), turned[i], along[i], size[i], rise[i], point.keep(i)
    linear, quadratic, bound = linear[i], quadratic[i], bound[i]
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    for _ in range(TRIALS):
        low, high = torch.where(rise < 0, t, low), torch.where(rise < 0, high, t)
        newton = t - rise / (quadratic + part.bend(at, way))
        inside = (newton > low) & (newton < high) & (newton < 8 * t)
        t = torch.where(inside, newton, torch.where(high.isinf(), 4 * t, (low + high) / 2))
        at = part.at(start.addcmul(t[:, None, None], way))
        rise = linear + t * quadratic - torch.linalg.vecdot(at.residual, way).sum(1)
        if bool((rise.abs() <= bound).all()):
            break
    size[i] = t
    point.put(i, at)
    return size, point
