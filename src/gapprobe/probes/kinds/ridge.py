"""Ridge regression on labels of -1 and 1, in closed form: the kernel's."""

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.kernels import ridge
from gapprobe.probes.base import LinearFits, check_problems, register_probe


@register_probe
class Ridge:
    """Standardised ridge regression on labels of -1 and 1; strengths are 1 / scikit-learn's alpha."""

    name = "ridge"
    strengths = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    calibrated = False

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
            DataError: a problem of one class, a strength not above 0, or features that are not finite.
        """
        del seed
        check_problems(x, y, weights, strengths)
        return LinearFits(*ridge.fit(x, 2.0 * y.double() - 1.0, weights, 1 / strengths))
