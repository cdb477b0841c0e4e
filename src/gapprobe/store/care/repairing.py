"""Bringing a damaged store back to its largest consistent state; what is lost is named, to be captured again.

Damaged files are moved to `damaged/`, never deleted. Sound rows of a damaged shard move to a new one, which takes the
old one's place in the manifest in one step.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from gapprobe.errors import StoreError
from gapprobe.files import sync_folder, told_count, write_bytes
from gapprobe.store import disk, sealing
from gapprobe.store.arena import Arena
from gapprobe.store.care.alone import alone
from gapprobe.store.care.examining import Examined, examine, examine_all, examine_published
from gapprobe.store.care.verify import Problem, damaged_lines, problems_of, repeated
from gapprobe.store.format import (
    DAMAGED,
    FORMAT,
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    ROWS,
    ROWS_SUFFIX,
    SHARD_SUFFIX,
    SHARDS,
    STORE_FILE,
    VERSION,
    ShardRecord,
    StoreHeader,
    parse_json,
    rows_name,
    shard_name,
)
from gapprobe.store.manifest import Manifest, listed_numbers, read_header, read_manifest
from gapprobe.store.packing import derive
from gapprobe.store.shard import open_shard
from gapprobe.store.table import ID, decode_table, encode_table
from gapprobe.store.writer import StoreWriter

# Evidence in larger files is not worth its time: a manifest of so many bytes has some 200,000 shards.
_MOST_READ = 64 << 20


@dataclass(frozen=True)
class Repair:
    """What a repair found and did.

    Attributes:
        path: of the store.
        problems: what was wrong.
        moved: where damaged files lie now, by where they lay, both inside the store.
        saved: how many rows of damaged shards were kept.
        found: how many sound rows no line of the manifest spoke of.
        lost: ids of rows that are gone and must be captured again, as far as ids are known.
        lost_list: file inside the store that names them all, a line each.
        unnamed: how many rows are gone whose ids are lost too. A capture knows by itself what is missing.
        unread: how many files are gone of which nothing can be told, not even how many rows they held.
        nonfinite: ids of rows with NaN or infinite residuals, which are left as they are.
    """

    path: Path
    problems: tuple[Problem, ...]
    moved: Mapping[str, str]
    saved: int
    found: int
    lost: tuple[str, ...]
    lost_list: str | None
    unnamed: int
    unread: int
    nonfinite: tuple[str, ...]

    def __str__(self) -> str:
        """Return a line for each thing found and done."""
        if not self.problems:
            return f"{self.path}: sound, nothing to repair"
        lines = [
            f"{self.path}: {told_count(len(self.problems), 'problem')}",
            *(f"  {problem}" for problem in self.problems),
        ]
        if self.saved or self.found:
            lines.append(f"{self.saved:,} rows of damaged shards saved, {self.found:,} rows sealed that were not")
        if self.moved:
            lines.append(f"{told_count(len(self.moved), 'damaged file')} moved to {self.path / DAMAGED}")
        if self.nonfinite:
            lines.append(f"{len(self.nonfinite):,} rows with NaN or infinite residuals left as they are")
        gone = [f"{len(self.lost) + self.unnamed:,} rows"] if self.lost or self.unnamed else []
        gone += [f"{self.unread:,} files of unknown rows"] if self.unread else []
        if gone:
            named = f" ({', '.join(self.lost[:3])}{', …' if len(self.lost) > 3 else ''})" if self.lost else ""
            lines.append(f"lost: {' and '.join(gone)}{named}. Run the same capture again: it makes what is missing.")
            if self.lost_list:
                lines.append(f"all their ids: {self.path / self.lost_list}")
        else:
            lines.append("no row is lost")
        return "\n".join(lines)


def repair_store(path: str | Path, like: str | Path | None = None, progress: bool = True) -> Repair:
    """Bring a damaged store back to its largest consistent state.

    Rows that no damage touches are kept, bit for bit; those it does are dropped and named, and the next capture makes
    them anew. Tables of rows are rebuilt from shards and shards' own parts from the rest, lines of the manifest from
    the shards they named. A kill at any moment loses nothing that was sound; repair again. Afterwards `verify_store`
    finds nothing but rows that are not finite, which are left as they are.

    Args:
        path: the folder.
        like: a store of the same model and settings, whose store.json is taken where that of `path` is lost.
        progress: show a bar when it takes longer than a moment.

    Raises:
        StoreError: store.json is lost and `like` is not given or belongs to another run; the store has another
            format; a file may not be read; or the file system has no locks.
        OutputError: the disk cannot be written; what was sound is still sealed.
    """
    path = Path(path)
    run = _Run(path)
    header = run.header(like)
    manifest = _readable_manifest(path)
    # Sealed files never change, so that most of the reading needs no lock and writers go on meanwhile.
    records = () if manifest is None else manifest.records
    examined = {
        record.shard: (record, found)
        for record, found in zip(
            records, examine_all(path, header, records, f"repair {path.name}", progress), strict=True
        )
    }
    with alone(path, "it cannot be repaired"):
        run.repair(header, examined)
    with StoreWriter(path, header) as writer:
        sealed = writer.ids
    return Repair(
        path,
        tuple(run.problems),
        run.moved,
        run.saved,
        run.found,
        tuple(id_ for id_ in dict.fromkeys(run.lost) if id_ not in sealed),
        run.lost_list,
        run.unnamed,
        run.unread,
        tuple(run.nonfinite),
    )


class _Run:
    """One repair: what has been found and done so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.moved: dict[str, str] = {}
        self.saved = 0
        self.found = 0
        self.lost: list[str] = []
        self.lost_list: str | None = None
        self.unnamed = 0
        self.unread = 0
        self.nonfinite: list[str] = []
        self._hashes: set[str] = set()
        """What damaged lines of the manifest say still; a table that one of them fits is sound."""
        self.sealed: set[str] = set()
        """Ids of the rows that the new manifest seals, all of them sound."""

    def header(self, like: str | Path | None) -> StoreHeader:
        """Read store.json; where it is lost, write it anew as that of a store of the same run."""
        try:
            return read_header(self.path)
        except StoreError as error:
            if not (self.path / SHARDS).is_dir() or not self._header_is_damaged(error):
                raise
            if like is None:
                raise StoreError(
                    f"{error} It cannot be repaired from the store itself: what made the rows stands nowhere else. "
                    "Give a store of the same model and settings (capture one example into a new folder): "
                    f"gapprobe store repair {self.path} --like OTHER"
                ) from error
            header, told = read_header(Path(like)), str(error)
        if not any(self._fits(file, header) for file in sorted((self.path / SHARDS).glob(f"*{SHARD_SUFFIX}"))):
            raise StoreError(f"{like} is of another run: no shard of {self.path} has its fingerprint. Nothing done.")
        self.problems.append(Problem(STORE_FILE, told))
        with alone(self.path, f"{STORE_FILE} cannot be written"):
            if (self.path / STORE_FILE).exists():
                self._copy(STORE_FILE)
            with disk.temporary(self.path) as (file, descriptor):
                disk.write_all(descriptor, memoryview(header.to_json()), 0)
                os.fsync(descriptor)
                os.rename(file, self.path / STORE_FILE)
            sync_folder(self.path)
        return header

    def _header_is_damaged(self, error: StoreError) -> bool:
        """Return whether store.json is missing or damaged, not only of another version or not ours to read."""
        cause = error.__cause__
        if isinstance(cause, OSError):
            return isinstance(cause, FileNotFoundError) or cause.errno == errno.EIO
        try:
            fields = parse_json(disk.read_small(self.path / STORE_FILE, MAX_JSON_BYTES) or b"", STORE_FILE)
        except StoreError:
            return True
        version = fields.get("version")
        return fields.get("format") != FORMAT or not isinstance(version, int) or version == VERSION

    @staticmethod
    def _fits(file: Path, header: StoreHeader) -> bool:
        try:
            open_shard(file, header)
        except StoreError:
            return False
        return True

    def repair(self, header: StoreHeader, examined: Mapping[int, tuple[ShardRecord, Examined]]) -> None:
        """Do all that a writer's own recovery would not. Under the lock."""
        for folder in (SHARDS, ROWS):
            (self.path / folder).mkdir(exist_ok=True)
        listed = listed_numbers(self.path)
        manifest = _readable_manifest(self.path)
        if manifest is None:
            what = "cannot be read; it is made anew from the shards, but for the versions of packages that made them"
            self.problems.append(Problem(MANIFEST_FILE, what))
        else:
            self.problems += damaged_lines(manifest.damaged)
        broken = manifest is None or bool(manifest.damaged)
        if broken:
            text = disk.read_small(self.path / MANIFEST_FILE, _MOST_READ) or b""
            self._hashes = {found.decode() for found in re.findall(rb"[0-9a-f]{64}", text)}
        before = [] if manifest is None else manifest.records
        after: list[ShardRecord] = []
        retired: list[int] = []
        for record in before:
            known, found = examined.get(record.shard, (None, None))
            if found is None or known != record:
                found = examine(self.path, header, record)
            self._refuse_unreadable(found)
            self.problems += problems_of(found)
            again = tuple(id_ for id_ in found.ids if id_ in self.sealed)
            if again:
                self.problems.append(repeated(record.shard, again))
            if found.fault or again:
                retired.append(record.shard)
                after += self._save(header, examine(self.path, header, record, keep=True), record.versions)
            else:
                if found.table_fault:
                    self._rebuild(record, cast(bytes, found.table))
                after.append(record)
                self._keep(found, np.ones(record.rows, bool))
        for number in sorted(listed - {record.shard for record in before}):
            retired += self._look_at_published(header, number, after)
        if broken:
            self._copy(MANIFEST_FILE)
        if broken or after != list(before):
            self._list_lost()
            sealing.replace_manifest(self.path, after)
        for number in retired:
            self._retire(number)

    def _look_at_published(self, header: StoreHeader, number: int, after: list[ShardRecord]) -> list[int]:
        """Save what a shard that no line names holds alone; return it if a writer would neither adopt nor remove it."""
        shard, rows = self.path / shard_name(number), self.path / rows_name(number)
        table = self._proven_table(rows)
        if not shard.exists() or not shard.stat().st_size:
            if not rows.exists():
                return []
            self.problems.append(Problem(rows_name(number), "its shard and its line of the manifest are missing"))
            self._lose(table)
            return [number]
        found = examine_published(self.path, header, number, table)
        self._refuse_unreadable(found)
        if found.ids and self.sealed.issuperset(found.ids):
            return []
        if found.ids and not found.fault and self.sealed.isdisjoint(found.ids):
            self.problems.append(Problem(shard_name(number), "published but not sealed"))
            self._keep(found, ~found.damaged)
            self.found += len(found.ids)
            return []
        what = found.fault or "published but not sealed, with rows that another shard holds"
        self.problems.append(Problem(shard_name(number), what, found.ids_of(found.damaged)))
        if len(found.damaged):
            after += self._save(header, examine_published(self.path, header, number, table, keep=True), None)
        else:
            self._lose(table)
        return [number]

    def _proven_table(self, file: Path) -> bytes | None:
        """Return a table of rows whose line is damaged, if what is left of the line proves that it is sound."""
        content = disk.read_small(file, _MOST_READ) if self._hashes else None
        return content if content is not None and hashlib.sha256(content).hexdigest() in self._hashes else None

    def _lose(self, table: bytes | None) -> None:
        """Note all rows of a shard as lost."""
        try:
            self.lost += decode_table(table or b"", Path(ROWS), None, [ID]).column(ID).to_pylist()
        except StoreError:
            self.unread += 1

    def _save(self, header: StoreHeader, found: Examined, versions: Mapping[str, str] | None) -> list[ShardRecord]:
        """Publish the sound rows of a shard, as far as they are not sealed already, as a new one; return its record."""
        self._refuse_unreadable(found)
        new = np.array([id_ not in self.sealed for id_ in found.ids], bool)
        kept = ~found.damaged & new if found.held is not None and found.table is not None else found.damaged & False
        self.lost += found.ids_of(found.damaged)
        self.unnamed += 0 if found.ids else int(found.damaged.sum())
        self._keep(found, kept)
        if not kept.any() or found.held is None or found.table is None:
            return []
        table, rows = found.table, np.flatnonzero(kept)
        if len(rows) < len(kept):
            table = encode_table(decode_table(table, Path(rows_name(found.number)), len(kept)).take(rows))
        arena = Arena(header, found.held.tokens_of(rows))
        found.held.pour(header, found.ids, rows, arena)
        derived = derive(header, arena)
        with sealing.packed(self.path, header, arena, derived, table, versions) as (shard_file, rows_file, record):
            number = sealing.publish(self.path, shard_file, rows_file, listed_numbers(self.path))
        self.saved += len(rows)
        return [replace(record, shard=number)]

    def _keep(self, found: Examined, kept: NDArray[np.bool_]) -> None:
        self.sealed.update(found.ids_of(kept))
        self.nonfinite += found.ids_of(found.nonfinite & kept)

    def _refuse_unreadable(self, found: Examined) -> None:
        if found.unreadable:
            raise StoreError(
                f"{self.path / shard_name(found.number)}: {found.fault}. That is no damage that could be repaired; "
                "mend it and repair again. What is sound is still sealed."
            )

    def _rebuild(self, record: ShardRecord, table: bytes) -> None:
        """Write the file of a table of rows anew. Meanwhile readers take the shard's copy."""
        name = rows_name(record.shard)
        if (self.path / name).exists():
            self._move([name])
        with sealing.new_rows_file(self.path, table) as file:
            os.replace(file, self.path / name)
        sync_folder(self.path / ROWS)

    def _retire(self, number: int) -> None:
        # The shard last: a table of rows alone is what a writer's recovery takes for worthless.
        names = [name for name in (rows_name(number), shard_name(number)) if (self.path / name).exists()]
        if names:
            self._move(names)

    def _move(self, names: Sequence[str]) -> None:
        """Move the files of one shard to `damaged/`, under their number or, if that is taken, the next free one."""
        folder = self._folder()
        number = int(Path(names[0]).stem)
        while any((folder / f"{number:06d}{suffix}").exists() for suffix in (SHARD_SUFFIX, ROWS_SUFFIX)):
            number += 1
        for name in names:
            target = f"{DAMAGED}/{number:06d}{Path(name).suffix}"
            os.rename(self.path / name, self.path / target)
            self.moved[name] = target
        for touched in (folder, self.path / SHARDS, self.path / ROWS):
            sync_folder(touched)

    def _list_lost(self) -> None:
        """Write down what is lost before the manifest forgets it: a kill, or a closed terminal, must not."""
        lost = [id_ for id_ in dict.fromkeys(self.lost) if id_ not in self.sealed]
        if lost:
            self.lost_list = self._free("lost.txt")
            write_bytes(self.path / self.lost_list, "".join(f"{id_}\n" for id_ in lost).encode())

    def _free(self, name: str) -> str:
        """Return a path in `damaged/` that is not taken."""
        folder, (stem, suffix), number = self._folder(), name.split("."), 0
        while (folder / f"{stem}-{number:06d}.{suffix}").exists():
            number += 1
        return f"{DAMAGED}/{stem}-{number:06d}.{suffix}"

    def _copy(self, name: str) -> None:
        """Keep what store.json or the manifest said."""
        target = self._free(name)
        try:
            os.link(self.path / name, self.path / target)
        except OSError:
            # No hard links here.
            write_bytes(self.path / target, (self.path / name).read_bytes())
        sync_folder(self.path / DAMAGED)
        self.moved[name] = target

    def _folder(self) -> Path:
        folder = self.path / DAMAGED
        if not folder.exists():
            folder.mkdir()
            sync_folder(self.path)
        return folder


def _readable_manifest(path: Path) -> Manifest | None:
    """Read the manifest; None where it is damaged beyond single lines."""
    try:
        return read_manifest(path)
    except StoreError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno != errno.EIO:
            raise
        return None
