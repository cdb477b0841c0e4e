"""Approximate inverse Hessians for many linear problems over one X, exact in a shared subspace of the features.

Outside the subspace a Hessian is taken to be a multiple of 1. Inside it is either curvature * correlations + 1, the
same for all problems but for one number (`Shared`), or the problem's own, with its own curvature at every row (`Own`):
real activations are nearly separable, curvature then differs a thousandfold between rows, and only the latter helps.
Problems that differ in little but the fold left out may share one, at first, and where rows are many in all dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gapprobe.kernels import products
from gapprobe.kernels.standardised import Standardised, View

RANK = 192  # largest subspace
OVER = 16  # vectors that are drawn beyond it: they make those that are kept better
LARGE = 640  # largest for problems that it does not do for: few are left then
SAMPLE = 4096  # rows from which Hessians are taken
NEGLIGIBLE = 0.3  # a row adds at most this to a curvature that the penalty makes at least 1: left out
FEWEST = 4  # rows a feature from which on kin share a Hessian: with fewer their optima are too far apart
MOST = 12  # rows a feature that are taken for it; more save less than they cost
ALIKE = 0.97  # cosine of the curvatures of two kins that share one Hessian but for a factor
TOGETHER = 1 << 25  # numbers in the Hessians of all kins
SPAN = 1e5  # largest ratio of eigenvalues inside and outside: float32 cannot take a projection off better than that


@dataclass(frozen=True)
class Subspace:
    """Leading eigenvectors of the features' correlations, from at most `SAMPLE` rows, or all of their space.

    Attributes:
        basis: orthonormal, a vector a row; None where it is the features themselves.
        values: eigenvalues.
        tail: mean of the eigenvalues left over.
        stride: of the rows that were taken.
        seen: those rows in the basis, and a last column of ones.
    """

    basis: Float[Tensor, "k d"] | None
    values: Float[Tensor, " k"]
    tail: float
    stride: int
    seen: Float[Tensor, "m f"]

    @classmethod
    def of(cls, features: Standardised, rank: int) -> Subspace:
        """Draw it at random; only the speed of fits depends on it.

        Source: Halko, Martinsson & Tropp 2011, algorithm 4.4, started with Clarkson & Woodruff's sums of rows (2013).
        """
        stride = math.ceil(len(features.x) / SAMPLE)
        z = features.shared[::stride, :-1]
        n, d = z.shape
        rank = min(rank, n, d)
        # Sums of a few rows each, with a random sign: as good a start as a product with random numbers.
        sums, draw = min(rank + OVER, n, d), torch.Generator().manual_seed(0)
        sign = 2.0 * torch.randint(2, (n, 1), generator=draw).to(z) - 1.0
        start = z.new_zeros(sums, d)
        for rows, signs in zip(z.split(sums), sign.split(sums), strict=True):
            start[: len(rows)].addcmul_(rows, signs)
        basis = torch.linalg.qr(start.T)[0].T
        basis = torch.linalg.qr(products.combined(features.seen_in(basis, stride), z).T)[0].T
        seen = features.seen_in(basis, stride)
        # In float64: of features that are constant but for rounding, float32's squares are too small for a solver.
        values, turn = torch.linalg.eigh((products.dots(seen, seen) / n).double())
        values, turn = values[-rank:].clamp(min=0.0).to(z), turn[:, -rank:].to(z)
        rest = float((torch.linalg.vector_norm(z) ** 2 / n - values.sum()).clamp(min=0.0))
        turned = seen.new_ones(n, rank + 1)
        products.add_combined(seen.T, turn, turned[:, :-1].zero_())
        return cls(products.combined(turn.T, basis), values, rest / max(1, min(n, d) - rank), stride, turned)

    @classmethod
    def whole(cls, features: Standardised, stride: int = 0) -> Subspace:
        """Return all of the space, as it is, with one row of `stride`, by default with at most `SAMPLE`."""
        stride = stride or math.ceil(len(features.x) / SAMPLE)
        seen = features.shared[::stride]
        return cls(None, seen.new_ones(seen.shape[1] - 1), 0.0, stride, seen)

    def to(self, dtype: torch.dtype) -> Subspace:
        """Return the same in another precision, but for the rows."""
        basis = None if self.basis is None else self.basis.to(dtype)
        return Subspace(basis, self.values.to(dtype), self.tail, self.stride, self.seen)


class Spaces:
    """A subspace of X, and a larger one for problems that it does not do for; drawn when asked for, in float32.

    Attributes:
        kin: number of each problem's kin, those that differ from it only in the rows they use.
        whole: whether the larger one is all of the space.
    """

    def __init__(self, features: Standardised, problems: int, kin: Int64[Tensor, " p"]) -> None:
        """Take the features, and how many problems share them; classes count.

        A larger subspace saves steps, which are worth more the more a step costs.
        """
        self._features, self._problems, self.kin = features, problems, kin
        self.whole = features.x.shape[1] <= LARGE

    @cached_property
    def small(self) -> Subspace:
        """Return what pays from the first step on."""
        rows = len(self._features.x)
        return Subspace.of(self._features, min(RANK, max(32, math.isqrt(rows * self._problems))))

    @cached_property
    def large(self) -> Subspace:
        """Return what pays for problems that take hundreds of steps."""
        return Subspace.whole(self._features) if self.whole else Subspace.of(self._features, LARGE)


@dataclass(frozen=True)
class Shared:
    """V (h S + 1)^-1 V' + (1 - V V') / (h tail + 1), h the sum of a problem's curvatures."""

    basis: Float[Tensor, "k d"]
    inside: Float[Tensor, "q k"]
    outside: Float[Tensor, "q 1"]
    intercept: Float[Tensor, " q"]

    @classmethod
    def of(cls, space: Subspace, curved: Float[Tensor, " q"]) -> Shared:
        """Take the sum of each problem's curvatures (each class of a problem counts as one here)."""
        assert space.basis is not None  # what is all of the space is for Hessians alone
        h = curved[:, None]
        outside = h * space.tail + 1.0
        inside = 1.0 / torch.minimum(h * space.values + 1.0, SPAN * outside) - 1.0 / outside
        return cls(space.basis, inside, outside, h[:, 0])

    def apply(self, gradient: Float[Tensor, "q e"]) -> Float[Tensor, "q e"]:
        """Return the preconditioned gradient; the last entry is the intercept's."""
        out = torch.empty_like(gradient)
        torch.div(gradient[:, :-1], self.outside, out=out[:, :-1])
        inside = products.dots(gradient[:, :-1], self.basis).mul_(self.inside)
        products.add_combined(inside, self.basis, out[:, :-1])
        torch.div(gradient[:, -1], self.intercept, out=out[:, -1])
        return out

    def keep(self, some: Bool[Tensor, " q"]) -> Shared:
        """Return the part of some problems."""
        return Shared(self.basis, self.inside[some], self.outside[some], self.intercept[some])


@dataclass(frozen=True)
class Own:
    """V (V' H V)^-1 V' + (1 - V V') / (h tail + 1), H the problem's own Hessian, or the mean of its kin's.

    Held in the coordinates that all problems share: z = T x there, so H^-1 = T^-T (...)^-1 T^-1, and the penalty is 1
    in both but for the few per cent by which a fold's deviations differ from those of all rows.

    Attributes:
        space: V.
        factor: Cholesky's, of every kin; in float32 whatever the problems are in: it only leads the way.
        kin: of each problem.
        outside: h tail + 1.
        mean: of a problem's rows, as `View` has it.
        scaling: as `View` has it.
    """

    space: Subspace
    factor: Float[Tensor, "k f f"]
    kin: Int64[Tensor, " q"]
    outside: Float[Tensor, "q 1"]
    mean: Float[Tensor, "q d"]
    scaling: Float[Tensor, "q d"]

    @classmethod
    def of(
        cls, space: Subspace, view: View, curvature: Float[Tensor, "q n"], kin: Int64[Tensor, " q"] | None = None
    ) -> Own:
        """Form each problem's Hessian in the subspace from the rows whose curvature counts, and factor it.

        Problems of one kin share the mean of theirs.
        """
        f, own_kin = space.seen.shape[1], torch.arange(len(curvature), device=curvature.device)
        if kin is not None:
            own_kin = torch.unique(kin, return_inverse=True)[1]
        curved = _means(curvature[:, :: space.stride].to(space.seen), own_kin) * space.stride
        hessians = curved.new_empty(len(curved), f, f)
        for own, weights in zip(hessians, curved, strict=True):
            _hessian(space.seen, weights, own)
        factor, largest = _factored(hessians)
        largest = largest.to(curvature)[own_kin]
        outside = torch.maximum(curvature.sum(1, keepdim=True) * space.tail + 1.0, largest / SPAN)
        classes = len(curvature) // len(view.mean)
        mean, scaling = (part[:, 0].repeat_interleave(classes, 0) for part in (view.mean, view.scaling))
        return cls(space.to(curvature.dtype), factor, own_kin, outside, mean, scaling)

    @classmethod
    def together(cls, view: View, curvature: Float[Tensor, "p n"], kin: Int64[Tensor, " p"], saved: int) -> Own | None:
        """Form every kin's mean Hessian in all dimensions; None where that costs more than `saved` steps a problem.

        With many rows a feature the optima of kin, the folds of one target and one strength, are near each other, and
        so is the curvature at every row. Rows that a fold leaves out thus touch the way that its fit takes, never the
        optimum that the certificate measures.
        """
        n, d = view.of.x.shape
        kins, kin = torch.unique(kin, return_inverse=True)
        if n < FEWEST * d or len(kins) * d * d > TOGETHER:
            return None
        space = Subspace.whole(view.of, math.ceil(n / (MOST * d)))
        curved = _means(curvature[:, :: space.stride], kin) * space.stride
        leader = _leaders(curved)
        formed = len(set(leader.values()))
        if formed * len(space.seen) * d + len(kins) * d * d > saved * 4 * n * len(kin):  # multiplications, over d
            return None
        hessians = curved.new_empty(len(kins), d + 1, d + 1)
        for i, j in leader.items():
            if i == j:
                _hessian(space.seen, curved[i], hessians[i])
            else:
                torch.mul(hessians[j], curved[i].sum() / curved[j].sum(), out=hessians[i])
        ones = curved.new_ones(len(kin), 1)
        return cls(space, _factored(hessians)[0], kin, ones, view.mean[:, 0], view.scaling[:, 0])

    @cached_property
    def _table(self) -> tuple[Int64[Tensor, "k m"], Int64[Tensor, " q"]] | None:
        """Return the problems of every kin, filled up with problem 0, and where each stands in that table.

        None where every problem stands for itself.
        """
        numbers = torch.arange(len(self.kin), device=self.kin.device)
        if self.kin.equal(numbers):
            return None
        before = (self.kin[:, None] == self.kin).tril(-1).sum(1)
        most = int(before.max()) + 1
        table = self.kin.new_zeros(len(self.factor), most)
        table[self.kin, before] = numbers
        return table, self.kin * most + before

    def _solved(self, right: Float[Tensor, "q f"]) -> Float[Tensor, "q f"]:
        narrow = right.to(self.factor.dtype)
        columns = narrow[..., None] if self._table is None else narrow[self._table[0]].mT
        # Twice as fast as `cholesky_solve`, which copies the factors.
        half = torch.linalg.solve_triangular(self.factor, columns, upper=False)
        solved = torch.linalg.solve_triangular(self.factor.mT, half, upper=True).mT.flatten(0, 1)
        return (solved if self._table is None else solved[self._table[1]]).to(right)

    def apply(self, gradient: Float[Tensor, "q e"]) -> Float[Tensor, "q e"]:
        """Return the preconditioned gradient; the last entry is the intercept's."""
        turned = gradient[:, :-1] / self.scaling
        turned.addcmul_(self.mean, gradient[:, -1:])
        inside = turned if self.space.basis is None else products.dots(turned, self.space.basis)
        solved = self._solved(torch.cat([inside, gradient[:, -1:]], 1))
        if self.space.basis is None:
            turned = solved[:, :-1]
        else:
            turned /= self.outside
            products.add_combined(solved[:, :-1] - inside / self.outside, self.space.basis, turned)
        out = torch.empty_like(gradient)
        torch.div(turned, self.scaling, out=out[:, :-1])
        out[:, -1] = solved[:, -1] + torch.linalg.vecdot(turned, self.mean)
        return out

    def keep(self, some: Bool[Tensor, " q"]) -> Own:
        """Return the part of some problems."""
        kins, kin = torch.unique(self.kin[some], return_inverse=True)
        factor = self.factor if len(kins) == len(self.factor) else self.factor[kins]
        return Own(self.space, factor, kin, self.outside[some], self.mean[some], self.scaling[some])


def kin_of_classes(kin: Int64[Tensor, " p"], classes: int) -> Int64[Tensor, " q"]:
    """Number every class of every problem: kin are the same class of problems that are."""
    return (kin[:, None] * classes + torch.arange(classes, device=kin.device)).flatten()


def _means(curvature: Float[Tensor, "q m"], kin: Int64[Tensor, " q"]) -> Float[Tensor, "k m"]:
    """Return the mean curvature of every kin."""
    sums = curvature.new_zeros(int(kin.max()) + 1, curvature.shape[1]).index_add_(0, kin, curvature)
    return sums / kin.bincount()[:, None]


def _leaders(curvature: Float[Tensor, "k m"]) -> dict[int, int]:
    """Return for every kin another one, or itself, whose curvature is alike but for a factor.

    The most curved one leads: rows that count for another then count for it.
    """
    unit = torch.nn.functional.normalize(curvature)
    leader: dict[int, int] = {}
    for i in curvature.sum(1).argsort(descending=True).tolist():
        leader[i] = next((j for j, k in leader.items() if j == k and float(unit[i] @ unit[j]) > ALIKE), i)
    return leader


def _hessian(seen: Float[Tensor, "m f"], curvature: Float[Tensor, " m"], out: Float[Tensor, "f f"]) -> None:
    """Write seen' diag(curvature) seen, the lower triangle alone, from the rows whose curvature counts."""
    m, f = seen.shape
    step, out = 128, out.zero_()
    for rows in torch.nonzero(curvature > NEGLIGIBLE / max(m, f))[:, 0].split(SAMPLE):
        part = seen[rows].mul_(curvature[rows].sqrt()[:, None])
        for first in range(0, f, step):
            columns = slice(first, first + step)
            products.add_combined(part[:, first:].T, part[:, columns], out[first:, columns])


def _factored(hessians: Float[Tensor, "q f f"]) -> tuple[Float[Tensor, "q f f"], Float[Tensor, "q 1"]]:
    """Return Cholesky's factors with the penalty added, on all but the last column, and the largest diagonals.

    The Hessians are changed.
    """
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    diagonal[:, :-1] += 1.0
    largest = diagonal.amax(1, keepdim=True)
    diagonal += 1e-6 * largest
    # Scaled to a diagonal of ones: massive dimensions must not eat the digits of the others.
    scale = diagonal.rsqrt()
    hessians.mul_(scale[:, :, None]).mul_(scale[:, None])
    factor, _ = torch.linalg.cholesky_ex(hessians)
    return factor.div_(scale[:, :, None]), largest
