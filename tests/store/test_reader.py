import json
import mmap
import resource
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gapprobe.errors import StoreError
from gapprobe.store.format import ShardRecord
from gapprobe.store.reader import find_stores, open_store
from tests.store.rows import equal, holds, make_row, reheaded, some_rows, write


def by_hand(rows, layer):
    """All tokens of the rows at the i-th stored layer."""
    return torch.cat([row.residual[layer] for row in rows])


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_store_reads_back_bit_for_bit(data):
    header = reheaded(
        dtype=data.draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        layers=tuple(sorted(data.draw(st.sets(st.integers(0, 120), min_size=1, max_size=4)))),
        width=data.draw(st.integers(1, 9)),
    )
    names = data.draw(st.lists(NAMES, unique=True, max_size=12))
    rows = [make_row(name, data.draw(st.integers(0, 5)), header) for name in names]
    shard_bytes = data.draw(st.sampled_from([1, 200, 1 << 20]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write(path, rows, header, batch=data.draw(st.integers(1, 5)), shard_bytes=shard_bytes)
        assert holds(path, rows)
        store = open_store(path)
        assert store.ids == tuple(store.rows.index) == tuple(names)
        asked = data.draw(st.lists(st.sampled_from(rows), max_size=8)) if rows else []
        for i, layer in enumerate(header.layers):
            flat = store.layer(layer, rows=[row.id for row in asked])
            assert flat.dtype == header.torch_dtype
            assert flat.shape[1] == header.width
            assert flat.equal(torch.cat([torch.empty(0, header.width).to(flat.dtype), *(r.residual[i] for r in asked)]))
            full = [row for row in asked if len(row.token_ids)]
            for position, token in (("last_input", 0), ("last_output", -1)):
                lines = store.layer(layer, position, (row.id for row in full))
                assert len(lines) == len(full)
                assert all(line.equal(row.residual[i, token]) for line, row in zip(lines, full, strict=True))


def test_rows_come_back_as_a_table_without_losing_types(tmp_path):
    rows = some_rows(10)
    write(tmp_path, rows)
    frame = open_store(tmp_path).rows
    assert frame.index.name == "id"
    assert frame["n"].tolist() == [row.columns["n"] for row in rows]
    assert frame["right"].dtype == bool
    assert frame["error"].isna().tolist() == [len(row.token_ids) > 0 for row in rows]
    assert [list(x) for x in frame["answer_ids"]] == [row.columns["answer_ids"] for row in rows]


def test_whole_numbers_with_gaps_stay_whole(tmp_path):
    rows = [make_row("a", 1), make_row("b", 1)]
    object.__setattr__(rows[0], "columns", {"n": 2**53 + 1, "yes": True})
    object.__setattr__(rows[1], "columns", {})
    write(tmp_path, rows, batch=1)
    frame = open_store(tmp_path).rows
    assert frame["n"].iloc[0] == 2**53 + 1
    assert frame["yes"].iloc[0] is np.True_ or frame["yes"].iloc[0] is True
    assert frame.loc["b"].isna().all()
    assert open_store(tmp_path).row("b").columns == {"n": None, "yes": None}


def test_changing_what_was_read_changes_neither_store_nor_later_reads(tmp_path):
    rows = [make_row(str(i), 1) for i in range(4)]
    write(tmp_path, rows, batch=4)
    store = open_store(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.layer(3).zero_()
    frame = store.rows
    frame["new"] = 1
    assert "new" not in store.rows
    assert store.layer(3).equal(by_hand(rows, 2))
    assert holds(tmp_path, rows)


def test_one_contiguous_shard_is_mapped_not_copied(tmp_path, monkeypatch):
    rows = [make_row(str(i), 1) for i in range(4)]
    write(tmp_path, rows, batch=4)
    store, maps = open_store(tmp_path), []
    store.layer(0)
    real = mmap.mmap
    monkeypatch.setattr("mmap.mmap", lambda *a, **k: maps.append(real(*a, **k)) or maps[-1])
    layer = store.layer(3, "last_input", store.rows.index)
    start = torch.frombuffer(maps[-1], dtype=torch.uint8).data_ptr()
    assert start <= layer.data_ptr() < start + len(maps[-1])
    assert layer.equal(by_hand(rows, 2))


def test_file_systems_that_refuse_to_map(tmp_path, monkeypatch):
    rows = some_rows(9)
    write(tmp_path, rows)

    def refuse(*_, **__):
        raise OSError(19, "No such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    assert open_store(tmp_path).layer(3).equal(by_hand(rows, 2))
    assert holds(tmp_path, rows)


def test_what_is_not_there_is_named(tmp_path):
    write(tmp_path, some_rows(5))
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match="no layer 2; it has 0, 1, 3"):
        store.layer(2)
    with pytest.raises(StoreError, match="no position 'image'; it has last_input, last_output"):
        store.layer(3, "image")
    with pytest.raises(StoreError, match="no row 'nobody'"):
        store.layer(3, rows=["row 0", "nobody"])
    with pytest.raises(StoreError, match="no row 'nobody'"):
        store.row("nobody")
    with pytest.raises(StoreError, match=r"row 'row 1' has 0 tokens at 'last_input' \(1 of 5"):
        store.layer(3, "last_input")


def test_a_position_marked_twice_in_a_row_is_named(tmp_path):
    row = make_row("a", 3)
    row.token_marks[1] |= 1
    write(tmp_path, [row])
    with pytest.raises(StoreError, match="row 'a' has 2 tokens at 'last_input'"):
        open_store(tmp_path).layer(0, "last_input")


def test_info_counts_what_is_there(tmp_path):
    rows = some_rows(10)
    write(tmp_path, rows)
    info = open_store(tmp_path).info()
    assert (info.rows, info.errors, info.tokens, info.shards) == (10, 2, 20, 4)
    assert info.bytes == sum(f.stat().st_size for d in ("shards", "rows") for f in (tmp_path / d).iterdir())
    wanted = pd.Series([row.columns["setting"] for row in rows]).value_counts().to_dict()
    assert info.settings == wanted
    for part in ("10, of which 2 could not be run", "3 (0 to 3) layers of width 6, bfloat16", "weights abc"):
        assert part in str(info)


def test_a_folder_that_is_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"is no gapprobe store: no store\.json"):
            open_store(path)
        with pytest.raises(StoreError, match="is no gapprobe store"):
            find_stores(path)
    (tmp_path / "store.json").mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(tmp_path)


def test_stores_are_found_below_a_folder(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / "store" / name, some_rows(1))
    assert find_stores(tmp_path) == [tmp_path / "store" / "a", tmp_path / "store" / "b"]
    assert find_stores(tmp_path / "store" / "a") == [tmp_path / "store" / "a"]


def test_a_damaged_line_is_told_and_the_other_rows_are_read(tmp_path):
    write(tmp_path, some_rows(9))
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_bytes(lines[0] + lines[1].replace(b'"rows":3', b'"rows":4') + lines[2])
    with pytest.warns(UserWarning, match="line 2 of its manifest is damaged"):
        store = open_store(tmp_path)
    assert store.ids == tuple(f"row {i}" for i in (0, 1, 2, 6, 7, 8))
    write(tmp_path, some_rows(9))
    with pytest.warns(UserWarning, match="line 2"):
        assert len(open_store(tmp_path).ids) == 9


def test_lines_that_contradict_each_other_are_refused(tmp_path):
    write(tmp_path, some_rows(3))
    with (tmp_path / "manifest.jsonl").open("ab") as manifest:
        manifest.write(ShardRecord(0, 2, 6, 4096, "a" * 64, 5, "b" * 64).to_line())
    with pytest.raises(StoreError, match="line 2 contradicts"):
        open_store(tmp_path)


def read_everything(path):
    store = open_store(path)
    for name in store.ids:
        store.row(name)
    return store.layer(3)


def test_truncated_and_missing_shards_are_store_errors(tmp_path):
    write(tmp_path, some_rows(3))
    file = tmp_path / "shards/000000.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(StoreError, match="000000"):
            read_everything(tmp_path)
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        read_everything(tmp_path)
    file.write_bytes(content)
    read_everything(tmp_path)


def test_a_damaged_or_missing_table_of_rows_is_read_from_the_shard(tmp_path):
    rows = some_rows(3)
    write(tmp_path, rows)
    file = tmp_path / "rows/000000.parquet"
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[:-1], b"x" + content[1:], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        store = open_store(tmp_path)
        assert all(equal(store.row(row.id), row) for row in rows)
        assert [problem.file for problem in store.verify()] == ["rows/000000.parquet"]
    shard = tmp_path / "shards/000000.safetensors"
    shard.write_bytes(shard.read_bytes().replace(content, b"x" + content[1:]))
    with pytest.raises(StoreError, match="000000.parquet cannot be read"):
        read_everything(tmp_path)


def test_a_shard_cut_short_while_it_is_in_use_is_an_error_not_a_crash(tmp_path):
    write(tmp_path, some_rows(3))
    store = open_store(tmp_path)
    store.layer(3)
    file = tmp_path / "shards" / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:4100])
    with pytest.raises(StoreError, match="truncated"):
        store.layer(3)
    with pytest.raises(StoreError, match="truncated"):
        store.row("row 2")


def reheader(path, change):
    """Rewrite the header of the first shard, and the manifest's sizes with it, as an attacker would."""
    file = path / "shards" / "000000.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = change(json.loads(content[8:end]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    manifest = path / "manifest.jsonl"
    fields = json.loads(manifest.read_text())
    record = ShardRecord(
        **{k: v for k, v in fields.items() if k != "line_sha256"} | {"shard_bytes": file.stat().st_size}
    )
    manifest.write_bytes(record.to_line())


HUGE = 1 << 62


def entry(name, **fields):
    return lambda header: header | {name: header[name] | fields}


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"", lambda _: b"{", lambda _: b"[" * 50_000, lambda _: b"{}",
        lambda header: {k: v for k, v in header.items() if k != "token_ids"},
        lambda header: {k: v for k, v in header.items() if k != "__metadata__"},
        lambda header: header | {"__metadata__": {"fingerprint": "another"}},
        lambda header: header | {"residual.03": None},
        entry("residual.03", shape=[HUGE, 6]), entry("residual.03", shape=[HUGE, HUGE, HUGE]),
        entry("residual.03", data_offsets=[0, HUGE]), entry("residual.03", data_offsets=[-8, 64]),
        entry("residual.03", data_offsets=[0, 72]), entry("residual.03", data_offsets=[0, 1, 2]),
        entry("residual.03", dtype="F16"), entry("residual.03", dtype="F32"), entry("residual.03", dtype="../passwd"),
        entry("residual.03", shape=[True, 6]), entry("residual.03", shape="66"), entry("residual.03", shape=[6.0, 6]),
        entry("offsets", shape=[2, 2]),
        entry("token_ids", shape=[3, 2]),
        lambda header: header | {"extra": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}},
    ],
)  # fmt: skip
def test_hostile_shard_headers_are_refused(tmp_path, change):
    write(tmp_path, some_rows(3))
    reheader(tmp_path, change)
    with pytest.raises(StoreError, match="000000"):
        read_everything(tmp_path)


def test_tensors_of_the_future_are_ignored(tmp_path):
    rows = some_rows(3)
    write(tmp_path, rows)
    file = tmp_path / "shards" / "000000.safetensors"
    size = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("ab") as stream:
        stream.write(bytes(4))
    new = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [size, size + 4]}
    reheader(tmp_path, lambda header: header | {"dense.last_input": new})
    assert read_everything(tmp_path).equal(by_hand(rows, 2))


@pytest.mark.parametrize("offsets", [[1, 2, 2, 6], [0, 4, 2, 6], [0, 2, 2, 5], [0, -2, 2, 6], [0, HUGE, 2, 6]])
def test_offsets_that_do_not_rise_are_refused(tmp_path, offsets):
    write(tmp_path, some_rows(3))
    file = tmp_path / "shards" / "000000.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + np.array(offsets, np.int64).tobytes() + content[start + 32 :])
    with pytest.raises(StoreError, match="offsets do not rise"):
        read_everything(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_gives_rows_or_a_store_error(tmp_path, data):
    if not (tmp_path / "s").exists():
        write(tmp_path / "s", some_rows(3))
    names = ["store.json", "manifest.jsonl", "shards/000000.safetensors", "rows/000000.parquet"]
    file = tmp_path / "s" / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(changed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = read_everything(tmp_path / "s")
        assert layer.shape in {(6, 6), (0, 6)}
    except StoreError:
        pass
    finally:
        file.write_bytes(content)


def test_many_shards_need_few_descriptors(tmp_path):
    rows = [make_row(str(i), 1) for i in range(50)]
    write(tmp_path, rows, batch=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        store = open_store(tmp_path)
        kept = [store.row(name) for name in store.ids]
        assert store.layer(3, "last_output").equal(by_hand(rows, 2))
        assert all(equal(a, b) for a, b in zip(kept, rows, strict=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_opening_reads_no_shard_and_no_table(tmp_path):
    write(tmp_path, some_rows(1))
    line = ShardRecord(0, 100, 200, 10**8, "a" * 64, 10**4, "b" * 64)
    with (tmp_path / "manifest.jsonl").open("wb") as manifest:
        for number in range(1000):
            manifest.write(replace(line, shard=number).to_line())
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    assert repr(open_store(tmp_path)).endswith("100000 rows, 3 layers, width 6)")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_batch_of_one_position_is_the_marked_tokens_of_each_row(data):
    rows = [make_row(f"r{i}", data.draw(st.integers(0, 6))) for i in range(data.draw(st.integers(0, 9)))]
    for row in rows:
        row.token_marks[:] = torch.tensor(
            data.draw(st.lists(st.integers(0, 3), min_size=len(row.token_marks), max_size=len(row.token_marks))),
            dtype=torch.uint8,
        )
    wanted = data.draw(st.permutations(rows))[: data.draw(st.integers(0, len(rows)))]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "s", rows, shard_bytes=data.draw(st.sampled_from([1, 300, 1 << 20])))
        store = open_store(Path(folder) / "s")
        for bit, name in enumerate(store.header.positions):
            found = store.batch([row.id for row in wanted], [1, 3], name)
            marked = [row.token_marks >> bit & 1 == 1 for row in wanted]
            assert found.offsets.diff().tolist() == [int(mark.sum()) for mark in marked]
            parts = [row.residual[1:, mark] for row, mark in zip(wanted, marked, strict=True)]
            expected = torch.cat(parts, 1) if parts else torch.empty(2, 0, 6, dtype=torch.bfloat16)
            assert torch.equal(found.residual, expected)
            for kind in ("token_ids", "token_positions", "token_roles", "token_marks"):
                expected = [int(v) for row, mark in zip(wanted, marked, strict=True) for v in getattr(row, kind)[mark]]
                assert getattr(found, kind).tolist() == expected
