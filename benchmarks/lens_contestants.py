"""What a contestant of the lens benchmark is, and the contestants themselves.

All but the floor give, for every layer and token: log-probability and rank of the target, entropy, and the best words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gapprobe.kernels import lens_torch, logit_lens
from gapprobe.kernels.logit_lens import Reading, Unembedding

TOP = 10
_LEARNED = 3.0
# Peers that make all logits, as `naive` and `by-layer` do, and cannot be imported beside what we need.
LEFT_OUT = {
    "nnterp 1.3": "asks for modules that nnsight 0.8 no longer has",
    "tuned-lens 0.2": "asks for a class that TransformerLens 4 no longer has",
}


@dataclass(frozen=True)
class Case:
    """What is read.

    Attributes:
        name: of the operation.
        title: in words.
        x: residuals before the final norm.
        unembedding: an RMS norm and the words.
        targets: a word for every token.
    """

    name: str
    title: str
    x: Float[Tensor, "l n d"]
    unembedding: Unembedding
    targets: Int64[Tensor, "n 1"]


def make_case(layers: int, tokens: int, words: int, width: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return random residuals that turn to their target's direction from layer to layer: ranks fall from v to 1."""
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(words, width, generator=draw) * 2 / width**0.5).to(dtype)
    targets = torch.randint(0, words, (tokens, 1), generator=draw)
    way = torch.linspace(0, 1, layers)[:, None, None] * _LEARNED * weight[targets[:, 0]].float()
    x = torch.randn(layers, tokens, width, generator=draw) + way
    gain = 1 + 0.3 * torch.randn(width, generator=draw)
    kind = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')} weights"
    name = f"lens-{layers}x{tokens}x{words}x{width}" + ("" if dtype == torch.float32 else "-16bit")
    title = f"{layers} layers, {tokens} tokens, {words:,} words, width {width:,}{kind}"
    return Case(name, title, x, Unembedding(weight, None, "rms", gain, None, 1e-5), targets)


class Contestant(ABC):
    """A way to read a case, made anew for each."""

    name: ClassVar[str]
    label: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]] = ("torch", "numba", "gapprobe")

    def __init__(self, case: Case) -> None:
        """Prepare, outside the clock."""
        self.case = case

    @property
    def memory(self) -> int:
        """Return how many bytes a run may touch."""
        return 256 << 20

    @abstractmethod
    def read(self) -> Reading | None:
        """Read the case; this is timed. None from one that reads nothing."""


class Gapprobe(Contestant):
    """All layers in one call."""

    name = "gapprobe"
    label = "gapprobe"

    def __init__(self, case: Case) -> None:
        """Read one row, so that what is compiled once a machine is neither timed nor weighed."""
        super().__init__(case)
        few = case.unembedding.shards(len(case.unembedding.weight) // TOP)[0]
        logit_lens.read(case.x[:1, :1], few, case.targets[:1] * 0, top_k=TOP)

    def read(self) -> Reading:
        """Read."""
        return logit_lens.read(self.case.x, self.case.unembedding, self.case.targets, top_k=TOP)


class Matmul(Contestant):
    """The bare product, in gapprobe's tiles: rows are normed before the clock starts."""

    name = "matmul"
    label = "the bare product in gapprobe's tiles"

    def __init__(self, case: Case) -> None:
        """Norm the rows."""
        super().__init__(case)
        self._h = _hidden(case.x, case.unembedding).flatten(0, 1)

    def read(self) -> None:
        """Multiply."""
        rows, words = logit_lens.ROW_BLOCK, lens_torch.WORD_BLOCK
        room = torch.empty(rows * words)
        for h in self._h.split(rows):
            for weight in self.case.unembedding.weight.split(words):
                torch.mm(h, weight.float().T, out=room[: len(h) * len(weight)].view(len(h), -1))


class Naive(Contestant):
    """All logits at once, as the formulas are written."""

    name = "naive"
    label = "softmax of all logits at once"

    @property
    def memory(self) -> int:
        """Return the size of six tensors of all logits."""
        layers, n, _ = self.case.x.shape
        return 6 * 4 * layers * n * len(self.case.unembedding.weight)

    def read(self) -> Reading:
        """Read."""
        return self._of(self.case.x)

    def logits(self, x: Float[Tensor, "l n d"]) -> Float[Tensor, "l n v"]:
        """Return all logits."""
        return _hidden(x, self.case.unembedding) @ self.case.unembedding.weight.float().T

    def _of(self, x: Float[Tensor, "l n d"]) -> Reading:
        logits = self.logits(x)
        targets = self.case.targets.expand(len(x), -1, -1)
        rank = 1 + (logits > logits.gather(2, targets)).sum(2, keepdim=True)
        log_p = logits.log_softmax(2)
        best = log_p.topk(TOP, dim=2)
        entropy = -(log_p.exp() * log_p).sum(2)
        return Reading(log_p.gather(2, targets), rank, entropy, best.indices, best.values, None)


class ByLayer(Naive):
    """The same a layer at a time, as lenses are mostly written."""

    name = "by-layer"
    label = "softmax of one layer's logits at a time"

    @property
    def memory(self) -> int:
        """Return the size of six tensors of a layer's logits, and of the words in float32."""
        return super().memory // len(self.case.x) + 4 * self.case.unembedding.weight.numel()

    def read(self) -> Reading:
        """Read."""
        parts = [self._of(layer[None]) for layer in self.case.x]
        return Reading(
            torch.cat([part.log_prob for part in parts]),
            torch.cat([part.rank for part in parts]),
            torch.cat([part.entropy for part in parts]),
            torch.cat([part.top_words for part in parts]),
            torch.cat([part.top_log_prob for part in parts]),
            None,
        )


CONTESTANTS: tuple[type[Contestant], ...] = (Matmul, Gapprobe, Naive, ByLayer)


def _hidden(x: Float[Tensor, "l n d"], end: Unembedding) -> Float[Tensor, "l n d"]:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], end.gain, end.eps)
