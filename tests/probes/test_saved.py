"""Coefficients are those that scored held-out rows, and a sweep that was saved is read back as it was."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from xxhash import xxh3_128

from gapprobe.errors import DataError
from gapprobe.probes.base import LinearFits
from gapprobe.probes.kept import Kept
from gapprobe.probes.saved import load_sweep
from gapprobe.probes.sweep import sweep_layers
from tests.probes.planted import planted

STRENGTHS = (0.01, 1.0)


def swept(rows, x, **options):
    settings = {"seeds": [0], "replicates": 20, "strengths": STRENGTHS, "permutations": 2} | options
    return sweep_layers(lambda _, layer: x[layer], rows, range(len(x)), **settings)


@pytest.fixture(scope="module")
def study():
    return planted(3, image=1.5, entities=6, relations=5, images=6, layers=3)


@pytest.fixture(scope="module")
def sweep(study):
    rows, x = study
    settings = {"probes": ["logistic", "mean_difference"], "coefficients": True}
    return swept(rows, x, controls=("shuffled", "question_only", "random_projection"), dimensions=4, **settings)


@pytest.fixture
def saved(sweep, tmp_path):
    return sweep.save(tmp_path / "sweep")


def rescored(cell, x):
    """Score every row by the coefficients of the fold that holds it out, in float64; with a bound on rounding."""
    scores, bound = np.full(cell.scores.shape, np.nan), np.full(cell.scores.shape, np.nan)
    for at, layer in enumerate(cell.layers):
        own, features = cell.coefficients(layer), x[layer].double().numpy()
        for fold in range(len(cell.folds.inner)):
            held = cell.folds.outer == fold
            scores[at][:, held] = own.coef[:, fold] @ features[held].T + own.intercept[:, fold, None]
            size = np.abs(own.coef[:, fold]) @ np.abs(features[held]).T + np.abs(own.intercept[:, fold, None])
            # Two sums of d + 1 products, in whatever order, differ by this at most (Higham 2002, section 3.1).
            bound[at][:, held] = 2 * (features.shape[1] + 2) * np.finfo(float).eps * size
    return scores, bound


@pytest.mark.parametrize("split", ["image", "entity", "random"])
@pytest.mark.parametrize("probe", ["logistic", "mean_difference"])
def test_a_folds_coefficients_are_what_scored_its_held_out_rows(study, sweep, probe, split):
    cell = sweep.cell(probe=probe, split=split)
    scores, bound = rescored(cell, study[1])
    assert (np.abs(scores - cell.scores) <= bound).all()


def test_coefficients_in_a_folder_are_those_in_memory(study, sweep, tmp_path):
    rows, x = study
    for _ in range(2):  # as fitted, and as found there
        kept = swept(rows, x, probes=["logistic"], controls=("shuffled",), kept=Kept(tmp_path / "k", "store"))
        for split in rows.splits:
            cell = kept.cell(split=split)
            scores, bound = rescored(cell, x)
            assert (np.abs(scores - cell.scores) <= bound).all()
            own, held = cell.coefficients(2), sweep.cell(probe="logistic", split=split).coefficients(2)
            assert own.coef.shape == held.coef.shape == (2, 5, 16)
    for file in (tmp_path / "k").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="the coefficients of this sweep cannot be read: .*run the sweep again"):
        kept.cell(split="image").coefficients(0)


def test_coefficients_that_were_not_kept_are_refused_with_the_reason(study, sweep):
    rows, x = study
    cell = swept(replace(rows, splits={"random": None}), x, controls=()).cell()
    with pytest.raises(DataError, match="no coefficients of logistic were kept: .* coefficients=True"):
        cell.coefficients(1)
    with pytest.raises(DataError, match=r"the sweep has layers \[0, 1, 2\], not 9"):
        sweep.cell(probe="logistic", split="image").coefficients(9)
    neighbours = swept(replace(rows, splits={"random": None}), x, probes=["knn"], strengths=[5.0], coefficients=True)
    with pytest.raises(DataError, match="no coefficients of knn were kept: .*whose fits are linear"):
        neighbours.cell().coefficients(1)


def test_parts_of_any_size_give_the_same_rows_the_same_fits(study, monkeypatch):
    """A probe that is the same alone as in company: whatever the parts, no fit may land in another's place."""
    rows, x = study
    settings = {"probes": ["mean_difference"], "strengths": [1.0], "coefficients": True}
    whole = swept(rows, x, **settings)
    monkeypatch.setattr("gapprobe.probes.fitting.PART", 7 * 2 * (len(rows.ids) + x.shape[2]))  # seven fits at once
    cut = swept(rows, x, **settings)
    for key, cell in whole.cells.items():
        other = cut.cells[key]
        scores, bound = rescored(cell, x)
        assert (np.abs(other.scores - scores) <= 2 * bound).all()
        np.testing.assert_allclose(other.coefficients(2).coef, cell.coefficients(2).coef, rtol=1e-12)
        # What shuffled labels and inner folds chose rides on the same places.
        np.testing.assert_allclose(other.nested.shuffled, cell.nested.shuffled, rtol=1e-9, atol=1e-9)


def test_each_strength_is_its_own_whatever_is_swept_beside_it(study):
    rows, x = study
    settings = {"probes": ["ridge"], "controls": (), "coefficients": True}
    both = swept(rows, x, **settings, strengths=(1.0, 1e-3)).cell(split="image")
    for at, strength in enumerate(both.strengths):
        alone = swept(rows, x, **settings, strengths=[strength]).cell(split="image")
        # Closed forms in float64, solved alone or side by side.
        np.testing.assert_allclose(both.scores[:, at], alone.scores[:, 0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(both.coefficients(1).coef[at], alone.coefficients(1).coef[0], rtol=0, atol=1e-9)
    assert np.abs(both.scores[1, 0] - both.scores[1, 1]).max() > 1e-3


def same(one, other):
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    pd.testing.assert_frame_equal(one.strengths, other.strengths, check_exact=True)
    assert one.ids == other.ids
    assert list(one.cells) == list(other.cells)
    for own, cell in zip(one.cells.values(), other.cells.values(), strict=True):
        assert (own.key, own.layers, own.strengths) == (cell.key, cell.layers, cell.strengths)
        assert (own.nested.layers, own.nested.strengths) == (cell.nested.layers, cell.nested.strengths)
        assert own.verdict == cell.verdict
        np.testing.assert_equal(own.p_value, cell.p_value)  # NaN without permutations
        assert list(own.controls) == list(cell.controls)
        arrays = [(own.scores, cell.scores), (own.nested.scores, cell.nested.scores)]
        arrays += [(own.nested.shuffled, cell.nested.shuffled)]
        arrays += [(own.controls[name], cell.controls[name]) for name in own.controls]
        arrays += [
            (getattr(own.problems, name), getattr(cell.problems, name)) for name in ("labels", "masks", "target")
        ]
        for layer in own.linear:
            a, b = own.coefficients(layer), cell.coefficients(layer)
            arrays += [(a.coef, b.coef), (a.intercept, b.intercept)]
        for a, b in arrays:
            np.testing.assert_array_equal(a, b)


def test_a_saved_sweep_is_read_back_as_it_was(sweep, saved):
    again = load_sweep(saved)
    same(sweep, again)
    assert len(again.cells) == 6
    assert set(again.cell(probe="logistic", split="image").controls) == {"question_only", "random_projection"}
    pd.testing.assert_frame_equal(sweep.best(), again.best(), check_exact=True)
    assert again.plot().to_json() == sweep.plot().to_json()


def test_a_sweep_is_saved_over_itself_and_over_a_larger_one(study, sweep, saved, tmp_path):
    again = load_sweep(saved)
    again.save(saved)  # its coefficients are read from the files that are replaced
    same(sweep, load_sweep(saved))
    rows, x = study
    small = swept(replace(rows, splits={"random": None}), x, controls=())
    small.save(saved)
    same(small, load_sweep(saved))
    assert {path.name for path in saved.iterdir()} == {"sweep.json", "scores.safetensors"}
    assert small.cell().verdict.control_auc is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="is there already and is no saved sweep; name another folder"):
        sweep.save(tmp_path / "mine")


def reworded(path, change):
    """Change sweep.json, checksums and all, as one who wants to mislead would."""
    about = json.loads((path / "sweep.json").read_text())
    change(about)
    about["files"] = {
        name: xxh3_128((path / name).read_bytes()).hexdigest() if (path / name).is_file() else told
        for name, told in about["files"].items()
    }
    (path / "sweep.json").write_text(json.dumps(about))


def with_arrays(path, change):
    arrays = load_file(path / "scores.safetensors")
    change(arrays)
    save_file(arrays, path / "scores.safetensors")
    reworded(path, lambda _: None)


def put(arrays, name, array):
    arrays[name] = np.ascontiguousarray(array)


DAMAGE = {
    "no json": lambda p: (p / "sweep.json").write_bytes(b"\x80\x04nonsense"),
    "a list": lambda p: (p / "sweep.json").write_text("[]"),
    "too deep": lambda p: (p / "sweep.json").write_text("[" * 100_000),
    "another kind": lambda p: reworded(p, lambda about: about.update(kind="pickle")),
    "a later version": lambda p: reworded(p, lambda about: about.update(version=2)),
    "no table": lambda p: reworded(p, lambda about: about.pop("table")),
    "a column of objects": lambda p: reworded(p, lambda about: about["table"][0].update(dtype="category")),
    "a torn column": lambda p: reworded(p, lambda about: about["table"][0]["values"].pop()),
    "fewer ids": lambda p: reworded(p, lambda about: about["ids"].pop()),
    "a cell of no problem": lambda p: reworded(p, lambda about: about["cells"][0].update(problems=99)),
    "a key too many": lambda p: reworded(p, lambda about: about["cells"][0]["key"].update(colour="red")),
    "a layer that was not swept": lambda p: reworded(p, lambda about: about["cells"][0]["nested_layers"].append(7)),
    "coefficients of no layer": lambda p: reworded(p, lambda about: about["cells"][0]["linear"].append(7)),
    "another file": lambda p: (
        (p.parent / "secret").write_text("of another folder"),
        reworded(p, lambda about: about["files"].update({"../secret": "its checksum"})),
    ),
    "no scores": lambda p: (p / "scores.safetensors").unlink(),
    "no coefficients": lambda p: (p / "coefficients-0.safetensors").unlink(),
    "torn scores": lambda p: (p / "scores.safetensors").write_bytes((p / "scores.safetensors").read_bytes()[:-8]),
    "scores of another": lambda p: shutil.copy(p / "coefficients-0.safetensors", p / "scores.safetensors"),
    "fewer scores": lambda p: with_arrays(p, lambda a: put(a, "cells.0.scores", a["cells.0.scores"][:, :, 1:])),
    "scores of another type": lambda p: with_arrays(
        p, lambda a: put(a, "cells.0.scores", a["cells.0.scores"].astype(np.float32))
    ),
    "a fold too many": lambda p: with_arrays(p, lambda a: put(a, "problems.0.outer", a["problems.0.outer"] + 1)),
    "endless inner folds": lambda p: with_arrays(
        p, lambda a: put(a, "problems.0.inner", a["problems.0.inner"] + (1 << 40))
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sweep_is_one_clear_error(saved, damage):
    DAMAGE[damage](saved)
    with pytest.raises(DataError, match="cannot be read as a sweep: .+; save it again, or run the sweep"):
        load_sweep(saved)


def test_no_sweep_is_said_to_be_none(tmp_path):
    with pytest.raises(DataError, match="holds no sweep: it has no sweep.json"):
        load_sweep(tmp_path / "nowhere")


def test_a_flipped_bit_of_a_coefficient_is_found(saved):
    path = saved / "coefficients-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="coefficients-0.safetensors is not the file that sweep.json was written with"):
        load_sweep(saved)


class Shared(LinearFits):
    """Linear fits that a user has made more of."""


def test_a_users_linear_fits_have_coefficients_too(study):
    rows, x = study

    class First:
        name, strengths, calibrated = "first", (1.0,), False

        def fit(self, x, y, weights, strengths, seed):
            del weights, strengths, seed
            coef = torch.zeros(len(y), x.shape[1], dtype=torch.float64)
            coef[:, 0] = torch.arange(1, len(y) + 1)
            return Shared(coef, torch.zeros(len(y), dtype=torch.float64))

    settings = {"probes": [First()], "controls": (), "coefficients": True, "strengths": None}
    cell = swept(replace(rows, splits={"random": None}), x, **settings).cell()
    np.testing.assert_array_equal(cell.coefficients(1).coef[0, :, 0], [1, 2, 3, 4, 5])  # the outer folds come first
