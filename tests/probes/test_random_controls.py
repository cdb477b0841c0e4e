"""The two random controls: what a small random view reads, and what the model reads before any training."""

import inspect
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gapprobe.demo
from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.models.loading import load_model
from gapprobe.probes.controls import projected
from gapprobe.probes.kinds.logistic import Logistic
from gapprobe.probes.sweep import sweep_probes
from gapprobe.store.exchange.importing import import_activations
from gapprobe.tasks.examples import Example
from gapprobe.tracing.run import capture

N, WIDTH, LAYERS = 240, 48, 3
GAP = 1e-9


def residuals(rng, token, meaning):
    """Return [n l d]: a random embedding of each row's token, and a direction for its meaning, if it has one."""
    x = rng.normal(size=(10, LAYERS, WIDTH))[token] + 0.7 * rng.normal(size=(N, LAYERS, WIDTH))
    if meaning is not None:
        x[:, 1:, 5] += 6 * meaning[:, None]
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    rng = np.random.default_rng(0)
    token, meaning = rng.integers(10, size=N), rng.random(N) < 0.5
    labels = pd.DataFrame({"token": token < 5, "meaning": meaning}, index=[f"row {i}" for i in range(N)])
    trained = import_activations(folder / "trained", residuals(rng, token, meaning), labels, model="trained")
    order = rng.permutation(N)  # a store's order is no one's business
    x = residuals(rng, token, None)
    untrained = import_activations(folder / "untrained", x[order], labels.iloc[order], model="random")
    renamed = labels.iloc[order].rename(index=lambda i: f"other {i}")
    return (
        trained,
        untrained,
        import_activations(folder / "renamed", x[order], renamed, model="random, renamed"),
        labels,
    )


def expected(x, y, outer):
    """Return scikit-learn's out-of-fold log-odds, and by how much a certified fit may be off them.

    A gap of g of an objective of C n log 2 at most leaves the weights off by sqrt(2 g C n log 2), and a row's log-odds
    by that times its length; the intercept's part is no larger.
    """
    scores, longest = np.empty(len(y)), 0.0
    for fold in np.unique(outer):
        held = outer == fold
        logistic = LogisticRegression(C=0.1, tol=1e-10, solver="newton-cholesky", class_weight="balanced")
        probe = make_pipeline(StandardScaler(), logistic).fit(x[~held], y[~held])
        scores[held] = probe.decision_function(x[held])
        longest = max(longest, np.linalg.norm(probe[0].transform(x[held]), axis=1).max())
    return scores, 2 * longest * np.sqrt(2 * GAP * 0.1 * len(y) * np.log(2))


def swept(store, target, **options):
    settings = {"strengths": [0.1], "replicates": 100, "folds": 4, "controls": ["random_model"]} | options
    return sweep_probes(store, target, **settings)


def test_what_tokens_tell_is_told_by_the_random_model_and_what_training_made_is_not(study):
    trained, untrained, _, labels = study
    sweep = swept(trained, labels, random_model=untrained)
    tokens, meaning = sweep.cell(target="token").verdict, sweep.cell(target="meaning").verdict
    assert tokens.probe.value > 0.95
    assert tokens.control == "random_model"
    assert not tokens.beats
    assert "the same probe on the model with random weights, reaches" in tokens.sentence
    assert meaning.beats
    assert meaning.control_auc.value < 0.65
    by_layer = sweep.table.query("target == 'meaning' and kind == 'random_model'")
    assert list(by_layer.layer) == [0, 1, 2]
    assert (by_layer.auc < 0.65).all()
    assert any(trace.name == "random_model" for trace in sweep.plot().data)


def test_the_random_models_scores_are_a_probes_on_its_own_residuals(study):
    trained, untrained, _, labels = study
    settings = {"random_model": untrained, "layers": [1], "probe": Logistic(GAP)}
    cell = swept(trained, labels["token"], **settings).cell()
    x = untrained.layer(1, "last_input", rows=labels.index).numpy()
    scores, off = expected(x, labels["token"].to_numpy(), cell.folds.outer)
    np.testing.assert_allclose(cell.controls["random_model"], scores, rtol=0, atol=off)


def test_rows_are_matched_by_what_the_user_says(study):
    trained, untrained, renamed, labels = study
    told = {f"row {i}": f"other row {i}" for i in range(N)}
    one = swept(trained, labels["token"], random_model=untrained)
    for given in (told, pd.Series(told)):
        other = swept(trained, labels["token"], random_model=renamed, random_rows=given)
        np.testing.assert_array_equal(other.cell().controls["random_model"], one.cell().controls["random_model"])
    with pytest.raises(DataError, match="renamed lacks 240 of 240 rows, such as row 0; capture the same examples"):
        swept(trained, labels["token"], random_model=renamed)
    del told["row 7"]
    with pytest.raises(DataError, match="lacks 1 of 240 rows, such as row 7"):
        swept(trained, labels["token"], random_model=renamed, random_rows=told)


def test_what_is_no_random_model_of_these_rows_is_refused_before_any_fit(study, tmp_path):
    trained, untrained, _, labels = study
    with pytest.raises(DataError, match="trained is of the same model as .*trained; capture its rows anew"):
        swept(trained, labels["token"], random_model=trained)
    shallow = import_activations(tmp_path / "shallow", np.zeros((N, 1, 4), np.float32), labels, model="shallow")
    with pytest.raises(DataError, match=r"shallow lacks layers 1, 2; it has \[0\]"):
        swept(trained, labels["token"], random_model=shallow)
    with pytest.raises(DataError, match="random_model needs `random_model`: a store"):
        swept(trained, labels["token"])
    # Without the type checks that tests run with, which would refuse the name first.
    with pytest.raises(DataError, match="there is no control 'random'; there are shuffled, .*random_projection"):
        inspect.unwrap(sweep_probes)(trained, labels["token"], controls=["random"])
    for dimensions in (0, WIDTH):
        with pytest.raises(DataError, match=f"a random projection of 48 features has 1 to 47 dimensions: {dimensions}"):
            swept(trained, labels["token"], controls=["random_projection"], dimensions=dimensions)


def test_the_random_model_is_a_control_by_default_and_the_projection_where_asked_for(study):
    trained, untrained, _, labels = study
    sweep = swept(trained, labels["token"], random_model=untrained, controls=None, replicates=10)
    assert set(sweep.table.kind) == {"probe", "shuffled", "layer_0", "random_model"}
    assert set(sweep.cell().controls) == {"layer_0", "random_model"}


def test_a_random_projection_reads_what_is_everywhere_and_not_one_direction(study):
    trained, _, _, labels = study
    settings = {"controls": ["random_projection"], "dimensions": 6}
    found = swept(trained, labels, **settings)
    areas = {target: found.cell(target=target).verdict for target in labels}
    assert areas["token"].control_auc.value < areas["token"].probe.value
    assert areas["token"].control_auc.value > 0.7
    assert areas["token"].beats


def test_a_random_projection_is_the_probe_on_projected_rows(study):
    trained, _, _, labels = study
    settings = {"layers": [1], "seed": [0, 3], "dimensions": 6, "probe": Logistic(GAP)}
    sweep = swept(trained, labels["meaning"], controls=["random_projection"], **settings)
    y = labels["meaning"].to_numpy()
    for seed in (0, 3):
        cell = sweep.cell(seed=seed)
        x = projected(trained.layer(1, "last_input", rows=labels.index), 6, seed).numpy()
        scores, off = expected(x, y, cell.folds.outer)
        np.testing.assert_allclose(cell.controls["random_projection"], scores, rtol=0, atol=off)
        line = sweep.table.query(f"kind == 'random_projection' and seed == {seed}").iloc[0]
        assert line.auc == pytest.approx(stats.auc(cell.controls["random_projection"], y, cell.folds.outer))


def test_a_projection_keeps_lengths_on_average_and_is_the_seeds():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 300)))
    seen = projected(x, 32, 0)
    assert torch.equal(seen, projected(x, 32, 0))
    assert not torch.equal(seen, projected(x, 32, 1))
    ratio = (seen.square().sum(1) / x.square().sum(1)).numpy()
    # A chi-squared of 32 degrees over 32, the same directions for all rows: mean 1, deviation sqrt(2 / 32).
    assert ratio.mean() == pytest.approx(1, abs=4 * 0.25 / np.sqrt(32))
    assert ratio.std() == pytest.approx(0.25, abs=0.05)


def test_controls_that_are_fitted_are_kept_in_the_folder_too(study, tmp_path, monkeypatch):
    trained, untrained, _, labels = study
    settings = {"random_model": untrained, "controls": ["random_model", "random_projection"], "folder": tmp_path / "k"}
    first = swept(trained, labels["token"], **settings)
    assert len(list((tmp_path / "k").iterdir())) == 3 * LAYERS

    def never(*_, **__):
        raise AssertionError("fitted anew")

    monkeypatch.setattr("gapprobe.probes.fitting._fit", never)
    again = swept(trained, labels["token"], **settings)
    pd.testing.assert_frame_equal(again.table, first.table, check_exact=True)
    with pytest.raises(AssertionError, match="fitted anew"):
        swept(trained, labels["token"], **settings, dimensions=7)


def test_other_activations_of_one_shape_are_fitted_anew(tmp_path):
    """Two imports of one shape have one header; numbers kept of one must not be taken for the other's."""
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.5
    labels = pd.DataFrame({"right": right}, index=[f"r{i}" for i in range(80)])
    x = rng.normal(size=(80, 1, 5)).astype(np.float32)
    areas = []
    for name, shift in (("noise", 0.0), ("told", 5.0)):
        x[:, 0, 0] += shift * right
        store = import_activations(tmp_path / name, x, labels)
        areas.append(swept(store, "right", controls=["shuffled"], folder=tmp_path / "fitted").best()["auc"][0])
    assert areas[0] < 0.75
    assert areas[1] > 0.95


MODEL = Path(gapprobe.demo.__file__).parent / "models" / "llava"


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    words = ["left", "right", "above", "below", "number", "shape", "what", "which", "even", "odd"]
    examples = [Example(f"{a} {b} {c}") for a in words[:6] for b in words for c in words[:2]]
    root = tmp_path_factory.mktemp("captured")
    models = {"trained": load_model(MODEL), "random": load_model(MODEL, random_weights=0)}
    return models, {name: capture(model, examples, root / name, max_new_tokens=1) for name, model in models.items()}


def test_a_model_with_random_weights_is_told_apart_and_has_the_same_rows(captured):
    models, stores = captured
    trained, random = models["trained"], models["random"]
    assert set(stores["trained"].ids) == set(stores["random"].ids)
    assert stores["random"].header.model["random_weights"] == "0"
    assert "random_weights" not in stores["trained"].header.model
    assert stores["trained"].header.fingerprint != stores["random"].header.fingerprint
    theirs = dict(random.hf.named_parameters())
    assert all(p.shape == theirs[name].shape for name, p in trained.hf.named_parameters())
    deviation = random.text_config.initializer_range
    weight = theirs["model.language_model.layers.0.mlp.up_proj.weight"]
    # Of so many draws: the architecture's own initialisation, and not the trained weights' deviation.
    assert float(weight.std()) == pytest.approx(deviation, rel=4 / np.sqrt(2 * weight.numel()))


def test_random_weights_are_the_seeds_and_leave_other_random_numbers_alone(captured):
    before = torch.random.get_rng_state()
    same, other = (load_model(MODEL, random_weights=seed) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same.weights_fingerprint == captured[0]["random"].weights_fingerprint
    assert other.weights_fingerprint != same.weights_fingerprint


def test_the_last_word_is_read_off_the_random_model_as_well(captured):
    stores = captured[1]
    table = stores["trained"].rows
    last = table["text"].str.endswith("left")
    settings = {"random_model": stores["random"], "layers": [1, 3], "replicates": 50}
    verdict = swept(stores["trained"], last, **settings).cell().verdict
    assert verdict.probe.value > 0.99
    assert verdict.control_auc.value > 0.99
    assert not verdict.beats
