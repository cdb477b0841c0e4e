"""Cosine similarity, layer by layer, of rows of a store that belong together. The arithmetic is `kernels.cosine`.

Rows are read in blocks from the memory map, so memory does not grow with the store; what a layer gave is kept, if there
is a folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import xxhash
from jaxtyping import Float, Float64, Shaped
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gapprobe import stats
from gapprobe.errors import DataError, StoreError
from gapprobe.files import write_bytes
from gapprobe.kernels.cosine import apart, paired
from gapprobe.similarity import rows
from gapprobe.similarity.pairing import Pairs, by_key, listed, same_ids
from gapprobe.similarity.result import VARIANTS, CosineResult
from gapprobe.similarity.rows import Side
from gapprobe.store.columns import Column, aligned
from gapprobe.store.gather import Part
from gapprobe.store.moments import combine
from gapprobe.store.progress import Bar
from gapprobe.store.reader import Store

APART = 256  # pairs that the level of unrelated rows is taken from
DRAWN = 1 << 24  # bootstrap weights that are in memory at once
_LAYOUT = 2  # of the files that are kept; another layout, or other sums, are another name


@dataclass(frozen=True)
class _Sides:
    """The rows of both sides, and the stores they are read from, in `parts` of their shards."""

    stores: tuple[Store, Store]
    pairs: Pairs
    parts: tuple[list[Part], list[Part]]

    @classmethod
    def of(cls, left: Store, right: Store, pairs: Pairs) -> _Sides:
        return cls((left, right), pairs, (left.parts(pairs.left), right.parts(pairs.right)))

    @property
    def row_bytes(self) -> int:
        return max(each.header.width * each.header.torch_dtype.itemsize for each in self.stores)

    def open(self, layer: int, position: str) -> tuple[Side, Side]:
        """Map both sides at a layer and position; reads nothing."""
        left, right = (
            Side(each.mapped(layer, position, parts)) for each, parts in zip(self.stores, self.parts, strict=True)
        )
        return left, right


def cosine(
    store: Store,
    left: Sequence[str] | None = None,
    right: Sequence[str] | None = None,
    *,
    pair: tuple[str, str] | None = None,
    key: str | Sequence[str] | None = None,
    setting: str = "setting",
    other: Store | None = None,
    by: Column | None = None,
    clusters: tuple[Column, Column] | Column | None = None,
    position: str | Sequence[str] = "last_input",
    layers: Sequence[int] | Literal["all"] = "all",
    replicates: int = 1000,
    seed: int = 0,
    folder: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = False,
) -> CosineResult:
    """Compare rows that belong together at every layer, such as a visual row with its full-information row.

    Source: arXiv 2508.18297, similarity of hidden states (raw); the centred and the standardised variant stand beside
    it. Pairs are given by two lists of ids, or by `pair` and `key`, or, of two stores, by rows of the same id.

    Args:
        store: activations.
        left: ids of rows.
        right: ids of rows, as many; of `other`, if there is one.
        pair: two values of the column `setting`, such as ("visual", "full_information"): rows that have them and the
            same key are a pair.
        key: column, or several, that tell pairs apart; `trial`, or `question` and `image`, where left out.
        setting: the column that `pair` is about.
        other: store of the right rows; the same one where left out.
        by: group of each pair: a column of the left rows, or a series by their ids.
        clusters: what pairs share, for the bootstrap: a column or series, or two that cross (question and image); each
            pair is its own cluster where left out.
        position: token whose residual is compared, or several.
        layers: layers to look at, or "all" that the store holds.
        replicates: of the bootstrap.
        seed: of the bootstrap.
        folder: what a layer gave is kept here; the same call goes on where it was stopped.
        jobs: layers at once, one core each; as many as there are cores where left out.
        progress: show a progress bar.

    Raises:
        DataError: before any residual is read, for no or unequal pairs, a key that is not one, a missing column, group
            or cluster.
        StoreError: a store lacks a row, position or layer, the stores differ in width, or a row has no token at a
            position.
    """
    right_store = store if other is None else other
    given = [left is not None or right is not None, pair is not None, other is not None]
    if given[0] and given[1] or not any(given):
        raise DataError("say which rows belong together: two lists of ids, or `pair`, or a store as `other`")
    if pair is not None:
        pairs = by_key(store, right_store, pair, key, setting)
    elif given[0]:
        pairs = listed(store, right_store, left or (), right or ())
    else:
        pairs = same_ids(store, right_store)
    sides = _Sides.of(store, right_store, pairs)
    chosen = tuple(store.header.layers) if layers == "all" else tuple(layers)
    positions = (position,) if isinstance(position, str) else tuple(position)
    _refuse(sides, chosen, positions)
    n = len(pairs.left)
    groups = np.full(n, "all") if by is None else _aligned(store, by, pairs, "by")
    kinds = clusters if isinstance(clusters, tuple) else (clusters, None)
    own, one = np.arange(n), np.zeros(n, np.int64)
    codes = [
        default if kind is None else _aligned(store, kind, pairs, "clusters")
        for kind, default in zip(kinds, (own, one), strict=True)
    ]
    found, level = _all_layers(sides, chosen, positions, folder, jobs, progress)
    table = _table(found, level, positions, chosen, groups, _draws(codes, replicates, seed))
    arrays = {v: a if len(positions) > 1 or not isinstance(position, str) else a[0] for v, a in found.items()}
    return CosineResult(
        layers=chosen,
        **arrays,
        positions=positions,
        left=pairs.left,
        right=pairs.right,
        groups=groups,
        lonely=pairs.lonely,
        table=table,
    )


def _aligned(store: Store, given: Column, pairs: Pairs, what: str) -> Shaped[np.ndarray, " n"]:
    return aligned(store.rows, given, pairs.left, what).to_numpy(dtype=str)


def _refuse(sides: _Sides, layers: Sequence[int], positions: Sequence[str]) -> None:
    """Raise StoreError where what is asked for is not in both stores."""
    left, right = sides.stores
    if left.header.width != right.header.width:
        raise StoreError(
            f"{left.path} is {left.header.width} wide and {right.path} is {right.header.width}: a cosine wants one "
            "width. Compare layers of different models by gp.cka."
        )
    if not layers or not positions:
        raise DataError("there is no layer or no position to compare at; name at least one of each")
    for store in sides.stores:
        for layer in layers:
            store.header.layer_index(layer, store.path)
        for position in positions:
            store.header.position_index(position, store.path)


def _all_layers(
    sides: _Sides,
    layers: Sequence[int],
    positions: Sequence[str],
    folder: str | Path | None,
    jobs: int | None,
    progress: bool,
) -> tuple[dict[str, Float[np.ndarray, "p l n"]], dict[str, Float[np.ndarray, "p l"]]]:
    """Return by variant the cosines, and the level of unrelated rows."""
    n = len(sides.pairs.left)
    found = {v: np.empty((len(positions), len(layers), n), np.float32) for v in VARIANTS}
    level = {v: np.empty((len(positions), len(layers))) for v in VARIANTS}
    threads = torch.get_num_threads()
    mark = _mark(sides) if folder is not None else ""

    def one(place: tuple[int, int]) -> None:
        torch.set_num_threads(1)
        at, p = place
        # Hashed: a store names its positions as it likes, and a name may lead out of the folder.
        named = xxhash.xxh3_64(positions[p].encode()).hexdigest()
        path = None if folder is None else Path(folder) / f"{mark}-{named}-{layers[at]}.safetensors"
        kept = None if path is None else _read(path, n)
        if kept is None:
            cosines, own = _layer(sides, layers[at], positions[p])
            kept = {"cosines": cosines, "apart": own}
            if path is not None:
                write_bytes(path, save(kept))
        bar.update(2 * n * sides.row_bytes)
        for i, v in enumerate(VARIANTS):
            found[v][p, at], level[v][p, at] = kept["cosines"][i], kept["apart"][i]

    # All positions of the first layer come first: what is wrong with one is found before the work.
    places = list(product(range(len(layers)), range(len(positions))))
    with Bar("cosine", len(places) * 2 * n * sides.row_bytes, progress) as bar:
        try:
            with ThreadPoolExecutor(jobs or threads) as pool:
                list(pool.map(one, places))
        finally:
            torch.set_num_threads(threads)
    return found, level


def _layer(sides: _Sides, layer: int, position: str) -> tuple[Float[np.ndarray, "3 n"], Float64[np.ndarray, " 3"]]:
    """Return the cosines of all pairs at one layer in every variant, and the level of unrelated rows."""
    n, width = len(sides.pairs.left), sides.stores[0].header.width
    left, right = sides.open(layer, position)
    centre = combine(chain(left.moments(), right.moments()), width)
    out = np.empty((len(VARIANTS), n), np.float32)
    step = max(1, rows.BLOCK // width)
    for block in (slice(start, start + step) for start in range(0, n, step)):
        cosines = paired(left.rows(block), right.rows(block), centre.mean, centre.std)
        for row, variant in zip(out, VARIANTS, strict=True):
            row[block] = getattr(cosines, variant).numpy()
    # At random: every second row of a table may well be one half of its design.
    some = np.sort(np.random.default_rng(0).permutation(n)[:APART])
    return out, apart(left.rows(some), right.rows(some), centre.mean, centre.std).numpy()


def _mark(sides: _Sides) -> str:
    """Return a hash of all that the numbers of a layer depend on."""
    hashed = xxhash.xxh3_128(repr((_LAYOUT, version("gapprobe"), sides.pairs.left, sides.pairs.right)).encode())
    for store in sides.stores:
        hashed.update(store.content.encode())
    return hashed.hexdigest()


def _read(path: Path, n: int) -> dict[str, np.ndarray] | None:
    """Return what is kept of a layer; a file that cannot be read, or holds something else, is made again."""
    try:
        found = load(path.read_bytes())
    except (SafetensorError, OSError):
        return None
    shapes = {name: array.shape for name, array in found.items()}
    return found if shapes == {"cosines": (len(VARIANTS), n), "apart": (len(VARIANTS),)} else None


def _draws(codes: Sequence[Shaped[np.ndarray, " n"]], replicates: int, seed: int) -> Iterator[Float[np.ndarray, "b n"]]:
    """Draw bootstrap weights, so many replicates at a time that memory does not grow with the rows."""
    step = max(1, DRAWN // len(codes[0]))
    for number, start in enumerate(range(0, replicates, step)):
        count = min(step, replicates - start)
        yield stats.crossed_weights(*codes, replicates=count, seed=seed + number)


def _table(
    found: dict[str, Float[np.ndarray, "p l n"]],
    level: dict[str, Float[np.ndarray, "p l"]],
    positions: Sequence[str],
    layers: Sequence[int],
    groups: Shaped[np.ndarray, " n"],
    draws: Iterator[Float[np.ndarray, "b n"]],
) -> pd.DataFrame:
    """Lay out the mean of every group by position, layer and variant, with its bootstrap interval."""
    # Groups lie one after another, so that each is a slice of the weights.
    order = np.argsort(groups, kind="stable")
    names, starts = np.unique(groups[order], return_index=True)
    parts = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(groups)], strict=True)]
    step = max(1, DRAWN // len(groups))
    rows = [
        values[i : i + step]
        for values in (found[v].reshape(-1, len(groups)) for v in VARIANTS)
        for i in range(0, len(values), step)
    ]

    def means(weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "g m b"]:
        weights = np.ascontiguousarray(weights[:, order])
        out: list[np.ndarray] = []
        for some in rows:
            values = some[:, order].astype(np.float64)
            there = ~np.isnan(values)
            values = np.where(there, values, 0.0)
            total = np.stack([values[:, own] @ weights[:, own].T for own in parts])
            count = np.stack([there[:, own].astype(np.float64) @ weights[:, own].T for own in parts])
            out.append(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
        return np.concatenate(out, axis=1)

    value = means(np.ones((1, len(groups))))[..., 0]
    again = np.concatenate([np.empty((*value.shape, 0)), *map(means, draws)], axis=2)
    lines: list[dict[str, object]] = []
    for i, (variant, p, at) in enumerate(product(VARIANTS, range(len(positions)), range(len(layers)))):
        for g, name in enumerate(names.tolist()):
            own = found[variant][p, at, order[parts[g]]]
            n = int((~np.isnan(own)).sum())
            e = stats.from_replicates(float(value[g, i]), again[g, i], n)
            lines.append(
                {
                    "position": positions[p],
                    "layer": layers[at],
                    "group": name,
                    "variant": variant,
                    "mean": e.value,
                    "ci_low": e.low,
                    "ci_high": e.high,
                    "n": n,
                    "left_out": len(own) - n,
                    "unrelated": float(level[variant][p, at]),
                }
            )
    return pd.DataFrame(lines)
