"""The fits of one split, the same at every layer, and what each says about rows it did not see.

Where residuals come from is not known here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gapprobe import stats
from gapprobe.kernels import logistic
from gapprobe.probes.splits import NestedFolds


@dataclass(frozen=True)
class Problems:
    """Fits of one split at any layer: the outer folds, then every outer fold's inner folds, then shuffled labels.

    Attributes:
        cut: outer and inner folds.
        target: the labels.
        shuffled: the labels in m random orders; m may be 0.
        labels: labels of every fit.
        masks: training rows of every fit.
    """

    cut: NestedFolds
    target: Bool[np.ndarray, " n"]
    shuffled: Bool[np.ndarray, "m n"]
    labels: Bool[np.ndarray, "p n"]
    masks: Bool[np.ndarray, "p n"]

    @classmethod
    def of(cls, cut: NestedFolds, target: Bool[np.ndarray, " n"], shuffled: Bool[np.ndarray, "m n"]) -> "Problems":
        """Lay the fits out in their order."""
        folds = len(cut.inner)
        masks = [cut.training, *(cut.inner_training(fold) for fold in range(folds))]
        labels = np.repeat(target[None], sum(map(len, masks)), axis=0)
        masks += [cut.training] * len(shuffled)
        return cls(
            cut, target, shuffled, np.concatenate([labels, np.repeat(shuffled, folds, axis=0)]), np.concatenate(masks)
        )

    def weights(self) -> Float64[Tensor, "p n"]:
        """Return the sample weights of every fit: its training rows, classes balanced."""
        return logistic.balanced(torch.from_numpy(self.labels), torch.from_numpy(self.masks))

    def held_out(self, logits: Float[np.ndarray, "p n"]) -> "HeldOut":
        """Take from every fit's log-odds those of rows it did not train on."""
        folds, rows = len(self.cut.inner), np.arange(len(self.target))
        start, inner_auc = folds, np.empty(folds)
        for fold, inner in enumerate(self.cut.inner):
            training = np.flatnonzero(inner >= 0)
            scores = logits[start + inner[training], training]
            inner_auc[fold] = stats.auc(scores, self.target[training], inner[training])
            start += int(inner.max()) + 1
        shuffled = logits[start:].reshape(len(self.shuffled), folds, len(rows))[:, self.cut.outer, rows]
        return HeldOut(logits[self.cut.outer, rows], shuffled, inner_auc)


@dataclass(frozen=True)
class HeldOut:
    """What the fits of one split and layer say about rows that they did not see.

    Attributes:
        scores: log-odds of the probe.
        shuffled: log-odds of the probes trained on shuffled labels.
        inner_auc: for each outer fold the probe's area under the curve on that fold's training rows, by inner folds;
            NaN where no inner fold holds out both classes.
    """

    scores: Float[np.ndarray, " n"]
    shuffled: Float[np.ndarray, "m n"]
    inner_auc: Float[np.ndarray, " folds"]


@dataclass(frozen=True)
class Nested:
    """Out-of-fold scores of a probe whose layer each outer fold chose on its training rows.

    Attributes:
        layers: the layer that each outer fold chose.
        scores: log-odds of the probe.
        shuffled: log-odds, at the same layers, of the probes trained on shuffled labels.
    """

    layers: tuple[int, ...]
    scores: Float[np.ndarray, " n"]
    shuffled: Float[np.ndarray, "m n"]

    @property
    def probability(self) -> Float[np.ndarray, " n"]:
        """Return the probability of the positive class, classes balanced."""
        return (1.0 + np.tanh(self.scores / 2.0)) / 2.0


def choose_layers(by_layer: dict[int, HeldOut], cut: NestedFolds) -> Nested:
    """Let each outer fold choose the layer with the largest area on its inner folds; of equals the first."""
    layers = list(by_layer)
    areas = np.nan_to_num(np.stack([by_layer[layer].inner_auc for layer in layers]), nan=0.5)  # [l folds]
    chosen = areas.argmax(0)
    of_row, rows = chosen[cut.outer], np.arange(len(cut.outer))
    scores = np.stack([by_layer[layer].scores for layer in layers])[of_row, rows]
    shuffled = np.stack([by_layer[layer].shuffled for layer in layers])[of_row, :, rows].T
    return Nested(tuple(layers[i] for i in chosen), scores, shuffled)
