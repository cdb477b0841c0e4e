"""One shard's table of rows: parquet with the column `id` and whatever columns the rows carry."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gapprobe.errors import StoreError
from gapprobe.store.format import ShardRecord, Value, rows_name

ID = "id"


def build_table(ids: Sequence[str], columns: Sequence[Mapping[str, Value]]) -> pa.Table:
    """Return the table of rows. A value that a row lacks is null.

    Raises:
        StoreError: a column is named `id`, or holds values that do not go together or that no table can hold.
    """
    names = dict.fromkeys(name for row in columns for name in row)
    if ID in names:
        raise StoreError(f"a column is named {ID!r}, which the store keeps for the rows' own ids; rename it")
    arrays = {ID: pa.array(ids, pa.string())}
    for name in names:
        try:
            arrays[name] = pa.array([row.get(name) for row in columns], from_pandas=False)
        # Arrow's own errors are ValueErrors and TypeErrors; integers beyond 64 bits are an OverflowError.
        except (ValueError, TypeError, OverflowError) as error:
            raise StoreError(f"column {name!r} cannot be stored: {error}. Give it one type in all rows.") from error
    return pa.table(arrays)


def merge_schemas(known: pa.Schema, new: pa.Schema) -> pa.Schema:
    """Return the schema of a store's tables together.

    Raises:
        StoreError: a column has another type than before.
    """
    try:
        return pa.unify_schemas([known, new], promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(f"a column changes its type: {error}. Keep one type a column.") from error


def encode_table(table: pa.Table) -> bytes:
    """Return the table as a parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(store: Path, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the table of a sealed shard.

    Raises:
        StoreError: the file is missing, damaged, or does not fit its line of the manifest.
    """
    path = store / rows_name(record.shard)
    try:
        if path.stat().st_size != record.rows_bytes:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, the manifest says {record.rows_bytes}")
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or os.strerror(0)}") from error
    # Checked before parsing: a flipped byte can ask a parquet parser for any amount of memory.
    if hashlib.sha256(content).hexdigest() != record.rows_sha256:
        raise StoreError(f"{path} is damaged: its checksum is not that of the manifest. Run `gapprobe store verify`.")
    return decode_table(content, path, record.rows, columns)


def decode_table(content: bytes, path: Path, rows: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Parse a parquet file and check that it has `rows` rows with ids of their own."""
    try:
        table = pq.read_table(pa.BufferReader(content), columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if ID not in table.column_names or table.schema.field(ID).type != pa.string():
        raise StoreError(f"{path} is damaged: it has no text column {ID!r}")
    ids = table.column(ID)
    if len(ids) != rows or ids.null_count or len(set(ids.to_pylist())) != rows:
        raise StoreError(f"{path} is damaged: it does not name {rows} rows, each once")
    return table
