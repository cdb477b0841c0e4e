"""Cosines over stores: pairing, variants, groups with intervals, blocks, resuming, files, and refusals."""

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

import gapprobe as gp
from gapprobe import stats
from gapprobe.errors import DataError, StoreError
from gapprobe.similarity import cosines, rows
from gapprobe.similarity.result import VARIANTS

IDS = tuple(f"row-{i}" for i in range(12))
# float32 sums and a float32 result; PyTorch's own float32 is off by as much.
CLOSE = {"rtol": 0, "atol": 1e-6}


def numbers(layers, n, d, seed=0):
    return torch.randn(layers, n, d, generator=torch.Generator().manual_seed(seed)) + 5


def wanted(a, b):
    """Return the three variants of a layer's pairs in float64, by scikit-learn and torch."""
    both = torch.cat([a, b]).double().numpy()
    out = {}
    for variant, scaler in zip(VARIANTS, (None, StandardScaler(with_std=False), StandardScaler()), strict=True):
        scaled = torch.from_numpy(both if scaler is None else scaler.fit_transform(both))
        out[variant] = torch.cosine_similarity(scaled[: len(a)], scaled[len(a) :]).numpy()
    return out


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Return a store of digits in two settings that are written in different orders, with two layers, two positions."""
    digits = load_digits()
    n = 60
    shown = digits.data[:n].astype("float32")
    told = shown + np.random.default_rng(0).normal(size=shown.shape).astype("float32") * 3
    order = np.random.default_rng(1).permutation(n)
    x = np.concatenate([shown, told[order]])
    tokens = np.stack([x, x[:, ::-1] + 1], axis=1)  # [2n t d]
    which = np.concatenate([np.arange(n), order])
    table = pd.DataFrame(
        {
            "setting": ["visual"] * n + ["full_information"] * n,
            "question": [f"q{i % 5}" for i in which],
            "image": [f"image {i // 5}" for i in which],
            "right": digits.target[which] % 3 == 0,
        },
        index=[f"{'v' if k < n else 'f'}{i}" for k, i in enumerate(which)],
    )
    path = tmp_path_factory.mktemp("trials") / "store"
    layers = np.stack([tokens, tokens**2], axis=1)  # [2n l t d]
    positions = {"first": np.zeros(2 * n, int), "last_input": np.full(2 * n, -1)}
    # Several shards: the rows of a pair lie in different ones.
    return gp.import_activations(path, layers, table, position=positions, shard_bytes=1 << 15)


def test_pairs_are_compared_in_their_order_at_every_layer(store_of):
    x = numbers(3, 12, 6)
    result = gp.cosine(store_of(x, IDS), [IDS[4], IDS[0], IDS[11]], [IDS[1], IDS[2], IDS[3]], position="last_input")
    assert result.layers == (0, 1, 2)
    assert (result.left, result.right) == ((IDS[4], IDS[0], IDS[11]), (IDS[1], IDS[2], IDS[3]))
    for layer in range(3):
        for variant, right in wanted(x[layer, [4, 0, 11]], x[layer, [1, 2, 3]]).items():
            np.testing.assert_allclose(getattr(result, variant)[layer], right, **CLOSE)


def test_a_pair_of_settings_finds_its_rows_by_question_and_image(trials):
    assert len(trials.records) > 1
    result = gp.cosine(trials, pair=("visual", "full_information"), position=["last_input", "first"], layers=[1, 0])
    assert result.left == tuple(f"v{i}" for i in range(60))
    assert result.right == tuple(f"f{i}" for i in range(60))
    assert result.raw.shape == (2, 2, 60)
    for p, position in enumerate(("last_input", "first")):
        for at, layer in enumerate((1, 0)):
            a, b = (trials.layer(layer, position, ids) for ids in (result.left, result.right))
            for variant, right in wanted(a, b).items():
                np.testing.assert_allclose(getattr(result, variant)[p, at], right, **CLOSE)


def test_rows_without_partner_or_that_could_not_be_run_are_counted(tmp_path):
    table = pd.DataFrame(
        {
            "kind": ["a", "a", "a", "b", "b", "b"],
            "item": ["1", "2", "3", "2", "1", "4"],
            "error": [None, None, None, "no picture", None, None],
        },
        index=list("uvwxyz"),
    )
    store = gp.import_activations(tmp_path / "s", numbers(1, 6, 4)[0][:, None].numpy(), table)
    result = gp.cosine(store, pair=("a", "b"), key="item", setting="kind")
    assert (result.left, result.right, result.lonely) == (("u",), ("y",), 3)


def test_another_store_is_paired_by_id_by_key_or_by_lists(trials, tmp_path):
    x = numbers(2, 60, 64, seed=4)
    ids = [f"v{i}" for i in range(59, -1, -1)]
    other = gp.import_activations(tmp_path / "other", x.transpose(0, 1).numpy(), ids=ids)
    result = gp.cosine(trials, other=other)
    assert result.left == result.right == tuple(f"v{i}" for i in range(60))
    assert result.lonely == 60
    for layer in range(2):
        for variant, right in wanted(trials.layer(layer, "last_input", result.left), x[layer].flip(0)).items():
            np.testing.assert_allclose(getattr(result, variant)[layer], right, **CLOSE)
    listed = gp.cosine(trials, result.left[:7], result.right[:7], other=other)
    np.testing.assert_allclose(listed.raw, result.raw[:, :7])


def test_groups_have_means_with_crossed_intervals(trials):
    clusters = ("question", "image")
    result = gp.cosine(trials, pair=("visual", "full_information"), by="right", clusters=clusters, seed=3)
    rows = trials.rows.loc[list(result.left)]
    counts = rows["right"].value_counts()
    assert set(result.table.groupby("group")["n"].max().items()) == {(str(k), v) for k, v in counts.items()}
    weights = stats.crossed_weights(rows["question"].to_numpy(), rows["image"].to_numpy(), seed=3)
    for _, line in result.table.iterrows():
        own = rows["right"].to_numpy().astype(str) == line["group"]
        values = getattr(result, line["variant"])[line["layer"]][own].astype(float)
        expected = stats.mean(values, weights[:, own])
        assert [line["mean"], line["ci_low"], line["ci_high"]] == pytest.approx(
            [expected.value, expected.low, expected.high], abs=1e-12
        )


def test_a_series_may_name_the_groups_and_no_cluster_means_that_each_pair_is_its_own(trials):
    ids = [f"v{i}" for i in range(60)]
    by = pd.Series(["odd" if i % 2 else "even" for i in range(60)], index=ids)[::-1]
    result = gp.cosine(trials, pair=("visual", "full_information"), by=by, replicates=50)
    assert result.groups.tolist() == ["even", "odd"] * 30
    own = result.groups == "odd"
    weights = stats.crossed_weights(np.arange(60), np.zeros(60), replicates=50, seed=0)[:, own]
    expected = stats.mean(result.raw[0, own].astype(float), weights)
    line = result.table.query("group == 'odd' and layer == 0 and variant == 'raw'").iloc[0]
    assert [line["mean"], line["ci_low"]] == pytest.approx([expected.value, expected.low], abs=1e-12)


def test_unrelated_rows_are_all_other_pairs(trials):
    result = gp.cosine(trials, pair=("visual", "full_information"), replicates=2)
    a, b = (trials.layer(0, "last_input", ids).double() for ids in (result.left, result.right))
    each = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    level = float((each.sum() - each.trace()) / (60 * 59))
    line = result.table.query("layer == 0 and variant == 'raw'").iloc[0]
    assert line["unrelated"] == pytest.approx(level, abs=1e-12)
    assert level > 0.5  # what a raw cosine is worth
    assert abs(result.table.query("layer == 0 and variant == 'centred'").iloc[0]["unrelated"]) < 0.05


def test_the_level_of_unrelated_rows_needs_not_all_of_them(trials, monkeypatch):
    def level():
        table = gp.cosine(trials, pair=("visual", "full_information"), replicates=2, layers=[0]).table
        return table.set_index("variant")["unrelated"]

    whole = level()
    monkeypatch.setattr(cosines, "APART", 30)
    some = level()
    assert (some != whole).all()
    # Means over 30 x 29 pairs of digits: each row's own mean cosine varies by about 0.15.
    assert (some - whole).abs().max() < 3 * 0.15 / np.sqrt(30)


def test_blocks_and_draws_do_not_show(trials, monkeypatch):
    def ask():
        return gp.cosine(trials, pair=("visual", "full_information"), by="right", replicates=1)

    whole = ask()
    monkeypatch.setattr(rows, "BLOCK", 7 * 64)
    monkeypatch.setattr(cosines, "DRAWN", 60)
    parts = ask()
    for variant in VARIANTS:
        np.testing.assert_allclose(getattr(parts, variant), getattr(whole, variant), **CLOSE)
    pd.testing.assert_frame_equal(parts.table, whole.table, rtol=1e-5)


def test_where_shards_are_cut_shows_in_no_bit(tmp_path):
    """A run that was stopped seals its shards elsewhere than one that was not."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((900, 2, 96)) * rng.lognormal(0, 2, 96)).astype(np.float32)
    ids = [f"r{i}" for i in range(900)]
    table = pd.DataFrame({"n": range(900)}, index=ids)
    found = []
    for size in (1 << 28, 1 << 18, 1 << 14):
        store = gp.import_activations(tmp_path / f"cut{size}", x, table, model="made up", shard_bytes=size)
        found.append((len(store.records), gp.cosine(store, ids[:450], ids[449:899])))
    assert len({shards for shards, _ in found}) == 3
    for _, other in found[1:]:
        for variant in VARIANTS:
            np.testing.assert_array_equal(getattr(other, variant), getattr(found[0][1], variant))


def test_a_layer_that_is_the_same_for_all_rows_has_no_centred_cosine(store_of):
    x = numbers(2, 12, 6)
    x[0] = x[0, 0]
    result = gp.cosine(store_of(x, IDS), IDS[:6], IDS[6:], position="last_input", layers=[0])
    np.testing.assert_allclose(result.raw, 1, rtol=1e-6)
    assert np.isnan(result.centred).all()
    assert result.table.set_index("variant")["left_out"].to_dict() == {"raw": 0, "centred": 6, "standardised": 6}
    assert np.isnan(result.table.set_index("variant").loc["centred", "mean"])


def test_a_row_that_is_no_number_is_left_out_and_not_in_the_centre(tmp_path):
    x = numbers(1, 12, 6)[0]
    x[3, 2] = torch.inf
    store = gp.import_activations(tmp_path / "s", x[:, None].numpy(), ids=IDS, allow_nonfinite=True)
    result = gp.cosine(store, IDS[:6], IDS[6:])
    assert np.isnan(result.raw[0]).tolist() == [False] * 3 + [True] + [False] * 2
    there = torch.tensor([i for i in range(12) if i != 3])
    centre = x[there].double().mean(0)
    right = torch.cosine_similarity(x[:6].double() - centre, x[6:].double() - centre)
    np.testing.assert_allclose(result.centred[0, [0, 1, 2, 4, 5]], right[[0, 1, 2, 4, 5]], **CLOSE)
    assert result.table["left_out"].tolist() == [1, 1, 1]
    assert result.table["mean"].tolist() == pytest.approx(
        [float(np.nanmean(getattr(result, variant).astype(float))) for variant in VARIANTS], abs=1e-12
    )
    assert result.table[["ci_low", "ci_high"]].notna().all(axis=None)


def test_what_a_layer_gave_is_kept_and_taken_up_again(trials, tmp_path):
    def ask(**changed):
        return gp.cosine(
            trials, **({"pair": ("visual", "full_information"), "replicates": 5} | changed), folder=tmp_path
        )

    whole = ask()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2
    cut, left = files
    cut.write_bytes(b"half a fi")
    again = ask(by="right")  # groups are no reason to compute again
    np.testing.assert_array_equal(again.raw, whole.raw)
    assert left.stat().st_mtime_ns == files[left]
    assert cut.stat().st_mtime_ns != files[cut]
    ask(pair=("full_information", "visual"))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_store_of_other_activations_is_not_mistaken_for_what_is_kept(tmp_path):
    found = []
    for seed in range(2):
        x = numbers(1, 12, 6, seed)[0][:, None].numpy()
        store = gp.import_activations(tmp_path / f"s{seed}", x, ids=IDS)
        found.append(gp.cosine(store, IDS[:6], IDS[6:], folder=tmp_path / "kept").raw)
    assert len(os.listdir(tmp_path / "kept")) == 2
    assert (found[0] != found[1]).all()


def test_what_is_kept_stays_in_the_folder_whatever_a_position_is_called(tmp_path):
    """A store names its positions as it likes; this one's name would lead out, to a file beside the folder."""
    x = numbers(8, 2, 5)  # [n l d]
    name = "a/../../outside"
    store = gp.import_activations(tmp_path / "store", x.numpy(), position=name, model="hostile")
    ids = list(store.ids)
    folder = tmp_path / "inside" / "kept"
    found = gp.cosine(store, ids[:4], ids[4:], position=name, folder=folder)
    assert {path.parent for path in tmp_path.rglob("*.safetensors")} == {folder, tmp_path / "store" / "shards"}
    again = gp.cosine(store, ids[:4], ids[4:], position=name, folder=folder)
    np.testing.assert_array_equal(again.raw, found.raw)


@pytest.mark.parametrize("spoiled", [{"x": np.zeros(3)}, {"cosines": np.zeros((3, 1), "f4"), "apart": np.zeros(3)}])
def test_a_kept_file_that_holds_something_else_is_made_anew(trials, tmp_path, spoiled):
    def ask():
        return gp.cosine(trials, pair=("visual", "full_information"), folder=tmp_path, replicates=1)

    first = ask()
    for path in tmp_path.iterdir():
        save_file(spoiled, path)
    np.testing.assert_array_equal(ask().raw, first.raw)


def test_a_file_whose_arrays_do_not_belong_together_is_none(trials, tmp_path):
    path = gp.cosine(trials, pair=("visual", "full_information"), replicates=1).save(tmp_path / "cosines.safetensors")
    with safe_open(str(path), "numpy") as file:
        (name, told), arrays = next(iter(file.metadata().items())), {v: file.get_tensor(v) for v in VARIANTS}
    told = json.loads(told)
    for change, own in (
        ({"layers": None}, {}),
        ({"layers": 3}, {}),
        ({"left": told["left"][1:]}, {}),
        ({"lonely": "many"}, {}),
        ({}, {"raw": arrays["raw"][:, :3]}),
    ):
        save_file(arrays | own, tmp_path / "spoiled", metadata={name: json.dumps(told | change)})
        with pytest.raises(DataError, match="spoiled cannot be read as cosines"):
            gp.load_cosine(tmp_path / "spoiled")


def test_names_from_a_store_are_no_markup_in_figures(trials):
    evil = "<b>x</b>"
    found = gp.cosine(trials, pair=("visual", "full_information"), replicates=10, position=["first", "last_input"])
    table = found.table.assign(position=found.table["position"].replace("first", evil), group=evil)
    texts = [replace(found, table=table, positions=(evil, "last_input")).plot()]
    texts.append(replace(gp.cka(trials, position="first"), sides=(evil, evil)).plot())
    for figure in texts:
        shown = [note.text for note in figure.layout.annotations] + [trace.name for trace in figure.data]
        shown += [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
        assert not [text for text in shown if text and "<b>" in text]
        assert any("&lt;b&gt;" in text for text in shown if text)


def test_what_is_saved_is_what_is_loaded(trials, tmp_path):
    result = gp.cosine(trials, pair=("visual", "full_information"), by="right", position=["first"], replicates=20)
    result = replace(result, lonely=3)
    again = gp.load_cosine(result.save(tmp_path / "deep" / "cosines.safetensors"))
    pd.testing.assert_frame_equal(again.table, result.table)
    for name in ("layers", "positions", "left", "right", "lonely"):
        assert getattr(again, name) == getattr(result, name)
    for name in ("groups", *VARIANTS):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    (tmp_path / "other.safetensors").write_bytes(b"x")
    for name in ("other.safetensors", "none.safetensors"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as cosines"):
            gp.load_cosine(tmp_path / name)


def test_the_figure_says_what_it_shows(trials):
    result = gp.cosine(trials, pair=("visual", "full_information"), by="right", replicates=20)
    figure = result.plot()
    titles = [note.text for note in figure.layout.annotations]
    assert [title.split(":")[0] for title in titles] == list(VARIANTS)
    lines = {(trace.name, trace.xaxis): list(trace.y) for trace in figure.data if trace.name}
    table = result.table.query("group == 'True' and variant == 'centred'")
    assert lines["True", "x2"] == table["mean"].tolist()
    assert lines["rows of different pairs", "x2"] == table["unrelated"].tolist()
    right = trials.rows.loc[list(result.left), "right"].sum()
    names = {f"False (n = {60 - right})", f"True (n = {right})", "rows of different pairs"}
    assert {trace.name for trace in figure.data if trace.showlegend} == names
    bands = [trace for trace in figure.data if trace.fill]
    assert list(bands[0].y[:2]) == result.table.query("group == 'False' and variant == 'raw'")["ci_low"].tolist()


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ({}, DataError, "say which rows belong together"),
        ({"left": ["v1"], "right": ["f1"], "pair": ("visual", "full_information")}, DataError, "say which rows"),
        ({"left": ["v1", "v2"], "right": ["f1"]}, DataError, "2 rows on the left and 1 on the right"),
        ({"left": [], "right": []}, DataError, "at least one"),
        ({"left": ["v1"], "right": ["f99"]}, StoreError, "no row 'f99'"),
        ({"pair": ("visual", "shown")}, DataError, "no row whose 'setting' is 'shown'; there are: visual, full_inf"),
        ({"pair": ("visual", "visual"), "setting": "mode"}, DataError, "no column 'mode'; it has setting"),
        ({"pair": ("visual", "full_information"), "key": "image"}, DataError, "'image' image 0 stands at several rows"),
        ({"pair": ("visual", "full_information"), "key": "writer"}, DataError, "no column 'writer'"),
        ({"pair": ("visual", "full_information"), "by": "writer"}, DataError, "no column 'writer'"),
        ({"pair": ("visual", "full_information"), "by": pd.Series({"v1": "a"})}, DataError, "by: 59 rows have"),
        (
            {"pair": ("visual", "full_information"), "clusters": pd.Series(["a", "b"], index=["v1", "v1"])},
            DataError,
            "clusters: an id stands twice",
        ),
        ({"pair": ("visual", "full_information"), "layers": [2]}, StoreError, "no layer 2; it has 0, 1"),
        ({"pair": ("visual", "full_information"), "layers": []}, DataError, "no layer or no position"),
        ({"pair": ("visual", "full_information"), "position": "last"}, StoreError, "no position 'last'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_residual_is_read(trials, monkeypatch, asked, error, match):
    monkeypatch.setattr(type(trials), "mapped", lambda *_, **__: pytest.fail("a residual was read"))
    with pytest.raises(error, match=match):
        gp.cosine(trials, **asked)


def test_a_row_without_a_token_at_the_position_is_refused(tmp_path):
    positions = {"last_input": [-1] * 12, "entity": [0] * 5 + [None] + [0] * 6}
    store = gp.import_activations(tmp_path / "s", numbers(1, 12, 6)[0][:, None].numpy(), ids=IDS, position=positions)
    with pytest.raises(StoreError, match="row 'row-5' has 0 tokens at 'entity'"):
        gp.cosine(store, IDS[:6], IDS[6:], position=["last_input", "entity"])


def test_stores_that_do_not_fit_are_refused(trials, tmp_path):
    narrow = gp.import_activations(
        tmp_path / "narrow", numbers(2, 3, 8).transpose(0, 1).numpy(), ids=["v0", "v1", "v2"]
    )
    with pytest.raises(StoreError, match="64 wide and .*narrow is 8"):
        gp.cosine(trials, other=narrow)
    strange = gp.import_activations(tmp_path / "strange", numbers(2, 1, 64).transpose(0, 1).numpy(), ids=["x"])
    with pytest.raises(DataError, match="share no row id"):
        gp.cosine(trials, other=strange)
    with pytest.raises(DataError, match="neither `trial` nor `question` and `image`"):
        gp.cosine(trials, other=strange, pair=("visual", "visual"))
