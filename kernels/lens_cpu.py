"""The walk of `logit_lens` on a CPU: one compiled sweep over a tile's logits while they are near, and none back.

A row's words are taken as `STRIDE` stretches side by side; the largest of those that stand at one place of each is a
peak. Peaks tell the row's largest logit, and where to look for best words, whose keys are kept in a heap.
"""

from __future__ import annotations

from dataclasses import replace
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from gapprobe.kernels import lens_torch, products_cpu
from gapprobe.kernels.compiled import bits, by_rows, exact, from_bits, larger, sweep
from gapprobe.kernels.exponential_cpu import FAINTEST, exponential
from gapprobe.kernels.lens_parts import NO_KEY, Part, merge
from gapprobe.kernels.lens_torch import LEAST, TorchWalker, filled

STRIDE = 16  # as `peaks_of` writes out
assert LEAST % STRIDE == 0  # what tiles are filled up to
_PARTS = 32  # tiles whose sums wait to be made one


class CpuWalker(TorchWalker):
    """Rows before a shard of the vocabulary, multiplied and looked at by compiled sweeps."""

    def multiply(self, weight: Float[Tensor, "w d"], out: Float32[Tensor, "m f"]) -> None:
        """Write the products of all rows with some words, read in 16 bits if so they are."""
        products_cpu.dots(
            self._h, weight.float() if weight.dtype == torch.float64 else weight, out=out[:, : len(weight)]
        )

    def walk(self, targets: Int64[Tensor, "n q"], aims: Float32[Tensor, "l n q"], top_k: int, crossed: bool) -> Part:
        """Return what the shard says of all rows; ranks are counted against `aims`."""
        v = len(self.shard.weight)
        best = torch.full((*aims.shape[:2], top_k), NO_KEY)
        own, above = torch.full_like(aims, -torch.inf), torch.zeros_like(aims, dtype=torch.int64)
        arrays = [each.numpy() for each in ((targets - self.first), aims.contiguous(), own, above, best)]
        none = [each[..., :0] for each in (own, above, best)]
        # One room for all tiles, which the cache knows.
        room = self.room(min(lens_torch.WORD_BLOCK, v)).flatten()
        parts: list[Part] = []
        for start in range(0, v, lens_torch.WORD_BLOCK):
            count = min(lens_torch.WORD_BLOCK, v - start)
            z = self.logits(slice(start, start + count), room[: len(self._h) * filled(count)].view(len(self._h), -1))
            sums = torch.empty(4, *aims.shape[:2], dtype=torch.float64)
            tile = (z.numpy(), count, start, self.first + start, crossed, *arrays, sums.numpy())
            by_rows(lambda a, b, tile=tile: look(*tile, a, b), self.rows, self.layers * count)
            parts.append(Part(*sums, *none))
            if len(parts) == _PARTS:
                parts = [merge(parts)]
        return replace(merge(parts), own=own, above=above, best=best.sort(dim=2, descending=True).values)


@sweep
@no_type_check
def look(z, count, start, first, crossed, targets, aims, own, above, best, sums, begin, end):
    """Take in a tile of logits for rows `begin` to `end` at all layers; `sums` are top, total, weighted, crossed."""
    layers, n, q = aims.shape
    peaks = np.empty(z.shape[1] // STRIDE, np.float32)
    final, other = np.empty(count, np.float32), np.empty(count, np.float32)
    for i in range(begin, end):
        for layer in range(layers):
            row = z[layer * n + i]
            top = peaks_of(row, peaks)
            weights = final if layer == 0 else other
            total, weighted, across = np.float32(0), np.float32(0), np.float32(0)
            for j in range(count):
                u = row[j] - top
                w = exponential(larger(u, FAINTEST))
                total += w
                weighted += w * u
                weights[j] = w
            if crossed:
                for j in range(count):
                    across += final[j] * (row[j] - top)
            sums[0, layer, i], sums[1, layer, i] = top, total
            sums[2, layer, i], sums[3, layer, i] = weighted, across
            for t in range(q):
                # Ones in float32 are added eight at a time; a tile has less than 2^24.
                aim, ahead = aims[layer, i, t], np.float32(0)
                for j in range(count):
                    ahead += np.float32(1) if row[j] > aim else np.float32(0)
                above[layer, i, t] += np.int64(ahead)
                place = targets[i, t] - start
                if 0 <= place < count:
                    own[layer, i, t] = row[place]
            if best.shape[2] > 0:
                keep_best(row, top, peaks, count, first, best[layer, i])


@exact
@no_type_check
def largest(a, b, c, d, e, f, g, h):
    """Return the largest of eight."""
    return larger(larger(larger(a, b), larger(c, d)), larger(larger(e, f), larger(g, h)))


@exact
@no_type_check
def peaks_of(row, peaks):
    """Write the peaks of a row and return the largest. Written out, as a loop would store under a mask."""
    k = len(peaks)
    a, b, c, d = row[:k], row[k : 2 * k], row[2 * k : 3 * k], row[3 * k : 4 * k]
    e, f, g, h = row[4 * k : 5 * k], row[5 * k : 6 * k], row[6 * k : 7 * k], row[7 * k : 8 * k]
    for s in range(k):
        peaks[s] = largest(a[s], b[s], c[s], d[s], e[s], f[s], g[s], h[s])
    a, b, c, d = row[8 * k : 9 * k], row[9 * k : 10 * k], row[10 * k : 11 * k], row[11 * k : 12 * k]
    e, f, g, h = row[12 * k : 13 * k], row[13 * k : 14 * k], row[14 * k : 15 * k], row[15 * k : 16 * k]
    top = peaks[0]
    for s in range(k):
        peaks[s] = larger(largest(a[s], b[s], c[s], d[s], e[s], f[s], g[s], h[s]), peaks[s])
        top = larger(peaks[s], top)
    return top


@exact
@no_type_check
def keep_best(row, top, peaks, count, first, heap):
    """Put the keys of a row's words that belong there into a heap, whose least key is its first."""
    k, bar = len(peaks), bar_of(heap)
    if top < bar:
        return
    for s in range(k):
        if peaks[s] >= bar:
            for j in range(s, count, k):
                if row[j] >= bar:
                    # As `lens_parts.keys` has it.
                    value = np.int64(bits(row[j] + np.float32(0)))
                    key = ((value ^ ((value >> 31) & 0x7FFFFFFF)) << 32) | (0xFFFFFFFF - (first + j))
                    if key > heap[0]:
                        sift(heap, key)
                        bar = bar_of(heap)


@exact
@no_type_check
def bar_of(heap):
    """Return the logit that a word needs to be among the best."""
    if heap[0] == NO_KEY:
        return np.float32(-np.inf)
    high = heap[0] >> 32
    return from_bits(np.int32(high ^ ((high >> 31) & 0x7FFFFFFF)))


@exact
@no_type_check
def sift(heap, key):
    """Put a key in place of the least."""
    at, size = 0, len(heap)
    while True:
        child = 2 * at + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if child >= size or heap[child] >= key:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = key
