"""Joining small shards that follow one another into larger ones. Rows, their order and their bits stay as they are.

Old files are left for readers that have the store open; `clearing` takes them away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from gapprobe.errors import StoreError
from gapprobe.files import as_output_error, require_room, told_bytes
from gapprobe.store import disk, sealing
from gapprobe.store.arena import MAX_ROWS, Arena, token_bytes
from gapprobe.store.care.alone import alone
from gapprobe.store.care.examining import examine
from gapprobe.store.format import ROWS, SHARDS, ShardRecord, StoreHeader, rows_name, shard_name
from gapprobe.store.manifest import read_header, read_manifest
from gapprobe.store.packing import derive
from gapprobe.store.progress import Bar
from gapprobe.store.table import decode_table, encode_table, join_tables


@dataclass(frozen=True)
class Compaction:
    """What a compaction did: shards before and after, and the bytes of old files, which `gapprobe store gc` frees."""

    path: Path
    before: int
    after: int
    old_bytes: int

    def __str__(self) -> str:
        """Return one line."""
        if not self.old_bytes:
            return f"{self.path}: already compact, {self.before:,} shards"
        return (
            f"{self.path}: {self.before:,} shards became {self.after:,}; {told_bytes(self.old_bytes)} of old files "
            f"stay for programs that have the store open, until: gapprobe store gc {self.path}"
        )


def compact_store(path: str | Path, shard_bytes: int = 256 << 20, progress: bool = True) -> Compaction:
    """Join neighbouring shards that are smaller than half of `shard_bytes` into shards of up to `shard_bytes`.

    Rows keep their order and their bits. Shards made by other versions of packages are not joined. Everything is
    checked before it is copied. Writers go on meanwhile: the lock is held only while a new shard takes the place of
    those it was made of, in one step. Killed at any moment, the store holds the same rows; compact again to go on.

    Args:
        path: the folder.
        shard_bytes: size of a shard; takes one and a half times as much memory.
        progress: show a bar when it takes longer than a moment.

    Raises:
        StoreError: the store is damaged (repair it first), or its file system has no locks.
        OutputError: the disk has not enough room for the new shards beside the old ones.
    """
    path = Path(path)
    header = read_header(path)
    with alone(path, "it cannot be compacted"):
        manifest = read_manifest(path)
        for folder in (path, path / SHARDS, path / ROWS):
            disk.clear_temporaries(folder)
    if manifest.damaged:
        raise StoreError(f"{path}: line {manifest.damaged[0]} of its manifest is damaged. {_mend(path)}")
    groups = list(_groups(header, manifest.records, max(1, shard_bytes // token_bytes(header))))
    size = sum(_bytes(group) for group in groups)
    require_room(path, size, "compacting it", "Free some space; old shards are kept until the new ones are sealed.")
    arena = Arena(header, max((sum(record.tokens for record in group) for group in groups), default=0))
    joined = old = 0
    with Bar(f"compact {path.name}", size, progress) as bar:
        for group in groups:
            if _join(path, header, group, arena):
                joined += len(group) - 1
                old += _bytes(group)
            bar.update(_bytes(group))
    return Compaction(path, len(manifest.records), len(manifest.records) - joined, old)


def _bytes(group: Sequence[ShardRecord]) -> int:
    return sum(record.shard_bytes + record.rows_bytes for record in group)


def _mend(path: Path) -> str:
    return f"Run `gapprobe store repair {path}` first."


def _groups(header: StoreHeader, records: Sequence[ShardRecord], capacity: int) -> Iterator[list[ShardRecord]]:
    """Return the shards to join, each group into one. No two shards that are left could be joined."""
    group: list[ShardRecord] = []
    tokens = rows = 0
    for record in records:
        small = 2 * record.tokens < capacity and 2 * record.rows < MAX_ROWS
        full = tokens + record.tokens > capacity or rows + record.rows > MAX_ROWS
        if group and (not small or full or group[-1].made_with(header) != record.made_with(header)):
            if len(group) > 1:
                yield group
            group, tokens, rows = [], 0, 0
        if small:
            group.append(record)
            tokens, rows = tokens + record.tokens, rows + record.rows
    if len(group) > 1:
        yield group


def _join(path: Path, header: StoreHeader, group: Sequence[ShardRecord], arena: Arena) -> bool:
    """Make one shard of several; return False when it would be too large, or one has been replaced meanwhile."""
    arena.clear()
    tables: list[pa.Table] = []
    for record in group:
        found = examine(path, header, record, keep=True)
        if found.fault:
            if record not in read_manifest(path).records:
                return False
            raise StoreError(f"{path / shard_name(record.shard)}: {found.fault}. {_mend(path)}")
        if found.held is not None and found.table is not None:
            found.held.pour(header, found.ids, np.arange(record.rows), arena)
            tables.append(decode_table(found.table, path / rows_name(record.shard), record.rows))
    if len(set(arena.ids)) < arena.rows:
        raise StoreError(f"{path} holds a row twice. {_mend(path)}")
    joined = join_tables(tables)
    try:
        table = encode_table(joined)
    except StoreError:
        return False
    with (
        as_output_error(f"{path}: it cannot be compacted", lambda: "All rows are where they were."),
        sealing.packed(path, header, arena, derive(header, arena), table, group[0].versions) as (shard, rows, new),
        alone(path, "it cannot be compacted"),
    ):
        records = {record.shard: record for record in read_manifest(path).records}
        if any(records.get(record.shard) != record for record in group):
            return False
        number = sealing.publish(path, shard, rows, records.keys())
        # The first of them gives its place, the others go.
        records[group[0].shard] = replace(new, shard=number)
        for record in group[1:]:
            del records[record.shard]
        try:
            sealing.replace_manifest(path, list(records.values()))
        except OSError:
            sealing.remove(path, number)
            raise
    return True
