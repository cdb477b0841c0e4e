"""Logit lens: what a model would say if its decoder ended here, without the [l n v] tensor of logits.

Mathematics: h = norm(x), z = cap(W h + b), log p(w) = z_w - log sum_u exp z_u, rank(y) = 1 + #{w: z_w > z_y},
entropy = -sum_w p(w) log p(w), KL = sum_w p_final(w) (log p_final(w) - log p(w)).

The vocabulary is walked in tiles. Each gives a `Part`, and parts make one, be they of tiles, of programs on a GPU or of
shards on several devices: beside input and output, memory depends neither on n nor on v. A CPU looks at tiles in a
compiled sweep (`lens_cpu`), CUDA and ROCm walk in a Triton kernel (`logit_lens_triton`), others in plain calls of torch
(`lens_torch`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Float, Float32, Float64, Int, Int64
from torch import Tensor

from gapprobe.kernels.lens_parts import KEPT_ON_GPU, Part, Walker, capped, merge, normed, unlocked
from gapprobe.kernels.lens_parts import Unembedding as Unembedding
from gapprobe.kernels.lens_torch import TorchWalker
from gapprobe.kernels.products import on_gpu

ROW_BLOCK = 1152


@dataclass(frozen=True)
class TokenStanding:
    """How a target word stands in the distribution of each row: its natural log-probability, its rank (1 = first)."""

    log_prob: Float[Tensor, " n"]
    rank: Int64[Tensor, " n"]


@dataclass(frozen=True)
class Reading:
    """What every layer and token would say. Logarithms are natural.

    Attributes:
        log_prob: of each target; NaN where there is none.
        rank: of each target, 1 = first: 1 + the number of words with a larger logit, so words that tie share the better
            rank. 0 where there is no target.
        entropy: of the distribution, in nats.
        top_words: the most probable words, best first; of words that tie the one with the smaller number comes first.
        top_log_prob: their log-probabilities.
        kl: divergence KL(final || layer) of each layer's distribution from the final one, in nats; None if no final
            layer was given.
    """

    log_prob: Float[Tensor, "l n q"]
    rank: Int64[Tensor, "l n q"]
    entropy: Float[Tensor, "l n"]
    top_words: Int64[Tensor, "l n k"]
    top_log_prob: Float[Tensor, "l n k"]
    kl: Float[Tensor, "l n"] | None


def reference(x: Float[Tensor, "n d"], unembedding: Unembedding, targets: Int[Tensor, " n"]) -> TokenStanding:
    """Compute one target's standing in float64, all logits at once: the definition, for reading and for tests."""
    found = read_reference(x[None], unembedding, targets[:, None])
    return TokenStanding(found.log_prob[0, :, 0], found.rank[0, :, 0])


def read_reference(
    x: Float[Tensor, "l n d"],
    unembedding: Unembedding,
    targets: Int[Tensor, "n q"],
    *,
    top_k: int = 0,
    final: Float[Tensor, "n d"] | None = None,
) -> Reading:
    """Compute the lens in float64, all logits at once: the definition, for reading and for tests."""
    log_p = log_softmax_reference(x, unembedding)
    some = targets >= 0
    at = targets.long().clamp(min=0).expand(len(x), -1, -1)
    log_prob = log_p.gather(2, at)
    rank = 1 + reduce(log_p[:, :, None] > log_prob[..., None], "l n q v -> l n q", "sum").long()
    best = torch.sort(log_p, dim=2, descending=True, stable=True)
    kl = None
    if final is not None:
        log_final = log_softmax_reference(final[None], unembedding)
        kl = reduce(log_final.exp() * (log_final - log_p), "l n v -> l n", "sum")
    return Reading(
        log_prob.where(some, torch.nan),
        rank.where(some, 0),
        -reduce(log_p.exp() * log_p, "l n v -> l n", "sum"),
        best.indices[..., :top_k],
        best.values[..., :top_k],
        kl,
    )


def log_softmax_reference(x: Float[Tensor, "l n d"], unembedding: Unembedding) -> Float64[Tensor, "l n v"]:
    """Compute the log-probabilities of all words in float64, for reading and for tests."""
    logits = einsum(normed(x.double(), unembedding), unembedding.weight.double(), "l n d, v d -> l n v")
    if unembedding.bias is not None:
        logits = logits + unembedding.bias.double()
    return torch.log_softmax(capped(logits, unembedding.cap), dim=2)


def read(
    x: Float[Tensor, "l n d"],
    unembedding: Unembedding | Sequence[Unembedding],
    targets: Int[Tensor, "n q"],
    *,
    top_k: int = 0,
    final: Float[Tensor, "n d"] | None = None,
) -> Reading:
    """Read every layer and token through the decoder's end: targets, entropy, best words, distance from the last.

    Products are float32 in effect, whatever the dtypes; norms are float64 on a CPU, float32 on a GPU; sums over a tile
    are float32, over tiles float64. Ranks and best words compare float32 logits, all made by the same product, so they
    are the reference's wherever its gap is larger than a rounding. Equal bytes in, equal bytes out, however rows and
    layers are cut into calls, where the BLAS multiplies a row alike in any company: MKL does, from 16 rows and
    words on.

    Args:
        x: residuals before the final norm.
        unembedding: the decoder's end; give `norm="none"` for a bare lens. Or its shards (`Unembedding.shards`), each a
            part of the vocabulary, in its order, on a device of its own.
        targets: words in [0, v) whose standing is asked for at every layer; -1 for none, where rows have fewer.
        top_k: how many of the most probable words are wanted.
        final: residuals of the last layer, before the final norm, if the divergence from it is wanted.

    Returns:
        On the device of x.

    Raises:
        ValueError: a width that does not fit, a target outside the vocabulary, more words asked for than there are, or
            rows that are not finite.
    """
    given = [unembedding] if isinstance(unembedding, Unembedding) else unembedding
    shards = [shard for shard in given if len(shard.weight)]
    _refuse(x, shards, targets, top_k, final)
    n = x.shape[1]
    targets = targets.to(x.device).long()
    crossed = final is not None
    at_once = ROW_BLOCK * (16 if on_gpu(x) else 1)
    blocks = min(max(1, n), max(1, -(-n * (len(x) + crossed) // at_once)))
    made: list[Part] = []
    with torch.no_grad():
        for i in range(blocks):
            rows = slice(n * i // blocks, n * (i + 1) // blocks)
            layers = x[:, rows] if final is None else torch.cat([final[None, rows], x[:, rows]])
            made.append(_read_rows(layers, shards, targets[rows], top_k, crossed))
    part = Part(*(torch.cat(pieces, 1) for pieces in zip(*(vars(piece).values() for piece in made), strict=True)))
    return _reading(part, targets, crossed)


def _refuse(x: Tensor, shards: Sequence[Unembedding], targets: Tensor, top_k: int, final: Tensor | None) -> None:
    _, n, d = x.shape
    if not shards:
        raise ValueError("the unembedding has no words")
    for width in {shard.weight.shape[1] for shard in shards}:
        if d != width:
            raise ValueError(
                f"residuals are {d} wide, the unembedding is {width} wide; they belong to different models"
            )
    v = sum(len(shard.weight) for shard in shards)
    if len(targets) != n or targets.dim() != 2:
        raise ValueError(f"{n} rows want as many lines of targets, got shape {tuple(targets.shape)}")
    if final is not None and tuple(final.shape) != (n, d):
        raise ValueError(f"the final layer has shape {tuple(final.shape)}, the others have {(n, d)}")
    if not 0 <= top_k <= v:
        raise ValueError(f"top_k is {top_k}, the vocabulary has {v}: ask for 0 to {v} words")
    wrong = (targets < -1) | (targets >= v)
    if bool(wrong.any()):
        row, place = torch.nonzero(wrong)[0].tolist()
        raise ValueError(f"target {int(targets[row, place])} of row {row} is no word: the vocabulary has {v}")
    named = [(f"layer {i} of the call", layer) for i, layer in enumerate(x)]
    for name, layer in [*named, *([] if final is None else [("the final layer", final)])]:
        fine = torch.isfinite(layer).all(1)
        if not bool(fine.all()):
            rows = torch.nonzero(~fine)[:, 0].tolist()
            told = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
            raise ValueError(
                f"{name} has rows that are not finite: {told} ({len(rows)} of {len(fine)}); leave them out"
            )


def _read_rows(
    x: Float[Tensor, "l n d"], shards: Sequence[Unembedding], targets: Int64[Tensor, "n q"], top_k: int, crossed: bool
) -> Part:
    """Aim at the targets' logits, then walk: ranks are counted against a logit that its own tile only shows later.

    The aim is a product of its own. Should it differ from the tile's logit, which has other words beside it, the walk
    is taken again with what the tiles showed: a rank never mixes two roundings.
    """
    walkers: list[Walker] = []
    first = 0
    for shard in shards:
        here = x.to(shard.weight.device)
        # The Triton kernel keeps few of the best words; beyond these, and for nothing at all, torch walks.
        if on_gpu(here) and here.numel() and top_k <= KEPT_ON_GPU:
            from gapprobe.kernels import logit_lens_triton  # not everywhere installed, and slow to import

            walkers.append(logit_lens_triton.TritonWalker(here, shard, first, crossed=crossed))
        elif here.device.type == "cpu":
            from gapprobe.kernels import lens_cpu  # a third of a second to import

            walkers.append(lens_cpu.CpuWalker(here, shard, first))
        else:
            walkers.append(TorchWalker(here, shard, first))
        first += len(shard.weight)
    aims = torch.stack([each.aim(targets.to(each.device)).to(x.device) for each in walkers]).amax(0)
    part = _walk(walkers, targets, aims, top_k, crossed)
    return part if part.own.equal(aims) else _walk(walkers, targets, part.own, top_k, crossed)


def _walk(
    walkers: Sequence[Walker],
    targets: Int64[Tensor, "n q"],
    aims: Float32[Tensor, "l n q"],
    top_k: int,
    crossed: bool,
) -> Part:
    parts = [each.walk(targets.to(each.device), aims.to(each.device), top_k, crossed) for each in walkers]
    return merge([Part(*(piece.to(aims.device) for piece in vars(part).values())) for part in parts])


def _reading(part: Part, targets: Int64[Tensor, "n q"], crossed: bool) -> Reading:
    log_total = torch.log(part.total)
    normal = part.top + log_total
    if not bool((fine := torch.isfinite(normal) & torch.isfinite(part.weighted)).all()):
        layer, row = torch.nonzero(~fine)[0].tolist()
        raise ValueError(f"layer {layer} of the call, row {row}: logits are not finite; is the unembedding?")
    kl = (part.crossed[:1] - part.crossed) / part.total[:1] + log_total - log_total[:1]
    here = slice(1 if crossed else 0, None)
    values, words = unlocked(part.best[here])
    some = targets >= 0
    return Reading(
        (part.own[here].double() - normal[here, :, None]).clamp(max=0.0).where(some, torch.nan).float(),
        (1 + part.above[here]).where(some, 0),
        (log_total - part.weighted / part.total)[here].float(),
        words,
        (values.double() - normal[here, :, None]).clamp(max=0.0).float(),
        kl[here].clamp(min=0.0).float() if crossed else None,
    )
