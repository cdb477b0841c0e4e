"""Linear support vector machines with squared hinge loss, exact and certified: the kernel's."""

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.kernels import svm
from gapprobe.kernels.certified import NotConvergedError
from gapprobe.probes.base import LinearFits, register_probe


@register_probe
class Svm:
    """Standardised, L2-penalised squared hinge; strengths are scikit-learn's C, but the intercept is free.

    Every fit is certified in float64 to lie within `tolerance` of its optimal objective.
    """

    name = "svm"
    strengths = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    calibrated = False

    def __init__(self, tolerance: float = 1e-6) -> None:
        self.tolerance = tolerance

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> LinearFits:
        """Fit every problem; `seed` is not needed.

        Raises:
            DataError: a problem of one class, or one that cannot be certified.
        """
        del seed
        try:
            fits = svm.fit(x, y, weights, strengths, self.tolerance)
        except (ValueError, NotConvergedError) as error:
            raise DataError(str(error)) from error
        return LinearFits(fits.coef, fits.intercept)
