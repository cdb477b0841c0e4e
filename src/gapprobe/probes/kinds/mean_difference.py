"""The difference of the class means, with the threshold halfway between them."""

from einops import einsum
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.kernels.moments import class_means
from gapprobe.probes.base import LinearFits, check_problems, register_probe


@register_probe
class MeanDifference:
    """Direction from the mean of the negatives to that of the positives, in raw coordinates; no penalty.

    Source: Marks & Tegmark 2023 (arXiv 2310.06824), the mass-mean probe without its covariance.
    """

    name = "mean_difference"
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
        del strengths, seed
        check_problems(x, y, weights)
        _, (negative, positive) = class_means(x, y, weights)
        coef = positive - negative
        return LinearFits(coef, -einsum(coef, (positive + negative) / 2, "p d, p d -> p"))
