"""What a contestant of the probes benchmark is, and the contestants themselves.

Each peer is written as a careful user would write it: features standardised once a fold and used for all strengths.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.probes_data import FOLDS, Layer, Sweep
from gapprobe.kernels import logistic, products
from gapprobe.kernels.logistic import LogisticFits

TOLERANCE = 1e-6
_ROWS = 1024


class TooSlow(Exception):
    """A contestant that would take longer than anybody waits."""


@dataclass(frozen=True, eq=False)
class Solution:
    """All strengths of one fold of one layer.

    Attributes:
        layer: its number in the sweep.
        fold: that is held out.
        weights: of features as StandardScaler gives them for this fold, or of raw ones.
        free: intercepts.
        raw: whether they are of raw features.
    """

    layer: int
    fold: int
    weights: Float64[Tensor, "s d"]
    free: Float64[Tensor, " s"]
    raw: bool = False


class Contestant(ABC):
    """A way to fit a sweep, made anew for each sweep."""

    name: ClassVar[str]
    label: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]] = ("torch", "numpy", "gapprobe")
    peer: ClassVar[bool] = True
    """Peers may fit some folds only: they fit one problem after another, so time is a multiple."""
    must_converge: ClassVar[bool] = True
    """Whether it promises the optimum: one that does not is measured too, and its distance shown."""
    limit: ClassVar[float] = 600.0
    """Seconds of one run, after which a peer is left out."""

    def __init__(self, sweep: Sweep, certified: Sequence[LogisticFits]) -> None:
        """Prepare, outside the clock; `certified` is what gapprobe gives for each layer."""
        self.sweep = sweep
        self.certified = certified

    @abstractmethod
    def fit(self, folds: Sequence[int]) -> Any:
        """Fit all layers and strengths of these folds; this is timed."""

    @abstractmethod
    def solutions(self, fitted: Any) -> list[Solution]:
        """Return what `fit` returned as it is compared; nothing for one that fits nothing."""


class Gapprobe(Contestant):
    """All problems of a layer in one call."""

    name = "gapprobe"
    label = "gapprobe"
    peer = False

    def fit(self, folds: Sequence[int]) -> list[LogisticFits]:
        """Fit a layer at a time."""
        return [fit_layer(layer, self.sweep.strengths, folds) for layer in self.sweep.layers]

    def solutions(self, fitted: list[LogisticFits]) -> list[Solution]:
        """Cut the problems into folds."""
        count = len(self.sweep.strengths)
        return [
            Solution(number, fold, *part, raw=True)
            for number, fits in enumerate(fitted)
            for fold, part in enumerate(zip(fits.coef.split(count), fits.intercept.split(count), strict=True))
        ]


class Matmul(Contestant):
    """The bare products of gapprobe's steps: logits and gradient of all problems that a step still has."""

    name = "matmul"
    label = "the bare products of gapprobe's steps"
    peer = False

    def __init__(self, sweep: Sweep, certified: Sequence[LogisticFits]) -> None:
        """Make operands of the widest product of each layer, narrower ones take a part of them, and X both ways."""
        super().__init__(sweep, certified)
        draw = torch.Generator().manual_seed(0)
        self._operands: list[tuple[list[int], Tensor, Tensor, Tensor]] = []
        for layer, fits in zip(sweep.layers, certified, strict=True):
            (n, d), p = layer.x.shape, len(fits.steps)
            operands = torch.randn(p, d, generator=draw), torch.randn(p, n, generator=draw)
            self._operands.append((widths(fits), *operands, layer.x.T.contiguous()))

    def fit(self, folds: Sequence[int]) -> float:
        """Multiply."""
        assert len(folds) == FOLDS
        last = 0.0
        for layer, (steps, left, right, across) in zip(self.sweep.layers, self._operands, strict=True):
            for width in steps:
                logits, gradient = self.products(left[:width], right[:width], layer.x, across)
                last = float(logits[0, 0] + gradient[0, 0])
        return last

    def products(self, left: Tensor, right: Tensor, x: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        """Return left @ x.T and right @ x; `across` is x.T."""
        return products.combined(left, across), products.combined(right, x)

    def solutions(self, fitted: float) -> list[Solution]:
        """Return nothing."""
        del fitted
        return []


class TorchMatmul(Matmul):
    """The same products by torch, in blocks of rows: its longer products run a third slower."""

    name = "torch-matmul"
    label = "the same products by torch"
    peer = False

    def products(self, left: Tensor, right: Tensor, x: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        """Return left @ x.T and right @ x."""
        del across
        logits, gradient = left.new_empty(len(left), len(x)), left.new_zeros(len(left), x.shape[1])
        for start in range(0, len(x), _ROWS):
            some = slice(start, start + _ROWS)
            torch.mm(left, x[some].T, out=logits[:, some])
            gradient.addmm_(right[:, some], x[some])
        return logits, gradient


class OneByOne(Contestant):
    """A solver of one problem, called for each fold and strength."""

    distributions = ("scikit-learn", "scipy", "numpy")
    dtype: ClassVar[type[np.floating[Any]]] = np.float32

    def fit(self, folds: Sequence[int]) -> list[tuple[int, int, list[tuple[Any, Any]]]]:
        """Standardise a fold, then fit each strength.

        Raises:
            TooSlow: the limit has passed.
        """
        begun, done, found = time.perf_counter(), 0, []
        for number, layer in enumerate(self.sweep.layers):
            for fold in folds:
                rows = (layer.fold != fold).numpy()
                z = StandardScaler().fit_transform(layer.x.numpy()[rows].astype(self.dtype, copy=False))
                y, fits = layer.y.numpy()[rows], []
                for c in self.sweep.strengths.tolist():
                    fits.append(self.solve(z, y, c))
                    done += 1
                    if (passed := time.perf_counter() - begun) > self.limit:
                        every = len(self.sweep.layers) * len(folds) * len(self.sweep.strengths)
                        raise TooSlow(f"stopped after {passed:.0f} s with {done} of {every} fits done")
                found.append((number, fold, fits))
        return found

    def solutions(self, fitted: list[tuple[int, int, list[tuple[Any, Any]]]]) -> list[Solution]:
        """Put each fold's strengths side by side."""
        return [
            Solution(
                number,
                fold,
                torch.from_numpy(np.stack([np.asarray(weights, np.float64).reshape(-1) for weights, _ in fits])),
                torch.tensor([float(np.asarray(free).reshape(())) for _, free in fits], dtype=torch.float64),
            )
            for number, fold, fits in fitted
        ]

    @abstractmethod
    def solve(self, z: NDArray[Any], y: NDArray[np.bool_], c: float) -> tuple[Any, Any]:
        """Return weights and intercept."""


class Sklearn(OneByOne):
    """scikit-learn's LogisticRegression."""

    settings: ClassVar[dict[str, Any]]

    def solve(self, z: NDArray[Any], y: NDArray[np.bool_], c: float) -> tuple[Any, Any]:
        """Fit; a warning that it did not converge says nothing that the comparison does not."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=c, **self.settings).fit(z, y)
        return model.coef_, model.intercept_[0]


class SklearnLbfgsF32(Sklearn):
    """As near to the optimum as float32 lets it come: with strong C it stops before a gap of 1e-5, whatever `tol`."""

    name = "sklearn-lbfgs-f32"
    label = "scikit-learn lbfgs, float32, tol 1e-8"
    must_converge = False
    settings: ClassVar[dict[str, Any]] = {"tol": 1e-8, "max_iter": 100_000}


class SklearnLbfgsF64(SklearnLbfgsF32):
    """The same in float64, which is what scikit-learn makes of most inputs."""

    name = "sklearn-lbfgs-f64"
    label = "scikit-learn lbfgs, float64, tol 1e-8"
    must_converge = True
    dtype = np.float64


class SklearnDefault(Sklearn):
    """As it comes: 100 iterations at most."""

    name = "sklearn-default"
    label = "scikit-learn as it comes (100 iterations), float32"
    must_converge = False
    settings: ClassVar[dict[str, Any]] = {}


class SklearnNewtonCg(Sklearn):
    """Newton's method with conjugate gradients."""

    name = "sklearn-newton-cg"
    label = "scikit-learn newton-cg, float32, tol 1e-6"
    must_converge = False
    settings: ClassVar[dict[str, Any]] = {"solver": "newton-cg", "tol": 1e-6, "max_iter": 10_000}


class SklearnNewtonCholesky(Sklearn):
    """Newton's method with whole Hessians."""

    name = "sklearn-newton-cholesky"
    label = "scikit-learn newton-cholesky, float64, tol 1e-8"
    dtype = np.float64
    settings: ClassVar[dict[str, Any]] = {"solver": "newton-cholesky", "tol": 1e-8, "max_iter": 1000}


class TorchLbfgs(OneByOne):
    """torch.optim.LBFGS on the mean loss, as scikit-learn scales it."""

    name = "torch-lbfgs"
    label = "torch.optim.LBFGS, float32, strong Wolfe"
    distributions = ("torch", "scikit-learn")
    must_converge = False

    def solve(self, z: NDArray[Any], y: NDArray[np.bool_], c: float) -> tuple[Any, Any]:
        """Fit until no gradient is left, or 5,000 iterations."""
        x, target = torch.from_numpy(z), torch.from_numpy(y).float()
        weights, free = (torch.zeros(size, requires_grad=True) for size in (x.shape[1], 1))
        optimiser = torch.optim.LBFGS(
            [weights, free], max_iter=5000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights + free, target)
            loss = loss + weights @ weights / (2 * c * len(x))
            loss.backward()
            return loss

        optimiser.step(closure)
        return weights.detach().numpy(), free.detach().numpy()[0]


CONTESTANTS: tuple[type[Contestant], ...] = (
    Matmul,
    TorchMatmul,
    Gapprobe,
    SklearnLbfgsF32,
    SklearnLbfgsF64,
    SklearnDefault,
    SklearnNewtonCg,
    SklearnNewtonCholesky,
    TorchLbfgs,
)


def fit_layer(layer: Layer, strengths: Float64[Tensor, " s"], folds: Sequence[int]) -> LogisticFits:
    """Fit all strengths of all these folds of a layer with gapprobe, fold by fold."""
    used: Bool[Tensor, "k n"] = layer.fold != torch.tensor(list(folds))[:, None]
    weights: Float[Tensor, "p n"] = used.repeat_interleave(len(strengths), 0).float()
    y = layer.y.expand(len(weights), -1)
    return logistic.fit(layer.x, y, weights, strengths.repeat(len(folds)), tolerance=TOLERANCE)


def widths(fits: LogisticFits) -> list[int]:
    """Return for each step how many problems were still there: what gapprobe multiplies with X at once."""
    return [int((fits.steps > step).sum()) for step in range(int(fits.steps.max()))]
