import errno
import shutil
from dataclasses import replace

import pytest

from gapprobe.errors import OutputError, StoreError
from gapprobe.store import sealing, table
from gapprobe.store.arena import token_bytes
from gapprobe.store.care import compacting
from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.manifest import read_manifest
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter
from tests.store.damage import files, flip, place
from tests.store.rows import HEADER, equal, holds, make_row, reheaded, some_rows, write


def same_rows(path, rows):
    """The store is sound and holds these rows in this order, bit for bit."""
    store = open_store(path)
    return (
        verify_store(path) == []
        and store.ids == tuple(row.id for row in rows)
        and all(equal(store.row(row.id), row) for row in rows)
    )


def test_small_shards_become_one_and_rows_keep_order_and_bits(tmp_path):
    rows = some_rows(40)
    write(tmp_path, rows, batch=3)
    table, moments = open_store(tmp_path).table, open_store(tmp_path).moments(1)
    done = compact_store(tmp_path)
    assert (done.before, done.after) == (14, 1)
    assert same_rows(tmp_path, rows)
    store = open_store(tmp_path)
    assert len(store.records) == 1
    assert store.table.equals(table)
    assert store.moments(1).count == moments.count
    assert store.moments(1).mean.allclose(moments.mean, atol=1e-6)


def test_old_files_stay_for_readers_until_they_are_cleared_away(tmp_path):
    rows = some_rows(12)
    write(tmp_path, rows)
    reader, before = open_store(tmp_path), files(tmp_path)
    done = compact_store(tmp_path)
    assert done.old_bytes == sum(len(content) for name, content in before.items() if "/" in name)
    assert "gapprobe store gc" in str(done)
    assert all(equal(reader.row(row.id), row) for row in rows)
    assert reader.refresh() == 0
    assert len(reader.records) == 1
    assert collect_garbage(tmp_path).bytes == done.old_bytes
    assert {name for name in files(tmp_path) if "/" in name} == {"shards/000004.safetensors", "rows/000004.parquet"}
    assert same_rows(tmp_path, rows)
    assert all(equal(reader.row(row.id), row) for row in rows)


def test_a_writer_clears_old_files_away_too(tmp_path):
    rows = some_rows(12)
    write(tmp_path, rows)
    compact_store(tmp_path)
    write(tmp_path, some_rows(15))
    assert {name for name in files(tmp_path) if name.startswith("shards")} == {
        "shards/000004.safetensors", "shards/000005.safetensors"
    }  # fmt: skip
    assert same_rows(tmp_path, some_rows(15))


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_do_is_said_and_done(tmp_path, rows):
    write(tmp_path, some_rows(rows))
    before = files(tmp_path)
    done = compact_store(tmp_path)
    assert "already compact" in str(done)
    assert files(tmp_path) == before


@pytest.mark.parametrize("tokens", [1, 4, 6, 9, 16, 25, 60])
def test_shards_stay_below_the_size_and_no_two_small_ones_are_left(tmp_path, tokens):
    rows = some_rows(40)
    write(tmp_path, rows, batch=3)
    size = tokens * token_bytes(HEADER)
    compact_store(tmp_path, shard_bytes=size)
    assert same_rows(tmp_path, rows)
    tokens_of = [record.tokens for record in open_store(tmp_path).records]
    before = [sum(len(row.token_ids) for row in rows[i : i + 3]) for i in range(0, 40, 3)]
    assert all(count <= tokens or count in before for count in tokens_of)
    assert not any(2 * a < tokens and 2 * b < tokens for a, b in zip(tokens_of, tokens_of[1:], strict=False))
    collect_garbage(tmp_path)
    before = files(tmp_path)
    assert "already compact" in str(compact_store(tmp_path, shard_bytes=size))
    assert files(tmp_path) == before


def test_rows_without_tokens_fill_a_shard_too(tmp_path, monkeypatch):
    monkeypatch.setattr(compacting, "MAX_ROWS", 10)
    rows = [make_row(f"row {i}", 0) for i in range(30)]
    for i in range(0, 30, 3):
        write(tmp_path, rows[i : i + 3])
    compact_store(tmp_path)
    assert [record.rows for record in open_store(tmp_path).records] == [9, 9, 9, 3]
    assert same_rows(tmp_path, rows)


def test_shards_of_other_versions_are_not_joined(tmp_path):
    rows, other = some_rows(18), reheaded(versions={"torch": "3.0"})
    write(tmp_path, rows[:6])
    write(tmp_path, rows[6:12], other)
    write(tmp_path, rows[12:])
    compact_store(tmp_path)
    assert [record.versions for record in read_manifest(tmp_path).records] == [None, {"torch": "3.0"}, None]
    assert same_rows(tmp_path, rows)


def test_fields_of_other_versions_stay_in_the_lines_that_stay(tmp_path):
    write(tmp_path, some_rows(4), batch=1)
    records = read_manifest(tmp_path).records
    lines = [replace(record, later={"later": record.shard, "colour": "blue"}).to_line() for record in records]
    # Large enough to be left alone, and two that are joined.
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines))
    compact_store(tmp_path, shard_bytes=4 * token_bytes(HEADER))
    for record in read_manifest(tmp_path).records:
        assert record.later == ({"later": record.shard, "colour": "blue"} if record in records else {})
    assert same_rows(tmp_path, some_rows(4))


def test_columns_that_come_and_go_and_widen_read_as_before(tmp_path):
    columns = [{"a": 1}, {"a": 2.5, "b": "x"}, {"b": None}, {"c": [1, 2]}, {}]
    rows = [replace(make_row(str(i), 1), columns=each) for i, each in enumerate(columns)]
    write(tmp_path, rows, batch=1)
    table = open_store(tmp_path).table
    compact_store(tmp_path)
    assert open_store(tmp_path).table.equals(table)


@pytest.mark.parametrize("tensor", ["residual.01", "moments.mean", "rows_parquet", "offsets", "block_checksums"])
def test_damage_is_never_given_fresh_checksums(tmp_path, tensor):
    write(tmp_path, some_rows(12))
    flip(tmp_path / "shards/000001.safetensors", place(tmp_path, 1, tensor))
    before = files(tmp_path)
    with pytest.raises(StoreError, match=r"000001\.safetensors.*gapprobe store repair"):
        compact_store(tmp_path)
    assert files(tmp_path) == before


def test_a_damaged_table_beside_a_sound_shard_is_made_anew(tmp_path):
    rows = some_rows(12)
    write(tmp_path, rows)
    flip(tmp_path / "rows/000001.parquet", 100)
    compact_store(tmp_path)
    assert same_rows(tmp_path, rows)


def test_a_damaged_manifest_and_doubled_rows_are_refused(tmp_path):
    write(tmp_path, some_rows(6))
    content = (tmp_path / "manifest.jsonl").read_bytes()
    flip(tmp_path / "manifest.jsonl", 100)
    with pytest.raises(StoreError, match="line 1 of its manifest is damaged.*repair"):
        compact_store(tmp_path)
    for name in ("shards/{}.safetensors", "rows/{}.parquet"):
        (tmp_path / name.format("000002")).write_bytes((tmp_path / name.format("000000")).read_bytes())
    (tmp_path / "manifest.jsonl").write_bytes(content)
    again = replace(read_manifest(tmp_path).records[0], shard=2)
    (tmp_path / "manifest.jsonl").write_bytes(content + again.to_line())
    with pytest.raises(StoreError, match="a row twice.*repair"):
        compact_store(tmp_path)


def test_lines_that_come_in_meanwhile_are_kept(tmp_path, monkeypatch):
    rows, real = some_rows(15), sealing.packed
    write(tmp_path, rows[:12])

    def packed(*args):
        # While the new shard is written, the store is not locked.
        monkeypatch.setattr(sealing, "packed", real)
        write(tmp_path, rows)
        return real(*args)

    monkeypatch.setattr(sealing, "packed", packed)
    compact_store(tmp_path)
    assert same_rows(tmp_path, rows)
    assert [record.rows for record in read_manifest(tmp_path).records] == [12, 3]


def test_two_compactions_at_once_leave_one_result(tmp_path, monkeypatch):
    rows, real = some_rows(12), sealing.packed
    write(tmp_path, rows)

    def packed(*args):
        monkeypatch.setattr(sealing, "packed", real)
        assert compact_store(tmp_path).after == 1
        return real(*args)

    monkeypatch.setattr(sealing, "packed", packed)
    done = compact_store(tmp_path)
    assert done.old_bytes == 0
    assert same_rows(tmp_path, rows)
    assert len(read_manifest(tmp_path).records) == 1


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, some_rows(12))
    before = files(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(OutputError, match="compacting it takes about .* MB, and 0.0 MB are free"):
        compact_store(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "rename", "posix_fallocate"])
def test_a_failing_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch, call):
    rows = some_rows(12)
    write(tmp_path, rows)

    def failing(*_):
        raise OSError(errno.ENOSPC, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{call}", failing)
        with pytest.raises(OutputError, match="the disk is full"):
            compact_store(tmp_path)
    assert same_rows(tmp_path, rows)
    assert len(files(tmp_path)) == 3 + 2 * 4
    compact_store(tmp_path)
    assert same_rows(tmp_path, rows)


def test_without_locks_nothing_is_done(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    write(tmp_path, some_rows(6))
    before = files(tmp_path)
    monkeypatch.setattr("fcntl.flock", unable)
    with pytest.raises(StoreError, match="no locks"):
        compact_store(tmp_path)
    assert files(tmp_path) == before


def test_a_live_writer_goes_on_after_a_compaction(tmp_path):
    rows = some_rows(15)
    with StoreWriter(tmp_path, HEADER, 1) as writer:
        for i in range(0, 12, 3):
            writer.append(rows[i : i + 3])
        writer.flush()
        compact_store(tmp_path)
        collect_garbage(tmp_path)
        assert writer.append(rows) == 3
    assert holds(tmp_path, rows)


def test_shards_whose_tables_would_be_too_large_together_stay_apart(tmp_path, monkeypatch):
    rows = [replace(make_row(str(i), 1), columns={"x": f"{i:0100000}"}) for i in range(4)]
    write(tmp_path, rows, batch=2)
    monkeypatch.setattr(table, "MAX_TABLE_BYTES", 1 << 19)
    assert compact_store(tmp_path, progress=False).after == 2
    assert holds(tmp_path, rows)
