import errno
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from gapprobe.store import packing
from gapprobe.store.care import verify
from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.verify import Problem, verify_store
from gapprobe.store.format import BLOCK, ShardRecord
from gapprobe.store.manifest import read_header, read_manifest
from gapprobe.store.reader import open_store
from gapprobe.store.shard import file_xxh128, open_shard
from tests.store.damage import flip, flip_each, place, use_small_blocks
from tests.store.rows import make_row, reheaded, some_rows, write


def test_every_flipped_bit_is_found_or_changes_nothing_that_a_store_is_compared_by(tmp_path):
    header = reheaded(layers=(0,), width=2)
    write(tmp_path / "store", [replace(row, columns={}) for row in some_rows(2, header)], header)
    child = multiprocessing.get_context("spawn").Process(
        target=flip_each, args=(tmp_path / "store", tmp_path / "report")
    )
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (tmp_path / "report").read_text() == ""


@pytest.mark.parametrize("line", [0, 5, 10])
def test_a_flipped_bit_names_as_few_rows_as_its_block_allows(tmp_path, monkeypatch, line):
    use_small_blocks(monkeypatch)
    rows = some_rows(9)
    write(tmp_path, rows, batch=9)
    at = place(tmp_path, 0, "residual.01", line)
    flip(tmp_path / "shards/000000.safetensors", at, 3)
    (problem,) = open_store(tmp_path).verify()
    shard = open_shard(tmp_path / "shards/000000.safetensors", read_header(tmp_path))
    first = (at - shard.begin) // 64 * 64 + shard.begin
    touched = set()
    for i, row in enumerate(rows):
        for name, (_, shape, begin) in shard.tensors.items():
            if shape and shape[0] == shard.tokens:
                size = {"residual": 12, "token_ids": 8, "token_positions": 8}.get(name.split(".")[0], 1)
                a, b = begin + size * shard.offsets[i], begin + size * shard.offsets[i + 1]
                if a < first + 64 and b > first and a < b:
                    touched.add(row.id)
    assert set(problem.rows) == touched
    assert 0 < len(touched) < 8
    assert "bytes have changed, in 1 of its blocks" in problem.what


def test_blocks_are_of_one_mebibyte(tmp_path):
    header = reheaded(width=4096)
    rows = [make_row(f"row {i}", 2, header) for i in range(100)]
    write(tmp_path, rows, header, batch=100)
    flip(tmp_path / "shards/000000.safetensors", place(tmp_path, 0, "residual.01", 100))
    (problem,) = verify_store(tmp_path)
    assert BLOCK == 1 << 20
    assert "row 50" in problem.rows
    # A row has 16 KiB of a layer.
    assert 64 <= len(problem.rows) <= 66


@pytest.mark.parametrize("tensor", ["moments.mean", "block_checksums", "rows_parquet", "position.00"])
def test_damage_to_what_follows_from_the_rest_touches_no_row(tmp_path, monkeypatch, tensor):
    use_small_blocks(monkeypatch)
    # So few positions among so many tokens that they are stored a second time.
    write(tmp_path, [make_row(f"row {i}", 40) for i in range(4)], batch=4)
    inside = 0 if tensor == "block_checksums" else 70
    flip(tmp_path / "shards/000000.safetensors", place(tmp_path, 0, tensor) + inside)
    (problem,) = verify_store(tmp_path)
    assert problem.rows == ()
    assert "no row is touched" in problem.what


def test_a_damaged_header_of_a_shard_touches_no_row(tmp_path):
    write(tmp_path, some_rows(9))
    flip(tmp_path / "shards/000001.safetensors", 20)
    (problem,) = verify_store(tmp_path)
    assert problem.file == "shards/000001.safetensors"
    assert "no row is touched" in problem.what


def test_a_damaged_header_file_is_a_problem_not_an_exception(tmp_path):
    write(tmp_path, some_rows(3))
    flip(tmp_path / "store.json", 40, 1)
    (problem,) = verify_store(tmp_path)
    assert "store.json" in problem.what


def test_truncated_grown_and_missing_files_are_named(tmp_path):
    write(tmp_path, some_rows(12))
    file = tmp_path / "shards" / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    (tmp_path / "shards" / "000001.safetensors").unlink()
    (tmp_path / "rows" / "000002.parquet").unlink()
    with (tmp_path / "shards" / "000003.safetensors").open("ab") as file:
        file.write(b"more")
    problems = {problem.file: problem for problem in verify_store(tmp_path)}
    assert set(problems) == {
        "shards/000000.safetensors", "shards/000001.safetensors", "rows/000002.parquet", "shards/000003.safetensors"
    }  # fmt: skip
    assert problems["shards/000000.safetensors"].rows == ("row 0", "row 1", "row 2")
    assert problems["shards/000001.safetensors"].rows == ("row 3", "row 4", "row 5")
    assert problems["rows/000002.parquet"].what == "it is missing"
    assert problems["shards/000003.safetensors"].rows == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named(tmp_path, value, dtype):
    header = reheaded(dtype=dtype)
    rows = some_rows(5, header)
    rows[2].residual[1, 3, 0] = value
    rows[3].residual[0, 0, 5] = value
    write(tmp_path, rows, header, batch=5)
    (problem,) = verify_store(tmp_path)
    assert problem.rows == ("row 2", "row 3")
    assert "NaN" in problem.what


def test_rows_that_are_not_finite_are_found_where_tensors_are_not_aligned(tmp_path, monkeypatch):
    """The format only recommends that wider types stand first; how long the table is decides what stands where."""
    order = sorted

    def narrow_first(names, key):
        return order(names, key=lambda name: -key(name))

    monkeypatch.setattr(packing, "sorted", narrow_first, raising=False)
    odd = 0
    for length in range(12):
        rows = [replace(row, columns={"text": "a" * length}) for row in some_rows(5)]
        rows[2].residual[1, 3, 0] = float("nan")
        write(tmp_path / str(length), rows, batch=5)
        shard = open_shard(tmp_path / str(length) / "shards/000000.safetensors", read_header(tmp_path / str(length)))
        odd += (shard.tensors["residual.01"][2] - shard.begin) % 2
        (problem,) = verify_store(tmp_path / str(length))
        assert problem.rows == ("row 2",)
    assert odd


def test_a_row_stored_twice_is_named(tmp_path):
    write(tmp_path, some_rows(3))
    for folder, suffix in (("shards", "safetensors"), ("rows", "parquet")):
        (tmp_path / folder / f"000001.{suffix}").write_bytes((tmp_path / folder / f"000000.{suffix}").read_bytes())
    record = ShardRecord.from_line((tmp_path / "manifest.jsonl").read_bytes().rstrip())
    with (tmp_path / "manifest.jsonl").open("ab") as manifest:
        manifest.write(ShardRecord(**{**record.__dict__, "shard": 1}).to_line())
    (problem,) = verify_store(tmp_path)
    assert problem.file == "rows/000001.parquet"
    assert len(problem.rows) == 3


def rewritten(store, number, tensor, change):
    """Change a tensor as a wrong writer would have written it: with all checksums right."""
    file, header = store / f"shards/{number:06d}.safetensors", read_header(store)
    shard = open_shard(file, header)
    content = bytearray(file.read_bytes())
    change(memoryview(content)[shard.tensors[tensor][2] :])
    sums = shard.tensors["block_checksums"][2]
    blocks = [content[at : min(at + BLOCK, sums)] for at in range(shard.begin, sums, BLOCK)]
    content[sums:] = b"".join(xxhash.xxh3_64_digest(bytes(block)) for block in blocks)
    file.write_bytes(content)
    lines = [
        replace(r, shard_xxh128=file_xxh128(file)) if r.shard == number else r for r in read_manifest(store).records
    ]
    (store / "manifest.jsonl").write_bytes(b"".join(line.to_line() for line in lines))


def test_a_mark_of_no_position_is_named(tmp_path):
    write(tmp_path, [make_row("a", 2), make_row("b", 3), make_row("c", 1)])

    def mark(tensor):
        tensor[3] = 128

    rewritten(tmp_path, 0, "token_marks", mark)
    (problem,) = verify_store(tmp_path)
    assert "position" in problem.what
    assert problem.rows == ("b",)


def test_offsets_that_fall_are_named(tmp_path):
    write(tmp_path, some_rows(3))

    def fall(tensor):
        tensor[8:16] = np.int64(10**12).tobytes()

    rewritten(tmp_path, 0, "offsets", fall)
    (problem,) = verify_store(tmp_path)
    assert "offsets do not rise" in problem.what
    assert len(problem.rows) == 3


def test_a_block_that_the_disk_cannot_read_is_named_like_one_that_changed(tmp_path, monkeypatch):
    use_small_blocks(monkeypatch)
    write(tmp_path, some_rows(9), batch=9)
    bad, real = place(tmp_path, 0, "residual.01", 5), os.preadv

    def preadv(descriptor, buffers, at, *flags):
        if at <= bad < at + len(buffers[0]) and os.readlink(f"/proc/self/fd/{descriptor}").endswith("0.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, at, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    (problem,) = verify_store(tmp_path)
    assert 0 < len(problem.rows) < 8


def test_a_file_that_may_not_be_read_is_said_to_be_so(tmp_path, monkeypatch):
    write(tmp_path, some_rows(6))
    real = os.open

    def refused(path, *args, **kwargs):
        if str(path).endswith("000001.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    (problem,) = verify_store(tmp_path)
    assert "Permission denied" in problem.what


def test_what_a_killed_run_leaves_is_no_problem(tmp_path):
    write(tmp_path, some_rows(3))
    (tmp_path / "shards" / ".tmp-1-x").write_bytes(b"half")
    for folder, suffix in (("shards", "safetensors"), ("rows", "parquet")):  # sealed elsewhere
        (tmp_path / folder / f"000009.{suffix}").write_bytes((tmp_path / folder / f"000000.{suffix}").read_bytes())
    with (tmp_path / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"line_sha256":"ab')
    assert verify_store(tmp_path) == []


def test_a_compaction_in_between_is_no_problem(tmp_path, monkeypatch):
    write(tmp_path, some_rows(9))
    real, times = verify.examine_all, []

    def examine_all(*args):
        times.append(1)
        if len(times) == 1:
            compact_store(tmp_path)
            collect_garbage(tmp_path)
        return real(*args)

    monkeypatch.setattr(verify, "examine_all", examine_all)
    assert verify_store(tmp_path) == []
    assert len(times) == 2


def test_problems_read_as_one_line():
    assert str(Problem("a", "is bad", tuple("12345"))) == "a: is bad (rows 1, 2, 3 and 2 more)"


def test_a_bar_shows_on_stderr_only_when_it_takes_long(tmp_path, monkeypatch, capsys):
    write(tmp_path, some_rows(6))
    verify_store(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("gapprobe.store.progress.DELAY", 0)
    verify_store(tmp_path)
    assert "verify" in capsys.readouterr().err
    verify_store(tmp_path, progress=False)
    assert capsys.readouterr().err == ""
