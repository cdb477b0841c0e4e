"""A lens over a store: at every layer and token how targets stand, the best words, entropy, distance from the end.

The arithmetic is `kernels.logit_lens`; what a layer's residuals are taken for is the lens'.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from tqdm import tqdm

from gapprobe.errors import ConfigError, DataError
from gapprobe.kernels.logit_lens import Unembedding, read
from gapprobe.lens.base import Lens, find_lens
from gapprobe.lens.end import end_of, hash_of
from gapprobe.lens.reading import LensReading, join, load_lens_reading
from gapprobe.store.columns import by_id
from gapprobe.store.reader import Store, TokenBatch

if TYPE_CHECKING:
    from gapprobe.models.model import Model

Targets = str | pd.Series | Int[np.ndarray, " n"] | Int[np.ndarray, "n q"] | None
BLOCK = 256 << 20  # bytes of residuals held at once, as they are stored


def logit_lens(
    store: Store,
    model: Model | Unembedding,
    targets: Targets = None,
    *,
    rows: Sequence[str] | None = None,
    position: str | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    lens: str | Lens = "logit",
    norm: bool = True,
    top_k: int = 10,
    divergence: bool | None = None,
    folder: str | Path | None = None,
    weights: str | None = None,
    progress: bool = False,
) -> LensReading:
    """Read words off the residual stream at every layer and token, in memory that does not depend on the vocabulary.

    Four conventions of arXiv 2508.18297 come from two choices: with the final norm at every layer (sound) or without
    (`norm=False`, as published), and targets that are the gold answer's first token (sound) or the token that the model
    generated first (as published). Residuals are those before the final norm, at the last layer too. What is read says
    in `label` which convention it is.

    Args:
        store: activations.
        model: the one that made them. Or its end alone (`model.unembedding()`); give `weights` to have it checked.
        targets: words whose log-probability and rank are wanted. "next": the token that follows in the row, at every
            token. "generated": the first token that the model generated. Or one for each row, as an array in the order
            of `rows`, a series by row id, or a column of `store.rows`: a token's number, several (an array [n q], a
            list), or an answer in words, of which the first token is taken. A negative number is none.
        rows: ids of rows; all where left out.
        position: read the token so marked of each row; all tokens where left out.
        layers: layers to look at, or "all" that the store holds.
        lens: by name (`known_lenses()`), or an instance, such as a `TunedLens`.
        norm: whether the final norm is applied.
        top_k: how many of the most probable words are kept, at most all.
        divergence: whether to keep KL(final || layer); where left out, if the store has the model's last layer. It
            costs one more layer where `layers` lacks the last.
        folder: what is read is kept here, block by block; the same call goes on where it was stopped.
        weights: fingerprint of the weights that an end alone comes from; must be the store's.
        progress: show a progress bar over tokens.

    Returns:
        One line a token, in the order of rows and of tokens within a row. A residual that is NaN or infinite has no
        reading: NaN, rank 0, word -1; `skipped` counts them.

    Raises:
        StoreError: the store was made by another model, or lacks a row, position or layer.
        DataError: targets of another length, or outside the vocabulary.
        ConfigError: no lens has that name, or one that keeps results has no fingerprint.
    """
    last, end, weights = end_of(model, store, weights)
    kind = find_lens(lens)
    _refuse_foreign(kind, weights, last)
    mark = getattr(kind, "fingerprint", None)
    if folder is not None and mark is None:
        raise ConfigError(
            f"the lens {kind.name!r} has no `fingerprint`, so kept results could be another lens'; add one, or leave "
            "`folder` out"
        )
    ids = list(store.ids if rows is None else rows)
    chosen = list(store.header.layers if layers == "all" else layers)
    for layer in chosen:
        store.header.layer_index(layer, store.path)
    if divergence is None:
        divergence = last in store.header.layers
    elif divergence:
        store.header.layer_index(last, store.path)
    if position is not None:
        store.header.position_index(position, store.path)
    wanted, told = _targets(store, model, targets, ids, position)
    v = len(end.weight)
    if wanted.size and int(wanted.max()) >= v:
        bad = int(np.flatnonzero((wanted >= v).any(1))[0])
        raise DataError(f"row {ids[bad]}: target {int(wanted[bad].max())} is no token, the vocabulary has {v}")
    if top_k < 0:
        raise DataError(f"top_k is {top_k}: ask for 0 words or more")
    top_k = min(top_k, v)
    head = end if norm else replace(end, norm="none", gain=None, shift=None)
    label = f"{kind.name} lens, {'final norm at every layer' if norm else 'no final norm'}"
    label += f", target: {told}" if told else ""
    about = [str(mark), label, str(chosen), str(position), str(top_k), str(divergence)]
    if folder is not None:
        about += [store.content, hash_of(end) if isinstance(model, Unembedding) else weights]

    read_layers = list(dict.fromkeys([*chosen, last])) if divergence else chosen
    parts: list[LensReading] = []
    with tqdm(total=len(ids), desc=f"{kind.name} lens", unit="row", disable=not progress) as bar:
        for block in _blocks(store, ids, len(read_layers), position):
            own_ids, own = ids[block], wanted[block]
            key = hashlib.sha256(json.dumps([about, own_ids, own.tolist()]).encode()).hexdigest()
            path = None if folder is None else Path(folder) / f"lens-{key[:32]}.safetensors"
            part = None if path is None else _kept(path)
            if part is None:
                batch = store.batch(own_ids, read_layers, position)
                part = _read(batch, kind, head, own, told, chosen, last, top_k, divergence, label)
                if path is not None:
                    part.save(path)
            parts.append(part)
            bar.update(len(own_ids))
    return join(parts)


def _refuse_foreign(lens: Lens, weights: str, last: int) -> None:
    """Raise DataError where a lens says that it was made for another model; see `Lens`."""
    made_for, leads_to = getattr(lens, "weights", ""), getattr(lens, "last", last)
    if made_for not in ("", weights):
        raise DataError(f"the {lens.name} lens was made for weights {made_for}, the store has {weights}")
    if leads_to != last:
        raise DataError(f"the {lens.name} lens leads to layer {leads_to}, the model's last is {last}")


def _kept(path: Path) -> LensReading | None:
    """Return what an earlier run left; None where there is nothing, or nothing that can be read."""
    if not path.exists():
        return None
    try:
        return load_lens_reading(path)
    except DataError:
        return None


def _blocks(store: Store, ids: Sequence[str], layers: int, position: str | None) -> list[slice]:
    """Cut rows so that their tokens, of middling length, fit into a block."""
    info = store.info()
    each = 1.0 if position is not None else max(1.0, info.tokens / max(1, info.rows))
    size = max(1, int(BLOCK / (each * layers * store.header.width * store.header.torch_dtype.itemsize)))
    return [slice(start, start + size) for start in range(0, max(1, len(ids)), size)]


def _read(
    batch: TokenBatch,
    lens: Lens,
    head: Unembedding,
    targets: Int[np.ndarray, "n q"],
    told: str,
    layers: Sequence[int],
    last: int,
    top_k: int,
    divergence: bool,
    label: str,
) -> LensReading:
    """Read all tokens of a batch at all layers."""
    counts = batch.offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    wanted = _following(batch, row)[:, None] if told == NEXT else torch.from_numpy(targets)[row]
    at = {layer: i for i, layer in enumerate(batch.layers)}
    fine = torch.isfinite(batch.residual).all(2)
    x = torch.stack([_clean(batch.residual[at[layer]], fine[at[layer]]) for layer in layers])
    final = _clean(batch.residual[at[last]], fine[at[last]]) if divergence else None
    for i, layer in enumerate(layers):
        if layer != last:
            x[i] = _translated(lens, x[i], layer)
    try:
        found = read(x, head, wanted, top_k=top_k, final=final)
    except ValueError as error:
        raise DataError(f"the {lens.name} lens cannot be read: {error}") from error
    own = fine[[at[layer] for layer in layers]]
    kl = None if found.kl is None else found.kl.where(own & fine[at[last]], torch.nan)
    return LensReading(
        layers=tuple(layers),
        label=label,
        ids=batch.ids,
        row=row.numpy(),
        token_ids=batch.token_ids.numpy(),
        token_positions=batch.token_positions.numpy(),
        token_roles=batch.token_roles.numpy(),
        targets=wanted.numpy(),
        log_prob=found.log_prob.where(own[..., None], torch.nan).numpy(),
        rank=found.rank.where(own[..., None], 0).numpy(),
        entropy=found.entropy.where(own, torch.nan).numpy(),
        top_words=found.top_words.where(own[..., None], -1).numpy(),
        top_log_prob=found.top_log_prob.where(own[..., None], torch.nan).numpy(),
        kl=None if kl is None else kl.numpy(),
    )


def _translated(lens: Lens, x: Float[Tensor, "t d"], layer: int) -> Float[Tensor, "t d"]:
    """Return what a lens makes of residuals; one's own may give anything."""
    found = cast(object, lens.translate(x, layer))  # whatever the annotation says
    if not isinstance(found, Tensor) or found.shape != x.shape or not bool(torch.isfinite(found).all()):
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"the {lens.name} lens gives {what} at layer {layer}, in place of finite numbers of shape {list(x.shape)}"
        )
    return found


def _clean(x: Tensor, fine: Tensor) -> Float[Tensor, "t d"]:
    return x.float().where(fine[:, None], 0.0)


NEXT, GENERATED, GIVEN, FIRST = "next token", "first generated token", "given tokens", "first token of the answer"


def _targets(
    store: Store, model: Model | Unembedding, targets: Targets, ids: Sequence[str], position: str | None
) -> tuple[Int64[np.ndarray, "n q"], str]:
    """Return the targets of every row, -1 for none, and what they are in words."""
    none = np.full((len(ids), 0), -1, dtype=np.int64)
    if targets is None:
        return none, ""
    if isinstance(targets, str):
        if targets == "next":
            if position is not None:
                raise DataError("the next token is a target of all tokens: leave `position` out")
            return np.full((len(ids), 1), -1, dtype=np.int64), NEXT
        if targets != "generated":
            if targets not in store.rows:
                told = "targets are 'next', 'generated', a column, or given row by row"
                raise DataError(f"{store.path} has no column {targets!r}; {told}")
            return _of_series(model, store.rows[targets], ids)
        if "answer_token_ids" not in store.rows:
            raise DataError(f"{store.path} keeps no generated tokens (column answer_token_ids): give targets")
        answers = store.rows["answer_token_ids"].reindex(list(ids))
        first = [int(answer[0]) if isinstance(answer, list | np.ndarray) and len(answer) else -1 for answer in answers]
        return np.array(first, dtype=np.int64)[:, None], GENERATED
    if isinstance(targets, pd.Series):
        return _of_series(model, targets, ids)
    if len(targets) != len(ids):
        raise DataError(f"{len(ids)} rows and {len(targets)} lines of targets: give one line a row")
    given = np.asarray(targets)
    if given.ndim not in (1, 2) or (given.size and given.dtype.kind not in "iu"):
        raise DataError(
            f"targets given row by row are numbers of tokens, [n] or [n q], not {given.dtype} of shape {given.shape}; "
            "answers in words go by row id, as a series"
        )
    given = given.astype(np.int64)
    return given if given.ndim == 2 else given[:, None], GIVEN


def _of_series(
    model: Model | Unembedding, targets: pd.Series, ids: Sequence[str]
) -> tuple[Int64[np.ndarray, "n q"], str]:
    values = by_id(targets, ids, "targets").tolist()
    if all(isinstance(value, str) for value in values):
        if isinstance(model, Unembedding):
            raise DataError("targets in words need the model, for its tokenizer; its end alone has none")
        tokens = {answer: model.first_token(answer) for answer in dict.fromkeys(cast(list[str], values))}
        return np.array([tokens[value] for value in values], dtype=np.int64).reshape(-1, 1), FIRST
    lines = [np.atleast_1d(np.asarray(value)) for value in values]
    odd = [i for i, line in enumerate(lines) if line.ndim != 1 or line.dtype.kind not in "iu"]
    if odd:
        raise DataError(
            f"row {ids[odd[0]]}: the target {values[odd[0]]!r:.80} is neither a token's number, nor a list of such"
        )
    out = np.full((len(lines), max((len(line) for line in lines), default=1)), -1, dtype=np.int64)
    for i, line in enumerate(lines):
        out[i, : len(line)] = line
    return out, GIVEN


def _following(batch: TokenBatch, row: Int64[Tensor, " t"]) -> Int64[Tensor, " t"]:
    """Return the token after each, -1 where the store does not have it."""
    if len(row) < 2:
        return torch.full_like(row, -1)
    follows = (row[1:] == row[:-1]) & (batch.token_positions[1:] == batch.token_positions[:-1] + 1)
    return torch.cat([batch.token_ids[1:].where(follows, -1), torch.full_like(row[:1], -1)])
