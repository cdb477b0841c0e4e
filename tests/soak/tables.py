"""Tables of rows that are sound parquet, but not what a store expects."""

import io
import struct
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tests.soak.case import Pick
from tests.soak.values import TEXTS


def encoded(table: pa.Table, pick: Pick) -> bytes:
    """Write a table as parquet one way or another."""
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression=pick.choice(("none", "zstd", "snappy", "gzip", "lz4", "brotli")),
        use_dictionary=bool(pick.randint(0, 1)),
        row_group_size=pick.choice((1, 2, 1000)),
        data_page_version=pick.choice(("1.0", "2.0")),
        store_schema=bool(pick.randint(0, 1)),
    )
    return sink.getvalue()


def _not_utf8(ids: Sequence[str], _: Pick) -> pa.Table:
    ends = struct.pack(f"<{len(ids) + 1}i", *range(0, 2 * len(ids) + 2, 2))
    letters = b"".join(bytes([0xFF, 0x80 + i]) for i in range(len(ids)))
    return pa.table({"id": pa.StringArray.from_buffers(len(ids), pa.py_buffer(ends), pa.py_buffer(letters))})


def _column(ids: Sequence[str], name: str, values: pa.Array) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.string())}).append_column(name, values)


def _many(ids: Sequence[str], pick: Pick) -> pa.Table:
    # Types that pandas or JSON have no counterpart for, or where values of the type go beyond what Python has.
    far = pick.choice((2**62, -(2**62), 0))
    values = pick.choice(
        (
            pa.array([far] * len(ids), pa.timestamp(pick.choice(("s", "ms", "us", "ns")))),
            pa.array([far % 86400] * len(ids), pa.time32("s")),
            pa.array([far] * len(ids), pa.duration("s")),
            pa.array([{"a": far}] * len(ids)),
            pa.array([[["x"]]] * len(ids)),
            pa.array(["x"] * len(ids)).dictionary_encode(),
            pa.array([b"\xff"] * len(ids)),
            pa.array([10**30] * len(ids), pa.decimal128(38, 0)),
            pa.nulls(len(ids)),
            pa.array([far] * len(ids), pa.uint64() if far >= 0 else pa.int64()),
            pa.array([[("k", 1)]] * len(ids), pa.map_(pa.string(), pa.int64())),
            pa.array([1.5] * len(ids), pa.float16()),
            pa.array([list(range(2))] * len(ids), pa.list_(pa.int64(), 2)),
            pa.array(["0" * pick.choice((1, 100_000))] * len(ids), pa.large_string()),
        )
    )
    return _column(ids, pick.choice(("n", "setting", "error", "x", "right", "logprobs", "")), values)


TABLES: Sequence[Callable[[Sequence[str], Pick], pa.Table]] = (
    _many,
    _many,
    _not_utf8,
    lambda ids, _: pa.table({"id": pa.array(ids, pa.large_string())}),
    lambda ids, _: pa.table({"id": pa.array([id_.encode() for id_ in ids])}),
    lambda ids, _: pa.table({"id": pa.array(range(len(ids)))}),
    lambda ids, _: pa.table({"id": pa.array(ids).dictionary_encode()}),
    lambda ids, _: pa.table({"id": pa.array([None, *ids[1:]], pa.string())}),
    lambda ids, _: pa.table({"id": pa.array([ids[0]] * len(ids), pa.string())}),
    lambda ids, pick: pa.table({"id": pa.array([*ids[1:], pick.choice(TEXTS[:-2])], pa.string())}),
    lambda ids, pick: pa.table({"id": pa.array([f"{pick.choice(TEXTS[3:8])}{i}" for i in range(len(ids))])}),
    lambda ids, _: pa.table({"id": pa.array(ids * 2, pa.string())}),
    lambda _, __: pa.table({"id": pa.array([], pa.string())}),
    lambda ids, _: pa.table({"name": pa.array(ids, pa.string())}),
    lambda ids, _: pa.table([pa.array(ids), pa.array(ids)], ["id", "id"]),
    lambda ids, _: pa.table([pa.array(ids), pa.array(ids), pa.array(ids)], ["id", "x", "x"]),
    lambda ids, _: pa.table({"id": pa.array(ids), **{f"c{i}": pa.array([i] * len(ids)) for i in range(500)}}),
    lambda ids, _: pa.table({"id": pa.array(ids)}).replace_schema_metadata({"pandas": "{", "ARROW:schema": "x"}),
    lambda ids, _: pa.table({"id": pa.array(ids)}).replace_schema_metadata({"pandas": '{"index_columns": ["nope"]}'}),
    lambda ids, _: _column(ids, "setting", pa.array([[1]] * len(ids))),
    lambda ids, _: _column(ids, "error", pa.array([{"a": 1}] * len(ids))),
)  # fmt: skip
