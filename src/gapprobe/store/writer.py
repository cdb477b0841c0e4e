"""Writing a store: rows are gathered in memory up to a shard's size, then sealed so that a kill loses no sealed row.

The order of the steps of sealing is the guarantee; `docs/store-format.md` explains it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import cast

import pyarrow as pa
import torch
from torch import Tensor

from gapprobe.errors import OutputError, StoreError
from gapprobe.files import as_output_error, sync_folder
from gapprobe.store import disk
from gapprobe.store.format import (
    FORMAT,
    LOCK_FILE,
    MANIFEST_FILE,
    ROWS,
    SHARDS,
    STORE_FILE,
    VERSION,
    ShardRecord,
    StoredRow,
    StoreHeader,
    rows_name,
    shard_name,
)
from gapprobe.store.manifest import listed_numbers, read_header, read_manifest
from gapprobe.store.shard import file_sha256, open_shard, write_shard
from gapprobe.store.table import ID, build_table, decode_table, encode_table, merge_schemas, read_table

_TOKEN_DTYPES = {
    "token_ids": (torch.int64, torch.int32),
    "token_positions": (torch.int64, torch.int32),
    "token_roles": (torch.uint8,),
    "token_marks": (torch.uint8,),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class StoreWriter:
    """Appends rows to the store at `path`, which is made if there is none. Several may append to one store at once.

    What an earlier, killed writer left is adopted where it is whole and cleared away where it is not.

    Args:
        path: folder of the store.
        header: what the rows have in common; must agree with that of an existing store.
        shard_bytes: a shard is sealed before it grows past this; also the memory the writer takes.

    Raises:
        StoreError: the store belongs to another run, has a newer format, or is damaged.
        OutputError: the folder holds something else, or cannot be written.
    """

    def __init__(self, path: str | Path, header: StoreHeader, shard_bytes: int = 256 << 20) -> None:
        self.path = Path(path)
        self.header = header
        self.shard_bytes = shard_bytes
        self._ids: set[str] = set()
        self._numbers: set[int] = set()
        self._schema = pa.schema([(ID, pa.string())])
        self._pending: dict[str, StoredRow] = {}
        self._pending_bytes = 0
        with self._failing("the store cannot be opened for writing"):
            stored = _create(self.path, header)
            stored.refuse_difference(header, str(self.path))
            # Another torch is no reason to refuse, but the rows it made must be told apart.
            self._extra = {} if stored.versions == header.versions else {"versions": dict(header.versions)}
            with self._locked() as locked:
                self._refresh()
                if locked:
                    self._recover()

    @property
    def ids(self) -> frozenset[str]:
        """Return the ids of all sealed rows that this writer knows of: as of its last sealing, or its opening."""
        return frozenset(self._ids)

    def append(self, rows: Sequence[StoredRow]) -> int:
        """Take a batch of rows, all of which land in one shard. Rows whose id is stored or taken already are left out.

        The tensors are copied. They are safe once sealed: by `flush`, `close`, or when the shard is full.

        Returns:
            How many rows were new.

        Raises:
            StoreError: a row does not fit the header, or a column changes its type.
            OutputError: a shard could not be written.
        """
        new: dict[str, StoredRow] = {}
        for row in rows:
            self._check(row)
            if row.id not in self._ids and row.id not in self._pending:
                new.setdefault(row.id, row)
        batch = [_copied(row) for row in new.values()]
        if not batch:
            return 0
        self._schema = merge_schemas(self._schema, _table(batch).schema)
        size = sum(_bytes(row) for row in batch)
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self.flush()
        self._pending |= {row.id: row for row in batch}
        self._pending_bytes += size
        if self._pending_bytes >= self.shard_bytes:
            self.flush()
        return len(batch)

    def flush(self) -> None:
        """Seal the rows in hand. After an OutputError they are still in hand, and flushing again is sound.

        Raises:
            OutputError: they could not be written; names the reason.
        """
        while self._pending:
            with self._failing(f"{len(self._pending)} rows could not be stored"):
                self._seal(list(self._pending.values()))
            self._pending = {id_: row for id_, row in self._pending.items() if id_ not in self._ids}
            self._pending_bytes = sum(_bytes(row) for row in self._pending.values())

    def close(self) -> None:
        """Seal the rows in hand. Nothing else is held open."""
        self.flush()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Seal the rows in hand, also when the caller failed; not when the failure was ours to write."""
        if not isinstance(error, OutputError):
            self.flush()

    def _seal(self, rows: list[StoredRow]) -> None:
        """Write rows to temporaries, then publish them; publish nothing when another writer was first with a row."""
        table = encode_table(_table(rows))
        checksum = hashlib.sha256(table).hexdigest()
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "fingerprint": self.header.fingerprint,
            "rows_bytes": str(len(table)),
            "rows_sha256": checksum,
        }
        with (
            disk.temporary(self.path / SHARDS) as (shard, shard_descriptor),
            disk.temporary(self.path / ROWS) as (rows_file, rows_descriptor),
        ):
            size, digest = write_shard(shard_descriptor, self.header, rows, metadata)
            disk.write_all(rows_descriptor, memoryview(table), 0)
            os.fsync(rows_descriptor)
            with self._locked() as locked:
                self._refresh()
                if any(row.id in self._ids for row in rows):
                    return
                number = self._publish(shard, rows_file)
                tokens = sum(len(row.token_ids) for row in rows)
                self._record(ShardRecord(number, len(rows), tokens, size, digest, len(table), checksum), locked)
        self._ids |= {row.id for row in rows}
        self._numbers.add(number)

    def _publish(self, shard: Path, rows: Path) -> int:
        """Give both files the next free number. Linking is what makes a number ours, lock or no lock."""
        number = max(self._numbers | listed_numbers(self.path), default=-1) + 1
        while True:
            if disk.publish(shard, self.path / shard_name(number)):
                if disk.publish(rows, self.path / rows_name(number)):
                    break
                (self.path / shard_name(number)).unlink()
            number += 1
        sync_folder(self.path / SHARDS)
        sync_folder(self.path / ROWS)
        return number

    def _record(self, record: ShardRecord, locked: bool) -> None:
        """Append a line to the manifest. Where there is no room for it, take the files back."""
        try:
            disk.append_line(self.path / MANIFEST_FILE, record.to_line(self._extra), locked)
        except OSError:
            with suppress(OSError):
                if record not in read_manifest(self.path).records:
                    _remove(self.path, record.shard)
            raise

    def _refresh(self) -> None:
        """Learn of the shards that other writers have sealed."""
        for record in read_manifest(self.path).records:
            if record.shard not in self._numbers:
                table = read_table(self.path, record)
                self._ids.update(table.column(ID).to_pylist())
                self._schema = merge_schemas(self._schema, table.schema)
                self._numbers.add(record.shard)

    def _recover(self) -> None:
        """Clear up behind writers that died. Under the lock, so no live writer is between publishing and recording."""
        for folder in (self.path, self.path / SHARDS, self.path / ROWS):
            disk.clear_temporaries(folder)
        disk.cut_torn_line(self.path / MANIFEST_FILE)
        for number in sorted(listed_numbers(self.path) - self._numbers):
            shard, rows = self.path / shard_name(number), self.path / rows_name(number)
            # A writer publishes the shard, then the rows; with one alone, or an empty claim, nothing can be told of it.
            if not (shard.exists() and rows.exists() and shard.stat().st_size and rows.stat().st_size):
                _remove(self.path, number)
                continue
            # Whatever else is wrong with a pair is no killed writer's work: it stays, for `verify` to name.
            with suppress(StoreError):
                self._adopt(number)

    def _adopt(self, number: int) -> None:
        """Record a published pair that its writer did not live to record; remove it when its rows were stored again."""
        path = self.path / rows_name(number)
        shard = open_shard(self.path / shard_name(number), self.header)
        content = path.read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        if checksum != shard.metadata.get("rows_sha256") or len(shard.offsets) != shard.rows + 1:
            raise StoreError(f"{path} is not the table of shard {number}")
        table = decode_table(content, path, shard.rows)
        ids = set(table.column(ID).to_pylist())
        if ids <= self._ids:
            _remove(self.path, number)
        elif not ids & self._ids:
            schema = merge_schemas(self._schema, table.schema)
            size, digest = shard.path.stat().st_size, file_sha256(shard.path)
            for folder in (SHARDS, ROWS):
                sync_folder(self.path / folder)
            record = ShardRecord(number, shard.rows, shard.tokens, size, digest, len(content), checksum)
            disk.append_line(self.path / MANIFEST_FILE, record.to_line(self._extra), locked=True)
            self._ids |= ids
            self._numbers.add(number)
            self._schema = schema

    def _check(self, row: StoredRow) -> None:
        """Raise StoreError unless the row fits the header."""
        where, header = f"row {row.id!r:.80}", self.header
        if not row.id or _CONTROL.search(row.id) or not _encodable(row.id):
            raise StoreError(f"{where}: an id is text without control characters")
        if row.residual.dtype != header.torch_dtype:
            raise StoreError(f"{where}: its residual is {row.residual.dtype}; convert it to the store's {header.dtype}")
        tokens = len(row.token_ids)
        if row.residual.shape != (len(header.layers), tokens, header.width):
            raise StoreError(
                f"{where}: its residual has shape {tuple(row.residual.shape)}; {len(header.layers)} layers, "
                f"{tokens} tokens and width {header.width} were expected"
            )
        for name, kinds in _TOKEN_DTYPES.items():
            values = cast(Tensor, getattr(row, name))
            if values.shape != (tokens,) or values.dtype not in kinds:
                raise StoreError(
                    f"{where}: {name} is {values.dtype} of shape {tuple(values.shape)}; "
                    f"{tokens} of {' or '.join(map(str, kinds))} were expected"
                )
        if tokens and int(row.token_marks.max()) >> len(header.positions):
            raise StoreError(f"{where}: token_marks marks a position that the header does not name")

    def _locked(self) -> AbstractContextManager[bool]:
        return disk.exclusive(self.path / LOCK_FILE)

    def _failing(self, what: str) -> AbstractContextManager[None]:
        return as_output_error(f"{self.path}: {what}", lambda: f"All rows sealed before ({len(self._ids)}) are safe.")


def _create(path: Path, header: StoreHeader) -> StoreHeader:
    """Make the store unless there is one; return the header it has."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; a store is a folder. Choose another path.")
    path.mkdir(parents=True, exist_ok=True)
    if not (path / STORE_FILE).exists():
        ours = (disk.TEMPORARY, LOCK_FILE)
        foreign = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(ours))
        # Another writer may have made the store since we looked.
        if foreign and not (path / STORE_FILE).exists():
            raise OutputError(f"{path} holds {foreign[0]!r} and is no gapprobe store. Choose an empty or a new folder.")
        with disk.exclusive(path / LOCK_FILE), disk.temporary(path) as (file, descriptor):
            disk.write_all(descriptor, memoryview(header.to_json()), 0)
            os.fsync(descriptor)
            if not (path / STORE_FILE).exists():
                os.rename(file, path / STORE_FILE)
        sync_folder(path)
    stored = read_header(path)
    for folder in (SHARDS, ROWS):
        (path / folder).mkdir(exist_ok=True)
    sync_folder(path)
    return stored


def _remove(path: Path, number: int) -> None:
    """Remove an unrecorded pair, rows first: a number is free again only when its shard is gone."""
    (path / rows_name(number)).unlink(missing_ok=True)
    (path / shard_name(number)).unlink(missing_ok=True)


def _copied(row: StoredRow) -> StoredRow:
    """Return the row with tensors of its own, on the CPU: the caller's may change, or keep a whole batch in memory."""
    return replace(
        row,
        columns=dict(row.columns),
        residual=row.residual.detach().to("cpu", copy=True).contiguous(),
        token_ids=row.token_ids.to("cpu", torch.int64, copy=True),
        token_positions=row.token_positions.to("cpu", torch.int64, copy=True),
        token_roles=row.token_roles.to("cpu", copy=True),
        token_marks=row.token_marks.to("cpu", copy=True),
    )


def _table(rows: Sequence[StoredRow]) -> pa.Table:
    return build_table([row.id for row in rows], [row.columns for row in rows])


def _bytes(row: StoredRow) -> int:
    """Return how much of a shard the row takes."""
    return row.residual.numel() * row.residual.element_size() + 18 * len(row.token_ids) + 8


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
