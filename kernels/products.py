"""The two products over X that every step of a fit needs, for all problems at once, and the loss between them.

Mathematics: f = W x + b for every row x of X; where labels y and weights s are given, the turned logits t move to
t + y f, the residual there is s sigmoid(-(t + y f)), and the slope that a line search asks for is the sum over rows of
residual times y f. Back: sum_i r_i (x_i, 1). X may be bfloat16, float16 or float32; sums are float32.

On CUDA and ROCm the products are Triton kernels (`products_triton`), elsewhere matrix products of torch. X, residuals
and weights may have a first axis of layers, each with its own problems. What a fit multiplies beside them, and all of
it on a CPU, are `dots` and `combined`, which are compiled there (`products_cpu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from einops import einsum, reduce
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from gapprobe.kernels.moments import blocks

ROWS = 1024  # rows a product takes at once: X in 16 bits is widened block by block


@dataclass(frozen=True)
class Step:
    """Where a whole step leads, with the logistic loss of two classes.

    Attributes:
        along: what the step adds to the turned logits, y f.
        residual: minus the gradient of the loss by the turned logits, at the step's end.
        share: probability of the wrong label there.
        slope: sum over rows of residual times along.
    """

    along: Float[Tensor, "*l q n"]
    residual: Float[Tensor, "*l q n"]
    share: Float[Tensor, "*l q n"]
    slope: Float[Tensor, "*l q"]


def logits_reference(x: Float[Tensor, "*l n d"], weights: Float[Tensor, "*l q e"]) -> Float64[Tensor, "*l q n"]:
    """Compute the logits in float64, for reading and for tests; the last weight is the intercept (e = d + 1)."""
    return einsum(weights[..., :-1].double(), x.double(), "... q d, ... n d -> ... q n") + weights[..., -1:].double()


def step_reference(
    x: Float[Tensor, "*l n d"],
    weights: Float[Tensor, "*l q e"],
    turned: Float[Tensor, "*l q n"],
    sign: Float[Tensor, "*l q n"],
    weight: Float[Tensor, "*l q n"],
) -> Step:
    """Compute the step in float64, for reading and for tests."""
    along = sign.double() * logits_reference(x, weights)
    share = torch.sigmoid(-(turned.double() + along))
    residual = weight.double() * share
    return Step(along, residual, share, reduce(residual * along, "... q n -> ... q", "sum"))


def pull_reference(x: Float[Tensor, "*l n d"], residual: Float[Tensor, "*l q n"]) -> Float64[Tensor, "*l q e"]:
    """Compute the product back in float64, for reading and for tests."""
    r = residual.double()
    return torch.cat([einsum(r, x.double(), "... q n, ... n d -> ... q d"), reduce(r, "... q n -> ... q 1", "sum")], -1)


def dots(
    left: Float[Tensor, "p e"], right: Float[Tensor, "n e"], centre: Float[Tensor, " e"] | None = None
) -> Float[Tensor, "p n"]:
    """Return left @ (right - centre).T in the precision of `left`; `right` may have a lower one."""
    if left.device.type == "cpu":
        from gapprobe.kernels import products_cpu  # a third of a second to import

        return products_cpu.dots(left, right, centre)
    if right.dtype == left.dtype and centre is None:
        return left @ right.T
    out = left.new_empty(len(left), len(right))
    for block in blocks(*right.shape):
        out[:, block] = left @ _less(right[block], centre, left.dtype).T
    return out


def add_combined(
    left: Float[Tensor, "p n"],
    right: Float[Tensor, "n d"],
    out: Float[Tensor, "p d"],
    centre: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "p d"]:
    """Add left @ (right - centre) to `out`, in its precision, and return it; `right` may have a lower one."""
    if left.device.type == "cpu":
        from gapprobe.kernels import products_cpu

        return products_cpu.add_combined(left, right, out, centre)
    if right.dtype == left.dtype and centre is None:
        return out.addmm_(left, right)
    for block in blocks(*right.shape):
        out.addmm_(left[:, block], _less(right[block], centre, left.dtype))
    return out


def combined(
    left: Float[Tensor, "p n"], right: Float[Tensor, "n d"], centre: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "p d"]:
    """Return left @ (right - centre); see `add_combined`."""
    return add_combined(left, right, left.new_zeros(len(left), right.shape[1]), centre)


def _less(x: Tensor, centre: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if centre is None else x.to(dtype) - centre


def on_gpu(x: Tensor) -> bool:
    """Tell whether the Triton kernels serve this tensor: on CUDA or ROCm, where torch brings Triton along."""
    return x.device.type == "cuda" and _installed()  # ROCm calls itself cuda too


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def logits(x: Float[Tensor, "*l n d"], weights: Float32[Tensor, "*l q e"]) -> Float32[Tensor, "*l q n"]:
    """Return w . x + b of every row under every problem; the last weight is the intercept (e = d + 1)."""
    if on_gpu(x):
        from gapprobe.kernels import products_triton  # not everywhere installed, and a third of a second to import

        return products_triton.logits(x, weights)
    return logits_by_torch(x, weights)


def step(
    x: Float[Tensor, "*l n d"],
    weights: Float32[Tensor, "*l q e"],
    turned: Float32[Tensor, "*l q n"],
    sign: Float32[Tensor, "*l q n"],
    weight: Float32[Tensor, "*l q n"],
) -> Step:
    """Return where the step `weights` leads from the turned logits; on a GPU nothing but the result is written.

    Args:
        x: features.
        weights: the step, last its intercept.
        turned: logits times sign, before the step.
        sign: labels, -1 or 1.
        weight: of each row in the loss.
    """
    if on_gpu(x):
        from gapprobe.kernels import products_triton

        return Step(*products_triton.step(x, weights, turned, sign, weight))
    return step_by_torch(x, weights, turned, sign, weight)


def pull(x: Float[Tensor, "*l n d"], residual: Float32[Tensor, "*l q n"]) -> Float32[Tensor, "*l q e"]:
    """Return sum_i r_i (x_i, 1) of every problem: the transpose of `logits`. Equal bytes in, equal bytes out."""
    if on_gpu(x):
        from gapprobe.kernels import products_triton

        return products_triton.pull(x, residual)
    return pull_by_torch(x, residual)


def logits_by_torch(x: Float[Tensor, "*l n d"], weights: Float32[Tensor, "*l q e"]) -> Float32[Tensor, "*l q n"]:
    """Return the logits by torch's own products in float32."""
    n = x.shape[-2]
    out = weights.new_empty(*weights.shape[:-1], n)
    for start in range(0, n, ROWS):
        out[..., start : start + ROWS] = weights[..., :-1] @ x[..., start : start + ROWS, :].float().mT
    return out.add_(weights[..., -1:])


def step_by_torch(
    x: Float[Tensor, "*l n d"],
    weights: Float32[Tensor, "*l q e"],
    turned: Float32[Tensor, "*l q n"],
    sign: Float32[Tensor, "*l q n"],
    weight: Float32[Tensor, "*l q n"],
) -> Step:
    """Return the step by torch's own operations in float32."""
    along = logits_by_torch(x, weights).mul_(sign)
    share = torch.sigmoid(-(turned + along))
    residual = weight * share
    return Step(along, residual, share, torch.linalg.vecdot(residual, along))


def pull_by_torch(x: Float[Tensor, "*l n d"], residual: Float32[Tensor, "*l q n"]) -> Float32[Tensor, "*l q e"]:
    """Return the product back by torch's own products in float32."""
    n, d = x.shape[-2:]
    out = residual.new_zeros(*residual.shape[:-1], d + 1)
    for start in range(0, n, ROWS):
        out[..., :-1] += residual[..., start : start + ROWS] @ x[..., start : start + ROWS, :].float()
    out[..., -1] = residual.sum(-1)
    return out
