"""`History` by compiled loops: a problem after the other, its vectors in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gapprobe.kernels.compiled import by_rows, exact, sweep
from gapprobe.kernels.history import MEMORY, History

assert MEMORY == 5  # as `_dots` and `_combined` write out


class CpuHistory(History):
    """The last pairs of every problem, in main memory."""

    def add(
        self,
        direction: Float[Tensor, "p e"],
        size: Float[Tensor, " p"],
        before: Float[Tensor, "p e"],
        after: Float[Tensor, "p e"],
    ) -> tuple[Float[Tensor, "p e"], Float[Tensor, "p e"]]:
        """Remember a step and the change of the gradient in place of the oldest; return the pair, zero if useless."""
        slot, e = self._next(), direction.shape[1]
        arrays = (self._flat(direction), self._flat(size), self._flat(before), self._flat(after))
        told = (e, slot, self.slots.numpy(), self.count, *self._vectors(), self._flat(self.products))
        self._by_problem(_remember, *arrays, *told)
        return self.steps[:, slot], self.changes[:, slot]

    def before(self, gradient: Float[Tensor, "p e"]) -> tuple[Float[Tensor, "p e"], Float[Tensor, "p m"]]:
        """Return what the preconditioner is to be applied to, and the first loop's coefficients."""
        if not self.count:
            return gradient, gradient[:, :0]
        (p, e), out = gradient.shape, torch.empty_like(gradient)
        first = gradient.new_empty(p, MEMORY)
        told = (first.numpy(), e, self.slots.numpy(), self.count, *self._vectors(), self._flat(self.products))
        self._by_problem(_before, self._flat(gradient), self._flat(out), *told)
        return out, first

    def after(self, moved: Float[Tensor, "p e"], first: Float[Tensor, "p m"]) -> Float[Tensor, "p e"]:
        """Finish: the second loop, on the preconditioned vector."""
        if not self.count:
            return moved
        e, out = moved.shape[1], torch.empty_like(moved)
        told = (first.numpy(), e, self.slots.numpy(), self.count, *self._vectors(), self._flat(self.products))
        self._by_problem(_after, self._flat(moved), self._flat(out), *told)
        return out

    def _vectors(self) -> tuple[np.ndarray, np.ndarray]:
        return self._flat(self.steps), self._flat(self.changes)

    def _by_problem(self, loop: Callable[..., None], *arrays: Any) -> None:
        by_rows(lambda first, last: loop(*arrays, first, last), len(self.steps), 4 * MEMORY * self.steps.shape[2])

    @staticmethod
    def _flat(x: Tensor) -> np.ndarray:
        return x.contiguous().view(-1).numpy()


@sweep
@no_type_check
def _remember(direction, size, before, after, e, slot, slots, count, steps, changes, products, first, last):
    age = count - 1
    for i in range(first, last):
        way, old, new = direction[i * e : (i + 1) * e], before[i * e : (i + 1) * e], after[i * e : (i + 1) * e]
        at = (i * MEMORY + slot) * e
        kept, turned = steps[at : at + e], changes[at : at + e]
        length, t = size[i] - size[i], size[i]
        for j in range(np.uintp(e)):
            kept[j], turned[j] = way[j] * t, new[j] - old[j]
            length += kept[j] * turned[j]
        # Where rounding has eaten the curvature the pair says nothing; zeros with a product of 1 leave no trace.
        useful = length > 0
        if not useful:
            kept[:], turned[:] = 0, 0
        ring = _dots(steps[i * MEMORY * e : (i + 1) * MEMORY * e], turned)
        for k in range(age):
            products[(i * MEMORY + k) * MEMORY + age] = ring[slots[k]]
        products[(i * MEMORY + age) * MEMORY + age] = length if useful else 1


@sweep
@no_type_check
def _before(gradient, out, first, e, slots, count, steps, changes, products, begin, end):
    weights = np.zeros(MEMORY)
    for i in range(begin, end):
        mine = gradient[i * e : (i + 1) * e]
        ring = _dots(steps[i * MEMORY * e : (i + 1) * MEMORY * e], mine)
        _solve_first(products[i * MEMORY**2 : (i + 1) * MEMORY**2], ring, slots, count, weights, first[i])
        _combined(changes[i * MEMORY * e : (i + 1) * MEMORY * e], weights, mine, -1.0, out[i * e : (i + 1) * e])


@sweep
@no_type_check
def _after(moved, out, first, e, slots, count, steps, changes, products, begin, end):
    weights = np.zeros(MEMORY)
    for i in range(begin, end):
        mine = moved[i * e : (i + 1) * e]
        ring = _dots(changes[i * MEMORY * e : (i + 1) * MEMORY * e], mine)
        _solve_second(products[i * MEMORY**2 : (i + 1) * MEMORY**2], ring, slots, count, weights, first[i])
        _combined(steps[i * MEMORY * e : (i + 1) * MEMORY * e], weights, mine, 1.0, out[i * e : (i + 1) * e])


@exact
@no_type_check
def _solve_first(products, ring, slots, count, weights, first):
    """Solve the upper triangle for the ring's products; `weights` are the solution as the ring lies."""
    for k in range(count - 1, -1, -1):
        row, known = products[k * MEMORY + k + 1 : k * MEMORY + count], first[k + 1 : count]
        rest = ring[slots[k]]
        for m in range(len(row)):
            rest -= row[m] * known[m]
        first[k] = rest / products[k * MEMORY + k]
        weights[slots[k]] = first[k]


@exact
@no_type_check
def _solve_second(products, ring, slots, count, weights, first):
    """Solve the lower triangle for the diagonal times `first`, less the ring's products; `first` is used up."""
    for k in range(count):
        first[k] = products[k * MEMORY + k] * first[k] - ring[slots[k]]
    for k in range(count):
        row, later = products[k * MEMORY + k + 1 : k * MEMORY + count], first[k + 1 : count]
        found = first[k] / products[k * MEMORY + k]
        for m in range(len(row)):
            later[m] -= row[m] * found
        weights[slots[k]] = found


@sweep
@no_type_check
def _dots(vectors, one):
    """Return the products of the ring's vectors with one."""
    e = len(one)
    v0, v1, v2, v3, v4 = (
        vectors[:e],
        vectors[e : 2 * e],
        vectors[2 * e : 3 * e],
        vectors[3 * e : 4 * e],
        vectors[4 * e :],
    )
    a = b = c = d = f = one[0] - one[0]
    for j in range(np.uintp(e)):  # of an index that might be negative the compiler would make a gather
        x = one[j]
        a += v0[j] * x
        b += v1[j] * x
        c += v2[j] * x
        d += v3[j] * x
        f += v4[j] * x
    return a, b, c, d, f


@sweep
@no_type_check
def _combined(vectors, weights, one, sign, out):
    """Write one plus the ring's vectors, each times its weight."""
    e, kind = len(one), one.dtype.type
    v0, v1, v2, v3, v4 = (
        vectors[:e],
        vectors[e : 2 * e],
        vectors[2 * e : 3 * e],
        vectors[3 * e : 4 * e],
        vectors[4 * e :],
    )
    a, b, c, d, f = (
        kind(sign * weights[0]),
        kind(sign * weights[1]),
        kind(sign * weights[2]),
        kind(sign * weights[3]),
        kind(sign * weights[4]),
    )
    for j in range(np.uintp(e)):  # as above
        out[j] = one[j] + (a * v0[j] + b * v1[j] + c * v2[j] + d * v3[j] + f * v4[j])
