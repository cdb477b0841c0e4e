"""What the walks of `logit_lens` share: the decoder's end, what a part of the vocabulary says, how parts make one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from einops import reduce
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

NO_KEY = torch.iinfo(torch.int64).min
KEPT_ON_GPU = 16  # best words that a program of the Triton kernel can keep


@dataclass(frozen=True)
class Unembedding:
    """The end of a decoder: its final norm and its map from width to vocabulary.

    Attributes:
        weight: one row a word.
        bias: added to the logits, or None.
        norm: "rms" (x / rms(x) * gain), "layer" (x centred, / standard deviation, * gain + shift) or "none".
        gain: the norm's scale, or None for ones. Families that store the scale as an offset from one give 1 + offset.
        shift: the norm's bias, or None for zeros; LayerNorm only.
        eps: added to the mean square under the root.
        cap: logits are bent to cap · tanh(logit / cap) (Gemma 2), or None.
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    norm: Literal["rms", "layer", "none"] = "none"
    gain: Float[Tensor, " d"] | None = None
    shift: Float[Tensor, " d"] | None = None
    eps: float = 1e-6
    cap: float | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit and norms that are not known."""
        if self.norm not in ("rms", "layer", "none"):
            raise ValueError(f"unknown norm {self.norm!r}; known: rms, layer, none")
        v, d = self.weight.shape
        for name, vector, size in (("bias", self.bias, v), ("gain", self.gain, d), ("shift", self.shift, d)):
            if vector is not None and tuple(vector.shape) != (size,):
                raise ValueError(
                    f"{name} has shape {tuple(vector.shape)}, but the weight [{v}, {d}] asks for ({size},)"
                )
        if self.norm == "none" and (self.gain is not None or self.shift is not None):
            raise ValueError("gain and shift belong to a norm, but norm is 'none'")
        if self.norm == "rms" and self.shift is not None:
            raise ValueError("an RMS norm has no shift")

    def to(self, device: str | torch.device) -> "Unembedding":
        """Return the same on another device."""
        vectors = {name: getattr(self, name) for name in ("weight", "bias", "gain", "shift")}
        return replace(self, **{name: v if v is None else v.to(device) for name, v in vectors.items()})

    def logits(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Return all logits in the dtype of x, differentiable by x: for training and for reading, not for lenses."""
        logits = normed(x, self) @ self.weight.to(x).T
        return capped(logits if self.bias is None else logits + self.bias.to(x), self.cap)

    def shards(self, parts: int) -> "list[Unembedding]":
        """Cut the vocabulary into parts, in its order and as equal as can be; their weights are views."""
        v = len(self.weight)
        cuts = [v * i // parts for i in range(parts + 1)]
        return [
            replace(self, weight=self.weight[a:b], bias=None if self.bias is None else self.bias[a:b])
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]


def capped(logits: Float[Tensor, "..."], cap: float | None) -> Float[Tensor, "..."]:
    """Return logits bent to (-cap, cap), as they are without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def normed(x: Float[Tensor, "*n d"], unembedding: Unembedding) -> Float[Tensor, "*n d"]:
    """Return residuals after the final norm, in their own precision."""
    if unembedding.norm == "none":
        return x
    if unembedding.norm == "layer":
        x = x - reduce(x, "... d -> ... 1", "mean")
    h = x * torch.rsqrt(reduce(x * x, "... d -> ... 1", "mean") + unembedding.eps)
    if unembedding.gain is not None:
        h = h * unembedding.gain.to(h)
    return h if unembedding.shift is None else h + unembedding.shift.to(h)


@dataclass(frozen=True)
class Part:
    """What a part of the vocabulary says; u is a logit less the part's largest.

    Attributes:
        top: the largest logit.
        total: sum of e^u.
        weighted: sum of e^u u.
        crossed: sum of e^u u with e^u of the final layer, which then is the first; zeros without one.
        own: the target's logit; -inf where it lies in another part.
        above: how many logits are larger than the target's.
        best: keys of the best words, best first.
    """

    top: Float64[Tensor, "l n"]
    total: Float64[Tensor, "l n"]
    weighted: Float64[Tensor, "l n"]
    crossed: Float64[Tensor, "l n"]
    own: Float32[Tensor, "l n q"]
    above: Int64[Tensor, "l n q"]
    best: Int64[Tensor, "l n k"]


def merge(parts: Sequence[Part]) -> Part:
    """Make one part of several that have no word in common; `best` becomes as long as the longest of theirs."""
    tops, totals, weighted, crossed = (
        torch.stack([getattr(part, name) for part in parts]) for name in ("top", "total", "weighted", "crossed")
    )
    top = tops.amax(0)
    down = tops - top
    scale = torch.exp(down)
    best = torch.cat([part.best for part in parts], 2)
    return Part(
        top,
        (scale * totals).sum(0),
        (scale * (weighted + down * totals)).sum(0),
        (scale[:, :1] * (crossed + down * totals[:, :1])).sum(0),
        torch.stack([part.own for part in parts]).amax(0),
        torch.stack([part.above for part in parts]).sum(0),
        best.topk(max(part.best.shape[2] for part in parts), dim=2).values,
    )


def keys(values: Float32[Tensor, "*r"], words: Int64[Tensor, "*r"]) -> Int64[Tensor, "*r"]:
    """Return numbers that sort as values do and, where these are equal, against the order of words: all differ."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (0xFFFFFFFF - words)


def unlocked(found: Int64[Tensor, "*r"]) -> tuple[Float32[Tensor, "*r"], Int64[Tensor, "*r"]]:
    """Return values and words of `keys`."""
    high = found >> 32
    bits = high ^ ((high >> 31) & 0x7FFFFFFF)
    return bits.int().view(torch.float32), 0xFFFFFFFF - (found & 0xFFFFFFFF)


@runtime_checkable
class Walker(Protocol):
    """Rows before a shard of the vocabulary."""

    device: torch.device

    def aim(self, targets: Int64[Tensor, "n q"]) -> Float32[Tensor, "l n q"]:
        """Return the targets' logits, -inf for those of another shard, by products as they are in the walk."""
        ...

    def walk(self, targets: Int64[Tensor, "n q"], aims: Float32[Tensor, "l n q"], top_k: int, crossed: bool) -> Part:
        """Return what the shard says of all rows; ranks are counted against `aims`."""
        ...
