"""The mass-mean probe: the difference of the class means, tilted by the inverse covariance within classes."""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.probes.base import LinearFits, check_problems, register_probe
from gapprobe.probes.kinds.lda import discriminants

PENALTY = 1e-3  # of a standardised feature's variance: S is singular where rows are fewer than features


@register_probe
class MassMean:
    """S^-1 (m1 - m0), S the covariance within classes, with the threshold halfway between the means.

    Source: Marks & Tegmark 2023 (arXiv 2310.06824, section 5), for rows like those it was fitted on. Their
    pseudo-inverse drops directions whose variance is below 1e-3 in raw units; here each direction gets a thousandth of
    a standardised feature's variance on top, which changes as little and does not depend on units.
    """

    name = "mass_mean"
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
        """Fit every problem; `strengths` and `seed` are not needed.

        Raises:
            DataError: a problem of one class, or features that are not finite.
        """
        del seed
        check_problems(x, y, weights)
        coef, middle, _ = discriminants(x, y, weights, torch.full_like(strengths, PENALTY))
        return LinearFits(coef, -middle)
