"""Reading a store: opening reads two small files; tables on the first look at rows; layers are mapped when asked for.

A `Store` shows the shards that were sealed when it was opened. It never writes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import StoreError
from gapprobe.store.format import (
    STORE_FILE,
    VERSION,
    ShardRecord,
    StoredRow,
    StoreHeader,
    Value,
    layer_name,
    shard_name,
)
from gapprobe.store.manifest import Manifest, read_header, read_manifest
from gapprobe.store.shard import Shard, layer_names, open_shard
from gapprobe.store.table import ID, merge_schemas, read_table
from gapprobe.store.verify import Problem, verify_store


@dataclass(frozen=True)
class StoreInfo:
    """What `gapprobe store info` shows. `settings` counts the rows by their column `setting`, if they have one."""

    path: Path
    format: int
    model: Mapping[str, str]
    rows: int
    errors: int
    tokens: int
    layers: tuple[int, ...]
    width: int
    dtype: str
    positions: tuple[str, ...]
    shards: int
    bytes: int
    settings: Mapping[str, int]

    def __str__(self) -> str:
        """Return a line for each field."""
        layers = f"{len(self.layers)} ({self.layers[0]} to {self.layers[-1]})"
        lines = {
            "store": f"{self.path}, format {self.format}",
            "model": ", ".join(f"{name} {value}" for name, value in self.model.items()),
            "rows": f"{self.rows:,}, of which {self.errors:,} could not be run",
            "settings": ", ".join(f"{name} {count:,}" for name, count in self.settings.items()) or "not given",
            "tokens": f"{self.tokens:,} at {', '.join(self.positions) or 'no named position'}",
            "residuals": f"{layers} layers of width {self.width}, {self.dtype}",
            "disk": f"{self.bytes / 1e6:,.1f} MB in {self.shards:,} shards",
        }
        return "\n".join(f"{name + ':':<11}{text}" for name, text in lines.items())


class Store:
    """The rows and residuals of a store, as sealed when it was opened. Use `open_store`."""

    def __init__(self, path: Path, header: StoreHeader, manifest: Manifest) -> None:
        self.path = path
        self.header = header
        self._records = manifest.records
        self._shard = cache(self._open)

    def __repr__(self) -> str:
        """Say where the store is and how much it holds."""
        rows = sum(record.rows for record in self._records)
        return f"Store({str(self.path)!r}, {rows} rows, {len(self.header.layers)} layers, width {self.header.width})"

    @property
    def rows(self) -> pd.DataFrame:
        """Return the table of rows, indexed by id, in the order of sealing. Missing values are null (`isna`)."""
        return self._frame.copy(deep=False)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Return the ids of all rows, in the order of sealing."""
        return tuple(self._table.column(ID).to_pylist())

    def layer(
        self, layer: int, position: str | None = None, rows: Iterable[str] | None = None
    ) -> Shaped[Tensor, "n d"]:
        """Return the residual stream after one layer.

        Where the tokens lie one after another in one shard the result is a private map of the file, read when touched;
        otherwise a copy. Changing it in place changes neither the store nor what later calls return.

        Args:
            layer: one of `header.layers`.
            position: one of `header.positions`: the token so marked of each row. Without: all tokens of each row.
            rows: ids, in the order wanted; all rows in the order of sealing by default.

        Returns:
            With a position one line a row, without one line a token; in the store's dtype.

        Raises:
            StoreError: the layer, position or a row is not in the store; a row has no token at the position, or
                several; or a file is damaged.
        """
        if layer not in self.header.layers:
            raise StoreError(f"{self.path} has no layer {layer}; it has {_told(self.header.layers)}")
        chosen = self._chosen(rows)
        tokens = self._tokens.of_rows(chosen) if position is None else self._at_position(position, chosen)
        return self._gather(layer_name(layer), tokens)

    def row(self, id: str) -> StoredRow:
        """Return one row: its columns and the residuals of all its tokens, `[l t d]`.

        Raises:
            StoreError: there is no such row, or a file is damaged.
        """
        number = int(self._chosen([id])[0])
        at = int(np.searchsorted(self._row_base, number, side="right")) - 1
        shard = self._shard(self._records[at])
        first, last = shard.offsets[number - int(self._row_base[at]) :][:2].tolist()
        columns = cast(dict[str, Value], self._table.slice(number, 1).to_pylist()[0])
        return StoredRow(
            id=cast(str, columns.pop(ID)),
            columns=columns,
            residual=shard.layers(layer_names(self.header), first, last),
            token_ids=shard.read("token_ids", first, last),
            token_positions=shard.read("token_positions", first, last),
            token_roles=shard.read("token_roles", first, last),
            token_marks=shard.read("token_marks", first, last),
        )

    def info(self) -> StoreInfo:
        """Return what the store holds."""
        table = self._table
        settings = Counter(table.column("setting").to_pylist()) if "setting" in table.column_names else {}
        return StoreInfo(
            path=self.path,
            format=VERSION,
            model=self.header.model,
            rows=table.num_rows,
            errors=table.num_rows - table.column("error").null_count if "error" in table.column_names else 0,
            tokens=sum(record.tokens for record in self._records),
            layers=self.header.layers,
            width=self.header.width,
            dtype=self.header.dtype,
            positions=self.header.positions,
            shards=len(self._records),
            bytes=sum(record.shard_bytes + record.rows_bytes for record in self._records),
            settings={str(name): count for name, count in settings.items() if name is not None},
        )

    def verify(self) -> list[Problem]:
        """Return what is wrong with the store now, nothing when it is sound. Reads every byte."""
        return verify_store(self.path)

    def _open(self, record: ShardRecord) -> Shard:
        return open_shard(self.path / shard_name(record.shard), self.header, record)

    @cached_property
    def _table(self) -> pa.Table:
        tables = [read_table(self.path, record) for record in self._records]
        schema = pa.schema([(ID, pa.string())])
        for table in tables:
            schema = merge_schemas(schema, table.schema)
        return pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")

    @cached_property
    def _frame(self) -> pd.DataFrame:
        table = self._table.drop_columns([ID])
        # pandas would turn whole numbers and truth values with gaps into floats and objects.
        gaps = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
        frame = pd.DataFrame(index=pd.Index(self.ids, name=ID))
        columns = {
            name: table.column(name).to_pandas(types_mapper=gaps.get if table.column(name).null_count else None)
            for name in table.column_names
        }
        return frame if not columns else pd.DataFrame({n: c.set_axis(frame.index) for n, c in columns.items()})

    @cached_property
    def _number_of(self) -> dict[str, int]:
        numbers = {id_: number for number, id_ in enumerate(self.ids)}
        if len(numbers) != len(self.ids):
            raise StoreError(f"{self.path} holds a row twice. Run `gapprobe store verify`.")
        return numbers

    @cached_property
    def _row_base(self) -> NDArray[np.int64]:
        """Number of each shard's first row."""
        return np.cumsum([0] + [record.rows for record in self._records], dtype=np.int64)

    @cached_property
    def _token_base(self) -> NDArray[np.int64]:
        """Number of each shard's first token."""
        return np.cumsum([0] + [record.tokens for record in self._records], dtype=np.int64)

    @cached_property
    def _tokens(self) -> _Tokens:
        offsets, marks = [np.zeros(1, np.int64)], [np.zeros(0, np.uint8)]
        for record, base in zip(self._records, self._token_base, strict=False):
            shard = self._shard(record)
            offsets.append(shard.offsets.numpy()[1:] + base)
            marks.append(shard.read("token_marks").numpy())
        return _Tokens(np.concatenate(offsets), np.concatenate(marks))

    def _chosen(self, rows: Iterable[str] | None) -> NDArray[np.int64]:
        """Return the numbers of rows, in the order asked for."""
        if rows is None:
            return np.arange(len(self.ids), dtype=np.int64)
        wanted = [rows] if isinstance(rows, str) else list(rows)
        missing = [id_ for id_ in wanted if id_ not in self._number_of]
        if missing:
            raise StoreError(f"{self.path} has no row {missing[0]!r:.80} ({len(missing)} of {len(wanted)} are missing)")
        return np.array([self._number_of[id_] for id_ in wanted], dtype=np.int64)

    def _at_position(self, position: str, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the one token of each row that is marked as the position."""
        if position not in self.header.positions:
            raise StoreError(f"{self.path} has no position {position!r}; it has {_told(self.header.positions)}")
        first, count = self._tokens.marked(self.header.positions.index(position))
        wrong = chosen[count[chosen] != 1]
        if len(wrong):
            raise StoreError(
                f"{self.path}: row {self.ids[wrong[0]]!r:.80} has {count[wrong[0]]} tokens at {position!r} "
                f"({len(wrong)} of {len(chosen)} rows have not exactly one). Leave such rows out through `rows`."
            )
        return first[chosen]

    def _gather(self, name: str, tokens: NDArray[np.int64]) -> Shaped[Tensor, "n d"]:
        """Return the lines of a layer's tensor at these tokens, numbered through all shards."""
        at = np.searchsorted(self._token_base, tokens, side="right") - 1
        shards = np.unique(at)
        if len(shards) == 1:
            return self._from_shard(int(shards[0]), name, tokens)
        result = torch.empty(len(tokens), self.header.width, dtype=self.header.torch_dtype)
        for number in shards:
            places = np.flatnonzero(at == number)
            result[torch.from_numpy(places)] = self._from_shard(int(number), name, tokens[places])
        return result

    def _from_shard(self, number: int, name: str, tokens: NDArray[np.int64]) -> Shaped[Tensor, "n d"]:
        shard = self._shard(self._records[number])
        local = tokens - self._token_base[number]
        first, last = int(local[0]), int(local[-1]) + 1
        if last - first == len(local) and bool((np.diff(local) == 1).all()):
            return shard.tensor(name, first, last)
        return shard.tensor(name).index_select(0, torch.from_numpy(local))


@dataclass(frozen=True)
class _Tokens:
    """Which row each token belongs to and how it is marked, numbered through all shards."""

    offsets: NDArray[np.int64]
    marks: NDArray[np.uint8]

    def of_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of rows, in their order."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        return np.arange(total, dtype=np.int64) + np.repeat(starts - ends + lengths, lengths)

    def marked(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, by row, the first token marked as a position (0 where there is none) and how many are."""
        tokens = np.flatnonzero(self.marks >> position & 1)
        begin = np.searchsorted(tokens, self.offsets)
        count = np.diff(begin)
        first = np.zeros(len(count), np.int64)
        first[count > 0] = tokens[begin[:-1][count > 0]]
        return first, count


def open_store(path: str | Path) -> Store:
    """Open a store for reading, whatever its size, in milliseconds; rows and residuals are read when asked for.

    Raises:
        StoreError: there is no store, or it is damaged or of a newer format version.
    """
    path = Path(path)
    header, manifest = read_header(path), read_manifest(path)
    if manifest.damaged:
        warnings.warn(
            f"{path}: line {manifest.damaged[0]} of its manifest is damaged and the rows it sealed are left out. "
            "Run `gapprobe store verify`; opening the store for writing seals them again.",
            stacklevel=2,
        )
    return Store(path, header, manifest)


def find_stores(folder: str | Path) -> list[Path]:
    """Return `folder` if it is a store, else the stores somewhere below it, sorted.

    Raises:
        StoreError: there is none.
    """
    folder = Path(folder)
    found = [folder] if (folder / STORE_FILE).exists() else sorted(file.parent for file in folder.rglob(STORE_FILE))
    if not found:
        raise StoreError(f"{folder} is no gapprobe store and has none below it. Give the folder that capture wrote.")
    return found


def _told(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values)) or "none"
