"""Our probes as scikit-learn classifiers, for pipelines and searches that exist already. Needs scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,  # pyright: ignore[reportPrivateUsage] (what scikit-learn's own estimators call)
    check_is_fitted,
    validate_data,
)

from gapprobe.probes.base import find_probe


class ProbeClassifier(ClassifierMixin, BaseEstimator):
    """One probe of two classes with scikit-learn's interface.

    Args:
        probe: name of a probe, or an instance.
        strength: inverse strength of its penalty; the probe's middle one where left out.
        class_weight: as scikit-learn's: "balanced" gives both classes the same total weight, None leaves them be.
        seed: of whatever is random in the probe.

    Attributes:
        classes_: the two labels.
        n_features_in_: width of the features.
        coef_: weights of the raw features, [1 d], of a probe that is linear.
        intercept_: free term, [1].
    """

    # Any: scikit-learn wants whatever is given kept as it is, and looked at in fit.
    def __init__(self, probe: Any = "logistic", strength: Any = None, class_weight: Any = None, seed: Any = 0) -> None:
        self.probe, self.strength, self.class_weight, self.seed = probe, strength, class_weight, seed

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ProbeClassifier:
        """Fit the probe.

        Args:
            X: features, [n d].
            y: labels of two kinds.
            sample_weight: of each row; a row of weight 0 leaves no trace.

        Raises:
            ValueError: more or fewer than two classes, or what scikit-learn refuses.
        """
        x, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            told = "Only binary classification is supported." if len(self.classes_) > 2 else "one class"
            raise ValueError(f"{told} The labels hold {len(self.classes_)} class(es), a probe needs two.")
        weights = weights * compute_sample_weight(self.class_weight, y)
        if not np.bincount(codes, weights, minlength=2).all():
            raise ValueError("rows of weight above 0 are of one class only; a probe needs two")
        found = find_probe(self.probe, ("rows", "pairs"))
        strength = found.strengths[len(found.strengths) // 2] if self.strength is None else self.strength
        fits = found.fit(
            _tensor(x, X),
            torch.from_numpy(codes == 1)[None],
            torch.from_numpy(weights)[None],
            torch.tensor([strength], dtype=torch.float64),
            self.seed,
        )
        self.fits_, self.calibrated_ = fits, found.calibrated
        for name in ("coef", "intercept"):
            if hasattr(fits, name):
                setattr(self, f"{name}_", getattr(fits, name).numpy())
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return how much each row looks like the second class, [n]."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return self.fits_.scores(_tensor(x, X))[0].numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the likelier label of each row, [n]."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of both labels, [n 2]; of a probe whose scores are no log-odds, only an order."""
        positive = (1.0 + np.tanh(self.decision_function(X) / 2.0)) / 2.0
        return np.stack([1.0 - positive, positive], axis=1)

    def __sklearn_tags__(self) -> Any:
        """Say that there are two classes only."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _tensor(validated: Any, given: Any) -> torch.Tensor:
    """Copy what may be the user's own memory, or cannot be written to."""
    return torch.from_numpy(validated.copy() if validated is given or not validated.flags.writeable else validated)
