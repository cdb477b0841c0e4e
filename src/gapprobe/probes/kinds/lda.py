"""Linear discriminant analysis with shrinkage, by one ridge solve a problem."""

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.kernels import ridge
from gapprobe.kernels.moments import class_means
from gapprobe.probes.base import LinearFits, check_problems, register_probe


def discriminants(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "p n"],
    weights: Float64[Tensor, "p n"],
    penalty: Float64[Tensor, " p"],
) -> tuple[Float64[Tensor, "p d"], Float64[Tensor, " p"], Float64[Tensor, "2 p"]]:
    """Return (S + penalty)^-1 (m1 - m0) in raw coordinates, the score halfway between the means, and class weights.

    S is the covariance within classes of the standardised rows, m the class means; a penalty of 1 is the variance of a
    feature. All labels of the same rows share a factor: with T = S + c r r' the covariance about one mean, r = m1 - m0
    and c the product of the class shares, (S + a)^-1 r = v / (1 - c r'v) for v = (T + a)^-1 r (Sherman & Morrison
    1950), and v is ridge regression on targets 1 / W1 and -1 / W0.
    """
    (w0, w1), (m0, m1) = class_means(x, y, weights)
    total = w0 + w1
    targets = torch.where(y, (1 / w1)[:, None], (-1 / w0)[:, None])
    v, _ = ridge.fit(x, targets, weights, total * penalty)
    v = v * total[:, None]
    between = einsum(m1 - m0, v, "p d, p d -> p")
    coef = v / (1 - between * w0 * w1 / total**2)[:, None]
    return coef, einsum(coef, (m0 + m1) / 2, "p d, p d -> p"), torch.stack([w0, w1])


@register_probe
class Lda:
    """Gaussian classes of one covariance, S of the standardised rows shrunk towards the identity: S + 1 / strength.

    scikit-learn's `shrinkage` s, (1 - s) S + s m with m the mean variance within classes, is a strength of
    (1 - s) / (s m), up to the scale of the scores. Scores are log-odds under the model, class weights as priors.
    """

    name = "lda"
    strengths = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
    calibrated = True

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
        coef, middle, (w0, w1) = discriminants(x, y, weights, 1 / strengths)
        return LinearFits(coef, torch.log(w1 / w0) - middle)
