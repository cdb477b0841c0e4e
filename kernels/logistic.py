"""L2 logistic regression, many problems over one X: folds, targets, strengths and class balance are labels and weights.

Objective of a problem (scikit-learn's): C * sum_i s_i loss(f_i, y_i) + |w|^2 / 2, f = w . z + b, with the logistic loss
of two classes or the softmax loss of several, the intercept free, z standardised by the rows whose weight s_i is above
zero. Every fit carries a duality gap computed in float64 on the raw features, a rigorous bound on its distance from the
optimum: a fit that is off by more than was asked for is taken up again in float64, and is never returned.
"""

from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from gapprobe.kernels.certified import MARGIN, check, check_gaps, kin, reach, solved
from gapprobe.kernels.certified import NotConvergedError as NotConvergedError
from gapprobe.kernels.descent import descend
from gapprobe.kernels.losses import Binary, Multinomial, Point
from gapprobe.kernels.preconditioner import Spaces
from gapprobe.kernels.standardised import Standardised

STEPS = 500  # in float32; real problems take 5 to 150
MORE_STEPS = 2000  # in float64, where float32 did not reach the tolerance
BRIEF = 100  # of them where Newton's method can take over: what has not arrived by then is ill-conditioned
NEWTON = 200  # and then of Newton's method
DENSE = 6000  # largest Hessian that it forms
ROOM = 1 << 26  # numbers held for problems fitted side by side


@dataclass(frozen=True)
class LogisticFits:
    """Fitted problems, in raw coordinates: the standardisation is folded into `coef` and `intercept`.

    Two classes have one row of log-odds (no axis `c`), several have one for each class.

    Attributes:
        coef: weight of each raw feature.
        intercept: free term.
        objective: value reached, of the objective in the module's docstring.
        gap: upper bound of (objective - optimum) / objective, from the dual.
        steps: times that the gradient was computed.
    """

    coef: Float64[Tensor, "p *c d"]
    intercept: Float64[Tensor, "p *c"]
    objective: Float64[Tensor, " p"]
    gap: Float64[Tensor, " p"]
    steps: Int64[Tensor, " p"]

    def logits(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p *c n"]:
        """Return the log-odds (several classes: the logits) of every row under every problem."""
        return einsum(self.coef, x.double(), "p ... d, n d -> p ... n") + self.intercept[..., None]


def reference(
    x: Float[Tensor, "n d"], y: Int[Tensor, " n"] | Bool[Tensor, " n"], weights: Float[Tensor, " n"], c: float = 1.0
) -> tuple[Float64[Tensor, "c d"], Float64[Tensor, " c"]]:
    """Fit one problem by damped Newton in float64, written for reading; return raw coefficients and intercepts.

    Labels that are Bool give one row of log-odds, integers one row a class.
    """
    used = weights > 0
    x, s, y = x[used].double(), c * weights[used].double(), y[used]
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * mean.abs(), deviation, 1.0)
    z = torch.cat([(x - mean) / scale, torch.ones_like(s)[:, None]], dim=1)
    classes = 1 if y.dtype == torch.bool else int(y.max()) + 1
    hot = torch.stack([~y, y]) if classes == 1 else y == torch.arange(classes)[:, None]
    d = z.shape[1]
    penalty = torch.ones(classes, d, dtype=torch.float64)
    penalty[:, -1] = 0.0

    def log_shares(w: Tensor) -> Tensor:
        logits = w @ z.T
        return torch.log_softmax(torch.cat([torch.zeros_like(logits), logits]) if classes == 1 else logits, 0)

    def objective(w: Tensor) -> Tensor:
        return -(s * log_shares(w))[hot].sum() + (penalty * w * w).sum() / 2

    w = torch.zeros_like(penalty)
    for _ in range(100):
        q = log_shares(w).exp()
        gradient = (penalty * w - (s * (hot.double() - q))[-classes:] @ z).flatten()
        curvature = s * (torch.eye(len(q))[..., None] * q[:, None] - q[:, None] * q[None])  # of each row's logits
        hessian = einsum(curvature[-classes:, -classes:], z, z, "a b n, n d, n e -> a d b e").reshape(classes * d, -1)
        # Shifting all intercepts of a softmax changes nothing: the least-norm step is as good as any.
        step = torch.linalg.lstsq(hessian + torch.diag(penalty.flatten()), gradient, driver="gelsd").solution
        size, step = 1.0, step.view(classes, d)
        while size > 1e-10 and objective(w - size * step) > objective(w):
            size /= 2
        w = w - size * step
        if gradient @ step.flatten() < 1e-16 * objective(w):
            break
    coef = w[:, :-1] / scale
    return coef, w[:, -1] - coef @ mean


def balanced(y: Bool[Tensor, "p n"] | Int[Tensor, "p n"], mask: Bool[Tensor, "p n"]) -> Float64[Tensor, "p n"]:
    """Return weights that give each class of a problem's rows the same total: n / (c n_class), 0 outside `mask`."""
    classes = torch.arange(2 if y.dtype == torch.bool or not y.numel() else int(y.max()) + 1)
    hot = (y[:, None].long() == classes[:, None]) & mask[:, None]
    counts = reduce(hot.double(), "p c n -> p c", "sum")
    shares = reduce(mask.double(), "p n -> p 1", "sum") / ((counts > 0).sum(1, keepdim=True) * counts.clamp(min=1.0))
    return einsum(hot.double(), shares, "p c n, p c -> p n")


def fit(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "p n"] | Int[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    c: float | Float[Tensor, " p"] = 1.0,
    tolerance: float = 1e-6,
) -> LogisticFits:
    """Fit every problem to its optimum and certify it.

    float32 products on one standardised copy of X find the optimum; float64 on the raw features says how near it is.

    Args:
        x: raw features, shared by all problems.
        y: labels of each problem: Bool for two classes, integers from 0 for several.
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
    classes = 1 if y.dtype == torch.bool else int(y.max()) + 1 if y.numel() else 2
    if not p:
        shape = (0,) if classes == 1 else (0, classes)
        none = x.new_zeros(0, dtype=torch.float64)
        return LogisticFits(none.new_zeros(*shape, d), none.new_zeros(shape), none, none, none.long())
    anywhere = (weights > 0).any(0)
    if not bool(anywhere.all()):  # a row that no problem uses must not reach the shared standardisation
        x, y, weights = x[anywhere], y[:, anywhere], weights[:, anywhere]
    features = Standardised(x, weights > 0)
    scaled = weights.double() * strengths[:, None]
    side_by_side = max(1, ROOM // (classes * (8 * n + 16 * d)))
    spaces = Spaces(features, min(p, side_by_side) * classes, kin(y, strengths))

    def loss(dtype: torch.dtype, some: Tensor) -> Binary | Multinomial:
        if classes == 1:
            return Binary.of(y[some], scaled[some], dtype)
        return Multinomial.of(y[some], classes, scaled[some], dtype)

    def again(w: Tensor, own: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        exact, dense = loss(torch.float64, own), classes * min(n, d) <= DENSE
        if goal < MARGIN * tolerance and dense:  # float64 descent was not enough
            taken = [_newton(features, exact, own, i, w) for i in range(len(own))]
            return w, torch.tensor(taken, device=w.device)
        most = BRIEF if dense else MORE_STEPS
        return descend(features, exact, w, spaces, problems=own, goal=goal, most=most)

    parts = [
        reach(features, spaces, loss, certify, again, part, tolerance, STEPS)
        for part in torch.arange(p, device=x.device).split(side_by_side)
    ]
    coef, intercept, objective, gap, steps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    check_gaps(gap, strengths, tolerance)
    if classes == 1:
        coef, intercept = coef[:, 0], intercept[:, 0]
    return LogisticFits(coef, intercept, objective, gap, steps)


def _newton(
    features: Standardised,
    loss: Binary | Multinomial,
    problems: Int64[Tensor, " p"],
    which: int,
    weights: Float64[Tensor, "p c e"],
) -> int:
    """Improve one problem's weights in place by damped Newton in float64; return the steps taken.

    Where different rows are fewer than features all are first written in an orthogonal basis of their span: the penalty
    does not see the rotation, and the optimum lies in the span. The embeddings of last tokens are often few.
    """
    one = torch.arange(len(problems), device=weights.device) == which
    view, loss = features.view(problems[one], torch.float64), loss.keep(one)
    used = loss.weight[0, 0] > 0
    z = view.dense(used)
    loss = loss.of_rows(used)
    w, basis, different = weights[which], None, torch.unique(z, dim=0)
    if len(different) < z.shape[1]:
        basis = torch.linalg.qr(different.T)[0]
        z, w = z @ basis, torch.cat([w[:, :-1] @ basis, w[:, -1:]], dim=1)
    z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    c, e = w.shape
    penalty = torch.ones_like(w)
    penalty[:, -1] = 0.0

    def value(w: Tensor, turned: Tensor) -> Tensor:
        return loss.value(turned)[0] + (penalty * w * w).sum() / 2

    turned = loss.turned((w @ z.T)[None])
    best = value(w, turned)
    taken = 0
    while taken < NEWTON:
        taken += 1
        point = loss.at(turned)
        gradient = (penalty * w - loss.turned(point.residual.clone())[0] @ z).flatten()
        between = loss.between(point)[0]
        hessian = torch.cat(
            [torch.cat([z.T @ (between[a, b][:, None] * z) for b in range(c)], dim=1) for a in range(c)]
        )
        hessian.diagonal().add_(penalty.flatten())
        step = solved(hessian, gradient).view(c, e)
        promised = gradient @ step.flatten()
        along, size = loss.turned((step @ z.T)[None]), 1.0
        while size > 1e-12 and not value(w - size * step, turned - size * along) <= best:
            size /= 2
        if size <= 1e-12 or not promised > 0:
            break
        w, turned = w - size * step, loss.turned(((w - size * step) @ z.T)[None])
        best = value(w, turned)
        if promised <= 1e-18 * best:
            break
    weights[which] = w if basis is None else torch.cat([w[:, :-1] @ basis.T, w[:, -1:]], dim=1)
    return taken


def certify(
    features: Standardised, loss: Binary | Multinomial, weights: Float64[Tensor, "p c e"], problems: Int64[Tensor, " p"]
) -> tuple[Float64[Tensor, "p c e"], Float64[Tensor, " p"], Float64[Tensor, " p"]]:
    """Return the weights with the intercept put right, the objective and the relative duality gap.

    With shares q of the classes at f, the dual point a_i = s_i (1[y_i] - q_i) is feasible where the intercept is
    optimal (sum_i a_i = 0), and objective minus dual is then exactly |w - sum_i a_i z_i|^2 / 2, by Fenchel and Young.
    The intercept is made optimal here, up to rounding; what is left of its gradient is added to the gap.
    """
    view = features.view(problems, torch.float64)
    turned = loss.turned(view.logits(weights))
    weights = weights.clone()
    for _ in range(60):
        point = loss.at(turned)
        residual = loss.turned(point.residual.clone())
        open_end = residual.sum(-1)
        if bool((open_end.abs() <= 1e-14 * residual.abs().sum(-1)).all()):
            break
        shift = _intercept_step(loss, point, open_end).clamp(-1.0, 1.0)
        weights[..., -1] += shift
        turned = loss.turned(loss.turned(turned) + shift[..., None])
    else:
        point = loss.at(turned)
        residual = loss.turned(point.residual.clone())
    gradient = weights - view.pull(residual)
    square = (weights[..., :-1] ** 2).sum((1, 2))
    objective = loss.value(turned) + square / 2
    used = turned.abs().where(loss.weight > 0, 0.0)
    unbalanced = (residual.sum(-1).abs() * (1.0 + used.amax(-1))).sum(1)
    return weights, objective, ((gradient[..., :-1] ** 2).sum((1, 2)) / 2 + unbalanced) / objective


def _intercept_step(
    loss: Binary | Multinomial, point: Point, open_end: Float64[Tensor, "p c"]
) -> Float64[Tensor, "p c"]:
    """Newton's step on the intercepts alone."""
    if isinstance(loss, Binary):
        return open_end / loss.curvature(point).sum(-1).clamp(min=1e-100)
    weighted = loss.weight * point.share
    hessian = torch.diag_embed(weighted.sum(-1)) - einsum(weighted, point.share, "p a n, p b n -> p a b")
    # A shift of all intercepts changes nothing; a constant block keeps it at 0.
    size = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    hessian = (
        hessian + size + (1e-10 * size + 1e-100) * torch.eye(hessian.shape[1], device=size.device, dtype=size.dtype)
    )
    return torch.linalg.solve(hessian, open_end)
