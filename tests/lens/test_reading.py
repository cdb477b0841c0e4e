"""What was read: tables, first layers, files, figures."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file, save_file

import gapprobe as gp
from gapprobe import stats
from gapprobe.errors import DataError
from gapprobe.kernels.logit_lens import Unembedding
from gapprobe.lens.reading import LensReading, join
from gapprobe.models.layouts import grid
from gapprobe.store.format import ROLES

VOCABULARY = ["<b>", " a", "the", "dog", "\n", "cat"]


@pytest.fixture
def reading():
    """Two rows: three tokens, of which two are of a picture, and one."""
    rng = np.random.default_rng(0)
    rank = rng.integers(1, 6, (3, 4, 2))
    rank[:, 1, 0], rank[:, 2, 0] = (5, 2, 1), (4, 4, 4)
    targets = np.array([[0, 1], [2, 3], [4, -1], [5, 1]])
    rank[:, 2, 1] = 0
    top = np.log(rng.dirichlet(np.ones(6), (3, 4)))[..., :3]
    order = np.argsort(-top, axis=2)
    return LensReading(
        layers=(0, 4, 8),
        label="logit lens, final norm at every layer, target: given tokens",
        ids=("one", "two"),
        row=np.array([0, 0, 0, 1]),
        token_ids=np.array([3, 0, 5, 1]),
        token_positions=np.array([0, 1, 2, 0]),
        token_roles=np.array([ROLES[r] for r in ("image", "image", "question", "question")], dtype=np.uint8),
        targets=targets,
        log_prob=np.where(targets >= 0, -rng.random((3, 4, 2)), np.nan).astype(np.float32),
        rank=rank,
        entropy=rng.random((3, 4)).astype(np.float32),
        top_words=np.argsort(rng.random((3, 4, 6)), axis=2)[..., :3],
        top_log_prob=np.take_along_axis(top, order, 2).astype(np.float32),
        kl=rng.random((3, 4)).astype(np.float32),
    )


def test_the_table_has_a_line_for_each_layer_token_and_target(reading):
    table = reading.table
    assert len(table) == 3 * 4 * 2
    line = table[(table["layer"] == 4) & (table["id"] == "one") & (table["token"] == 5) & (table["target"] == 4)]
    (line,) = line.to_dict("records")
    assert line["rank"] == 4
    assert line["role"] == "question"
    assert line["position"] == 2
    assert line["log_prob"] == reading.log_prob[1, 2, 0]
    assert line["entropy"] == reading.entropy[1, 2]
    assert line["kl"] == reading.kl[1, 2]
    assert line["top_word"] == reading.top_words[1, 2, 0]


def test_the_first_layer_at_which_a_target_is_among_the_best(reading):
    np.testing.assert_array_equal(reading.first_layer(1)[1:3, 0], [8, np.nan])
    np.testing.assert_array_equal(reading.first_layer(3)[1:3, 0], [4, np.nan])
    np.testing.assert_array_equal(reading.first_layer(5)[1:3, 0], [0, 0])
    assert np.isnan(reading.first_layer(10)[2, 1])  # no target
    with pytest.raises(DataError, match="at least 1"):
        reading.first_layer(0)


def test_a_file_gives_everything_back(reading, tmp_path):
    path = tmp_path / "lens.safetensors"
    reading.save(path)
    again = gp.load_lens_reading(path)
    for name, value in vars(reading).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    size = path.stat().st_size
    reading.save(path)
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, _: t.pop("rank"), "rank is missing"),
        (lambda t, _: t.update(entropy=t["entropy"][:, :2]), "entropy has shape"),
        (lambda t, _: t.update(log_prob=t["log_prob"].astype(np.float64)), "log_prob has shape"),
        (lambda t, _: t.update(row=t["row"] + 1), "row names rows"),
        (lambda _, m: m.update(layers='[1, 2, "x"]'), "layers must be numbers"),
        (lambda _, m: m.update(ids="nonsense"), "cannot be read"),
        (lambda _, m: m.pop("format"), "holds no lens reading"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(reading, tmp_path, spoil, message):
    path = tmp_path / "lens.safetensors"
    reading.save(path)
    tensors = load_file(path)
    about = {
        "format": "gapprobe lens 1",
        "label": "",
        "layers": json.dumps([0, 4, 8]),
        "ids": json.dumps(["one", "two"]),
    }
    spoil(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(DataError, match=message):
        gp.load_lens_reading(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="cannot be read"):
        gp.load_lens_reading(path)


def test_rows_are_taken_out_and_put_together(reading):
    parts = [reading.of("one"), reading.of("two")]
    assert [len(part.row) for part in parts] == [3, 1]
    whole = join(parts)
    for name, value in vars(reading).items():
        if name != "table":
            np.testing.assert_array_equal(getattr(whole, name), value, err_msg=name)
    with pytest.raises(DataError, match="no row three"):
        reading.of("three")
    with pytest.raises(DataError, match='targets="next"'):
        reading.answers()


def test_means_over_rows_want_one_token_a_row(reading):
    with pytest.raises(DataError, match="one token a row"):
        reading.by_layer()


def test_a_heatmap_shows_words_as_text(reading):
    figure = reading.plot("one", VOCABULARY)
    (cells,) = figure.data
    np.testing.assert_allclose(np.array(cells.z, dtype=float), reading.probability[:, :3, 0])
    assert list(cells.y) == ["0", "4", "8"]
    assert "&lt;b&gt;" in figure.layout.xaxis.ticktext[1]
    assert "<b>" not in str(cells.text) + str(cells.customdata) + str(figure.layout.xaxis.ticktext)
    assert f"rank {reading.rank[1, 2, 0]}" in cells.customdata[1][2]
    assert "image" in cells.customdata[1][0]
    with pytest.raises(DataError, match="one row, not of 2"):
        gp.lens_over_image(reading, PIL.Image.new("RGB", (20, 10)), np.zeros((2, 4)), VOCABULARY)


def test_patches_are_drawn_where_they_lie(reading):
    boxes = np.array([[0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]])  # not in the order of reading
    one = reading.of("one")
    figure = gp.lens_over_image(one, PIL.Image.new("RGB", (20, 10)), boxes, VOCABULARY)
    assert [trace.name for trace in figure.data] == ["layer 0", "layer 4", "layer 8"]
    for i, trace in enumerate(figure.data):
        assert trace.visible is (i == 2)
        np.testing.assert_array_equal(trace.x, [0, 10, 20])
        np.testing.assert_array_equal(trace.y, [0, 10])
        np.testing.assert_allclose(np.array(trace.z, dtype=float), one.probability[i, [[1, 0]], 0])
        assert f"layer {reading.layers[i]}, token 1" in trace.customdata[0][0]
        assert f"layer {reading.layers[i]}, token 0" in trace.customdata[0][1]
    for i, step in enumerate(figure.layout.sliders[0].steps):
        assert step.args[0]["visible"] == [place == i for place in range(3)]
    with pytest.raises(DataError, match="2 image tokens and there are 3 boxes"):
        gp.lens_over_image(one, PIL.Image.new("RGB", (20, 10)), np.zeros((3, 4)), VOCABULARY)


def test_tiles_of_two_sizes_gaps_and_tokens_without_a_place():
    """As processors cut large pictures: the whole coarsely, tiles with a gap between them finely, and ends of lines."""
    coarse = grid(2, 2)
    left, right = grid(2, 1) * [0.25, 1, 0.25, 1], grid(2, 1) * [0.25, 1, 0.25, 1] + [0.5, 0, 0.5, 0]
    boxes = np.concatenate([coarse, left, np.zeros((1, 4)), right])
    n = len(boxes)
    many = LensReading(
        layers=(0,),
        label="",
        ids=("one",),
        row=np.zeros(n, dtype=np.int64),
        token_ids=np.zeros(n, dtype=np.int64),
        token_positions=np.arange(n),
        token_roles=np.full(n, ROLES["image"], dtype=np.uint8),
        targets=np.zeros((n, 0), dtype=np.int64),
        log_prob=np.zeros((1, n, 0), dtype=np.float32),
        rank=np.zeros((1, n, 0), dtype=np.int64),
        entropy=np.zeros((1, n), dtype=np.float32),
        top_words=np.zeros((1, n, 1), dtype=np.int64),
        top_log_prob=np.log(np.arange(1, n + 1, dtype=np.float32)[None, :, None] / n),
        kl=None,
    )
    wide, fine = gp.lens_over_image(many, PIL.Image.new("RGB", (40, 20)), boxes, VOCABULARY).data
    places = np.arange(1, n + 1) / n
    np.testing.assert_allclose(np.array(wide.z, dtype=float), places[:4].reshape(2, 2), rtol=1e-6)
    np.testing.assert_array_equal(fine.x, [0, 10, 20, 30])
    drawn = np.array(fine.z, dtype=float)
    np.testing.assert_allclose(drawn[:, 0], places[4:6], rtol=1e-6)
    assert np.isnan(drawn[:, 1]).all()
    np.testing.assert_allclose(drawn[:, 2], places[7:9], rtol=1e-6)


def test_groups_of_rows_by_layer(store_of):
    ids = tuple(f"row-{i}" for i in range(6))
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    found = gp.logit_lens(store_of(x, ids), Unembedding(torch.eye(4)), np.zeros(6, dtype=int), position="last_input")
    table = found.by_layer(pd.Series(["a", "b", "a", None, "b", "a"], index=ids), replicates=30)
    np.testing.assert_allclose(
        table[table["group"] == "a"]["probability"], found.probability[:, [0, 2, 5], 0].mean(1), rtol=1e-6
    )
    assert table["n"].tolist() == [3] * 3 + [2] * 3
    shared = pd.Series(["x", "y", "y", "z", "x", "z"], index=ids)
    clustered = found.by_layer(pd.Series(["a", "b", "a", None, "b", "a"], index=ids), shared, replicates=200)
    weights = stats.crossed_weights(shared.to_numpy(dtype=str), np.zeros(6, dtype=int), replicates=200, seed=0)
    of_b = [1, 4]
    expected = stats.layer_means(found.probability[:, of_b, 0].astype(float), weights[:, of_b])
    line = clustered[clustered["group"] == "b"]
    np.testing.assert_allclose(line["ci_low"], [mean.low for mean in expected])
    np.testing.assert_allclose(line["ci_high"], [mean.high for mean in expected])


def test_a_row_without_a_cluster_or_twice_in_it_is_refused(store_of):
    ids = tuple(f"row-{i}" for i in range(3))
    store = store_of(torch.randn(2, 3, 4), ids)
    found = gp.logit_lens(store, Unembedding(torch.eye(4)), np.zeros(3, dtype=int), position="last_input")
    with pytest.raises(DataError, match="clusters: 1 rows have none, such as row-2"):
        found.by_layer(clusters=pd.Series(["x", "y"], index=ids[:2]))
    with pytest.raises(DataError, match="clusters: an id stands twice"):
        found.by_layer(clusters=pd.Series(["x", "y", "z", "z"], index=[*ids, ids[0]]))


def test_groups_that_name_no_row_or_one_twice_are_refused(store_of):
    ids = tuple(f"row-{i}" for i in range(3))
    store = store_of(torch.randn(2, 3, 4), ids)
    found = gp.logit_lens(store, Unembedding(torch.eye(4)), np.zeros(3, dtype=int), position="last_input")
    with pytest.raises(DataError, match="groups: an id stands twice"):
        found.by_layer(pd.Series(["x"] * 4, index=[*ids, ids[0]]))
    with pytest.raises(DataError, match="groups: none of the 3 rows has one, row-0 for instance"):
        found.by_layer(pd.Series(["x"] * 3, index=range(3)))


def test_a_vocabulary_that_is_none_is_refused(reading):
    with pytest.raises(DataError, match="the vocabulary has 2 words, and the reading has the token"):
        reading.plot("one", ["a", "b"])
    with pytest.raises(DataError, match="words is one text"):
        reading.plot("one", "abcdefgh")


def test_a_row_without_tokens_cannot_be_shown(reading):
    empty = replace(reading, ids=("none", "one", "two"), row=reading.row + 1)
    with pytest.raises(DataError, match="row none has no tokens to show"):
        empty.of("none")
    assert empty.plot().to_json() == reading.plot("one").to_json()
    nothing = reading._lines(np.zeros(4, dtype=bool), ())
    with pytest.raises(DataError, match="no tokens to draw"):
        nothing.plot()
