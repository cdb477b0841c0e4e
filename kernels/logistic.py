"""L2 logistic regression, many problems over one X: folds, targets and class balance are rows of labels and weights.

Objective of a problem (scikit-learn's): C * sum_i s_i log(1 + exp(-y_i (w.z_i + b))) + |w|^2 / 2, with y in {-1, 1},
the intercept free, z standardised by the rows whose weight s_i is above zero. Every fit carries a duality gap, a
rigorous bound on its distance from the optimum. No probe, layer or fold is known here.
"""

from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

MAX_STEPS = 100
MAX_NARROW_STEPS = 25  # with the Hessian in float32
MAX_HALVINGS = 40
STOP = 1e-8  # Newton takes its last step when the decrement promises less than this share of the objective
GOOD = 1e-9  # a certified gap above this is tried again with the Hessian in float64
CHUNK = 1 << 19  # standardised features held at once, in float64 numbers: a chunk should stay in the cache


class NotConvergedError(ArithmeticError):
    """A fit whose certified gap is larger than was asked for."""


@dataclass(frozen=True)
class LogisticFits:
    """Fitted problems, in raw coordinates: the standardisation is folded into `coef` and `intercept`.

    Attributes:
        coef: weight of each raw feature.
        intercept: free term.
        objective: value reached, of the objective in the module's docstring.
        gap: upper bound of (objective - optimum) / objective, from the dual.
        steps: Newton steps taken.
    """

    coef: Float64[Tensor, "p d"]
    intercept: Float64[Tensor, " p"]
    objective: Float64[Tensor, " p"]
    gap: Float64[Tensor, " p"]
    steps: Int64[Tensor, " p"]

    def logits(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return the log-odds of every row under every problem."""
        return einsum(self.coef, x.double(), "p d, n d -> p n") + self.intercept[:, None]


def reference(
    x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], weights: Float[Tensor, " n"], c: float = 1.0
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Fit one problem by damped Newton in float64, written for reading; return raw coefficients and intercept."""
    used = weights > 0
    x, s, sign = x[used].double(), c * weights[used].double(), 2.0 * y[used].double() - 1.0
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * mean.abs(), deviation, 1.0)
    z = torch.cat([(x - mean) / scale, torch.ones_like(s)[:, None]], dim=1)
    penalty = torch.ones(z.shape[1], dtype=torch.float64, device=x.device)
    penalty[-1] = 0.0

    def objective(w: Tensor) -> Tensor:
        return (s * torch.nn.functional.softplus(-sign * (z @ w), threshold=700)).sum() + (penalty * w * w).sum() / 2

    w = torch.zeros_like(penalty)
    for _ in range(MAX_STEPS):
        p = torch.sigmoid(-sign * (z @ w))
        gradient = penalty * w - z.T @ (s * sign * p)
        hessian = torch.diag(penalty) + z.T @ ((s * p * (1 - p))[:, None] * z)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and objective(w - size * step) > objective(w):
            size /= 2
        w = w - size * step
        if gradient @ step < STOP * objective(w):
            break
    coef = w[:-1] / scale
    return coef, w[-1] - coef @ mean


def balanced(y: Bool[Tensor, "p n"], mask: Bool[Tensor, "p n"]) -> Float64[Tensor, "p n"]:
    """Return weights that give both classes of a problem's rows the same total: n / (2 n_class), 0 outside `mask`."""
    positive, negative = (y & mask).double(), (~y & mask).double()
    total = reduce(mask.double(), "p n -> p 1", "sum")
    counts = [reduce(part, "p n -> p 1", "sum").clamp(min=1.0) for part in (positive, negative)]
    return total / 2 * (positive / counts[0] + negative / counts[1])


def fit(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    c: float = 1.0,
    tolerance: float = 1e-6,
) -> LogisticFits:
    """Fit every problem to its optimum by Newton's method in float64 and certify it.

    Where a problem has fewer rows than features its rows are first written in an orthogonal basis of their own span:
    the L2 penalty does not see the rotation, and the optimum lies in the span.

    Args:
        x: raw features, shared by all problems.
        y: labels of each problem.
        weights: sample weights of each problem; 0 leaves a row out of the fit and of the standardisation.
        c: inverse strength of the penalty.
        tolerance: largest relative gap to the optimum that is accepted.

    Raises:
        ValueError: non-finite features, negative weights, c not above zero, or a problem with one class only.
        NotConvergedError: a problem whose certified gap exceeds `tolerance`.
    """
    _check(x, y, weights, c)
    x = x.double()
    width = int((weights > 0).sum(1).max()) if len(weights) else 0
    per_chunk = max(1, CHUNK // max(1, width * x.shape[1]))
    parts = [
        _fit_chunk(x, y[start : start + per_chunk], c * weights[start : start + per_chunk].double(), width)
        for start in range(0, len(weights), per_chunk)
    ]
    if not parts:
        none = x.new_zeros(0)
        return LogisticFits(x.new_zeros(0, x.shape[1]), none, none, none, none.long())
    coef, intercept, objective, gap, steps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    worst = int(gap.nan_to_num(torch.inf).argmax())
    if not float(gap[worst]) <= tolerance:
        raise NotConvergedError(
            f"problem {worst} ended {float(gap[worst]):.1e} of its objective off the optimum, not {tolerance:.1e}: "
            f"the features may be too badly scaled, or c={c} too large; rescale them or lower c"
        )
    return LogisticFits(coef, intercept, objective, gap, steps)


def _check(x: Tensor, y: Tensor, weights: Tensor, c: float) -> None:
    if not c > 0:
        raise ValueError(f"c must be above 0, got {c}")
    if y.shape != weights.shape or y.shape[1] != x.shape[0]:
        raise ValueError(f"labels {tuple(y.shape)} and weights {tuple(weights.shape)} must be [p, {x.shape[0]}]")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"row {int(torch.nonzero(~torch.isfinite(x))[0, 0])} of x holds NaN or infinity")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights must be finite and not negative")
    for label, rows in ((True, y & (weights > 0)), (False, ~y & (weights > 0))):
        missing = torch.nonzero(~rows.any(1))
        if len(missing):
            raise ValueError(f"problem {int(missing[0])} has no row of class {label}; a fit needs both classes")


def _fit_chunk(
    x: Float64[Tensor, "n d"], y: Bool[Tensor, "p n"], s: Float64[Tensor, "p n"], width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather each problem's rows (m of them, padded with rows of weight 0), standardise, solve, certify, fold back."""
    rows = torch.argsort((s == 0).to(torch.uint8), dim=1, stable=True)[:, :width]
    s, sign = s.gather(1, rows), 2.0 * y.gather(1, rows).double() - 1.0
    z = x[rows]
    mean, scale = _standardise(z, (s > 0).double())
    w, b, objective, gap, steps = _solve(z, sign, s, torch.float32, MAX_NARROW_STEPS)
    poor = ~(gap <= GOOD)
    if bool(poor.any()):
        again = _solve(z[poor], sign[poor], s[poor], torch.float64, MAX_STEPS)
        for kept, better in zip((w, b, objective, gap, steps), again, strict=True):
            kept[poor] = better
    coef = w / scale
    return coef, b - (coef * mean).sum(1), objective, gap, steps


def _solve(
    z: Float64[Tensor, "p m d"],
    sign: Float64[Tensor, "p m"],
    s: Float64[Tensor, "p m"],
    curvature: torch.dtype,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Newton in an orthogonal basis of the rows where they are fewer than the features, then the certificate."""
    if z.shape[2] > z.shape[1]:
        basis, triangle = torch.linalg.qr(z.mT)
        reduced, b, steps = _newton(triangle.mT, sign, s, curvature, most)
        w = einsum(basis, reduced, "p d k, p k -> p d")
    else:
        w, b, steps = _newton(z, sign, s, curvature, most)
    return w, b, *_certificate(z, sign, s, w, b), steps


def _standardise(
    z: Float64[Tensor, "p m d"], used: Float64[Tensor, "p m"]
) -> tuple[Float64[Tensor, "p d"], Float64[Tensor, "p d"]]:
    """Standardise in place by the used rows; return what was taken off and divided by.

    A deviation that is only rounding is replaced by 1: a constant feature stays constant and gets no weight.
    """
    count = used.sum(1)[:, None]
    mean = einsum(used, z, "p m, p m d -> p d") / count
    z -= mean[:, None]
    variance = einsum(used, z * z, "p m, p m d -> p d") / count
    # scikit-learn's bound on the rounding of a variance (StandardScaler): at or below it the feature is constant.
    eps = torch.finfo(torch.float64).eps
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2
    scale = torch.where(constant, 1.0, variance.sqrt())
    z /= scale[:, None]
    return mean, scale


def _newton(
    z: Float64[Tensor, "p m k"],
    sign: Float64[Tensor, "p m"],
    s: Float64[Tensor, "p m"],
    curvature: torch.dtype,
    most: int,
) -> tuple[Float64[Tensor, "p k"], Float64[Tensor, " p"], Int64[Tensor, " p"]]:
    """Damped Newton over all problems at once, each with its own Hessian and step length.

    Gradient, objective and line search are float64. The Hessian is a matrix product in `curvature`: its error costs
    convergence speed only, never the optimum.
    """
    p, _, k = z.shape
    z = torch.cat([z, torch.ones_like(s)[..., None]], dim=2)
    penalty = z.new_ones(k + 1)
    penalty[-1] = 0.0
    # Keeps the factorisation alive where a separable problem leaves no curvature in the intercept.
    floor = torch.diag_embed(penalty + (1.0 - penalty) * 1e-12)
    narrow = z.to(curvature)
    w = z.new_zeros(p, k + 1)
    f = torch.zeros_like(s)
    value = _objective(f, w * penalty, sign, s)
    steps = torch.zeros(p, dtype=torch.int64, device=z.device)
    done = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(most):
        wrong = torch.sigmoid(-sign * f)
        gradient = penalty * w - einsum(z, s * sign * wrong, "p m k, p m -> p k")
        scaled = narrow * (s * wrong * (1.0 - wrong)).sqrt().to(curvature)[..., None]
        factor, failed = torch.linalg.cholesky_ex(floor.to(curvature) + scaled.mT @ scaled)
        if bool(failed.any()):
            break
        step = -torch.cholesky_solve(gradient[..., None].to(curvature), factor)[..., 0].double()
        slope = (gradient * step).sum(1)
        df = einsum(z, step, "p m k, p k -> p m")
        size = torch.where(done, 0.0, 1.0)  # a problem that is done no longer moves, whatever the others need
        for _ in range(MAX_HALVINGS):
            reached = _objective(f + size[:, None] * df, (w + size[:, None] * step) * penalty, sign, s)
            short = reached > value + 1e-4 * size * slope + 1e-15 * value
            if not bool(short.any()):
                break
            size = torch.where(short, size / 2, size)
        w, f = w + size[:, None] * step, f + size[:, None] * df
        value = _objective(f, w * penalty, sign, s)
        steps += ~done
        done |= -slope <= STOP * value  # known only now, after the step: Newton squares what is left
        if bool(done.all()):
            break
    return w[:, :-1], w[:, -1], steps


def _objective(f: Tensor, w: Tensor, sign: Tensor, s: Tensor) -> Float64[Tensor, " p"]:
    return -(s * torch.nn.functional.logsigmoid(sign * f)).sum(1) + (w * w).sum(1) / 2


def _certificate(
    z: Float64[Tensor, "p m d"],
    sign: Float64[Tensor, "p m"],
    s: Float64[Tensor, "p m"],
    w: Float64[Tensor, "p d"],
    b: Float64[Tensor, " p"],
) -> tuple[Float64[Tensor, " p"], Float64[Tensor, " p"]]:
    """Return the objective and the relative duality gap.

    The dual of the objective is -|sum_i a_i y_i z_i|^2 / 2 - sum_i s_i [q log q + (1-q) log(1-q)] with q = a_i / s_i in
    [0, 1] and sum_i a_i y_i = 0. The point a_i = s_i sigmoid(-y_i f_i) meets the last condition only up to the
    intercept's gradient, so the heavier class is scaled down to meet it exactly: any feasible point bounds the optimum.
    """
    f = einsum(z, w, "p m d, p d -> p m") + b[:, None]
    primal = _objective(f, w, sign, s)
    q = torch.sigmoid(-sign * f)
    positive = (s * q * (sign > 0)).sum(1)
    negative = (s * q * (sign < 0)).sum(1)
    lighter = torch.minimum(positive, negative)
    shrink = torch.where(sign > 0, (lighter / positive)[:, None], (lighter / negative)[:, None])
    q = q * shrink
    entropy = -(s * (torch.xlogy(q, q) + torch.xlogy(1.0 - q, 1.0 - q))).sum(1)
    pull = einsum(z, s * q * sign, "p m d, p m -> p d")
    dual = entropy - (pull * pull).sum(1) / 2
    return primal, (primal - dual).clamp(min=0.0) / primal
