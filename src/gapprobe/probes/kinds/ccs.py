"""Contrast-consistent search: a direction that says the opposite of a statement and of its contrast, without labels.

Source: Burns et al. 2022, arXiv 2212.03827, section 2.2. It minimises, over the pairs of rows of a problem,
consistency (p+ - (1 - p-))^2 (eq. 1) and confidence min(p+, p-)^2 (eq. 2), whose mean is eq. 3, where
p = sigmoid(theta . z + b) and z are the rows of one half, standardised by that half alone: what tells the halves apart
("yes" and "no") would be consistent and confident too.
"""

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.kernels.descent import history_for
from gapprobe.kernels.standardised import Standardised, View
from gapprobe.probes.base import ROOM, LinearFits, check_problems, chunks, register_probe

ENOUGH = 1e-4  # share of its slope by which a step must lower the objective (Armijo)
HALVINGS = 20
SMALLER = 1e-5  # share of the objective that a step must gain to count
PATIENCE = 5  # steps without one

Pair = tuple[Float[Tensor, "p s n"], Float[Tensor, "p s n"]]


def reference(
    theta: Float64[Tensor, " d"],
    b: Float64[Tensor, ""],
    statement: Float64[Tensor, "m d"],
    contrast: Float64[Tensor, "m d"],
) -> Float64[Tensor, ""]:
    """Return eq. 3 of one problem, written for reading: the rows it learns from, each half raw."""

    def probability(half: Tensor) -> Tensor:
        z = (half - half.mean(0)) / half.std(0, correction=0)
        return torch.sigmoid(z @ theta + b)

    p, q = probability(statement), probability(contrast)
    return ((p - (1 - q)) ** 2 + torch.minimum(p, q) ** 2).mean()


@register_probe
class Ccs:
    """Contrast-consistent search on pairs: x is a row beside the row that contrasts it.

    Labels decide on the sign of the direction, by balanced accuracy on the training rows, and on nothing else: pairs
    count alike whatever their weight, since weights that balance classes are made of labels. Problems of the same
    rows share one search. The score is half the difference of the logits of both halves: positive where the paper's
    (p+ + 1 - p-) / 2 is above 1/2, but linear, and never saturated.

    The objective is eq. 3 and |theta|^2 / (2 strength): with more features than pairs there would else be a perfect
    direction for every labelling. The paper has next to no penalty, which is a strength of 100 or more; truths planted
    in layers wider than there are pairs are found at 3, and not there. Several strengths would let labels choose.
    The objective is not convex: of several random starts the one with the lowest is kept.

    What is found is the most consistent and confident feature, which need not be the truth: another one that differs
    within pairs is as good an answer (Farquhar et al. 2023, arXiv 2312.10029). Compare with a probe that has labels.

    Args:
        starts: random directions to start from.
        steps: of L-BFGS, at most.
    """

    name = "ccs"
    strengths = (3.0,)
    calibrated = False
    reads = "pairs"
    room = 8 * ROOM  # starts, their histories and logits, in float32, and what steps make of them

    def __init__(self, starts: int = 10, steps: int = 200) -> None:
        self.starts, self.steps = starts, steps

    def fit(
        self,
        x: Float[Tensor, "n e"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> LinearFits:
        """Search for every problem, all starts side by side; `seed` decides on the starts.

        Raises:
            DataError: a problem of one class, features that are not finite, a strength not above 0, or rows that are
                no pairs.
        """
        check_problems(x, y, weights, strengths)
        d = x.shape[1] // 2
        if x.shape[1] != 2 * d:
            raise DataError(
                f"ccs reads pairs, a row and its contrast side by side; {x.shape[1]} features are not two rows of one "
                "width. Give `contrast` to gp.sweep_probes"
            )
        # Labels are not looked at before a direction is found.
        known = torch.cat([(weights > 0).double(), strengths[:, None]], dim=1)
        known, group = torch.unique(known, dim=0, return_inverse=True)
        used, decay = known[:, :-1] > 0, 1.0 / known[:, -1]
        halves = [Standardised(half, used) for half in (x[:, :d], x[:, d:])]
        starts = torch.randn(self.starts, d + 1, generator=torch.Generator().manual_seed(seed))
        starts[:, -1] = 0.0
        starts /= torch.linalg.vector_norm(starts, dim=1, keepdim=True)
        every, found = torch.arange(len(used)), torch.empty(len(used), d + 1)
        for some in chunks(len(used), self.starts * (16 * d + 12 * len(x))):
            views = [half.view(every[some], torch.float32) for half in halves]
            share = (used[some] / used[some].sum(1, keepdim=True)).float()
            begin = starts.expand(len(share), -1, -1)
            theta, value = search(views, begin, share, decay[some].float(), self.steps)
            found[some] = theta[torch.arange(len(share)), value.argmin(1)]
        exact = [half.view(every, torch.float64).in_raw(found[:, None].double()) for half in halves]
        coef = torch.cat([exact[0][0], -exact[1][0]], dim=2)[group, 0] / 2
        fits = LinearFits(coef, (exact[0][1] - exact[1][1])[group, 0] / 2)
        turn = _sign(fits.scores(x), y, weights)
        return LinearFits(turn[:, None] * fits.coef, turn * fits.intercept)


def _sign(
    scores: Float64[Tensor, "p n"], y: Bool[Tensor, "p n"], weights: Float64[Tensor, "p n"]
) -> Float64[Tensor, " p"]:
    """Return the sign with which a problem is right on half of its training rows at least, classes balanced."""
    side = torch.sign(scores)
    positive, negative = (einsum(side, part, "p n, p n -> p") / part.sum(1) for part in (weights * y, weights * ~y))
    return torch.where(positive < negative, -1.0, 1.0).double()


def objective(logits: Pair, share: Float[Tensor, "p n"]) -> tuple[Float[Tensor, "p s"], Pair]:
    """Return eq. 3, and its derivatives by the logits of both halves.

    Args:
        logits: of statements and of contrasts.
        share: weight of every pair.
    """
    p, q = (torch.sigmoid(half) for half in logits)
    off, least = p + q - 1.0, torch.minimum(p, q)
    value = einsum(off.square() + least.square(), share, "p s n, p n -> p s")
    first = 2.0 * share[:, None] * (off + least.where(p <= q, 0.0)) * p * (1.0 - p)
    second = 2.0 * share[:, None] * (off + least.where(q < p, 0.0)) * q * (1.0 - q)
    return value, (first, second)


def search(
    views: list[View],
    theta: Float[Tensor, "p s e"],
    share: Float[Tensor, "p n"],
    decay: Float[Tensor, " p"],
    steps: int,
) -> tuple[Float[Tensor, "p s e"], Float[Tensor, "p s"]]:
    """Return where L-BFGS leads from every start, and the objective there; theta's last weight is b.

    Args:
        views: of statements and of contrasts.
        theta: starts, s of each problem.
        share: weight of every pair.
        decay: weight of the penalty, which leaves b out.
        steps: at most.

    Logits are linear along a step, so that halving it reads no rows.
    """
    weight = decay[:, None, None].expand_as(theta).clone()
    weight[..., -1] = 0.0

    def both(point: Tensor) -> Pair:
        return views[0].logits(point), views[1].logits(point)

    def penalty(point: Tensor) -> Tensor:
        return (weight * point.square()).sum(-1) / 2

    logits = both(theta)
    value, slopes = objective(logits, share)
    value, gradient = value + penalty(theta), views[0].pull(slopes[0]) + views[1].pull(slopes[1]) + weight * theta
    history = history_for(gradient.flatten(0, 1))
    gain = 1.0 / torch.linalg.vector_norm(gradient, dim=-1).clamp(min=1.0)
    since = torch.zeros_like(value, dtype=torch.int64)
    for _ in range(steps):
        passed, first = history.before(gradient.flatten(0, 1))
        direction = -history.after(passed * gain.flatten()[:, None], first).view_as(theta)
        slope = torch.linalg.vecdot(gradient, direction)
        direction = direction.where((slope < 0)[..., None], -gradient)
        slope = torch.linalg.vecdot(gradient, direction)
        along, size = both(direction), (since < PATIENCE).to(value)

        def moved(size: Tensor, logits: Pair = logits, along: Pair = along) -> Pair:
            return logits[0] + size[..., None] * along[0], logits[1] + size[..., None] * along[1]

        bad = torch.zeros_like(size, dtype=torch.bool)
        for _ in range(HALVINGS):
            now = objective(moved(size), share)[0] + penalty(theta + size[..., None] * direction)
            bad = now > value + ENOUGH * size * slope
            if not bool(bad.any()):
                break
            size = torch.where(bad, size / 2, size)
        size = size.masked_fill(bad, 0.0)  # what is left to gain is rounding
        logits, before = moved(size), gradient
        theta = theta + size[..., None] * direction
        now, slopes = objective(logits, share)
        now = now + penalty(theta)
        gradient = views[0].pull(slopes[0]) + views[1].pull(slopes[1]) + weight * theta
        seen = (part.flatten(0, 1) for part in (direction, size, before, gradient))
        walked, change = (part.view_as(theta) for part in history.add(*seen))
        scale = torch.linalg.vecdot(walked, change) / torch.linalg.vecdot(change, change)
        gain = torch.where((scale > 0) & scale.isfinite(), scale, gain)
        since, value = torch.where(now < (1.0 - SMALLER) * value, 0, since + 1), now
        if bool((since >= PATIENCE).all()):
            break
    return theta, value
