"""Reading back what `exporting` wrote: the same rows, bit for bit. Also the names of the files of an export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gapprobe.errors import DataError, StoreError
from gapprobe.store.exchange.sources import Source, open_file, open_source, spans
from gapprobe.store.format import StoredRow, StoreHeader, Value, layer_name, parse_json
from gapprobe.store.shard import TOKEN_TENSORS
from gapprobe.store.table import ID

EXPORT_FORMAT = "gapprobe.export"
EXPORT_VERSION = 1
EXPORT_FILE = "export.json"
ROWS_FILE = "rows.parquet"
OFFSETS_FILE = "offsets.npy"
CACHE_FILE = "cache.safetensors"
TOKENS_FILE = "tokens.safetensors"
DATA_FILE = "data-00000-of-00001.arrow"

Batches = Callable[[int], Iterator[list[StoredRow]]]


def hook_name(layer: int) -> str:
    """Return TransformerLens' name of a layer: what block 0 is given, and what each block leaves."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def describe_export(form: str, header: StoreHeader) -> bytes:
    """Return the content of export.json."""
    fields = {"format": EXPORT_FORMAT, "version": EXPORT_VERSION, "form": form}
    fields["store"] = json.loads(header.to_json())
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def open_export(folder: Path) -> tuple[StoreHeader, int, Batches]:
    """Return the header, the number of rows and a reader of batches of at most so many bytes.

    Raises:
        DataError: the folder is damaged, or of a newer version.
    """
    readers: Mapping[object, Callable[[Path, StoreHeader], tuple[int, Batches]]] = {
        "numpy": _open_numpy,
        "transformer_lens": _open_cache,
        "datasets": _open_dataset,
    }
    where = folder / EXPORT_FILE
    try:
        fields = parse_json(where.read_bytes(), str(where))
        if fields.get("format") != EXPORT_FORMAT or fields.get("version") != EXPORT_VERSION:
            raise DataError(f"{where} is not of version {EXPORT_VERSION}; export the store again")
        reader = readers.get(fields.get("form"))
        if reader is None:
            raise DataError(f"{where} names the form {fields.get('form')!r}, which is not known")
        header = StoreHeader.from_json(json.dumps(fields.get("store")).encode(), str(where))
        return header, *reader(folder, header)
    except (StoreError, OSError, pa.ArrowException) as error:
        raise DataError(f"{folder} is damaged: {error}") from error


def _open_numpy(folder: Path, header: StoreHeader) -> tuple[int, Batches]:
    offsets = np.load(folder / OFFSETS_FILE, allow_pickle=False)
    arrays = {layer: open_file(folder / f"{layer_name(layer)}.npy") for layer in header.layers}
    tokens = {name: open_file(folder / f"{name}.npy") for name in TOKEN_TENSORS}
    return _open_arrays(folder, header, open_source(arrays, layers=None, lengths=np.diff(offsets)), tokens)


def _open_cache(folder: Path, header: StoreHeader) -> tuple[int, Batches]:
    cache = cast(Mapping[str, Any], open_file(folder / CACHE_FILE))
    tokens = dict(cast(Mapping[str, Any], open_file(folder / TOKENS_FILE)))
    mask = tokens.pop("mask")
    return _open_arrays(folder, header, open_source(cache, layers=None, mask=mask), tokens)


def _open_arrays(
    folder: Path, header: StoreHeader, source: Source, tokens: Mapping[str, object]
) -> tuple[int, Batches]:
    table = pq.ParquetFile(folder / ROWS_FILE).read(use_threads=False)
    if table.num_rows != len(source.sizes) or (source.kind.layers, source.kind.width) != (header.layers, header.width):
        raise DataError(f"{folder} is damaged: its rows, arrays and {EXPORT_FILE} do not fit together")
    readers = {name: source.per_token(name, tokens[name]) for name in TOKEN_TENSORS}
    size = len(header.layers) * header.width * header.torch_dtype.itemsize

    def batches(most_bytes: int) -> Iterator[list[StoredRow]]:
        for first, last in spans(source.sizes, max(1, most_bytes // size)):
            residuals = source.residuals(first, last)
            numbers = [reader(first, last) for reader in readers.values()]
            columns = cast(list[dict[str, Value]], table.slice(first, last - first).to_pylist())
            yield [_row(header, *parts) for parts in zip(columns, residuals, zip(*numbers, strict=True), strict=True)]

    return table.num_rows, batches


def _open_dataset(folder: Path, header: StoreHeader) -> tuple[int, Batches]:
    with pa.memory_map(str(folder / DATA_FILE)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    names = [layer_name(layer) for layer in header.layers]
    columns = table.select([name for name in table.column_names if name not in {*names, *TOKEN_TENSORS}])

    def batches(most_bytes: int) -> Iterator[list[StoredRow]]:
        tokens = table.column(TOKEN_TENSORS[0]).combine_chunks().value_lengths().to_numpy()
        size = len(header.layers) * header.width * header.torch_dtype.itemsize
        for first, last in spans(tokens.astype(np.int64), max(1, most_bytes // size)):
            lengths = tokens[first:last].tolist()
            here = table.slice(first, last - first)
            residual = torch.stack([_numbers(here.column(name)).view(-1, header.width) for name in names])
            numbers = [_numbers(here.column(name)).split(lengths) for name in TOKEN_TENSORS]
            plain = cast(list[dict[str, Value]], columns.slice(first, last - first).to_pylist())
            parts = zip(plain, residual.split(lengths, 1), zip(*numbers, strict=True), strict=True)
            yield [_row(header, *part) for part in parts]

    return table.num_rows, batches


def _numbers(column: pa.ChunkedArray) -> Tensor:
    """Return the numbers in a column of nested lists, one after another."""
    flat = column.combine_chunks()
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    return torch.from_numpy(flat.to_numpy(zero_copy_only=False).copy())


def _row(header: StoreHeader, columns: dict[str, Value], residual: Tensor, tokens: tuple[Tensor, ...]) -> StoredRow:
    # bfloat16 was exported as float32, in which it is exact.
    return StoredRow(cast(str, columns.pop(ID)), columns, residual.to(header.torch_dtype), *tokens)
