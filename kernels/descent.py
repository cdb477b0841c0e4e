"""Many strongly convex linear problems at once: preconditioned L-BFGS, problems as rows, X read twice a step.

Minimises loss(Z w + b) + |w|^2 / 2 for all problems together. What makes it fast: the products are wide (all problems
share X); logits are linear along a step, so a line search never reads X; every problem is preconditioned, at first by
what all share, then by its own Hessian in a subspace; one that has reached its goal is dropped. Source of the compact
form: Byrd, Nocedal & Schnabel 1994, eq. 3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gapprobe.kernels.losses import Loss, Point
from gapprobe.kernels.preconditioner import LARGE, Own, Shared, Spaces, Together
from gapprobe.kernels.standardised import Standardised

MEMORY = 5  # pairs of step and change of gradient; 10 saves 3 % of the steps and costs more than that
EARLY = 6  # steps after which the Hessian of problems of one kin is taken, where that pays
SAVED = 40  # steps that it saves a problem, about
# Steps after which a problem's own Hessian is taken, if it still runs: in the small subspace, later in the large one.
OWN = (15, 40, 80, 140)
OWN_LARGE = (200, 240, 290, 350, 420)
ROOM = 1 << 25  # numbers in the Hessians of the large subspace
SLOPE = 0.5  # a step is taken when the slope at its end is this share of the slope at its start
GROWTH = 3.0  # of a step over the last one, at most, before a longer one is tried
TRIALS = 20
PATIENCE = {torch.float32: 12, torch.float64: 100}  # steps without a smaller gradient or value: only rounding is left
SMALLER = 1e-6  # share of its value by which an objective must fall to count: float32 cannot tell less


class History:
    """The last pairs of every problem: the inverse Hessian that L-BFGS makes of them.

    Steps and changes lie in a ring; everything small is kept in the order of age, the oldest first.
    """

    def __init__(self, like: Float[Tensor, "p e"]) -> None:
        """Start empty."""
        self.steps = like.new_zeros(len(like), MEMORY, like.shape[1])
        self.changes = torch.zeros_like(self.steps)
        self.products = like.new_zeros(len(like), MEMORY, MEMORY)  # step i . change j, for i not younger than j
        self.slots = torch.arange(MEMORY, device=like.device)  # by age
        self.count = 0

    def add(self, step: Float[Tensor, "p e"], change: Float[Tensor, "p e"]) -> None:
        """Remember a pair in place of the oldest."""
        if self.count == MEMORY:
            self.slots = self.slots.roll(-1)
            self.products[:, :-1, :-1] = self.products[:, 1:, 1:].clone()
        else:
            self.count += 1
        age = self.count - 1
        slot = int(self.slots[age])
        length = torch.linalg.vecdot(step, change)
        # Where rounding has eaten the curvature the pair says nothing; zeros with a product of 1 leave no trace.
        useful = length > 0
        self.steps[:, slot] = step.where(useful[:, None], 0.0)
        change = change.where(useful[:, None], 0.0)
        self.changes[:, slot] = change
        self.products[:, : age + 1, age] = self._by_age(_against(self.steps, change))
        self.products[:, age, age] = length.where(useful, 1.0)

    def before(self, gradient: Float[Tensor, "p e"]) -> tuple[Float[Tensor, "p e"], Float[Tensor, "p m"]]:
        """Return what the preconditioner is to be applied to, and the first loop's coefficients."""
        if not self.count:
            return gradient, gradient[:, :0]
        seen = self._by_age(_against(self.steps, gradient))[..., None]
        first = torch.linalg.solve_triangular(self._triangle(), seen, upper=True)[..., 0]
        return torch.baddbmm(gradient[:, None], self._ring(first)[:, None], self.changes, alpha=-1)[:, 0], first

    def after(self, moved: Float[Tensor, "p e"], first: Float[Tensor, "p m"]) -> Float[Tensor, "p e"]:
        """Finish: the second loop, on the preconditioned vector."""
        if not self.count:
            return moved
        triangle = self._triangle()
        wanted = triangle.diagonal(dim1=1, dim2=2) * first - self._by_age(_against(self.changes, moved))
        second = torch.linalg.solve_triangular(triangle.mT, wanted[..., None], upper=False)[..., 0]
        return torch.baddbmm(moved[:, None], self._ring(second)[:, None], self.steps)[:, 0]

    def keep(self, problems: Bool[Tensor, " p"]) -> None:
        """Forget the other problems."""
        self.steps, self.changes = self.steps[problems], self.changes[problems]
        self.products = self.products[problems]

    def _triangle(self) -> Float[Tensor, "p m m"]:
        return self.products[:, : self.count, : self.count]

    def _by_age(self, ring: Float[Tensor, "p r"]) -> Float[Tensor, "p m"]:
        return ring.index_select(1, self.slots[: self.count])

    def _ring(self, by_age: Float[Tensor, "p m"]) -> Float[Tensor, "p r"]:
        return by_age.new_zeros(len(by_age), MEMORY).index_copy_(1, self.slots[: self.count], by_age)


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
    turned = loss.turned(view.logits(weights))
    point = loss.at(turned)
    weights = weights.flatten(1).clone()
    penalised = torch.ones(c, e, dtype=weights.dtype, device=weights.device)
    penalised[:, -1] = 0.0
    penalised = penalised.flatten()

    def gradient_at(point: Point, weights: Tensor) -> Tensor:
        return weights * penalised - view.pull(loss.turned(point.residual.clone())).flatten(1)

    def precondition(vector: Tensor) -> Tensor:
        return preconditioner.apply(vector.view(-1, e)).view_as(vector)

    gradient = gradient_at(point, weights)
    preconditioner = Shared.of(spaces.small.to(weights.dtype), loss.curvature(point).flatten(0, 1))
    history = History(weights)
    together, gain = False, torch.ones_like(weights[:, 0])
    size = torch.ones_like(gain)
    best, lowest = torch.full_like(gain, torch.inf), torch.full_like(gain, torch.inf)
    since = torch.zeros_like(gain, dtype=torch.int64)
    stuck = torch.zeros_like(gain, dtype=torch.bool)
    for step in range(most + 1):
        value = loss.value(turned) + torch.linalg.vecdot(weights, weights * penalised) / 2
        left = _left(gradient.view(-1, c, e), loss, point)
        better = (left < 0.9 * best) | (value < (1.0 - SMALLER) * lowest)
        since, best, lowest = torch.where(better, 0, since + 1), torch.minimum(best, left), torch.minimum(lowest, value)
        done = (left <= goal * value) | (since > PATIENCE[weights.dtype]) | stuck | (not step < most)
        if bool(done.any()):
            done_weights[rows[done]], done_steps[rows[done]] = weights[done].view(-1, c, e), step
            on = ~done
            rows, weights, turned, gradient = rows[on], weights[on], turned[on], gradient[on]
            gain, best, lowest, since = gain[on], best[on], lowest[on], since[on]
            view, loss, point, size = view.keep(on), loss.keep(on), point.keep(on), size[on]
            preconditioner = preconditioner.keep(on.repeat_interleave(c))
            history.keep(on)
        if not len(rows):
            break
        renewed: Together | Own | None = None
        shareable = c == 1 and weights.dtype == torch.float32 and len(spaces.small.values) < e - 1
        if shareable and (step == EARLY or together and step in OWN[1:]):
            saved = max(SAVED, 2 * step)  # who has taken many steps has many before it
            renewed = Together.of(view, loss.curvature(point)[:, 0], spaces.kin[problems[rows]], saved)
            together = renewed is not None
        if renewed is None and (step in OWN_LARGE or (step in OWN and not together)):
            few = len(weights) * c * LARGE**2 <= ROOM
            space = spaces.large if step in OWN_LARGE and few else spaces.small
            renewed = Own.of(space.to(weights.dtype), view, loss.curvature(point).flatten(0, 1))
        if renewed is not None:
            preconditioner, history = renewed, History(weights)
            gain, size = torch.ones_like(gain), torch.ones_like(gain)
        passed, first = history.before(gradient)
        direction = -history.after(precondition(passed) * gain[:, None], first)
        slope = torch.linalg.vecdot(gradient, direction)
        stuck = ~(slope < 0)
        direction.masked_fill_(stuck[:, None], 0.0)
        along = loss.turned(view.logits(direction.view(-1, c, e)))
        size, point = _search(loss, turned, along, slope, weights * penalised, direction * penalised, size)
        walked = size[:, None] * direction
        weights, turned = weights + walked, turned.addcmul(size[:, None, None], along)
        before, gradient = gradient, gradient_at(point, weights)
        change = gradient - before
        history.add(walked, change)
        if isinstance(preconditioner, Shared):  # a Hessian has the right scale
            gain = torch.linalg.vecdot(walked, change) / torch.linalg.vecdot(change, precondition(change))
            gain = gain.where((gain > 0) & gain.isfinite(), 1.0)
    return done_weights, done_steps


def _against(vectors: Float[Tensor, "p m e"], one: Float[Tensor, "p e"]) -> Float[Tensor, "p m"]:
    """Multiply every problem's vectors with its one; a matrix times a column would take ten times as long."""
    return torch.bmm(one[:, None], vectors.mT)[:, 0]


def _left(gradient: Float[Tensor, "p c e"], loss: Loss, point: Point) -> Float[Tensor, " p"]:
    """Bound what is left to gain: the penalty alone curves the objective by 1, the intercept by the rows.

    Putting the intercept right moves the gradient by its own times a mean of z, of length 1 or so: hence the 1.
    """
    weights, intercept = gradient[..., :-1].flatten(1), gradient[..., -1]
    bend = loss.curvature(point).sum(-1).clamp(min=1e-20)
    return (torch.linalg.vecdot(weights, weights) + (intercept * intercept * (1.0 + 1.0 / bend)).sum(1)) / 2


def _search(
    loss: Loss,
    turned: Float[Tensor, "p c n"],
    along: Float[Tensor, "p c n"],
    slope: Float[Tensor, " p"],
    weights: Float[Tensor, "p e"],
    direction: Float[Tensor, "p e"],
    last: Float[Tensor, " p"],
) -> tuple[Float[Tensor, " p"], Point]:
    """Find for each problem a step at whose end the slope has fallen to `SLOPE` of its start; return it and its point.

    Tried first is 1, or somewhat more than the last step where that was short. A convex function's slope only grows
    along a line, so its root is bracketed and Newton's method on it is safe. The slope decides, not the value: near the
    optimum float32 cannot tell two values apart.
    """
    linear = torch.linalg.vecdot(weights, direction)
    quadratic = torch.linalg.vecdot(direction, direction)
    bound = SLOPE * slope.abs()
    size = (GROWTH * last).clamp(max=1.0)
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
