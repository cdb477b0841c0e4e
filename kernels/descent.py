"""Many strongly convex linear problems at once: preconditioned L-BFGS, problems as rows, X read twice a step.

Minimises loss(Z w + b) + |w|^2 / 2 for all problems together. What makes it fast: the products are wide (all problems
share X); logits are linear along a step, so a line search never reads X; every problem is preconditioned, at first by
what all share, then by its kin's Hessian in a subspace, then by its own; one that has reached its goal is dropped.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gapprobe.kernels.history import History
from gapprobe.kernels.line_search import Place, aim, walk
from gapprobe.kernels.losses import Loss, Point
from gapprobe.kernels.preconditioner import LARGE, Own, Shared, Spaces, kin_of_classes
from gapprobe.kernels.progress import Progress
from gapprobe.kernels.standardised import Standardised

EARLY = 6  # steps after which the Hessian of problems of one kin is taken, where that pays
SAVED = 40  # steps that it saves a problem, about
# Steps after which a problem's own Hessian is taken, if it still runs: in the small subspace, later in the large one.
# The first is its kin's. What float32 has left over has that of the large one at once, where this is all of the space.
OWN = (15, 40, 80, 140)
OWN_LARGE = (200, 240, 290, 350, 420)
LEFT_OVER = (0, 10, 30, 60)
ROOM = 1 << 27  # bytes of the Hessians of the large subspace


def descend(
    features: Standardised,
    loss: Loss,
    weights: Float[Tensor, "p c e"],
    spaces: Spaces,
    *,
    problems: Int64[Tensor, " p"],
    goal: float,
    most: int,
) -> tuple[Float[Tensor, "p c e"], Int64[Tensor, " p"]]:
    """Return weights whose |gradient|^2 / 2, a bound on what is left to gain, is below `goal` of the objective.

    Args:
        features: X, shared.
        loss: of these problems, in the dtype of `weights`.
        weights: where to start; the last one is the intercept.
        spaces: for the preconditioners.
        problems: which problems of `features` these are.
        goal: share of the objective.
        most: steps.

    Returns:
        Weights and the steps taken. A problem that ran out of steps, or whose gradient is only rounding, is returned as
        it is: the caller certifies.
    """
    p, c, e = weights.shape
    view = features.view(problems, weights.dtype)
    done_weights, done_steps = weights.clone(), torch.zeros(p, dtype=torch.int64, device=weights.device)
    rows = torch.arange(p, device=weights.device)
    place = Place.of(loss, loss.turned(view.logits(weights)))
    weights = weights.flatten(1).clone()

    def gradient_at(point: Point, weights: Tensor) -> Tensor:
        gradient = view.pull(loss.turned(point.residual.neg()))
        gradient[..., :-1] += weights.view(-1, c, e)[..., :-1]
        return gradient.flatten(1)

    def precondition(vector: Tensor) -> Tensor:
        return preconditioner.apply(vector.reshape(-1, e)).view_as(vector)

    gradient = gradient_at(place.point, weights)
    preconditioner = Shared.of(spaces.small.to(weights.dtype), place.curved.flatten())
    history = history_for(weights)
    together, gain = False, torch.ones_like(weights[:, 0])
    size = torch.ones_like(gain)
    progress = progress_for(weights.view(p, c, e))
    stuck = torch.zeros_like(gain, dtype=torch.bool)
    for step in range(most + 1):
        done = progress.arrived(weights.view(-1, c, e), gradient.view(-1, c, e), place, goal) | stuck | (step >= most)
        if bool(done.any()):
            done_weights[rows[done]], done_steps[rows[done]] = weights[done].view(-1, c, e), step
            on = ~done
            rows, weights, gradient, place = rows[on], weights[on], gradient[on], place.keep(on)
            view, loss, gain, size = view.keep(on), loss.keep(on), gain[on], size[on]
            preconditioner = preconditioner.keep(on.repeat_interleave(c))
            history.keep(on)
            progress.keep(on)
        if not len(rows):
            break
        renewed, own_kin = None, spaces.kin[problems[rows]]
        # Of few features each problem's own is cheap, and in float64 it is the end that counts.
        shareable = weights.dtype == torch.float32 and len(spaces.small.values) < e - 1
        if shareable and c == 1 and (step == EARLY or together and step in OWN[1:]):
            saved = max(SAVED, 2 * step)  # who has taken many steps has many before it
            renewed = Own.together(view, loss.curvature(place.point)[:, 0], own_kin, saved)
            together = renewed is not None
        few = len(weights) * c * min(e, LARGE) ** 2 * weights.itemsize <= ROOM
        at_once = spaces.whole and few and weights.dtype == torch.float64
        large = step in (LEFT_OVER if at_once else OWN_LARGE)
        if renewed is None and (large or (step in OWN and not (together or at_once))):
            space = spaces.large if large and few else spaces.small
            shared = kin_of_classes(own_kin, c) if shareable and step == OWN[0] else None
            renewed = Own.of(space, view, loss.curvature(place.point).flatten(0, 1), shared)
        if renewed is not None:
            preconditioner, history = renewed, history_for(weights)
            gain, size = torch.ones_like(gain), torch.ones_like(gain)
        passed, first = history.before(gradient)
        moved = precondition(passed)
        if isinstance(preconditioner, Shared):
            moved *= gain[:, None]
        direction = history.after(moved, first)
        line = aim(direction.view(-1, c, e), gradient.view(-1, c, e), weights.view(-1, c, e))
        stuck = ~(line.slope < 0)
        along = loss.turned(view.logits(direction.view(-1, c, e)))
        size, place = walk(loss, place, along, line, size)
        weights = torch.addcmul(weights, direction, size[:, None])
        before, gradient = gradient, gradient_at(place.point, weights)
        walked, change = history.add(direction, size, before, gradient)
        if isinstance(preconditioner, Shared):  # a Hessian has the right scale
            gain = torch.linalg.vecdot(walked, change) / torch.linalg.vecdot(change, precondition(change))
            gain = gain.where((gain > 0) & gain.isfinite(), 1.0)
    return done_weights, done_steps


def history_for(like: Float[Tensor, "p e"]) -> History:
    """Return an empty history of these problems, one of compiled loops on a CPU."""
    if like.device.type != "cpu":
        return History(like)
    from gapprobe.kernels.history_cpu import CpuHistory  # a third of a second to import

    return CpuHistory(like)


def progress_for(like: Float[Tensor, "p c e"]) -> Progress:
    """Return the progress of these problems, by a compiled loop on a CPU."""
    if like.device.type != "cpu":
        return Progress(like)
    from gapprobe.kernels.progress_cpu import CpuProgress  # a third of a second to import

    return CpuProgress(like)
