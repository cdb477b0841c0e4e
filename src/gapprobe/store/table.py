"""One shard's table of rows: parquet with the column `id` and whatever columns the rows carry.

It stands in the shard and, for programs that read parquet, in a file of its own; either will do if the other is lost.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from gapprobe.errors import StoreError
from gapprobe.store.format import ShardRecord, StoredRow, StoreHeader, Value, rows_name, shard_name
from gapprobe.store.shard import TOKEN_TENSORS, Shard, layer_names, open_shard

ID = "id"


def build_table(ids: Sequence[str], columns: Sequence[Mapping[str, Value]]) -> pa.Table:
    """Return the table of rows. A value that a row lacks is null.

    Raises:
        StoreError: a column holds values that do not go together.
    """
    names = dict.fromkeys(name for row in columns for name in row)
    arrays = {ID: pa.array(ids, pa.string())}
    for name in names:
        try:
            arrays[name] = pa.array([row.get(name) for row in columns], from_pandas=False)
        # Arrow's own errors are ValueErrors and TypeErrors; integers beyond 64 bits are an OverflowError.
        except (ValueError, TypeError, OverflowError) as error:
            raise StoreError(f"column {name!r} cannot be stored: {error}. Give it one type in all rows.") from error
    return pa.table(arrays)


def row_schema(columns: Mapping[str, Value]) -> pa.Schema:
    """Return the types of one row's columns.

    Raises:
        StoreError: a column is named `id`, or holds what no table can hold.
    """
    if ID in columns:
        raise StoreError(f"a column is named {ID!r}, which the store keeps for the rows' own ids; rename it")
    fields: list[tuple[str, pa.DataType]] = []
    for name, value in columns.items():
        try:
            fields.append((name, pa.scalar(value).type))
        except (ValueError, TypeError, OverflowError) as error:
            raise StoreError(f"column {name!r} cannot be stored: {error}. Give it one type in all rows.") from error
    return pa.schema(fields)


def merge_schemas(*schemas: pa.Schema) -> pa.Schema:
    """Return the schema of a store's tables together.

    Raises:
        StoreError: a column has another type than before.
    """
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(f"a column changes its type: {error}. Give each column one type in all rows.") from error


def encode_table(table: pa.Table) -> bytes:
    """Return the table as a parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(store: Path, header: StoreHeader, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the table of a sealed shard: its own file or, where that is missing or damaged, the copy in the shard.

    Raises:
        StoreError: both are missing, damaged, or do not fit the line of the manifest.
    """
    path = store / rows_name(record.shard)
    try:
        content = _checked(path, record)
    except StoreError as error:
        try:
            content = open_shard(store / shard_name(record.shard), header, record).table()
        except StoreError:
            raise error from None
        if hashlib.sha256(content).hexdigest() != record.rows_sha256:
            raise
    return decode_table(content, path, record.rows, columns)


def _checked(path: Path, record: ShardRecord) -> bytes:
    try:
        if path.stat().st_size != record.rows_bytes:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, the manifest says {record.rows_bytes}")
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or os.strerror(0)}") from error
    # Checked before parsing: a flipped byte can ask a parquet parser for any amount of memory.
    if hashlib.sha256(content).hexdigest() != record.rows_sha256:
        raise StoreError(f"{path} is damaged: its checksum is not that of the manifest. Run `gapprobe store verify`.")
    return content


def decode_table(content: bytes, path: Path, rows: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Parse a parquet file and check that it has `rows` rows with ids of their own."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        # A few bytes can claim any number of rows; what is claimed is cheap to ask for.
        if file.metadata.num_rows != rows:
            raise StoreError(f"{path} is damaged: it has {file.metadata.num_rows} rows, not {rows}")
        # A thread of Arrow's that still starts when the process ends aborts it, where torch is loaded (measured: a half
        # of processes that read a table last).
        table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if ID not in table.column_names or table.schema.field(ID).type != pa.string():
        raise StoreError(f"{path} is damaged: it has no text column {ID!r}")
    ids = table.column(ID)
    if len(ids) != rows or ids.null_count or len(set(ids.to_pylist())) != rows:
        raise StoreError(f"{path} is damaged: it does not name {rows} rows, each once")
    return table


def shard_rows(shard: Shard, header: StoreHeader, table: pa.Table) -> Iterator[StoredRow]:
    """Read the rows of a shard one by one; `table` is its table."""
    for number, columns in enumerate(cast(list[dict[str, Value]], table.to_pylist())):
        yield shard_row(shard, header, number, columns)


def shard_row(shard: Shard, header: StoreHeader, number: int, columns: dict[str, Value]) -> StoredRow:
    """Read row `number` of a shard; `columns` is its line of the table, with the id."""
    first, last = shard.offsets[number : number + 2].tolist()
    residual = shard.span(layer_names(header), first, last)
    tokens = {name: shard.read(name, first, last) for name in TOKEN_TENSORS}
    return StoredRow(cast(str, columns.pop(ID)), columns, residual, **tokens)
