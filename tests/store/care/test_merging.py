import errno
import hashlib
import os
import shutil
from dataclasses import replace

import pytest

from gapprobe.errors import OutputError, StoreError
from gapprobe.store import arena, writer
from gapprobe.store.care import merging
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.merging import merge_stores
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.manifest import read_manifest
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter
from tests.store.damage import files, flip
from tests.store.rows import HEADER, equal, holds, make_row, reheaded, some_rows, write


def hashed(count):
    """Rows whose ids are hashes, as those of a capture are."""
    return [replace(row, id=hashlib.sha256(row.id.encode()).hexdigest()) for row in some_rows(count)]


def test_rows_of_several_stores_come_together_and_sources_stay_as_they_are(tmp_path):
    rows = some_rows(30)
    write(tmp_path / "a", rows[:12])
    write(tmp_path / "b", rows[12:21])
    write(tmp_path / "c", rows[21:])
    before = {name: files(tmp_path / name) for name in "abc"}
    done = merge_stores([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "all")
    assert (done.new, done.known) == (30, 0)
    assert {name: files(tmp_path / name) for name in "abc"} == before
    assert open_store(tmp_path / "all").ids == tuple(row.id for row in rows)
    assert holds(tmp_path / "all", rows)
    for name in "abc":
        shutil.rmtree(tmp_path / name)
    assert holds(tmp_path / "all", rows)


def test_whole_shards_are_linked_where_that_is_possible(tmp_path, monkeypatch):
    rows = some_rows(6)
    write(tmp_path / "a", rows)
    merge_stores([tmp_path / "a"], tmp_path / "linked")
    shard = "shards/000000.safetensors"
    assert (tmp_path / "linked" / shard).samefile(tmp_path / "a" / shard)

    real = os.link

    def other_disk(source, target):
        if "/a/" in str(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "link", other_disk)
    merge_stores([tmp_path / "a"], tmp_path / "copied")
    assert not (tmp_path / "copied" / shard).samefile(tmp_path / "a" / shard)
    monkeypatch.setattr(os, "access", lambda *_: False)
    merge_stores([tmp_path / "a"], tmp_path / "read-only")
    assert holds(tmp_path / "linked", rows)
    assert holds(tmp_path / "copied", rows)
    assert holds(tmp_path / "read-only", rows)


@pytest.mark.parametrize("make", [some_rows, hashed])
def test_rows_that_are_there_are_left_out(tmp_path, make):
    rows = make(20)
    write(tmp_path / "all", rows[:8])
    write(tmp_path / "a", rows[4:12], batch=4)
    write(tmp_path / "b", rows[10:], batch=5)
    done = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert (done.new, done.known) == (12, 6)
    assert "12 rows are new" in str(done)
    assert holds(tmp_path / "all", rows)
    before = files(tmp_path / "all")
    done = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert (done.new, done.known) == (0, 18)
    assert files(tmp_path / "all") == before


def test_two_tables_numbered_alike_are_not_mixed_up(tmp_path):
    """Users' own ids say nothing of the content; leaving a row out because of them would lose it in silence."""
    rows = some_rows(6)
    write(tmp_path / "a", rows)
    other = [replace(make_row(f"other {i}", len(row.token_ids)), id=row.id) for i, row in enumerate(rows)]
    write(tmp_path / "b", [*other[:3], *some_rows(9)[6:]])
    with pytest.raises(StoreError, match="both have rows 'row 0'.*other content.*ids of its own"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert holds(tmp_path / "all", some_rows(9))


def test_the_same_capture_on_another_machine_is_not_refused(tmp_path):
    """Its rows have the same ids and may differ in their last bits; the first stay."""
    rows = hashed(6)
    write(tmp_path / "a", rows)
    write(tmp_path / "b", [replace(row, residual=row.residual * 1.01) for row in rows])
    assert merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all").new == 6
    assert holds(tmp_path / "all", rows)


@pytest.mark.parametrize(
    ("field", "changes"),
    [("processor", {"processor": "other"}), ("dtype", {"dtype": "float32"}), ("generation.stop", {"generation": {}})],
)
def test_stores_of_other_runs_are_refused_before_anything_is_written(tmp_path, field, changes):
    write(tmp_path / "a", some_rows(3))
    other = reheaded(**changes)
    write(tmp_path / "b", some_rows(3, other), other)
    with pytest.raises(StoreError, match=rf"b cannot be merged into .*all: .*{field} is"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    write(tmp_path / "all", some_rows(3, other), other)
    with pytest.raises(StoreError, match="a cannot be merged"):
        merge_stores([tmp_path / "a"], tmp_path / "all")


def test_what_made_the_rows_stays_told(tmp_path):
    rows, other = some_rows(20), reheaded(versions={"torch": "3.0"})
    write(tmp_path / "a", rows[:6], batch=6)
    write(tmp_path / "b", rows[6:12], other, batch=6)
    write(tmp_path / "b", rows[12:16], batch=4)
    # Partly known already, so that its rows end in a shard of the target's own making.
    write(tmp_path / "c", rows[14:], other, batch=6)
    merge_stores([tmp_path / name for name in "abc"], tmp_path / "all")
    told = {record.rows: record.versions for record in read_manifest(tmp_path / "all").records}
    first, second, third, fourth = read_manifest(tmp_path / "all").records
    assert [r.rows for r in (first, second, third, fourth)] == [6, 6, 4, 4]
    assert [r.versions for r in (first, second, third, fourth)] == [None, {"torch": "3.0"}, None, {"torch": "3.0"}]
    assert told[4] == {"torch": "3.0"}
    assert holds(tmp_path / "all", rows)


def test_damaged_shards_are_left_out_named_and_merged_once_they_are_repaired(tmp_path):
    rows = some_rows(18)
    write(tmp_path / "a", rows[:9])
    write(tmp_path / "b", rows[9:])
    flip(tmp_path / "a/shards/000001.safetensors", 4200)
    flip(tmp_path / "b/manifest.jsonl", 100)
    (tmp_path / "b/shards/000002.safetensors").unlink()
    with pytest.raises(StoreError, match=r"3 parts.*gapprobe store repair") as raised:
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    for part in ("a/shards/000001.safetensors", "b/manifest.jsonl: line 1", "b/shards/000002.safetensors"):
        assert part in str(raised.value)
    assert ".tmp-" not in str(raised.value)
    assert holds(tmp_path / "all", [*rows[:3], *rows[6:9], *rows[12:15]])
    repair_store(tmp_path / "b")
    with pytest.raises(StoreError, match="1 parts"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert holds(tmp_path / "all", [*rows[:3], *rows[6:15]])


def test_a_store_is_not_merged_into_itself_nor_nothing_at_all(tmp_path):
    write(tmp_path / "a", some_rows(3))
    with pytest.raises(StoreError, match="into itself"):
        merge_stores([tmp_path / "a"], tmp_path / "b" / ".." / "a")
    with pytest.raises(StoreError, match="nothing to merge"):
        merge_stores([], tmp_path / "b")
    with pytest.raises(StoreError, match="no gapprobe store"):
        merge_stores([tmp_path / "nowhere"], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    write(tmp_path / "a", some_rows(3))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        merge_stores([tmp_path / "a"], tmp_path / "b")


def test_too_little_room_on_another_disk_is_said_before(tmp_path, monkeypatch):
    write(tmp_path / "a", some_rows(6))
    monkeypatch.setattr(merging, "_device", lambda path: path.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(OutputError, match="merging into it takes about"):
        merge_stores([tmp_path / "a"], tmp_path / "all")


def test_others_may_clear_up_and_append_meanwhile(tmp_path, monkeypatch):
    rows, real = some_rows(12), StoreWriter.adopt
    write(tmp_path / "a", rows[:9])

    def adopt(self, file, record):
        # Opening for writing clears away temporaries of the dead; the file under way is not one.
        write(tmp_path / "all", rows[9:])
        return real(self, file, record)

    monkeypatch.setattr(StoreWriter, "adopt", adopt)
    merge_stores([tmp_path / "a"], tmp_path / "all")
    assert holds(tmp_path / "all", rows)


def test_file_systems_without_locks(tmp_path, monkeypatch):
    """Merging only appends, and that needs none."""

    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    rows = some_rows(9)
    write(tmp_path / "a", rows)
    monkeypatch.setattr("fcntl.flock", unable)
    merge_stores([tmp_path / "a"], tmp_path / "all")
    assert holds(tmp_path / "all", rows)
    assert all(equal(open_store(tmp_path / "a").row(row.id), row) for row in rows)
    assert HEADER.fingerprint == open_store(tmp_path / "all").header.fingerprint


def test_a_compacted_shard_of_which_some_rows_are_there_may_be_more_than_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "MAX_COLUMN_BYTES", 1 << 20)
    monkeypatch.setattr(writer, "MAX_COLUMN_BYTES", 1 << 20)
    rows = [replace(make_row(str(i), 1), columns={"x": "y" * 50_000}) for i in range(8)]
    write(tmp_path / "a", rows, batch=1)
    compact_store(tmp_path / "a", progress=False)
    write(tmp_path / "b", rows[:1])
    merge_stores([tmp_path / "a"], tmp_path / "b", progress=False)
    assert holds(tmp_path / "b", rows)
