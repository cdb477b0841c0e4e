"""Every probe at every layer, under every split, target and strength, beside its controls.

`sweep_probes` reads a store; `sweep_layers` does the work on arrays. Fits are the probe's, folds `splits`'.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from scipy.special import stdtrit
from torch import Tensor
from tqdm import tqdm

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.probes.base import Probe, find_probe
from gapprobe.probes.controls import question_scores, shuffled_targets
from gapprobe.probes.kept import Kept, Which
from gapprobe.probes.labels import binary, column_of, target_of
from gapprobe.probes.plan import HeldOut, Nested, Problems, choose
from gapprobe.probes.splits import NestedFolds, joint_folds, nested_folds
from gapprobe.probes.verdict import Verdict, judge
from gapprobe.stats import Estimate
from gapprobe.store.reader import Store

if TYPE_CHECKING:
    import plotly.graph_objects as go

Control = Literal["shuffled", "question_only", "layer_0"]
CONTROLS: tuple[Control, ...] = ("shuffled", "question_only", "layer_0")
Labels = Shaped[np.ndarray, " n"]
Split = pd.Series | str | tuple[pd.Series | str, pd.Series | str] | None
Groups = Labels | tuple[Labels, Labels] | None
Read = Callable[[str, int], Float[Tensor, "n d"]]


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


@dataclass(frozen=True)
class Key:
    """What one cell of a sweep is about."""

    position: str
    probe: str
    target: str
    split: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One probe at all layers and strengths, for one position, target, split and seed.

    Attributes:
        key: which.
        layers: the layers swept.
        strengths: the strengths swept.
        problems: how the rows were cut, labels and shuffled labels.
        scores: out-of-fold scores; log-odds where the probe is calibrated.
        nested: scores of the probe whose layer and strength were chosen on training rows only.
        verdict: the nested probe against its best control.
    """

    key: Key
    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    problems: Problems
    scores: Float[np.ndarray, "l s n"]
    nested: Nested
    verdict: Verdict

    @property
    def folds(self) -> NestedFolds:
        """Return how the rows were cut."""
        return self.problems.cut

    @property
    def p_value(self) -> float:
        """Return the permutation p-value: how often shuffled labels do as well, the labels as they are counted too.

        Source: Ojala & Garriga 2010, eq. 1. With m permutations it cannot fall below 1 / (m + 1); NaN without any.
        """
        folds, shuffled = self.folds.outer, self.problems.shuffled
        if not len(shuffled):
            return math.nan
        runs = zip(self.nested.shuffled, shuffled, strict=True)
        as_good = sum(stats.auc(scores, labels, folds) >= self.verdict.probe.value for scores, labels in runs)
        return (1 + as_good) / (1 + len(shuffled))


@dataclass(frozen=True)
class ProbeSweep:
    """Every number of a sweep. Areas count pairs of rows held out by the same fold; see `stats.weighted_auc`.

    Attributes:
        table: one row for each position, probe, target, split, seed, kind ("probe" or a control) and layer, with auc,
            ci_low, ci_high, n, positives; for probes also strength (chosen most often on training rows), accuracy,
            balanced_accuracy, log_loss and ece (the last two where scores are log-odds). Controls that know no layer
            repeat their number at every layer. The interval of "shuffled" is where one more permutation is expected;
            all others are crossed bootstrap intervals with the fits as they are.
        strengths: area of every probe at every layer and strength, without intervals.
        ids: the rows, in the order of every array here.
        cells: what was computed, by key.
    """

    table: pd.DataFrame
    strengths: pd.DataFrame
    ids: tuple[str, ...]
    cells: Mapping[Key, Cell]

    def cell(self, **which: str | int) -> Cell:
        """Return the one cell that is about this, such as `split="entity"`; what the sweep has one of may be left out.

        Raises:
            DataError: no cell, or several.
        """
        found = [c for k, c in self.cells.items() if all(getattr(k, name) == value for name, value in which.items())]
        if len(found) == 1:
            return found[0]
        said = ", ".join(f"{name}={value!r}" for name, value in which.items()) or "nothing"
        names = ("position", "probe", "target", "split", "seed")
        there = {name: list(dict.fromkeys(getattr(key, name) for key in self.cells)) for name in names}
        told = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in there.items())
        raise DataError(f"{len(found)} cells of this sweep answer to {said}; it has {told}")

    def verdict(self, split: str) -> Verdict:
        """Return whether the probe beats its best control under `split`; see `cell` for sweeps of several probes."""
        return self.cell(split=split).verdict

    def best(self) -> pd.DataFrame:
        """Return one row a cell: the probe whose layer and strength were chosen on training rows only, and its rival.

        There is no other way to ask for the best: the layer that is best on the rows it is judged on flatters itself.
        """
        return pd.DataFrame(
            [
                {
                    **vars(key),
                    "layers": list(cell.nested.layers),
                    "strengths": list(cell.nested.strengths),
                    "auc": cell.verdict.probe.value,
                    "ci_low": cell.verdict.probe.low,
                    "ci_high": cell.verdict.probe.high,
                    "control": cell.verdict.control,
                    "control_auc": None if cell.verdict.control_auc is None else cell.verdict.control_auc.value,
                    "p_value": cell.p_value,
                    "beats": cell.verdict.beats,
                    "sentence": cell.verdict.sentence,
                }
                for key, cell in self.cells.items()
            ]
        )

    def plot(self) -> "go.Figure":
        """Draw the areas by layer, with intervals, beside the controls; a panel for each split.

        Raises:
            ConfigError: plotly is not installed.
        """
        from gapprobe.probes.plotting import area_by_layer

        return area_by_layer(self.table)


def sweep_probes(
    store: Store,
    target: pd.Series | pd.DataFrame | str,
    *,
    position: str | Sequence[str] = "last_input",
    probe: str | Probe | Sequence[str | Probe] = "logistic",
    layers: Sequence[int] | Literal["all"] = "all",
    strengths: Sequence[float] | None = None,
    splits: Mapping[str, Split] | None = None,
    questions: pd.DataFrame | None = None,
    clusters: tuple[pd.Series, pd.Series] | pd.Series | str | None = None,
    controls: Sequence[Control] | None = None,
    folds: int | Literal["each"] = 5,
    permutations: int = 5,
    seed: int | Sequence[int] = 0,
    replicates: int = 1000,
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
        position: token whose residual the probe reads, or several.
        probe: by name (`gp.known_probes()`), or an instance; or several.
        layers: layers to sweep, or "all" that the store holds.
        strengths: for all probes; each probe's own where left out.
        splits: name of each split and the group of every row, indexed by id, or a column of `store.rows`; two of them
            for a split by both jointly, in which a held-out row shares neither with training; None splits by rows at
            random, which is also what happens without any.
        questions: columns `relation` and `entity`, indexed by id, for the question-only control.
        clusters: what rows share, for the bootstrap: question and image of every row, or one column; each row is its
            own cluster where left out.
        controls: which controls to run; all that can be run where left out.
        folds: outer folds, the inner ones are as many, or as many as there are groups; "each" leaves out one group
            after the other.
        permutations: of the control with shuffled labels.
        seed: of folds, permutations, probes and bootstrap, or several to repeat everything.
        replicates: of the bootstrap.
        folder: what is fitted is kept here, layer by layer; the same sweep goes on where it was stopped. Fits of probes
            with settings that cannot be told apart by their text, such as functions, are not kept.
        jobs: layers fitted at once, one core each; as many as there are cores where left out.
        progress: show a progress bar over layers.

    Raises:
        DataError: before any fit, for labels of one class, rows, columns or layers that the store lacks, a row without
            question, cluster or group, too few groups, a strength that is not above 0; at its layer, for residuals
            that are NaN or infinite.
        ConfigError: no probe has that name.
        StoreError: a row without a residual at `position`.
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
        controls = [control for control in CONTROLS if wanted.get(control, True)]
    known = store.header.layers
    chosen = tuple(known) if layers == "all" else tuple(layers)
    if absent := sorted({*chosen, *((0,) if "layer_0" in controls else ())} - set(known)):
        raise DataError(f"the store holds layers {list(known)}, not {absent}: choose others, or leave out the control")
    if "question_only" in controls and questions is None:
        raise DataError("the control question_only needs `questions`: relation and entity of every row")

    def column(given: pd.Series | str, name: str) -> np.ndarray:
        given = column_of(table, given, name) if isinstance(given, str) else given
        if not given.index.is_unique:
            raise DataError(f"{name}: an id stands twice in its index; give one value a row")
        aligned = given.reindex(named.index)
        missing = [str(i) for i, absent in zip(aligned.index, aligned.isna(), strict=True) if absent]
        if missing:
            raise DataError(f"{name}: {len(missing)} rows have none, such as {missing[0]}; give every row one")
        return aligned.to_numpy(dtype=str)

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
    positions = [position] if isinstance(position, str) else list(position)
    return sweep_layers(
        lambda position, layer: store.layer(layer, position=position, rows=list(ids)),
        rows,
        chosen,
        positions=positions,
        probes=[probe] if isinstance(probe, str) or not isinstance(probe, Sequence) else list(probe),
        strengths=strengths,
        seeds=[seed] if isinstance(seed, int) else list(seed),
        controls=controls,
        folds=folds,
        permutations=permutations,
        replicates=replicates,
        kept=None if folder is None else Kept(Path(folder), store.header.fingerprint),
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
    folds: int | Literal["each"] = 5,
    permutations: int = 5,
    replicates: int = 1000,
    kept: Kept | None = None,
    jobs: int | None = None,
    progress: bool = False,
) -> ProbeSweep:
    """Do the work of `sweep_probes` on arrays; `read` returns residuals in the order of `rows.ids`.

    Raises:
        DataError: labels of one class, too few groups, a strength that is not above 0, or residuals that are NaN or
            infinite.
    """
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

    wanted = dict.fromkeys((*layers, 0) if "layer_0" in controls else layers)
    held_out = _fit_all(read, rows.ids, list(product(positions, wanted)), found, swept, problems, kept, jobs, progress)
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
        by_layer = {layer: held_out[position, layer, name, which] for layer in layers}
        baselines: dict[str, np.ndarray] = {}
        if which in asked:
            baselines["question_only"] = asked[which]
        if "layer_0" in controls:
            first = held_out[position, 0, name, which]
            baselines["layer_0"] = choose({0: first}, swept[name], split.cut).scores
        nested = choose(by_layer, swept[name], split.cut)
        verdict = judge(split_name, split, nested, baselines, weights[seed])
        scores = np.stack([by_layer[layer].scores for layer in layers])
        cells[key] = Cell(key, tuple(layers), swept[name], split, scores, nested, verdict)
        own = _table(split, by_layer, swept[name], baselines, weights[seed], found[name].calibrated)
        lines.append(own.assign(**vars(key)))
        areas.append(_areas(split, by_layer, swept[name]).assign(**vars(key)))
    about = ["position", "probe", "target", "split", "seed"]
    table, areas_table = pd.concat(lines, ignore_index=True), pd.concat(areas, ignore_index=True)
    return ProbeSweep(
        table=table[[*about, *(c for c in table.columns if c not in about)]],
        strengths=areas_table[[*about, *(c for c in areas_table.columns if c not in about)]],
        ids=rows.ids,
        cells=cells,
    )


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


Held = dict[tuple[str, int, str, Which], HeldOut]


def _fit_all(
    read: Read,
    ids: Sequence[str],
    places: Sequence[tuple[str, int]],
    probes: Mapping[str, Probe],
    strengths: Mapping[str, tuple[float, ...]],
    problems: Mapping[Which, Problems],
    kept: Kept | None,
    jobs: int | None,
    progress: bool,
) -> Held:
    """Fit all probes at all places, several layers at once; each thread has one core, which is what narrow fits use."""
    by_seed: dict[int, dict[Which, Problems]] = {}
    for which, split in problems.items():
        by_seed.setdefault(which[2], {})[which] = split
    batches = [(seed, own, _labels(own), _weights(own)) for seed, own in by_seed.items()]

    def fit(place: tuple[str, int]) -> Held:
        torch.set_num_threads(1)
        position, layer = place
        x: Tensor | None = None
        out: Held = {}
        for (name, probe), (seed, own, labels, weights) in product(probes.items(), batches):
            mark = kept and kept.mark(probe, strengths[name], labels, weights, ids, position, layer, seed)
            known = kept.load(mark, list(own)) if kept and mark else None
            if known is None:
                x = _finite(read(position, layer), position, layer, ids) if x is None else x
                try:
                    scores = _scores(probe, x, labels, weights, strengths[name], seed)
                except DataError as error:
                    raise DataError(f"layer {layer}, {name}: {error}") from error
                blocks = np.split(scores, np.cumsum([len(split.labels) for split in own.values()])[:-1])
                known = {which: own[which].held_out(s) for which, s in zip(own, blocks, strict=True)}
                if kept and mark:
                    kept.save(mark, known)
            out |= {(position, layer, name, which): held for which, held in known.items()}
        return out

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max_workers=jobs or threads) as pool:
            parts = tqdm(pool.map(fit, places), total=len(places), desc="probes", unit="layer", disable=not progress)
            return {key: held for part in parts for key, held in part.items()}
    finally:
        torch.set_num_threads(threads)


def _labels(problems: Mapping[Which, Problems]) -> Bool[Tensor, "p n"]:
    return torch.from_numpy(np.concatenate([split.labels for split in problems.values()]))


def _weights(problems: Mapping[Which, Problems]) -> Float[Tensor, "p n"]:
    return torch.cat([split.weights() for split in problems.values()])


def _scores(
    probe: Probe, x: Tensor, labels: Tensor, weights: Tensor, strengths: Sequence[float], seed: int
) -> Float[np.ndarray, "p s n"]:
    """Fit every problem at every strength in one call: they share X."""
    each = torch.tensor(strengths, dtype=torch.float64).repeat(len(labels))
    times = len(strengths)
    fits = probe.fit(x, labels.repeat_interleave(times, 0), weights.repeat_interleave(times, 0), each, seed)
    return fits.scores(x).numpy().reshape(len(labels), times, len(x))


def _finite(x: Tensor, position: str, layer: int, ids: Sequence[str]) -> Tensor:
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        bad = [ids[i] for i in torch.nonzero(~finite)[:, 0].tolist()]
        told = f"layer {layer}: {len(bad)} rows hold NaN or infinity at {position}, such as {bad[0]}; leave them out"
        raise DataError(told)
    return x


def _named(target: pd.Series | pd.DataFrame | str, table: pd.DataFrame) -> pd.DataFrame:
    if isinstance(target, pd.DataFrame):
        return target
    target = target_of(table, target)
    return target.to_frame(str(target.name) if target.name is not None else "target")


def _areas(split: Problems, by_layer: Mapping[int, HeldOut], strengths: Sequence[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            (layer, strength, stats.auc(scores, split.target, split.cut.outer))
            for layer, held_out in by_layer.items()
            for strength, scores in zip(strengths, held_out.scores, strict=True)
        ],
        columns=["layer", "strength", "auc"],
    )


def _table(
    split: Problems,
    by_layer: Mapping[int, HeldOut],
    strengths: tuple[float, ...],
    baselines: Mapping[str, Float[np.ndarray, " n"]],
    weights: Float[np.ndarray, "b n"],
    calibrated: bool,
) -> pd.DataFrame:
    """Lay out the areas of the probe and of every control, by layer, each with its interval."""
    folds, target = split.cut.outer, split.target

    def area(scores: np.ndarray) -> Estimate:
        return stats.estimate(lambda w: stats.weighted_auc(scores, target, w, folds), weights)

    constant = {kind: area(scores) for kind, scores in baselines.items()}
    lines: list[tuple[str, int, Estimate, dict[str, float]]] = []
    for layer, held_out in by_layer.items():
        own = choose({layer: held_out}, strengths, split.cut)
        values, counts = np.unique(own.strengths, return_counts=True)
        measures = {"strength": float(values[counts.argmax()]), **_measures(own.scores, target, calibrated)}
        lines.append(("probe", layer, area(own.scores), measures))
        if len(split.shuffled):
            runs = zip(own.shuffled, split.shuffled, strict=True)
            areas = np.array([stats.auc(scores, labels, folds) for scores, labels in runs])
            lines.append(("shuffled", layer, _next_run(areas, len(target)), {}))
        lines += [(kind, layer, estimate, {}) for kind, estimate in constant.items()]
    return pd.DataFrame(
        [
            {"kind": kind, "layer": layer, "auc": e.value, "ci_low": e.low, "ci_high": e.high, "n": e.n}
            | {"positives": int(target.sum())}
            | measures
            for kind, layer, e, measures in sorted(lines, key=lambda line: line[0] != "probe")
        ]
    )


def _measures(scores: Float[np.ndarray, " n"], target: Bool[np.ndarray, " n"], calibrated: bool) -> dict[str, float]:
    """Return what a threshold of 0 gives, and how well log-odds are calibrated (ten bins of equal width)."""
    right = (scores > 0) == target
    out = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float((right[target].mean() + right[~target].mean()) / 2),
    }
    if not calibrated:
        return out
    probability = (1.0 + np.tanh(scores / 2.0)) / 2.0
    bins = np.minimum((probability * 10).astype(int), 9)
    off = np.abs(np.bincount(bins, probability - target, minlength=10)).sum() / len(target)
    loss = float(np.logaddexp(0.0, np.where(target, -scores, scores)).mean())
    return out | {"log_loss": loss, "ece": float(off)}


def _next_run(areas: Float[np.ndarray, " m"], n: int) -> Estimate:
    """Mean over runs, with Student's prediction interval: one more run falls into it in 95 % of cases."""
    m = len(areas)
    centre = float(areas.mean())
    half = float(stdtrit(m - 1, 0.975)) * float(areas.std(ddof=1)) * math.sqrt(1 + 1 / m) if m > 1 else math.nan
    return Estimate(centre, max(0.0, centre - half), min(1.0, centre + half), n)
