"""Logistic regression with an L1 or elastic-net penalty, many problems over one X, certified as `logistic` is.

Objective of a problem (scikit-learn's, r its l1_ratio): C * sum_i s_i log(1 + exp(-y_i f_i)) + r |w|_1 +
(1 - r) / 2 |w|^2, f = w . z + b, the intercept free, z standardised by the rows whose weight s_i is above zero.

Proximal Newton on a working set: each step forms the Hessian of the features that have a weight or deserve one, solves
the quadratic problem with its L1 term exactly, and searches along the way there. Strengths of the same rows and labels
are fitted from the strongest penalty on, each from the last. One product with all of X, for all problems side by side,
gives both the certificate and the next working set, so nothing need be screened out beforehand. Sources: Lee, Sun &
Saunders 2014 (proximal Newton), Bertsekas 1982 (projected Newton, for the quadratic problem), Massias, Gramfort &
Salmon 2018 (working sets), Ndiaye, Fercoq, Gramfort & Salmon 2017 (the dual point).
"""

from collections import Counter

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gapprobe.kernels.certified import Fits, check, check_gaps, solved
from gapprobe.kernels.losses import Binary
from gapprobe.kernels.standardised import Standardised

STEPS = 200  # of Newton's method; 4 to 15 are usual
NEW = 100  # features that may join in a step, at least; half as many as have a weight, where that is more
CHANGES = 500  # of the set of weights that are not 0, within one step; 3 to 10 are usual
LENGTHS = 6  # of step that are tried at once
HALVINGS = 40  # of a step
CENTRINGS = 60  # steps that put an intercept right
ROOM = 1 << 26  # numbers held for problems fitted side by side


def reference(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, " n"],
    weights: Float[Tensor, " n"],
    c: float = 1.0,
    l1_ratio: float = 1.0,
    steps: int = 20_000,
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Fit one problem by accelerated proximal gradients, written for reading; return raw coefficients and intercept.

    Source: Beck & Teboulle 2009 (FISTA), started again where it overshoots (O'Donoghue & Candes 2015).
    """
    used = weights > 0
    x, s, sign = x[used].double(), c * weights[used].double(), 2.0 * y[used].double() - 1.0
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * mean.abs(), deviation, 1.0)
    z = torch.cat([(x - mean) / scale, torch.ones_like(s)[:, None]], dim=1)
    penalised = torch.ones_like(z[0])
    penalised[-1] = 0.0
    size = 1.0 / (torch.linalg.matrix_norm(s.sqrt()[:, None] * z, ord=2) ** 2 / 4 + 1.0 - l1_ratio)
    w = ahead = torch.zeros_like(z[0])
    momentum = 1.0
    for _ in range(steps):
        slope = -(s * sign * torch.sigmoid(-sign * (z @ ahead))) @ z + (1.0 - l1_ratio) * penalised * ahead
        moved = ahead - size * slope
        moved = moved.sign() * (moved.abs() - size * l1_ratio * penalised).clamp(min=0.0)
        if (ahead - moved) @ (moved - w) > 0:
            momentum = 1.0
        later = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        ahead, w, momentum = moved + (momentum - 1.0) / later * (moved - w), moved, later
    coef = w[:-1] / scale
    return coef, w[-1] - coef @ mean


def fit(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    c: float | Float[Tensor, " p"] = 1.0,
    l1_ratio: float = 1.0,
    tolerance: float = 1e-6,
) -> Fits:
    """Fit every problem to its optimum and certify it.

    Args:
        x: raw features, shared by all problems.
        y: labels of each problem.
        weights: sample weights of each problem; 0 leaves a row out of the fit and of the standardisation.
        c: inverse strength of the penalty, one for all or one a problem.
        l1_ratio: share r of the penalty that is |w|_1, above 0 and at most 1.
        tolerance: largest relative gap to the optimum that is accepted.

    Raises:
        ValueError: non-finite features, negative weights, c not above zero, r out of range, or a problem that lacks a
            class.
        NotConvergedError: a problem whose certified gap exceeds `tolerance`.
    """
    p, (n, d) = len(weights), x.shape
    strengths = torch.as_tensor(c, dtype=torch.float64, device=x.device).expand(p)
    check(x, y, weights, strengths)
    if not 0 < l1_ratio <= 1:
        raise ValueError(f"l1_ratio must be above 0 and at most 1, got {l1_ratio}: without an L1 term use `logistic`")
    none = x.new_zeros(p, dtype=torch.float64)
    if not p:
        return Fits(none.new_zeros(0, d), none, none, none, none.long())
    anywhere = (weights > 0).any(0)
    if not bool(anywhere.all()):  # a row that no problem uses must not reach the shared standardisation
        x, y, weights = x[anywhere], y[:, anywhere], weights[:, anywhere]
    features = Standardised(x, weights > 0)
    w = none.new_zeros(p, 1, d + 1)
    objective, gap, steps = none, torch.full_like(none, torch.inf), none.long()
    for level in _levels(y, weights, strengths):
        own = torch.tensor([i for i, _ in level], device=x.device)
        before = torch.tensor([j for _, j in level], device=x.device)
        loss = Binary.of(y[own], weights[own].double() * strengths[own, None], torch.float64)
        w[own] = w[before]
        w[own, 0, -1] = torch.where(before == own, loss.start()[:, 0], w[own, 0, -1])
        for part in torch.arange(len(own), device=x.device).split(max(1, ROOM // (8 * n + 4 * d))):
            some = own[part]
            w[some], objective[some], gap[some], steps[some] = _reach(
                features, loss.keep(part), w[some], some, l1_ratio, tolerance
            )
    check_gaps(gap, strengths, tolerance)
    coef, intercept = features.view(torch.arange(p, device=x.device), torch.float64).in_raw(w)
    return Fits(coef[:, 0], intercept[:, 0], objective, gap, steps)


def _levels(
    y: Bool[Tensor, "p n"], weights: Float[Tensor, "p n"], strengths: Float64[Tensor, " p"]
) -> list[list[tuple[int, int]]]:
    """Put problems into an order in which each can start from another, as pairs (problem, where it starts).

    Problems of the same labels and weights come one a level, by rising strength; the first starts from itself.
    """
    _, same = torch.unique(torch.cat([y.to(weights), weights], dim=1), dim=0, return_inverse=True)
    levels: list[list[tuple[int, int]]] = []
    depth: Counter[int] = Counter()
    last: dict[int, int] = {}
    for i in strengths.argsort().tolist():
        group = int(same[i])
        if depth[group] == len(levels):
            levels.append([])
        levels[depth[group]].append((i, last.setdefault(group, i)))
        depth[group] += 1
        last[group] = i
    return levels


def _reach(
    features: Standardised,
    loss: Binary,
    weights: Float64[Tensor, "p 1 e"],
    problems: Int64[Tensor, " p"],
    l1_ratio: float,
    tolerance: float,
) -> tuple[Float64[Tensor, "p 1 e"], Float64[Tensor, " p"], Float64[Tensor, " p"], Int64[Tensor, " p"]]:
    """Step until every problem's gap is within the tolerance, or there are no steps left; the caller checks."""
    weights, objective, gap, turned, pull = certify(features, loss, weights, problems, l1_ratio)
    steps = torch.zeros_like(problems)
    on = torch.arange(len(problems), device=weights.device)
    for _ in range(STEPS):
        on = on[~(gap[on] <= tolerance)]
        if not len(on):
            break
        for i in on.tolist():
            weights[i, 0] = _step(
                features, loss.keep(on.new_tensor([i])), weights[i, 0], turned[i, 0], pull[i, 0], problems[i], l1_ratio
            )
        steps[on] += 1
        found = certify(features, loss.keep(on), weights[on], problems[on], l1_ratio)
        for kept, new in zip((weights, objective, gap, turned, pull), found, strict=True):
            kept[on] = new
    return weights, objective, gap, steps


def certify(
    features: Standardised,
    loss: Binary,
    weights: Float64[Tensor, "p 1 e"],
    problems: Int64[Tensor, " p"],
    l1_ratio: float,
) -> tuple[
    Float64[Tensor, "p 1 e"],
    Float64[Tensor, " p"],
    Float64[Tensor, " p"],
    Float64[Tensor, "p 1 n"],
    Float64[Tensor, "p 1 e"],
]:
    """Return weights with the intercept put right, objective, relative duality gap, turned logits, and sum_i a_i z_i.

    With shares q_i of the wrong label at f (s_i here has C in it), any 0 <= k_i <= 1 / q_i makes a_i = y_i s_i k_i q_i
    a dual point, if sum_i a_i = 0. The dual is sum_i s_i H(k_i q_i) - g*(u), H the entropy, u = sum_i a_i z_i, g* the
    conjugate of the penalty: sum_j max(0, |u_j| - r)^2 / (2 (1 - r)), or for r = 1 nothing where |u|_inf <= 1, else
    infinity. Here k first shrinks the class whose sum is the larger, then, for r = 1, both until u is small enough:
    feasible up to rounding whatever the weights are, and at the optimum k = 1.
    """
    view = features.view(problems, torch.float64)
    weights = weights.clone()
    turned = loss.turned(view.logits(weights))
    point = loss.at(turned)
    for _ in range(CENTRINGS):
        residual = loss.turned(point.residual.clone())
        unbalanced = residual.sum(-1)
        if bool((unbalanced.abs() <= 1e-14 * point.residual.sum(-1)).all()):
            break
        shift = (unbalanced / loss.curvature(point).sum(-1).clamp(min=1e-100)).clamp(-1.0, 1.0)
        weights[..., -1] += shift
        turned += loss.sign * shift[..., None]
        point = loss.at(turned)
    positive, negative = (point.residual.where(loss.sign * side > 0, 0.0).sum(-1, keepdim=True) for side in (1, -1))
    least = torch.minimum(positive, negative)
    share = point.share * torch.where(loss.sign > 0, least / positive, least / negative)
    pull = view.pull(loss.turned(loss.weight * share))
    u = pull[:, 0, :-1].abs()
    if l1_ratio == 1.0:
        share = share / u.amax(-1, keepdim=True).clamp(min=1.0)[..., None]
        conjugate = torch.zeros_like(u[:, 0])
    else:
        conjugate = (u - l1_ratio).clamp(min=0.0).square().sum(-1) / (2.0 * (1.0 - l1_ratio))
    entropy = -torch.special.xlogy(share, share) - torch.special.xlog1py(1.0 - share, -share)
    dual = (loss.weight * entropy).sum((1, 2)) - conjugate
    size = weights[:, 0, :-1]
    objective = loss.value(turned) + l1_ratio * size.abs().sum(-1) + (1.0 - l1_ratio) / 2.0 * size.square().sum(-1)
    return weights, objective, (objective - dual) / objective, turned, pull


def _step(
    features: Standardised,
    loss: Binary,
    weights: Float64[Tensor, " e"],
    turned: Float64[Tensor, " n"],
    pull: Float64[Tensor, " e"],
    problem: Int64[Tensor, ""],
    l1_ratio: float,
) -> Float64[Tensor, " e"]:
    """Return one problem's weights after a step of proximal Newton on its working set."""
    missing = (pull[:-1].abs() - l1_ratio).where(weights[:-1] == 0, 0.0).clamp(min=0.0)
    support = torch.nonzero(weights[:-1])[:, 0]
    new = missing.topk(min(int((missing > 0).sum()), max(NEW, len(support) // 2))).indices
    own = torch.cat([support, new])
    rows = loss.weight[0, 0] > 0
    view = features.view(problem[None], torch.float64)
    z = view.dense(rows, own)
    z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    own = torch.cat([own, own.new_tensor([len(weights) - 1])])

    loss, turned = loss.of_rows(rows), turned[rows]
    w, l1, l2 = weights[own], torch.full_like(weights[own], l1_ratio), torch.full_like(weights[own], 1.0 - l1_ratio)
    l1[-1] = l2[-1] = 0.0
    scaled = z * loss.curvature(loss.at(turned[None, None]))[0, 0].sqrt()[:, None]
    hessian = scaled.T @ scaled
    hessian.diagonal().add_(l2)
    slope = l2 * w - pull[own]
    way = _quadratic(hessian, slope, w, l1) - w
    along = loss.sign[0, 0] * (z @ way)

    def value(size: float) -> float:
        moved = w + size * way
        penalty = (l1 * moved.abs() + l2 * moved * moved / 2).sum()
        return float(loss.value((turned + size * along)[None, None])[0] + penalty)

    promised = float(slope @ way + (l1 * ((w + way).abs() - w.abs())).sum())
    before, size = value(0.0), 1.0
    for _ in range(HALVINGS):
        if value(size) <= before + 1e-4 * size * promised:
            break
        size /= 2
    else:
        return weights  # only rounding is left
    out = weights.clone()
    out[own] = w + size * way
    return out


def _quadratic(
    hessian: Float64[Tensor, "k k"],
    slope: Float64[Tensor, " k"],
    start: Float64[Tensor, " k"],
    l1: Float64[Tensor, " k"],
) -> Float64[Tensor, " k"]:
    """Return v that minimises slope . (v - start) + (v - start)' H (v - start) / 2 + sum_j l1_j |v_j|.

    While no weight changes its sign the solution is that of a linear system. Weights that are 0 join once they are
    worse off than the others, and those that the solution would send the wrong way are held back. A weight that would
    change its sign on the way is put to 0 (Bertsekas 1982); of several lengths of step the best is taken. One that ends
    where the first weight becomes 0 always gains.
    """
    v, bound = start, l1 > 0
    enough = 1e-12 * (1.0 + slope.abs().max())
    halves = torch.logspace(0, 1 - LENGTHS, LENGTHS, base=2, dtype=v.dtype, device=v.device)
    for _ in range(CHANGES):
        free = (v != 0) | ~bound
        sign = torch.where(v != 0, v.sign(), -slope.sign())
        wrong = (slope + l1 * sign).abs()
        missing = ((slope.abs() - l1).where(~free, 0.0)).clamp(min=0.0)
        if not max(float(wrong[free].max()), float(missing.max())) > enough:
            break
        if missing.max() >= wrong[free].max():
            free |= missing > enough
        while True:
            at = torch.nonzero(free)[:, 0]
            step = -solved(hessian[at][:, at], (slope + l1 * sign)[at])
            astray = (v[at] == 0) & bound[at] & (step * sign[at] <= 0)
            if not bool(astray.any()):
                break
            free[at[astray]] = False
        way = torch.zeros_like(v)
        way[at] = step
        crossing = torch.where((v * way < 0) & bound, -v / way, torch.inf)
        sizes = torch.cat([halves, crossing.min()[None].clamp(max=1.0)])[:, None]
        ways = torch.where(crossing <= sizes, -v, sizes * way)
        bent = ways @ hessian
        gained = ways @ slope + (ways * bent).sum(1) / 2 + ((v + ways).abs() - v.abs()) @ l1
        best = int(gained.argmin())
        v, slope = v + ways[best], slope + bent[best]
    return v
