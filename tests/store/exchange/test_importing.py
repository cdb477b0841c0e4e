"""Import: every form of the same activations becomes the same store, what does not fit is refused, nothing is lost."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import gapprobe as gp
from gapprobe.demo import FOLDER
from gapprobe.errors import DataError, OutputError, StoreError
from gapprobe.lens.logit import logit_lens
from gapprobe.probes.sweep import sweep_probes
from gapprobe.similarity import cosine
from gapprobe.store.exchange import importing
from gapprobe.store.exchange.importing import import_activations
from gapprobe.store.exchange.sources import open_source, spans
from gapprobe.store.reader import open_store
from tests.models.tiny import gpt2

L, D = 3, 5
LENGTHS = (3, 1, 4, 2)


def residual(tokens, seed=0, dtype=torch.float32):
    return torch.randn(L, tokens, D, generator=torch.Generator().manual_seed(100 + seed)).to(dtype)


ROWS = [residual(tokens, seed) for seed, tokens in enumerate(LENGTHS)]
TOKENS = [torch.arange(tokens) + 10 * seed for seed, tokens in enumerate(LENGTHS)]


def padded(tensors, side, axis):
    """Stack tensors of different lengths along `axis`, and say which places are real."""
    longest = max(LENGTHS)
    mask = torch.zeros(len(tensors), longest, dtype=torch.bool)
    stacked = []
    for i, tensor in enumerate(tensors):
        gap = longest - LENGTHS[i]
        at = slice(0, LENGTHS[i]) if side == "right" else slice(gap, longest)
        mask[i, at] = True
        # What stands in the padding must not matter: NaN would be refused were it read.
        shape = list(tensor.shape)
        shape[axis] = longest
        whole = torch.full(shape, torch.nan if tensor.is_floating_point() else -7, dtype=tensor.dtype)
        whole.narrow(axis, at.start, LENGTHS[i]).copy_(tensor)
        stacked.append(whole)
    return torch.stack(stacked), mask


def forms(tmp_path: Path):
    """The same rows in every form that is understood: activations and the arguments that go with them."""
    right, mask = padded(ROWS, "right", 1)
    left, left_mask = padded(ROWS, "left", 1)
    ids, left_ids = padded(TOKENS, "right", 0)[0], padded(TOKENS, "left", 0)[0]
    flat, flat_ids = torch.cat(ROWS, 1), torch.cat(TOKENS)
    lengths = list(LENGTHS)
    of_right, of_left = {"token_ids": ids, "mask": mask}, {"token_ids": left_ids, "mask": left_mask}
    of_flat = {"token_ids": flat_ids, "lengths": lengths}
    hooks = {"blocks.0.hook_resid_pre": right[:, 0], "blocks.0.hook_q": torch.ones(1), "hook_embed": right[:, 1]}
    hooks |= {f"blocks.{i}.hook_resid_post": right[:, i + 1] for i in range(2)} | {"blocks.1.hook_resid_pre": right}
    by_layer = {f"layer_{i}": flat[i].contiguous() for i in range(L)}
    save_file({f"residual.{i:02d}": left[:, i].contiguous() for i in range(L)}, tmp_path / "layers.safetensors")
    save_file({"activations": left}, tmp_path / "whole.safetensors")
    save_file(by_layer | {"attention": torch.ones(2)}, tmp_path / "named.safetensors")
    np.save(tmp_path / "array.npy", right.numpy())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(right.numpy()))
    np.save(tmp_path / "mask.npy", mask.numpy())
    np.save(tmp_path / "lengths.npy", np.array(lengths))
    np.save(tmp_path / "ids.npy", ids.numpy())
    np.savez(tmp_path / "flat.npz", **{name: array.numpy() for name, array in by_layer.items()})
    np.savez(tmp_path / "whole.npz", right.numpy())
    np.savez(tmp_path / "fortran.npz", x=np.asfortranarray(right.numpy()))
    np.savez_compressed(tmp_path / "small.npz", **{name: array.numpy() for name, array in by_layer.items()})
    (tmp_path / "folder").mkdir()
    for i in range(L):
        np.save(tmp_path / "folder" / f"{i}.npy", flat[i].numpy())
    return {
        "list": (ROWS, {"token_ids": TOKENS}),
        "list of numpy": ([row.numpy() for row in ROWS], {"token_ids": [t.tolist() for t in TOKENS]}),
        "array with lengths": (right.numpy(), {"token_ids": ids.numpy(), "lengths": np.array(lengths)}),
        "array with a mask": (right, of_right),
        "padded on the left": (left, of_left),
        "a mask of numbers": (left, of_left | {"mask": left_mask.long().tolist()}),
        "other byte order": (left.numpy().astype(">f4"), of_left),
        "needs a gradient": (left.clone().requires_grad_(), of_left),
        "layers": ({i: right[:, i] for i in range(L)}, of_right),
        "layers, flat": ({i: flat[i] for i in (2, 0, 1)}, of_flat),
        "array, flat": (flat.transpose(0, 1), of_flat),
        "hooks": (hooks, of_right),
        "npy": (tmp_path / "array.npy", {"token_ids": tmp_path / "ids.npy", "mask": str(tmp_path / "mask.npy")}),
        "fortran npy": (tmp_path / "fortran.npy", {"token_ids": ids, "lengths": tmp_path / "lengths.npy"}),
        "npz": (tmp_path / "flat.npz", of_flat),
        "npz of one array": (tmp_path / "whole.npz", of_right),
        "fortran npz": (tmp_path / "fortran.npz", of_right),
        "compressed npz": (tmp_path / "small.npz", of_flat),
        "safetensors": (str(tmp_path / "layers.safetensors"), of_left),
        "safetensors of one tensor": (tmp_path / "whole.safetensors", of_left),
        "named tensors": (tmp_path / "named.safetensors", of_flat | {"layers": {f"layer_{i}": i for i in range(L)}}),
        "folder": (tmp_path / "folder", of_flat),
    }


def test_every_form_becomes_the_same_store(tmp_path):
    for name, (activations, arguments) in forms(tmp_path).items():
        store = import_activations(tmp_path / f"store of {name}", activations, **arguments)
        assert store.header.layers == (0, 1, 2), name
        assert (store.header.dtype, store.header.positions) == ("float32", ("last_input",)), name
        assert store.verify() == [], name
        for i, id_ in enumerate(store.ids):
            row = store.row(id_)
            assert torch.equal(row.residual, ROWS[i]), name
            assert torch.equal(row.token_ids, TOKENS[i]), name
            assert row.token_positions.tolist() == list(range(LENGTHS[i])), name
            assert row.token_marks.tolist() == [0] * (LENGTHS[i] - 1) + [1], name
        # Known by content: the id does not depend on the form either.
        assert store.ids == import_activations(tmp_path / "store of list", ROWS, token_ids=TOKENS).ids, name


def test_one_token_a_row_needs_nothing_but_an_array(tmp_path):
    x = torch.randn(6, L, D, generator=torch.Generator().manual_seed(0))
    for name, activations in {"n l d": x, "layers": {i: x[:, i] for i in range(L)}, "list": list(x)}.items():
        store = import_activations(tmp_path / name, activations, [0, 1, 1, 0, 1, 0], position="last")
        for layer in range(L):
            assert torch.equal(store.layer(layer, position="last"), x[:, layer])
        assert store.rows["label"].tolist() == [0, 1, 1, 0, 1, 0]
        assert store.row(store.ids[0]).token_ids.tolist() == [-1]
    named = import_activations(tmp_path / "numbers", x, layers=[4, 7, 30])
    assert torch.equal(named.layer(30, position="last_input"), x[:, 2])
    some = import_activations(tmp_path / "subset", {i: x[:, i] for i in range(L)}, layers=[2, 0])
    assert some.header.layers == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_that_a_store_has_are_kept_bit_for_bit(tmp_path, dtype):
    x = torch.randn(4, L, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0], x[1, 1, 1] = -0.0, torch.finfo(dtype).smallest_normal / 2
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name, activations in {"tensor": x, "file": tmp_path / "x.safetensors"}.items():
        store = import_activations(tmp_path / name, activations)
        assert store.header.torch_dtype is dtype
        found = torch.stack([store.layer(layer) for layer in range(L)], 1)
        whole = torch.int32 if dtype is torch.float32 else torch.int16
        assert torch.equal(found.view(whole), x.view(whole))


def test_other_types_are_converted_when_asked_only(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, L, D))
    with pytest.raises(DataError, match=r"float64; a store holds .* dtype='float32'"):
        import_activations(tmp_path / "s", x)
    store = import_activations(tmp_path / "s", x, dtype="bfloat16")
    assert torch.equal(store.layer(2), torch.from_numpy(x[:, 2]).to(torch.bfloat16))
    counts = import_activations(tmp_path / "counts", np.arange(60).reshape(4, L, D), dtype="float32")
    assert torch.equal(counts.layer(0), torch.arange(60.0).view(4, L, D)[:, 0])


def test_probes_and_cosines_run_on_imported_features(tmp_path):
    digits = load_digits()
    rows = np.flatnonzero(np.isin(digits.target, (3, 8)))[:240]
    pixels = digits.data[rows].astype(np.float32)
    noise = np.random.default_rng(0).normal(size=pixels.shape).astype(np.float32)
    labels = pd.DataFrame({"digit": digits.target[rows], "eight": digits.target[rows] == 8})
    labels.index = [f"digit {i}" for i in rows]
    store = import_activations(tmp_path / "s", {0: noise, 1: pixels}, labels)
    assert store.ids == tuple(labels.index)
    table = store.rows
    pairs = pd.Series(np.arange(240) // 2 % 40, index=table.index)
    sweep = sweep_probes(
        store,
        table["eight"],
        position="last_input",
        splits={"rows": None},
        questions=pd.DataFrame({"relation": "is it an eight", "entity": pairs}),
        clusters=(pairs, pairs),
        seed=0,
        controls=("shuffled",),
        replicates=50,
    )
    probe = sweep.table.query("kind == 'probe'").set_index("layer").auc
    assert probe[0] < 0.65 < 0.97 < probe[1]
    threes, eights = (list(table.index[table.eight == is_eight][:50]) for is_eight in (False, True))
    raw = cosine(store, threes, eights, position="last_input").raw[1]
    a, b = (torch.from_numpy(pixels[table.index.get_indexer(ids)]).double() for ids in (threes, eights))
    np.testing.assert_allclose(raw, torch.cosine_similarity(a, b).numpy(), rtol=1e-5)


def test_a_lens_accepts_what_was_imported_with_its_model(tmp_path):
    model = gp.load_model(FOLDER / "models" / "llava")
    examples = [gp.Example(f"Question: What is {word} doubled? Answer:") for word in ("two", "three", "four")]
    captured = gp.capture(model, examples, tmp_path / "captured", progress=False, positions=["last_input"])
    x = torch.stack([captured.layer(layer) for layer in captured.header.layers], 1)
    assert len(captured.header.layers) == model.n_layers + 1
    store = import_activations(tmp_path / "imported", x, ids=captured.ids, model=model)
    for name in ("model", "processor", "attention", "layers", "width"):
        assert getattr(store.header, name) == getattr(captured.header, name), name
    targets = np.array([5, 6, 7])
    mine, theirs = (logit_lens(s, model, targets, rows=captured.ids, position="last_input") for s in (store, captured))
    np.testing.assert_array_equal(mine.log_prob, theirs.log_prob)
    stranger = import_activations(tmp_path / "stranger", x)
    with pytest.raises(StoreError, match="weights imported"):
        logit_lens(stranger, model, targets, position="last_input")
    with pytest.raises(DataError, match=rf"width {D}, the model {model.width}"):
        import_activations(tmp_path / "no", ROWS, model=model)
    blocks = model.n_layers
    with pytest.raises(DataError, match=rf"layers=range\(1, {blocks + 1}\) for what each block leaves"):
        import_activations(tmp_path / "no", x[:, 1:], model=model)
    after = import_activations(tmp_path / "after", x[:, 1:], model=model, layers=range(1, blocks + 1))
    assert torch.equal(after.layer(blocks), x[:, blocks])
    with pytest.raises(DataError, match=f"layer {blocks + 1}, the model {blocks} blocks"):
        import_activations(tmp_path / "no", {blocks + 1: x[:, 0]}, model=model)


@dataclass
class Cache:
    """As TransformerLens' own looks."""

    cache_dict: dict
    has_batch_dim: bool


def test_layers_of_a_transformer_lens_cache_are_the_residual_stream(tmp_path):
    torch.manual_seed(0)
    hf, model = gpt2(tmp_path / "tokenizer")
    tokens = torch.randint(5, 400, (4, 6))
    _, cache = model.run_with_cache(tokens)
    store = import_activations(tmp_path / "s", cache, token_ids=tokens, model="a random gpt2")
    with torch.no_grad():
        hidden = hf(tokens, output_hidden_states=True).hidden_states
    assert store.header.layers == (0, 1, 2, 3)
    for layer in range(3):
        assert torch.equal(store.layer(layer), hidden[layer].flatten(0, 1))
    # transformers' last one is after the final norm; the embeddings alone lack the positions.
    assert not torch.allclose(store.layer(3), hidden[3].flatten(0, 1))
    with torch.no_grad():
        assert torch.allclose(hf.transformer.ln_f(store.layer(3)), hidden[3].flatten(0, 1))
    assert not torch.allclose(store.layer(0), cache["hook_embed"].flatten(0, 1))

    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    one = import_activations(tmp_path / "one", cache)
    assert torch.equal(one.layer(2), hidden[2][0])
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_pre"))
    assert import_activations(tmp_path / "pre", cache).header.layers == (0, 1, 2)


def test_caches_without_the_residual_stream_are_refused(tmp_path):
    with pytest.raises(DataError, match="hook_embed, which lacks the positional embeddings"):
        import_activations(tmp_path / "s", {"hook_embed": torch.ones(2, 3, D), "hook_pos_embed": torch.ones(2, 3, D)})
    tower = {"vision_tower.blocks.0.hook_resid_pre": torch.ones(2, 3, D)}
    with pytest.raises(DataError, match=r"layers=\{'vision_tower.blocks.0.hook_resid_pre': 7\}"):
        import_activations(tmp_path / "s", Cache(tower, has_batch_dim=True))
    save_file(tower, tmp_path / "tower.safetensors")
    with pytest.raises(DataError, match="'vision_tower.blocks.0.hook_resid_pre' names no layer"):
        import_activations(tmp_path / "s", tmp_path / "tower.safetensors")
    alone = import_activations(
        tmp_path / "s", Cache({"blocks.4.hook_resid_post": torch.ones(3, D)}, has_batch_dim=False)
    )
    assert alone.header.layers == (5,)
    assert alone.layer(5).shape == (3, D)
    assert len(alone) == 1


def test_ids_come_from_the_call_the_table_or_the_content(tmp_path):
    x = torch.randn(3, L, D, generator=torch.Generator().manual_seed(0))
    names = ["ä 1", "ß 2", "c\u0301 3"]
    frame = pd.DataFrame({"y": [1, 2, 3]})
    assert import_activations(tmp_path / "a", x, frame, ids=names).ids == tuple(names)
    assert import_activations(tmp_path / "b", x, frame.assign(id=names)).ids == tuple(names)
    assert import_activations(tmp_path / "c", x, frame.set_axis(names)).ids == tuple(names)
    assert import_activations(tmp_path / "d", x, pd.DataFrame(index=names)).ids == tuple(names)
    assert import_activations(tmp_path / "e", x, frame.assign(id=[7, 8, 9])).ids == ("7", "8", "9")
    # Numbers in an index are what a split left of a count.
    by_content = import_activations(tmp_path / "f", x, frame.set_axis([4, 9, 2])).ids
    assert by_content == import_activations(tmp_path / "g", x).ids
    assert all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in by_content)
    assert set(by_content).isdisjoint(import_activations(tmp_path / "i", x, token_ids=[4, 5, 6]).ids)
    assert by_content[::-1] == import_activations(tmp_path / "h", x.flip(0)).ids


def test_equal_rows_are_all_kept(tmp_path):
    x = torch.ones(4, L, D)
    x[2] = 2
    store = import_activations(tmp_path / "s", x, ["a", "b", "c", "d"])
    assert store.rows["label"].tolist() == ["a", "b", "c", "d"]
    assert [id_[32:] for id_ in store.ids] == ["", "-2", "", "-3"]
    assert len(import_activations(tmp_path / "s", x, ["a", "b", "c", "d"])) == 4


def test_the_same_call_again_adds_nothing_and_other_content_is_refused(tmp_path):
    x, y = torch.randn(5, L, D, generator=torch.Generator().manual_seed(0)), {"y": [1.0, None, 3.0, float("nan"), 5.0]}
    arguments = {"labels": y, "ids": list("abcde")}
    first = import_activations(tmp_path / "s", x, **arguments)
    files = sorted(p.name for p in (tmp_path / "s").rglob("*"))
    again = import_activations(tmp_path / "s", x, **arguments)
    assert again.ids == first.ids
    assert sorted(p.name for p in (tmp_path / "s").rglob("*")) == files
    more = import_activations(tmp_path / "s", x[:2] + 1, {"y": [6.0, 7.0]}, ids=["f", "g"])
    assert more.ids == tuple("abcdefg")
    changed = x.clone()
    changed[3, 1, 2] += 1
    for content, message in (
        ({"activations": changed}, "row 'd' already, with another residual"),
        ({"activations": x, "labels": {"y": [1.0, 2.0, 3.0, 4.0, 5.0]}}, "row 'b' already, with another column 'y'"),
        ({"activations": x, "labels": None}, "row 'a' already, with another column 'y'"),
        ({"activations": x, "token_ids": [1] * 5}, "row 'a' already, with another token_ids"),
        (
            {"activations": x, "position": {"last_input": [0, 0, None, 0, 0]}},
            "row 'c' already, with another token_mark",
        ),
        ({"activations": x.half()}, "dtype is 'float32' in the store and 'float16' in this run"),
        ({"activations": x, "position": "end"}, "positions is"),
        ({"activations": x, "layers": [1, 2, 3]}, "layers is"),
        ({"activations": x, "model": "another"}, "model.name is None in the store and 'another'"),
    ):
        with pytest.raises(StoreError, match=message):
            import_activations(tmp_path / "s", **(arguments | content))
    assert len(open_store(tmp_path / "s")) == 7
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="thesis.tex"):
        import_activations(tmp_path / "full", x)


def test_a_stopped_import_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_BATCH_BYTES", 4 * L * D * 4)
    x = torch.randn(20, L, D, generator=torch.Generator().manual_seed(0))
    read = []

    class Failing:
        shape, dtype = x.shape, x.dtype

        def __getitem__(self, key):
            if key.start >= 12:
                raise KeyboardInterrupt
            read.append(key)
            return x[key]

    with pytest.raises(KeyboardInterrupt):
        import_activations(tmp_path / "s", Failing(), np.arange(20))
    assert len(open_store(tmp_path / "s")) == 12
    whole = import_activations(tmp_path / "s", x, np.arange(20))
    assert whole.rows["label"].tolist() == list(range(20))
    assert torch.equal(whole.layer(1), x[:, 1])
    assert whole.verify() == []


def test_activations_are_read_in_pieces(tmp_path):
    x = torch.randn(64, L, 4, D, generator=torch.Generator().manual_seed(0))
    lines = []

    class Watched:
        shape, dtype = x.shape, x.dtype

        def __getitem__(self, key):
            lines.append(key.stop - key.start)
            return x[key].numpy()

    store = import_activations(tmp_path / "s", Watched(), shard_bytes=8 * L * 4 * D * 4)
    assert sum(lines) == 64
    assert max(lines) == 8
    assert len(store.records) > 4
    assert torch.equal(store.layer(2), x[:, 2].flatten(0, 1))


def test_batches_are_cut_by_tokens_and_by_rows():
    assert list(spans(np.array([3, 1, 4, 0, 9, 1, 1]), 4)) == [(0, 2), (2, 4), (4, 5), (5, 7)]
    # Rows without tokens take memory too.
    assert list(spans(np.zeros(5000, np.int64), 4)) == [(0, 4096), (4096, 5000)]
    assert list(spans(np.zeros(0, np.int64), 4)) == []


def test_numbers_that_are_none_are_refused_by_name(tmp_path):
    x = torch.randn(6, L, D, generator=torch.Generator().manual_seed(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[4, 1, 3] = bad
        with pytest.raises(DataError, match=r"row 4 \(e\), layer 1: NaN or infinity"):
            import_activations(tmp_path / "s", broken, ids=list("abcdef"))
        # Nothing was made of it.
        assert not (tmp_path / "s").exists()
    x[2, 2, 0] = 1e6
    with pytest.raises(DataError, match=r"row 2 \(c\), layer 2: numbers too large for float16"):
        import_activations(tmp_path / "s", x, ids=list("abcdef"), dtype="float16")
    broken[1, 0, 0] = torch.nan
    kept = import_activations(tmp_path / "s", broken, ids=list("abcdef"), allow_nonfinite=True)
    assert kept.layer(1)[4, 3] == -torch.inf
    assert len(import_activations(tmp_path / "s", broken, ids=list("abcdef"), allow_nonfinite=True)) == 6
    assert "NaN or infinite" in str(kept.verify()[0])


def test_positions_may_be_given_by_row(tmp_path):
    position = {"first": [0, 0, 0, 0], "entity": np.array([-1, 0, 2, 1]), "cue": [None, 0, None, -2]}
    store = import_activations(tmp_path / "s", ROWS, position=position, ids=list("abcd"))
    assert store.header.positions == ("first", "entity", "cue")
    assert torch.equal(store.layer(1, position="first"), torch.stack([row[1, 0] for row in ROWS]))
    expected = torch.stack([ROWS[0][2, -1], ROWS[1][2, 0], ROWS[2][2, 2], ROWS[3][2, 1]])
    assert torch.equal(store.layer(2, position="entity"), expected)
    assert torch.equal(store.layer(0, position="cue", rows=["d", "b"]), torch.stack([ROWS[3][0, 0], ROWS[1][0, 0]]))
    with pytest.raises(StoreError, match="'a' has 0 tokens at 'cue'"):
        store.layer(0, position="cue")


def test_rows_without_tokens_have_no_position(tmp_path):
    rows = [residual(0), residual(2), residual(0)]
    store = import_activations(tmp_path / "s", rows, ids=list("abc"))
    assert [store.row(id_).residual.shape[1] for id_ in "abc"] == [0, 2, 0]
    assert torch.equal(store.layer(1, position="last_input", rows=["b"]), rows[1][1, 1:])
    array = torch.ones(3, L, 4, D)
    masked = import_activations(tmp_path / "m", array, lengths=[0, 4, 1], ids=list("abc"))
    assert masked.batch(layers=()).offsets.tolist() == [0, 0, 4, 5]


def test_the_header_says_what_is_known_of_the_model(tmp_path):
    x = torch.ones(2, L, D)
    nothing = import_activations(tmp_path / "a", x).header
    assert set(nothing.model.values()) == {"imported", ""}
    assert (nothing.processor, nothing.attention, dict(nothing.generation)) == (
        "imported",
        "imported",
        {"method": "imported"},
    )
    named = import_activations(tmp_path / "b", x, model="gpt2").header.model
    assert (named["source"], named["name"], named["weights"]) == ("gpt2", "gpt2", "imported")
    known = import_activations(tmp_path / "c", x, model={"weights": "abc", "seed": "3"}).header.model
    assert (known["weights"], known["seed"], known["family"]) == ("abc", "3", "imported")


X = np.ones((4, L, D), np.float32)
T = np.ones((4, L, 2, D), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": X[:, 0]}, r"shape \(4, 5\); an array must be \[n, layers, d\]"),
        ({"activations": X[:0]}, "no rows"),
        ({"activations": []}, "no rows"),
        ({"activations": (X, X)}, "tuple: for one array a layer .*hidden_states.* after the final norm"),
        ({"activations": {}}, "no layer"),
        ({"activations": {0: X[:, 0], 1: X[:3, 0]}}, r"layer 1 is float32 \(3, 5\), layer 0 is float32 \(4, 5\)"),
        ({"activations": {0: X[:, 0], 1: X[:, 0].astype("f2")}}, "layer 1 is float16"),
        ({"activations": {0: X[0, 0]}}, r"layer 0 has shape \(5,\)"),
        ({"activations": {0: 3}}, "layer 0 is a int, not an array"),
        ({"activations": {"layers.3": X[:, 0]}}, r"'layers.3' names no layer"),
        ({"activations": {"model.layers.3.mlp": X[:, 0]}}, "names no layer"),
        ({"activations": {True: X[:, 0]}}, "True names no layer"),
        ({"activations": {"layer_3": X[:, 0], 3: X[:, 0]}}, "two names stand for layer 3"),
        ({"activations": {0: X[:, 0]}, "layers": [1]}, r"no layer 1; they have \[0\]"),
        ({"activations": {"a": X[:, 0]}, "layers": {"b": 1}}, "no 'b'; they have a"),
        ({"activations": {"a": X[:, 0], "b": X[:, 0]}, "layers": {"a": 1, "b": 1}}, "a number of its own"),
        ({"layers": {"a": 1}}, "an array wants the numbers of its axis"),
        ({"activations": X[:, :0]}, "no layers"),
        ({"layers": [1, 2]}, "3 layers, but 2 numbers"),
        ({"layers": [1, 3, 2]}, "do not rise"),
        ({"layers": [-1, 0, 1]}, "do not rise"),
        ({"activations": [X[0], X[1][:2]]}, "row 1 has 2 layers of width 5 in float32, row 0 has 3"),
        ({"activations": [X[0], X[0].astype("f2")]}, "row 1 has 3 layers of width 5 in float16"),
        ({"activations": [X[0], [1.0]]}, "row 1 of the activations is a list"),
        ({"activations": [X[0, 0]]}, r"row 0 of the activations is of shape \(5,\)"),
        ({"activations": X.astype(complex), "dtype": "float32"}, "type complex128 cannot be read"),
        ({"activations": torch.ones(4, L, D, dtype=torch.complex64), "dtype": "float32"}, "type complex64 cannot"),
        ({"activations": X.astype(object), "dtype": "float32"}, "type object cannot be read"),
        ({"activations": X.astype("V4"), "dtype": "float32"}, "cannot be read"),
        ({"dtype": "float8"}, "none of float32, bfloat16, float16"),
        ({"mask": np.ones((4, 2))}, "no axis of tokens"),
        ({"activations": T, "mask": np.ones((4, 3))}, r"mask has shape \(4, 3\); .* \(4, 2\)"),
        ({"activations": T, "mask": np.ones((4, 2)), "lengths": [1] * 4}, "give one of them"),
        ({"activations": T, "lengths": [1, 2, 3, 0]}, "row 2 has length 3, the activations 2 tokens a row"),
        ({"activations": T, "lengths": [1, 2]}, "4 rows, lengths has 2"),
        ({"activations": T, "lengths": [1, 2, -1, 0]}, "whole numbers from 0"),
        ({"activations": T, "lengths": np.array([1, 2, 1, 0.5])}, "whole numbers from 0"),
        ({"lengths": [1, 2]}, "add up to 3 tokens, the activations have 4"),
        ({"activations": [X[0]], "lengths": [1]}, "list of rows have no padding"),
        ({"token_ids": [1.0] * 4}, "token_ids are torch.float64; give whole numbers"),
        ({"token_ids": [1, 2]}, r"token_ids has shape \(2,\); .* \(4,\)"),
        ({"activations": T, "token_ids": [1] * 4}, r"token_ids has shape \(4,\); .* \(4, 2\)"),
        ({"activations": [X[0]], "token_ids": [[1], [2]]}, "1 rows, token_ids has 2"),
        ({"activations": [X[0]], "token_ids": [[1, 2]]}, r"row 0 has 1 tokens, its token_ids the shape \(2,\)"),
        ({"activations": [X[0]], "token_ids": "ids.npy"}, "want a list of vectors"),
        ({"labels": {"y": [1, 2, 3]}}, "4 rows, labels 3"),
        ({"ids": ["a", "b"]}, "4 rows, ids 2"),
        ({"ids": list("abca")}, "id 'a' stands twice, at rows 0 and 3"),
        ({"ids": list("abcd"), "labels": {"id": list("abdc")}}, "row 2 is 'c' by ids and 'd' by labels"),
        ({"position": {"p": [0, 0]}}, "4 rows, position 'p' is given for 2"),
        ({"position": {"p": [0, 0, 1, 0]}}, r"row 2 \(.*\) has 1 tokens, so p cannot be token 1"),
        ({"position": {"p": np.array([0, 0, 0.5, 0])}}, "0.0, which is neither"),
        ({"position": {f"p{i}": [0] * 4 for i in range(9)}}, "9 positions were given; a store has at most 8"),
        ({"activations": Path("nowhere.npy")}, "nowhere.npy does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        import_activations(tmp_path / "s", **({"activations": X} | arguments))
    assert not (tmp_path / "s").exists()


def test_what_is_no_activations_at_all_is_named():
    with pytest.raises(DataError, match=r"of type DataFrame; give an array \[n, layers, d\]"):
        open_source(pd.DataFrame(), layers=None)


def test_ids_that_no_store_takes_are_refused(tmp_path):
    with pytest.raises(StoreError, match="without control characters"):
        import_activations(tmp_path / "s", X, ids=["a", "b", "c\n", "d"])


def test_files_are_never_unpickled_and_damaged_ones_are_named(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object))
    torch.save(torch.ones(2), tmp_path / "x.pt")
    np.save(tmp_path / "short.npy", X)
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-9])
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04 and no more")
    save_file({"0": torch.ones(4, D)}, tmp_path / "short.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "short.safetensors").read_bytes()[:-9])
    (tmp_path / "x.mat").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("objects.npy", "cannot be read as a .npy file"),
        ("objects.npz", "cannot be read as an .npz file"),
        ("x.pt", "is a pickle, which can run code"),
        ("short.npy", "cannot be read as a .npy file"),
        ("short.npz", "cannot be read as an .npz file"),
        ("short.safetensors", "cannot be read as a safetensors file"),
        ("x.mat", "none of .safetensors, .npy, .npz"),
        ("empty", "a folder without .npy files"),
    ):
        with pytest.raises(DataError, match=message) as refused:
            import_activations(tmp_path / "s", tmp_path / name)
        assert name in str(refused.value)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(sorted),
    st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1), min_size=6, max_size=6, unique=True),
    st.integers(1, 400),
)
def test_any_ragged_rows_come_back(tmp_path_factory, lengths, dtype, layers, names, shard_bytes):
    path = tmp_path_factory.mktemp("any") / "s"
    generator = torch.Generator().manual_seed(len(lengths))
    kind = getattr(torch, dtype)
    rows = [torch.randn(len(layers), t, D, generator=generator).to(kind) for t in lengths]
    ids = names[: len(rows)]
    store = import_activations(path, rows, {"n": lengths}, ids=ids, layers=layers, shard_bytes=shard_bytes)
    assert store.ids == tuple(ids)
    assert store.header.layers == tuple(layers)
    assert store.rows["n"].tolist() == lengths
    for id_, row in zip(ids, rows, strict=True):
        assert torch.equal(store.row(id_).residual, row)
    flat = {layer: torch.cat(rows, 1)[i] for i, layer in enumerate(layers)}
    assert import_activations(path, flat, {"n": lengths}, ids=ids, lengths=lengths).ids == tuple(ids)
