"""The last steps of many problems, and the inverse Hessian that L-BFGS makes of them.

Source of the compact form: Byrd, Nocedal & Schnabel 1994, eq. 3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MEMORY = 5  # pairs of step and change of gradient; 10 saves 3 % of the steps and costs more than that


class History:
    """The last pairs of every problem.

    Steps and changes lie in a ring; everything small is kept in the order of age, the oldest first.
    """

    def __init__(self, like: Float[Tensor, "p e"]) -> None:
        """Start empty."""
        self.steps = like.new_zeros(len(like), MEMORY, like.shape[1])
        self.changes = torch.zeros_like(self.steps)
        self.products = like.new_zeros(len(like), MEMORY, MEMORY)  # step i . change j, for i not younger than j
        self.slots = torch.arange(MEMORY, device=like.device)  # by age
        self.count = 0

    def add(
        self,
        direction: Float[Tensor, "p e"],
        size: Float[Tensor, " p"],
        before: Float[Tensor, "p e"],
        after: Float[Tensor, "p e"],
    ) -> tuple[Float[Tensor, "p e"], Float[Tensor, "p e"]]:
        """Remember a step and the change of the gradient in place of the oldest; return the pair, zero if useless."""
        slot = self._next()
        step, change = direction * size[:, None], after - before
        length = torch.linalg.vecdot(step, change)
        # Where rounding has eaten the curvature the pair says nothing; zeros with a product of 1 leave no trace.
        useful = length > 0
        self.steps[:, slot] = step.where(useful[:, None], 0.0)
        change = change.where(useful[:, None], 0.0)
        self.changes[:, slot] = change
        age = self.count - 1
        self.products[:, : age + 1, age] = self._by_age(_against(self.steps, change))
        self.products[:, age, age] = length.where(useful, 1.0)
        return self.steps[:, slot], self.changes[:, slot]

    def before(self, gradient: Float[Tensor, "p e"]) -> tuple[Float[Tensor, "p e"], Float[Tensor, "p m"]]:
        """Return what the preconditioner is to be applied to, and the first loop's coefficients."""
        if not self.count:
            return gradient, gradient[:, :0]
        seen = self._by_age(_against(self.steps, gradient))[..., None]
        first = torch.linalg.solve_triangular(self._triangle(), seen, upper=True)[..., 0]
        return torch.baddbmm(gradient[:, None], self._ring(first)[:, None], self.changes, alpha=-1)[:, 0], first

    def after(self, moved: Float[Tensor, "p e"], first: Float[Tensor, "p m"]) -> Float[Tensor, "p e"]:
        """Finish: the second loop, on the preconditioned vector."""
        if not self.count:
            return moved
        triangle = self._triangle()
        wanted = triangle.diagonal(dim1=1, dim2=2) * first - self._by_age(_against(self.changes, moved))
        second = torch.linalg.solve_triangular(triangle.mT, wanted[..., None], upper=False)[..., 0]
        return torch.baddbmm(moved[:, None], self._ring(second)[:, None], self.steps)[:, 0]

    def keep(self, problems: Bool[Tensor, " p"]) -> None:
        """Forget the other problems."""
        self.steps, self.changes = self.steps[problems], self.changes[problems]
        self.products = self.products[problems]

    def _next(self) -> int:
        """Return the slot of the pair that comes now, the youngest; the oldest makes room for it."""
        if self.count == MEMORY:
            self.slots = self.slots.roll(-1)
            self.products[:, :-1, :-1] = self.products[:, 1:, 1:].clone()
        else:
            self.count += 1
        return int(self.slots[self.count - 1])

    def _triangle(self) -> Float[Tensor, "p m m"]:
        return self.products[:, : self.count, : self.count]

    def _by_age(self, ring: Float[Tensor, "p r"]) -> Float[Tensor, "p m"]:
        return ring.index_select(1, self.slots[: self.count])

    def _ring(self, by_age: Float[Tensor, "p m"]) -> Float[Tensor, "p r"]:
        return by_age.new_zeros(len(by_age), MEMORY).index_copy_(1, self.slots[: self.count], by_age)


def _against(vectors: Float[Tensor, "p m e"], one: Float[Tensor, "p e"]) -> Float[Tensor, "p m"]:
    """Multiply every problem's vectors with its one; a matrix times a column would take ten times as long."""
    return torch.bmm(one[:, None], vectors.mT)[:, 0]
