"""Triton kernels of `products`, for CUDA and ROCm; only this module imports Triton.

Tensor cores multiply 16 bits: with X in 16 bits a float32 factor goes in as the sum of two numbers of X's own type, its
rounded value and what that leaves out, each with a product of its own (`split`). With X in float32 CUDA takes three
products of TF32 each, ROCm has float32 in its matrix cores. Partial sums are added in a fixed order, and there are no
atomics: equal bytes in, equal bytes out. Offsets of rows are 64 bits wide: X may have more than 2^31 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

SPLITS = 16  # most partial sums over the rows, each as large as the result
LEAST = 512  # rows that are worth a partial sum


@dataclass(frozen=True)
class Blocks:
    """What a program takes at once, and how it is compiled."""

    rows: int
    width: int
    problems: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Return what the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def blocks(kernel: str, dtype: torch.dtype, problems: int, *, rocm: bool, aligned: bool = True) -> Blocks:
    """Return sizes that spill no register on any target of docs/compiled-kernels.md."""
    wide = dtype == torch.float32
    few = 16 if problems <= 16 else 64
    stages = 2 if rocm else 3
    if kernel == "pull":
        return Blocks(32 if wide else 64, 64 if wide or few == 16 else 128, few, 8, stages)
    # Lines that are not aligned come in through registers; a step holds five numbers where logits are one.
    return Blocks(64 if kernel == "step" else 128, 64 if aligned and not wide else 32, few, 8, stages)


def precision(dtype: torch.dtype, *, rocm: bool) -> str:
    """Return how float32 is multiplied; X in 16 bits does not ask."""
    return "tf32x3" if dtype == torch.float32 and not rocm else "ieee"


def split(
    rows: Float32[Tensor, "l q k"], dtype: torch.dtype
) -> tuple[Float[Tensor, "l q j"], Float[Tensor, "l q j"] | None, Float32[Tensor, "l q"]]:
    """Return high, low and scale with rows = scale (high + low), to 2^-17 of each number in bfloat16, 2^-22 in float16.

    Float16 has few exponents: a power of two brings each row's largest to 2^15, so what gets lost below them is at most
    2^-39 of that. Lines are padded (j >= k): loads are aligned whatever the width. Float32 needs no second part.
    """
    k = rows.shape[-1]
    line = (*rows.shape[:-1], (k + 15) // 16 * 16)
    high = rows.new_zeros(line, dtype=dtype)
    if dtype == torch.float32:
        high[..., :k] = rows
        return high, None, rows.new_ones(rows.shape[:-1])
    largest = rows.abs().amax(-1) if k else rows.new_zeros(rows.shape[:-1])
    largest = largest.clamp(min=2.0**-100)  # rows of zeros, too
    scale = largest / torch.frexp(largest).mantissa / 2.0**15  # exact: a power of two
    scaled = rows / scale[..., None]
    high[..., :k] = scaled
    low = torch.zeros_like(high)
    low[..., :k] = scaled - high[..., :k].float()
    return high, low, scale


@triton.jit(do_not_specialize=["n", "q"])
@no_type_check
def logits_kernel(
    x, high, low, scale, free, turned, sign, weight, out, residual, share, slope,
    n, d, q, x_layer, x_row, line,
    FUSED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PROBLEMS: tl.constexpr,
):  # fmt: skip
    """Write f = scale W x + b of a tile of rows and problems, or all of a step where FUSED."""
    groups = tl.cdiv(q, PROBLEMS)
    # Programs that follow one another read the same rows of X.
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    layer = tl.program_id(1).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    problems = group * PROBLEMS + tl.arange(0, PROBLEMS)
    columns = tl.arange(0, WIDTH)
    x_at = x + layer * x_layer + rows.to(tl.int64)[:, None] * x_row + columns[None, :]
    own = layer * q + problems
    w_at = own[None, :] * line + columns[:, None]
    total = tl.zeros((ROWS, PROBLEMS), tl.float32)
    for start in range(0, d, WIDTH):
        inside = columns < d - start
        some = (problems < q)[None, :] & (columns < line - start)[:, None]  # padded with zeros: aligned
        part = tl.load(x_at, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(part, tl.load(high + w_at, mask=some, other=0.0), total, input_precision=PRECISION)
        if low is not None:
            total = tl.dot(part, tl.load(low + w_at, mask=some, other=0.0), total)
        x_at += WIDTH
        w_at += WIDTH
    used = problems < q
    f = total * tl.load(scale + own, mask=used, other=0.0)[None, :] + tl.load(free + own, mask=used, other=0.0)[None, :]
    at = own[None, :] * n + rows[:, None]
    mask = used[None, :] & (rows < n)[:, None]
    if FUSED:
        f = f * tl.load(sign + at, mask=mask, other=0.0)
        # 1 / (1 + e^z) keeps the last digit of small shares; e^z that overflows gives 0.
        wrong = 1.0 / (1.0 + tl.exp(tl.load(turned + at, mask=mask, other=0.0) + f))
        left = tl.load(weight + at, mask=mask, other=0.0) * wrong
        tl.store(share + at, wrong, mask=mask)
        tl.store(residual + at, left, mask=mask)
        part_at = slope + tile.to(tl.int64) * (tl.num_programs(1) * q) + own
        tl.store(part_at, tl.sum(left * f, axis=0), mask=used)
    tl.store(out + at, f, mask=mask)


@triton.jit(do_not_specialize=["n", "q"])
@no_type_check
def pull_kernel(
    x, high, low, scale, out,
    n, d, q, x_layer, x_row, line, share,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PROBLEMS: tl.constexpr,
):  # fmt: skip
    """Write the sum of r x over one part of the rows, of a tile of columns and problems."""
    groups = tl.cdiv(q, PROBLEMS)
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    part = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    problems = group * PROBLEMS + tl.arange(0, PROBLEMS)
    rows = part * share + tl.arange(0, ROWS)
    own = layer * q + problems
    x_at = x + layer * x_layer + rows.to(tl.int64)[:, None] * x_row + columns[None, :]
    r_at = own[None, :] * line + rows[:, None]
    end = tl.minimum((part + 1) * share, n)
    total = tl.zeros((WIDTH, PROBLEMS), tl.float32)
    for start in range(part * share, end, ROWS):
        inside = tl.arange(0, ROWS) < end - start
        # Padded with zeros: aligned. Rows of the next part come in with no row of X.
        some = (problems < q)[None, :] & (tl.arange(0, ROWS) < line - start)[:, None]
        block = tl.trans(tl.load(x_at, mask=inside[:, None] & (columns < d)[None, :], other=0.0))
        total = tl.dot(block, tl.load(high + r_at, mask=some, other=0.0), total, input_precision=PRECISION)
        if low is not None:
            total = tl.dot(block, tl.load(low + r_at, mask=some, other=0.0), total)
        x_at += ROWS * x_row
        r_at += ROWS
    used = problems < q
    at = out + (part * tl.num_programs(2) * q + own)[None, :] * d + columns[:, None]
    total = total * tl.load(scale + own, mask=used, other=0.0)[None, :]
    tl.store(at, total, mask=used[None, :] & (columns < d)[:, None])


def logits(x: Float[Tensor, "*l n d"], weights: Float32[Tensor, "*l q e"]) -> Float32[Tensor, "*l q n"]:
    """Launch `logits_kernel` for the logits alone."""
    return _launch(x, weights, None)[0]


def step(
    x: Float[Tensor, "*l n d"],
    weights: Float32[Tensor, "*l q e"],
    turned: Float32[Tensor, "*l q n"],
    sign: Float32[Tensor, "*l q n"],
    weight: Float32[Tensor, "*l q n"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `logits_kernel` for a whole step; return along, residual, share and slope."""
    out, residual, share, slope = _launch(x, weights, (turned, sign, weight))
    return out, residual, share, slope


def _launch(
    x: Float[Tensor, "*l n d"], weights: Float32[Tensor, "*l q e"], fused: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w = _layered(x), _layered(weights)
    (layers, n, d), q = x.shape, w.shape[1]
    rocm = torch.version.hip is not None
    size = blocks("step" if fused else "logits", x.dtype, q, rocm=rocm, aligned=x.stride(1) % 16 == 0)
    high, low, scale = split(w[..., :-1], x.dtype)
    tiles = _parts(n, size.rows)
    shape = (*weights.shape[:-1], n)
    out = w.new_empty(shape)
    residual, share = (w.new_empty(shape if fused else 0) for _ in range(2))
    slope = w.new_empty(tiles if fused else 0, *weights.shape[:-1])
    if out.numel():
        turned, sign, weight = (part.contiguous() for part in fused) if fused else (None, None, None)
        logits_kernel[(tiles * _parts(q, size.problems), layers)](
            x, high, low, scale, w[..., -1].contiguous(), turned, sign, weight, out,
            *((residual, share, slope) if fused else (None, None, None)),
            n, d, q, x.stride(0), x.stride(1), high.stride(1),
            FUSED=fused is not None, PRECISION=precision(x.dtype, rocm=rocm),
            ROWS=size.rows, WIDTH=size.width, PROBLEMS=size.problems, **size.options,
        )  # fmt: skip
    return out, residual, share, slope.sum(0)


def pull(x: Float[Tensor, "*l n d"], residual: Float32[Tensor, "*l q n"]) -> Float32[Tensor, "*l q e"]:
    """Launch `pull_kernel` and add up its parts."""
    x, r = _layered(x), _layered(residual)
    (layers, n, d), q = x.shape, r.shape[1]
    rocm = torch.version.hip is not None
    size = blocks("pull", x.dtype, q, rocm=rocm, aligned=x.stride(1) % 16 == 0)
    high, low, scale = split(r, x.dtype)
    share = max(LEAST, _parts(_parts(n, SPLITS), size.rows) * size.rows)
    parts = r.new_empty(_parts(n, share), layers, q, d)
    if parts.numel():
        pull_kernel[(_parts(d, size.width) * _parts(q, size.problems), len(parts), layers)](
            x, high, low, scale, parts,
            n, d, q, x.stride(0), x.stride(1), high.stride(1), share,
            PRECISION=precision(x.dtype, rocm=rocm),
            ROWS=size.rows, WIDTH=size.width, PROBLEMS=size.problems, **size.options,
        )  # fmt: skip
    return torch.cat([parts.sum(0), r.sum(-1, keepdim=True)], -1).view(*residual.shape[:-1], d + 1)


def _layered(x: Float[Tensor, "*l a b"]) -> Float[Tensor, "m a b"]:
    x = x.flatten(0, -3) if x.dim() > 2 else x[None]
    return x if x.stride(-1) == 1 else x.contiguous()


def _parts(size: int, most: int) -> int:
    return -(-size // most)
