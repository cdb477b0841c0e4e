"""One logistic probe a layer, under every split, beside its controls.

`sweep_probes` reads a store; `sweep_layers` does the work on arrays. Fits are the kernel's, folds `splits`'.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from tqdm import tqdm

from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.kernels import logistic
from gapprobe.probes.controls import PERMUTATIONS, STUDENT_T, question_scores, shuffled_targets
from gapprobe.probes.plan import HeldOut, Nested, Problems, choose_layers
from gapprobe.probes.splits import NestedFolds, nested_folds
from gapprobe.probes.verdict import Verdict, judge
from gapprobe.stats import Estimate
from gapprobe.store.reader import Store

Control = Literal["shuffled", "question_only", "layer_0"]
CONTROLS: tuple[Control, ...] = ("shuffled", "question_only", "layer_0")
Labels = Shaped[np.ndarray, " n"]


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of a sweep besides their residuals, all in the order of `ids`.

    Attributes:
        ids: row ids.
        target: labels to predict.
        relation: relation that each row's question is about.
        entity: entity that it is about.
        question: cluster of the bootstrap: rows that share a question.
        image: the other cluster: rows that share an image.
        splits: for each split the group of each row, or None to split by rows at random.
    """

    ids: tuple[str, ...]
    target: Bool[np.ndarray, " n"]
    relation: Labels
    entity: Labels
    question: Labels
    image: Labels
    splits: Mapping[str, Labels | None]


@dataclass(frozen=True)
class ProbeSweep:
    """Every number of a sweep. Areas count pairs of rows held out by the same fold; see `stats.weighted_auc`.

    Attributes:
        table: one row for each split, kind ("probe" or a control) and layer, with auc, ci_low, ci_high, n, positives.
            Controls that know no layer repeat their number at every layer. The interval of "shuffled" is where one more
            permutation is expected; all others are crossed bootstrap intervals with the fits as they are.
        ids: the rows, in the order of every array here.
        layers: the layers swept.
        scores: for each split the out-of-fold log-odds of the probes.
        nested: for each split the out-of-fold log-odds of the probe whose layer was chosen on training rows only.
        folds: for each split its folds, group count and one-class groups.
        verdicts: for each split the nested probe against its best control.
    """

    table: pd.DataFrame
    ids: tuple[str, ...]
    layers: tuple[int, ...]
    scores: Mapping[str, Float[np.ndarray, "l n"]]
    nested: Mapping[str, Nested]
    folds: Mapping[str, NestedFolds]
    verdicts: Mapping[str, Verdict]

    def verdict(self, split: str) -> Verdict:
        """Return whether the probe beats its best control under `split`.

        Raises:
            DataError: the sweep has no such split.
        """
        if split not in self.verdicts:
            raise DataError(f"no split {split!r} in this sweep; it has {', '.join(self.verdicts)}")
        return self.verdicts[split]


def sweep_probes(
    store: Store,
    target: pd.Series,
    *,
    position: str,
    splits: Mapping[str, pd.Series | None],
    questions: pd.DataFrame,
    clusters: tuple[pd.Series, pd.Series],
    seed: int,
    layers: Sequence[int] | Literal["all"] = "all",
    controls: Sequence[Control] = CONTROLS,
    folds: int = 5,
    c: float = 1.0,
    replicates: int = 1000,
    progress: bool = False,
) -> ProbeSweep:
    """Fit one probe a layer (standardised, L2 logistic, balanced classes) and say whether to believe it.

    Source: arXiv 2508.18297, probe; with grouped splits, nested choice of the layer and controls, in place of random
    rows and the layer that is best on the test rows.

    Args:
        store: activations.
        target: label of each row to use, indexed by row id.
        position: token whose residual the probe reads.
        splits: name of each split and the group of every row, indexed by id; None splits by rows at random.
        questions: columns `relation` and `entity`, indexed by id, for the question-only control.
        clusters: question and image of every row, indexed by id; the bootstrap resamples both.
        seed: of folds, permutations and bootstrap.
        layers: layers to sweep, or "all" that the store holds.
        controls: which controls to run.
        folds: outer folds; the inner ones are as many, or as many as there are groups.
        c: inverse strength of the penalty.
        replicates: of the bootstrap.
        progress: show a progress bar over layers.

    Raises:
        DataError: before any fit, for labels of one class, rows or layers that the store lacks, a row without
            question, cluster or group, too few groups; at its layer, for residuals that are NaN or infinite.
        StoreError: a row without a residual at `position`.
    """
    ids = tuple(str(i) for i in target.index)
    lost = sorted(set(ids) - set(store.ids))
    if lost or len(set(ids)) < len(ids) or bool(target.isna().any()):
        what = f"{len(lost)} rows that the store lacks, such as {lost[0]}" if lost else "repeated ids or missing labels"
        raise DataError(f"the target has {what}; give one label for each row of the store that you want probed")
    known = store.header.layers
    chosen = tuple(known) if layers == "all" else tuple(layers)
    if absent := sorted({*chosen, *((0,) if "layer_0" in controls else ())} - set(known)):
        raise DataError(f"the store holds layers {list(known)}, not {absent}: choose others, or leave out the control")

    def column(series: pd.Series, name: str) -> np.ndarray:
        if not series.index.is_unique:
            raise DataError(f"{name}: an id stands twice in its index; give one value a row")
        aligned = series.reindex(target.index)
        missing = [str(i) for i, absent in zip(aligned.index, aligned.isna(), strict=True) if absent]
        if missing:
            raise DataError(f"{name}: {len(missing)} rows have none, such as {missing[0]}; give every row one")
        return aligned.to_numpy(dtype=str)

    rows = Rows(
        ids=ids,
        target=target.to_numpy(dtype=bool, copy=True),
        relation=column(questions["relation"], "relation"),
        entity=column(questions["entity"], "entity"),
        question=column(clusters[0], "question cluster"),
        image=column(clusters[1], "image cluster"),
        splits={name: None if s is None else column(s, f"groups of split {name}") for name, s in splits.items()},
    )
    return sweep_layers(
        lambda layer: store.layer(layer, position=position, rows=list(ids)),
        rows,
        chosen,
        seed=seed,
        controls=controls,
        folds=folds,
        c=c,
        replicates=replicates,
        progress=progress,
    )


def sweep_layers(
    read: Callable[[int], Float[Tensor, "n d"]],
    rows: Rows,
    layers: Sequence[int],
    *,
    seed: int,
    controls: Sequence[Control] = CONTROLS,
    folds: int = 5,
    c: float = 1.0,
    replicates: int = 1000,
    progress: bool = False,
) -> ProbeSweep:
    """Do the work of `sweep_probes` on arrays; `read` returns a layer's residuals in the order of `rows.ids`.

    Raises:
        DataError: labels of one class, too few groups, or residuals that are NaN or infinite.
    """
    if rows.target.all() or not rows.target.any():
        raise DataError(f"all {len(rows.target)} labels are {bool(rows.target.any())}: a probe needs both classes")
    problems: dict[str, Problems] = {}
    for name, groups in rows.splits.items():
        cut = nested_folds(groups, rows.target, folds=folds, seed=seed, name=name)
        permutations = PERMUTATIONS if "shuffled" in controls else 0
        own_seed = zlib.crc32(f"{seed} {name}".encode())
        problems[name] = Problems.of(cut, rows.target, shuffled_targets(rows.target, cut.outer, permutations, own_seed))

    wanted = dict.fromkeys((*layers, 0) if "layer_0" in controls else layers)
    held_out = {layer: _fit_layer(read(layer), layer, rows.ids, problems, c) for layer in _shown(wanted, progress)}
    weights = stats.crossed_weights(rows.question, rows.image, replicates=replicates, seed=seed)
    tables: list[pd.DataFrame] = []
    nested: dict[str, Nested] = {}
    verdicts: dict[str, Verdict] = {}
    for name, split in problems.items():
        by_layer = {layer: held_out[layer][name] for layer in layers}
        baselines: dict[str, np.ndarray] = {}
        if "question_only" in controls:
            baselines["question_only"] = question_scores(rows.relation, rows.entity, rows.target, split.cut, c=c)
        if "layer_0" in controls:
            baselines["layer_0"] = held_out[0][name].scores
        nested[name] = choose_layers(by_layer, split.cut)
        verdicts[name] = judge(name, split, nested[name], baselines, weights)
        tables.append(_table(name, split, by_layer, baselines, weights))
    return ProbeSweep(
        table=pd.concat(tables, ignore_index=True),
        ids=rows.ids,
        layers=tuple(layers),
        scores={name: np.stack([held_out[layer][name].scores for layer in layers]) for name in problems},
        nested=nested,
        folds={name: split.cut for name, split in problems.items()},
        verdicts=verdicts,
    )


def _shown(layers: Iterable[int], progress: bool) -> Iterable[int]:
    return tqdm(list(layers), desc="probes", unit="layer", disable=not progress)


def _fit_layer(
    x: Float[Tensor, "n d"], layer: int, ids: Sequence[str], problems: Mapping[str, Problems], c: float
) -> dict[str, HeldOut]:
    """Fit the problems of all splits on one layer at once; return what each says about rows it did not see."""
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        bad = [ids[i] for i in torch.nonzero(~finite)[:, 0].tolist()]
        raise DataError(f"layer {layer}: {len(bad)} rows hold NaN or infinity, such as {bad[0]}; leave them out")
    labels = torch.from_numpy(np.concatenate([split.labels for split in problems.values()]))
    try:
        fits = logistic.fit(x, labels, torch.cat([split.weights() for split in problems.values()]), c)
    except logistic.NotConvergedError as error:
        raise DataError(f"layer {layer}: {error}") from error
    blocks = fits.logits(x).split([len(split.labels) for split in problems.values()])
    return {name: split.held_out(z.numpy()) for (name, split), z in zip(problems.items(), blocks, strict=True)}


def _table(
    name: str,
    split: Problems,
    by_layer: Mapping[int, HeldOut],
    baselines: Mapping[str, Float[np.ndarray, " n"]],
    weights: Float[np.ndarray, "b n"],
) -> pd.DataFrame:
    """Lay out the areas of the probe and of every control, by layer, each with its interval."""
    folds, target = split.cut.outer, split.target

    def area(scores: np.ndarray) -> Estimate:
        return stats.estimate(lambda w: stats.weighted_auc(scores, target, w, folds), weights)

    constant = {kind: area(scores) for kind, scores in baselines.items()}
    lines: list[tuple[str, int, Estimate]] = []
    for layer, held_out in by_layer.items():
        lines.append(("probe", layer, area(held_out.scores)))
        if len(split.shuffled):
            runs = zip(held_out.shuffled, split.shuffled, strict=True)
            areas = np.array([stats.auc(scores, labels, folds) for scores, labels in runs])
            lines.append(("shuffled", layer, _next_run(areas, len(target))))
        lines += [(kind, layer, estimate) for kind, estimate in constant.items()]
    return pd.DataFrame(
        [
            (name, kind, layer, e.value, e.low, e.high, e.n, int(target.sum()))
            for kind, layer, e in sorted(lines, key=lambda line: line[0] != "probe")
        ],
        columns=["split", "kind", "layer", "auc", "ci_low", "ci_high", "n", "positives"],
    )


def _next_run(areas: Float[np.ndarray, " m"], n: int) -> Estimate:
    """Mean over runs, with Student's prediction interval: one more run falls into it in 95 % of cases."""
    m = len(areas)
    centre = float(areas.mean())
    half = float(STUDENT_T * areas.std(ddof=1) * np.sqrt(1 + 1 / m))
    return Estimate(centre, max(0.0, centre - half), min(1.0, centre + half), n)
