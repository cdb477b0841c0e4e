"""scikit-learn's estimators as probes.

They are not certified: how near a fit comes to its optimum is the estimator's own affair.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe.errors import ConfigError, DataError
from gapprobe.kernels.moments import standard
from gapprobe.probes.base import check_problems

SURE = 1e-12  # probabilities of others are taken to be no nearer to 0 and 1: log-odds must be finite
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class EstimatorFits:
    """Fitted estimators.

    Attributes:
        estimators: one a problem.
        mean: of every problem's rows, or zeros.
        scale: deviation of every problem's rows, or ones.
    """

    estimators: Sequence[Any]
    mean: Float64[Tensor, "p d"]
    scale: Float64[Tensor, "p d"]

    def scores(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, "p n"]:
        """Return decision functions, or else log-odds, or a regressor's predictions."""
        out = self.mean.new_empty(len(self.estimators), len(x))
        for own, estimator, mean, scale in zip(out, self.estimators, self.mean, self.scale, strict=True):
            own.copy_(torch.from_numpy(np.asarray(_score(estimator, _array(x, mean, scale)), dtype=np.float64)))
        return out


def _array(x: Float[Tensor, "n d"], mean: Float64[Tensor, " d"], scale: Float64[Tensor, " d"]) -> np.ndarray:
    """Return standardised rows, float64 where X is and float32 where it is narrower."""
    z = (x.double() - mean) / scale
    return (z if x.dtype == torch.float64 else z.float()).numpy()


def _score(estimator: Any, z: np.ndarray) -> np.ndarray:
    if hasattr(estimator, "decision_function"):
        return estimator.decision_function(z)
    if hasattr(estimator, "predict_proba"):
        positive = np.clip(estimator.predict_proba(z)[:, 1].astype(np.float64), SURE, 1 - SURE)
        return np.log(positive) - np.log1p(-positive)
    return estimator.predict(z)


@dataclass(frozen=True)
class EstimatorProbe:
    """A scikit-learn estimator as a probe: a clone of it for every problem.

    Attributes:
        estimator: never fitted itself.
        name: of the probe.
        strengths: tried by a sweep.
        calibrated: whether scores are log-odds.
        strength: the parameter that a strength sets, if any.
        standardise: whether rows are standardised by a problem's own first.
        jobs: problems fitted side by side, in threads.
    """

    estimator: Any
    name: str
    strengths: tuple[float, ...]
    calibrated: bool
    strength: str | None = None
    standardise: bool = True
    jobs: int | None = None

    def fit(
        self,
        x: Float[Tensor, "n d"],
        y: Bool[Tensor, "p n"],
        weights: Float64[Tensor, "p n"],
        strengths: Float64[Tensor, " p"],
        seed: int,
    ) -> EstimatorFits:
        """Fit a clone to the rows of weight above 0 of every problem; `seed` goes to each unset `random_state`.

        Raises:
            DataError: a problem of one class, features that are not finite, or one that the estimator refuses.
        """
        from joblib import Parallel, delayed
        from sklearn.base import clone, is_regressor
        from sklearn.utils.validation import has_fit_parameter

        check_problems(x, y, weights, strengths)
        mean = x.new_zeros(len(y), x.shape[1], dtype=torch.float64)
        scale = torch.ones_like(mean)
        if self.standardise and len(y):
            rows, group = torch.unique(weights > 0, dim=0, return_inverse=True)
            mean, scale = (part[group] for part in standard(x, rows))
        weighted = has_fit_parameter(self.estimator, "sample_weight")
        if not weighted and _uneven(weights):
            warnings.warn(f"{self.name}: its fit takes no sample_weight, so rows count alike", stacklevel=2)

        def one(i: int) -> Any:
            used = weights[i] > 0
            estimator: Any = clone(self.estimator)
            settings: dict[str, float] = {
                key: seed
                for key, value in estimator.get_params().items()
                if value is None and (key == "random_state" or key.endswith("__random_state"))
            }
            if self.strength is not None:
                settings[self.strength] = float(strengths[i])
            estimator.set_params(**settings)
            labels = y[i][used].numpy()
            target = 2.0 * labels - 1.0 if is_regressor(estimator) else labels
            extra = {"sample_weight": weights[i][used].numpy()} if weighted else {}
            try:
                return estimator.fit(_array(x[used], mean[i], scale[i]), target, **extra)
            except ValueError as error:
                raise DataError(f"{self.name} cannot fit problem {i}: {error}") from error

        fitted = Parallel(n_jobs=self.jobs, prefer="threads")(delayed(one)(i) for i in range(len(y)))
        return EstimatorFits(list(fitted), mean, scale)


def _uneven(weights: Float64[Tensor, "p n"]) -> bool:
    highest = weights.amax(1, keepdim=True)
    return bool(((weights > 0) & (weights < highest * (1 - 1e-9))).any())


def from_sklearn(
    estimator: Any,
    *,
    strength: str | None = None,
    strengths: Sequence[float] | None = None,
    name: str | None = None,
    standardise: bool = True,
    jobs: int | None = None,
) -> EstimatorProbe:
    """Return a scikit-learn classifier or regressor as a probe.

    Args:
        estimator: anything with scikit-learn's `fit`, `get_params` and one of `decision_function`, `predict_proba` and,
            for regressors, which get labels of -1 and 1, `predict`.
        strength: parameter that a probe's strength sets, such as "C", or "svc__C" in a pipeline; None for none. Larger
            is freer elsewhere, but the number is handed on as it is: of "alpha", say which `strengths` to try.
        strengths: what a sweep tries; by default 1e-4 to 10, or one where `strength` is None.
        name: in tables; the class's by default.
        standardise: standardise rows by each problem's own first.
        jobs: problems fitted side by side; -1 for as many as there are cores.

    Raises:
        ConfigError: an estimator that cannot score, or does not have that parameter.
    """
    from sklearn.base import is_regressor

    name = name or type(estimator).__name__
    if not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")):
        raise ConfigError(f"{estimator!r} is no scikit-learn estimator: it has no fit, or no get_params")
    decides = hasattr(estimator, "decision_function")
    if not (decides or hasattr(estimator, "predict_proba") or is_regressor(estimator)):
        raise ConfigError(f"{name} gives no scores: it has neither decision_function nor predict_proba")
    if strength is not None and strength not in estimator.get_params():
        raise ConfigError(f"{name} has no parameter {strength!r}; it has {', '.join(estimator.get_params())}")
    tried = tuple(strengths) if strengths is not None else STRENGTHS if strength is not None else (1.0,)
    calibrated = not decides and hasattr(estimator, "predict_proba")
    return EstimatorProbe(estimator, name, tried, calibrated, strength, standardise, jobs)
