"""Linear support vector machines with squared hinge loss, many problems over one X, certified as `logistic` is.

Objective of a problem: C * sum_i s_i max(0, 1 - y_i f_i)^2 + |w|^2 / 2, f = w . z + b (scikit-learn's LinearSVC, but
for its penalty on the intercept: b is free here), z standardised by the rows whose weight s_i is above zero.
Curvature jumps where a row enters its margin, which a descent by gradients may not get over where C is large: what
float32 leaves too far from the optimum is finished by a finite Newton method, each strength from the last.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gapprobe.kernels import ridge
from gapprobe.kernels.certified import Fits, check, check_gaps, kin, reach
from gapprobe.kernels.losses import SquaredHinge
from gapprobe.kernels.preconditioner import Spaces
from gapprobe.kernels.standardised import Standardised

STEPS = 150  # in float32
NEWTON = 200  # steps in float64, where float32 did not reach the tolerance; 3 to 8 are usual
RISE = 100.0  # of the strength, at most, from one start of Newton's method to the next
ROOM = 1 << 26  # numbers held for problems fitted side by side
HALVINGS = 100  # of the bracket of an intercept
ROUNDING = 1e-18  # share of its value that an objective is to lose by a step: below it the step is rounding


def fit(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    c: float | Float[Tensor, " p"] = 1.0,
    tolerance: float = 1e-6,
) -> Fits:
    """Fit every problem to its optimum and certify it.

    Args:
        x: raw features, shared by all problems.
        y: labels of each problem.
        weights: sample weights of each problem; 0 leaves a row out of the fit and of the standardisation.
        c: inverse strength of the penalty, one for all or one a problem.
        tolerance: largest relative gap to the optimum that is accepted.

    Raises:
        ValueError: non-finite features, negative weights, c not above zero, or a problem that lacks a class.
        NotConvergedError: a problem whose certified gap exceeds `tolerance`.
    """
    p, (n, d) = len(weights), x.shape
    strengths = torch.as_tensor(c, dtype=torch.float64, device=x.device).expand(p)
    check(x, y, weights, strengths)
    if not p:
        none = x.new_zeros(0, dtype=torch.float64)
        return Fits(none.new_zeros(0, d), none, none, none, none.long())
    anywhere = (weights > 0).any(0)
    if not bool(anywhere.all()):  # a row that no problem uses must not reach the shared standardisation
        x, y, weights = x[anywhere], y[:, anywhere], weights[:, anywhere]
    features = Standardised(x, weights > 0)
    scaled = weights.double() * strengths[:, None]
    side_by_side = max(1, ROOM // (8 * n + 16 * d))
    spaces = Spaces(features, min(p, side_by_side), kin(y, strengths))

    def loss(dtype: torch.dtype, some: Tensor) -> SquaredHinge:
        return SquaredHinge.of(y[some], scaled[some], dtype)

    _, alike = torch.unique(torch.cat([y.to(weights), weights], dim=1), dim=0, return_inverse=True)

    def again(w: Tensor, own: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        del goal  # the method ends at the optimum, not near it
        w, steps = w.clone(), torch.zeros_like(own)
        last: dict[int, tuple[float, Tensor]] = {}  # strength and weights, of problems alike but for the strength
        for at in strengths[own].argsort().tolist():
            i, c = own[at], float(strengths[own[at]])
            begun, start = last.get(int(alike[i]), (c if bool(w[at].any()) else c / RISE**3, w[at, 0]))
            rungs = math.ceil(math.log(c / begun, RISE) - 1e-9)
            for rung in reversed(range(max(1, rungs))):
                start, taken = _newton(features, y[i], scaled[i] / RISE**rung, start, i[None])
                steps[at] += taken
            w[at, 0], last[int(alike[i])] = start, (c, start)
        return w, steps

    parts = [
        reach(features, spaces, loss, certify, again, part, tolerance, STEPS)
        for part in torch.arange(p, device=x.device).split(side_by_side)
    ]
    coef, intercept, objective, gap, steps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    check_gaps(gap, strengths, tolerance)
    return Fits(coef[:, 0], intercept[:, 0], objective, gap, steps)


def certify(
    features: Standardised, loss: SquaredHinge, weights: Float64[Tensor, "p c e"], problems: Int64[Tensor, " p"]
) -> tuple[Float64[Tensor, "p c e"], Float64[Tensor, " p"], Float64[Tensor, " p"]]:
    """Return the weights with the intercept put right, the objective and a bound of its relative gap.

    With the best intercept at every w the objective is a function of w alone, convex, and its penalty curves it by 1:
    it lies at most |gradient|^2 / 2 above its minimum. What is left of the intercept's gradient is added, times the
    largest way that the intercept could still go.
    """
    view = features.view(problems, torch.float64)
    logits = view.logits(weights)
    shift = _best_shift(loss, logits)
    weights = weights.clone()
    weights[..., -1] += shift
    turned = loss.turned(logits + shift[..., None])
    residual = loss.turned(loss.at(turned).residual)
    gradient = weights - view.pull(residual)
    square = (weights[..., :-1] ** 2).sum((1, 2))
    objective = loss.value(turned) + square / 2
    far = 1.0 + turned.abs().where(loss.weight > 0, 0.0).amax(-1)
    unbalanced = (residual.sum(-1).abs() * far).sum(1)
    return weights, objective, ((gradient[..., :-1] ** 2).sum((1, 2)) / 2 + unbalanced) / objective


def _best_shift(loss: SquaredHinge, logits: Float64[Tensor, "p 1 n"]) -> Float64[Tensor, "p 1"]:
    """Return what to add to the intercepts: the root of a rising, piecewise linear function, bracketed by bisection.

    The last step solves the piece that the root lies on, which is exact.
    """
    used = loss.weight > 0
    low = -1.0 - logits.where(used, -torch.inf).amax(-1)  # every positive is inside its margin, no negative is
    high = 1.0 - logits.where(used, torch.inf).amin(-1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left = loss.turned(loss.at(loss.turned(logits + middle[..., None])).residual).sum(-1)  # minus the slope
        low, high = torch.where(left > 0, middle, low), torch.where(left > 0, high, middle)
        if bool((high - low <= 1e-9 * (1 + middle.abs())).all()):
            break
    for _ in range(2):
        middle = (low + high) / 2
        point = loss.at(loss.turned(logits + middle[..., None]))
        step = loss.turned(point.residual.clone()).sum(-1) / loss.curvature(point).sum(-1).clamp(min=1e-100)
        middle = middle + step.clamp(-1e-8, 1e-8)
        low = high = middle
    return (low + high) / 2


def _newton(
    features: Standardised,
    y: Bool[Tensor, " n"],
    weights: Float64[Tensor, " n"],
    start: Float64[Tensor, " e"],
    problem: Int64[Tensor, " 1"],
) -> tuple[Float64[Tensor, " e"], int]:
    """Solve one problem by ridge regression on the rows inside the margin, until nothing is gained any more.

    Source: Keerthi & DeCoste 2005 (JMLR 6, modified finite Newton), whose exact line search makes it end: with the same
    rows as before, or where a row's margin is within rounding, with a slope that is rounding.
    """
    view = features.view(problem, torch.float64)
    group = int(features.group[problem])
    scale = features.scale[group] * features.spread
    mean = features.mean[group] * features.spread + features.centre
    loss = SquaredHinge.of(y[None], weights[None], torch.float64)
    w, half = start, weights.new_full((1,), 0.5)
    turned = loss.turned(view.logits(w[None, None]))
    for step in range(NEWTON):
        used = (turned[0, 0] < 1) & (weights > 0)
        inside = torch.nonzero(used)[:, 0]
        targets = loss.sign[0][:, inside]
        (coef,), (free,) = ridge.solve(features.x[inside], targets, weights[inside], half, mean, scale)
        goal = torch.cat([coef * scale, (free + coef @ mean)[None]])
        direction = goal - w
        along = loss.turned(view.logits(direction[None, None]))
        size, slope = _along(loss, turned, along, w[:-1], direction[:-1])
        value = float(loss.value(turned)[0] + w[:-1] @ w[:-1] / 2)
        w, turned = w + size * direction, turned + size * along
        same = torch.equal((turned[0, 0] < 1) & (weights > 0), used)
        if same and size == 1.0 or -slope <= ROUNDING * value:
            return w, step + 1
    return w, NEWTON


def _along(
    loss: SquaredHinge,
    turned: Float64[Tensor, "1 1 n"],
    along: Float64[Tensor, "1 1 n"],
    weights: Float64[Tensor, " d"],
    direction: Float64[Tensor, " d"],
) -> tuple[float, float]:
    """Return the step at which the objective is least along a line, and the slope at its start.

    The slope only rises along the line, and is 0 in a bracket.
    """
    linear, quadratic = float(weights @ direction), float(direction @ direction)

    def slope(size: float) -> float:
        pull = torch.linalg.vecdot(loss.at(turned + size * along).residual, along).sum()
        return linear + size * quadratic - float(pull)

    low, high, first = 0.0, 1.0, slope(0.0)
    while slope(high) < 0 and high < 1e6:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        if high - low <= 1e-12 * high:
            break
    return (high if abs(high - 1) > 1e-9 else 1.0), first
