"""Cosine similarity, layer by layer, of rows of a store that belong together. The arithmetic is `kernels.cosine`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from gapprobe.errors import DataError
from gapprobe.kernels.cosine import common_centre, paired
from gapprobe.store.reader import Store


@dataclass(frozen=True)
class CosineResult:
    """Cosine of each pair at every layer.

    Attributes:
        layers: the layers looked at.
        raw: of the residuals as they are; inflated by the few huge dimensions that all rows share.
        centred: after the mean of all rows of both sides is taken off; NaN where nothing is left of a row, as at
            layer 0 when every prompt ends in the same token.
    """

    layers: tuple[int, ...]
    raw: Float[np.ndarray, "l n"]
    centred: Float[np.ndarray, "l n"]


def cosine(
    store: Store,
    left: Sequence[str],
    right: Sequence[str],
    *,
    position: str,
    layers: Sequence[int] | Literal["all"] = "all",
) -> CosineResult:
    """Compare row `left[i]` with row `right[i]` at every layer, such as a visual row with its full-information row.

    Source: arXiv 2508.18297, similarity of hidden states (raw); the centred variant stands beside it.

    Args:
        store: activations.
        left: ids of rows.
        right: ids of rows, as many.
        position: token whose residual is compared.
        layers: layers to look at, or "all" that the store holds.

    Raises:
        DataError: the two lists differ in length, or are empty.
        StoreError: the store lacks a row, position or layer.
    """
    if len(left) != len(right) or not left:
        raise DataError(f"{len(left)} rows on the left and {len(right)} on the right: cosine wants pairs, at least one")
    chosen = tuple(store.header.layers) if layers == "all" else tuple(layers)
    raw, centred = np.empty((len(chosen), len(left))), np.empty((len(chosen), len(left)))
    for i, layer in enumerate(chosen):
        a = store.layer(layer, position=position, rows=left)
        b = store.layer(layer, position=position, rows=right)
        raw[i] = paired(a, b).numpy()
        centred[i] = paired(a, b, common_centre(a, b)).numpy()
    return CosineResult(chosen, raw, centred)
