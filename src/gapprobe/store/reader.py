"""Reading a store: opening reads two small files; tables on the first look at rows; layers are read when asked for.

A `Store` shows the shards that were sealed when it was opened or last refreshed. It never writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Int64, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import StoreError
from gapprobe.files import told_bytes
from gapprobe.kernels.memory import fresh
from gapprobe.kernels.moments import alike
from gapprobe.store.care.verify import Problem, verify_store
from gapprobe.store.format import (
    STORE_FILE,
    VERSION,
    ShardRecord,
    StoredRow,
    StoreHeader,
    layer_name,
    shard_name,
    shown,
)
from gapprobe.store.gather import Part, position_jobs, run_jobs, token_jobs, token_offsets
from gapprobe.store.manifest import Manifest, read_header, read_manifest
from gapprobe.store.memory import enough_memory
from gapprobe.store.moments import Moments, combine, moments
from gapprobe.store.shard import TOKEN_TENSORS, Shard, open_shard
from gapprobe.store.table import ID, join_tables, plain_rows, read_table, shard_row


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
            "disk": f"{told_bytes(self.bytes)} in {self.shards:,} shards",
        }
        return "\n".join(f"{name + ':':<11}{shown(text)}" for name, text in lines.items())


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of some rows, one row after another.

    Attributes:
        ids: of the rows.
        layers: which the residuals are of.
        residual: by layer, token and width.
        offsets: row i has the tokens `offsets[i]` up to but not including `offsets[i + 1]`.
        token_ids, token_positions, token_roles, token_marks: as in `StoredRow`.
    """

    ids: tuple[str, ...]
    layers: tuple[int, ...]
    residual: Shaped[Tensor, "l t d"]
    offsets: Int64[Tensor, " n_1"]
    token_ids: Int64[Tensor, " t"]
    token_positions: Int64[Tensor, " t"]
    token_roles: UInt8[Tensor, " t"]
    token_marks: UInt8[Tensor, " t"]


@dataclass(frozen=True)
class MappedRows:
    """Rows of one shard at one layer and position.

    Attributes:
        lines: private map of the shard's tensor; a line is a token.
        at: line of each row.
        places: where the rows stand among all that were asked for, rising.
    """

    lines: Shaped[Tensor, "m d"]
    at: Int64[np.ndarray, " n"]
    places: Int64[np.ndarray, " n"]


class Store:
    """The rows and residuals of a store, as sealed when it was opened or last refreshed. Use `open_store`.

    Attributes:
        path: the folder.
        header: what all rows have in common.
        records: the sealed shards, in the order of sealing.
    """

    def __init__(self, path: Path, header: StoreHeader, manifest: Manifest) -> None:
        self.path = path
        self.header = header
        self.records = manifest.records
        self._shards: dict[int, Shard] = {}

    def __repr__(self) -> str:
        """Say where the store is and how much it holds."""
        return (
            f"Store({str(self.path)!r}, {len(self)} rows, {len(self.header.layers)} layers, width {self.header.width})"
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._row_base[-1])

    @property
    def rows(self) -> pd.DataFrame:
        """Return the table of rows, indexed by id, in the order of sealing. Missing values are null (`isna`)."""
        return self._frame.copy(deep=False)

    @cached_property
    def table(self) -> pa.Table:
        """Return the table of rows as Arrow has it, with the column `id`, in the order of sealing."""
        return join_tables([read_table(self.path, self.header, record) for record in self.records])

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Return the ids of all rows, in the order of sealing."""
        return tuple(self.table.column(ID).to_pylist())

    @property
    def content(self) -> str:
        """Return a hash of header and shards: what was computed of a store is known by it.

        The header alone would not do: activations of one model and shape need not be the same ones.
        """
        shards = sorted(record.shard_xxh128 for record in self.records)
        return xxhash.xxh3_128("".join((self.header.fingerprint, *shards)).encode()).hexdigest()

    def refresh(self) -> int:
        """Look for shards that were sealed since, or that a repair or compaction replaced; return how many rows more.

        Raises:
            StoreError: the store is damaged, or another one stands in its place.
        """
        before = len(self)
        header, manifest = _read(self.path)
        if header.fingerprint != self.header.fingerprint:
            raise StoreError(f"{self.path} is another store than the one that was opened; open it anew")
        if manifest.records != self.records:
            self.records = manifest.records
            self._shards.clear()
            for name, value in vars(type(self)).items():
                if isinstance(value, cached_property):
                    self.__dict__.pop(name, None)
        return len(self) - before

    @enough_memory()
    def layer(
        self, layer: int, position: str | None = None, rows: Iterable[str] | None = None
    ) -> Shaped[Tensor, "n d"]:
        """Return the residual stream after one layer.

        Where the tokens lie one after another in one shard the result is a private map of the file, read when touched;
        otherwise a copy, read in large pieces, several shards at once. Changing it in place changes neither the store
        nor what later calls return.

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
        index = self.header.layer_index(layer, self.path)
        parts = self.parts(rows)
        if position is None:
            jobs = token_jobs(parts, [layer_name(layer)])
        else:
            self._refuse_unmarked(parts, position)
            jobs = position_jobs(parts, index, layer_name(layer), self.header.position_index(position, self.path))
        if len(jobs) == 1 and jobs[0].consecutive:
            job = jobs[0]
            return job.shard.flat(job.names[0], int(job.lines[0]), int(job.lines[-1]) + 1)
        total = sum(len(job.lines) for job in jobs)
        result = fresh((1, total, self.header.width), self.header.torch_dtype)
        run_jobs(jobs, result)
        return result[0]

    @enough_memory()
    def mapped(self, layer: int, position: str, parts: Sequence[Part]) -> list[MappedRows]:
        """Map the residual stream after one layer at a position, shard by shard, and say which lines are whose.

        Nothing is read before it is touched, so rows that lie apart can be streamed without a copy of them all.

        Args:
            layer: one of `header.layers`.
            position: one of `header.positions`: the token so marked of each row.
            parts: the rows, from `parts`.

        Raises:
            StoreError: as `layer` does.
        """
        index = self.header.layer_index(layer, self.path)
        self._refuse_unmarked(parts, position)
        jobs = position_jobs(parts, index, layer_name(layer), self.header.position_index(position, self.path))
        found: list[MappedRows] = []
        for job in filter(lambda job: len(job.lines), jobs):
            first, last = int(job.lines.min()), int(job.lines.max())
            found.append(MappedRows(job.shard.flat(job.names[0], first, last + 1), job.lines - first, job.places))
        return found

    @enough_memory()
    def batch(
        self,
        rows: Iterable[str] | None = None,
        layers: Sequence[int] | None = None,
        position: str | None = None,
    ) -> TokenBatch:
        """Return all tokens of some rows at some layers, read in large pieces.

        Args:
            rows: ids, in the order wanted; all rows in the order of sealing by default.
            layers: some of `header.layers`, in the order wanted; all by default.
            position: one of `header.positions`: only the tokens so marked, as many as each row has.

        Raises:
            StoreError: a row, layer or position is not in the store, or a file is damaged.
        """
        group = None if position is None else self.header.position_index(position, self.path)
        chosen = tuple(self.header.layers if layers is None else layers)
        for layer in chosen:
            self.header.layer_index(layer, self.path)
        rows = rows if rows is None else [rows] if isinstance(rows, str) else list(rows)
        parts = self.parts(rows)
        jobs = token_jobs(parts, [layer_name(layer) for layer in chosen], group)
        total = sum(len(job.lines) for job in jobs)
        residual = fresh((len(chosen), total, self.header.width), self.header.torch_dtype)
        run_jobs(jobs, residual)
        numbers, codes = torch.empty(2, total, dtype=torch.int64), torch.empty(2, total, dtype=torch.uint8)
        for out, kinds in ((numbers, TOKEN_TENSORS[:2]), (codes, TOKEN_TENSORS[2:])):
            run_jobs([replace(job, names=kinds) for job in jobs], out[..., None])
        return TokenBatch(
            self.ids if rows is None else tuple(rows),
            chosen,
            residual,
            torch.from_numpy(token_offsets(parts, group)),
            *numbers,
            *codes,
        )

    @enough_memory()
    def row(self, id: str) -> StoredRow:
        """Return one row: its columns and the residuals of all its tokens, `[l t d]`.

        Raises:
            StoreError: there is no such row, or a file is damaged.
        """
        (part,) = self.parts([id])
        (columns,) = plain_rows(self.table.slice(self._number_of[id], 1), self.path)
        return shard_row(part.shard, self.header, int(part.rows[0]), columns)

    @enough_memory()
    def moments(self, layer: int, position: str | None = None) -> Moments:
        """Return count, mean and variance of the residuals after a layer.

        Args:
            layer: one of `header.layers`.
            position: one of `header.positions`: as taken while they were written, without a pass over the data. Of all
                tokens they are taken now.

        Raises:
            StoreError: the layer or position is not in the store, or a file is damaged.
        """
        index = self.header.layer_index(layer, self.path)
        group = None if position is None else self.header.position_index(position, self.path)
        return combine(
            (self._moments(shard, index, group) for shard in map(self._shard, self.records)), self.header.width
        )

    def _moments(self, shard: Shard, layer: int, position: int | None) -> Moments:
        if position is not None and "moments.count" in shard.tensors:
            line = position * len(self.header.layers) + layer
            mean, std = (shard.flat(name, line, line + 1)[0].double() for name in ("moments.mean", "moments.std"))
            count = int(shard.read("moments.count")[position])
            if not 0 <= count <= shard.tokens:
                raise StoreError(f"{shard.path} is damaged: its moments are those of {count} tokens")
            return Moments(count, mean, std.square())
        x = shard.tensor(layer_name(self.header.layers[layer]))
        if position is None:
            return Moments(len(x), *alike(x))
        return moments(x, np.flatnonzero(shard.marks >> position & 1))

    def info(self) -> StoreInfo:
        """Return what the store holds."""
        table = self.table
        text = "setting" in table.column_names and pa.types.is_string(table.schema.field("setting").type)
        settings = Counter(table.column("setting").to_pylist()) if text else {}
        return StoreInfo(
            path=self.path,
            format=VERSION,
            model=self.header.model,
            rows=table.num_rows,
            errors=table.num_rows - table.column("error").null_count if "error" in table.column_names else 0,
            tokens=sum(record.tokens for record in self.records),
            layers=self.header.layers,
            width=self.header.width,
            dtype=self.header.dtype,
            positions=self.header.positions,
            shards=len(self.records),
            bytes=sum(record.shard_bytes + record.rows_bytes for record in self.records),
            settings={str(name): count for name, count in settings.items() if name is not None},
        )

    def verify(self) -> list[Problem]:
        """Return what is wrong with the store now, nothing when it is sound. Reads every byte."""
        return verify_store(self.path)

    def _shard(self, record: ShardRecord) -> Shard:
        if record.shard not in self._shards:
            self._shards[record.shard] = open_shard(self.path / shard_name(record.shard), self.header, record)
        return self._shards[record.shard]

    @cached_property
    def _frame(self) -> pd.DataFrame:
        table = self.table.drop_columns([ID])
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
        return np.cumsum([0] + [record.rows for record in self.records], dtype=np.int64)

    def parts(self, rows: Iterable[str] | None = None) -> list[Part]:
        """Return which rows of which shards are asked for, shard by shard.

        Args:
            rows: ids, in the order wanted; all rows in the order of sealing by default.

        Raises:
            StoreError: a row is not in the store.
        """
        if rows is None:
            return [
                Part(self._shard(record), base, np.arange(record.rows), np.arange(record.rows) + base)
                for record, base in zip(self.records, self._row_base.tolist(), strict=False)
                if record.rows
            ]
        wanted = [rows] if isinstance(rows, str) else list(rows)
        numbers = np.array([self._number_of.get(id_, -1) for id_ in wanted], dtype=np.int64)
        if len(missing := np.flatnonzero(numbers < 0)):
            first = wanted[missing[0]]
            raise StoreError(f"{self.path} has no row {first!r:.80} ({len(missing)} of {len(wanted)} are missing)")
        at = np.searchsorted(self._row_base, numbers, side="right") - 1
        return [
            Part(self._shard(self.records[i]), int(self._row_base[i]), numbers[here] - self._row_base[i], here)
            for i in np.unique(at).tolist()
            for here in [np.flatnonzero(at == i)]
        ]

    def _refuse_unmarked(self, parts: Sequence[Part], position: str) -> None:
        """Raise StoreError unless every row has exactly one token at the position."""
        index = self.header.position_index(position, self.path)
        wrong = [(place, id_, count) for part in parts for place, id_, count in self._unmarked(part, index)]
        if wrong:
            _, id_, count = min(wrong)
            raise StoreError(
                f"{self.path}: row {id_!r:.80} has {count} tokens at {position!r} ({len(wrong)} of "
                f"{sum(len(part.rows) for part in parts)} rows have not exactly one). Leave such rows out through "
                "`rows`, or read all such tokens with `batch`."
            )

    def _unmarked(self, part: Part, index: int) -> list[tuple[int, str, int]]:
        counts = part.shard.marked(index)[1][part.rows]
        wrong = np.flatnonzero(counts != 1)
        return [(int(part.places[i]), self.ids[part.base + int(part.rows[i])], int(counts[i])) for i in wrong]


def open_store(path: str | Path) -> Store:
    """Open a store for reading, whatever its size, in milliseconds; rows and residuals are read when asked for.

    Raises:
        StoreError: there is no store, or it is damaged or of a newer format version.
    """
    path = Path(path)
    return Store(path, *_read(path))


def _read(path: Path) -> tuple[StoreHeader, Manifest]:
    header, manifest = read_header(path), read_manifest(path)
    mend = "Run `gapprobe store verify`; opening the store for writing seals them again."
    manifest.warn_of_damage(str(path), mend, stacklevel=3)
    return header, manifest


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
