"""Folds: no group on both sides, at either level, and refusals in words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapprobe.errors import DataError
from gapprobe.probes.splits import joint_folds, nested_folds


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(12, 40), folds=st.integers(2, 5), rows=st.integers(100, 300))
def test_no_group_is_on_both_sides(seed, groups, folds, rows):
    rng = np.random.default_rng(seed)
    labels, target = rng.integers(0, groups, rows).astype(str), rng.random(rows) < 0.5
    cut = nested_folds(labels, target, folds=folds, seed=seed, name="group")
    assert set(cut.outer) == set(range(folds))
    assert cut.groups == len(set(labels))
    for fold in range(folds):
        held_out = cut.outer == fold
        assert not set(labels[held_out]) & set(labels[~held_out])
        np.testing.assert_array_equal(cut.training[fold], ~held_out)
        seen = np.zeros(rows, dtype=int)
        for part, training in enumerate(cut.inner_training(fold)):
            judged = cut.inner[fold] == part
            assert judged.any()
            assert not (training & judged).any()
            assert not (training & held_out).any()
            assert not set(labels[training]) & set(labels[judged])
            seen += judged
        np.testing.assert_array_equal(seen == 1, ~held_out)


def test_a_random_split_is_stratified_and_follows_its_seed():
    target = np.arange(100) < 30
    cut = nested_folds(None, target, folds=5, seed=0, name="random")
    assert np.bincount(cut.outer).tolist() == [20] * 5
    assert np.bincount(cut.outer[target]).tolist() == [6] * 5
    again = nested_folds(None, target, folds=5, seed=0, name="random")
    np.testing.assert_array_equal(cut.outer, again.outer)
    np.testing.assert_array_equal(cut.inner, again.inner)
    assert (nested_folds(None, target, folds=5, seed=1, name="random").outer != cut.outer).any()


def test_groups_of_one_class_are_counted():
    labels = np.repeat(list("abcdefgh"), 5)
    target = np.tile([True, False, True, False, True], 8)
    target[:5], target[5:10] = True, False
    assert nested_folds(labels, target, folds=2, seed=0, name="entity").one_class_groups == 2


def test_fewer_groups_than_inner_folds_get_fewer_inner_folds():
    labels, target = np.repeat(list("abcd"), 6), np.tile([True, False], 12)
    cut = nested_folds(labels, target, folds=4, seed=0, name="entity")
    assert len(cut.inner_training(0)) == 3


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        (np.array(["a", "b"] * 10), np.arange(20) % 3 == 0, "split by entity: 2 groups cannot fill 3 folds"),
        (np.array(["a", None, "b", "c"] * 5, dtype=object), np.arange(20) % 3 == 0, "5 rows have no label"),
        (np.array(["a", "b", "c", "d"] * 5), np.arange(20) == 3, "hold one class only; 1 of 20 rows are positive"),
    ],
)
def test_refusals_name_the_split(labels, target, message):
    with pytest.raises(DataError, match=message):
        nested_folds(labels, target, folds=3, seed=0, name="entity")


def test_each_leaves_out_one_group_after_the_other():
    rng = np.random.default_rng(0)
    groups, target = np.arange(80) % 8, rng.random(80) < 0.5
    cut = nested_folds(groups, target, folds="each", seed=0, name="entity")
    assert len(cut.inner) == 8
    for fold in range(8):
        assert len(np.unique(groups[cut.outer == fold])) == 1
        assert int(cut.inner[fold].max()) + 1 == 5
    with pytest.raises(DataError, match="needs groups"):
        nested_folds(None, target, folds="each", seed=0, name="random")


@pytest.mark.parametrize("folds", [4, 5, 9])
def test_a_row_held_out_jointly_shares_neither_group_with_training(folds):
    rng = np.random.default_rng(1)
    question, entity = (codes.ravel() for codes in np.meshgrid(np.arange(12), np.arange(15)))
    target = rng.random(180) < 0.5
    cut = joint_folds(question, entity, target, folds=folds, seed=0, name="joint")
    assert len(cut.inner) == {4: 4, 5: 9, 9: 9}[folds]
    assert set(cut.outer) == set(range(len(cut.inner)))  # every row is held out once
    for fold in range(len(cut.inner)):
        held, training = cut.outer == fold, cut.training[fold]
        assert not held[training].any()
        assert not set(question[held]) & set(question[training])
        assert not set(entity[held]) & set(entity[training])
        for part in cut.inner_training(fold):
            assert not set(entity[part]) & set(entity[training & ~part])
    with pytest.raises(DataError, match="1 groups cannot fill 2 parts"):
        joint_folds(np.zeros(180), entity, target, folds=4, seed=0, name="joint")
