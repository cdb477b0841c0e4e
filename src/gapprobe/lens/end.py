"""The end of the decoder that belongs to a store."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import xxhash

from gapprobe.errors import StoreError
from gapprobe.kernels.logit_lens import Unembedding
from gapprobe.store.reader import Store

if TYPE_CHECKING:
    from gapprobe.models.model import Model


TENSORS = ("weight", "bias", "gain", "shift")


def hash_of(end: Unembedding) -> str:
    """Return a hash of an end's parts, by which what was computed with it is known."""
    digest = xxhash.xxh3_128(json.dumps([end.norm, end.eps, end.cap]).encode())
    for name in TENSORS:
        part = getattr(end, name)
        told = "none" if part is None else f"{tuple(part.shape)} {part.dtype}"
        digest.update(f"{name} {told}".encode())
        if part is not None:
            digest.update(memoryview(part.detach().cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def end_of(model: Model | Unembedding, store: Store, weights: str | None = None) -> tuple[int, Unembedding, str]:
    """Return the number of the model's last layer, its end, and the fingerprint of its weights.

    An end alone does not say whose it is: `weights` may, else it is taken for the store's; the store's highest layer is
    taken for the last.

    Raises:
        StoreError: the store was made by another model, or one of another width.
    """
    made_by = store.header.model.get("weights", "")
    if isinstance(model, Unembedding):
        last, end, weights = store.header.layers[-1], model, made_by if weights is None else weights
    else:
        last, end, weights = model.n_layers, model.unembedding(), model.weights_fingerprint
    if made_by != weights:
        raise StoreError(
            f"the store's residuals come from weights {made_by or 'that it does not name'}, the model has weights "
            f"{weights}: read it with the model that made it"
        )
    if end.weight.shape[1] != store.header.width:
        raise StoreError(
            f"the store's residuals are {store.header.width} wide, the unembedding {end.weight.shape[1]}: they belong "
            "to different models"
        )
    parts = {name: getattr(end, name) for name in TENSORS}
    # A model's parameters want gradients; nobody wants them here.
    return (
        last,
        replace(end, **{name: part if part is None else part.detach() for name, part in parts.items()}),
        weights,
    )
