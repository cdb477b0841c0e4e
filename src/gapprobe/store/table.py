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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gapprobe.errors import StoreError
from gapprobe.store import disk
from gapprobe.store.footer import claimed_sizes
from gapprobe.store.format import (
    ShardRecord,
    StoredRow,
    StoreHeader,
    Value,
    check_id,
    rows_name,
    shard_name,
    shown,
)
from gapprobe.store.shard import TOKEN_TENSORS, Shard, layer_names, open_shard

ID = "id"
# No honest table comes near it; what it would unpack to is refused before it fills the memory.
MAX_TABLE_BYTES = 1 << 30
_SCALARS = {str, int, float, bool, type(None)}
# What a row's value can be, by itself or in lists.
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


def _as_float(value: object) -> object:
    if isinstance(value, str):
        raise TypeError("a text is no number, even if it looks like one")
    if isinstance(value, list | tuple):
        return [_as_float(x) for x in value]
    return None if value is None else float(cast(float, value))


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
        if not _is_plain(fields[-1][1]):
            kinds = "numbers, text, truth values, and lists of them"
            raise StoreError(f"column {name!r} cannot be stored: it is of type {fields[-1][1]}; rows hold {kinds}")
    return pa.schema(fields)


def kind_of(value: object) -> object | None:
    """Return what settles the type of a value in a table, and that a table can hold it; None where that takes arrow.

    Asking arrow for each value of each row takes longer than storing them.
    """
    if type(value) is list:
        kinds = {kind_of(item) for item in value}
        return (list, *kinds) if len(kinds) <= 1 and kinds <= _SCALARS else None
    if type(value) is int:
        return int if -(1 << 63) <= value < 1 << 63 else None
    if type(value) is str:
        return str if value.isascii() else None
    return type(value) if type(value) in _SCALARS else None


def _is_plain(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind):
        kind = kind.value_type
    return any(is_plain(kind) for is_plain in _PLAIN)


def merge_schemas(*schemas: pa.Schema) -> pa.Schema:
    """Return the schema of a store's tables together.

    Raises:
        StoreError: a column has another type than before.
    """
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(
            f"a column changes its type: {shown(str(error))}. Give each column one type in all rows."
        ) from error


def encode_table(table: pa.Table) -> bytes:
    """Return the table as a parquet file.

    Raises:
        StoreError: it is larger than any table that `decode_table` reads.
    """
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue()
    if _claims(pq.ParquetFile(sink), content)[0] + table.nbytes > MAX_TABLE_BYTES:
        raise StoreError(f"columns of {len(table)} rows take more than {MAX_TABLE_BYTES >> 20} MiB; keep less in them")
    return content


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


def decode_table(content: bytes, path: Path, rows: int | None, columns: Sequence[str] | None = None) -> pa.Table:
    """Parse a parquet file and check that it has `rows` rows, or any number for None, with ids of their own."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        # A few bytes can claim any number of rows; what is claimed is cheap to ask for.
        rows = cast(int, file.metadata.num_rows) if rows is None else rows
        if file.metadata.num_rows != rows:
            raise StoreError(f"{path} is damaged: it has {file.metadata.num_rows} rows, not {rows}")
        table = _unpack(file, content, path, columns)
        if len(set(table.column_names)) < len(table.column_names):
            raise StoreError(f"{path} is damaged: two of its columns have the same name")
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


def _unpack(file: pq.ParquetFile, content: bytes, path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Read a table, unless it takes more memory than any table may: a few bytes can unpack to very many."""
    refusal = StoreError(f"{path} is damaged: its columns unpack to more than {MAX_TABLE_BYTES >> 20} MiB")
    size, texts = _claims(file, content)
    if size > MAX_TABLE_BYTES:
        raise refusal
    if size + sum(texts.values()) > MAX_TABLE_BYTES:
        # Reading which text is whose takes no more than `size`, and tells how much they are.
        named = pq.ParquetFile(pa.BufferReader(content), read_dictionary=list(texts)).read(use_threads=False)
        if size + sum(_text_bytes(chunk) for column in named.columns for chunk in column.chunks) > MAX_TABLE_BYTES:
            raise refusal
    # A thread of Arrow's that still starts when the process ends aborts it, where torch is loaded (measured: a half of
    # processes that read a table last).
    table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    # What the file says of itself need not be true.
    if table.nbytes > MAX_TABLE_BYTES:
        raise refusal
    return table


def _claims(file: pq.ParquetFile, content: bytes) -> tuple[int, dict[str, int]]:
    """Return the bytes that a table takes with each different text once; and by column of texts, at most for each."""
    size, texts = 0, dict[str, int]()
    columns = [(column.path, column.length, column.physical_type == "BYTE_ARRAY") for column in file.schema]
    for group in claimed_sizes(content):
        for (path, length, text), (values, unpacked) in zip(columns, group, strict=True):
            size += max(unpacked, values * max(8, length))
            if text:
                texts[path] = texts.get(path, 0) + unpacked * values
    return size, texts


def _text_bytes(array: pa.Array) -> int:
    """Return how much the texts of an array take when each value has its own; the array has each of them once."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.call_function("binary_length", [array.dictionary])
        return pc.call_function("sum", [lengths.take(array.indices)]).as_py() or 0
    if pa.types.is_map(array.type):
        return _text_bytes(array.keys) + _text_bytes(array.items)
    if pa.types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    return _text_bytes(array.flatten()) if pa.types.is_nested(array.type) else 0


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
        if not _is_plain(field.type):
            raise StoreError(f"{where}: column {field.name!r:.80} is of type {field.type}, which no row can have")
    return cast(list[dict[str, Value]], table.to_pylist())


def shard_row(shard: Shard, header: StoreHeader, number: int, columns: dict[str, Value]) -> StoredRow:
    """Read row `number` of a shard; `columns` is its line of the table, with the id."""
    first, last = shard.offsets[number : number + 2].tolist()
    residual = shard.span(layer_names(header), first, last)
    tokens = {name: shard.read(name, first, last) for name in TOKEN_TENSORS}
    return StoredRow(cast(str, columns.pop(ID)), columns, residual, **tokens)
