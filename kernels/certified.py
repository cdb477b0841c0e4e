"""From a loss to certified fits: float32 finds the optimum, float64 says how near it is and takes up what is too far.

What every linear kernel shares, whatever its loss; a kernel gives its loss and a certificate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gapprobe.kernels.descent import descend
from gapprobe.kernels.losses import Loss
from gapprobe.kernels.preconditioner import Spaces
from gapprobe.kernels.standardised import Standardised

ROUNDS = 3  # in float64, each aiming ten times lower
MARGIN = 0.8  # of the tolerance, aimed at before the certificate is drawn up

L = TypeVar("L", bound=Loss)
Certificate = tuple[Float64[Tensor, "p c e"], Float64[Tensor, " p"], Float64[Tensor, " p"]]


@dataclass(frozen=True)
class Fits:
    """Fitted problems, in raw coordinates: the standardisation is folded into `coef` and `intercept`.

    Attributes:
        coef: weight of each raw feature.
        intercept: free term.
        objective: value reached, of the objective in the kernel's docstring.
        gap: upper bound of (objective - optimum) / objective, from the dual.
        steps: of the method.
    """

    coef: Float64[Tensor, "p d"]
    intercept: Float64[Tensor, " p"]
    objective: Float64[Tensor, " p"]
    gap: Float64[Tensor, " p"]
    steps: Int64[Tensor, " p"]


class NotConvergedError(ArithmeticError):
    """A fit whose certified gap is larger than was asked for."""


def reach(
    features: Standardised,
    spaces: Spaces,
    loss: Callable[[torch.dtype, Tensor], L],
    certify: Callable[[Standardised, L, Tensor, Tensor], Certificate],
    again: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
    problems: Int64[Tensor, " p"],
    tolerance: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Descend in float32, certify; take up again in float64 what that did not do for.

    Args:
        features: X, shared.
        spaces: for the preconditioners.
        loss: of some problems, in a dtype.
        certify: returns the weights with the intercept put right, the objective, and the relative gap to the optimum.
        again: takes weights, which problems they are of and a goal; returns better weights and the steps taken.
        problems: which problems of `features` are fitted.
        tolerance: largest gap aimed at.
        steps: at most, in float32.

    Returns:
        Coefficients [p c d] and intercepts [p c] in raw coordinates, objectives, gaps and steps taken [p].
    """
    narrow = loss(torch.float32, problems)
    start = narrow.start()
    w = start.new_zeros(*start.shape, features.x.shape[1] + 1)
    w[..., -1] = start
    goal = MARGIN * tolerance
    w, taken = descend(features, narrow, w, spaces, problems=problems, goal=goal, most=steps)
    w, objective, gap = certify(features, loss(torch.float64, problems), w.double(), problems)
    for _ in range(ROUNDS):
        poor = torch.nonzero(~(gap <= tolerance))[:, 0]
        if not len(poor):
            break
        own = problems[poor]
        before = gap[poor]
        # What is further off than no weights at all is no place to go on from, nor what has overflowed.
        better, more = again(w[poor].where((before < 1.0)[:, None, None], 0.0), own, goal)
        found = certify(features, loss(torch.float64, own), better, own)
        better_off = found[2].nan_to_num(torch.inf) <= before.nan_to_num(torch.inf)
        for kept, new in zip((w, objective, gap), found, strict=True):
            kept[poor[better_off]] = new[better_off]
        taken[poor] += more
        goal /= 10
    coef, intercept = features.view(problems, torch.float64).in_raw(w)
    return coef, intercept, objective, gap, taken


def kin(y: Tensor, c: Float64[Tensor, " p"]) -> Int64[Tensor, " p"]:
    """Number the problems by target [p n] and strength: those of one number differ in the rows they use."""
    pairs = torch.stack([torch.unique(each, dim=0, return_inverse=True)[1] for each in (y, c)])
    return torch.unique(pairs, dim=1, return_inverse=True)[1]


def check_gaps(gap: Float64[Tensor, " p"], strengths: Float64[Tensor, " p"], tolerance: float) -> None:
    """Refuse fits that are further off than was asked for.

    Raises:
        NotConvergedError: naming the worst.
    """
    worst = int(gap.nan_to_num(torch.inf).argmax())
    if not float(gap[worst]) <= tolerance:
        raise NotConvergedError(
            f"problem {worst} ended {float(gap[worst]):.1e} of its objective off the optimum, not {tolerance:.1e}: "
            f"the features may be too badly scaled, or c={float(strengths[worst]):g} too large; rescale them or lower c"
        )


def solved(hessian: Float64[Tensor, "k k"], right: Float64[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """Solve with the least addition to the diagonal that makes a Cholesky factor: directions may be free, or alike.

    The Hessian is changed. Where nothing makes it positive the answer points the right way and is short enough.
    """
    largest = hessian.diagonal().max()
    for share in (1e-14, 1e-12, 1e-9, 1e-6, 1e-3):
        hessian.diagonal().add_(share * largest)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed):
            return torch.cholesky_solve(right[:, None], factor)[:, 0]
    return right / largest


def check(x: Tensor, y: Tensor, weights: Tensor, c: Float64[Tensor, " p"]) -> None:
    """Refuse what cannot be fitted; labels are Bool, or classes from 0.

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    if not bool((c > 0).all()):
        raise ValueError(f"c must be above 0, got {float(c.min())}")
    if y.shape != weights.shape or y.shape[1] != x.shape[0]:
        raise ValueError(f"labels {tuple(y.shape)} and weights {tuple(weights.shape)} must be [p, {x.shape[0]}]")
    if not x.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} has no features")
    # The extremes of what holds NaN are NaN: ten times as fast as looking at each number.
    if x.numel() and not bool(torch.stack(torch.aminmax(x)).isfinite().all()):
        raise ValueError(f"row {int(torch.nonzero(~torch.isfinite(x))[0, 0])} of x holds NaN or infinity")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights must be finite and not negative")
    if y.dtype != torch.bool and y.numel() and int(y.min()) < 0:
        raise ValueError(f"classes are numbered from 0, got {int(y.min())}")
    used = weights > 0
    for label in (True, False) if y.dtype == torch.bool else range(int(y.max()) + 1 if y.numel() else 0):
        missing = torch.nonzero(~((y == label) & used).any(1))
        if len(missing):
            raise ValueError(f"problem {int(missing[0])} has no row of class {label}; a fit needs every class")
