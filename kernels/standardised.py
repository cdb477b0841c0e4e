"""Features that every problem standardises by its own rows, without a copy a problem.

z = (x - mean) / deviation over the rows a problem uses. Folds, targets and strengths share one matrix in main memory:
a problem's own standardisation is a scaling of its weights before the product and of its gradient after it. Products
are float32 on a copy standardised by all rows, or float64 on the raw features themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from gapprobe.kernels import products
from gapprobe.kernels.memory import fresh
from gapprobe.kernels.moments import blocks, standard

MAPPED = 16 << 20  # bytes from which on the C library may take memory anew, untouched, for every fit


class Standardised:
    """X [n d], and for each group of problems with the same rows the mean and the deviation of every feature.

    Attributes:
        x: raw features.
        centre: mean of all rows.
        spread: deviation of all rows, 1 where it is only rounding.
        shared: the float32 copy, (x - centre) / spread, with a last column of ones for the intercept.
        across: on a CPU, the same with a feature a row: logits are then sums of rows, as gradients are, and wait
            neither for the memory nor for the end of a sum.
        mean: of each group, less `centre`, over `spread`.
        scale: deviation of each group over `spread`; 1 where it is only rounding, so a constant feature gets no weight.
        group: of each problem.
    """

    def __init__(self, x: Float[Tensor, "n d"], used: Bool[Tensor, "p n"]) -> None:
        """Take the moments in one pass and the copy in another."""
        n, d = x.shape
        rows, self.group = torch.unique(used, dim=0, return_inverse=True)
        self.x = x
        mean, deviation = standard(x, torch.cat([rows, torch.ones_like(rows[:1])]))
        self.centre, self.spread = mean[-1], deviation[-1]
        self.mean, self.scale = (mean[:-1] - mean[-1]) / self.spread, deviation[:-1] / self.spread
        # Rows stay aligned, and apart in the cache.
        self.shared, self.across = _copy(x, n, d + 1), None
        self.shared[:, d] = 1.0
        if x.device.type == "cpu":
            from gapprobe.kernels import standardised_cpu  # a third of a second to import

            self.across = _copy(x, d + 1, n)
            self.across[d] = 1.0
            standardised_cpu.fill(x, self.centre, self.spread, self.shared, self.across)
        else:
            for block in blocks(n, d):
                self.shared[block, :d] = (x[block].double() - self.centre) / self.spread

    def seen_in(self, basis: Float32[Tensor, "k d"], stride: int) -> Float32[Tensor, "k m"]:
        """Return every `stride`-th row of the shared copy along some directions."""
        if self.across is not None and stride == 1:
            return products.combined(basis, self.across[:-1])
        return products.dots(basis, self.shared[::stride, :-1])

    def view(self, problems: Int64[Tensor, " p"], dtype: torch.dtype) -> View:
        """Return the features as these problems see them."""
        group = self.group[problems]
        return View(self, self.mean[group].to(dtype)[:, None], (1.0 / self.scale[group]).to(dtype)[:, None])


@dataclass(frozen=True)
class View:
    """Features as some problems see them; the last of a problem's weights is its intercept."""

    of: Standardised
    mean: Float[Tensor, "p 1 d"]
    scaling: Float[Tensor, "p 1 d"]

    def keep(self, problems: Bool[Tensor, " p"]) -> View:
        """Return the view of some of the problems."""
        return View(self.of, self.mean[problems], self.scaling[problems])

    def logits(self, weights: Float[Tensor, "p c e"]) -> Float[Tensor, "p c n"]:
        """Return z . w + b for every row; the intercept is the last weight (e = d + 1)."""
        flat = self._to_shared(weights).flatten(0, 1)
        if flat.dtype == torch.float32 and products.on_gpu(flat):
            out = products.logits(self.of.shared[:, :-1], flat)
        elif flat.dtype == torch.float32 and self.of.across is not None:
            out = products.combined(flat, self.of.across)
        elif flat.dtype == torch.float32:
            out = products.dots(flat, self.of.shared)
        else:
            out = products.dots(flat[:, :-1] / self.of.spread, self.of.x, self.of.centre).add_(flat[:, -1:])
        return out.unflatten(0, weights.shape[:2])

    def pull(self, residual: Float[Tensor, "p c n"]) -> Float[Tensor, "p c e"]:
        """Return sum_i r_i (z_i, 1): the transpose of `logits`."""
        flat = residual.flatten(0, 1)
        if flat.dtype == torch.float32 and products.on_gpu(flat):
            out = products.pull(self.of.shared[:, :-1], flat)
        elif flat.dtype == torch.float32:
            out = products.combined(flat, self.of.shared)
        else:
            out = flat.new_zeros(len(flat), self.of.x.shape[1] + 1)
            products.add_combined(flat, self.of.x, out[:, :-1], self.of.centre)
            out[:, :-1] /= self.of.spread
            out[:, -1] = flat.sum(1)
        return self._to_own(out.unflatten(0, residual.shape[:2]))

    def _to_shared(self, weights: Float[Tensor, "p c e"]) -> Float[Tensor, "p c e"]:
        """Return the weights that are to shared features what `weights` are to a problem's own."""
        if weights.device.type == "cpu":
            from gapprobe.kernels import standardised_cpu  # a third of a second to import

            return standardised_cpu.to_shared(weights.contiguous(), self.mean, self.scaling)
        out = torch.empty_like(weights)
        torch.mul(weights[..., :-1], self.scaling, out=out[..., :-1])
        out[..., -1] = weights[..., -1] - torch.linalg.vecdot(out[..., :-1], self.mean)
        return out

    def _to_own(self, pulled: Float[Tensor, "p c e"]) -> Float[Tensor, "p c e"]:
        """Make of sums over shared features those over a problem's own, in place."""
        if pulled.device.type == "cpu":
            from gapprobe.kernels import standardised_cpu

            standardised_cpu.to_own(pulled, self.mean, self.scaling)
        else:
            pulled[..., :-1].addcmul_(pulled[..., -1:], self.mean, value=-1).mul_(self.scaling)
        return pulled

    def dense(
        self, rows: Bool[Tensor, " n"], columns: Int64[Tensor, " k"] | slice = slice(None)
    ) -> Float64[Tensor, "m k"]:
        """Return some rows and features as the view's only problem sees them, for methods that form a Hessian."""
        of = self.of
        z = of.x[rows][:, columns].double()
        z = (z - of.centre[columns]) / of.spread[columns]
        return (z - self.mean[0, 0, columns]) * self.scaling[0, 0, columns]

    def in_raw(self, weights: Float64[Tensor, "p c e"]) -> tuple[Float64[Tensor, "p c d"], Float64[Tensor, "p c"]]:
        """Return coefficients and intercept in raw coordinates: the standardisation folded in."""
        coef = weights[..., :-1] * self.scaling
        free = weights[..., -1] - (coef * self.mean).sum(-1)
        coef = coef / self.of.spread
        return coef, free - coef @ self.of.centre


def _copy(x: Tensor, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Return room for a float32 copy of X."""
    width = -(-columns // 16) * 16 + 16
    if x.device.type != "cpu":
        return x.new_empty(rows, width, dtype=torch.float32)[:, :columns]
    return fresh((rows, width), torch.float32, least=MAPPED)[:, :columns]
