"""CKA of every layer with every other: of one store, of two positions, of two stores of the same rows.

The arithmetic is `kernels.cka`; rows are read in batches, so memory does not grow with the store.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from tqdm import tqdm

from gapprobe import drawing
from gapprobe.errors import DataError
from gapprobe.kernels.cka import gram, hsic, hsic_of_each
from gapprobe.similarity.pairing import listed, same_ids
from gapprobe.similarity.rows import Side
from gapprobe.store.reader import Store

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEAST = 4  # rows that the unbiased estimator wants


@dataclass(frozen=True)
class CkaResult:
    """CKA of layers with layers.

    Attributes:
        table: a row for each layer of the first side, a column for each of the second; NaN where a layer does not vary.
        n: rows behind each number.
        batches: of how many batches of rows the numbers are the mean.
        debiased: whether HSIC was the unbiased one.
        sides: what was compared with what, in words.
    """

    table: pd.DataFrame
    n: int
    batches: int
    debiased: bool
    sides: tuple[str, str]

    def plot(self) -> go.Figure:
        """Draw the table as a heatmap.

        Raises:
            ConfigError: plotly is not installed.
        """
        go = drawing.plotly()
        figure = go.Figure(
            go.Heatmap(
                z=self.table.to_numpy(),
                x=[str(layer) for layer in self.table.columns],
                y=[str(layer) for layer in self.table.index],
                zmin=0,
                zmax=1,
                colorscale="Viridis",
                colorbar={"title": "CKA"},
                hovertemplate="layer %{y} with layer %{x}: %{z:.3f}<extra></extra>",
            )
        )
        kind = "debiased" if self.debiased else "biased"
        figure.update_layout(
            template="plotly_white", title=f"Linear CKA, {kind}, {self.n:,} rows", width=640, height=560
        )
        figure.update_xaxes(title_text=f"layer, {html.escape(self.sides[1])}", type="category")
        figure.update_yaxes(title_text=f"layer, {html.escape(self.sides[0])}", type="category")
        return figure


def cka(
    store: Store,
    other: Store | None = None,
    *,
    position: str = "last_input",
    other_position: str | None = None,
    rows: Iterable[str] | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    other_layers: Sequence[int] | Literal["all"] = "all",
    debiased: bool = True,
    batch: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> CkaResult:
    """Compare whole layers: how alike are the geometries of the same rows at two layers, positions or models?

    Source: Kornblith et al. 2019 (arXiv 1905.00414), linear kernels. More rows than `batch` are cut at random into
    batches of about that size, over which HSIC is averaged (Nguyen et al. 2021, arXiv 2010.15327): only the
    unbiased estimator allows that. Widths may differ.

    Args:
        store: activations.
        other: of the second side, with rows of the same ids; the same store where left out.
        position: token whose residual is read.
        other_position: on the second side; the same where left out.
        rows: ids; all that both stores have where left out.
        layers: of the first side, or "all" that the store holds.
        other_layers: of the second side.
        debiased: the unbiased HSIC; the biased one goes to 1 as the width grows beyond the number of rows.
        batch: rows at once; memory is 8 bytes times its square for each layer.
        seed: of the cutting.
        progress: show a progress bar.

    Raises:
        DataError: fewer than four rows, or more than `batch` for the biased estimator; a residual that is NaN or
            infinite.
        StoreError: a store lacks a row, position or layer, or a row has no token at the position.
    """
    right = store if other is None else other
    if rows is not None:
        ids = list(rows)
        listed(store, right, ids, ids)
    else:
        ids = list(store.ids if other is None else same_ids(store, right).left)
    if len(ids) < LEAST or batch < LEAST:
        raise DataError(f"CKA of {len(ids)} rows in batches of {batch}: it wants at least {LEAST}")
    count = -(-len(ids) // batch)
    if len(ids) // count < LEAST:
        raise DataError(
            f"CKA of {len(ids)} rows in batches of {batch}: the smallest would have {len(ids) // count} rows, and "
            f"wants at least {LEAST}; raise `batch`"
        )
    if not debiased and len(ids) > batch:
        raise DataError(
            f"the biased CKA of {len(ids)} rows wants all of them at once, and batch is {batch}: raise `batch`, choose "
            "fewer `rows`, or use debiased=True"
        )
    places = (position, other_position or position)
    chosen: list[tuple[int, ...]] = [
        tuple(each.header.layers) if isinstance(wanted, str) else tuple(wanted)
        for each, wanted in ((store, layers), (right, other_layers))
    ]
    sides = [
        {layer: Side(each.mapped(layer, place, parts)) for layer in own}
        for each, place, own in zip((store, right), places, chosen, strict=True)
        for parts in [each.parts(ids)]
    ]
    same = right is store and places[0] == places[1] and chosen[0] == chosen[1]
    order = np.random.default_rng(seed).permutation(len(ids))
    cross = torch.zeros(len(chosen[0]), len(chosen[1]), dtype=torch.float64)
    own = [torch.zeros(len(layers), dtype=torch.float64) for layers in chosen]
    for some in tqdm(np.array_split(order, count), desc="CKA", unit="batch", disable=not progress):
        some = np.sort(some)
        first = _grams(sides[0], some, ids, debiased)
        second = first if same else _grams(sides[1], some, ids, debiased)
        cross += hsic(first, second, debiased=debiased)
        own[0] += hsic_of_each(first, debiased=debiased)
        own[1] += hsic_of_each(second, debiased=debiased)
    value = cross / torch.outer(*own).sqrt()
    value[~value.isfinite()] = torch.nan
    table = pd.DataFrame(value.numpy(), index=pd.Index(chosen[0], name="layer"), columns=pd.Index(chosen[1]))
    told = [f"{each.path.name} at {place}" for each, place in zip((store, right), places, strict=True)]
    return CkaResult(table, len(ids), count, debiased, (told[0], told[1]))


def _grams(
    sides: dict[int, Side], some: Int64[np.ndarray, " b"], ids: Sequence[str], debiased: bool
) -> Float64[Tensor, "l b b"]:
    """Return the grams of some rows at every layer.

    Raises:
        DataError: a residual is NaN or infinite.
    """
    out = torch.empty(len(sides), len(some), len(some), dtype=torch.float64)
    for into, (layer, side) in zip(out, sides.items(), strict=True):
        x = side.rows(some)
        bad = torch.nonzero(~x.isfinite().all(1))
        if len(bad):
            raise DataError(
                f"row {ids[some[int(bad[0])]]!r:.80} has NaN or an infinity at layer {layer} ({len(bad)} of "
                f"{len(some)} rows do): leave such rows out through `rows`"
            )
        into.copy_(gram(x, debiased=debiased))
    return out
