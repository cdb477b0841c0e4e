"""Losses of linear classifiers as the batched descent sees them: one point on the logits of many problems at a time.

Logits are *turned*: a loss may flip their sign by label, so that binary problems need one row of logits. Shapes are
[p c n]: problems, logits a problem and row, rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass
class Point:
    """Slope and bend of a loss at some logits.

    Attributes:
        residual: minus the gradient by the turned logits.
        share: what the curvature needs beside it (probabilities).
    """

    residual: Float[Tensor, "p c n"]
    share: Float[Tensor, "p c n"]

    def keep(self, problems: Tensor) -> Point:
        """Return the point of some problems."""
        return Point(self.residual[problems], self.share[problems])

    def put(self, problems: Int64[Tensor, " q"], other: Point) -> None:
        """Replace some problems' part."""
        self.residual[problems], self.share[problems] = other.residual, other.share


@runtime_checkable
class Loss(Protocol):
    """What the descent asks of a loss."""

    def start(self) -> Float[Tensor, "p c"]:
        """Return the intercepts that are best where all weights are 0."""
        ...

    def turned(self, logits: Float[Tensor, "p c n"]) -> Float[Tensor, "p c n"]:
        """Turn logits as the loss wants them, in place; also turns residuals back."""
        ...

    def value(self, turned: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return the weighted sum over rows of the loss at turned logits."""
        ...

    def at(self, turned: Float[Tensor, "p c n"]) -> Point:
        """Return slope and bend at turned logits."""
        ...

    def bend(self, point: Point, along: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return the second derivative along a direction of turned logits."""
        ...

    def curvature(self, point: Point) -> Float[Tensor, "p c n"]:
        """Return each logit's own second derivative."""
        ...

    def keep(self, problems: Tensor) -> Loss:
        """Return the loss of some problems."""
        ...


@dataclass(frozen=True)
class Binary:
    """s log(1 + exp(-y f)), y in {-1, 1}; turned logits are y f.

    Attributes:
        sign: y.
        weight: s.
    """

    sign: Float[Tensor, "p 1 n"]
    weight: Float[Tensor, "p 1 n"]

    @classmethod
    def of(cls, y: Bool[Tensor, "p n"], weight: Float[Tensor, "p n"], dtype: torch.dtype) -> Binary:
        """Take labels and weights."""
        return cls((2.0 * y.to(dtype) - 1.0)[:, None], weight.to(dtype)[:, None])

    def start(self) -> Float[Tensor, "p 1"]:
        """Return the intercept that is best where all weights are 0."""
        return torch.log(self.weight.where(self.sign > 0, 0.0).sum(-1) / self.weight.where(self.sign < 0, 0.0).sum(-1))

    def turned(self, logits: Float[Tensor, "p c n"]) -> Float[Tensor, "p c n"]:
        """Multiply by the label."""
        return logits.mul_(self.sign)

    def value(self, turned: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return sum s log(1 + exp(-y f))."""
        return -_dot(self.weight, torch.nn.functional.logsigmoid(turned))

    def at(self, turned: Float[Tensor, "p c n"]) -> Point:
        """Return slope and bend; `share` is the probability of the wrong label, small ones to their last digit."""
        share = torch.sigmoid(-turned)
        return Point(self.weight * share, share)

    def bend(self, point: Point, along: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return sum s q (1 - q) df^2."""
        return _dot(self.curvature(point).mul_(along), along)

    def curvature(self, point: Point) -> Float[Tensor, "p c n"]:
        """Return s q (1 - q)."""
        return point.residual * (1.0 - point.share)

    def between(self, point: Point) -> Float[Tensor, "p c c n"]:
        """Return the second derivative by every pair of a row's logits."""
        return self.curvature(point)[:, None]

    def keep(self, problems: Tensor) -> Binary:
        """Return the loss of some problems."""
        return Binary(self.sign[problems], self.weight[problems])

    def of_rows(self, rows: Bool[Tensor, " n"]) -> Binary:
        """Return the loss of some rows."""
        return Binary(self.sign[..., rows], self.weight[..., rows])


@dataclass(frozen=True)
class SquaredHinge:
    """s max(0, 1 - y f)^2, y in {-1, 1}; turned logits are y f.

    Attributes:
        sign: y.
        weight: s.
    """

    sign: Float[Tensor, "p 1 n"]
    weight: Float[Tensor, "p 1 n"]

    @classmethod
    def of(cls, y: Bool[Tensor, "p n"], weight: Float[Tensor, "p n"], dtype: torch.dtype) -> SquaredHinge:
        """Take labels and weights."""
        return cls((2.0 * y.to(dtype) - 1.0)[:, None], weight.to(dtype)[:, None])

    def start(self) -> Float[Tensor, "p 1"]:
        """Return the intercept that is best where all weights are 0."""
        return (self.weight * self.sign).sum(-1) / self.weight.sum(-1)

    def turned(self, logits: Float[Tensor, "p c n"]) -> Float[Tensor, "p c n"]:
        """Multiply by the label."""
        return logits.mul_(self.sign)

    def value(self, turned: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return sum s max(0, 1 - y f)^2."""
        return _dot(self.weight, (1.0 - turned).clamp_(min=0.0).square_())

    def at(self, turned: Float[Tensor, "p c n"]) -> Point:
        """Return slope and bend; `share` is 1 at rows inside the margin: the bend jumps there, the slope does not."""
        slack = (1.0 - turned).clamp_(min=0.0)
        return Point(2.0 * self.weight * slack, (slack > 0).to(slack))

    def bend(self, point: Point, along: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return sum 2 s df^2 inside the margin."""
        return _dot(self.curvature(point).mul_(along), along)

    def curvature(self, point: Point) -> Float[Tensor, "p c n"]:
        """Return 2 s inside the margin."""
        return 2.0 * self.weight * point.share

    def keep(self, problems: Tensor) -> SquaredHinge:
        """Return the loss of some problems."""
        return SquaredHinge(self.sign[problems], self.weight[problems])


@dataclass(frozen=True)
class Multinomial:
    """s (log sum_k exp f_k - f_y); logits are taken as they are.

    Attributes:
        hot: 1 at each row's class.
        weight: s.
    """

    hot: Float[Tensor, "p c n"]
    weight: Float[Tensor, "p 1 n"]

    @classmethod
    def of(cls, y: Int64[Tensor, "p n"], classes: int, weight: Float[Tensor, "p n"], dtype: torch.dtype) -> Multinomial:
        """Take classes 0 to classes - 1 and weights."""
        hot = (y[:, None] == torch.arange(classes, device=y.device)[:, None]).to(dtype)
        return cls(hot, weight.to(dtype)[:, None])

    def start(self) -> Float[Tensor, "p c"]:
        """Return the intercepts that are best where all weights are 0; their mean is 0."""
        logs = torch.log((self.hot * self.weight).sum(-1))
        return logs - logs.mean(-1, keepdim=True)

    def turned(self, logits: Float[Tensor, "p c n"]) -> Float[Tensor, "p c n"]:
        """Return the logits."""
        return logits

    def value(self, turned: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return sum s (log sum_k exp f_k - f_y)."""
        return -_dot(self.weight * self.hot, torch.log_softmax(turned, dim=1))

    def at(self, turned: Float[Tensor, "p c n"]) -> Point:
        """Return slope and bend; `share` is the probability of each class."""
        share = torch.softmax(turned, dim=1)
        return Point(self.weight * (self.hot - share), share)

    def bend(self, point: Point, along: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
        """Return sum s (sum_k q_k df_k^2 - (sum_k q_k df_k)^2)."""
        mean = (point.share * along).sum(1, keepdim=True)
        return _dot(self.weight * point.share, (along - mean) ** 2)

    def curvature(self, point: Point) -> Float[Tensor, "p c n"]:
        """Return s q (1 - q) of each class."""
        return self.weight * point.share * (1.0 - point.share)

    def between(self, point: Point) -> Float[Tensor, "p c c n"]:
        """Return s (q_a 1[a = b] - q_a q_b), the second derivative by every pair of a row's logits."""
        weighted = self.weight * point.share
        return torch.diag_embed(weighted.mT).movedim(1, -1) - weighted[:, :, None] * point.share[:, None]

    def keep(self, problems: Tensor) -> Multinomial:
        """Return the loss of some problems."""
        return Multinomial(self.hot[problems], self.weight[problems])

    def of_rows(self, rows: Bool[Tensor, " n"]) -> Multinomial:
        """Return the loss of some rows."""
        return Multinomial(self.hot[..., rows], self.weight[..., rows])


def _dot(a: Float[Tensor, "p c n"], b: Float[Tensor, "p c n"]) -> Float[Tensor, " p"]:
    return torch.linalg.vecdot(a, b).sum(1)
