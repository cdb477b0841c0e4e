"""`Progress` by a compiled loop: weights and gradients are read once."""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gapprobe.kernels.compiled import dot, sweep
from gapprobe.kernels.line_search import Place
from gapprobe.kernels.progress import FLAT, NEARER, PATIENCE, SMALLER, Progress


class CpuProgress(Progress):
    """What each problem has reached at best, in main memory."""

    def arrived(
        self, weights: Float[Tensor, "p c e"], gradient: Float[Tensor, "p c e"], place: Place, goal: float
    ) -> Bool[Tensor, " p"]:
        """Take in where problems stand, and tell which are done."""
        done = torch.empty_like(self.since, dtype=torch.bool)
        reached = (self.left.numpy(), self.value.numpy(), self.since.numpy())
        known = (place.value.numpy(), place.curved.numpy())
        lines = (weights.reshape(-1).numpy(), gradient.reshape(-1).numpy())
        _look(*lines, weights.shape[2], *known, goal, PATIENCE[weights.dtype], *reached, done.numpy())
        return done


@sweep
@no_type_check
def _look(weights, gradient, e, loss, curved, goal, patience, least, lowest, since, done):
    p, c = curved.shape
    for i in range(p):
        left, value = 0.0, 2.0 * loss[i]
        for k in range(i * c, (i + 1) * c):
            mine, pull = weights[k * e : (k + 1) * e - 1], gradient[k * e : (k + 1) * e - 1]
            free = gradient[(k + 1) * e - 1]
            value += dot(mine, mine)
            left += dot(pull, pull) + free * free * (1.0 + 1.0 / max(curved[i, k - i * c], FLAT))
        left, value = left / 2, value / 2
        nearer = left < NEARER * least[i] or value < (1.0 - SMALLER) * lowest[i]
        since[i] = 0 if nearer else since[i] + 1
        least[i], lowest[i] = min(least[i], left), min(lowest[i], value)
        done[i] = left <= goal * value or since[i] > patience
