"""CKA over stores: layers, positions, stores, batches, figure, refusals."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import gapprobe as gp
from gapprobe.errors import DataError, StoreError
from gapprobe.kernels.cka import reference


@pytest.fixture(scope="module")
def digits():
    return load_digits().data[:90].astype("float32")


@pytest.fixture(scope="module")
def store(digits, tmp_path_factory):
    """Return a store of digits, of their squares, and of noise, at two positions."""
    noise = np.random.default_rng(0).normal(size=digits.shape).astype("float32")
    layers = np.stack([digits, digits**2, noise], axis=1)
    tokens = np.stack([layers, layers[..., ::-1] * 2], axis=2)  # [n l t d]
    positions = {"first": np.zeros(90, int), "last_input": np.full(90, -1)}
    ids = [f"digit {i}" for i in range(90)]
    # Small shards: a batch takes rows of several.
    return gp.import_activations(
        tmp_path_factory.mktemp("cka") / "s", tokens, ids=ids, position=positions, shard_bytes=1 << 16
    )


@pytest.mark.parametrize("debiased", [True, False])
def test_every_pair_of_layers_is_the_definition(store, debiased):
    assert len(store.records) > 1
    found = gp.cka(store, debiased=debiased)
    assert (found.n, found.batches) == (90, 1)
    for i in range(3):
        for j in range(3):
            x, y = store.layer(i, "last_input"), store.layer(j, "last_input")
            assert found.table.loc[i, j] == pytest.approx(reference(x, y, debiased=debiased), abs=1e-9)
    assert found.table.loc[0, 1] > 0.8
    if debiased:
        assert abs(found.table.loc[0, 2]) < 0.1


def test_positions_and_stores_of_another_width_are_compared_row_by_row(store, digits, tmp_path):
    turned = gp.cka(store, other_position="first", layers=[0], other_layers=[0, 2])
    # The first token is the last one with its dimensions reversed and halved: the same geometry.
    assert turned.table.shape == (1, 2)
    assert turned.table.loc[0, 0] == pytest.approx(1.0, abs=1e-9)
    order = np.random.default_rng(1).permutation(90)
    ids = [f"digit {i}" for i in order]
    narrow = gp.import_activations(tmp_path / "narrow", digits[order][:, None, :20].copy(), ids=ids)
    found = gp.cka(store, narrow, layers=[0])
    x, y = store.layer(0, "last_input"), torch.from_numpy(digits[:, :20])
    assert found.table.loc[0, 0] == pytest.approx(reference(x, y, debiased=True), abs=1e-9)
    assert found.sides == ("s at last_input", "narrow at last_input")


def test_batches_average_the_unbiased_hsic(store):
    found = gp.cka(store, batch=30, layers=[0], other_layers=[1])
    assert found.batches == 3
    whole = gp.cka(store, layers=[0], other_layers=[1]).table.loc[0, 1]
    # Batches of 30 estimate the same number; over seeds they scatter about it.
    scattered = [gp.cka(store, batch=30, layers=[0], other_layers=[1], seed=s).table.loc[0, 1] for s in range(20)]
    assert np.std(scattered) > 0
    assert abs(np.mean(scattered) - whole) < 3 * np.std(scattered) / np.sqrt(20) + 0.01


def test_a_layer_that_does_not_vary_has_no_cka(digits, tmp_path):
    x = np.stack([digits, np.ones_like(digits)], axis=1)
    found = gp.cka(gp.import_activations(tmp_path / "s", x)).table
    assert found.loc[0, 0] == pytest.approx(1.0)
    assert found.loc[[0, 1], 1].isna().all()


def test_the_figure_shows_the_table(store):
    found = gp.cka(store)
    figure = found.plot()
    np.testing.assert_array_equal(figure.data[0].z, found.table.to_numpy())
    assert figure.layout.title.text == "Linear CKA, debiased, 90 rows"
    assert figure.layout.yaxis.title.text == "layer, s at last_input"


def test_what_cannot_be_compared_is_refused(store, digits, tmp_path):
    with pytest.raises(DataError, match="CKA of 3 rows"):
        gp.cka(store, rows=store.ids[:3])
    with pytest.raises(DataError, match="raise `batch`, choose fewer `rows`, or use debiased"):
        gp.cka(store, debiased=False, batch=50)
    with pytest.raises(StoreError, match="no row 'x'"):
        gp.cka(store, rows=["x", *store.ids[:5]])
    with pytest.raises(StoreError, match="no layer 7"):
        gp.cka(store, layers=[7])
    with pytest.raises(StoreError, match="no position 'last'"):
        gp.cka(store, position="last")
    bad = digits.copy()
    bad[5, 3] = np.nan
    ids = [f"digit {i}" for i in range(90)]
    broken = gp.import_activations(tmp_path / "s", bad[:, None], ids=ids, allow_nonfinite=True)
    with pytest.raises(DataError, match="row 'digit 5' has NaN or an infinity at layer 0"):
        gp.cka(broken)


def test_batches_that_the_estimator_cannot_use_are_refused(store):
    ids = list(store.ids)[:5]
    with pytest.raises(DataError, match="the smallest would have 2 rows, and wants at least 4; raise `batch`"):
        gp.cka(store, rows=ids, batch=4)
    assert gp.cka(store, rows=ids, batch=5).table.notna().any().any()
