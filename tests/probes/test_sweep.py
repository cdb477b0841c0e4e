"""Sweeps on planted studies: what was planted is found, what was not is not, and the verdict follows the numbers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.kernels import logistic
from gapprobe.probes.base import LinearFits, find_probe
from gapprobe.probes.controls import shuffled_targets
from gapprobe.probes.kept import Kept
from gapprobe.probes.kinds.logistic import Logistic
from gapprobe.probes.plan import Problems, choose
from gapprobe.probes.splits import nested_folds
from gapprobe.probes.sweep import Key, sweep_layers, sweep_probes
from tests.probes.planted import planted


def target_of(rows):
    return rows.targets["target"]


def swept(rows, x, **options):
    settings = {"seeds": [0], "replicates": 200, "strengths": [1.0]} | options
    return sweep_layers(lambda _, layer: x[layer], rows, range(len(x)), **settings)


@pytest.fixture(scope="module")
def image_decides():
    rows, x = planted(0, question=0.5, image=2.0)
    return rows, x, swept(rows, x)


def test_out_of_fold_scores_are_scikit_learns(image_decides):
    rows, x, sweep = image_decides
    folds = sweep.cell(split="image").folds.outer
    for layer in (1, 3):
        for fold in (0, 4):
            probe = make_pipeline(
                StandardScaler(), LogisticRegression(tol=1e-10, solver="newton-cholesky", class_weight="balanced")
            )
            probe.fit(x[layer].double()[folds != fold].numpy(), target_of(rows)[folds != fold])
            expected = probe.decision_function(x[layer].double()[folds == fold].numpy())
            # A gap of 1e-6 of the objective leaves the log-odds this much room.
            np.testing.assert_allclose(
                sweep.cell(split="image").scores[layer, 0][folds == fold], expected, rtol=0, atol=2e-3
            )


def test_the_table_has_every_figure_with_its_interval(image_decides):
    rows, _, sweep = image_decides
    table = sweep.table
    about = ["position", "probe", "target", "split", "seed"]
    figures = ["kind", "layer", "auc", "ci_low", "ci_high", "n", "positives"]
    measures = ["strength", "accuracy", "balanced_accuracy", "log_loss", "ece"]
    assert list(table.columns) == [*about, *figures, *measures]
    assert table[table.kind == "probe"].notna().all(axis=None)
    counts = table.groupby(["split", "kind"]).size()
    assert len(counts) == 3 * 4
    assert (counts == 4).all()
    assert (table.ci_low <= table.auc).all()
    assert (table.auc <= table.ci_high).all()
    assert (table.n == len(target_of(rows))).all()
    assert (table.positives == target_of(rows).sum()).all()
    probe = table.query("split == 'image' and kind == 'probe'").set_index("layer")
    expected = stats.auc(sweep.cell(split="image").scores[2, 0], target_of(rows), sweep.cell(split="image").folds.outer)
    assert probe.auc[2] == pytest.approx(expected)


def test_a_planted_image_effect_is_found_where_it_was_planted(image_decides):
    _, _, sweep = image_decides
    probe = sweep.table.query("split == 'entity' and kind == 'probe'").set_index("layer").auc
    assert probe[0] == 0.5
    assert probe[1] < 0.65
    assert probe[2:].min() > 0.75
    shuffled = sweep.table.query("kind == 'shuffled'")
    assert shuffled.auc.mean() == pytest.approx(0.5, abs=0.02)
    verdict = sweep.verdict("entity")
    assert verdict.beats
    assert set(verdict.layers) <= {2, 3}
    assert "lies above 0: the probe beats it" in verdict.sentence
    assert f"{verdict.probe.value:.3f}" in verdict.sentence


def test_a_probe_that_only_knows_the_question_does_not_beat_the_question():
    rows, x = planted(1, question=3.0, image=0.0)
    sweep = swept(rows, x)
    best = sweep.table.query("split == 'image' and kind == 'probe'").auc.max()
    assert best > 0.8  # a figure that looks like a finding
    verdict = sweep.verdict("image")
    assert verdict.control == "question_only"
    assert not verdict.beats
    assert "the probe does not beat it" in verdict.sentence or "the probe is worse" in verdict.sentence


def test_nested_choice_does_not_profit_from_many_layers_of_noise():
    rng = np.random.default_rng(3)
    picked, largest = [], []
    for seed in range(6):
        rows, _ = planted(seed, entities=4, relations=5, images=8)
        rows = replace(rows, splits={"random": None})
        x = torch.from_numpy(rng.normal(size=(12, len(target_of(rows)), 10)))
        sweep = swept(rows, x, controls=(), replicates=20)
        picked.append(sweep.verdict("random").probe.value)
        largest.append(sweep.table.auc.max())
    assert np.mean(largest) > 0.55
    assert np.mean(picked) == pytest.approx(0.5, abs=0.045)


def test_held_out_labels_do_not_reach_their_own_scores():
    rows, x = planted(2, image=1.0, entities=4, relations=5, images=6)
    rows = replace(rows, splits={"random": None})
    sweep = swept(rows, x, replicates=10)
    fold = sweep.cell(split="random").folds.outer == 1
    # The same folds with the held-out labels turned round: nothing that fold 1 learned from has changed.
    scores = []
    for target in (target_of(rows), target_of(rows) ^ fold):
        problems = Problems.of(sweep.cell(split="random").folds, target, target[None][:0])
        labels = torch.from_numpy(problems.labels)
        by_layer = {
            layer: problems.held_out(
                logistic.fit(x[layer], labels, problems.weights()).logits(x[layer]).numpy()[:, None]
            )
            for layer in range(4)
        }
        scores.append(choose(by_layer, (1.0,), problems.cut).scores)
    np.testing.assert_array_equal(scores[0][fold], scores[1][fold])
    np.testing.assert_allclose(scores[0][fold], sweep.cell(split="random").nested.scores[fold], rtol=1e-6)


def test_without_controls_the_verdict_says_that_nothing_follows(image_decides):
    rows, x, _ = image_decides
    verdict = swept(replace(rows, splits={"image": rows.image}), x, controls=()).verdict("image")
    assert verdict.control is None
    assert not verdict.beats
    assert "nothing follows" in verdict.sentence


def test_equal_seeds_give_equal_numbers(image_decides):
    rows, x, sweep = image_decides
    pd.testing.assert_frame_equal(swept(rows, x).table, sweep.table, check_exact=True)


def series(values, ids):
    return pd.Series(values, index=list(ids))


@pytest.fixture
def stored(store_of):
    rows, x = planted(4, image=1.0, entities=4, relations=5, images=4, layers=3)
    store = store_of(x, rows.ids)
    order = np.random.default_rng(0).permutation(len(rows.ids))  # series may come in any order
    ids = np.array(rows.ids)

    def arguments(**change):
        return {
            "target": series(target_of(rows), ids),
            "position": "last_input",
            "splits": {"image": series(rows.image[order], ids[order]), "random": None},
            "strengths": [1.0],
            "questions": pd.DataFrame({"relation": rows.relation, "entity": rows.entity}, index=ids).iloc[order],
            "clusters": (series(rows.question, ids), series(rows.image[order], ids[order])),
            "seed": 0,
            "replicates": 50,
        } | change

    return rows, x, store, arguments


def test_a_store_gives_what_its_arrays_give(stored):
    rows, x, store, arguments = stored
    from_store = sweep_probes(store, **arguments())
    from_arrays = swept(
        replace(rows, splits={"image": rows.image, "random": None}), x, replicates=50, positions=["last_input"]
    )
    pd.testing.assert_frame_equal(from_store.table, from_arrays.table)
    assert from_store.cell(split="image").layers == (0, 1, 2)
    some = sweep_probes(store, **arguments(layers=[2]))
    assert some.cell(split="image").layers == (2,)
    assert set(some.table.kind) == {"probe", "shuffled", "question_only", "layer_0"}
    with pytest.raises(
        DataError, match="0 cells of this sweep answer to split='entity'; it has .* split: image, random"
    ):
        some.verdict("entity")


def test_bad_input_is_refused_by_name(stored):
    rows, x, store, arguments = stored
    ids = np.array(rows.ids)
    with pytest.raises(DataError, match="labels are True"):
        sweep_probes(store, **arguments(target=series(np.ones(len(ids), dtype=bool), ids)))
    with pytest.raises(DataError, match="1 rows that the store lacks, such as stranger"):
        sweep_probes(store, **arguments(target=series(target_of(rows), [*ids[1:], "stranger"])))
    with pytest.raises(DataError, match=r"holds layers \[0, 1, 2\], not \[7\]"):
        sweep_probes(store, **arguments(layers=[1, 7]))
    with pytest.raises(DataError, match="groups of split image: 1 rows have none, such as row-0"):
        sweep_probes(store, **arguments(splits={"image": series(rows.image[1:], ids[1:])}))
    with pytest.raises(DataError, match="split by entity: 4 groups cannot fill 5 folds"):
        sweep_probes(store, **arguments(splits={"entity": series(rows.entity, ids)}))
    broken = x.clone()
    broken[1, 3, 2] = torch.nan
    with pytest.raises(DataError, match="layer 1: 1 rows hold NaN or infinity at x, such as row-3"):
        swept(rows, broken, folds=2)


def test_a_call_with_nothing_but_labels_has_sound_defaults(stored):
    rows, _, store, _ = stored
    sweep = sweep_probes(store, series(target_of(rows), rows.ids), replicates=20)
    cell = sweep.cell()
    assert cell.key == Key("last_input", "logistic", "target", "random", 0)
    assert cell.strengths == find_probe("logistic").strengths
    assert set(sweep.table.kind) == {"probe", "shuffled", "layer_0"}
    assert set(sweep.strengths.strength) == set(cell.strengths)
    best = sweep.best().iloc[0]
    assert best.layers == list(cell.nested.layers)
    assert best.auc == cell.verdict.probe.value
    assert best.sentence == cell.verdict.sentence
    assert best.p_value in {i / 6 for i in range(1, 7)}


def test_several_of_everything_is_one_plan_and_each_cell_is_as_if_alone(stored):
    rows, x, store, arguments = stored
    rng = np.random.default_rng(5)
    targets = pd.DataFrame({"one": target_of(rows), "two": rng.random(len(rows.ids)) < 0.5}, index=list(rows.ids))
    given = {"splits": {"random": None}, "strengths": [0.1, 1.0], "controls": ["shuffled"], "replicates": 20}
    sweep = sweep_probes(store, **arguments(target=targets, seed=[0, 3], **given))
    assert len(sweep.cells) == 2 * 2
    alone = sweep_probes(store, **arguments(target=targets["two"], seed=3, **given))
    cell = sweep.cell(target="two", seed=3)
    np.testing.assert_allclose(alone.cell().scores, cell.scores, atol=5e-3)
    assert set(sweep.table.target) == {"one", "two"}
    with pytest.raises(DataError, match="2 cells of this sweep answer to target='one'; .* seed: 0, 3"):
        sweep.cell(target="one")
    assert x.shape[0] == 3


def test_each_outer_fold_chooses_its_strength_on_its_training_rows():
    rows, x = planted(6, image=1.5, entities=4, relations=5, images=8, width=120)
    rows = replace(rows, splits={"random": None})
    strengths = (1e-4, 1e-2, 1.0, 100.0)
    cell = swept(rows, x, strengths=strengths, replicates=10).cell()
    assert set(cell.nested.strengths) <= set(strengths)
    for fold in range(5):
        at = cell.layers.index(cell.nested.layers[fold]), strengths.index(cell.nested.strengths[fold])
        held = cell.folds.outer == fold
        np.testing.assert_array_equal(cell.nested.scores[held], cell.scores[at][held])
    assert cell.nested.strengths.count(100.0) < 5  # 120 features for 160 rows: the freest fit is not the best


def test_a_sweep_that_was_stopped_goes_on_and_gives_the_same(tmp_path):
    rows, x = planted(7, image=1.5, entities=4, relations=5, images=6)
    rows = replace(rows, splits={"random": None})
    whole = swept(rows, x, replicates=20)
    read: list[int] = []

    def until(last):
        def reading(_, layer):
            read.append(layer)
            if layer > last:
                raise KeyboardInterrupt
            return x[layer]

        return reading

    settings = {"seeds": [0], "replicates": 20, "strengths": [1.0], "jobs": 1}
    with pytest.raises(KeyboardInterrupt):
        sweep_layers(until(1), rows, range(4), kept=Kept(tmp_path / "k", "store"), **settings)
    torn = sorted((tmp_path / "k").iterdir())
    assert len(torn) == 2
    torn[0].write_bytes(torn[0].read_bytes()[:50])
    read.clear()
    resumed = sweep_layers(until(9), rows, range(4), kept=Kept(tmp_path / "k", "store"), **settings)
    assert len(read) == 3  # the two that were missing and the one that was torn
    pd.testing.assert_frame_equal(resumed.table, whole.table, check_exact=True)
    read.clear()
    sweep_layers(until(9), rows, range(4), kept=Kept(tmp_path / "k", "store"), **settings)
    assert not read
    sweep_layers(until(9), rows, range(4), kept=Kept(tmp_path / "k", "store"), **settings | {"strengths": [2.0]})
    assert len(read) == 4


def test_what_cannot_be_swept_is_refused_before_any_fit(stored):
    rows, _, store, arguments = stored
    for change, message in (
        ({"strengths": [1.0, 0.0]}, "strengths must be above 0, got 0.0"),
        ({"target": "right"}, "no column 'right'; it has"),
        ({"splits": {"entity": "entity"}}, "groups of split entity: the store's table has no column 'entity'"),
        ({"questions": None, "controls": ["question_only"]}, "question_only needs `questions`"),
        (
            {"target": pd.DataFrame({"a": True, "b": target_of(rows)}, index=list(rows.ids))},
            "target a: all .* are True",
        ),
    ):
        with pytest.raises(DataError, match=message):
            sweep_probes(store, **arguments(**change))
    with pytest.raises(ConfigError, match="no probe is called 'oracle'; there are .*logistic"):
        sweep_probes(store, **arguments(probe="oracle"))


def test_a_permutation_p_value_counts_the_runs_that_do_as_well():
    rows, x = planted(8, image=3.0, entities=4, relations=5, images=8)
    rows = replace(rows, splits={"random": None})
    found = swept(rows, x, permutations=19, replicates=10).cell()
    assert found.p_value == 1 / 20
    values = []
    for seed in range(6):
        noise = {"target": np.random.default_rng(100 + seed).random(len(rows.ids)) < 0.5}
        values.append(swept(replace(rows, targets=noise), x, permutations=19, replicates=2).cell().p_value)
    assert 0.2 < np.mean(values) < 0.9  # uniform: 0.52 plus or minus 0.12
    assert np.isnan(swept(rows, x, controls=(), replicates=10).cell().p_value)


def test_the_figure_draws_what_the_table_says(image_decides):
    _, _, sweep = image_decides
    figure = sweep.plot()
    lines = [trace for trace in figure.data if trace.name and trace.name == "logistic"]
    assert len(lines) == 3  # a panel a split
    table = sweep.table.query("split == 'entity' and kind == 'probe'")
    assert any(np.array_equal(line.y, table.auc) for line in lines)
    assert {trace.name for trace in figure.data if trace.name} == {"logistic", "shuffled", "question_only", "layer_0"}


def test_splits_by_two_kinds_jointly_and_one_group_after_the_other(stored):
    rows, _, store, arguments = stored
    ids = list(rows.ids)
    pair = (series(rows.relation, ids), series(rows.entity, ids))
    joint = sweep_probes(store, **arguments(splits={"joint": pair}, folds=4)).cell(split="joint")
    for fold in range(4):
        held, training = joint.folds.outer == fold, joint.folds.training[fold]
        assert not set(rows.entity[held]) & set(rows.entity[training])
        assert not set(rows.relation[held]) & set(rows.relation[training])
    assert np.isfinite(joint.nested.scores).all()
    each = sweep_probes(store, **arguments(splits={"entity": series(rows.entity, ids)}, folds="each")).cell()
    assert len(each.folds.inner) == 4
    with pytest.raises(DataError, match="one kind of groups only"):
        sweep_probes(store, **arguments(splits={"joint": pair}, folds="each"))


@pytest.mark.parametrize(
    ("labels", "odd"), [(["yes", "no"], "yes"), ([0, 2], "2"), ([0.0, 0.3], "0.3"), (["False", "True"], "False")]
)
def test_labels_that_are_not_truth_values_are_refused(stored, labels, odd):
    """A word or a count would all be "true"."""
    rows, _, store, arguments = stored
    target = pd.Series(np.resize(labels, len(rows.ids)), index=list(rows.ids), name="said")
    with pytest.raises(DataError, match=f"labels 'said' must be true or false, or 1 and 0; one of them is .*{odd}"):
        sweep_probes(store, **arguments(target=target))


def test_zeros_and_ones_are_labels(stored):
    rows, _, store, arguments = stored
    settings = {"splits": {"random": None}, "replicates": 5}
    counted = sweep_probes(store, **arguments(target=series(target_of(rows).astype(int), rows.ids), **settings))
    np.testing.assert_array_equal(counted.cell().problems.target, target_of(rows))


def test_two_probes_of_one_name_are_refused(stored):
    _, _, store, arguments = stored
    with pytest.raises(DataError, match="have one name"):
        sweep_probes(store, **arguments(probe=["logistic", Logistic(1e-8)]))


class Seeded:
    """Scores nobody can know but from the seed."""

    name, strengths, calibrated = "seeded", (1.0,), False

    def __init__(self, make=None):
        self.make = make

    def fit(self, x, y, weights, strengths, seed):
        del weights, strengths
        return LinearFits(torch.full((len(y), x.shape[1]), float(seed)).double(), torch.zeros(len(y)).double())


def test_each_seed_is_the_probes_own_seed():
    rows, x = planted(4, entities=4, relations=5, images=4)
    rows = replace(rows, splits={"random": None})
    sweep = swept(rows, x, probes=[Seeded()], seeds=[1, 3], controls=(), replicates=5)
    one, three = (sweep.cell(seed=seed).scores[1, 0] for seed in (1, 3))
    np.testing.assert_allclose(three, 3 * one)


def test_fits_of_a_probe_that_holds_a_function_are_not_kept(tmp_path):
    """A function is told by where it lies in memory, and another may lie there in the next process."""
    rows, x = planted(4, entities=4, relations=5, images=4)
    rows = replace(rows, splits={"random": None})
    for probe, files in ((Seeded(lambda d: d), 0), (Seeded(), 4)):
        kept = Kept(tmp_path / f"{files}", "store")
        swept(rows, x, probes=[probe], controls=(), replicates=5, kept=kept)
        assert len(list((tmp_path / f"{files}").glob("*"))) == files


def test_each_row_is_scored_by_the_fit_that_did_not_see_it():
    rng = np.random.default_rng(0)
    target = rng.random(90) < 0.5
    cut = nested_folds(None, target, folds=3, seed=0, name="random")
    shuffled = shuffled_targets(target, cut.outer, 2, 0)
    problems = Problems.of(cut, target, shuffled)
    scores = rng.normal(size=(len(problems.labels), 2, 90))
    held = problems.held_out(scores)
    unseen = [np.flatnonzero(~mask) for mask in problems.masks]
    for strength, row in ((0, 5), (1, 40)):
        (fit,) = (i for i in range(3) if row in unseen[i])
        assert held.scores[strength, row] == scores[fit, strength, row]
        start = 3 + 9 + 3  # outer and inner fits, then those of the first permutation
        assert held.shuffled[1, strength, row] == scores[start + fit, strength, row]
    for fold in range(3):
        training = np.flatnonzero(cut.outer != fold)
        own = np.array([scores[3 + 3 * fold + cut.inner[fold, row], 1, row] for row in training])
        for row in training:
            assert row in unseen[3 + 3 * fold + cut.inner[fold, row]]
        assert held.inner_auc[1, fold] == stats.auc(own, target[training], cut.inner[fold, training])


def test_accuracy_and_calibration_are_what_they_are_said_to_be(image_decides):
    rows, _, sweep = image_decides
    cell, target = sweep.cell(split="entity"), target_of(rows)
    line = sweep.table.query("split == 'entity' and kind == 'probe' and layer == 3").iloc[0]
    scores = cell.scores[3, 0]
    probability = 1 / (1 + np.exp(-scores))
    assert line.balanced_accuracy == pytest.approx(balanced_accuracy_score(target, scores > 0))
    assert line.log_loss == pytest.approx(log_loss(target, probability))
    bins = (probability * 10).astype(int)
    off = [abs(probability[bins == b].mean() - target[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert line.ece == pytest.approx(sum(off))


def test_other_folds_of_the_same_labels_are_fitted_anew(tmp_path):
    rows, x = planted(7, image=1.5, entities=4, relations=5, images=6)
    kept = Kept(tmp_path / "k", "store")
    for name in ("one", "other"):  # folds are dealt by the split's name: as many, of other rows
        swept(replace(rows, splits={name: rows.image}), x, controls=(), replicates=5, kept=kept)
    assert len(list((tmp_path / "k").iterdir())) == 2 * len(x)
