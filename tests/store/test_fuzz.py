"""Damaged and hostile stores: the right rows or a StoreError, soon, in little memory. `make soak` tries for longer."""

import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import struct
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gapprobe.errors import OutputError, StoreError
from gapprobe.store import table as tables
from gapprobe.store.care.clearing import collect_garbage
from gapprobe.store.care.compacting import compact_store
from gapprobe.store.care.repairing import repair_store
from gapprobe.store.care.verify import verify_store
from gapprobe.store.format import ShardRecord
from gapprobe.store.reader import open_store
from gapprobe.store.shard import Shard
from gapprobe.store.writer import StoreWriter
from tests.soak.authors import set_table
from tests.soak.case import Case, Folder, Link, Pipe, Sparse, parts, reseal, rows_file, shard_file
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


@contextmanager
def time_limit(seconds):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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


@pytest.mark.parametrize("name", ["manifest.jsonl", "lock", "shards", "rows", "damaged"])
@pytest.mark.parametrize(
    "change",
    [lambda s: StoreWriter(s, HEADER), repair_store, compact_store, lambda s: collect_garbage(s, damaged=True)],
    ids=["write", "repair", "compact", "gc"],
)
def test_nothing_is_written_through_links(tmp_path, name, change):
    write(tmp_path / "store", some_rows(3))
    (tmp_path / "store" / "damaged").mkdir()
    (tmp_path / "store" / "damaged" / "000000.parquet").write_bytes(b"mine")
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


@pytest.mark.parametrize("target", [None, "/dev/zero"], ids=["pipe", "zeros"])
def test_what_stands_for_the_table_of_a_published_shard_is_not_waited_for(tmp_path, target):
    write(tmp_path, some_rows(6))
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").write_bytes(lines[0])
    table = tmp_path / "rows" / "000001.parquet"
    table.unlink()
    table.symlink_to(target) if target else os.mkfifo(table)
    with time_limit(5):
        write(tmp_path, some_rows(6))
    assert holds(tmp_path, some_rows(6))


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/dev/zero")], ids=["folder", "pipe", "link"]
)
def test_what_has_the_name_of_a_temporary_but_is_no_file_stays(tmp_path, make):
    write(tmp_path, some_rows(3))
    make(tmp_path / "shards" / ".tmp-1")
    write(tmp_path, some_rows(6))
    collect_garbage(tmp_path)
    assert holds(tmp_path, some_rows(6))
    assert os.path.lexists(tmp_path / "shards" / ".tmp-1")


@pytest.mark.parametrize(
    "table", [None, {"x": [1]}, {"id": [1, 2]}, {"id": ["\x1b[2J"]}], ids=["no parquet", "no ids", "numbers", "control"]
)
def test_a_repair_names_no_rows_of_a_table_that_is_none(tmp_path, table):
    write(tmp_path, some_rows(6))
    content = b"no table" if table is None else encoded(pa.table(table), random.Random(0))
    (tmp_path / "rows" / "000001.parquet").write_bytes(content)
    (tmp_path / "shards" / "000001.safetensors").unlink()
    lines = (tmp_path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    # What is left of a damaged line vouches for the table.
    (tmp_path / "manifest.jsonl").write_bytes(lines[0] + hashlib.sha256(content).hexdigest().encode() + b"\n")
    done = repair_store(tmp_path, progress=False)
    assert done.unread == 1
    assert done.lost == ()
    assert holds(tmp_path, some_rows(3))


def test_no_message_shows_control_characters_of_the_header(tmp_path):
    header = reheaded(positions=("\x1b[2J",), model={"\x1b[3J": "\x9b"}, generation={"\r": 1})
    StoreWriter(tmp_path, header).close()
    store = open_store(tmp_path)
    with pytest.raises(StoreError) as nowhere:
        store.layer(0, "nowhere")
    with pytest.raises(StoreError) as other:
        StoreWriter(tmp_path, HEADER)
    for text in (str(nowhere.value), str(other.value), *str(store.info()).splitlines()):
        assert text.isprintable()


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


@pytest.mark.parametrize("name", ["shards/000007.safetensors", "rows/000007.parquet"])
def test_a_folder_under_the_name_of_a_file_is_left_alone(sandbox, case, tmp_path, name):
    case.files[name] = Folder()
    for care in (False, True):
        assert sandbox.judge(case, care) == []
    store = built(case, tmp_path)
    (store / name / "mine").write_bytes(b"text")
    with StoreWriter(store, HEADER) as writer:
        writer.append([make_row("new", 2)])
    collect_garbage(store, damaged=True)
    assert verify_store(store) == []
    assert (store / name / "mine").read_bytes() == b"text"
    assert "new" in open_store(store).ids


def test_two_columns_of_one_name_are_refused(case, tmp_path):
    ids = pa.array(["row 0", "row 1", "row 2"])
    for names in (["id", "id"], ["id", "x", "x"]):
        set_table(case, 0, encoded(pa.Table.from_arrays([ids] * len(names), names=names), random.Random(0)))
        with pytest.raises(StoreError, match="same name"):
            assert open_store(built(case, tmp_path)).ids
        shutil.rmtree(tmp_path / "store")


@pytest.mark.parametrize(
    "read", [lambda s: s.layer(0), lambda s: s.batch(), lambda s: s.row("a"), lambda s: s.moments(0)]
)
def test_more_than_memory_holds_is_refused_with_a_way_out(tmp_path, monkeypatch, read):
    write(tmp_path, [make_row("a", 3), make_row("b", 2)], batch=1)
    store = open_store(tmp_path)

    def none_left(*_args, **_kwargs):
        torch.empty(1 << 60)

    monkeypatch.setattr(Shard, "take", none_left)
    monkeypatch.setattr(Shard, "tensor", none_left)
    with pytest.raises(StoreError, match="fewer rows or layers"):
        read(store)


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
    "the same text in each column": lambda: pa.table(
        {"id": [str(i) for i in range(1400)], **dict.fromkeys(map(str, range(100)), _repeated(1400, "x" * 11_000))}
    ),
    "a row of the same text": lambda: pa.table(
        {"id": ["a"], "x": pa.ListArray.from_arrays([0, 100_000], _repeated(100_000, "x" * 1000).dictionary_decode())}
    ),
    "the same bytes in each row": lambda: pa.table(
        {"id": [str(i) for i in range(1000)], "x": pa.array([b"x" * 100_000] * 1000, pa.binary(100_000))}
    ),
}


def _repeated(times: int, text: str) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), [text])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
@pytest.mark.parametrize("name", BOMBS)
def test_tables_that_unpack_to_much_more_than_they_are_are_refused(case, tmp_path, name):
    table, sink = BOMBS[name](), io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary="a list" not in name, store_schema=False)
    content = sink.getvalue()
    assert len(content) < 2_000_000
    set_table(case, 0, content, rows=len(table))
    child = multiprocessing.get_context("forkserver").Process(
        target=unpack_in_child, args=(built(case, tmp_path), 16, 64)
    )
    child.start()
    child.join()
    assert child.exitcode == 0


def test_a_table_that_says_less_of_itself_than_it_holds_is_refused(monkeypatch):
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"], "x": ["x" * 10**7]}), sink, use_dictionary=False, compression="zstd")
    content = sink.getvalue()
    size = pq.ParquetFile(sink).metadata.row_group(0).column(1).total_uncompressed_size
    # Thrift has them as zigzag varints; padded, the smaller one takes as many bytes.
    true, false = _varint(size), bytes([0xC8, 0x81, 0x80, 0x00])
    assert (content.count(true), len(true)) == (1, len(false))
    content = content.replace(true, false)
    assert pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0).column(1).total_uncompressed_size == 100
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 1 << 20)
    with pytest.raises(StoreError, match="unpack to more than 1 MiB"):
        tables.decode_table(content, Path("rows"), 1)


def _varint(number: int) -> bytes:
    number, coded = number << 1, bytearray()
    while number > 127:
        coded.append(number & 127 | 128)
        number >>= 7
    return bytes([*coded, number])


def test_texts_that_differ_are_no_bomb(monkeypatch):
    table = pa.table({"id": [str(i) for i in range(4000)], "x": [f"{i:01000}" for i in range(4000)]})
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 16 << 20)
    assert tables.decode_table(tables.encode_table(table), Path("rows"), 4000).equals(table)
    with pytest.raises(StoreError, match="keep less"):
        tables.encode_table(table.append_column("y", table["x"]).append_column("z", table["x"]))
