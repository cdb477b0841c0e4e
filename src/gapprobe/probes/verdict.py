"""Whether a probe says more than its best control, in numbers and in a sentence computed from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from gapprobe import stats
from gapprobe.probes.plan import Nested, Problems
from gapprobe.stats import Estimate

MEANING: Mapping[str, str] = {
    "shuffled": "the same probe trained on shuffled labels",
    "question_only": "a predictor that sees only which question is asked about which entity",
    "layer_0": "the same probe on the embeddings (layer 0)",
    "random_projection": "the same probe on a random projection to a few dimensions",
    "random_model": "the same probe on the model with random weights",
}


@dataclass(frozen=True)
class Verdict:
    """A probe against the best of its controls, under one split.

    Attributes:
        split: name of the split.
        layers: the layer that each outer fold chose on its training rows.
        probe: area under the ROC curve of the probe with those layers.
        control: name of the control with the largest area, or None where none was run.
        control_auc: its area.
        difference: probe minus control, from the same bootstrap replicates.
        beats: whether the interval of the difference lies above 0.
        sentence: all of this in plain English.
    """

    split: str
    layers: tuple[int, ...]
    probe: Estimate
    control: str | None
    control_auc: Estimate | None
    difference: Estimate | None
    beats: bool
    sentence: str


def judge(
    split: str,
    problems: Problems,
    nested: Nested,
    controls: Mapping[str, Float[np.ndarray, " n"]],
    weights: Float[np.ndarray, "b n"],
) -> Verdict:
    """Compare the nested probe with its best control on the same rows and the same bootstrap replicates.

    Args:
        split: its name.
        problems: folds and labels.
        nested: the probe, with its own shuffled control.
        controls: out-of-fold scores of the other controls.
        weights: bootstrap weights.
    """
    folds, target = problems.cut.outer, problems.target

    def area(scores: np.ndarray, labels: Bool[np.ndarray, " n"], w: np.ndarray) -> np.ndarray:
        return stats.weighted_auc(scores, labels, w, folds)

    def probe_area(w: np.ndarray) -> np.ndarray:
        return area(nested.scores, target, w)

    def control_area(name: str, w: np.ndarray) -> np.ndarray:
        if name == "shuffled":
            runs = zip(nested.shuffled, problems.shuffled, strict=True)
            return np.mean([area(scores, labels, w) for scores, labels in runs], axis=0)
        return area(controls[name], target, w)

    probe = stats.estimate(probe_area, weights)
    names = [*controls, *(["shuffled"] if len(problems.shuffled) else [])]
    if not names:
        sentence = f"{_figure('The probe', nested, probe)} No control was run, so nothing follows from this figure."
        return Verdict(split, nested.layers, probe, None, None, None, False, sentence)
    once = np.ones((1, len(target)))
    best = max(names, key=lambda name: float(np.nan_to_num(control_area(name, once)[0])))
    control = stats.estimate(lambda w: control_area(best, w), weights)
    difference = stats.estimate(lambda w: probe_area(w) - control_area(best, w), weights)
    beats = difference.low > 0
    sentence = f"{_figure('The probe', nested, probe)} {_conclusion(best, control, difference)}"
    return Verdict(split, nested.layers, probe, best, control, difference, beats, sentence)


def _figure(who: str, nested: Nested, probe: Estimate) -> str:
    layers = sorted(set(nested.layers))
    at = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    return f"{who} ({at}, chosen on training rows only) reaches an AUC of {_number(probe)}."


def _conclusion(name: str, control: Estimate, difference: Estimate) -> str:
    start = f"Its best control, {MEANING[name]}, reaches {_number(control)}"
    if math.isnan(difference.low):
        return f"{start}; no fold holds out rows of both classes, so the two cannot be compared."
    gap = f"{start}; the difference of {_number(difference, signed=True)}"
    if difference.low > 0:
        return f"{gap} lies above 0: the probe beats it."
    if difference.high < 0:
        return f"{gap} lies below 0: the probe is worse, and adds nothing."
    return f"{gap} does not exclude 0: the probe does not beat it."


def _number(estimate: Estimate, *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
