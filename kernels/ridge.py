"""Ridge regression of many problems over one X in closed form, in float64, and what is a ridge solve away.

Objective of a problem: sum_i s_i (t_i - w . z_i - b)^2 + alpha |w|^2, the intercept free, z standardised by the rows
whose weight s_i is above zero. With A the rows sqrt(s_i) (z_i - weighted mean), w is (A'A + alpha)^-1 A't [d d], or
A' (AA' + alpha)^-1 t [n n] where rows are fewer than features.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gapprobe.kernels.moments import blocks, standard


def reference(
    x: Float[Tensor, "n d"], targets: Float[Tensor, " n"], weights: Float[Tensor, " n"], alpha: float
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, ""]]:
    """Fit one problem by least squares on rows that stand for the penalty; return raw coefficients and intercept."""
    used = weights > 0
    x, t, s = x[used].double(), targets[used].double(), weights[used].double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-12 * mean.abs(), deviation, 1.0)
    z, d = (x - mean) / scale, x.shape[1]
    z, t = z - s @ z / s.sum(), t - s @ t / s.sum()
    rows = torch.cat([s.sqrt()[:, None] * z, alpha**0.5 * torch.eye(d, dtype=torch.float64)])
    wanted = torch.cat([s.sqrt() * t, torch.zeros(d, dtype=torch.float64)])
    coef = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution / scale
    return coef, s @ (targets[used].double() - x @ coef) / s.sum()


def fit(
    x: Float[Tensor, "n d"],
    targets: Float[Tensor, "p n"],
    weights: Float[Tensor, "p n"],
    alpha: Float[Tensor, " p"],
) -> tuple[Float64[Tensor, "p d"], Float64[Tensor, " p"]]:
    """Return every problem's coefficients and intercept, in raw coordinates.

    Problems of the same weights share the Gram matrix; those of the same alpha too share its Cholesky factor, which
    costs a twelfth of an eigendecomposition: fewer than a dozen strengths are cheaper so.

    Args:
        x: raw features, finite.
        targets: of every problem's rows.
        weights: not negative, and above 0 somewhere; rows of weight 0 are not looked at.
        alpha: penalty of every problem, above 0.
    """
    rows, group = torch.unique(weights.double(), dim=0, return_inverse=True)
    coef = x.new_zeros(len(weights), x.shape[1], dtype=torch.float64)
    free = coef.new_zeros(len(weights))
    for i, own in enumerate(rows):
        problems = torch.nonzero(group == i)[:, 0]
        used = torch.nonzero(own)[:, 0]
        (mean,), (scale,) = standard(x[used], own[used][None] > 0)
        t = targets[problems][:, used].double()
        coef[problems], free[problems] = solve(x[used], t, own[used], alpha[problems].double(), mean, scale)
    return coef, free


def solve(
    x: Float[Tensor, "m d"],
    targets: Float64[Tensor, "p m"],
    weights: Float64[Tensor, " m"],
    alpha: Float64[Tensor, " p"],
    mean: Float64[Tensor, " d"],
    scale: Float64[Tensor, " d"],
) -> tuple[Float64[Tensor, "p d"], Float64[Tensor, " p"]]:
    """Solve problems of the same rows, all of weight above 0, under a given standardisation; results are raw."""
    root, total = weights.sqrt(), weights.sum()
    centre = mean.clone()  # weighted, about the mean given: far from 0 a mean keeps its digits so
    for block in blocks(*x.shape):
        centre += weights[block] @ (x[block].double() - mean) / total
    middle = targets @ weights / total
    coef = _centred(x, (targets - middle[:, None]) * root, root, alpha, centre, scale)
    return coef, middle - coef @ centre


def _centred(
    x: Float[Tensor, "m d"],
    targets: Float64[Tensor, "p m"],
    root: Float64[Tensor, " m"],
    alpha: Float64[Tensor, " p"],
    centre: Float64[Tensor, " d"],
    scale: Float64[Tensor, " d"],
) -> Float64[Tensor, "p d"]:
    """Solve for the coefficients alone: about the centre there is no intercept."""

    def standardised(part: Tensor, root: Tensor) -> Tensor:
        return (part.double() - centre).div_(scale).mul_(root[:, None])

    m, d = x.shape
    if m < d:
        a = standardised(x, root)
        return _factored(a @ a.T, targets, alpha) @ a / scale
    gram, right = targets.new_zeros(d, d), targets.new_zeros(len(targets), d)
    for start in range(0, m, d):  # parts as tall as the Gram matrix: it is read once a part
        a = standardised(x[start : start + d], root[start : start + d])
        gram.addmm_(a.T, a)
        right.addmm_(targets[:, start : start + d], a)
    return _factored(gram, right, alpha) / scale


def _factored(
    gram: Float64[Tensor, "k k"], right: Float64[Tensor, "p k"], alpha: Float64[Tensor, " p"]
) -> Float64[Tensor, "p k"]:
    """Return (gram + alpha)^-1 right for every problem, one factor an alpha."""
    out = torch.empty_like(right)
    for value in alpha.unique().tolist():
        own = alpha == value
        shifted = gram.clone()
        shifted.diagonal().add_(value)
        out[own] = torch.cholesky_solve(right[own].T, torch.linalg.cholesky(shifted)).T
    return out
