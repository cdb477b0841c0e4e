"""Publishing a shard: the steps after which its rows are safe. Writers and those who rearrange a store share them.

The order of the steps is the guarantee; `docs/store-format.md` explains it. All of them happen under the store's lock.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gapprobe.files import sync_folder
from gapprobe.store import disk
from gapprobe.store.format import MANIFEST_FILE, ROWS, SHARDS, ShardRecord, rows_name, shard_name
from gapprobe.store.manifest import listed_numbers, read_manifest


@contextmanager
def new_rows_file(store: Path, table: bytes) -> Generator[Path, None, None]:
    """Write a table of rows to a temporary, synced; yield its path."""
    with disk.temporary(store / ROWS) as (path, descriptor):
        disk.write_all(descriptor, memoryview(table), 0)
        os.fsync(descriptor)
        yield path


def publish(store: Path, shard: Path, rows: Path, taken: Collection[int]) -> int:
    """Give both files the next free number. Linking is what makes a number ours, lock or no lock."""
    number = max({*taken, *listed_numbers(store)}, default=-1) + 1
    while True:
        if disk.publish(shard, store / shard_name(number)):
            if disk.publish(rows, store / rows_name(number)):
                break
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
