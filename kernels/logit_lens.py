"""Logit lens: what a model would say if its decoder ended here, without the [n v] tensor of logits.

Mathematics: h = norm(x), z = W h + b, log p(y) = z_y - log sum_w exp z_w, rank(y) = 1 + #{w: z_w > z_y}. The vocabulary
is walked in blocks with a running log-sum-exp, so memory depends on neither n nor v. No store or model is known here.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import einsum, reduce
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

ROW_BLOCK = 512
WORD_BLOCK = 2048


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


@dataclass(frozen=True)
class TokenStanding:
    """How a target word stands in the distribution of each row: its natural log-probability, its rank (1 = first)."""

    log_prob: Float[Tensor, " n"]
    rank: Int64[Tensor, " n"]


def reference(x: Float[Tensor, "n d"], unembedding: Unembedding, targets: Int[Tensor, " n"]) -> TokenStanding:
    """Compute the lens in float64, all logits at once: the definition, for reading and for tests."""
    h = _normed(x.double(), unembedding)
    logits = einsum(h, unembedding.weight.double(), "n d, v d -> n v")
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.double()
    logits = _capped(logits, unembedding.cap)
    target = logits.gather(1, targets.long()[:, None])
    log_prob = target[:, 0] - torch.logsumexp(logits, dim=1)
    return TokenStanding(log_prob, 1 + reduce(logits > target, "n v -> n", "sum").long())


def token_standing(x: Float[Tensor, "n d"], unembedding: Unembedding, targets: Int[Tensor, " n"]) -> TokenStanding:
    """Return log-probability (float32) and rank of one target word a row, after the final norm.

    Products are float32 whatever the inputs' dtype; sums over the vocabulary are float64. The rank counts words whose
    float32 logit is larger than the target's, so it equals the reference's wherever no word lies within rounding of it.

    Args:
        x: residuals, not normed.
        unembedding: the decoder's end; give `norm="none"` for a bare lens.
        targets: for each row a word in [0, v).

    Raises:
        ValueError: a width that does not fit, or a target outside the vocabulary.
    """
    n, d = x.shape
    v, width = unembedding.weight.shape
    if d != width:
        raise ValueError(f"residuals are {d} wide, the unembedding is {width} wide; they belong to different models")
    if tuple(targets.shape) != (n,):
        raise ValueError(f"{n} rows want as many targets, got shape {tuple(targets.shape)}")
    if n and not bool(((targets >= 0) & (targets < v)).all()):
        bad = int(torch.nonzero((targets < 0) | (targets >= v))[0])
        raise ValueError(f"target {int(targets[bad])} of row {bad} is no word: the vocabulary has {v}")
    targets = targets.long()
    log_prob = torch.empty(n, dtype=torch.float32, device=x.device)
    rank = torch.empty(n, dtype=torch.int64, device=x.device)
    for start in range(0, n, ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, n))
        log_prob[rows], rank[rows] = _block(_normed(x[rows].float(), unembedding), unembedding, targets[rows])
    return TokenStanding(log_prob, rank)


def _block(
    h: Float32[Tensor, "n d"], unembedding: Unembedding, targets: Int64[Tensor, " n"]
) -> tuple[Float64[Tensor, " n"], Int64[Tensor, " n"]]:
    target_bias = 0.0 if unembedding.bias is None else unembedding.bias[targets].double()
    target = _capped((h.double() * unembedding.weight[targets].double()).sum(1) + target_bias, unembedding.cap)
    top = torch.full_like(target, -math.inf)
    total = torch.zeros_like(target)
    above = torch.zeros_like(targets)
    for start in range(0, unembedding.weight.shape[0], WORD_BLOCK):
        words = slice(start, start + WORD_BLOCK)
        logits = h @ unembedding.weight[words].float().T
        if unembedding.bias is not None:
            logits += unembedding.bias[words].float()
        logits = _capped(logits, unembedding.cap)
        # The target's own column may differ from `target` in the last bit (another order of summation): never count it.
        own = torch.nonzero((targets >= start) & (targets < start + logits.shape[1]))[:, 0]
        larger = logits > target.float()[:, None]
        larger[own, targets[own] - start] = False
        above += larger.sum(1)
        new_top = torch.maximum(top, logits.amax(1).double())
        total = total * torch.exp(top - new_top) + torch.exp(logits - new_top.float()[:, None]).sum(1).double()
        top = new_top
    return (target - top - torch.log(total)).clamp(max=0.0), 1 + above


def _capped(logits: Float[Tensor, "..."], cap: float | None) -> Float[Tensor, "..."]:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _normed(x: Float[Tensor, "n d"], unembedding: Unembedding) -> Float[Tensor, "n d"]:
    if unembedding.norm == "none":
        return x
    if unembedding.norm == "layer":
        x = x - reduce(x, "n d -> n 1", "mean")
    h = x * torch.rsqrt(reduce(x * x, "n d -> n 1", "mean") + unembedding.eps)
    if unembedding.gain is not None:
        h = h * unembedding.gain.to(h)
    return h if unembedding.shift is None else h + unembedding.shift.to(h)
