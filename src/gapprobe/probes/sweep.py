"""Every probe at every layer, under every split, target and strength, beside its controls.

`sweep_probes` reads a store; `sweep_layers` does the work on arrays. Fits are the probe's, folds `splits`'.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Shaped

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.files import free_memory
from gapprobe.probes.base import Probe, find_probe
from gapprobe.probes.controls import question_scores, shuffled_targets
from gapprobe.probes.fitting import Read, Source, View, fit_all
from gapprobe.probes.kept import Kept, Which
from gapprobe.probes.labels import binary, target_of
from gapprobe.probes.plan import Problems, choose
from gapprobe.probes.reading import Reading, contrasts
from gapprobe.probes.result import Cell, Key, ProbeSweep
from gapprobe.probes.room import Need
from gapprobe.probes.splits import NestedFolds, joint_folds, nested_folds
from gapprobe.probes.tables import areas_by_layer, areas_by_strength
from gapprobe.probes.verdict import judge
from gapprobe.store.columns import Column, aligned
from gapprobe.store.reader import Store

Control = Literal["shuffled", "question_only", "layer_0", "random_projection", "random_model"]
CONTROLS: tuple[Control, ...] = ("shuffled", "question_only", "layer_0")
Labels = Shaped[np.ndarray, " n"]
Split = pd.Series | str | tuple[pd.Series | str, pd.Series | str] | None
Groups = Labels | tuple[Labels, Labels] | None


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of a sweep besides their residuals, all in the order of `ids`.

    Attributes:
        ids: row ids.
        targets: labels to predict, by name.
        relation: relation that each row's question is about, for the control that sees only the question.
        entity: entity that it is about.
        question: cluster of the bootstrap: rows that share a question.
        image: the other cluster: rows that share an image.
        splits: for each split the group of each row, two such for a split by both jointly, or None to split by rows at
            random.
    """

    ids: tuple[str, ...]
    targets: Mapping[str, Bool[np.ndarray, " n"]]
    relation: Labels | None
    entity: Labels | None
    question: Labels
    image: Labels
    splits: Mapping[str, Groups]


def sweep_probes(
    store: Store,
    target: pd.Series | pd.DataFrame | str,
    *,
    position: str | Sequence[str] = "last_input",
    contrast: pd.Series | str | None = None,
    probe: str | Probe | Sequence[str | Probe] = "logistic",
    layers: Sequence[int] | Literal["all"] = "all",
    strengths: Sequence[float] | None = None,
    splits: Mapping[str, Split] | None = None,
    questions: pd.DataFrame | None = None,
    clusters: tuple[pd.Series, pd.Series] | pd.Series | str | None = None,
    controls: Sequence[Control] | None = None,
    random_model: Store | None = None,
    random_rows: Mapping[str, str] | pd.Series | None = None,
    dimensions: int = 32,
    folds: int | Literal["each"] = 5,
    permutations: int = 5,
    seed: int | Sequence[int] = 0,
    replicates: int = 1000,
    coefficients: bool = False,
    folder: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = False,
) -> ProbeSweep:
    """Fit probes at every layer, position, target, split and strength, and say whether to believe them.

    Source: arXiv 2508.18297, probe; with grouped splits, nested choice of layer and strength and controls, in place of
    random rows and the layer that is best on the test rows.

    Args:
        store: activations.
        target: label of each row to use, indexed by row id: a series, a table of several, or a column of `store.rows`.
        position: token whose residual the probe reads, or several positions; "mean(image)", "max(question)" or
            "last(all)" make one vector of many tokens, which probes such as "attention" need not have; see
            `tokens.Position`.
        contrast: id of the row that contrasts each row, by row id, or a column of `store.rows`: a row is read beside
            it, as features of twice the width, the row's own first. The probe "ccs" needs it.
        probe: by name (`gp.known_probes()`), or an instance; or several.
        layers: layers to sweep, or "all" that the store holds.
        strengths: for all probes; each probe's own where left out.
        splits: name of each split and the group of every row, indexed by id, or a column of `store.rows`; two of them
            for a split by both jointly, in which a held-out row shares neither with training; None splits by rows at
            random, which is also what happens without any.
        questions: columns `relation` and `entity`, indexed by id, for the question-only control.
        clusters: what rows share, for the bootstrap: question and image of every row, or one column; each row is its
            own cluster where left out.
        controls: which controls to run; where left out all that can be run, but for "random_projection".
        random_model: the same rows captured from the model with random weights, `gp.load_model(..., random_weights=0)`,
            for the control "random_model": what prompt, tokens and architecture give away without any training.
        random_rows: id of each row in `random_model`, by its id in `store`; the same where left out, as captures of the
            same examples have.
        dimensions: of "random_projection": the same probe on so many random directions of each layer. What it reads,
            any small random view of the layer gives away.
        folds: outer folds, the inner ones are as many, or as many as there are groups; "each" leaves out one group
            after the other.
        permutations: of the control with shuffled labels.
        seed: of folds, permutations, probes and bootstrap, or several to repeat everything.
        replicates: of the bootstrap.
        coefficients: hold the coefficients of linear probes in memory; see `Cell.coefficients`.
        folder: what is fitted is kept here, layer by layer, coefficients too; the same sweep goes on where it was
            stopped. Fits of probes with settings that cannot be told apart by their text, such as functions, are not.
        jobs: layers fitted at once, one core each; as many as there are cores where left out, fewer where memory holds
            fewer.
        progress: show a progress bar over layers.

    Raises:
        DataError: before any fit, for labels of one class, rows, columns or layers that the store lacks, a row without
            question, cluster or group, too few groups, a strength that is not above 0, a control that cannot be run, or
            more than memory holds; at its layer, for residuals that are NaN or infinite.
        ConfigError: no probe has that name.
        StoreError: before any fit, for a row without a token at `position`.
    """
    table = store.rows
    named = _named(target, table)
    ids = tuple(str(i) for i in named.index)
    lost = sorted(set(ids) - set(store.ids))
    if lost or len(set(ids)) < len(ids) or bool(named.isna().any(axis=None)):
        what = f"{len(lost)} rows that the store lacks, such as {lost[0]}" if lost else "repeated ids or missing labels"
        raise DataError(f"the target has {what}; give one label for each row of the store that you want probed")
    if controls is None:
        wanted = {"question_only": questions is not None, "layer_0": 0 in store.header.layers}
        wanted |= {"random_projection": False, "random_model": random_model is not None}
        controls = [control for control in get_args(Control) if wanted.get(control, True)]
    if unknown := sorted(set(controls) - set(get_args(Control))):
        raise DataError(f"there is no control {unknown[0]!r}; there are {', '.join(get_args(Control))}")
    known = store.header.layers
    chosen = tuple(known) if layers == "all" else tuple(layers)
    if absent := sorted({*chosen, *((0,) if "layer_0" in controls else ())} - set(known)):
        raise DataError(f"the store holds layers {list(known)}, not {absent}: choose others, or leave out the control")
    if "question_only" in controls and questions is None:
        raise DataError("the control question_only needs `questions`: relation and entity of every row")
    if "random_model" in controls and random_model is None:
        raise DataError("the control random_model needs `random_model`: a store of the model with random weights")
    positions = [position] if isinstance(position, str) else list(position)
    probes = [probe] if isinstance(probe, str) or not isinstance(probe, Sequence) else list(probe)
    beside = None if contrast is None else contrasts(table, contrast, ids)
    reading = Reading(store, positions, ids, beside)
    reading.refuse([find_probe(probe) for probe in probes])
    source, random = _source(store, reading, ids, beside, folder), None
    if random_model is not None and "random_model" in controls:
        there = _random_ids(store, random_model, ids, random_rows, chosen)
        opposite = None if beside is None else _random_ids(store, random_model, beside, random_rows, chosen)
        random = _source(random_model, Reading(random_model, positions, there, opposite), there, opposite, folder)

    def column(given: Column, name: str) -> np.ndarray:
        return aligned(table, given, ids, name).to_numpy(dtype=str)

    pair = clusters if isinstance(clusters, tuple) else (clusters, None)
    own, one = np.array(ids), np.zeros(len(ids), dtype=np.int64)
    rows = Rows(
        ids=ids,
        targets={str(name): binary(labels) for name, labels in named.items()},
        relation=None if questions is None else column(questions["relation"], "relation"),
        entity=None if questions is None else column(questions["entity"], "entity"),
        question=own if pair[0] is None else column(pair[0], "clusters" if pair[1] is None else "question cluster"),
        image=one if pair[1] is None else column(pair[1], "image cluster"),
        splits={
            name: _groups(s, lambda given, name=name: column(given, f"groups of split {name}"))
            for name, s in (splits or {"random": None}).items()
        },
    )
    return sweep_layers(
        source.read,
        rows,
        chosen,
        positions=positions,
        probes=probes,
        strengths=strengths,
        seeds=[seed] if isinstance(seed, int) else list(seed),
        controls=controls,
        random=random,
        dimensions=dimensions,
        folds=folds,
        permutations=permutations,
        replicates=replicates,
        coefficients=coefficients,
        kept=source.kept,
        width=reading.width,
        vectors=reading.vectors,
        jobs=jobs,
        progress=progress,
    )


def sweep_layers(
    read: Read,
    rows: Rows,
    layers: Sequence[int],
    *,
    positions: Sequence[str] = ("x",),
    probes: Sequence[str | Probe] = ("logistic",),
    strengths: Sequence[float] | None = None,
    seeds: Sequence[int],
    controls: Sequence[Control] = CONTROLS,
    random: Source | None = None,
    dimensions: int = 32,
    folds: int | Literal["each"] = 5,
    permutations: int = 5,
    replicates: int = 1000,
    coefficients: bool = False,
    kept: Kept | None = None,
    width: int | None = None,
    vectors: int | None = None,
    jobs: int | None = None,
    progress: bool = False,
) -> ProbeSweep:
    """Do the work of `sweep_probes` on arrays; `read` returns residuals in the order of `rows.ids`.

    Where their `width` is told, memory is planned for; `vectors` is how many residuals a layer has, if not one a row.

    Raises:
        DataError: labels of one class, too few groups, a strength that is not above 0, a random projection to too many
            dimensions, more than memory holds, or residuals that are NaN or infinite.
    """
    if "random_projection" in controls and not 0 < dimensions < (width or dimensions + 1):
        raise DataError(f"a random projection of {width} features has 1 to {(width or 2) - 1} dimensions: {dimensions}")
    for name, target in rows.targets.items():
        if target.all() or not target.any():
            told = f"all {len(target)} labels are {bool(target.any())}: a probe needs both classes"
            raise DataError(told if len(rows.targets) == 1 else f"target {name}: {told}")
    given = [find_probe(probe) for probe in probes]
    found = {probe.name: probe for probe in given}
    if len(found) < len(given):
        raise DataError(f"two probes of {[probe.name for probe in given]} have one name, so their numbers would mix")
    swept = {name: tuple(float(s) for s in strengths or probe.strengths) for name, probe in found.items()}
    if permutations < 0:
        raise DataError(f"permutations must not be negative, got {permutations}")
    if bad := [s for own in swept.values() for s in own if not s > 0]:
        raise DataError(f"strengths must be above 0, got {bad[0]}")
    runs = permutations if "shuffled" in controls else 0
    problems: dict[Which, Problems] = {}
    for target, (split, groups), seed in product(rows.targets, rows.splits.items(), seeds):
        cut = _cut(groups, rows.targets[target], folds, seed, split)
        own_seed = zlib.crc32(f"{seed} {split}".encode())
        shuffled = shuffled_targets(rows.targets[target], cut.outer, runs, own_seed)
        problems[target, split, seed] = Problems.of(cut, rows.targets[target], shuffled)

    source, plain = Source(read, rows.ids, kept), {which: split.unshuffled() for which, split in problems.items()}
    everywhere = tuple(dict.fromkeys((*layers, 0) if "layer_0" in controls else layers))
    views = {"probe": View(source, everywhere, problems, linear=coefficients)}
    if "random_projection" in controls:
        views["random_projection"] = View(source, layers, plain, dimensions)
    if "random_model" in controls and random is not None:
        views["random_model"] = View(random, layers, plain)
    jobs = jobs or torch.get_num_threads()
    if width is not None:
        room = max(int(getattr(probe, "room", 0)) for probe in given)
        need = Need.of(views, len(positions), swept, room, width, replicates, vectors)
        jobs = need.jobs(jobs, free_memory())
    held_out = fit_all(views, positions, found, swept, jobs, progress)
    lines: list[pd.DataFrame] = []
    areas: list[pd.DataFrame] = []
    cells: dict[Key, Cell] = {}
    weights = {
        seed: stats.crossed_weights(rows.question, rows.image, replicates=replicates, seed=seed) for seed in seeds
    }
    asked: dict[Which, np.ndarray] = {}
    if "question_only" in controls and rows.relation is not None and rows.entity is not None:
        for which, split in problems.items():
            asked[which] = question_scores(rows.relation, rows.entity, split.target, split.cut)
    for position, name, which in product(positions, found, problems):
        target, split_name, seed = which
        split = problems[which]
        key = Key(position, name, target, split_name, seed)
        by_view = {view: {layer: held_out[view, position, layer, name, which] for layer in layers} for view in views}
        by_layer = by_view.pop("probe")
        constant: dict[str, np.ndarray] = {}
        if which in asked:
            constant["question_only"] = asked[which]
        if "layer_0" in controls:
            first = held_out["probe", position, 0, name, which]
            constant["layer_0"] = choose({0: first}, swept[name], split.cut).scores
        of_views = {view: choose(held, swept[name], split.cut).scores for view, held in by_view.items()}
        nested = choose(by_layer, swept[name], split.cut)
        verdict = judge(split_name, split, nested, constant | of_views, weights[seed])
        scores = np.stack([by_layer[layer].scores for layer in layers])
        linear = {layer: held.linear for layer, held in by_layer.items() if held.linear is not None}
        cells[key] = Cell(key, tuple(layers), swept[name], split, scores, nested, verdict, constant | of_views, linear)
        own = areas_by_layer(split, by_layer, swept[name], constant, by_view, weights[seed], found[name].calibrated)
        lines.append(own.assign(**vars(key)))
        areas.append(areas_by_strength(split, by_layer, swept[name]).assign(**vars(key)))
    about = ["position", "probe", "target", "split", "seed"]
    table, areas_table = pd.concat(lines, ignore_index=True), pd.concat(areas, ignore_index=True)
    return ProbeSweep(
        table=table[[*about, *(c for c in table.columns if c not in about)]],
        strengths=areas_table[[*about, *(c for c in areas_table.columns if c not in about)]],
        ids=rows.ids,
        cells=cells,
    )


def _source(
    store: Store, reading: Reading, ids: Sequence[str], contrast: Sequence[str] | None, folder: str | Path | None
) -> Source:
    content = store.content if contrast is None else f"{store.content} {tuple(contrast)}"
    return Source(reading, ids, None if folder is None else Kept(Path(folder), content))


def _random_ids(
    store: Store,
    random: Store,
    ids: Sequence[str],
    given: Mapping[str, str] | pd.Series | None,
    layers: Sequence[int],
) -> tuple[str, ...]:
    """Return the ids of the rows in the store of the model with random weights.

    Raises:
        DataError: it is of the same model, or lacks a row or layer.
    """
    if random.header.fingerprint == store.header.fingerprint:
        raise DataError(
            f"random_model: {random.path} is of the same model as {store.path}; capture its rows anew from "
            "gp.load_model(..., random_weights=0), or import them under the name of another model"
        )
    named = dict(zip(ids, ids, strict=True)) if given is None else {str(own): str(of) for own, of in given.items()}
    there = set(random.ids)
    if lost := [i for i in ids if named.get(i) not in there]:
        raise DataError(
            f"random_model: {random.path} lacks {len(lost)} of {len(ids)} rows, such as {lost[0]}; capture the same "
            "examples in the same way, or say in random_rows which is which"
        )
    has = random.header.layers
    if absent := [str(layer) for layer in layers if layer not in has]:
        raise DataError(f"random_model: {random.path} lacks layers {', '.join(absent)}; it has {list(has)}")
    return tuple(named[i] for i in ids)


def _groups(given: Split, column: Callable[[pd.Series | str], np.ndarray]) -> Groups:
    if isinstance(given, tuple):
        return column(given[0]), column(given[1])
    return None if given is None else column(given)


def _cut(
    groups: Groups, target: Bool[np.ndarray, " n"], folds: int | Literal["each"], seed: int, name: str
) -> NestedFolds:
    if not isinstance(groups, tuple):
        return nested_folds(groups, target, folds=folds, seed=seed, name=name)
    if folds == "each":
        raise DataError(f"split by {name}: one group after the other can be left out of one kind of groups only")
    return joint_folds(*groups, target, folds=folds, seed=seed, name=name)


def _named(target: pd.Series | pd.DataFrame | str, table: pd.DataFrame) -> pd.DataFrame:
    if isinstance(target, pd.DataFrame):
        return target
    target = target_of(table, target)
    return target.to_frame(str(target.name) if target.name is not None else "target")
