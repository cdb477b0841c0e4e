"""One traced forward pass: the residual stream at chosen columns of every chosen layer, and the last logits.

Layer 0 is what the first block reads (embeddings with the image features merged), layer l what block l returns; all of
them before the final norm. Nothing is chosen or stored here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gapprobe.models.model import Model


@dataclass(frozen=True)
class Traced:
    """What leaves the trace: residuals by row, layer, column, in the model's dtype; logits of the last columns."""

    residual: Float[Tensor, "n l t d"]
    logits: Float[Tensor, "n k v"]


@torch.no_grad()
def trace(
    model: Model, inputs: dict[str, Tensor], columns: Int[Tensor, "n t"], layers: Sequence[int], last: int = 1
) -> Traced:
    """Run one forward pass and keep the residuals of `columns` (an index into the padded batch) after each of `layers`.

    Args:
        model: the model.
        inputs: what `Model.encode` returned.
        columns: for each row, which tokens to keep.
        layers: numbers from 0 to `model.n_layers`, rising.
        last: how many columns, counted from the end, to return logits of.
    """
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    wanted = frozenset(layers)
    # Without image the outer model of some families cannot run; its language model alone is the same function then.
    path = "" if "pixel_values" in inputs else model.family.generator
    entry = operator.attrgetter(path)(model.traced) if path else model.traced
    blocks = operator.attrgetter(model.family.blocks)(model.traced)
    head = operator.attrgetter(model.family.unembedding)(model.traced)
    # Indexing by rows and columns copies; a slice would be a view that keeps the whole batch alive.
    kept: list[Tensor] = []
    logits: list[Tensor] = []
    with entry.trace(**inputs, use_cache=False, logits_to_keep=last):
        if 0 in wanted:
            kept.append(blocks[0].input[rows, columns])
        for number, block in enumerate(blocks, start=1):
            if number in wanted:
                kept.append(_hidden(block.output)[rows, columns])
        logits.append(head.output)
    return Traced(torch.stack(kept, dim=1), logits[0])


def _hidden(output: Any) -> Tensor:
    """Return a block's hidden states; some versions of transformers return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output
