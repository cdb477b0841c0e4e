import pytest

from gapprobe.store.format import ShardRecord
from gapprobe.store.reader import open_store
from gapprobe.store.verify import Problem, verify_store
from tests.store.rows import make_row, some_rows, write


def flip(file, at, bit):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["shards/000001.safetensors", "rows/000001.parquet", "manifest.jsonl"])
def test_any_flipped_bit_is_found_and_named(tmp_path, file):
    write(tmp_path, some_rows(9))
    size = (tmp_path / file).stat().st_size
    for at in range(0, size, max(1, size // 40)):
        flip(tmp_path / file, at, at % 8)
        problems = verify_store(tmp_path)
        assert any(problem.file == file for problem in problems), at
        flip(tmp_path / file, at, at % 8)
    assert verify_store(tmp_path) == []


def test_a_flipped_bit_names_the_rows_it_touches(tmp_path):
    write(tmp_path, some_rows(9))
    flip(tmp_path / "shards" / "000001.safetensors", 4150, 0)
    (problem,) = open_store(tmp_path).verify()
    assert problem.rows == ("row 3", "row 4", "row 5")
    assert "bytes have changed" in problem.what


def test_a_damaged_header_file_is_a_problem_not_an_exception(tmp_path):
    write(tmp_path, some_rows(3))
    flip(tmp_path / "store.json", 40, 1)
    (problem,) = verify_store(tmp_path)
    assert "store.json" in problem.what


def test_truncated_and_missing_shards_are_named(tmp_path):
    write(tmp_path, some_rows(9))
    file = tmp_path / "shards" / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "shards" / "000001.safetensors").unlink()
    (tmp_path / "rows" / "000002.parquet").unlink()
    problems = {problem.file: problem for problem in verify_store(tmp_path)}
    assert set(problems) == {"shards/000000.safetensors", "shards/000001.safetensors", "rows/000002.parquet"}
    assert problems["shards/000001.safetensors"].rows == ("row 3", "row 4", "row 5")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named(tmp_path, value):
    rows = some_rows(5)
    rows[2].residual[1, 3, 0] = value
    rows[3].residual[0, 0, 5] = value
    write(tmp_path, rows, batch=5)
    (problem,) = verify_store(tmp_path)
    assert problem.rows == ("row 2", "row 3")
    assert "NaN" in problem.what


def test_a_row_stored_twice_is_named(tmp_path):
    write(tmp_path, some_rows(3))
    for folder, suffix in (("shards", "safetensors"), ("rows", "parquet")):
        (tmp_path / folder / f"000001.{suffix}").write_bytes((tmp_path / folder / f"000000.{suffix}").read_bytes())
    record = ShardRecord.from_line((tmp_path / "manifest.jsonl").read_bytes().rstrip())
    with (tmp_path / "manifest.jsonl").open("ab") as manifest:
        manifest.write(ShardRecord(**{**record.__dict__, "shard": 1}).to_line({}))
    (problem,) = verify_store(tmp_path)
    assert problem.file == "rows/000001.parquet"
    assert len(problem.rows) == 3


def test_a_mark_of_no_position_is_named(tmp_path):
    row = make_row("a", 2)
    write(tmp_path, [row])
    file = tmp_path / "shards" / "000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] = 128  # token_marks come last
    file.write_bytes(content)
    assert any("position" in problem.what for problem in verify_store(tmp_path))


def test_what_a_killed_run_leaves_is_no_problem(tmp_path):
    write(tmp_path, some_rows(3))
    (tmp_path / "shards" / ".tmp-1-x").write_bytes(b"half")
    with (tmp_path / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"line_sha256":"ab')
    assert verify_store(tmp_path) == []


def test_problems_read_as_one_line():
    assert str(Problem("a", "is bad", tuple("12345"))) == "a: is bad (rows 1, 2, 3 and 2 more)"
