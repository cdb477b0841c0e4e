"""Which of many problems have arrived, and which get no further."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gapprobe.kernels.line_search import Place

PATIENCE = {torch.float32: 12, torch.float64: 100}  # steps without a smaller gradient or value: only rounding is left
NEARER = 0.9  # of what was left to gain, at most, if a step has brought a problem nearer
SMALLER = 1e-6  # share of its value by which an objective must fall to count: float32 cannot tell less
FLAT = 1e-20  # least curvature of an intercept


class Progress:
    """What each problem has reached at best, and since when it has not come nearer."""

    def __init__(self, like: Float[Tensor, "p c e"]) -> None:
        """Start with nothing reached."""
        self.left = like.new_full((len(like),), torch.inf)
        self.value = torch.full_like(self.left, torch.inf)
        self.since = torch.zeros_like(self.left, dtype=torch.int64)

    def arrived(
        self, weights: Float[Tensor, "p c e"], gradient: Float[Tensor, "p c e"], place: Place, goal: float
    ) -> Bool[Tensor, " p"]:
        """Take in where problems stand, and tell which are done: less than `goal` of the objective is left to gain.

        The penalty alone curves the objective by 1, so at most half of the gradient's square is left; the intercept is
        curved by the rows, and putting it right moves the gradient by its own times a mean of z, of length 1 or so. Who
        has come no nearer for too long is done as well.
        """
        pull, free = gradient[..., :-1], gradient[..., -1]
        intercepts = free * free * (1.0 + 1.0 / place.curved.clamp(min=FLAT))
        left = (torch.linalg.vecdot(pull, pull) + intercepts).sum(1) / 2
        value = place.value + torch.linalg.vecdot(weights[..., :-1], weights[..., :-1]).sum(1) / 2
        nearer = (left < NEARER * self.left) | (value < (1.0 - SMALLER) * self.value)
        self.since = torch.where(nearer, 0, self.since + 1)
        self.left, self.value = torch.minimum(self.left, left), torch.minimum(self.value, value)
        return (left <= goal * value) | (self.since > PATIENCE[left.dtype])

    def keep(self, problems: Bool[Tensor, " p"]) -> None:
        """Forget the other problems."""
        self.left, self.value, self.since = self.left[problems], self.value[problems], self.since[problems]
