"""Triton kernels of `logit_lens`, for CUDA and ROCm; only this module imports Triton.

A kernel norms the rows and writes them for the tensor cores: in 16 bits as the sum of numbers of the words' own type,
two of float16 (22 bits) or three of bfloat16 (24 bits, all that float32 has), each with a product of its own. The walk
multiplies them with a tile of words and keeps, for every row, running sums, counts and the best words; a norm inside
its loop would cost it registers. Programs of one row share the vocabulary, in as many parts whatever the rows are, and
`logit_lens.merge` makes one of theirs: equal bytes in, equal bytes out.

For a divergence, rows stand in groups of 16: the final layer's row and 15 of other layers of the same token, so that a
program has both distributions at hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

from gapprobe.kernels.lens_parts import KEPT_ON_GPU, NO_KEY, Part, Unembedding, keys, merge
from gapprobe.kernels.products_triton import precision

ROWS = 64  # a program's

PARTS = 16  # programs that share the vocabulary
GROUP = 16  # rows of one token, the final layer's first, where a divergence is asked for
NORMS = {"none": 0, "rms": 1, "layer": 2}
NOWHERE = tl.constexpr(-1e30)


def blocks(dtype: torch.dtype, card: str, *, plain: bool) -> dict[str, Any]:
    """Return sizes that spill no register on any target of docs/compiled-kernels.md, and what the compiler is told.

    Args:
        dtype: of the words.
        card: "roomy" (Hopper, data-centre Blackwell), "rocm", or "other" (CUDA before and beside these).
        plain: whether 16 divides the width, so that lines come in without passing registers, and nothing is capped.
    """
    wide = dtype == torch.float32
    large = plain and dtype == torch.bfloat16 and card != "other"  # float16 would spill on sm_100
    return {
        "ROWS": ROWS,
        "WORDS": 128 if large else 64,
        "WIDTH": 64 if large else 16 if wide and card == "other" else 32,
        "PRECISION": precision(dtype, rocm=card == "rocm"),
        "num_warps": 8,
        "num_stages": 2 if card == "rocm" else 3,
    }


def card_of(device: torch.device) -> str:
    """Return the kind of card that `blocks` knows."""
    if torch.version.hip is not None:
        return "rocm"
    # Compute capability 12, consumer Blackwell, has as little shared memory as Ada.
    roomy = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    return "roomy" if roomy else "other"


@triton.jit(do_not_specialize=["eps"])
@no_type_check
def norm_kernel(
    x, order, gain, shift, high, low, rest, scale,
    d, line, eps,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write row `order[i]` of x, normed, as scale (high + low + rest); zeros where `order[i]` is negative."""
    here = tl.program_id(0).to(tl.int64)
    row = tl.load(order + here)
    columns = tl.arange(0, BLOCK)
    inside = (columns < d) & (row >= 0)
    h = tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        h = tl.where(inside, h - tl.sum(h, axis=0) / d, 0.0)
    if NORM != 0:
        h = h * (1.0 / tl.sqrt_rn(tl.sum(h * h, axis=0) / d + eps))
    if gain is not None:
        h = h * tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        h = h + tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if low is not None:
        # A power of two that brings the largest to 2^15: float16 has few exponents.
        largest = tl.maximum(tl.max(tl.abs(h), axis=0), 7.888609e-31)  # 2^-100, for rows of zeros
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 14
        factor = (exponent << 23).to(tl.float32, bitcast=True)
        h = h / factor
    at = here * line + columns
    padded = columns < line
    tl.store(scale + here, factor)
    part = h.to(high.dtype.element_ty)
    tl.store(high + at, part, mask=padded)
    if low is not None:
        h -= part.to(tl.float32)
        part = h.to(low.dtype.element_ty)
        tl.store(low + at, part, mask=padded)
    if rest is not None:
        h -= part.to(tl.float32)
        tl.store(rest + at, h.to(rest.dtype.element_ty), mask=padded)


@triton.jit
@no_type_check
def _tile(
    high, low, rest, scale, weight, bias, rows, words, used,
    d, line, w_row, cap,
    PRECISION: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the logits of a tile of rows and words."""
    columns = tl.arange(0, WIDTH)
    h_line = rows.to(tl.int64) * line
    w_line = weight + words.to(tl.int64) * w_row
    total = tl.zeros((ROWS, WORDS), tl.float32)
    for start in range(0, d, WIDTH):
        # Addresses are put together anew each time: kept, they would take as many registers as the sums.
        k = start + columns
        part = tl.load(w_line[None, :] + k[:, None], mask=used[None, :] & (k < d)[:, None], other=0.0)
        h_at = h_line[:, None] + k[None, :]
        there = (k < line)[None, :]
        total = tl.dot(tl.load(high + h_at, mask=there, other=0.0), part, total, input_precision=PRECISION)
        if low is not None:
            total = tl.dot(tl.load(low + h_at, mask=there, other=0.0), part, total)
        if rest is not None:
            total = tl.dot(tl.load(rest + h_at, mask=there, other=0.0), part, total)
    z = total * tl.load(scale + rows)[:, None]
    if bias is not None:
        z += tl.load(bias + words, mask=used, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        small = tl.exp(-2.0 * tl.abs(z) / cap)
        bent = cap * (1.0 - small) / (1.0 + small)
        z = tl.where(z < 0, -bent, bent)
    return z


@triton.jit(do_not_specialize=["q"])
@no_type_check
def aim_kernel(
    high, low, rest, scale, weight, bias, local, out,
    d, line, q, w_row, cap,
    PRECISION: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write the logit of every row's target, -inf where it has none: the diagonal of a tile as the walk has them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # As many words as a tile of the walk has: the same instructions, and so the same rounding.
    slots = tl.arange(0, WORDS)
    asked = slots < ROWS
    at = (tl.program_id(0) * ROWS + slots).to(tl.int64) * q + tl.program_id(1)
    words = tl.load(local + at, mask=asked, other=-1)
    used = words >= 0
    z = _tile(
        high, low, rest, scale, weight, bias, rows, words, used, d, line, w_row, cap,
        PRECISION, CAPPED, ROWS, WORDS, WIDTH,
    )  # fmt: skip
    own = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == slots[None, :], z, 0.0), axis=0)
    tl.store(out + at, tl.where(used, own, -float("inf")), mask=asked)


@triton.jit
@no_type_check
def _first(values, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Return for every row what its group's first row has."""
    grouped = tl.reshape(values, (ROWS // GROUP, GROUP))
    first = tl.sum(tl.where(tl.arange(0, GROUP)[None, :] == 0, grouped, 0.0), axis=1)
    return tl.reshape(tl.broadcast_to(first[:, None], (ROWS // GROUP, GROUP)), (ROWS,))


@triton.jit(do_not_specialize=["v", "q", "m"])
@no_type_check
def walk_kernel(
    high, low, rest, scale, weight, bias, local, aims,
    tops, totals, weighteds, crosseds, own, above, values, places,
    v, d, line, q, m, w_row, share, cap,
    PRECISION: tl.constexpr, CAPPED: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walk one part of the vocabulary for a tile of rows."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WORDS)
    top = tl.full((ROWS,), NOWHERE, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    crossed = tl.zeros((ROWS,), tl.float32)
    slots = tl.arange(0, KEPT if KEPT else 1)
    # Numbers that no word has, all different: what is taken out is found by its number.
    kept = tl.broadcast_to(-1 - slots[None, :], (ROWS, KEPT if KEPT else 1))
    best = tl.full((ROWS, KEPT if KEPT else 1), NOWHERE, tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, v), WORDS):
        words = start + columns
        used = words < v
        z = _tile(
            high, low, rest, scale, weight, bias, rows, words, used, d, line, w_row, cap,
            PRECISION, CAPPED, ROWS, WORDS, WIDTH,
        )  # fmt: skip
        z = tl.where(used[None, :], z, NOWHERE)
        for j in range(0, q):
            at = rows.to(tl.int64) * q + j
            target = tl.load(local + at) - start
            larger = tl.sum((z > tl.load(aims + at)[:, None]).to(tl.int32), axis=1)
            counted = above + part.to(tl.int64) * m * q + at
            tl.store(counted, tl.load(counted) + larger)
            mine = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
            tl.store(own + at, mine, mask=(target >= 0) & (target < WORDS))
        peak = tl.max(z, axis=1)
        higher = tl.maximum(top, peak)
        down = top - higher
        shrunk = tl.exp(down)
        u = z - higher[:, None]
        e = tl.exp(u)
        if GROUP > 1:
            last = tl.reshape(e, (ROWS // GROUP, GROUP, WORDS))
            head = (tl.arange(0, GROUP) == 0)[None, :, None]
            last = tl.sum(tl.where(head, last, 0.0), axis=1)
            over = tl.sum(tl.reshape(u, (ROWS // GROUP, GROUP, WORDS)) * last[:, None, :], axis=2)
            before = crossed + down * _first(total, ROWS, GROUP)
            crossed = _first(shrunk, ROWS, GROUP) * before + tl.reshape(over, (ROWS,))
        weighted = shrunk * (weighted + down * total) + tl.sum(e * u, axis=1)
        total = shrunk * total + tl.sum(e, axis=1)
        top = higher
        if KEPT:
            least = tl.min(best, axis=1)
            while tl.max((peak > least).to(tl.int32), axis=0) > 0:
                column = tl.argmax(z, axis=1)
                # Of words that tie the one with the largest number goes.
                out = tl.max(tl.where(best == least[:, None], kept, -2147483648), axis=1)
                swap = (kept == out[:, None]) & (peak > least)[:, None]
                best = tl.where(swap, peak[:, None], best)
                kept = tl.where(swap, (start + column)[:, None], kept)
                z = tl.where(columns[None, :] == column[:, None], NOWHERE, z)
                peak = tl.max(z, axis=1)
                least = tl.min(best, axis=1)
    line_at = part.to(tl.int64) * m + rows
    tl.store(tops + line_at, top)
    tl.store(totals + line_at, total)
    tl.store(weighteds + line_at, weighted)
    if GROUP > 1:
        tl.store(crosseds + line_at, crossed)
    if KEPT:
        at_kept = line_at[:, None] * KEPT + slots[None, :]
        tl.store(values + at_kept, best)
        tl.store(places + at_kept, kept)


class TritonWalker:
    """Rows before a shard of the vocabulary, multiplied and looked at by Triton kernels."""

    def __init__(self, x: Float[Tensor, "l n d"], shard: Unembedding, first: int, *, crossed: bool) -> None:
        """Norm the rows, once and in float32; the shard's words are numbered from `first`."""
        self.device = x.device
        self._shard, self._first = shard, first
        layers, n, d = x.shape
        order, place = _grouped(layers, n) if crossed else _plain(layers, n)
        self._order, self._place = order.to(x.device), place.to(x.device)
        self._weight = shard.weight if shard.weight.stride(1) == 1 else shard.weight.contiguous()
        plain = self._weight.stride(0) % 16 == 0 and shard.cap is None
        self._sizes = blocks(shard.weight.dtype, card_of(x.device), plain=plain)
        self._line = (d + 15) // 16 * 16
        m = len(order)
        self._high = x.new_empty(m, self._line, dtype=shard.weight.dtype)
        self._low = None if shard.weight.dtype == torch.float32 else torch.empty_like(self._high)
        self._rest = torch.empty_like(self._high) if shard.weight.dtype == torch.bfloat16 else None
        self._scale = x.new_empty(m, dtype=torch.float32)
        block = triton.next_power_of_2(self._line)
        options = {"num_warps": max(4, min(16, block // 512))}
        norm_kernel[(m,)](
            x.contiguous(), self._order, shard.gain, shard.shift, self._high, self._low, self._rest, self._scale,
            d, self._line, shard.eps,
            NORM=NORMS[shard.norm], BLOCK=block, **options,
        )  # fmt: skip

    def aim(self, targets: Int64[Tensor, "n q"]) -> Float32[Tensor, "l n q"]:
        """Return the targets' logits, -inf for those of another shard, by products as they are in the walk."""
        m, q = len(self._order), targets.shape[1]
        out = self._scale.new_full((m, q), -torch.inf)
        if q:
            aim_kernel[(m // ROWS, q)](
                *self._operands(), self._local(targets), out,
                self._shard.weight.shape[1], self._line, q, self._weight.stride(0), self._shard.cap or 1.0,
                CAPPED=self._shard.cap is not None, **self._sizes,
            )  # fmt: skip
        return out[self._place]

    def walk(self, targets: Int64[Tensor, "n q"], aims: Float32[Tensor, "l n q"], top_k: int, crossed: bool) -> Part:
        """Return what the shard says of all rows; ranks are counted against `aims`."""
        v, d = self._shard.weight.shape
        m, q = len(self._order), targets.shape[1]
        kept = KEPT_ON_GPU if top_k else 0
        tops, totals, weighted, across = self._scale.new_zeros(4, PARTS, m)
        own = self._scale.new_full((m, q), -torch.inf)
        above = torch.zeros(PARTS, m, q, dtype=torch.int32, device=self.device)
        values = self._scale.new_empty(PARTS, m, kept)
        words = torch.empty(PARTS, m, kept, dtype=torch.int32, device=self.device)
        lined = self._scale.new_full((m, q), -torch.inf)
        lined[self._place] = aims
        share = -(-v // (PARTS * self._sizes["WORDS"])) * self._sizes["WORDS"]
        parts = -(-v // share)
        walk_kernel[(m // ROWS, parts)](
            *self._operands(), self._local(targets), lined,
            tops, totals, weighted, across if crossed else None, own, above, values, words,
            v, d, self._line, q, m, self._weight.stride(0), share, self._shard.cap or 1.0,
            CAPPED=self._shard.cap is not None, GROUP=GROUP if crossed else 1, KEPT=kept, **self._sizes,
        )  # fmt: skip
        best = keys(values, words.long() + self._first).where(words >= 0, NO_KEY)
        nowhere = torch.full_like(own, -torch.inf)
        at = self._place
        # From here on rows stand by layer again.
        part = merge(
            [
                Part(
                    tops[i][at].double(),
                    totals[i][at].double(),
                    weighted[i][at].double(),
                    across[i][at].double(),
                    (own if i == 0 else nowhere)[at],
                    above[i][at].long(),
                    best[i][at],
                )
                for i in range(parts)
            ]
        )
        return replace(part, best=part.best[..., :top_k])

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
        return self._high, self._low, self._rest, self._scale, self._weight, self._shard.bias

    def _local(self, targets: Int64[Tensor, "n q"]) -> Shaped[Tensor, "m q"]:
        """Return the targets of every line as words of the shard, -1 where there is none."""
        local = targets - self._first
        local = local.where((local >= 0) & (local < len(self._shard.weight)), -1).int()
        lines = local.new_full((len(self._order), local.shape[1]), -1)
        lines[self._place] = local
        return lines


def _plain(layers: int, n: int) -> tuple[Int64[Tensor, " m"], Int64[Tensor, "l n"]]:
    """Return which row stands at each line, -1 for none, and at which line each row."""
    place = torch.arange(layers * n).view(layers, n)
    return _padded(place.flatten()), place


def _grouped(layers: int, n: int) -> tuple[Int64[Tensor, " m"], Int64[Tensor, "l n"]]:
    """The same in groups of one token: the first layer's row, then rows of other layers."""
    others = torch.arange(layers - 1)
    each = GROUP * max(1, -(-(layers - 1) // (GROUP - 1)))
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), others // (GROUP - 1) * GROUP + 1 + others % (GROUP - 1)])
    place = offset[:, None] + each * torch.arange(n)
    order = torch.full((n, each), -1)
    order[:, ::GROUP] = torch.arange(n)[:, None]
    order.view(-1)[place] = torch.arange(layers * n).view(layers, n)
    return _padded(order.view(-1)), place


def _padded(order: Int64[Tensor, " m"]) -> Int64[Tensor, " p"]:
    return torch.nn.functional.pad(order, (0, -len(order) % ROWS), value=-1)
