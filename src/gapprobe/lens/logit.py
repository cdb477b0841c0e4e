"""Logit lens over the layers of a store, for one target token a row. The arithmetic is `kernels.logit_lens`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from gapprobe.errors import DataError, StoreError
from gapprobe.kernels.logit_lens import Unembedding, token_standing
from gapprobe.store.reader import Store


@dataclass(frozen=True)
class LensResult:
    """How the target token stands at every layer.

    Attributes:
        layers: the layers looked at.
        normed: whether the final norm was applied at every layer (sound) or at none (as published).
        log_prob: natural log-probability of the target.
        rank: its rank, 1 = most probable.
    """

    layers: tuple[int, ...]
    normed: bool
    log_prob: Float[np.ndarray, "l n"]
    rank: Int[np.ndarray, "l n"]

    @property
    def probability(self) -> Float[np.ndarray, "l n"]:
        """Return the probability of the target."""
        return np.exp(self.log_prob)


def logit_lens(
    store: Store,
    unembedding: Unembedding,
    rows: Sequence[str],
    targets: Int[np.ndarray, " n"],
    *,
    position: str,
    weights: str,
    layers: Sequence[int] | Literal["all"] = "all",
    norm: bool = True,
) -> LensResult:
    """Read the target token's log-probability and rank off the residual stream at every layer.

    Four conventions of arXiv 2508.18297 come from two choices: with the final norm at every layer (sound) or without
    (`norm=False`, as published), and targets that are the gold answer's first token (sound) or the token that the model
    generated first (as published). Residuals are those before the final norm, at the last layer too.

    Args:
        store: activations.
        unembedding: the end of the model that made them.
        rows: ids of rows.
        targets: one token id a row.
        position: token whose residual is read.
        weights: fingerprint of the weights that `unembedding` comes from; must be the store's.
        layers: layers to look at, or "all" that the store holds.
        norm: whether the final norm is applied.

    Raises:
        StoreError: the store was made by another model, or lacks a row, position or layer.
        DataError: targets of another length, or outside the vocabulary.
    """
    made_by = store.header.model.get("weights")
    if made_by != weights:
        raise StoreError(
            f"the store's residuals come from weights {made_by}, the unembedding from weights {weights}: "
            "read it with the model that made it"
        )
    if len(targets) != len(rows):
        raise DataError(f"{len(rows)} rows and {len(targets)} target tokens: give one target a row")
    vocabulary = unembedding.weight.shape[0]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        bad = int(np.flatnonzero((targets < 0) | (targets >= vocabulary))[0])
        raise DataError(f"row {rows[bad]}: target {int(targets[bad])} is no token, the vocabulary has {vocabulary}")
    chosen = tuple(store.header.layers) if layers == "all" else tuple(layers)
    head = unembedding if norm else replace(unembedding, norm="none", gain=None, shift=None)
    wanted = torch.as_tensor(targets, dtype=torch.int64)
    standings = [token_standing(store.layer(layer, position=position, rows=rows), head, wanted) for layer in chosen]
    return LensResult(
        chosen,
        norm,
        np.stack([standing.log_prob.numpy() for standing in standings]),
        np.stack([standing.rank.numpy() for standing in standings]),
    )
