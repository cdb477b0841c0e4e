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
from gapprobe.store import disk
from gapprobe.store.format import ShardRecord, StoredRow, StoreHeader, Value, check_id, rows_name, shard_name
from gapprobe.store.shard import TOKEN_TENSORS, Shard, layer_names, open_shard

ID = "id"
# No honest table comes near it; what it would unpack to is refused before it fills the memory.
MAX_TABLE_BYTES = 1 << 30
_PLAIN = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)


def build_table(ids: Sequence[str], columns: Sequence[Mapping[str, Value]]) -> pa.Table:
    """Return the table of rows. A value that a row lacks is null.

    Raises:
        StoreError: a column holds values that do not go together.
    """
    names = dict.fromkeys(name for row in columns for name in row)
    arrays = {ID: pa.array(ids, pa.string())}
    for name in names:
        values = [row.get(name) for row in columns]
        try:
            arrays[name] = pa.array(values, from_pandas=False)
        # Arrow's own errors are ValueErrors and TypeErrors; integers beyond 64 bits are an OverflowError.
        except (ValueError, TypeError, OverflowError) as error:
            try:
                # Arrow refuses whole numbers that no float equals beside floats; in a column of both, all are floats.
                arrays[name] = pa.array([_as_float(value) for value in values], from_pandas=False)
            except (ValueError, TypeError, OverflowError):
                raise StoreError(f"column {name!r} cannot be stored: {error}. Give it one type in all rows.") from error
    return pa.table(arrays)


def _as_float(value: Value) -> float | list[float] | None:
    if isinstance(value, str):
        raise TypeError("a text is no number, even if it looks like one")
    return [float(x) for x in value] if isinstance(value, list) else None if value is None else float(value)


def join_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of several tables: what one lacks is null there, whole numbers widen to floats where they must.

    Raises:
        StoreError: a column changes its type.
    """
    schema = merge_schemas(pa.schema([(ID, pa.string())]), *(table.schema for table in tables))
    widened = [
        table.cast(pa.schema([schema.field(name) for name in table.column_names]), safe=False) for table in tables
    ]
    return pa.concat_tables([schema.empty_table(), *widened], promote_options="default")


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
    """Return the table as a parquet file.

    Raises:
        StoreError: it is larger than any table may be.
    """
    if table.nbytes > MAX_TABLE_BYTES:
        raise StoreError(f"columns of {len(table)} rows take more than {MAX_TABLE_BYTES >> 20} MiB; keep less in them")
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(store: Path, header: StoreHeader, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the table of a sealed shard: its own file or, where that is missing or damaged, the copy in the shard.

    Raises:
        StoreError: both are missing, damaged, or do not fit the line of the manifest.
    """
    path = store / rows_name(record.shard)
    if record.rows_bytes > MAX_TABLE_BYTES:
        raise StoreError(f"{path} is damaged: no table of rows has {record.rows_bytes} bytes")
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
        with open(disk.open_regular(path), "rb") as stream:
            content = stream.read(record.rows_bytes)
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
        table = _unpack(file, path, columns)
        if ID not in table.column_names or table.schema.field(ID).type != pa.string():
            raise StoreError(f"{path} is damaged: it has no text column {ID!r}")
        ids = cast(list[str | None], table.column(ID).to_pylist())
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error!s:.400}") from error
    if len(ids) != rows or None in ids or len(set(ids)) != rows:
        raise StoreError(f"{path} is damaged: it does not name {rows} rows, each once")
    for id_ in cast(list[str], ids):
        try:
            check_id(id_)
        except StoreError as error:
            raise StoreError(f"{path} is damaged: {error}") from error
    return table


def _unpack(file: pq.ParquetFile, path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read a table, as long as it takes no more memory than any table may: a few bytes can unpack to very many."""
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(metadata.num_columns)]
    # Bytes when decompressed, and eight for each value; of texts that are stored once and repeated, it is only a part.
    largest = max((max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks), default=0)
    if largest > MAX_TABLE_BYTES:
        raise StoreError(f"{path} is damaged: its columns unpack to more than {MAX_TABLE_BYTES >> 20} MiB")
    wanted = None if columns is None else list(columns)
    # A thread of Arrow's that still starts when the process ends aborts it, where torch is loaded (measured: a half of
    # processes that read a table last).
    if metadata.num_rows * largest <= MAX_TABLE_BYTES:
        return file.read(columns=wanted, use_threads=False)
    batches, size = list[pa.RecordBatch](), 0
    for batch in file.iter_batches(max(1, MAX_TABLE_BYTES // largest), columns=wanted, use_threads=False):
        batches.append(batch)
        size += batch.nbytes
        if size > MAX_TABLE_BYTES:
            raise StoreError(f"{path} is damaged: its columns unpack to more than {MAX_TABLE_BYTES >> 20} MiB")
    return pa.Table.from_batches(batches, file.schema_arrow if wanted is None else None)


def shard_rows(shard: Shard, header: StoreHeader, table: pa.Table) -> Iterator[StoredRow]:
    """Read the rows of a shard one by one; `table` is its table."""
    for number, columns in enumerate(plain_rows(table, shard.path)):
        yield shard_row(shard, header, number, columns)


def plain_rows(table: pa.Table, where: Path) -> list[dict[str, Value]]:
    """Return the rows of a table, each with its id.

    Raises:
        StoreError: a column is of a type that another program wrote, and no row can have.
    """
    for field in table.schema:
        kind = field.type
        while pa.types.is_list(kind):
            kind = kind.value_type
        if not any(is_plain(kind) for is_plain in _PLAIN):
            raise StoreError(f"{where}: column {field.name!r:.80} is of type {field.type}, which no row can have")
    return cast(list[dict[str, Value]], table.to_pylist())


def shard_row(shard: Shard, header: StoreHeader, number: int, columns: dict[str, Value]) -> StoredRow:
    """Read row `number` of a shard; `columns` is its line of the table, with the id."""
    first, last = shard.offsets[number : number + 2].tolist()
    residual = shard.span(layer_names(header), first, last)
    tokens = {name: shard.read(name, first, last) for name in TOKEN_TENSORS}
    return StoredRow(cast(str, columns.pop(ID)), columns, residual, **tokens)
