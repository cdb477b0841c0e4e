"""The fits of one split and target, the same at every layer, and what each says about rows it did not see.

Where residuals come from, and what kind of probe is fitted, is not known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
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

    def held_out(self, scores: Float[np.ndarray, "p s n"]) -> "HeldOut":
        """Take from every fit's scores, at each strength, those of rows it did not train on."""
        folds, rows = len(self.cut.inner), np.arange(len(self.target))
        start, inner_auc = folds, np.empty((scores.shape[1], folds))
        for fold, inner in enumerate(self.cut.inner):
            training = np.flatnonzero(inner >= 0)
            of_fit = scores[start + inner[training], :, training]  # [training, s]
            for strength, own in enumerate(of_fit.T):
                inner_auc[strength, fold] = stats.auc(own, self.target[training], inner[training])
            start += int(inner.max()) + 1
        shuffled = scores[start:].reshape(len(self.shuffled), folds, scores.shape[1], len(rows))
        by_fold = np.ascontiguousarray(shuffled.transpose(1, 3, 0, 2)[self.cut.outer, rows].transpose(1, 2, 0))
        return HeldOut(np.ascontiguousarray(scores[self.cut.outer, :, rows].T), by_fold, inner_auc)


@dataclass(frozen=True)
class HeldOut:
    """What the fits of one split and layer say, at each of s strengths, about rows that they did not see.

    Attributes:
        scores: of the probe.
        shuffled: of the probes trained on shuffled labels.
        inner_auc: for each outer fold the probe's area under the curve on that fold's training rows, by inner folds;
            NaN where no inner fold holds out both classes.
    """

    scores: Float[np.ndarray, "s n"]
    shuffled: Float[np.ndarray, "m s n"]
    inner_auc: Float[np.ndarray, "s folds"]


@dataclass(frozen=True)
class Nested:
    """Out-of-fold scores of a probe whose layer and strength each outer fold chose on its training rows.

    Attributes:
        layers: the layer that each outer fold chose.
        strengths: the strength that it chose.
        scores: of the probe.
        shuffled: at the same layers and strengths, of the probes trained on shuffled labels.
    """

    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    scores: Float[np.ndarray, " n"]
    shuffled: Float[np.ndarray, "m n"]

    @property
    def probability(self) -> Float[np.ndarray, " n"]:
        """Return the probability of the positive class, classes balanced, of scores that are log-odds."""
        return (1.0 + np.tanh(self.scores / 2.0)) / 2.0


def choose(by_layer: Mapping[int, HeldOut], strengths: tuple[float, ...], cut: NestedFolds) -> Nested:
    """Let each outer fold choose layer and strength with the largest area on its inner folds.

    Of equals the first layer is taken, and the smallest strength, which is the stiffest probe.
    """
    layers = list(by_layer)
    order = np.argsort(strengths, kind="stable")
    areas = np.stack([by_layer[layer].inner_auc[order] for layer in layers])  # [l s folds]
    areas = np.nan_to_num(areas, nan=0.5).reshape(-1, areas.shape[2])
    best: Int[np.ndarray, " folds"] = areas.argmax(0)
    at_layer, at_strength = best // len(order), order[best % len(order)]
    rows, outer = np.arange(len(cut.outer)), cut.outer
    scores = np.stack([by_layer[layer].scores for layer in layers])[at_layer[outer], at_strength[outer], rows]
    shuffled = np.stack([by_layer[layer].shuffled for layer in layers])
    shuffled = shuffled[at_layer[outer], :, at_strength[outer], rows].T
    return Nested(tuple(layers[i] for i in at_layer), tuple(strengths[i] for i in at_strength), scores, shuffled)
