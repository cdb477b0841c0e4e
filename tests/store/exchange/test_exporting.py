"""Export: other libraries read what is written, an import makes the same rows of it, and nothing is left half done."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gapprobe.errors import ConfigError, DataError, OutputError, StoreError
from gapprobe.store.exchange import exporting
from gapprobe.store.exchange.exported import open_export
from gapprobe.store.exchange.exporting import export_store, to_activation_cache, to_dataset
from gapprobe.store.exchange.importing import import_activations
from gapprobe.store.format import StoredRow
from gapprobe.store.reader import open_store
from tests.models.tiny import gpt2
from tests.store.rows import HEADER, equal, make_row, reheaded, some_rows, write

FORMS = ("numpy", "transformer_lens", "datasets")


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "store", some_rows(12))
    return open_store(tmp_path / "store")


def same_rows(a, b):
    """Whether two stores have the same header and the same rows, in the same order, bit for bit."""
    return a.header == b.header and a.ids == b.ids and all(equal(a.row(id_), b.row(id_)) for id_ in a.ids)


@pytest.mark.parametrize("form", FORMS)
def test_an_import_makes_the_same_store_of_every_export(store, tmp_path, form, monkeypatch):
    # Several batches of every file.
    monkeypatch.setattr(exporting, "_BATCH_BYTES", 3 * 3 * 6 * 4)
    folder = export_store(store, tmp_path / "out", form)
    back = import_activations(tmp_path / "back", folder, shard_bytes=200)
    assert same_rows(back, store)
    assert back.verify() == []
    again = import_activations(tmp_path / "back", folder)
    assert len(again) == len(store)
    assert len(again.records) == len(back.records)


@pytest.mark.parametrize("form", FORMS)
def test_exports_are_written_and_read_in_pieces(store, tmp_path, form, monkeypatch):
    token = 3 * 6 * 4  # all layers, in float32
    monkeypatch.setattr(exporting, "_BATCH_BYTES", 4 * token)
    read = []
    whole = type(store).layer

    def watched(self, layer, position=None, rows=None):
        found = whole(self, layer, position, rows)
        read.append(found.numel() * 4)
        return found

    monkeypatch.setattr(type(store), "layer", watched)
    folder = export_store(store, tmp_path / "out", form)
    assert 0 < max(read) <= 4 * token
    assert sum(read) == sum(record.tokens for record in store.records) * token
    _, _, batches = open_export(folder)
    sizes = [sum(row.residual.nbytes for row in rows) for rows in batches(4 * token // 2)]
    assert 0 < max(sizes) <= 4 * token // 2
    assert sum(sizes) == sum(read) // 2


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_selection_of_any_store_comes_back(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any")
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    layers = data.draw(st.lists(st.integers(0, 120), min_size=1, max_size=4, unique=True).map(sorted))
    names = data.draw(st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1), unique=True))
    header = reheaded(dtype=dtype, layers=tuple(layers), width=data.draw(st.integers(1, 9)))
    rows = [make_row(name, data.draw(st.integers(0, 4)), header) for name in names]
    write(path / "store", rows, header, shard_bytes=data.draw(st.integers(1, 2000)))
    store = open_store(path / "store")
    chosen = data.draw(st.permutations(names))[: data.draw(st.integers(0, len(names)))]
    some = data.draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
    form = data.draw(st.sampled_from(FORMS))
    kept = [layers.index(layer) for layer in sorted(some)]
    back = import_activations(path / "back", export_store(store, path / "out", form, rows=chosen, layers=some))
    assert back.header == replace(header, layers=tuple(sorted(some)))
    assert back.ids == tuple(chosen)
    for id_ in chosen:
        row = store.row(id_)
        assert equal(back.row(id_), replace(row, residual=row.residual[kept]))


def test_numpy_reads_an_export_without_us(store, tmp_path):
    folder = export_store(store, tmp_path / "new" / "out", "numpy")
    script = """
import json, sys, numpy as np, pandas as pd
rows, offsets = pd.read_parquet("rows.parquet").set_index("id"), np.load("offsets.npy")
x, positions = np.load("residual.03.npy", mmap_mode="r"), np.load("token_positions.npy")
i = rows.index.get_loc("row 7")
here = slice(offsets[i], offsets[i + 1])
assert "gapprobe" not in sys.modules
print(json.dumps([str(x.dtype), x[here].tolist(), positions[here].tolist(), bool(rows.right.iloc[i])]))
"""
    told = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True).stdout
    kind, residual, positions, right = json.loads(told)
    expected = make_row("row 7", 4)
    assert kind == "float32"
    assert torch.equal(torch.tensor(residual).to(torch.bfloat16), expected.residual[2])
    assert positions == expected.token_positions.tolist()
    assert right == expected.columns["right"]


def test_half_precision_stays_half_in_numpy(tmp_path):
    header = reheaded(dtype="float16")
    write(tmp_path / "store", some_rows(4, header), header)
    folder = export_store(open_store(tmp_path / "store"), tmp_path / "out", "numpy", layers=[3])
    assert np.load(folder / "residual.03.npy").dtype == np.float16
    assert not (folder / "residual.00.npy").exists()


def test_one_position_is_one_line_a_row(store, tmp_path):
    with pytest.raises(StoreError, match="'row 1' has 0 tokens at 'last_output'.*Leave such rows out"):
        export_store(store, tmp_path / "out", "numpy", position="last_output")
    rows = [id_ for id_ in store.ids if len(store.row(id_).token_ids)]
    wanted = {"rows": rows[::-1], "position": "last_output"}
    expected = store.layer(1, position="last_output", rows=rows[::-1])
    folder = export_store(store, tmp_path / "numpy", "numpy", **wanted)
    assert torch.equal(torch.from_numpy(np.load(folder / "residual.01.npy")), expected.float())
    assert pq.read_table(folder / "rows.parquet").column("id").to_pylist() == rows[::-1]
    cache = load_file(export_store(store, tmp_path / "lens", "transformer_lens", **wanted) / "cache.safetensors")
    assert torch.equal(cache["blocks.0.hook_resid_post"], expected[:, None])
    table = to_dataset(store, **wanted).with_format("torch")
    assert torch.equal(table["residual.01"][:], expected.float())
    back = import_activations(tmp_path / "back", export_store(store, tmp_path / "datasets", "datasets", **wanted))
    assert torch.equal(back.layer(1, position="last_output"), expected)
    assert back.row(rows[2]).token_positions.tolist() == store.row(rows[2]).token_positions[-1:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_on_disk_is_padded_on_the_side_asked_for(store, tmp_path, side):
    folder = export_store(store, tmp_path / "out", "transformer_lens", padding_side=side)
    cache, tokens = load_file(folder / "cache.safetensors"), load_file(folder / "tokens.safetensors")
    assert sorted(cache) == ["blocks.0.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    for i, id_ in enumerate(store.ids):
        row = store.row(id_)
        length = len(row.token_ids)
        real = slice(4 - length, 4) if side == "left" else slice(0, length)
        assert tokens["mask"][i].nonzero()[:, 0].tolist() == list(range(4))[real]
        assert torch.equal(cache["blocks.2.hook_resid_post"][i, real], row.residual[2])
        assert torch.equal(tokens["token_ids"][i, real], row.token_ids)
        assert not cache["blocks.2.hook_resid_post"][i][~tokens["mask"][i]].any()


def test_transformer_lens_works_on_a_cache_of_ours(tmp_path):
    lens = import_module("transformer_lens")
    torch.manual_seed(0)
    _, model = gpt2(tmp_path / "tokenizer")
    tokens = torch.randint(5, 400, (4, 6))
    _, theirs = model.run_with_cache(tokens)
    store = import_activations(tmp_path / "s", theirs, token_ids=tokens)
    ours, mask = to_activation_cache(store, model=model)
    assert isinstance(ours, lens.ActivationCache)
    assert mask.all()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert len(ours) == 6
    assert torch.equal(ours["resid_post", -1], theirs["resid_post", -1])
    assert torch.equal(ours.accumulated_resid(apply_ln=True), theirs.accumulated_resid(apply_ln=True))
    file = export_store(store, tmp_path / "out", "transformer_lens") / "cache.safetensors"
    loaded = lens.ActivationCache(load_file(file), model)
    assert torch.equal(loaded["resid_post", 1], theirs["resid_post", 1])

    # Without a model, only blocks that a stored layer lies behind are known to be there.
    alone, mask = to_activation_cache(store, layers=[0, 2], rows=store.ids[:2])
    assert set(alone.keys()) == {"blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"}
    assert torch.equal(alone["resid_post", 1], theirs["resid_post", 1][:2])
    _, other = gpt2(tmp_path / "tokenizer", layers=1, width=8)
    with pytest.raises(DataError, match="width 16, the model 8"):
        to_activation_cache(store, model=other)


def test_a_cache_in_memory_pads_ragged_rows(store):
    import_module("transformer_lens")
    cache, mask = to_activation_cache(store, padding_side="right")
    row = store.row("row 4")
    assert mask[4].tolist() == [True, True, True, False]
    assert torch.equal(cache["resid_post", 2][4, :3], row.residual[2])
    assert torch.equal(cache["resid_pre", 1][4, :3], row.residual[1])
    assert cache["resid_pre", 1] is cache["resid_post", 0]
    assert not cache["resid_post", 2][4, 3].any()
    last, _ = to_activation_cache(store, rows=["row 4", "row 2"])
    assert torch.equal(
        last["resid_post", 2][:, -1], torch.stack([row.residual[2, -1], store.row("row 2").residual[2, -1]])
    )


def test_datasets_reads_the_same_from_memory_and_from_disk(store, tmp_path, monkeypatch):
    datasets = import_module("datasets")
    monkeypatch.setattr(exporting, "_BATCH_BYTES", 3 * 3 * 6 * 4)
    on_disk = datasets.load_from_disk(str(export_store(store, tmp_path / "out", "datasets")))
    in_memory = to_dataset(store)
    assert on_disk.features == in_memory.features
    assert on_disk.to_dict() == in_memory.to_dict()
    # What datasets caches by: the same for the same export, another for another.
    assert in_memory._fingerprint == to_dataset(store)._fingerprint
    assert in_memory._fingerprint != to_dataset(store, rows=store.ids[:2])._fingerprint
    assert on_disk["id"][:] == list(store.ids)
    assert on_disk["right"][:] == store.rows["right"].tolist()
    row = store.row("row 2")
    found = on_disk.with_format("torch")[2]
    assert torch.equal(found["residual.03"], row.residual[2].float())
    assert found["token_ids"].tolist() == row.token_ids.tolist()
    assert len(on_disk.filter(lambda row: row["setting"] == "visual")) == (store.rows.setting == "visual").sum()


def test_exports_write_nothing_outside_their_folder(store, tmp_path):
    before = {path for path in tmp_path.rglob("*")}
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys; from gapprobe.store.reader import open_store; from gapprobe.store.exchange.exporting import *\n"
        "store = open_store(sys.argv[1])\n"
        "for form in ('numpy', 'transformer_lens', 'datasets'): export_store(store, f'{sys.argv[2]}/{form}', form)\n"
    )
    environment = os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(home)}
    command = [sys.executable, "-c", script, str(store.path), str(tmp_path / "out")]
    subprocess.run(command, check=True, env=environment, cwd=home)
    after = {path for path in tmp_path.rglob("*")} - before
    outside = {path for path in after if tmp_path / "out" not in (path, *path.parents)}
    assert outside == {home}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_every_export_says_how_to_read_it(store, tmp_path, form):
    folder = export_store(store, tmp_path / "out", form)
    told = (folder / "README.md").read_text(encoding="utf-8")
    assert "12 rows" in told
    named = set(re.findall(r"`([a-z_.]+\.(?:npy|parquet|safetensors))`", told))
    assert all((folder / name).exists() for name in named)
    assert oct(folder.stat().st_mode & 0o777) == oct(0o777 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_cannot_be_exported_is_refused(store, tmp_path):
    out = tmp_path / "out"
    for arguments, kind, message in (
        ({"format": "pickle"}, ConfigError, "'pickle' is none of numpy, transformer_lens, datasets"),
        ({"layers": [0, 2]}, StoreError, "no layer 2; it has 0, 1, 3"),
        ({"layers": []}, StoreError, "no layers"),
        ({"position": "end"}, StoreError, "no position 'end'; it has last_input, last_output"),
        ({"rows": ["row 0", "row 99"]}, StoreError, "no row 'row 99'"),
        ({"rows": ["row 0", "row 1", "row 0"]}, DataError, "'row 0' twice"),
    ):
        # The types that tests check would refuse an unknown format before we do.
        with pytest.raises(kind, match=message):
            getattr(export_store, "__wrapped__", export_store)(store, out, **({"format": "numpy"} | arguments))
        assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        export_store(store, tmp_path / "file", "numpy")
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"out holds 'thesis.tex' already"):
        export_store(store, out, "numpy")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export_store(store, tmp_path / "link", "numpy")
    assert (tmp_path / "empty" / "rows.parquet").exists()


def test_columns_that_a_dataset_needs_are_named(tmp_path):
    row = make_row("a", 2)
    write(tmp_path / "store", [replace(row, columns={"token_ids": "mine"})])
    store = open_store(tmp_path / "store")
    with pytest.raises(DataError, match="a column 'token_ids'"):
        export_store(store, tmp_path / "out", "datasets")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    back = import_activations(tmp_path / "back", export_store(store, tmp_path / "out", "numpy"))
    assert back.rows["token_ids"].tolist() == ["mine"]


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_nothing_behind(store, tmp_path, monkeypatch, form):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device. Nothing was left behind"):
        export_store(store, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_stop_leaves_nothing_behind(store, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_write_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        export_store(store, tmp_path / "out", "numpy")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_missing_package_is_named_with_its_extra(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    for call in (lambda: to_dataset(store), lambda: export_store(store, tmp_path / "out", "datasets")):
        with pytest.raises(ConfigError, match=r"datasets is not installed: pip install 'gapprobe\[export\]'"):
            call()
    with pytest.raises(ConfigError, match="transformer-lens is not installed"):
        to_activation_cache(store)
    # The file that TransformerLens reads takes no TransformerLens.
    export_store(store, tmp_path / "out", "transformer_lens")


def test_damaged_exports_are_refused(store, tmp_path):
    def exported(form):
        folder = tmp_path / f"{form} {len(list(tmp_path.iterdir()))}"
        return export_store(store, folder, form)

    def refuse(folder, message):
        with pytest.raises(DataError, match=message):
            import_activations(tmp_path / "back", folder)
        assert not (tmp_path / "back").exists()

    about = exported("numpy")
    text = (about / "export.json").read_text(encoding="utf-8")
    for broken, message in (
        (text.replace('"version": 1', '"version": 2', 1), "not of version 1"),
        (text.replace('"form": "numpy"', '"form": "tape"'), "form 'tape'"),
        (text.replace('"width": 6', '"width": 7'), "fingerprint"),
        (text[:-9], "damaged"),
    ):
        (about / "export.json").write_text(broken, encoding="utf-8")
        refuse(about, message)
    short = exported("numpy")
    np.save(short / "residual.01.npy", np.load(short / "residual.01.npy")[:-1])
    refuse(short, "all layers must be alike")
    gone = exported("numpy")
    (gone / "token_marks.npy").unlink()
    refuse(gone, "token_marks.npy does not exist")
    fewer = exported("transformer_lens")
    pd.read_parquet(fewer / "rows.parquet")[:-1].to_parquet(fewer / "rows.parquet")
    refuse(fewer, "do not fit together")
    cut = exported("datasets")
    data = next(cut.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:500])
    refuse(cut, "damaged")
    with pytest.raises(DataError, match="brings its own labels"):
        import_activations(tmp_path / "back", exported("numpy"), labels=[1] * 12)


def test_a_store_without_rows_or_tokens_is_exported_too(tmp_path):
    empty = replace(make_row("none", 0), columns={})
    write(tmp_path / "none", [])
    write(tmp_path / "tokenless", [empty])
    for name, count in (("none", 0), ("tokenless", 1)):
        store = open_store(tmp_path / name)
        for form in FORMS:
            folder = export_store(store, tmp_path / f"{name} {form}", form)
            back = import_activations(tmp_path / f"{name} {form} back", folder)
            assert back.header == HEADER
            assert len(back) == count


def test_the_marks_of_all_positions_survive(tmp_path):
    two = torch.zeros(3, dtype=torch.uint8)
    two[1] = 3
    row = make_row("a", 3)
    row = StoredRow("a", {}, row.residual, row.token_ids, row.token_positions, row.token_roles, two)
    write(tmp_path / "store", [row])
    for form in FORMS:
        folder = export_store(open_store(tmp_path / "store"), tmp_path / form, form, position="last_input")
        back = import_activations(tmp_path / f"{form} back", folder)
        assert back.row("a").token_marks.tolist() == [3]
        assert torch.equal(back.layer(3, position="last_output"), row.residual[2, 1:2])


PAGE = Path(__file__).parents[3] / "docs" / "stores.md"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_the_page_for_users_runs(code, tmp_path, monkeypatch):
    if "to_activation_cache" in code:
        import_module("transformer_lens")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})
