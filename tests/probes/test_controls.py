"""Controls: the question-only one must be strong and honest, the shuffled one must know nothing."""

import numpy as np
import pytest

from gapprobe import stats
from gapprobe.probes import controls
from gapprobe.probes.controls import question_scores, shuffled_targets
from gapprobe.probes.splits import joint_folds, nested_folds
from tests.probes.planted import planted


def area_of_question_only(rows, split, seed=0):
    cut = nested_folds(rows.splits[split], rows.targets["target"], folds=5, seed=seed, name=split)
    scores = question_scores(rows.relation, rows.entity, rows.targets["target"], cut)
    return stats.auc(scores, rows.targets["target"], cut.outer)


def test_it_finds_what_the_question_decides():
    rows, _ = planted(0, question=3.0, images=20)
    cells = np.unique(rows.question, return_inverse=True)[1]
    truth = (np.bincount(cells, rows.targets["target"]) / np.bincount(cells))[cells]
    best = stats.auc(truth, rows.targets["target"])  # in-sample rates: an upper bound
    assert best - 0.05 < area_of_question_only(rows, "image") <= best


def test_it_knows_nothing_of_an_entity_it_never_saw():
    rows, _ = planted(1, question=3.0)
    assert area_of_question_only(rows, "entity") == pytest.approx(0.5, abs=0.1)


def test_it_still_knows_a_relation_of_an_entity_it_never_saw():
    rows, _ = planted(2)
    rng = np.random.default_rng(0)
    easy = np.char.isdigit(rows.relation) & (rows.relation.astype(int) < 5)
    target = rng.random(len(easy)) < np.where(easy, 0.9, 0.1)
    cut = nested_folds(rows.entity, target, folds=4, seed=0, name="entity")
    scores = question_scores(rows.relation, rows.entity, target, cut)
    assert stats.auc(scores, target, cut.outer) > 0.87


@pytest.mark.parametrize("split", ["image", "entity", "random"])
def test_where_nothing_is_to_be_known_it_is_at_chance(split):
    areas = [area_of_question_only(planted(seed, entities=6, relations=5, images=6)[0], split) for seed in range(12)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.04)


def test_a_rows_own_label_never_reaches_its_score():
    rows, _ = planted(3, question=1.0, entities=5, relations=4, images=5)
    cut = nested_folds(rows.image, rows.targets["target"], folds=5, seed=0, name="image")
    before = question_scores(rows.relation, rows.entity, rows.targets["target"], cut)
    fold = cut.outer == 2
    after = question_scores(rows.relation, rows.entity, rows.targets["target"] ^ fold, cut)
    np.testing.assert_array_equal(before[fold], after[fold])
    assert (before[~fold] != after[~fold]).any()


@pytest.mark.parametrize("seed", range(3))
def test_questions_that_succeed_equally_often_tie(seed):
    """Relations come in pairs of the same labels: their scores are equal at the optimum, image by image."""
    rng = np.random.default_rng(seed)
    pair, twin, image = (axis.ravel() for axis in np.indices((15, 2, 120)))
    target = (rng.random((15, 120)) < rng.uniform(0.2, 0.8, (15, 1)))[pair, image]
    cut = nested_folds(image, target, folds=4, seed=0, name="image")
    relation, entity = np.array([f"{a}, {b}" for a, b in zip(pair, twin, strict=True)]), image % 30
    scores = question_scores(relation, entity, target, cut).reshape(15, 2, 120)
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])
    assert len(np.unique(scores)) >= 1000


def test_scores_that_lie_close_to_each_other_in_thousands_do_not_become_one():
    scores = np.random.default_rng(0).permutation(np.linspace(0, 1, 300_001))
    tied = controls._tied(scores)
    assert (scores - tied >= 0).all()
    assert (scores - tied).max() <= controls.ONE * (1 + 1e-9)
    assert len(np.unique(tied)) == pytest.approx(1 / controls.ONE, rel=0.3)
    assert (np.diff(tied[np.argsort(scores)]) >= 0).all()
    assert controls._tied(np.array([2.0])).tolist() == [2.0]


def test_what_float64_cannot_reach_is_fitted_as_far_as_a_probe(monkeypatch):
    rows, _ = planted(3, question=1.0, entities=5, relations=4, images=5)
    cut = nested_folds(rows.image, rows.targets["target"], folds=5, seed=0, name="image")
    told = (rows.relation, rows.entity, rows.targets["target"], cut)
    further = question_scores(*told)
    monkeypatch.setattr(controls, "EXACT", 1e-40)
    np.testing.assert_allclose(question_scores(*told), further, atol=1e-3)


def test_shuffled_labels_keep_their_folds_counts():
    target, folds = np.arange(60) % 3 == 0, np.arange(60) % 5
    shuffled = shuffled_targets(target, folds, 5, 0)
    assert shuffled.shape == (5, 60)
    for labels in shuffled:
        np.testing.assert_array_equal(np.bincount(folds, labels), np.bincount(folds, target))
        assert (labels != target).any()
    assert (shuffled[0] != shuffled[1]).any()
    np.testing.assert_array_equal(shuffled, shuffled_targets(target, folds, 5, 0))


def test_under_a_joint_split_a_rows_score_comes_from_the_fold_that_holds_it_out():
    """Rows that share one group with the fold are neither in training nor held out: other folds hold them out."""
    rows, _ = planted(3, question=2.0, entities=6, relations=6, images=3)
    target = rows.targets["target"]
    cut = joint_folds(rows.relation, rows.entity, target, folds=4, seed=0, name="joint")
    before = question_scores(rows.relation, rows.entity, target, cut)
    for fold in range(4):
        # Labels outside the fold's training rows turned round: nothing that it learnt from has changed.
        turned = target ^ ~cut.training[fold]
        after = question_scores(rows.relation, rows.entity, turned, cut)
        held = cut.outer == fold
        np.testing.assert_allclose(after[held], before[held], atol=1e-9)
