"""Verdicts: sentence and claim follow from the interval of the difference, not from figures side by side."""

import numpy as np
import pytest

from gapprobe import stats
from gapprobe.probes.controls import shuffled_targets
from gapprobe.probes.plan import Nested, Problems
from gapprobe.probes.splits import nested_folds
from gapprobe.probes.verdict import judge

N = 400


def judged(probe, controls, *, permutations=0, seed=0):
    """Judge scores that are the label times a strength, plus noise."""
    rng = np.random.default_rng(seed)
    target = rng.random(N) < 0.5
    cut = nested_folds(None, target, folds=5, seed=0, name="random")
    problems = Problems.of(cut, target, shuffled_targets(target, cut.outer, permutations, 0))
    noise = rng.normal(size=N)
    scores = probe * target + noise + 0.3 * rng.normal(size=N)
    baselines = {name: strength * target + noise + 0.3 * rng.normal(size=N) for name, strength in controls.items()}
    nested = Nested((2, 2, 3, 2, 2), (1.0,) * 5, scores, rng.normal(size=(permutations, N)))
    weights = stats.crossed_weights(np.arange(N) % 50, np.arange(N) // 8, replicates=500, seed=1)
    return judge("random", problems, nested, baselines, weights)


def test_a_difference_within_the_interval_is_no_victory():
    verdict = judged(1.03, {"question_only": 1.0})
    assert verdict.difference.value > 0
    assert verdict.difference.low < 0 < verdict.difference.high
    assert not verdict.beats
    assert verdict.sentence.endswith("does not exclude 0: the probe does not beat it.")


def test_the_best_control_is_the_one_to_beat():
    verdict = judged(2.0, {"layer_0": 0.2, "question_only": 1.0}, permutations=5)
    assert verdict.control == "question_only"
    assert verdict.beats
    assert verdict.difference.value == pytest.approx(verdict.probe.value - verdict.control_auc.value)
    figures = f"{verdict.probe.value:.3f} [{verdict.probe.low:.3f}, {verdict.probe.high:.3f}]"
    assert f"(layers 2, 3, chosen on training rows only) reaches an AUC of {figures}" in verdict.sentence
    assert "only which question is asked" in verdict.sentence


def test_pairing_makes_the_difference_sharper_than_its_parts():
    verdict = judged(1.3, {"question_only": 1.0})
    assert verdict.beats
    assert verdict.control_auc.high > verdict.probe.low  # the two intervals overlap: only the paired one can tell


def test_a_probe_worse_than_its_control_is_called_worse():
    verdict = judged(0.5, {"question_only": 2.0})
    assert not verdict.beats
    assert "the probe is worse, and adds nothing" in verdict.sentence


def test_shuffled_labels_are_a_control_too():
    verdict = judged(1.0, {}, permutations=5)
    assert verdict.control == "shuffled"
    assert verdict.control_auc.value == pytest.approx(0.5, abs=0.05)
    assert "trained on shuffled labels" in verdict.sentence
