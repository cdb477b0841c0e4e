"""Writing a store: rows are gathered in memory up to a shard's size, then sealed so that a kill loses no sealed row.

The order of the steps of sealing is the guarantee; `docs/store-format.md` explains it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import cast

import pyarrow as pa
import torch
from jaxtyping import Shaped
from torch import Tensor

from gapprobe.errors import OutputError, StoreError
from gapprobe.files import as_output_error, sync_folder
from gapprobe.store import disk, sealing
from gapprobe.store.arena import MAX_COLUMN_BYTES, Arena, table_bytes, token_bytes
from gapprobe.store.format import (
    LOCK_FILE,
    MANIFEST_FILE,
    ROWS,
    SHARDS,
    STORE_FILE,
    ShardRecord,
    StoredRow,
    StoreHeader,
    check_id,
    rows_name,
    shard_name,
)
from gapprobe.store.homes import Homes
from gapprobe.store.manifest import listed_numbers, read_header, read_manifest
from gapprobe.store.packing import derive
from gapprobe.store.shard import file_xxh128, open_shard
from gapprobe.store.table import (
    ID,
    build_table,
    decode_table,
    encode_table,
    kind_of,
    merge_schemas,
    read_table,
    row_schema,
    shard_rows,
)

_TOKEN_DTYPES = {
    "token_ids": (torch.int64, torch.int32),
    "token_positions": (torch.int64, torch.int32),
    "token_roles": (torch.uint8,),
    "token_marks": (torch.uint8,),
}


class StoreWriter:
    """Appends rows to the store at `path`, which is made if there is none. Several may append to one store at once.

    Rows are copied into memory; a full shard is sealed by a thread in the background while the next one fills. What an
    earlier, killed writer left is adopted where it is whole and cleared away where it is not.

    Args:
        path: folder of the store.
        header: what the rows have in common; must agree with that of an existing store.
        shard_bytes: a shard is sealed before it grows past this. The writer takes at most twice as much memory, one
            shard filling and one being written, or twice the largest batch; and 12 MB for what is on its way to the
            disk.

    Raises:
        StoreError: the store belongs to another run, has another format, or is damaged.
        OutputError: the folder holds something else, or cannot be written.
    """

    def __init__(self, path: str | Path, header: StoreHeader, shard_bytes: int = 256 << 20) -> None:
        self.path = Path(path)
        self.header = header
        # Held for what the thread changes and callers read.
        self._guard = threading.Lock()
        self._ids: set[str] = set()
        self._numbers: set[int] = set()
        self._manifest: tuple[int, int] | None = None
        self._schema = pa.schema([(ID, pa.string())])
        self._types: dict[str, set[pa.DataType]] = {}
        self._kinds: dict[str, set[object]] = {}
        self._capacity = max(1, shard_bytes // token_bytes(header))
        self._full: Arena | None = None
        self._spare: Arena | None = None
        self._taken: set[str] = set()
        self._thread = ThreadPoolExecutor(1, "gapprobe-store")
        self._sealing: Future[None] | None = None
        self._closed = False
        with self._failing("the store cannot be opened for writing"):
            self._filling = Arena(header, self._capacity)
            stored = _create(self.path, header)
            stored.refuse_difference(header, str(self.path))
            self._stored_versions = stored.versions
            with self._locked() as locked:
                self._refresh()
                if locked:
                    self._recover()

    @property
    def ids(self) -> frozenset[str]:
        """Return the ids of all sealed rows that this writer knows of: as of its last sealing, or its opening."""
        with self._guard:
            return frozenset(self._ids)

    def append(self, rows: Sequence[StoredRow]) -> int:
        """Take a batch of rows, all of which land in one shard. Rows whose id is stored or taken already are left out.

        The tensors are copied. Rows are safe once sealed: after `flush` or `close`, or in time when a shard is full.

        Returns:
            How many rows were new.

        Raises:
            StoreError: a row does not fit the header, or a column changes its type.
            OutputError: an earlier shard could not be written. Its rows are still in hand; this batch was not taken.
        """
        self._refuse_closed()
        new: dict[str, StoredRow] = {}
        for row in rows:
            self._check(row)
            if row.id not in self._taken and row.id not in self._ids:
                new.setdefault(row.id, row)
        if not new:
            return 0
        batch = list(new.values())
        self._check_columns(batch)
        if not self._filling.fits(batch):
            if table_bytes(batch) > MAX_COLUMN_BYTES:
                raise StoreError(f"the columns of {len(batch)} rows take more than {MAX_COLUMN_BYTES >> 20} MiB")
            self._make_room(sum(len(row.token_ids) for row in batch))
        self._filling.add(batch)
        self._taken |= new.keys()
        if self._filling.full and self._idle:
            self._hand_over()
        return len(batch)

    def place(self, tokens: int) -> Shaped[Tensor, "l t d"]:
        """Return memory for the residuals of the next batch, which `append` takes without a copy.

        Rows that are views of it, one after another from its first token, are left where they are; any others, or in
        another order, are copied as ever. It is the caller's until the next `append`, `place` or `flush`.

        Args:
            tokens: of all rows together.

        Raises:
            StoreError: the writer is closed, or the number is negative.
            OutputError: an earlier shard could not be written. Its rows are still in hand.
        """
        self._refuse_closed()
        if tokens < 0:
            raise StoreError(f"tokens is {tokens}; give 0 or more")
        if self._filling.tokens + tokens > self._filling.capacity:
            self._make_room(tokens)
        return self._filling.place(tokens)

    def flush(self, wait: bool = True) -> None:
        """Seal the rows in hand. After an OutputError they are still in hand, and flushing again is sound.

        Args:
            wait: until they are safe; otherwise sealing goes on in the background, and only an earlier shard is waited
                for.

        Raises:
            OutputError: they could not be written; names the reason.
        """
        self._settle()
        if self._filling.rows:
            self._hand_over()
        if wait:
            self._settle()

    def close(self) -> None:
        """Seal the rows in hand. After an OutputError they are still in hand, and closing again is sound."""
        self.flush()
        self._shut()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Seal the rows in hand, also when the caller failed; not when the failure was ours to write."""
        try:
            if not isinstance(error, OutputError):
                self.flush()
        finally:
            self._shut()

    def _shut(self) -> None:
        self._closed = True
        self._thread.shutdown()

    def adopt(self, file: Path, record: ShardRecord) -> int:
        """Seal a shard that was written elsewhere, with the same header, under a number that is free here.

        Args:
            file: the shard, on the file system of the store; it stays where it is.
            record: its line in the manifest that it comes from.

        Returns:
            How many of its rows were new.

        Raises:
            StoreError: it is damaged or not of such a store, or a column has another type there.
            OutputError: it could not be sealed.
        """
        shard = open_shard(file, self.header, record)
        if file_xxh128(file) != record.shard_xxh128:
            raise StoreError(f"{file} is damaged: its checksum is not that of the manifest it came with")
        content = shard.table()
        if hashlib.sha256(content).hexdigest() != record.rows_sha256:
            raise StoreError(f"{file} is damaged: its table of rows is not that of the manifest it came with")
        table = decode_table(content, file, record.rows)
        self._settle()
        versions = self.header.versions if record.versions is None else record.versions
        ids = cast(list[str], table.column(ID).to_pylist())
        for id_ in ids:
            check_id(id_)
        with (
            self._failing(f"{record.rows} rows could not be stored"),
            sealing.new_rows_file(self.path, content) as rows_file,
        ):
            disk.sync(file)
            with self._locked() as locked:
                self._refresh()
                whole = self._taken.isdisjoint(ids) and self._ids.isdisjoint(ids)
                if whole:
                    self._learn_schema(table.schema)
                    number = sealing.publish(self.path, file, rows_file, self._numbers)
                    self._record(replace(record, shard=number), versions, locked)
                    self._learn(number, ids)
        # One by one: all of a compacted shard may be more than a batch may have.
        return record.rows if whole else sum(self.append([row]) for row in shard_rows(shard, self.header, table))

    @property
    def _idle(self) -> bool:
        """Return whether the thread could take a shard now, and nothing went wrong with the one before."""
        if self._sealing is None:
            return self._full is None
        return self._sealing.done() and self._sealing.exception() is None

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError(f"{self.path}: this writer is closed; open another one")

    def _make_room(self, tokens: int) -> None:
        """Hand over the rows in hand, and have room for a batch, even one larger than a shard."""
        if self._filling.rows:
            self._hand_over()
        if tokens > self._filling.capacity:
            self._filling = Arena(self.header, tokens)

    def _hand_over(self) -> None:
        """Have the thread seal the rows in hand, once it is done with those before."""
        # Here rather than in the thread, which may still have the disk to wait for.
        derived = derive(self.header, self._filling)
        self._settle()
        self._full = self._filling
        self._filling, self._spare = self._spare or Arena(self.header, self._capacity), None
        self._sealing = self._thread.submit(self._seal, self._full, derived)

    def _settle(self) -> None:
        """Wait until the rows handed over are sealed; try once more if that failed before."""
        if self._full is None:
            return
        if self._sealing is None:
            # The try that failed may have dropped rows that another writer was first with.
            self._sealing = self._thread.submit(self._seal, self._full, derive(self.header, self._full))
        try:
            self._sealing.result()
        except Exception:
            self._sealing = None
            raise
        arena, self._full, self._sealing = self._full, None, None
        arena.clear()
        self._taken = set(self._filling.ids)
        # A batch larger than a shard made this one; its memory is not kept.
        self._spare = arena if arena.capacity == self._capacity else None

    def _seal(self, arena: Arena, derived: Mapping[str, Tensor]) -> None:
        """Write rows to temporaries, then publish them; begin anew without those that another writer was first with."""
        while arena.rows:
            with (
                self._failing(f"{arena.rows} rows could not be stored"),
                sealing.packed(
                    self.path, self.header, arena, derived, encode_table(build_table(arena.ids, arena.columns))
                ) as (shard, rows_file, record),
                self._locked() as locked,
            ):
                self._refresh()
                again = self._ids.intersection(arena.ids)
                if not again:
                    number = sealing.publish(self.path, shard, rows_file, self._numbers)
                    self._record(replace(record, shard=number), self.header.versions, locked)
                    self._learn(number, arena.ids)
                    return
            arena.drop(again)
            derived = derive(self.header, arena)

    def _record(self, record: ShardRecord, versions: Mapping[str, str], locked: bool) -> None:
        """Seal a published shard. Another torch is no reason to refuse, but the rows it made must be told apart."""
        noted = None if versions == self._stored_versions else versions
        sealing.record(self.path, replace(record, versions=noted), locked)
        # Without a lock, another writer's line may have come before ours, unread.
        self._manifest = self._stamp() if locked else None

    def _refresh(self) -> None:
        """Learn of the shards that other writers have sealed."""
        stamp = self._stamp()
        if stamp == self._manifest:
            return
        for record in read_manifest(self.path).records:
            if record.shard not in self._numbers:
                table = read_table(self.path, self.header, record)
                self._learn_schema(table.schema)
                self._learn(record.shard, table.column(ID).to_pylist())
        self._manifest = stamp

    def _stamp(self) -> tuple[int, int] | None:
        """Return what tells whether the manifest has changed: it only grows, or is replaced by another file."""
        with suppress(FileNotFoundError):
            status = (self.path / MANIFEST_FILE).stat()
            return status.st_ino, status.st_size
        return None

    def _learn(self, number: int, ids: Iterable[str]) -> None:
        with self._guard:
            self._ids.update(ids)
            self._numbers.add(number)

    def _learn_schema(self, *schemas: pa.Schema) -> None:
        with self._guard:
            self._schema = merge_schemas(self._schema, *schemas)

    def _recover(self) -> None:
        """Clear up behind writers that died. Under the lock, so no live writer is between publishing and recording."""
        for folder in (self.path, self.path / SHARDS, self.path / ROWS):
            disk.clear_temporaries(folder)
        disk.cut_torn_line(self.path / MANIFEST_FILE)
        for number in sorted(listed_numbers(self.path) - self._numbers):
            shard = self.path / shard_name(number)
            # A writer publishes the shard, then the rows; of an empty claim, or rows alone, nothing can be told.
            if not shard.exists() or not shard.stat().st_size:
                sealing.remove(self.path, number)
                continue
            # Whatever else is wrong with a shard is no killed writer's work: it stays, for `verify` to name.
            with suppress(StoreError):
                self._adopt_published(number)

    def _adopt_published(self, number: int) -> None:
        """Record a shard that its writer did not live to record; remove it when its rows were stored again."""
        path = self.path / shard_name(number)
        shard = open_shard(path, self.header)
        content = shard.table()
        table = decode_table(content, path, shard.rows)
        ids = table.column(ID).to_pylist()
        if self._ids.issuperset(ids):
            if not Homes(self.path, self.header, read_manifest(self.path).records).why_needed(number):
                sealing.remove(self.path, number)
        elif self._ids.isdisjoint(ids) and not shard.damaged_blocks() and shard.offsets[-1] == shard.tokens:
            self._learn_schema(table.schema)
            rows = self.path / rows_name(number)
            if disk.read_small(rows, len(content)) != content:
                with sealing.new_rows_file(self.path, content) as temporary:
                    os.replace(temporary, rows)
            for folder in (SHARDS, ROWS):
                sync_folder(self.path / folder)
            checksum = hashlib.sha256(content).hexdigest()
            size, digest = path.stat().st_size, file_xxh128(path)
            record = ShardRecord(number, shard.rows, shard.tokens, size, digest, len(content), checksum)
            self._record(record, self.header.versions, locked=True)
            self._learn(number, ids)

    def _check(self, row: StoredRow) -> None:
        """Raise StoreError unless the row fits the header."""
        where, header = f"row {row.id!r:.80}", self.header
        check_id(row.id)
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

    def _check_columns(self, batch: Sequence[StoredRow]) -> None:
        """Raise StoreError unless each column keeps its type; learn new ones."""
        found: set[pa.Field] = set()
        kinds: set[tuple[str, object]] = set()
        for row in batch:
            each = {name: kind_of(value) for name, value in row.columns.items()}
            new = {name: row.columns[name] for name, kind in each.items() if kind not in self._kinds.get(name, ())}
            found.update(field for field in row_schema(new) if field.type not in self._types.get(field.name, ()))
            kinds.update((name, each[name]) for name in new if each[name] is not None)
        if found:
            self._learn_schema(*(pa.schema([field]) for field in found))
            for field in found:
                self._types.setdefault(field.name, set()).add(field.type)
        for name, kind in kinds:
            self._kinds.setdefault(name, set()).add(kind)

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
    sealing.refuse_links(path)
    for folder in (SHARDS, ROWS):
        (path / folder).mkdir(exist_ok=True)
    sync_folder(path)
    return stored
