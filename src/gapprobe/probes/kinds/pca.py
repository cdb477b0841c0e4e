"""The first principal direction of the rows: what varies most, whatever the labels are."""

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.kernels.moments import class_means, standard
from gapprobe.probes.base import LinearFits, check_problems, register_probe

CONSTANT = 1e-6  # deviation of constant features' rounding, at most; what varies was standardised to about 1
BLOCK = 16  # directions iterated side by side; fewer rows or features than twice that are decomposed whole
SETTLED = 1e-8  # residual of the leading direction, as a share of its eigenvalue
MOST = 500  # rounds: only where the first two directions are as good as each other do they not suffice


@register_probe
class Pca:
    """The direction of largest variance of the standardised rows; labels only say which end is positive.

    Scores are in deviations along it, with 0 halfway between the class means. A baseline for directions that were
    learnt: what an unsupervised reading of the rows would find. Rows are standardised, or a massive dimension of the
    residual stream would be the answer to every question.
    """

    name = "pca"
    strengths = (1.0,)
    calibrated = False

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> LinearFits:
        """Fit every problem, one decomposition for all of the same weights; `strengths` and `seed` are not needed.

        Raises:
            DataError: a problem of one class, features that are not finite or are all constant.
        """
        del strengths, seed
        check_problems(x, y, weights)
        rows, group = torch.unique(weights, dim=0, return_inverse=True)
        directions = torch.stack([_direction(x, own) for own in rows])
        _, (negative, positive) = class_means(x, y, weights)
        coef = directions[group]
        apart = einsum(coef, positive - negative, "p d, p d -> p")
        coef = torch.where(apart < 0, -1.0, 1.0)[:, None] * coef
        return LinearFits(coef, -einsum(coef, (positive + negative) / 2, "p d, p d -> p"))


def _direction(x: Float[Tensor, "n d"], weights: Float64[Tensor, " n"]) -> Float64[Tensor, " d"]:
    """Return the first right singular vector of the standardised rows, per deviation along it, in raw coordinates."""
    used = torch.nonzero(weights)[:, 0]
    part, share = x[used], weights[used] / weights.sum()
    (mean,), (scale,) = standard(part, torch.ones_like(share)[None] > 0)
    a = (part.double() - mean) / scale
    a = (a - share @ a) * share.sqrt()[:, None]
    first = torch.linalg.svd(a, full_matrices=False).Vh[0] if min(a.shape) < 2 * BLOCK else _leading(a)
    deviation = torch.linalg.vector_norm(a @ first)
    if not bool(deviation > CONSTANT):
        raise DataError("no feature varies among the rows of a problem: there is no principal direction")
    return first / (scale * deviation)


def _leading(a: Float64[Tensor, "m d"]) -> Float64[Tensor, " d"]:
    """Return the first right singular vector by subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4)."""
    basis = torch.randn(BLOCK, a.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(a)
    first = basis[0]
    for _ in range(MOST):
        basis = torch.linalg.qr((basis @ a.T @ a).T)[0].T
        seen = basis @ a.T
        values, turn = torch.linalg.eigh(seen @ seen.T)
        first = turn[:, -1] @ basis
        if bool(torch.linalg.vector_norm(first @ a.T @ a - values[-1] * first) <= SETTLED * values[-1]):
            break
    return first
