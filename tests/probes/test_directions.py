"""A direction leaves a sweep in raw coordinates, moves what it is said to move, and comes back from disk as it was."""

from operator import attrgetter

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gapprobe as gp
from gapprobe.demo import FOLDER
from gapprobe.errors import DataError
from gapprobe.probes.directions import load_direction, probe_direction
from tests.probes.planted import planted


@pytest.fixture
def stored(store_of):
    rows, x = planted(4, image=2.0, entities=4, relations=5, images=4, layers=3)
    x = x * torch.logspace(-2, 2, x.shape[2])  # raw residuals: badly scaled
    return x, store_of(x, rows.ids), pd.Series(rows.targets["target"], index=list(rows.ids), name="right")


def test_its_scores_are_scikit_learns_on_raw_residuals(stored):
    x, store, target = stored
    direction = probe_direction(store, target, layer=2, strength=1.0)
    fit = make_pipeline(
        StandardScaler(), LogisticRegression(tol=1e-10, solver="newton-cholesky", class_weight="balanced")
    )
    fit.fit(x[2].double().numpy(), target)
    expected = fit.decision_function(x[2].double().numpy())
    np.testing.assert_allclose(direction.scores(x[2]).numpy(), expected, rtol=0, atol=2e-3)
    assert direction.about["probe"] == "logistic"
    assert direction.about["rows"] == len(target)
    assert direction.layer == 2


def test_steering_moves_along_it_and_ablation_leaves_nothing_of_it(stored):
    x, store, target = stored
    direction = probe_direction(store, target, layer=2)
    before = direction.scores(x[2])
    moved = direction.scores(direction.steer(x[2].double(), 2.0)) - before
    expected = 2.0 * direction.spread * float(direction.vector.norm())
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-9, atol=1e-9)
    ablated = direction.ablate(x[2].double())
    assert float(direction.scores(ablated).std()) < 1e-9 * float(before.std())
    torch.testing.assert_close(direction.scores(ablated).mean(), before.mean())  # at the rows' mean, and not at 0
    torch.testing.assert_close(direction.ablate(ablated), ablated)
    name, hook = direction.hook()
    assert name == "blocks.1.hook_resid_post"
    torch.testing.assert_close(hook(x[2].double(), hook=None), ablated)


def test_it_comes_back_from_disk_as_it_was(stored, tmp_path):
    _, store, target = stored
    direction = probe_direction(store, target, layer=1)
    direction.save(tmp_path / "d.safetensors")
    again = load_direction(tmp_path / "d.safetensors")
    assert torch.equal(again.vector, direction.vector)
    assert (again.intercept, again.spread, again.mean) == (direction.intercept, direction.spread, direction.mean)
    assert (again.layer, again.about) == (1, direction.about)


def test_what_is_no_direction_is_refused(stored, tmp_path):
    _, store, target = stored
    with pytest.raises(DataError, match=r"holds layers \[0, 1, 2\], not 5"):
        probe_direction(store, target, layer=5)
    with pytest.raises(DataError, match="no column 'x'"):
        probe_direction(store, "x", layer=1)
    with pytest.raises(DataError, match="no row of class False"):
        probe_direction(store, target | True, layer=1)
    save_file({"vector": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="holds no direction"):
        load_direction(tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(DataError, match="cannot be read as a direction"):
        load_direction(tmp_path / "torn.safetensors")
    with pytest.raises(DataError, match="cannot be read as a direction"):
        load_direction(tmp_path / "none.safetensors")


def test_it_steers_a_model_in_nnsight(tmp_path):
    """Adding it to the layer's residual moves the log-odds that the probe reads there by as much as it says."""
    model = gp.load_model(FOLDER / "models" / "llava")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    examples = [
        gp.Example(f"Question: What is {word} {what}? Answer:") for word in words for what in ("doubled", "squared")
    ]
    store = gp.capture(model, examples, tmp_path / "s", positions=["last_input"], max_new_tokens=0, progress=False)
    rows = store.rows
    target = pd.Series(rows["text"].str.contains("doubled").to_numpy(), index=rows.index)
    layer = model.n_layers - 1
    direction = gp.probe_direction(store, target, layer=layer)
    inputs = model.encode([examples[0].text])
    block = attrgetter(model.family.blocks)(model.traced)[layer - 1]
    with torch.no_grad(), model.traced.trace(**inputs):
        before = block.output.save()
        block.output = direction.steer(block.output, 3.0)
        after = block.output.save()
    moved = direction.scores(after) - direction.scores(before)
    expected = 3.0 * direction.spread * float(direction.vector.norm())
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=1e-3)
