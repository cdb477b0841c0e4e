"""Damaged and hostile stores: the right rows or a StoreError, soon, in little memory. `make soak` tries for longer."""

import io
import multiprocessing
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gapprobe.errors import OutputError, StoreError
from gapprobe.store.compacting import compact_store
from gapprobe.store.format import ShardRecord
from gapprobe.store.reader import open_store
from gapprobe.store.repairing import repair_store
from gapprobe.store.writer import StoreWriter
from tests.soak.authors import set_table
from tests.soak.case import Case, Link, Pipe, Sparse, parts, reseal, rows_file, shard_file
from tests.soak.mutations import MUTATIONS
from tests.soak.tables import encoded
from tests.soak.trial import Sandbox
from tests.store.rows import HEADER, holds, make_row, reheaded, some_rows, unpack_in_child, write


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def case(sandbox) -> Case:
    return sandbox.seed.case()


@pytest.mark.parametrize("care", [False, True], ids=["read and write", "mend"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_each_kind_of_damage_by_itself(sandbox, mutation, care):
    for seed in range(4):
        case = sandbox.seed.case()
        case.told.append(mutation.__name__)
        mutation(case, random.Random(f"{mutation.__name__} {seed}"))
        assert sandbox.judge(case, care) == [], f"{mutation.__name__} {seed}"


@settings(
    max_examples=60, derandomize=True, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(data=st.binary(min_size=300, max_size=400))
def test_several_at_once(sandbox, data):
    told, findings = sandbox.run(data)
    assert findings == [], f"{told}: python -m tests.soak.fuzz --replay {data.hex()}"


def test_nothing_changed_is_nothing_found(sandbox):
    for care in (False, True):
        assert sandbox.judge(sandbox.seed.case(), care) == []


def test_the_fuzzer_would_see_a_wrong_row(sandbox, monkeypatch):
    real = StoreWriter.append
    monkeypatch.setattr(
        StoreWriter,
        "append",
        lambda self, rows: real(self, [replace(row, token_ids=row.token_ids + 1) for row in rows]),
    )
    assert "the new row is not there" in sandbox.judge(sandbox.seed.case(), False)


def built(case: Case, tmp_path: Path) -> Path:
    case.build(tmp_path / "store")
    return tmp_path / "store"


NAMES = ["store.json", "manifest.jsonl", shard_file(0), rows_file(0)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", [Pipe(), Link("/dev/zero"), Link("/dev/null")], ids=["pipe", "zeros", "null"])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(sandbox, case, name, what):
    case.files[name] = what
    case.anything, case.harmless = True, False
    for care in (False, True):
        assert sandbox.judge(case, care) == []


def test_a_manifest_without_end_is_refused_at_once(case, tmp_path):
    case.files["manifest.jsonl"] = Sparse(case.files["manifest.jsonl"], 1 << 40)
    with pytest.raises(StoreError, match="more than 1048576 bytes"):
        open_store(built(case, tmp_path))


@pytest.mark.parametrize("name", ["manifest.jsonl", "lock", "shards", "rows"])
@pytest.mark.parametrize("change", [lambda s: StoreWriter(s, HEADER), repair_store, compact_store])
def test_nothing_is_written_through_links(tmp_path, name, change):
    write(tmp_path / "store", some_rows(3))
    os.rename(tmp_path / "store" / name, tmp_path / "elsewhere")
    (tmp_path / "store" / name).symlink_to(tmp_path / "elsewhere")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises((OutputError, StoreError), match=f"{name} is a symbolic link"):
        change(tmp_path / "store")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_store_of_links_to_files_elsewhere_can_be_read(tmp_path):
    # As download caches and version control for data keep them.
    write(tmp_path / "store", some_rows(6))
    for number, file in enumerate([file for file in (tmp_path / "store").rglob("*") if file.is_file()]):
        os.rename(file, tmp_path / f"blob {number}")
        file.symlink_to(tmp_path / f"blob {number}")
    assert holds(tmp_path / "store", some_rows(6))


@pytest.mark.parametrize("field", ["rows", "tokens", "shard_bytes", "rows_bytes"])
@pytest.mark.parametrize("number", [1 << 56, 1 << 63, 1 << 64, 10**40])
def test_numbers_that_no_shard_can_have_are_refused(tmp_path, field, number):
    write(tmp_path, some_rows(3))
    manifest = tmp_path / "manifest.jsonl"
    record = ShardRecord.from_line(manifest.read_bytes()[:-1])
    manifest.write_bytes(replace(record, **{field: number}).to_line())
    with pytest.raises(StoreError, match="out of range"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["9999999999", "1000000001", "0000001", "٠٠٠٠٠٧", "-00001"])
def test_files_of_no_number_are_not_looked_at(tmp_path, name):
    write(tmp_path, some_rows(3))
    (tmp_path / "shards" / f"{name}.safetensors").write_bytes(b"mine")
    write(tmp_path, some_rows(6))
    assert holds(tmp_path, some_rows(6))
    assert (tmp_path / "shards" / f"{name}.safetensors").read_bytes() == b"mine"


def test_the_last_number_is_not_passed(tmp_path):
    write(tmp_path, some_rows(3))
    manifest = tmp_path / "manifest.jsonl"
    record = ShardRecord.from_line(manifest.read_bytes()[:-1])
    for folder, suffix in (("shards", "safetensors"), ("rows", "parquet")):
        os.rename(tmp_path / folder / f"000000.{suffix}", tmp_path / folder / f"1000000000.{suffix}")
    manifest.write_bytes(replace(record, shard=10**9).to_line())
    with pytest.raises(StoreError, match="no number left"):
        write(tmp_path, some_rows(6))
    assert holds(tmp_path, some_rows(3))


@pytest.mark.parametrize("shape", [[9] * 300_000, [10**4299], [1, -1], [1 << 63], [True], [1.0], None])
def test_shapes_that_no_tensor_has_are_refused_at_once(case, tmp_path, shape):
    shard = parts(case, 0)
    shard.entries["token_ids"]["shape"] = shape
    case.files[shard_file(0)] = shard.join()
    reseal(case, 0)
    with pytest.raises(StoreError, match="damaged"):
        open_store(built(case, tmp_path)).batch()


def test_a_number_that_python_would_not_print_is_refused(case, tmp_path):
    shard = parts(case, 0)
    size = 10**4300 - 1
    shard.entries = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    case.files[shard_file(0)] = shard.join()
    reseal(case, 0)
    with pytest.raises(StoreError, match="damaged"):
        open_store(built(case, tmp_path)).batch()


@pytest.mark.parametrize("counts", [(-3, 3), (-1, -1), (2**62, 2**62), (-(2**63), 0)])
def test_moments_of_impossible_counts_are_refused(case, tmp_path, counts):
    for number in (0, 1):
        shard = parts(case, number)
        shard.data["moments.count"] = struct.pack("<q", counts[number]) * (len(shard.data["moments.count"]) // 8)
        shard.checksums()
        case.files[shard_file(number)] = shard.join()
        reseal(case, number)
    store = open_store(built(case, tmp_path))
    with pytest.raises(StoreError, match="moments"):
        store.moments(0, "last_input")


@pytest.mark.parametrize("name", ["moments.count", "moments.mean", "moments.std"])
def test_moments_come_together_or_not_at_all(case, tmp_path, name):
    shard = parts(case, 0)
    del shard.entries[name], shard.data[name]
    shard.checksums()
    shard.place()
    case.files[shard_file(0)] = shard.join()
    reseal(case, 0)
    with pytest.raises(StoreError, match="moments"):
        open_store(built(case, tmp_path)).moments(0, "last_input")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\x7f", "\x85", "\x00"])
def test_ids_with_control_characters_are_refused(case, tmp_path, name):
    table = pa.table({"id": pa.array(["row 0", "row 1", name])})
    set_table(case, 0, encoded(table, random.Random(0)))
    with pytest.raises(StoreError, match="control characters") as caught:
        assert open_store(built(case, tmp_path)).ids
    assert name not in str(caught.value)


def test_columns_of_other_types_can_be_looked_at_but_are_no_part_of_a_row(case, tmp_path):
    table = pa.table({"id": pa.array(["row 0", "row 1", "row 2"]), "x": pa.array([2**62] * 3, pa.duration("s"))})
    set_table(case, 0, encoded(table, random.Random(0)))
    store = open_store(built(case, tmp_path))
    assert "x" in store.rows
    with pytest.raises(StoreError, match="no row can"):
        store.row("row 0")
    assert store.layer(0, rows=["row 0"]).equal(case.rows["row 0"].residual[0])


def test_whole_numbers_too_large_for_floats_do_not_make_a_store_unreadable(tmp_path):
    rows = [replace(make_row(str(i), 1), columns={"x": x}) for i, x in enumerate([2**60 + 1, 0.5, 2**60 + 1])]
    write(tmp_path, rows, batch=1)
    assert open_store(tmp_path).rows["x"].tolist() == [float(2**60), 0.5, float(2**60)]
    assert open_store(tmp_path).row("0").columns == {"x": float(2**60)}
    compact_store(tmp_path, progress=False)
    assert open_store(tmp_path).rows["x"].tolist() == [float(2**60), 0.5, float(2**60)]


def test_a_column_named_setting_that_is_no_text_is_not_counted(tmp_path):
    write(tmp_path, [replace(make_row("a", 1), columns={"setting": [1, 2]})])
    assert open_store(tmp_path).info().settings == {}
    assert "not given" in str(open_store(tmp_path).info())


def test_a_store_of_many_layers_opens_and_reads_soon(tmp_path):
    header = reheaded(layers=tuple(range(60_000)))
    StoreWriter(tmp_path, header).close()
    assert open_store(tmp_path).batch().residual.shape == (60_000, 0, 6)


# A few kilobytes as parquet, and 30 to 200 MB unpacked.
BOMBS = {
    "the same long text in each row": lambda: pa.table(
        {
            "id": [str(i) for i in range(200_000)],
            "x": pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), ["x" * 1000]),
        }
    ),
    "a list of zeros": lambda: pa.table({"id": ["a"], "x": pa.array([np.zeros(5_000_000)], pa.list_(pa.float64()))}),
    "a list of one byte": lambda: pa.table(
        {"id": ["a"], "x": pa.array([np.zeros(3 * 10**7, np.int8)], pa.list_(pa.int8()))}
    ),
    "one text": lambda: pa.table({"id": ["a"], "x": ["x" * 10**8]}),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
@pytest.mark.parametrize("name", BOMBS)
def test_tables_that_unpack_to_much_more_than_they_are_are_refused(case, tmp_path, name):
    table, sink = BOMBS[name](), io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary="list" not in name, store_schema=False)
    content = sink.getvalue()
    assert len(content) < 2_000_000
    set_table(case, 0, content, rows=len(table))
    child = multiprocessing.get_context("forkserver").Process(
        target=unpack_in_child, args=(built(case, tmp_path), 16, 64)
    )
    child.start()
    child.join()
    assert child.exitcode == 0
