"""Bringing the rows of several stores of one model together in one. Sources are only read.

Whole shards are taken over as they are, by a hard link where that is possible; rows one by one only where some of a
shard's rows are known already.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import cast

from gapprobe.errors import StoreError
from gapprobe.files import as_output_error, require_room
from gapprobe.store import disk
from gapprobe.store.format import MANIFEST_FILE, SHARDS, STORE_FILE, ShardRecord, StoreHeader, shard_name
from gapprobe.store.manifest import read_header, read_manifest
from gapprobe.store.progress import Bar
from gapprobe.store.reader import Store, open_store
from gapprobe.store.shard import TOKEN_TENSORS, as_bytes
from gapprobe.store.table import ID, read_table
from gapprobe.store.writer import StoreWriter

# Ids that capture makes are hashes of what a row was made from; others are a user's own.
_HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Merge:
    """What a merge did: how many rows of the sources were new to the target, and how many it had already."""

    target: Path
    new: int
    known: int

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.target}: {self.new:,} rows are new, {self.known:,} were there already"


@dataclass(frozen=True)
class _Part:
    """A shard of a source, and the versions of the packages that made it."""

    source: Path
    header: StoreHeader
    record: ShardRecord

    @property
    def file(self) -> Path:
        return self.source / shard_name(self.record.shard)

    @property
    def versions(self) -> Mapping[str, str]:
        return self.record.made_with(self.header)


def merge_stores(sources: Sequence[str | Path], target: str | Path, progress: bool = True) -> Merge:
    """Append all rows of some stores to one, which is made, with the header of the first, if there is none.

    Rows whose id the target has already are left out. Everything is checked on the way, and damaged shards are left
    out and named at the end. Others may append meanwhile. Stopped half-way, the same call goes on where it was.

    Args:
        sources: folders of stores; nothing in them is changed.
        target: folder of the store that gets the rows.
        progress: show a bar when it takes longer than a moment.

    Raises:
        StoreError: there is no such store; they differ in what one store must have in common (names the field); a
            column has another type; a row of the same id, where ids are not hashes of content, holds something else;
            or shards of a source are damaged (all others have been merged).
        OutputError: the target cannot be written, or its disk has not enough room.
    """
    target, paths = Path(target), [Path(source) for source in sources]
    headers = [read_header(path) for path in paths]
    if not paths:
        raise StoreError("there is nothing to merge; give one store or several")
    if any(path.resolve() == target.resolve() for path in paths):
        raise StoreError(f"{target} is to be merged into itself; give another target")
    first = read_header(target) if (target / STORE_FILE).exists() else headers[0]
    for path, header in zip(paths, headers, strict=True):
        told = header.differences(first, "in the one", "in the other")
        if told:
            raise StoreError(f"{path} cannot be merged into {target}: {told}. One store holds rows of one kind only.")
    parts: list[_Part] = []
    bad: list[str] = []
    for path, header in zip(paths, headers, strict=True):
        manifest = read_manifest(path)
        bad += [f"{path / MANIFEST_FILE}: line {number} is damaged" for number in manifest.damaged]
        parts += [_Part(path, header, record) for record in manifest.records]
    StoreWriter(target, first).close()
    taken = {record.shard_xxh128 for record in read_manifest(target).records}
    missing = [part for part in parts if part.record.shard_xxh128 not in taken]
    size = sum(part.record.shard_bytes for part in missing if _device(part.source) != _device(target))
    require_room(target, size, "merging into it", "Free some space, or choose another folder.")
    with Bar(f"merge into {target.name}", sum(part.record.shard_bytes for part in parts), progress) as bar:
        run = _Run(target, first, taken, bad, bar)
        for versions, group in groupby(parts, lambda part: part.versions):
            run.take(versions, group)
    if bad:
        told = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise StoreError(
            f"{len(bad)} parts could not be merged into {target}, all others were: {told}. Run `gapprobe store repair` "
            "on the damaged source and merge again."
        )
    return Merge(target, run.new, sum(part.record.rows for part in parts) - run.new)


def _device(path: Path) -> int:
    return path.stat().st_dev


class _Run:
    """One merge: what has been taken over so far. `taken` tells shards by their content."""

    def __init__(self, target: Path, header: StoreHeader, taken: set[str], bad: list[str], bar: Bar) -> None:
        self.target, self.header, self.taken, self.bad, self.bar = target, header, taken, bad, bar
        self.new = 0
        self._ids: set[str] = set()

    def take(self, versions: Mapping[str, str], parts: Iterator[_Part]) -> None:
        """Take over shards that the same versions made, so that it stays told of rows that end in a shard of ours."""
        with StoreWriter(self.target, replace(self.header, versions=versions)) as writer:
            self._ids.update(writer.ids)
            for part in parts:
                if part.record.shard_xxh128 not in self.taken:
                    try:
                        self.new += self._take(writer, part)
                        self.taken.add(part.record.shard_xxh128)
                    except StoreError as error:
                        self.bad.append(str(error))
                self.bar.update(part.record.shard_bytes)

    def _take(self, writer: StoreWriter, part: _Part) -> int:
        table = read_table(part.source, part.header, part.record, [ID])
        ids = set(cast(list[str], table.column(ID).to_pylist()))
        known = ids & self._ids
        own = sorted(id_ for id_ in known if not _HASH.fullmatch(id_))
        if own:
            writer.flush()
            _refuse_other_content(open_store(part.source), open_store(self.target), own)
        self._ids |= ids
        if len(known) == len(ids):
            return 0
        with (
            as_output_error(f"{part.file} cannot be taken over", lambda: "What is merged so far is safe."),
            _taken_over(part.file, self.target / SHARDS) as file,
        ):
            try:
                return writer.adopt(file, replace(part.record, versions=part.versions))
            except StoreError as error:
                self._ids -= ids - known
                # It knows the file by a name that is gone when somebody reads this.
                raise StoreError(f"{part.file} {str(error).removeprefix(f'{file} ')}") from error


def _refuse_other_content(source: Store, target: Store, ids: Sequence[str]) -> None:
    """Raise StoreError when rows of the same ids hold other tokens or residuals."""
    theirs, mine = source.batch(ids), target.batch(ids)
    differing = [
        name
        for name in ("offsets", "residual", *TOKEN_TENSORS)
        if bytes(as_bytes(getattr(theirs, name).contiguous())) != bytes(as_bytes(getattr(mine, name).contiguous()))
    ]
    if differing:
        raise StoreError(
            f"{source.path} and {target.path} both have rows {', '.join(map(repr, ids[:3]))}, with other content "
            f"({differing[0]}). Import one of them again with ids of its own."
        )


@contextmanager
def _taken_over(file: Path, folder: Path) -> Generator[Path, None, None]:
    """Yield a name for a file in another folder, linked or else copied; take it away at the end."""
    if not file.exists():
        raise StoreError(f"{file} is missing. Run `gapprobe store verify`.")
    with file.open("rb") as source:
        # The lock belongs to the file, whatever its names: it tells those who clear up that we live.
        with suppress(OSError):
            fcntl.flock(source, fcntl.LOCK_SH)
        linked = folder / f"{disk.TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            # Whoever clears up opens temporaries for writing.
            if not os.access(file, os.W_OK):
                raise PermissionError
            os.link(file, linked)
        except OSError:
            with disk.temporary(folder) as (copy, descriptor):
                with open(descriptor, "wb", closefd=False) as target:
                    shutil.copyfileobj(source, target, 8 << 20)
                yield copy
            return
        try:
            yield linked
        finally:
            linked.unlink(missing_ok=True)
