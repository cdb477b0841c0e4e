"""Training a tuned lens from a store: no forward pass of the model, only its end.

Source: Belrose et al. 2023, arXiv 2303.08112, section 3: the translator of a layer minimises KL(final || layer), the
divergence of what it reads from what the model says. All layers share the final distributions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from tqdm import tqdm

from gapprobe.errors import DataError
from gapprobe.kernels.logit_lens import Unembedding, read
from gapprobe.lens.base import Lens, LogitLens
from gapprobe.lens.end import end_of
from gapprobe.lens.tuned import TunedLens
from gapprobe.store.batches import TokenBatches
from gapprobe.store.reader import Store

if TYPE_CHECKING:
    from gapprobe.models.model import Model

LOGITS = 1 << 25  # numbers of a part of a batch: 128 MB
WARM = 0.1  # share of the steps in which the rate rises


@dataclass(frozen=True)
class TrainedLens:
    """A lens, and how well it does on rows that it was not trained on.

    Attributes:
        lens: the lens.
        table: one line a layer: tokens held out, and their mean divergence KL(final || layer) in nats, read by the
            logit lens (`kl_logit`) and by the tuned one (`kl_tuned`).
        held_out: ids of the rows held out.
    """

    lens: TunedLens
    table: pd.DataFrame
    held_out: tuple[str, ...]


def train_tuned_lens(
    store: Store,
    model: Model | Unembedding,
    *,
    layers: Sequence[int] | Literal["all"] = "all",
    rows: Sequence[str] | None = None,
    held_out: float | Sequence[str] = 0.1,
    steps: int = 250,
    tokens: int = 4096,
    rate: float = 1e-3,
    decay: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> TrainedLens:
    """Train a translator for every layer, and say by how much it beats the logit lens on rows held out.

    Adam on standardised residuals, the rate rising over the first tenth of the steps and falling to 0 from there. Mean
    and spread are those of the first batch; they set the scale of the steps only, and are folded into the translators.
    The same store, settings and machine give the same lens.

    Args:
        store: activations with several tokens a row, the model's last layer among its layers.
        model: the one that made them, or its end alone; whose it is cannot be checked then.
        layers: layers to train, or "all" that the store holds; the last needs none.
        rows: ids of the rows to use; all where left out.
        held_out: share of the rows held out, or their ids: hold out whole groups where rows are alike.
        steps: of the optimiser.
        tokens: of a batch.
        rate: largest learning rate.
        decay: of the translator towards the identity, a step, times the rate.
        seed: of the order of rows and of which are held out.
        progress: show a progress bar over steps.

    Raises:
        StoreError: the store was made by another model, or lacks a layer or row.
        DataError: the last layer is not in the store, nothing is left to train on or held out, or a residual is not
            finite.
    """
    last, end, weights = end_of(model, store)
    known = store.header.layers
    chosen = [layer for layer in (known if layers == "all" else layers) if layer != last]
    if last not in known:
        raise DataError(f"{store.path} has layers to {known[-1]} only: training needs the model's last, {last}")
    if not chosen:
        raise DataError(f"no layer to train: the last, {last}, is read as it is")
    for layer in chosen:
        store.header.layer_index(layer, store.path)
    if steps < 1 or tokens < 1 or not rate > 0:
        raise DataError(f"steps, tokens and rate must be above 0, got {steps}, {tokens}, {rate}")
    train, test = _split(list(store.ids if rows is None else rows), held_out, seed)
    read_layers = [*chosen, last]
    batches = _batches(store, read_layers, train, tokens, seed)
    first = _finite(next(batches), read_layers)
    mean = first.mean(1, keepdim=True)[:-1]
    scale = first.std(1, keepdim=True, correction=0)[:-1]
    scale = torch.where(scale > 1e-6 * mean.abs(), scale, 1.0)
    spread = scale.square().mean(2, keepdim=True).sqrt()  # what a translator adds is of the residuals' own size

    d = store.header.width
    weight = torch.zeros(len(chosen), d, d, requires_grad=True)
    bias = torch.zeros(len(chosen), d, requires_grad=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    warm = max(1, round(WARM * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / warm) * (1.0 - max(0, step - warm) / max(1, steps - warm))
    )
    bar = tqdm(range(steps), desc="tuned lens", unit="step", disable=not progress)
    for step in bar:
        x = _finite(next(batches), read_layers) if step else first
        optimiser.zero_grad(set_to_none=False)
        loss = 0.0
        for part in x.split(max(1, LOGITS // len(end.weight)), dim=1):
            with torch.no_grad():
                final = torch.log_softmax(end.logits(part[-1]), 1)
            for i in range(len(chosen)):
                z = (part[i] - mean[i]) / scale[i]
                moved = part[i] + spread[i] * torch.addmm(bias[i], z, weight[i].T)
                read_out = torch.log_softmax(end.logits(moved), 1)
                gap = torch.nn.functional.kl_div(read_out, final, reduction="sum", log_target=True) / x.shape[1]
                gap.backward()
                loss += float(gap.detach())
        optimiser.step()
        schedule.step()
        bar.set_postfix(kl=f"{loss / len(chosen):.3f}")
    with torch.no_grad():
        folded = spread * weight / scale
        shift = (spread[:, 0] * bias) - torch.einsum("l a d, l d -> l a", folded, mean[:, 0])
    made_by = store.header.model.get("source", "")
    lens = TunedLens(tuple(chosen), folded, shift, last, made_by, weights)
    return TrainedLens(lens, _judged(store, end, lens, read_layers, test, tokens), tuple(test))


def _split(ids: list[str], held_out: float | Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    if isinstance(held_out, float | int):
        if not 0 < held_out < 1:
            raise DataError(f"held_out must be a share between 0 and 1, or ids of rows, got {held_out}")
        order = np.random.default_rng(seed).permutation(len(ids))
        apart = {ids[i] for i in order[: max(1, round(held_out * len(ids)))]}
    else:
        apart = set(held_out)
        if unknown := sorted(apart - set(ids)):
            raise DataError(f"{len(unknown)} rows to hold out are not among the rows, such as {unknown[0]}")
    train, test = [i for i in ids if i not in apart], [i for i in ids if i in apart]
    if not train or not test:
        raise DataError(f"{len(train)} rows to train on and {len(test)} held out: both need at least one")
    return train, test


def _batches(
    store: Store, layers: Sequence[int], rows: Sequence[str], tokens: int, seed: int
) -> Iterator[Float32[Tensor, "l t d"]]:
    """Yield batches for ever, epoch after epoch."""
    batches = TokenBatches(store, token_budget=tokens, layers=layers, rows=rows, seed=seed)
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        some = False
        for batch in batches:
            some = True
            yield batch.residual.float()
        if not some:
            raise DataError("the rows to train on have no tokens")
        epoch += 1


def _finite(x: Float[Tensor, "l t d"], layers: Sequence[int]) -> Float[Tensor, "l t d"]:
    fine = torch.isfinite(x).all(2)
    if not bool(fine.all()):
        layer = layers[int(torch.nonzero(~fine)[0, 0])]
        raise DataError(f"a residual of layer {layer} is NaN or infinite; `gapprobe store verify` says which rows")
    return x


def _judged(
    store: Store, end: Unembedding, lens: TunedLens, layers: Sequence[int], rows: Sequence[str], tokens: int
) -> pd.DataFrame:
    """Return the mean divergence of both lenses on rows held out."""
    kinds: dict[str, Lens] = {"kl_logit": LogitLens(), "kl_tuned": lens}
    sums = {name: np.zeros(len(lens.layers)) for name in kinds}
    count = 0
    for batch in TokenBatches(store, token_budget=tokens, layers=layers, rows=rows, seed=None):
        x = _finite(batch.residual.float(), layers)
        none = torch.empty(x.shape[1], 0, dtype=torch.int64)
        for name, kind in kinds.items():
            moved = torch.stack([kind.translate(part, layer) for part, layer in zip(x, lens.layers, strict=False)])
            found = read(moved, end, none, final=x[-1])
            sums[name] += cast(Tensor, found.kl).double().sum(1).numpy()  # there because `final` is
        count += x.shape[1]
    if not count:
        raise DataError("the rows held out have no tokens")
    means = {name: total / count for name, total in sums.items()}
    return pd.DataFrame({"layer": lens.layers, "tokens": count} | means)
