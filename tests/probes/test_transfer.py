"""Probes carried from set to set, on planted stores whose truth is known, and against scikit-learn."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import gapprobe as gp
from gapprobe import stats
from gapprobe.errors import ConfigError, DataError
from gapprobe.probes.transfer import TransferSet, transfer_probes
from gapprobe.store.reader import Store
from tests.study.planted import residuals, store_with, trials

STRENGTH = 1.5


def planted_set(folder: Path, seed: int, *, own: bool = True, flip: bool = False, **how: float) -> TransferSet:
    """Return a set of 60 questions with 10 images; `own` questions have names that no other set has."""
    settings = {"strength": STRENGTH, "identity": 0.0, "rate": 0.5, "width": 6} | how
    table = trials(60, 10, settings["rate"], seed)
    x = residuals(
        table, int(settings["width"]), settings["strength"] * (-1 if flip else 1), settings["identity"], seed + 50
    )
    store = store_with(x, table, folder / f"store{seed}")
    rows = table.set_index("visual_row")
    names = rows["question"] + (f" of {seed}" if own else "")
    return TransferSet(store, rows["visual"], groups=names, clusters=rows["image"])


def test_a_shared_direction_carries_over_and_a_turned_one_turns(tmp_path: Path) -> None:
    sets = {"a": planted_set(tmp_path, 0), "b": planted_set(tmp_path, 1), "c": planted_set(tmp_path, 2, flip=True)}
    found = transfer_probes(sets, pairs=[(["a"], "b"), (["a", "b"], "c"), (["b"], "a")], replicates=200)
    truth = norm.cdf(STRENGTH / 2**0.5)
    best = found.best.set_index("test")
    for test, area in (("b", truth), ("c", 1 - truth), ("a", truth)):
        assert best.loc[test, "ci_low"] < area < best.loc[test, "ci_high"]
        assert best.loc[test, "layers"] == [2]
        assert best.loc[test, "shared"] == 0
    assert best.loc["c", "train"] == "a + b"
    assert abs(best.loc["b", "accuracy"] - norm.cdf(STRENGTH / 2)) < 0.05
    nothing = found.table[found.table["layer"] < 2]
    assert ((nothing["ci_low"] < 0.5) & (nothing["ci_high"] > 0.5)).all()
    assert found.table["n"].eq(600).all()


def test_by_default_every_set_is_left_out_in_turn(tmp_path: Path) -> None:
    sets = {name: planted_set(tmp_path, i) for i, name in enumerate("abc")}
    best = gp.transfer_probes(sets, layers=[2], replicates=50).best
    assert list(zip(best["train"], best["test"], strict=True)) == [("b + c", "a"), ("a + c", "b"), ("a + b", "c")]


def test_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    sets = {"a": planted_set(tmp_path, 3), "b": planted_set(tmp_path, 4)}
    found = transfer_probes(sets, pairs=[(["a"], "b")], layers=[0, 2], strengths=[0.1], replicates=20)

    def of(part: TransferSet, layer: int) -> tuple[np.ndarray, np.ndarray]:
        target = part.target
        assert isinstance(target, pd.Series)
        x = part.store.layer(layer, position="last_input", rows=list(target.index))
        return x.double().numpy(), target.to_numpy(dtype=bool)

    for layer, line in found.table.groupby("layer"):
        (x, y), (test, right) = of(sets["a"], int(str(layer))), of(sets["b"], int(str(layer)))
        scaler = StandardScaler().fit(x)
        fit = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=10000).fit(scaler.transform(x), y)
        scores = fit.decision_function(scaler.transform(test))
        assert line["auc"].item() == pytest.approx(stats.auc(scores, right), abs=1e-4)
        if layer == found.best["layers"][0][0]:
            assert found.best["accuracy"][0] == pytest.approx(((scores > 0) == right).mean(), abs=2e-3)


def test_without_clusters_the_groups_alone_are_resampled(tmp_path: Path) -> None:
    sets = {"a": planted_set(tmp_path, 10), "b": planted_set(tmp_path, 11)}
    alone = {name: TransferSet(part.store, part.target, part.groups) for name, part in sets.items()}
    found = transfer_probes(alone, pairs=[(["a"], "b")], layers=[2], strengths=[0.1], replicates=100).best.iloc[0]
    target, groups = sets["b"].target, sets["b"].groups
    assert isinstance(target, pd.Series)
    assert isinstance(groups, pd.Series)
    # Questions of ten images each: were rows resampled by question and question again, intervals would be wider.
    both = transfer_probes(
        {"a": sets["a"], "b": TransferSet(sets["b"].store, target, groups, clusters=groups)},
        pairs=[(["a"], "b")],
        layers=[2],
        strengths=[0.1],
        replicates=100,
    ).best.iloc[0]
    assert found["auc"] == both["auc"]
    assert both["ci_high"] - both["ci_low"] > 1.2 * (found["ci_high"] - found["ci_low"])


def test_two_models_asked_the_same_questions_do_not_remember_them(tmp_path: Path) -> None:
    """Each question has a vector of its own, the same in both sets, and a rate of being answered right.

    Carried over as it is, a probe knows the questions again; with those that are judged left out there is nothing.
    """
    first = planted_set(tmp_path, 5, own=False, strength=0.0, identity=3.0, rate=0.9, width=90)
    assert isinstance(first.target, pd.Series)
    # The same questions and their answers in another model: other noise.
    x = first.store.layer(2, position="last_input", rows=list(first.target.index))
    noise = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(0))
    table = trials(60, 10, 0.9, 5)
    other = store_with(x + 0.3 * noise, table, tmp_path / "other")
    second = TransferSet(other, first.target, groups=first.groups, clusters=first.clusters)
    apart = transfer_probes({"a": first, "b": second}, pairs=[(["a"], "b")], layers=[2], replicates=200).best.iloc[0]
    assert apart["shared"] == 60
    assert len(apart["layers"]) == 5
    assert apart["ci_low"] < 0.5 < apart["ci_high"]
    assert isinstance(first.groups, pd.Series)
    naive = TransferSet(other, first.target, groups=first.groups + " again", clusters=first.clusters)
    known = transfer_probes({"a": first, "b": naive}, pairs=[(["a"], "b")], layers=[2], replicates=200).best.iloc[0]
    assert known["ci_low"] > 0.5


def test_what_cannot_be_carried_over_is_refused(tmp_path: Path) -> None:
    a, b = planted_set(tmp_path, 6), planted_set(tmp_path, 7)
    assert isinstance(a.target, pd.Series)
    wide = store_with(residuals(trials(4, 2, 0.5, 8), 9, 0.0, 0.0, 8), trials(4, 2, 0.5, 8), tmp_path / "wide")

    def using(store: Store | None = None, **changes: object) -> TransferSet:
        given = {"target": a.target, "groups": a.groups, "clusters": a.clusters} | changes
        return TransferSet(store or a.store, **given)

    with pytest.raises(ConfigError, match="at least two sets"):
        transfer_probes({"a": a})
    with pytest.raises(ConfigError, match="no set 'x'; there are a, b"):
        transfer_probes({"a": a, "b": b}, pairs=[(["a"], "x")])
    with pytest.raises(ConfigError, match="a is judged on what it learns from"):
        transfer_probes({"a": a, "b": b}, pairs=[(["a"], "a")])
    with pytest.raises(ConfigError, match="strengths must be numbers above 0"):
        transfer_probes({"a": a, "b": b}, strengths=[0.0])
    with pytest.raises(DataError, match="the stores are a 6, b 9 wide"):
        transfer_probes({"a": a, "b": using(wide)})
    with pytest.raises(DataError, match="not all stores have layer 7"):
        transfer_probes({"a": a, "b": b}, layers=[7])
    with pytest.raises(DataError, match="no column 'colour'"):
        transfer_probes({"a": a, "b": using(target="colour")})
    with pytest.raises(DataError, match="groups of set b: 600 rows have none"):
        transfer_probes({"a": a, "b": using(groups=pd.Series(dtype=str))})
    with pytest.raises(DataError, match="set b: no row has a target"):
        transfer_probes({"a": a, "b": using(target=a.target.astype(object).mask(a.target | True))})
    with pytest.raises(DataError, match="one class|all"):
        transfer_probes({"a": a, "b": using(target=a.target | True)}, pairs=[(["b"], "a")])
