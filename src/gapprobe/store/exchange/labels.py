"""A user's table of labels, whatever form it comes in, as the columns of rows and their ids. Knows no activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from gapprobe.errors import DataError
from gapprobe.store.table import ID

LABEL = "label"


def read_labels(labels: object) -> tuple[pa.Table, list[str] | None]:
    """Return a table without the column `id`, and the ids if the table gives any.

    Ids come from a column `id`, else from the index of a pandas frame if that is of text: numbers count rows, and may
    be what a filter or a split has left of such a count.

    Args:
        labels: a pandas, polars or Arrow table, a mapping of columns, a vector (which becomes the column `label`), or
            the path of a .csv, .tsv or .parquet file (UTF-8; only an empty cell is a missing value).

    Raises:
        DataError: it is nothing of the kind, cannot be read, or has a column that a store cannot hold.
    """
    where = "labels"
    if isinstance(labels, str | Path):
        where = str(labels)
        labels = _read_file(Path(labels))
    if isinstance(labels, pd.Series):
        labels = labels.to_frame(LABEL if labels.name is None else labels.name)
    elif isinstance(labels, list | tuple | np.ndarray | Tensor):
        labels = {LABEL: labels}
    if isinstance(labels, pd.DataFrame):
        labels = _from_pandas(labels, where)
    if isinstance(labels, Mapping):
        labels = _from_mapping(cast(Mapping[object, object], labels), where)
    # Polars and others hand themselves over without being imported here.
    if not isinstance(labels, pa.Table) and hasattr(labels, "__arrow_c_stream__"):
        labels = pa.table(labels)
    if not isinstance(labels, pa.Table):
        raise DataError(
            f"labels are of type {type(labels).__name__}; give a pandas, polars or Arrow table, a dictionary of "
            "columns, or the path of a .csv, .tsv or .parquet file"
        )
    table = cast(Any, labels)  # pyarrow has no types
    if len(set(table.column_names)) < table.num_columns:
        raise DataError(f"{where}: a column name stands twice")
    columns = {name: _storable(table.column(name), name, where) for name in table.column_names}
    ids = columns.pop(ID, None)
    if ids is not None and ids.null_count:
        raise DataError(f"{where}: a row has no {ID}")
    # A table made of no columns would forget how many rows it has.
    rest = pa.table(columns) if columns else table.select([])
    return rest, None if ids is None else [str(id_) for id_ in ids.to_pylist()]


def _read_file(path: Path) -> pd.DataFrame | pa.Table:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        if path.suffix == ".parquet":
            # Not a data set of several files, whose folder names would become columns.
            return pq.ParquetFile(path).read(use_threads=False)
        if path.suffix in (".csv", ".tsv"):
            separator = "," if path.suffix == ".csv" else "\t"
            # An id such as 007 is text, and "NA" or "None" may be an answer.
            return pd.read_csv(path, sep=separator, dtype={ID: str}, keep_default_na=False, na_values=[""])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    raise DataError(f"{path} is none of .csv, .tsv, .parquet; convert it, or give the table itself")


def _from_pandas(frame: pd.DataFrame, where: str) -> pa.Table:
    names = [str(name) for name in frame.columns]
    if len(set(names)) != len(names):
        raise DataError(f"{where}: a column name stands twice")
    frame = frame.set_axis(names, axis=1)
    if frame.index.inferred_type == "string" and ID not in names:
        frame = frame.assign(**{ID: frame.index})
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}. Give each column one type.") from error


def _from_mapping(columns: Mapping[object, object], where: str) -> pa.Table:
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        try:
            # pyarrow takes no tensors, and no arrays of more than one axis.
            if isinstance(values, Tensor) or (isinstance(values, np.ndarray) and values.ndim > 1):
                values = values.tolist()
            arrays[str(name)] = pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: column {name!r} cannot be stored: {error}. Give it one type.") from error
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: the columns have different lengths: {lengths}")
    return pa.table(arrays)


def _storable(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Return a column as text, numbers, truth values or lists of numbers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = _plain(kind.value_type) if listed else _plain(kind)
    if inner is None or (listed and inner in (pa.string(), pa.bool_())):
        raise DataError(
            f"{where}: column {name!r} holds {kind}; a store holds text, numbers, truth values and lists of numbers. "
            "Turn it into one of these (str, int, float)"
        )
    try:
        return column.cast(pa.list_(inner) if listed else inner)
    except pa.ArrowException as error:
        raise DataError(f"{where}: column {name!r} cannot be stored: {error}") from error


def _plain(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return kind
    if pa.types.is_integer(kind):
        return pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else None
