import errno
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from gapprobe.errors import OutputError, StoreError
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.manifest import read_manifest
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter
from tests.store.damage import files, flip, place, use_small_blocks
from tests.store.rows import HEADER, equal, holds, make_row, reheaded, some_rows, write

SHARD, ROWS = "shards/000001.safetensors", "rows/000001.parquet"


def long_rows(count):
    """So many tokens a row that positions are stored a second time."""
    return [make_row(f"row {i}", 20 + i) for i in range(count)]


def check(path, rows, lost):
    """The store holds all rows but the lost ones, bit for bit, is sound, and takes the lost ones again."""
    assert holds(path, [row for row in rows if row.id not in lost])
    with StoreWriter(path, HEADER) as writer:
        assert {row.id for row in rows} - writer.ids == set(lost)
        assert writer.append(rows) == len(lost)
    assert holds(path, rows)


def test_a_sound_store_is_left_as_it_is(tmp_path):
    write(tmp_path, some_rows(9))
    before = files(tmp_path)
    done = repair_store(tmp_path)
    assert (done.problems, done.moved, done.lost, done.saved, done.unnamed) == ((), {}, (), 0, 0)
    assert files(tmp_path) == before
    assert "nothing to repair" in str(done)


def test_rows_that_damage_does_not_touch_are_saved_bit_for_bit(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    rows = some_rows(20)
    write(tmp_path, rows, batch=10)
    flip(tmp_path / SHARD, place(tmp_path, 1, "residual.01", 7))
    damaged = (tmp_path / SHARD).read_bytes()
    (problem,) = verify_store(tmp_path)
    done = repair_store(tmp_path)
    assert done.lost == problem.rows
    assert 0 < len(done.lost) < 9
    assert done.saved == 10 - len(done.lost)
    assert done.moved == {SHARD: "damaged/000001.safetensors", ROWS: "damaged/000001.parquet"}
    assert done.lost_list == "damaged/lost-000000.txt"
    assert tuple((tmp_path / done.lost_list).read_text().splitlines()) == done.lost
    assert (tmp_path / "damaged/000001.safetensors").read_bytes() == damaged
    # The new shard stands where the old one did.
    assert [id_ for id_ in open_store(tmp_path).ids] == [row.id for row in rows if row.id not in done.lost]
    assert "Run the same capture again" in str(done)
    check(tmp_path, rows, done.lost)


@pytest.mark.parametrize("tensor", ["moments.std", "block_checksums", "rows_parquet", "position.01", "header"])
def test_damage_to_what_follows_from_the_rest_loses_no_row(tmp_path, monkeypatch, tensor):
    use_small_blocks(monkeypatch)
    rows = long_rows(8)
    write(tmp_path, rows, batch=4)
    sound = files(tmp_path)
    if tensor == "header":
        for at in (3, 9, 300, 1000):
            flip(tmp_path / SHARD, at)
    else:
        flip(tmp_path / SHARD, place(tmp_path, 1, tensor) + (0 if tensor == "block_checksums" else 70))
    done = repair_store(tmp_path)
    assert done.lost == ()
    assert done.saved == 4
    # The same rows give the same bytes.
    assert files(tmp_path)["shards/000002.safetensors"] == sound[SHARD]
    assert files(tmp_path)["rows/000002.parquet"] == sound[ROWS]
    check(tmp_path, rows, ())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_tables_of_rows_are_rebuilt_from_shards(tmp_path, damage):
    rows = some_rows(9)
    write(tmp_path, rows)
    sound = files(tmp_path)
    if damage == "flip":
        flip(tmp_path / ROWS, 1000)
    elif damage == "truncate":
        (tmp_path / ROWS).write_bytes(sound[ROWS][:500])
    else:
        (tmp_path / ROWS).unlink()
    done = repair_store(tmp_path)
    assert done.saved == 0
    assert {name: content for name, content in files(tmp_path).items() if "damaged" not in name} == sound
    assert done.moved == ({} if damage == "remove" else {ROWS: "damaged/000001.parquet"})
    check(tmp_path, rows, ())


def test_without_any_sound_table_rows_are_lost_but_not_those_of_other_shards(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    (tmp_path / ROWS).unlink()
    (tmp_path / SHARD).unlink()
    with pytest.raises(StoreError):
        StoreWriter(tmp_path, HEADER)
    done = repair_store(tmp_path)
    assert done.lost == ()
    assert done.unnamed == 3
    assert "lost: 3 rows" in str(done)
    check(tmp_path, rows, {"row 3", "row 4", "row 5"})


@pytest.mark.parametrize("size", [0, 3, 4000, 5000])
def test_a_truncated_shard_loses_its_rows_and_names_them(tmp_path, size):
    rows = some_rows(9)
    write(tmp_path, rows)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:size])
    done = repair_store(tmp_path)
    assert done.lost == ("row 3", "row 4", "row 5")
    assert (tmp_path / "damaged/000001.safetensors").read_bytes() == content[:size]
    check(tmp_path, rows, done.lost)


@pytest.mark.parametrize("change", [-8, -3, 5, 100_000])
def test_a_shard_that_lost_only_checksums_or_grew_loses_no_row(tmp_path, change):
    rows = some_rows(9)
    write(tmp_path, rows)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:change] if change < 0 else content + b"x" * change)
    done = repair_store(tmp_path)
    assert done.lost == ()
    check(tmp_path, rows, ())


def test_a_missing_shard_loses_its_rows_and_names_them(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    (tmp_path / SHARD).unlink()
    done = repair_store(tmp_path)
    assert done.lost == ("row 3", "row 4", "row 5")
    assert done.moved == {ROWS: "damaged/000001.parquet"}
    check(tmp_path, rows, done.lost)


def test_shards_of_damaged_lines_are_sealed_again(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    flip(tmp_path / "manifest.jsonl", manifest.index(b"\n") + 100)
    damaged = (tmp_path / "manifest.jsonl").read_bytes()
    done = repair_store(tmp_path)
    assert done.found == 3
    assert (tmp_path / "damaged/manifest-000000.jsonl").read_bytes() == damaged
    assert sorted((tmp_path / "manifest.jsonl").read_bytes().splitlines()) == sorted(manifest.splitlines())
    check(tmp_path, rows, ())


@pytest.mark.parametrize("damage", ["remove", "empty", "header"])
def test_a_shard_lost_together_with_its_line_is_named_by_its_table_if_that_is_proven(tmp_path, damage):
    rows = some_rows(9)
    write(tmp_path, rows)
    flip(tmp_path / "manifest.jsonl", (tmp_path / "manifest.jsonl").read_bytes().index(b"\n") + 100)
    if damage == "header":
        flip(tmp_path / SHARD, 20)
    else:
        (tmp_path / SHARD).unlink()
    if damage == "empty":
        (tmp_path / SHARD).touch()
    done = repair_store(tmp_path)
    assert done.lost == ("row 3", "row 4", "row 5")
    assert done.unread == 0
    check(tmp_path, rows, done.lost)


def test_a_table_that_nothing_proves_is_not_read(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / SHARD).unlink()
    done = repair_store(tmp_path)
    assert done.lost == ()
    assert done.unread == 1
    assert "1 files of unknown rows" in str(done)
    check(tmp_path, rows, {"row 3", "row 4", "row 5"})


def test_a_manifest_that_contradicts_itself_is_made_anew(tmp_path):
    rows = some_rows(9)
    write(tmp_path, rows)
    record = read_manifest(tmp_path).records[0]
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(replace(record, tokens=99).to_line())
    with pytest.raises(StoreError, match="contradicts"):
        open_store(tmp_path)
    done = repair_store(tmp_path)
    assert done.found == 9
    check(tmp_path, rows, ())


def test_a_lost_manifest_and_a_damaged_shard_together(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    rows = some_rows(20)
    write(tmp_path, rows, batch=10)
    flip(tmp_path / SHARD, place(tmp_path, 1, "residual.03", 7))
    (tmp_path / "manifest.jsonl").unlink()
    done = repair_store(tmp_path)
    assert 0 < len(done.lost) < 9
    assert done.saved == 10 - len(done.lost)
    assert done.found == 10
    check(tmp_path, rows, done.lost)


def test_rows_lost_in_a_new_shard_come_back_from_the_old_one(tmp_path, monkeypatch):
    """Shards that were replaced but not cleared away yet, or that somebody put back, are looked at too."""
    use_small_blocks(monkeypatch)
    rows = some_rows(20)
    write(tmp_path, rows, batch=10)
    sound = files(tmp_path)
    flip(tmp_path / SHARD, place(tmp_path, 1, "residual.01", 7))
    lost = repair_store(tmp_path).lost
    (tmp_path / SHARD).write_bytes(sound[SHARD])
    (tmp_path / ROWS).write_bytes(sound[ROWS])
    done = repair_store(tmp_path)
    assert done.saved == len(lost)
    assert done.lost == ()
    # The first is taken by what the first repair moved.
    assert done.moved[SHARD] == "damaged/000002.safetensors"
    check(tmp_path, rows, ())


def test_rows_stored_twice_stay_once(tmp_path):
    rows = some_rows(6)
    write(tmp_path / "a", rows[:4], batch=4)
    write(tmp_path / "b", rows[2:], batch=4)
    for name in ("shards/{}.safetensors", "rows/{}.parquet"):
        content = (tmp_path / "b" / name.format("000000")).read_bytes()
        (tmp_path / "a" / name.format("000001")).write_bytes(content)
    (record,) = read_manifest(tmp_path / "b").records
    with (tmp_path / "a/manifest.jsonl").open("ab") as file:
        file.write(replace(record, shard=1).to_line())
    done = repair_store(tmp_path / "a")
    assert done.lost == ()
    assert done.saved == 2
    check(tmp_path / "a", rows, ())


def test_rows_that_are_not_finite_are_left_and_named(tmp_path):
    rows = some_rows(6)
    rows[2].residual[0, 0, 0] = float("nan")
    write(tmp_path, rows)
    before = files(tmp_path)
    done = repair_store(tmp_path)
    assert done.nonfinite == ("row 2",)
    assert done.lost == ()
    assert files(tmp_path) == before
    assert "left as they are" in str(done)


def test_files_that_are_nobodys_are_moved_and_unknown_names_are_not(tmp_path):
    rows = some_rows(3)
    write(tmp_path, rows)
    (tmp_path / "shards/000007.safetensors").write_bytes(b"not ours")
    (tmp_path / "rows/000008.parquet").write_bytes(b"not ours")
    (tmp_path / "shards/notes.txt").write_bytes(b"mine")
    done = repair_store(tmp_path)
    assert set(done.moved) == {"shards/000007.safetensors", "rows/000008.parquet"}
    assert (tmp_path / "shards/notes.txt").read_bytes() == b"mine"
    assert (tmp_path / "damaged/000008.parquet").read_bytes() == b"not ours"
    check(tmp_path, rows, ())


def test_versions_of_saved_rows_stay_told(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    rows = some_rows(10)
    write(tmp_path, [])
    write(tmp_path, rows, reheaded(versions={"torch": "3.0"}), batch=10)
    flip(tmp_path / "shards/000000.safetensors", place(tmp_path, 0, "residual.01", 7))
    assert repair_store(tmp_path).saved > 0
    assert read_manifest(tmp_path).records[0].versions == {"torch": "3.0"}


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_lost_header_is_taken_from_a_store_of_the_same_run_only(tmp_path, damage):
    rows = some_rows(6)
    write(tmp_path / "store", rows)
    before = (tmp_path / "store/store.json").read_bytes()
    if damage == "flip":
        flip(tmp_path / "store/store.json", 40)
    else:
        (tmp_path / "store/store.json").unlink()
    with pytest.raises(StoreError, match="--like"):
        repair_store(tmp_path / "store")
    write(tmp_path / "other", some_rows(1), reheaded(processor="another"))
    with pytest.raises(StoreError, match="another run"):
        repair_store(tmp_path / "store", like=tmp_path / "other")
    write(tmp_path / "same", some_rows(1))
    done = repair_store(tmp_path / "store", like=tmp_path / "same")
    assert "store.json" in str(done)
    assert (tmp_path / "store/store.json").read_bytes() == before
    assert list(done.moved) == (["store.json"] if damage == "flip" else [])
    check(tmp_path / "store", rows, ())


def test_a_store_of_a_newer_version_is_no_damaged_one(tmp_path):
    write(tmp_path / "store", some_rows(3))
    write(tmp_path / "same", some_rows(1))
    file = tmp_path / "store/store.json"
    file.write_text(file.read_text().replace('"version": 2', '"version": 3'))
    before = files(tmp_path / "store")
    with pytest.raises(StoreError, match="version 3.*Update gapprobe"):
        repair_store(tmp_path / "store", like=tmp_path / "same")
    assert files(tmp_path / "store") == before


def test_a_header_that_may_not_be_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    write(tmp_path, some_rows(3))
    real = os.open

    def refused(path, *args, **kwargs):
        if Path(path).name == "store.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StoreError, match="Permission denied"):
        repair_store(tmp_path, like=tmp_path)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no gapprobe store"):
        repair_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_done(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    write(tmp_path, some_rows(3))
    flip(tmp_path / "shards/000000.safetensors", 20)
    before = files(tmp_path)
    monkeypatch.setattr("fcntl.flock", unable)
    with pytest.raises(StoreError, match="no locks"):
        repair_store(tmp_path)
    assert files(tmp_path) == before


def test_a_file_that_may_not_be_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    write(tmp_path, some_rows(6))
    flip(tmp_path / "shards/000000.safetensors", 20)
    before, real = files(tmp_path), os.open

    def refused(path, *args, **kwargs):
        if str(path).endswith(SHARD):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(StoreError, match="Permission denied"):
            repair_store(tmp_path)
    kept = open_store(tmp_path).ids
    assert {name: content for name, content in files(tmp_path).items() if name in before} == before
    assert set(kept) == {row.id for row in some_rows(6)}
    assert repair_store(tmp_path).lost == ()


def test_blocks_that_the_disk_cannot_read_are_lost_and_others_are_saved(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    rows = some_rows(20)
    write(tmp_path, rows, batch=10)
    bad, real = place(tmp_path, 1, "residual.01", 7), os.preadv

    def preadv(descriptor, buffers, at, *flags):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if at <= bad < at + len(buffers[0]) and name.endswith("000001.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, at, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    done = repair_store(tmp_path)
    assert 0 < len(done.lost) < 9
    check(tmp_path, rows, done.lost)


def test_a_full_disk_leaves_what_there_was(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    rows = some_rows(20)
    write(tmp_path, rows, batch=10)
    flip(tmp_path / SHARD, place(tmp_path, 1, "residual.01", 7))
    before = files(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match="the disk is full"):
            repair_store(tmp_path)
    assert files(tmp_path) == before
    done = repair_store(tmp_path)
    check(tmp_path, rows, done.lost)


def test_whatever_is_damaged_what_verify_calls_sound_is_kept_and_the_rest_named(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    rows, pick, named = some_rows(24), random.Random(1), 0
    write(tmp_path / "sound", rows, batch=8)
    sound = files(tmp_path / "sound")
    for turn in range(20):
        path = tmp_path / str(turn)
        for name, content in sound.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        for _ in range(pick.randint(1, 4)):
            name = pick.choice([name for name in sound if name not in ("lock", "store.json")])
            # A manifest that ends early says nothing of the rows that it forgot.
            if pick.random() < 0.8 or name == "manifest.jsonl":
                flip(path / name, pick.randrange(len((path / name).read_bytes()) or 1), pick.randrange(8))
            else:
                (path / name).write_bytes(sound[name][: pick.randrange(1, len(sound[name]))])
        touched = {id_ for problem in verify_store(path) for id_ in problem.rows}
        done = repair_store(path)
        assert verify_store(path) == []
        left = open_store(path)
        wanted = {row.id: row for row in rows}
        assert all(equal(left.row(id_), wanted[id_]) for id_ in left.ids)
        assert set(done.lost) <= wanted.keys() - set(left.ids)
        if not done.unnamed and not done.unread:
            named += 1
            assert set(done.lost) == wanted.keys() - set(left.ids)
            assert touched >= set(done.lost) or "manifest.jsonl" in done.moved
        assert repair_store(path).problems == ()
        write(path, rows)
        assert holds(path, rows)
    assert named > 12


def test_a_line_with_fields_of_another_version_is_read(tmp_path):
    rows = some_rows(6)
    write(tmp_path, rows)
    lines = [replace(record, later={"later": 1}).to_line() for record in read_manifest(tmp_path).records]
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(lines))
    assert repair_store(tmp_path).problems == ()
    check(tmp_path, rows, ())
