import errno

import pytest

from gapprobe.errors import StoreError
from gapprobe.store import disk
from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.repairing import repair_store
from tests.store.damage import files, flip, place
from tests.store.rows import holds, some_rows, write


def test_what_no_row_needs_is_removed_and_nothing_else(tmp_path):
    rows = some_rows(12)
    write(tmp_path, rows)
    compact_store(tmp_path)
    (tmp_path / "shards/.tmp-1-dead").write_bytes(b"half")
    (tmp_path / ".tmp-1-dead").write_bytes(b"half")
    (tmp_path / "shards/notes.txt").write_bytes(b"mine")
    (tmp_path / "shards/000020.safetensors").write_bytes(b"not ours")
    (tmp_path / "rows/000021.parquet").write_bytes(b"its shard is gone")
    (tmp_path / "shards/000022.safetensors").touch()
    before = files(tmp_path)
    with disk.temporary(tmp_path / "shards") as (alive, _):
        told = collect_garbage(tmp_path, dry_run=True)
        assert files(tmp_path).keys() - {f"shards/{alive.name}"} == before.keys()
        done = collect_garbage(tmp_path)
        assert alive.exists()
    assert (told.files, told.kept) == (done.files, done.kept)
    old = {name for i in range(4) for name in (f"shards/00000{i}.safetensors", f"rows/00000{i}.parquet")}
    assert set(done.files) == old | {"shards/.tmp-1-dead", ".tmp-1-dead", "shards/000022.safetensors"}
    assert done.bytes == sum(len(before[name]) for name in done.files)
    assert before.keys() - files(tmp_path).keys() == done.files.keys()
    assert set(done.kept) == {"shards/000020.safetensors", "shards/000021.safetensors"}
    assert "would be removed" in str(told)
    assert "11 files" in str(done)
    assert "stays: its shard is missing" in str(done)
    for name in ("shards/000020.safetensors", "rows/000021.parquet"):
        (tmp_path / name).unlink()
    assert holds(tmp_path, rows)
    assert collect_garbage(tmp_path).files == {}


def test_rows_that_are_sealed_nowhere_else_stay(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    flip(tmp_path / "manifest.jsonl", 100)
    done = collect_garbage(tmp_path)
    assert done.files == {}
    assert set(done.kept) == {"shards/000000.safetensors"}
    repair_store(tmp_path)
    assert holds(tmp_path, rows)


@pytest.mark.parametrize("damage", ["remove", "truncate", "header"])
def test_old_files_stay_when_the_shard_that_replaced_them_is_damaged(tmp_path, damage):
    rows = some_rows(9)
    write(tmp_path, rows)
    compact_store(tmp_path)
    file = tmp_path / "shards/000003.safetensors"
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        flip(file, 20)
    done = collect_garbage(tmp_path)
    assert done.files == {}
    assert len(done.kept) == 3
    # And so repairing brings back what the damage took.
    assert repair_store(tmp_path).lost == ()
    assert holds(tmp_path, rows)


def test_an_old_file_whose_table_is_damaged_stays(tmp_path):
    write(tmp_path, some_rows(6))
    at = place(tmp_path, 0, "rows_parquet") + 50
    compact_store(tmp_path)
    flip(tmp_path / "shards/000000.safetensors", at)
    assert set(collect_garbage(tmp_path).kept) == {"shards/000000.safetensors"}


def test_damaged_files_go_only_when_asked(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    (tmp_path / "shards/000001.safetensors").unlink()
    flip(tmp_path / "manifest.jsonl", 100)
    repair_store(tmp_path)
    assert collect_garbage(tmp_path).files == {}
    told = collect_garbage(tmp_path, dry_run=True, damaged=True)
    assert set(told.files) == {
        "damaged/000001.parquet", "damaged/manifest-000000.jsonl", "damaged/lost-000000.txt"
    }  # fmt: skip
    assert (tmp_path / "damaged/000001.parquet").exists()
    (tmp_path / "damaged/notes.txt").write_bytes(b"mine")
    assert collect_garbage(tmp_path, damaged=True).files == told.files
    assert [f.name for f in (tmp_path / "damaged").iterdir()] == ["notes.txt"]
    (tmp_path / "damaged/notes.txt").unlink()
    collect_garbage(tmp_path, damaged=True)
    assert not (tmp_path / "damaged").exists()


def test_without_locks_nothing_is_done(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    write(tmp_path, some_rows(6))
    (tmp_path / "shards/.tmp-1-dead").write_bytes(b"half")
    before = files(tmp_path)
    monkeypatch.setattr("fcntl.flock", unable)
    with pytest.raises(StoreError, match="no locks"):
        collect_garbage(tmp_path)
    assert files(tmp_path) == before
