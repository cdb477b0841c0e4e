"""Rows out of a study's domain: who foresees wrong answers to questions of another kind, and what answering pays.

Source: arXiv 2508.18297, out of domain and selective prediction: probe and perplexity are fitted on the trials of the
study and judged on OKVQA. Here layer and strength are chosen on the study's trials alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.probes.transfer import TransferSet, transfer_probes
from gapprobe.selective import THRESHOLD, selective_report, selective_scores
from gapprobe.study.analysis import probe_rows
from gapprobe.study.results import Json, measured, records
from gapprobe.study.selecting import at_threshold, measure_lines
from gapprobe.tasks.examples import Example
from gapprobe.tasks.judging import JUDGES
from gapprobe.tasks.tables import load_examples

if TYPE_CHECKING:
    from gapprobe.store.reader import Store
    from gapprobe.study.study import Study

GOLD = "gold"


def measure_outside(studies: Sequence[Study], table: Path, *, progress: bool = False) -> Json:
    """Ask the studies' model other questions, and foresee its wrong answers from the studies' trials.

    Args:
        studies: of one model; trials of all are learnt from.
        table: of prompts, as `load_examples` reads it, with a column `gold`: OKVQA from `gapprobe data okvqa`. Rows
            that share a `question` or an `image` are resampled together.
        progress: show progress bars.

    Returns:
        `n` rows judged, `left_out` (failed, or with an empty answer), `right`; `learnt_from`: trials of each study;
        `layers` that were chosen on them; `auc` of the probe; under `perplexity`, `probe` and `ensemble` coverage and
        risk at the threshold with their curve; `ensemble_minus_perplexity.<coverage|risk>`, paired; `measures[]` of all
        three.

    Raises:
        ConfigError: no studies, of several models, or a table without gold answers.
        DataError: answers of one kind only, to the studies' questions or to these.
    """
    if not studies or len({(s.config.model, s.config.revision) for s in studies}) > 1:
        raise ConfigError("give the studies of one model" if studies else "give a study to learn from")
    first = studies[0]
    examples = load_examples(table)
    if not examples:
        raise ConfigError(f"{table} has no lines")
    if any(not example.columns.get(GOLD) for example in examples):
        raise ConfigError(f"{table} must have a column {GOLD} with the right answer of every line")
    store, ids = first.outside(examples)
    asked = _lines(ids, examples, table)
    # Gold answers are the table's as it is now, not as it was when the model was asked.
    rows = store.rows.loc[list(asked.index), ["answer", "answer_logprobs", "error"]].join(asked)
    spoken = rows["error"].isna() & (rows["answer"].fillna("") != "")
    rows, left_out = rows[spoken], int((~spoken).sum())
    if rows.empty:
        raise DataError(f"none of the {left_out} questions in {table} was answered")
    judge = JUDGES[first.config.judge]
    right = pd.Series([judge(a, [g]) for a, g in zip(rows["answer"], rows[GOLD], strict=True)], index=rows.index)
    clusters = rows["question"], rows["image"]
    seed, replicates = first.config.seed, first.config.probe.replicates
    learnt = {study.config.name: _trials(study) for study in studies}
    # No study's name has a plus.
    judged = TransferSet(store, right, clusters[0].radd("outside "), first.config.probe.position, clusters[1])
    found = transfer_probes(
        {**{name: part for name, (part, _) in learnt.items()}, "+": judged},
        pairs=[(list(learnt), "+")],
        seed=seed,
        replicates=replicates,
        progress=progress,
    )
    scores = found.scores.set_index("row").loc[list(rows.index)]
    confidences = _confidences(learnt, rows, right, scores["log_odds"].to_numpy())
    hit = right.to_numpy(dtype=bool)
    weights = stats.crossed_weights(*(c.to_numpy(dtype=str) for c in clusters), replicates=replicates, seed=seed)
    report = selective_report(confidences, hit, clusters=clusters, replicates=replicates, seed=seed)
    best = records(found.best)[0]
    return {
        "n": len(rows),
        "left_out": left_out,
        "right": int(hit.sum()),
        "learnt_from": {name: len(part[0].target) for name, part in learnt.items()},
        "layers": best["layers"],
        "auc": {"value": best["auc"], "n": len(rows), "ci": [best["ci_low"], best["ci_high"]]},
        **{name: at_threshold(values, hit, weights) for name, values in confidences.items()},
        "ensemble_minus_perplexity": _paid(confidences["ensemble"], confidences["perplexity"], hit, weights),
        "measures": measure_lines(report.table),
    }


def _trials(study: Study) -> tuple[TransferSet, pd.Series[float]]:
    """Return the trials of a study that are learnt from, and the mean log-probability of their answers."""
    store: Store = study.capture()
    rows = probe_rows(study.outcomes, store, study.config)
    log_probs = store.rows["answer_logprobs"].reindex(rows.index)
    rows, log_probs = rows[log_probs.map(len) > 0], log_probs[log_probs.map(len) > 0]
    part = TransferSet(store, rows["visual"], rows["question"], study.config.probe.position, rows["image"])
    return part, log_probs.map(np.mean).astype(float)


def _confidences(
    learnt: dict[str, tuple[TransferSet, pd.Series[float]]],
    rows: pd.DataFrame,
    right: pd.Series[bool],
    log_odds: Float[np.ndarray, " n"],
) -> dict[str, Float[np.ndarray, " n"]]:
    """Return three confidences in the judged rows; the regression on perplexity is fitted on the others alone."""
    before = np.concatenate([values.to_numpy() for _, values in learnt.values()])
    outcomes = np.concatenate([pd.Series(part.target).to_numpy(dtype=bool) for part, _ in learnt.values()])
    own = rows["answer_logprobs"].map(np.mean).to_numpy(dtype=np.float64)
    probability = expit(log_odds)
    # Two folds: each is scored by the regression on the other, and of the first nothing is used.
    scores = selective_scores(
        np.concatenate([before, own]),
        np.concatenate([np.full(len(before), 0.5), probability]),
        np.concatenate([outcomes, right.to_numpy(dtype=bool)]),
        np.repeat([0, 1], [len(before), len(own)]),
    )
    return {method: values[len(before) :] for method, values in scores.items()}


def _paid(
    ours: Float[np.ndarray, " n"],
    theirs: Float[np.ndarray, " n"],
    right: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
) -> Json:
    """Return what one confidence answers more than another at the threshold, and how much riskier it is."""

    def risk(values: Float[np.ndarray, " n"], w: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
        answered = w[:, values >= THRESHOLD]
        wrong, total = answered @ ~right[values >= THRESHOLD], answered.sum(1)
        return np.divide(wrong, total, out=np.full(len(w), np.nan), where=total > 0)

    more = (ours >= THRESHOLD).astype(np.float64) - (theirs >= THRESHOLD)
    return {
        "coverage": measured(stats.mean(more, weights)),
        "risk": measured(stats.estimate(lambda w: risk(ours, w) - risk(theirs, w), weights)),
    }


def _lines(ids: Sequence[str], examples: Sequence[Example], table: Path) -> pd.DataFrame:
    """Return gold answer, question and image by row; a line without one of the latter shares it with no other."""
    found: dict[str, dict[str, str]] = {}
    for id_, example in zip(ids, examples, strict=True):
        image = example.image.name if example.image else ""
        line = {
            GOLD: example.columns[GOLD],
            "question": example.columns.get("question") or f"of row {id_}",
            "image": image or f"of row {id_}",
        }
        if found.setdefault(id_, line)[GOLD] != line[GOLD]:
            raise DataError(f"{table} asks {line['question']!r} about {image or 'no image'} with two gold answers")
    return pd.DataFrame.from_dict(found, orient="index")
