"""The walk of `logit_lens` over a shard of the vocabulary, in calls of torch that run on any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from gapprobe.kernels.lens_parts import NO_KEY, Part, Unembedding, keys, merge, normed

WORD_BLOCK = 1536
# The smallest product: below it BLAS libraries multiply in another order, and a row's bytes would tell its company.
LEAST = 16
NOWHERE = -1e30  # the logit of words that only fill up a tile: finite, so that nothing times it is NaN


class TorchWalker:
    """Rows before a shard of the vocabulary, multiplied and looked at tile by tile."""

    def __init__(self, x: Float[Tensor, "l n d"], shard: Unembedding, first: int) -> None:
        """Norm the rows, once and in float64; the shard's words are numbered from `first`."""
        self.device = x.device
        self.layers, self.rows = x.shape[:2]
        self.shard, self.first = shard, first
        h = normed(x.double(), shard).float()
        self._h = torch.nn.functional.pad(h.flatten(0, 1), (0, 0, 0, max(0, LEAST - len(h) * h.shape[1])))

    def aim(self, targets: Int64[Tensor, "n q"]) -> Float32[Tensor, "l n q"]:
        """Return the targets' logits, -inf for those of another shard, by products as they are in the walk."""
        out = self._h.new_full((self.layers, *targets.shape), -torch.inf)
        local = targets - self.first
        rows, places = torch.nonzero((local >= 0) & (local < len(self.shard.weight)), as_tuple=True)
        for row, place in zip(rows.split(WORD_BLOCK), places.split(WORD_BLOCK), strict=True):
            asked, column = local[row, place].unique(return_inverse=True)
            z = self.layered(self.logits(asked, self.room(len(asked))))
            out[:, row, place] = z[:, row, column]
        return out

    def walk(self, targets: Int64[Tensor, "n q"], aims: Float32[Tensor, "l n q"], top_k: int, crossed: bool) -> Part:
        """Return what the shard says of all rows; ranks are counted against `aims`."""
        v = len(self.shard.weight)
        best = torch.full((self.layers, self.rows, top_k), NO_KEY, device=self.device)
        found: Part | None = None
        for start in range(0, v, WORD_BLOCK):
            count = min(WORD_BLOCK, v - start)
            local = (targets - self.first - start).expand(self.layers, -1, -1)
            words = torch.arange(self.first + start, self.first + start + count, device=self.device)
            z = self.layered(self.logits(slice(start, start + count), self.room(count)))[..., :count]
            top = z.amax(2)
            u = z - top[..., None]
            weight = u.exp()
            total, weighted = (each.sum(2).double() for each in (weight, weight * u))
            across = (weight[:1] * u).sum(2).double() if crossed else torch.zeros_like(total)
            own = z.gather(2, local.clamp(0, count - 1)).where((local >= 0) & (local < count), -torch.inf)
            above = torch.zeros_like(aims, dtype=torch.int64)
            for j in range(aims.shape[2]):  # one at a time: all of them would be as many tiles
                above[..., j] = (z > aims[..., j, None]).sum(2)
            part = Part(top.double(), total, weighted, across, own, above, best[..., :0])
            found = part if found is None else merge([found, part])
            best = torch.cat([best, keys(z, words.expand_as(z))], 2).topk(top_k, dim=2).values
        assert found is not None  # a shard has words
        return replace(found, best=best)

    def room(self, words: int) -> Float32[Tensor, "m f"]:
        """Return memory for the logits of so many words."""
        return self._h.new_empty(len(self._h), filled(words))

    def logits(self, words: slice | Int64[Tensor, " w"], out: Float32[Tensor, "m f"]) -> Float32[Tensor, "m f"]:
        """Write the logits of some words, and what is no word's beside them."""
        weight = self.shard.weight[words]
        count = len(weight)
        self.multiply(weight, out)
        if self.shard.bias is not None:
            out[:, :count] += self.shard.bias[words].float()
        if self.shard.cap is not None:
            out.div_(self.shard.cap).tanh_().mul_(self.shard.cap)
        out[:, count:] = NOWHERE
        return out

    def multiply(self, weight: Float[Tensor, "w d"], out: Float32[Tensor, "m f"]) -> None:
        """Write the products of all rows with some words; what stands beside them may be anything."""
        weight = weight.float()
        if len(weight) < out.shape[1]:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, out.shape[1] - len(weight)))
        torch.mm(self._h, weight.T, out=out)

    def layered(self, lines: Float32[Tensor, "m f"]) -> Float32[Tensor, "l n f"]:
        """Return lines by layer and row, without those that only fill up."""
        return lines[: self.layers * self.rows].unflatten(0, (self.layers, self.rows))


def filled(words: int) -> int:
    """Return the next width that LEAST divides."""
    return -(-words // LEAST) * LEAST
