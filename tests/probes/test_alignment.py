"""Shared coordinates of models of other widths: planted ones whose truth is known, and what is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.cross_decomposition import CCA

import gapprobe as gp
from gapprobe.errors import DataError
from gapprobe.probes.alignment import Alignment, shared_maps
from gapprobe.probes.transfer import TransferSet, transfer_probes
from tests.study.planted import residuals, trials

STRENGTH, INSIDE, ANCHORS = 1.5, 6, 400


def mixed(seed: int, width: int) -> torch.Tensor:
    """Return a map [6 width] from what all models have inside to the residuals of one."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((INSIDE, width))).float()


def model_of(folder: Path, seed: int, width: int, layers: int = 3, *, noise: float = 0.05) -> TransferSet:
    """Return 60 questions with 10 images and 400 anchors, the same for all, seen through a model's own map.

    At the last layer the outcome's direction stands; before it there is noise.
    """
    table = trials(60, 10, 0.5, seed)
    x = residuals(table, INSIDE, STRENGTH, 0.0, seed + 50)
    shared = torch.from_numpy(np.random.default_rng(99).standard_normal((3, ANCHORS, INSIDE))).float()
    inside = torch.cat([x, shared], 1)  # [l n k]
    inside = torch.stack([inside[0]] * (layers - 1) + [inside[-1]])
    own = torch.from_numpy(np.random.default_rng(seed).standard_normal((layers, inside.shape[1], width))).float()
    seen = inside @ mixed(seed, width) + noise * own + 3.0
    ids = [*table["visual_row"], *(f"anchor{i}" for i in range(ANCHORS))]
    store = gp.import_activations(folder / f"store{seed}", seen.movedim(0, 1).numpy(), ids=ids, model=f"m{seed}")
    rows = table.set_index("visual_row")
    return TransferSet(store, rows["visual"], groups=rows["question"] + f" of {seed}", clusters=rows["image"])


def anchors(*names: str) -> dict[str, list[str]]:
    return {name: [f"anchor{i}" for i in range(ANCHORS)] for name in names}


def test_a_planted_direction_carries_over_to_a_model_of_another_width_and_depth(tmp_path: Path) -> None:
    sets = {"narrow": model_of(tmp_path, 0, 16), "wide": model_of(tmp_path, 1, 40, layers=5)}
    found = transfer_probes(sets, alignment=Alignment(anchors(*sets)), replicates=200)
    truth = norm.cdf(STRENGTH / 2**0.5)
    for line in found.best.to_dict("records"):
        assert line["ci_low"] < truth < line["ci_high"]
        assert line["layers"] == [2]
    last = found.table[found.table["layer"] == 2]
    assert (last["agreement"] > 0.99).all()
    before = found.table[found.table["layer"] < 2]
    assert (before["auc"] < 0.6).all()
    with pytest.raises(DataError, match="stores are narrow 16, wide 40 wide; an alignment brings them together"):
        transfer_probes(sets)


def test_inputs_that_are_not_the_same_agree_less_and_carry_nothing_by_design(tmp_path: Path) -> None:
    sets = {"a": model_of(tmp_path, 0, 16), "b": model_of(tmp_path, 1, 24)}
    told = anchors(*sets)
    told["b"] = np.random.default_rng(0).permutation(told["b"]).tolist()
    found = transfer_probes(sets, alignment=Alignment(told), layers=[2], replicates=20)
    assert (found.table["agreement"] < 0.65).all()  # a half is nothing in common
    assert (found.best["auc"] < norm.cdf(STRENGTH / 2**0.5) - 0.1).all()


def test_of_two_sets_it_is_canonical_correlation() -> None:
    rng = np.random.default_rng(0)
    inside = rng.standard_normal((300, 3))
    x = inside @ rng.standard_normal((3, 5)) + 0.5 * rng.standard_normal((300, 5))
    y = inside @ rng.standard_normal((3, 7)) + 0.5 * rng.standard_normal((300, 7))
    (of_x, of_y), share = shared_maps([torch.from_numpy(x).float(), torch.from_numpy(y).float()], rank=3)
    u, v = of_x(torch.from_numpy(x).float()).numpy(), of_y(torch.from_numpy(y).float()).numpy()
    ours = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(3)]
    theirs = CCA(3, max_iter=5000, tol=1e-12).fit(x, y).transform(x, y)
    np.testing.assert_allclose(ours, [np.corrcoef(theirs[0][:, i], theirs[1][:, i])[0, 1] for i in range(3)], atol=0.02)
    # Of two sets the share is (1 + correlation) / 2.
    np.testing.assert_allclose(share.numpy(), [(1 + r) / 2 for r in ours], atol=1e-3)
    assert abs(u.mean()) < 1e-5


def test_a_sets_own_units_and_turns_make_no_difference() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((200, 6))).float()
    turn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((6, 6))).float())[0]
    y = (7 * x) @ turn + 2
    (of_x, of_y), share = shared_maps([x, y], rank=6)
    torch.testing.assert_close(of_x(x), of_y(y), rtol=0, atol=1e-4)
    assert share.min() > 1 - 1e-5
    again = shared_maps([x, y], rank=6)[0]
    assert torch.equal(again[0].weight, of_x.weight)


def test_a_layer_at_which_all_anchors_are_alike_is_left_out(tmp_path: Path) -> None:
    sets = {"a": model_of(tmp_path, 0, 16), "b": model_of(tmp_path, 1, 24)}
    found = transfer_probes(sets, alignment=Alignment(anchors(*sets)), layers=[1, 2], replicates=20)
    part = sets["a"]
    x = np.stack([part.store.layer(i, position="last_input").numpy() for i in range(3)], 1)
    x[[i for i, row in enumerate(part.store.ids) if row.startswith("anchor")], 1] = 1.0
    for layers, name in (([0, 1, 2], "some"), ([1], "none")):
        store = gp.import_activations(tmp_path / name, x, ids=list(part.store.ids), model="flat")
        flat = sets | {"a": TransferSet(store, part.target, part.groups, clusters=part.clusters)}
        if name == "none":
            with pytest.raises(DataError, match="all alike at every layer"):
                transfer_probes(flat, alignment=Alignment(anchors(*sets)), layers=layers, replicates=20)
            continue
        left = transfer_probes(flat, alignment=Alignment(anchors(*sets)), layers=layers, replicates=20)
        assert sorted(left.table["layer"].unique()) == [0, 2]
        mine, theirs = (t.table[t.table["layer"] == 2].reset_index(drop=True) for t in (left, found))
        pd.testing.assert_frame_equal(mine, theirs)


def test_what_cannot_be_aligned_is_refused(tmp_path: Path) -> None:
    sets = {"a": model_of(tmp_path, 0, 16), "b": model_of(tmp_path, 1, 24)}
    told = anchors(*sets)
    for wrong, message in (
        (told | {"b": told["b"][1:]}, "there are a 400, b 399"),
        ({"a": told["a"]}, "there are a 400, b 0"),
        (told | {"a": ["row3", *told["a"][1:]]}, "anchor row3 of set a is also learnt from or judged"),
        ({name: ids[:3] for name, ids in told.items()}, "3 anchors cannot hold 32 coordinates"),
    ):
        with pytest.raises(DataError, match=message):
            transfer_probes(sets, alignment=Alignment(wrong))
    with pytest.raises(DataError, match="set a has no layer 9"):
        transfer_probes(sets, alignment=Alignment(told), layers=[9])
    with pytest.raises(DataError, match="all alike"):
        shared_maps([torch.ones(20, 3), torch.randn(20, 4)], 2)
    assert isinstance(sets["a"].target, pd.Series)
