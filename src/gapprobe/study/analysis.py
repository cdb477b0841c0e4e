"""What each analysis step of a study asks of the store, and the part of results.json that it fills.

The mathematics is in `probes`, `lens`, `similarity`, `selective` and `stats`; here rows are chosen and numbers named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from gapprobe.errors import DataError
from gapprobe.stats import Estimate, layer_means
from gapprobe.study.config import StudyConfig
from gapprobe.study.gap import weights_for
from gapprobe.study.outcomes import counted, runnable
from gapprobe.study.results import Json, interval, measured, number

if TYPE_CHECKING:
    from gapprobe.models.model import Model
    from gapprobe.probes.verdict import Verdict
    from gapprobe.store.reader import Store


def probe_rows(outcomes: pd.DataFrame, store: Store, config: StudyConfig) -> pd.DataFrame:
    """Return the trials that the probe learns from, indexed by the row of their visual call.

    A trial whose visual answer is empty has no last output token, so it is left out where that is the position read.
    """
    trials = runnable(outcomes)
    trials = counted(trials) if config.probe.rows == "counted" else trials[trials["full_information"].astype(bool)]
    if config.probe.position == "last_output":
        answered = store.rows["answer"].fillna("") != ""
        trials = trials[answered.reindex(trials["visual_row"]).to_numpy()]
    return trials.set_index("visual_row")


def probe(store: Store, outcomes: pd.DataFrame, config: StudyConfig, progress: bool) -> Json:
    """Sweep failure probes over layers and splits; `scores` keeps the nested probe's, for selective prediction.

    A study whose trials are all right, or too few for a split, still has a gap to report: what cannot be fitted is
    null, with the reason in `why_not`.
    """
    from gapprobe.probes.sweep import sweep_probes

    settings = config.probe
    rows = probe_rows(outcomes, store, config)
    target = rows["visual"].astype(bool)
    splits, refused = cut(rows, settings.splits, settings.folds, config.seed)
    described: Json = {
        "position": settings.position,
        "rows": settings.rows,
        "target": "visual answer right",
        "n": len(rows),
        "positives": int(target.sum()),
        "folds": settings.folds,
    }
    if not splits:
        return described | _no_probe(refused, store, len(rows))
    try:
        sweep = sweep_probes(
            store,
            target,
            position=settings.position,
            layers=config.layers,
            splits=splits,
            questions=rows[["relation", "entity"]],
            clusters=(rows["question"], rows["image"]),
            controls=settings.controls,
            folds=settings.folds,
            strengths=[settings.c],
            seed=config.seed,
            replicates=settings.replicates,
            progress=progress,
        )
    except DataError as error:
        return described | _no_probe(dict.fromkeys(settings.splits, str(error)), store, len(rows))
    curves = {
        key: {
            "auc": [number(v) for v in part["auc"]],
            "ci": [[number(low), number(high)] for low, high in zip(part["ci_low"], part["ci_high"], strict=True)],
            "n": int(part["n"].max()),
        }
        for key, part in sweep.table.groupby(["split", "kind"], sort=False)
    }
    controls = {split: {control: curves[split, control] for control in settings.controls} for split in splits}
    first = next(iter(splits))
    return described | {
        **_refused(refused, store, len(rows)),
        **{split: curves[split, "probe"] for split in splits},
        "controls": controls[first],
        "controls_by_split": controls,
        "verdict": {s: _verdict(sweep.verdict(s)) if s in splits else None for s in settings.splits},
        "scores": {
            "split": first,
            "probability": [float(p) for p in sweep.cell(split=first).nested.probability],
            "fold": [int(f) for f in sweep.cell(split=first).folds.outer],
        },
    }


def _refused(reasons: Mapping[str, str], store: Store, n: int) -> Json:
    """Return what stands under splits that no probe was fitted with."""
    layers = len(store.header.layers)
    return {
        s: {"auc": [None] * layers, "ci": [[None, None]] * layers, "n": n, "why_not": w} for s, w in reasons.items()
    }


def _no_probe(reasons: Mapping[str, str], store: Store, n: int) -> Json:
    return {
        **_refused(reasons, store, n),
        "controls": {},
        "controls_by_split": {},
        "verdict": dict.fromkeys(reasons),
        "why_not": f"No probe was fitted: {next(iter(reasons.values()))}.",
        "scores": None,
    }


def cut(
    rows: pd.DataFrame, names: Sequence[str], folds: int, seed: int
) -> tuple[dict[str, pd.Series[str] | None], dict[str, str]]:
    """Return the groups of every split that these rows can be cut by, and why not for the others."""
    from gapprobe.probes.splits import nested_folds

    right = rows["visual"].to_numpy(dtype=bool)
    splits: dict[str, pd.Series[str] | None] = {}
    refused: dict[str, str] = {}
    for name in names:
        groups = None if name == "random" else rows[name]
        try:
            if right.all() or not right.any():
                which = "right" if len(right) and right.all() else "wrong"
                raise DataError(f"all {len(right)} visual answers are {which}" if len(right) else "no trial counts")
            labels = None if groups is None else groups.to_numpy(dtype=str)
            nested_folds(labels, right, folds=folds, seed=seed, name=name)
        except DataError as error:
            refused[name] = str(error)
        else:
            splits[name] = groups
    return splits, refused


def _verdict(verdict: Verdict) -> Json:
    return {
        "chosen": "nested",
        "layers": list(verdict.layers),
        "probe": measured(verdict.probe, "auc"),
        "control": verdict.control,
        "control_auc": verdict.control_auc and measured(verdict.control_auc, "auc"),
        "difference": verdict.difference and measured(verdict.difference),
        "beats": verdict.beats,
        "sentence": verdict.sentence,
    }


def lens(store: Store, outcomes: pd.DataFrame, model: Model, config: StudyConfig) -> Json:
    """Read the probability of the answer's first token at every layer, told and shown, in all four conventions."""
    from gapprobe.lens.logit import logit_lens

    trials = counted(outcomes)
    weights = weights_for(trials, config.probe.replicates, config.seed)
    gold = {answer: model.first_token(answer) for answer in trials["gold"].unique()}
    answers = store.rows["answer_token_ids"].dropna()
    generated = {str(i): int(tokens[0]) if len(tokens) else -1 for i, tokens in answers.items()}
    shown = trials["visual"].to_numpy(dtype=bool)

    def probability(setting: str, normed: bool, target: str) -> Float[np.ndarray, "l n"]:
        ids = trials[f"{setting}_row"].tolist()
        first = [gold[g] for g in trials["gold"]] if target == "gold" else [generated[i] for i in ids]
        tokens = np.array(first, dtype=np.int64)
        answered = tokens >= 0
        read = logit_lens(
            store,
            model,
            tokens[answered],
            rows=[i for i, there in zip(ids, answered, strict=True) if there],
            position="last_input",
            layers=config.layers,
            norm=normed,
            top_k=0,
            divergence=False,
        ).probability[..., 0]
        out = np.full((len(read), len(ids)), np.nan)
        out[:, answered] = read
        return out

    conventions = {
        f"{'norm' if normed else 'bare'}_{target}": {
            setting: probability(f"{setting}_only" if setting == "text" else setting, normed, target)
            for setting in ("text", "visual")
        }
        for normed in (True, False)
        for target in ("gold", "generated")
    }
    sound = conventions["norm_gold"]
    series = {
        "text": layer_means(sound["text"], weights),
        "visual": layer_means(sound["visual"], weights),
        "visual_success": layer_means(sound["visual"][:, shown], weights[:, shown]),
        "visual_failure": layer_means(sound["visual"][:, ~shown], weights[:, ~shown]),
    }
    return {
        "convention": "final norm at every layer, first token of the gold answer, at the last input token",
        **_parallel(series),
        "variants": {
            name: _parallel({setting: layer_means(p, weights) for setting, p in parts.items()})
            for name, parts in conventions.items()
        },
    }


def cosine(store: Store, outcomes: pd.DataFrame, config: StudyConfig) -> Json:
    """Compare each trial's visual state with its full-information state, for successes and linking failures."""
    from gapprobe.similarity import cosine as paired_cosine

    trials = counted(outcomes)
    weights = weights_for(trials, config.probe.replicates, config.seed)
    if trials.empty:
        raw = centred = np.empty((len(store.header.layers), 0))
    else:
        result = paired_cosine(
            store,
            trials["visual_row"].tolist(),
            trials["full_information_row"].tolist(),
            position="last_input",
            layers=config.layers,
            replicates=1,  # the intervals are those of the trials, below
        )
        raw, centred = result.raw, result.centred
    shown = trials["visual"].to_numpy(dtype=bool)

    def split(values: Float[np.ndarray, "l n"]) -> Json:
        return _parallel(
            {
                "success": layer_means(values[:, shown], weights[:, shown]),
                "failure": layer_means(values[:, ~shown], weights[:, ~shown]),
            }
        )

    return {
        "pair": ["full_information", "visual"],
        "position": "last_input",
        **split(raw),
        "centred": split(centred),
    }


def _parallel(series: Mapping[str, Sequence[Estimate]]) -> Json:
    return {
        **{name: [number(e.value) for e in estimates] for name, estimates in series.items()},
        "ci": {name: [interval(e) for e in estimates] for name, estimates in series.items()},
        "n": {name: max((e.n for e in estimates), default=0) for name, estimates in series.items()},
    }
