"""Logistic regression with an L1 or elastic-net penalty, certified: the kernel's. Few features get weights."""

from typing import ClassVar

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.kernels import elastic
from gapprobe.kernels.certified import NotConvergedError
from gapprobe.probes.base import LinearFits, register_probe


@register_probe
class Lasso:
    """Standardised, L1-penalised logistic regression; strengths are scikit-learn's C.

    All weights are 0 where C is below 1 / (rows * largest covariance of label and standardised feature): 0.002 for
    1,000 rows, half of them positive, and a correlation of 0.9. Every fit is certified in float64 to lie within
    `tolerance` of its optimal objective.
    """

    name = "lasso"
    strengths = (1e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
    calibrated = True
    l1_ratio: ClassVar[float] = 1.0

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
            fits = elastic.fit(x, y, weights, strengths, self.l1_ratio, self.tolerance)
        except (ValueError, NotConvergedError) as error:
            raise DataError(str(error)) from error
        return LinearFits(fits.coef, fits.intercept)


@register_probe
class ElasticNet(Lasso):
    """The same with |w|_1 / 2 + |w|^2 / 4 for a penalty: of features that say the same, all get a weight."""

    name = "elastic_net"
    l1_ratio = 0.5
