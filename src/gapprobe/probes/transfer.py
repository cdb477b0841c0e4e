"""Does a probe carry over? Fitted on some sets of rows, judged on another: data left out, or another model's rows.

Source: arXiv 2508.18297, out of domain: train on all sets but one, test on that one. Here layer and strength are chosen
on training rows alone, and no question (or what else rows share) is on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.kernels import logistic
from gapprobe.probes.alignment import Alignment, shared_maps
from gapprobe.probes.labels import binary, target_of
from gapprobe.probes.splits import nested_folds
from gapprobe.store.columns import Column, aligned
from gapprobe.store.reader import Store

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class TransferSet:
    """Rows of one store that a probe learns from or is judged on.

    Attributes:
        store: activations.
        target: what is foreseen, by row id or a column; rows without a value are left out.
        groups: what must not be on both sides, by row id or a column: the question, or the entity.
        position: the token that is read.
        clusters: what rows share besides `groups`, for the bootstrap: the image.
    """

    store: Store
    target: Column
    groups: Column
    position: str = "last_input"
    clusters: Column | None = None


@dataclass(frozen=True)
class Transfer:
    """How probes do on sets that they were not fitted on.

    Attributes:
        table: a row for each pair and layer: `train` (names joined by " + "), `test`, `layer`, `auc` on the test set,
            `ci_low`, `ci_high`, `inner_auc` (of the training rows, held out in turn), `strength`, `n`, `positives`;
            where a pair has several folds, strength and inner_auc are their means, geometric for strength. With an
            alignment, `agreement` too: how far the anchors' shared coordinates are one, from 1 over the number of sets
            (nothing in common) to 1, on the anchors themselves.
        best: a row for each pair, with layer and strength chosen on training rows alone: `train`, `test`, `layers` (one
            a fold), `auc`, `ci_low`, `ci_high`, `accuracy` at even odds, `majority` (of always saying the commoner
            class), `shared`: groups that both sides have, each left out of training where it is tested.
        scores: a row for each pair and judged row: `train`, `test`, `row` (its id), `log_odds` by the fit that `best`
            tells of, `right`.
    """

    table: pd.DataFrame
    best: pd.DataFrame
    scores: pd.DataFrame


@dataclass(frozen=True)
class _Rows:
    ids: tuple[str, ...]
    target: Bool[np.ndarray, " n"]
    groups: Shaped[np.ndarray, " n"]
    clusters: Shaped[np.ndarray, " n"] | None


@dataclass(frozen=True)
class _Unit:
    """One fold of one pair: which rows of all sets, one behind the other, are learnt from and judged."""

    pair: int
    train: Bool[np.ndarray, " n"]
    test: Bool[np.ndarray, " n"]
    inner: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class _Fitted:
    """All fits: areas on training rows held out in turn, and the log-odds of all rows."""

    layers: Sequence[int]
    strengths: Sequence[float]
    units: Sequence[_Unit]
    inner: Float[np.ndarray, "l s u"]
    scores: Float[np.ndarray, "l s u n"]
    target: Bool[np.ndarray, " n"]
    groups: Shaped[np.ndarray, " n"]


def transfer_probes(
    sets: Mapping[str, TransferSet],
    *,
    pairs: Sequence[tuple[Sequence[str], str]] | None = None,
    layers: Sequence[int] | None = None,
    alignment: Alignment | None = None,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 5,
    seed: int = 0,
    replicates: int = 1000,
    progress: bool = False,
) -> Transfer:
    """Fit logistic probes (standardised, L2, balanced) on some sets and judge them on another, at every layer.

    Every layer's fits, of all pairs, folds and strengths, are made at once. Where the two sides of a pair share groups
    (two models asked the same questions), groups are cut into folds: those that are judged are left out of training.

    Args:
        sets: by name.
        pairs: sets to learn from, and the one to judge on; every set left out in turn by default.
        layers: those that all stores have by default; with an alignment, those of the first set.
        alignment: rows that show all models the same input, for models of different widths: probes read coordinates
            that they share. A layer of the first set is read beside the nearest of each other by relative depth; one
            at which all anchors of a set are alike (embeddings of one token) is left out.
        strengths: inverse strengths (scikit-learn's C) to choose from.
        folds: inner folds, and outer ones where groups are shared.
        seed: of folds and bootstrap.
        replicates: of the bootstrap.
        progress: show a progress bar over layers.

    Raises:
        ConfigError: an unknown set, no pairs, or a set that is judged on what it learns from.
        DataError: stores of other widths without an alignment, a layer that one lacks, anchors that are learnt from or
            judged, rows without groups, or training rows of one class.
    """
    pairs = [([a for a in sets if a != b], b) for b in sets] if pairs is None else pairs
    _check_pairs(sets, pairs, strengths)
    chosen = _common_layers(sets, layers) if alignment is None else _by_depth(sets, layers)
    rows = {name: _rows(name, part) for name, part in sets.items()}
    origin = np.concatenate([np.full(len(part.ids), i) for i, part in enumerate(rows.values())])
    if alignment is not None:
        _check_anchors(alignment, rows)
    target, groups = (np.concatenate([getattr(part, name) for part in rows.values()]) for name in ("target", "groups"))
    number = {name: i for i, name in enumerate(sets)}
    units: list[_Unit] = []
    for i, (learn, judge) in enumerate(pairs):
        sides = np.isin(origin, [number[name] for name in learn]), origin == number[judge]
        units += _units(i, *sides, target, groups, folds, seed)
    read: dict[int, tuple[Float[np.ndarray, "s u"], Float[np.ndarray, "s u n"]]] = {}
    agreement: dict[int, float] = {}
    for at in tqdm(chosen, desc="transfer", unit="layer", disable=not progress):
        parts = [_residuals(part, rows[name].ids, layer) for layer, (name, part) in zip(at, sets.items(), strict=True)]
        if alignment is not None:
            anchors = [
                _residuals(part, alignment.anchors[name], layer)
                for layer, (name, part) in zip(at, sets.items(), strict=True)
            ]
            if any(bool((x == x[0]).all()) for x in anchors):
                continue  # embeddings of one and the same token: there is nothing to align by
            maps, found = shared_maps(anchors, alignment.rank)
            agreement[at[0]] = float(found.mean())
            parts = [to_shared(x) for to_shared, x in zip(maps, parts, strict=True)]
        read[at[0]] = _fit(torch.cat(parts), target, units, strengths)
    if not read:
        raise DataError("the anchors of a set are all alike at every layer: no direction tells one from another")
    inner, scores = (np.stack(part) for part in zip(*read.values(), strict=True))
    fitted = _Fitted(list(read), strengths, units, inner, scores, target, groups)
    judged = [_judged(fitted, i, pair, rows[pair[1]], replicates, seed) for i, pair in enumerate(pairs)]
    table = pd.concat([table for table, _, _ in judged], ignore_index=True)
    scores = pd.concat([scores for _, _, scores in judged], ignore_index=True)
    if alignment is not None:
        table["agreement"] = table["layer"].map(agreement)
    return Transfer(table, pd.DataFrame([best for _, best, _ in judged]), scores)


def _check_pairs(
    sets: Mapping[str, TransferSet], pairs: Sequence[tuple[Sequence[str], str]], strengths: Sequence[float]
) -> None:
    if not pairs or any(not learn for learn, _ in pairs):
        raise ConfigError("a transfer needs at least two sets: one to learn from and one to judge on")
    for learn, judge in pairs:
        if unknown := [name for name in (*learn, judge) if name not in sets]:
            raise ConfigError(f"there is no set {unknown[0]!r}; there are {', '.join(sets)}")
        if judge in learn:
            raise ConfigError(f"{judge} is judged on what it learns from; gp.sweep_probes does that, in folds")
    if not strengths or min(strengths) <= 0:
        raise ConfigError(f"strengths must be numbers above 0, not {list(strengths)}")


def _common_layers(sets: Mapping[str, TransferSet], layers: Sequence[int] | None) -> list[list[int]]:
    """Return the layers to read, one a set, by place."""
    widths = {name: part.store.header.width for name, part in sets.items()}
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise DataError(f"a probe reads one width, and the stores are {told} wide; an alignment brings them together")
    held = [part.store.header.layers for part in sets.values()]
    common = [layer for layer in held[0] if all(layer in others for others in held)]
    lacking = [layer for layer in layers or () if layer not in common]
    if lacking or not common:
        raise DataError(f"not all stores have layer {lacking[0]}" if lacking else "the stores have no layer in common")
    return [[layer] * len(sets) for layer in layers or common]


def _by_depth(sets: Mapping[str, TransferSet], layers: Sequence[int] | None) -> list[list[int]]:
    """Return layers of the first set, each with the nearest of the others by its share of the way to the last."""
    held = [part.store.header.layers for part in sets.values()]
    if lacking := [layer for layer in layers or () if layer not in held[0]]:
        raise DataError(f"set {next(iter(sets))} has no layer {lacking[0]}")

    def nearest(depth: float, there: Sequence[int]) -> int:
        return min(there, key=lambda layer: (abs(layer / max(there[-1], 1) - depth), layer))

    return [
        [layer, *(nearest(layer / max(held[0][-1], 1), there) for there in held[1:])] for layer in layers or held[0]
    ]


def _check_anchors(alignment: Alignment, rows: Mapping[str, _Rows]) -> None:
    counts = {name: len(alignment.anchors.get(name, ())) for name in rows}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"an alignment needs the same inputs of all sets, in one order, and there are {told}")
    for name, part in rows.items():
        if used := sorted(set(alignment.anchors[name]) & set(part.ids)):
            raise DataError(f"anchor {used[0]} of set {name} is also learnt from or judged; align by other rows")


def _rows(name: str, part: TransferSet) -> _Rows:
    table = part.store.rows
    told = target_of(table, part.target).dropna()
    told = told.set_axis(told.index.map(str))
    ids = tuple(told.index)
    if not ids or not told.index.is_unique:
        raise DataError(f"set {name}: {'an id stands twice in its target' if ids else 'no row has a target'}")
    labels = binary(told)
    groups = aligned(table, part.groups, ids, f"groups of set {name}").to_numpy(dtype=str)
    if part.clusters is None:
        return _Rows(ids, labels, groups, None)
    clusters = aligned(table, part.clusters, ids, f"clusters of set {name}").to_numpy(dtype=str)
    return _Rows(ids, labels, groups, clusters)


def _residuals(part: TransferSet, ids: Sequence[str], layer: int) -> Float[Tensor, "n d"]:
    x = part.store.layer(layer, position=part.position, rows=ids).float()
    fine = torch.isfinite(x).all(1)
    if not bool(fine.all()):
        bad = ids[int((~fine).nonzero()[0])]
        raise DataError(f"layer {layer} of row {bad} is NaN or infinite at {part.position}; leave it out of the target")
    return x


def _units(
    pair: int,
    learn: Bool[np.ndarray, " n"],
    judge: Bool[np.ndarray, " n"],
    target: Bool[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"],
    folds: int,
    seed: int,
) -> list[_Unit]:
    shared = np.intersect1d(groups[learn], groups[judge])
    names = np.unique(groups[judge])
    fold_of = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % folds, strict=True))
    outer = np.array([fold_of.get(group, -1) for group in groups])
    found: list[_Unit] = []
    for fold in range(folds) if len(shared) else (None,):
        test = judge if fold is None else judge & (outer == fold)
        train = learn if fold is None else learn & (outer != fold)
        if not test.any():
            continue
        inner = np.full(len(target), -1)
        inner[train] = nested_folds(groups[train], target[train], folds=folds, seed=seed, name="groups").outer
        found.append(_Unit(pair, train, test, inner))
    return found


def _fit(
    x: Float[Tensor, "n d"], target: Bool[np.ndarray, " n"], units: Sequence[_Unit], strengths: Sequence[float]
) -> tuple[Float[np.ndarray, "s u"], Float[np.ndarray, "s u n"]]:
    """Return, for each strength and unit, the area on training rows held out in turn, and the log-odds of all rows."""
    masks: list[Bool[np.ndarray, " n"]] = []
    for unit in units:
        masks += [unit.train, *(unit.train & (unit.inner != fold) for fold in range(unit.inner.max() + 1))]
    mask = torch.from_numpy(np.stack(masks)).repeat(len(strengths), 1)
    labels = torch.from_numpy(target).expand(len(mask), -1)
    c = torch.tensor(strengths, dtype=torch.float64).repeat_interleave(len(masks))
    fits = logistic.fit(x, labels, logistic.balanced(labels, mask), c)
    logits = fits.logits(x).numpy().reshape(len(strengths), len(masks), -1)
    areas, whole = np.zeros((len(strengths), len(units))), np.zeros((len(strengths), len(units), len(target)))
    start = 0
    for u, unit in enumerate(units):
        held_out = unit.inner[unit.train]
        whole[:, u] = logits[:, start]
        for s in range(len(strengths)):
            mine = logits[s, start + 1 + held_out, np.flatnonzero(unit.train)]
            areas[s, u] = stats.auc(mine, target[unit.train], held_out)
        start += 2 + int(unit.inner.max())
    return areas, whole


def _judged(
    fitted: _Fitted, pair: int, names: tuple[Sequence[str], str], rows: _Rows, replicates: int, seed: int
) -> tuple[pd.DataFrame, dict[str, object], pd.DataFrame]:
    units, inner, strengths = fitted.units, fitted.inner, fitted.strengths
    mine = [u for u, unit in enumerate(units) if unit.pair == pair]
    judge = np.any([units[u].test for u in mine], axis=0)
    folds = np.zeros(len(judge), dtype=np.int64)
    for fold, u in enumerate(mine):
        folds[units[u].test] = fold
    right, strata = fitted.target[judge], folds[judge]
    second = np.zeros(len(right), dtype=np.int64) if rows.clusters is None else rows.clusters
    weights = stats.crossed_weights(rows.groups, second, replicates=replicates, seed=seed)
    named = {"train": " + ".join(names[0]), "test": names[1]}

    def stitched(choice: Mapping[int, tuple[int, int]]) -> Float[np.ndarray, " n"]:
        """Log-odds of the judged rows, each from its own fold's fit at the layer and strength chosen there."""
        out = np.zeros(len(judge))
        for u in mine:
            out[units[u].test] = fitted.scores[(*choice[u], u)][units[u].test]
        return out[judge]

    def area(scores: Float[np.ndarray, " n"]) -> dict[str, float]:
        found = stats.estimate(lambda w: stats.weighted_auc(scores, right, w, strata), weights)
        return {"auc": found.value, "ci_low": found.low, "ci_high": found.high}

    lines: list[dict[str, object]] = []
    for i, layer in enumerate(fitted.layers):
        choice = {u: (i, int(np.nanargmax(inner[i, :, u]))) for u in mine}
        means = {
            "inner_auc": float(np.mean([inner[(*choice[u], u)] for u in mine])),
            "strength": float(np.exp(np.mean([np.log(strengths[choice[u][1]]) for u in mine]))),
        }
        counts = {"n": len(right), "positives": int(right.sum())}
        lines.append({**named, "layer": layer, **area(stitched(choice)), **means, **counts})
    best = {u: divmod(int(np.nanargmax(inner[:, :, u])), len(strengths)) for u in mine}
    final = stitched(best)
    train = np.any([units[u].train for u in mine], axis=0)
    scores = pd.DataFrame({**named, "row": rows.ids, "log_odds": final, "right": right})
    best_line: dict[str, object] = {
        **named,
        "layers": [fitted.layers[best[u][0]] for u in mine],
        **area(final),
        "accuracy": float(((final > 0) == right).mean()),
        "majority": float(max(right.mean(), 1 - right.mean())),
        "shared": len(np.intersect1d(fitted.groups[train], fitted.groups[judge])),
    }
    return pd.DataFrame(lines), best_line, scores
