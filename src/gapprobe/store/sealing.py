"""Making a shard and publishing it: the steps after which its rows are safe. All that write to a store share them.

The order of the steps is the guarantee; `docs/store-format.md` explains it. All of them happen under the store's lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from gapprobe.errors import StoreError
from gapprobe.files import sync_folder
from gapprobe.store import disk
from gapprobe.store.arena import Arena
from gapprobe.store.format import (
    DAMAGED,
    LOCK_FILE,
    MANIFEST_FILE,
    MAX_SHARD_NUMBER,
    ROWS,
    SHARDS,
    ShardRecord,
    StoreHeader,
    rows_name,
    shard_name,
)
from gapprobe.store.manifest import read_manifest
from gapprobe.store.packing import write_shard


def refuse_links(store: Path) -> None:
    """Raise StoreError where writing would leave the folder of the store. Links to single shards are only read."""
    for name in (MANIFEST_FILE, LOCK_FILE, SHARDS, ROWS, DAMAGED):
        if (store / name).is_symlink():
            raise StoreError(f"{store}: {name} is a symbolic link; nothing is written through it. Copy the store.")


@contextmanager
def new_rows_file(store: Path, table: bytes) -> Generator[Path, None, None]:
    """Write a table of rows to a temporary, synced; yield its path."""
    with disk.temporary(store / ROWS) as (path, descriptor):
        disk.write_all(descriptor, memoryview(table), 0)
        os.fsync(descriptor)
        yield path


@contextmanager
def packed(
    store: Path,
    header: StoreHeader,
    arena: Arena,
    derived: Mapping[str, Tensor],
    table: bytes,
    versions: Mapping[str, str] | None = None,
) -> Generator[tuple[Path, Path, ShardRecord], None, None]:
    """Write a shard and its table of rows to temporaries, synced; yield both and their record, without a number yet."""
    with disk.temporary(store / SHARDS) as (shard, descriptor), new_rows_file(store, table) as rows:
        size, digest = write_shard(descriptor, header, arena, derived, table)
        checksum = hashlib.sha256(table).hexdigest()
        yield shard, rows, ShardRecord(0, arena.rows, arena.tokens, size, digest, len(table), checksum, versions)


def publish(store: Path, shard: Path, rows: Path, taken: Collection[int]) -> int:
    """Give both files the next number after those taken. Linking is what makes a number ours, lock or no lock."""
    number = max(taken, default=-1) + 1
    while True:
        if number > MAX_SHARD_NUMBER:
            raise StoreError(f"{store} has no number left for another shard")
        if disk.publish(shard, store / shard_name(number)):
            try:
                if disk.publish(rows, store / rows_name(number)):
                    break
            except OSError:
                (store / shard_name(number)).unlink()
                raise
            (store / shard_name(number)).unlink()
        number += 1
    sync_folder(store / SHARDS)
    sync_folder(store / ROWS)
    return number


def record(store: Path, line: ShardRecord, locked: bool) -> None:
    """Append a line to the manifest, which seals the shard. Where there is no room for it, take the files back."""
    try:
        disk.append_line(store / MANIFEST_FILE, line.to_line(), locked)
    except OSError:
        with suppress(OSError):
            if line not in read_manifest(store).records:
                remove(store, line.shard)
        raise


def replace_manifest(store: Path, records: Sequence[ShardRecord]) -> None:
    """Make these the sealed shards, in one step. Only under a lock that excludes: another writer may be appending."""
    with disk.temporary(store) as (path, descriptor):
        disk.write_all(descriptor, memoryview(b"".join(line.to_line() for line in records)), 0)
        os.fsync(descriptor)
        os.rename(path, store / MANIFEST_FILE)
    sync_folder(store)


def remove(store: Path, number: int) -> None:
    """Remove an unrecorded pair, rows first: a number is free again only when its shard is gone."""
    (store / rows_name(number)).unlink(missing_ok=True)
    (store / shard_name(number)).unlink(missing_ok=True)
