"""The fits of one split and target, the same at every layer, and what each says about rows it did not see.

Where residuals come from, and what kind of probe is fitted, is not known here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from gapprobe import stats
from gapprobe.kernels import logistic
from gapprobe.probes.coefficients import Linear, Stored
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

    def unshuffled(self) -> "Problems":
        """Return the fits without those of shuffled labels."""
        return Problems.of(self.cut, self.target, self.shuffled[:0])

    def weights(self) -> Float64[Tensor, "p n"]:
        """Return the sample weights of every fit: its training rows, classes balanced."""
        return logistic.balanced(torch.from_numpy(self.labels), torch.from_numpy(self.masks))

    def judged(self) -> Iterator[tuple[int, Bool[np.ndarray, " n"]]]:
        """Yield for every fit the run that it belongs to, and the rows it is judged on: held out by its own fold.

        Run 0 is the outer folds, run 1 + f the inner folds of outer fold f, and those after are the shuffled labels.
        """
        folds = len(self.cut.inner)
        outer = [self.cut.outer == fold for fold in range(folds)]
        yield from ((0, rows) for rows in outer)
        for fold, inner in enumerate(self.cut.inner):
            yield from ((1 + fold, inner == part) for part in range(int(inner.max()) + 1))
        for run in range(len(self.shuffled)):
            yield from ((1 + folds + run, rows) for rows in outer)

    def held_out(self, scores: Float[np.ndarray, "p s n"]) -> "HeldOut":
        """Take from every fit's scores, at each strength, those of rows it did not train on."""
        gathering = Gathering(self, scores.shape[1])
        for own in scores:
            gathering.take(own)
        return gathering.finish()


class Gathering:
    """What fits say of rows they did not see, taken fit by fit: never are all fits' scores of all rows in memory.

    Attributes:
        problems: the fits, in the order in which they are taken.
        runs: scores by run (see `Problems.judged`), [runs, s, n].
    """

    def __init__(self, problems: Problems, strengths: int) -> None:
        self.problems = problems
        folds, n = len(problems.cut.inner), len(problems.target)
        self.runs = np.zeros((1 + folds + len(problems.shuffled), strengths, n))
        self._judged = problems.judged()
        self._linear: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def wants_coefficients(self) -> bool:
        """Return whether the next fit is one whose scores are the probe's: of an outer fold, on the labels."""
        return len(self._linear) < len(self.problems.cut.inner)

    def take(
        self,
        scores: Float[np.ndarray, "s n"],
        linear: tuple[Float64[np.ndarray, "s d"], Float64[np.ndarray, " s"]] | None = None,
    ) -> None:
        """Take the next fit: its scores at every strength, and coefficients and intercepts where they are wanted."""
        run, rows = next(self._judged)
        self.runs[run][:, rows] = scores[:, rows]
        if linear is not None:
            self._linear.append(linear)

    def finish(self) -> "HeldOut":
        """Return what all fits said."""
        cut, target = self.problems.cut, self.problems.target
        folds, strengths = len(cut.inner), self.runs.shape[1]
        inner_auc = np.empty((strengths, folds))
        for fold, inner in enumerate(cut.inner):
            training = np.flatnonzero(inner >= 0)
            for strength, own in enumerate(self.runs[1 + fold][:, training]):
                inner_auc[strength, fold] = stats.auc(own, target[training], inner[training])
        linear = None
        if self._linear:
            coef, intercept = (np.stack(parts, axis=1) for parts in zip(*self._linear, strict=True))
            linear = Linear(coef, intercept)
        # Copies: views would keep the inner folds' scores in memory.
        return HeldOut(self.runs[0].copy(), self.runs[1 + folds :].copy(), inner_auc, linear)


@dataclass(frozen=True)
class HeldOut:
    """What the fits of one split and layer say, at each of s strengths, about rows that they did not see.

    Attributes:
        scores: of the probe.
        shuffled: of the probes trained on shuffled labels.
        inner_auc: for each outer fold the probe's area under the curve on that fold's training rows, by inner folds;
            NaN where no inner fold holds out both classes.
        linear: coefficients of the outer folds' fits, where they are kept.
    """

    scores: Float[np.ndarray, "s n"]
    shuffled: Float[np.ndarray, "m s n"]
    inner_auc: Float[np.ndarray, "s folds"]
    linear: Linear | Stored | None = None


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
    chosen = [(layers[i], int(order[j])) for i, j in zip(best // len(order), best % len(order), strict=True)]
    first = by_layer[layers[0]]
    scores, shuffled = np.empty(first.scores.shape[1]), np.empty((len(first.shuffled), first.scores.shape[1]))
    for fold, (layer, strength) in enumerate(chosen):
        rows = cut.outer == fold
        scores[rows] = by_layer[layer].scores[strength, rows]
        shuffled[:, rows] = by_layer[layer].shuffled[:, strength, rows]
    return Nested(tuple(layer for layer, _ in chosen), tuple(strengths[at] for _, at in chosen), scores, shuffled)
