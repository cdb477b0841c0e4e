"""Sending a store to any place that fsspec reaches: shards first, the manifest that makes them count last.

Only shards that are missing there move, told apart by checksum and not by number. `places` moves the bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gapprobe.errors import GapprobeError, OutputError, StoreError
from gapprobe.store import disk
from gapprobe.store.format import (
    LOCK_FILE,
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    ROWS,
    SHARDS,
    STORE_FILE,
    ShardRecord,
    StoreHeader,
    rows_name,
    shard_name,
)
from gapprobe.store.manifest import read_header, read_manifest
from gapprobe.store.progress import Bar
from gapprobe.store.remote.places import Damaged, Place, piece_size
from gapprobe.store.remote.pulling import pull_from
from gapprobe.store.remote.transfers import (
    VERIFY,
    Transfer,
    in_order,
    manifest_there,
    refuse_bad,
    refuse_other_run,
    table_there,
    told,
)
from gapprobe.store.shard import open_shard
from gapprobe.store.table import ID, decode_table, read_table

# How often a push records what has arrived. What a killed one had not recorded is found there and not sent again.
RECORD_SECONDS = 30.0


def push(
    store: str | Path,
    url: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    verify: bool = True,
    recheck: bool = False,
    transfers: int = 4,
    progress: bool = True,
) -> Transfer:
    """Send the sealed shards of a store to any place that fsspec reaches. What lies there is a store, too.

    Killed, the same call goes on where it was. A store that is there already is added to, also by another copy of this
    store that captured other rows; but only one push to a place at a time.

    Args:
        store: its folder. Capture may go on meanwhile; what is sealed now is sent.
        url: as fsspec writes it: `s3://bucket/name`, `gs://…`, `sftp://…`, or a folder.
        storage_options: for fsspec, such as `{"endpoint_url": …}`. Keys are best left to the environment.
        verify: compare what arrived with what was sent: by the checksum that S3 made of it, elsewhere (and where S3
            encrypts with keys of its own) by reading it back. Without, only sizes are compared.
        recheck: compare what earlier pushes sent as well, and send again what is damaged there.
        transfers: shards at once, each with some 70 MB of memory; one where the place does not allow more.
        progress: show a bar.

    Returns:
        What was sent.

    Raises:
        StoreError: the store or some of its shards are damaged (all others are sent); the place holds the store of
            another run; or the two have single rows in common, in different shards.
        OutputError: the place holds something else, or cannot be reached or written. What has arrived is kept.
        ConfigError: `transfers` is less than 1.
    """
    path, there = Path(store), Place(str(url), storage_options or {}, OutputError)
    header, manifest = read_header(path), read_manifest(path)
    mend = "All others are there. Run `gapprobe store repair` here, and push again."
    if there.local:
        # A folder of this machine has writers with locks, who know best how to add to it.
        return pull_from(Place(str(path.absolute()), {}, StoreError), Path(there.root), transfers, progress, mend)
    manifest.warn_of_damage(str(path), VERIFY, stacklevel=2)
    stored = _create(there, header, path)
    plan = _plan(path, header, manifest.records, there, recheck)
    new: list[ShardRecord] = []
    bad: list[str] = []
    total = sum(job.record.shard_bytes + job.record.rows_bytes for job in plan)
    recorded = time.monotonic()
    with Bar(f"push {path.name}", total, progress) as bar:
        sender = _Sender(path, header, there, verify, bar)
        try:
            with closing(in_order(sender.send, plan, transfers, there)) as results:
                for job, problem in results:
                    if problem is not None:
                        bad.append(problem)
                    elif not job.recorded:
                        # Beside a header with other versions, those that made the shard stay told.
                        made = job.record.made_with(header)
                        versions = None if made == stored.versions else made
                        new.append(replace(job.record, shard=job.number, versions=versions))
                    if time.monotonic() - recorded > RECORD_SECONDS:
                        _record(there, new)
                        recorded = time.monotonic()
        except BaseException:
            # What has arrived should not have to be compared again; but the first failure is the one to tell.
            with suppress(GapprobeError):
                _record(there, new)
            raise
        _record(there, new)
    refuse_bad(bad, len(manifest.records), str(path), mend)
    rows = sum(record.rows for record in new)
    return Transfer(sender.shards, rows, sender.bytes, len(manifest.records) - sender.shards)


@dataclass(frozen=True)
class _Job:
    """A shard to send: its record here, its number there, whether the manifest there names it.

    `present` are those of its files that lie there with the right size, though perhaps not the right content.
    """

    record: ShardRecord
    number: int
    recorded: bool
    present: frozenset[str]


def _create(there: Place, header: StoreHeader, path: Path) -> StoreHeader:
    """Put store.json there unless there is one; return what it says.

    Raises:
        StoreError: the place holds the store of another run, or of another format.
        OutputError: it holds something else.
    """
    text = there.read(STORE_FILE, MAX_JSON_BYTES)
    if text is None:
        foreign = sorted(name for name in there.names() if not name.startswith((disk.TEMPORARY, LOCK_FILE)))
        if foreign:
            raise OutputError(f"{there} holds {foreign[0]!r} and is no gapprobe store. Choose an empty or a new place.")
        there.write(STORE_FILE, header.to_json())
        return header
    stored = StoreHeader.from_json(text, there.at(STORE_FILE))
    refuse_other_run(header, stored, str(path), str(there))
    return stored


def _plan(path: Path, header: StoreHeader, records: Sequence[ShardRecord], there: Place, recheck: bool) -> list[_Job]:
    """Return which shards to send, under which number.

    A shard keeps its number unless another one has it there. Rows that lie there in shards that are not here were sent
    by another copy of this store: a shard that has only such rows is not sent.

    Raises:
        StoreError: some shard has such rows and others; sending it would store rows twice.
    """
    known = manifest_there(there)[0].records
    sizes = {f"{folder}/{name}": size for folder in (SHARDS, ROWS) for name, size in there.names(folder).items()}

    def job(record: ShardRecord, number: int, recorded: bool) -> _Job:
        wanted = {shard_name(number): record.shard_bytes, rows_name(number): record.rows_bytes}
        return _Job(record, number, recorded, frozenset(n for n, size in wanted.items() if sizes.get(n) == size))

    numbers = {record.shard_xxh128: record.shard for record in known}
    mine = {record.shard_xxh128 for record in records}
    others = [record for record in known if record.shard_xxh128 not in mine]
    taken = {record.shard for record in known}
    reserved = taken | {record.shard for record in records}
    theirs = _ids_there(there, others) if any(r.shard_xxh128 not in numbers for r in records) else set[str]()
    plan: list[_Job] = []
    mixed: list[str] = []
    for record in records:
        number = numbers.get(record.shard_xxh128)
        if number is not None:
            known_job = job(record, number, recorded=True)
            if recheck or len(known_job.present) < 2:
                plan.append(known_job)
            continue
        ids = set(read_table(path, header, record, [ID]).column(ID).to_pylist()) if theirs else set[str]()
        if ids and ids <= theirs:
            continue
        if not ids.isdisjoint(theirs):
            mixed.append(f"shard {record.shard} has the row {min(ids & theirs)!r:.80}")
        number = record.shard
        if number in taken:
            number = next(free for free in range(len(reserved) + 1) if free not in reserved)
            reserved.add(number)
        plan.append(job(record, number, recorded=False))
    if mixed:
        raise StoreError(
            f"{path} and the store at {there} went on separately (or one was compacted): {told(mixed)}, which lies "
            f"there in another shard, beside rows that do not. Nothing was sent. Pull {there} into a new folder, "
            f"`gapprobe store merge` {path} into that, and push it."
        )
    return plan


def _ids_there(there: Place, records: Sequence[ShardRecord]) -> set[str]:
    """Return the ids of the rows of shards there."""
    ids: set[str] = set()
    with closing(in_order(lambda record: table_there(there, record), records, 8, there)) as tables:
        for record, content in zip(records, tables, strict=True):
            if content is None:
                raise StoreError(
                    f"{there.at(rows_name(record.shard))} is missing or damaged, so that rows might be stored twice. "
                    "Push again with recheck from the store that sent it."
                )
            name = Path(rows_name(record.shard))
            ids.update(decode_table(content, name, record.rows, [ID]).column(ID).to_pylist())
    return ids


class _Sender:
    """Sends shards, several at once, and counts."""

    def __init__(self, path: Path, header: StoreHeader, there: Place, verify: bool, bar: Bar) -> None:
        self.path, self.header, self.there, self.verify, self.bar = path, header, there, verify, bar
        self.shards = 0
        self.bytes = 0
        self._guard = threading.Lock()

    def send(self, job: _Job) -> tuple[_Job, str | None]:
        """Send a shard, then its table of rows; return what is wrong with it here, if anything."""
        record = job.record
        file = self.path / shard_name(record.shard)
        try:
            try:
                table = open_shard(file, self.header, record).table()
            except StoreError as error:
                raise Damaged(str(error)) from error
            pieces = partial(_pieces, file, piece_size(record.shard_bytes))
            sent = self._deliver(job, shard_name(job.number), record.shard_bytes, pieces, record.shard_xxh128)
            checksum = self.there.digest([table]).xxh128
            sent += self._deliver(job, rows_name(job.number), len(table), lambda: [table], checksum)
        except Damaged as error:
            return job, str(error)
        with self._guard:
            self.shards += sent > 0
            self.bytes += sent
        return job, None

    def _deliver(self, job: _Job, name: str, size: int, pieces: Callable[[], Iterable[bytes]], xxh128: str) -> int:
        """See to it that a file is there; return how many bytes were sent for it."""
        # Without verification nothing but the manifest tells a whole file from the rest of a killed upload.
        if name in job.present and (self.verify or job.recorded):
            digest = self.there.digest(pieces())
            if digest.xxh128 != xxh128:
                raise Damaged(f"{self.path / shard_name(job.record.shard)} does not have the checksum of the manifest")
            if self.there.holds(name, size, digest):
                self.bar.update(size)
                return 0
        digest = self.there.send(name, size, pieces(), xxh128, self.bar.update)
        if not self.there.holds(name, size, digest, content=self.verify):
            raise OutputError(
                f"{self.there.at(name)} is not what was sent: it changed on its way. It is not recorded there, so no "
                "reader sees it; the same command sends it again."
            )
        return size


def _pieces(file: Path, size: int) -> Generator[bytes, None, None]:
    try:
        with file.open("rb") as stream:
            while piece := stream.read(size):
                yield piece
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from error


def _record(there: Place, new: Sequence[ShardRecord]) -> None:
    """Write the manifest anew: the sound lines that it has, then those of shards that have arrived."""
    manifest, lines = manifest_there(there)
    known = {record.shard: record.shard_xxh128 for record in manifest.records}
    for record in new:
        if known.get(record.shard, record.shard_xxh128) != record.shard_xxh128:
            raise StoreError(
                f"{there}: another push, of another copy of this store, took number {record.shard} while this one ran. "
                "Let one push end before the next begins; then run both again, with recheck."
            )
    added = [record.to_line() for record in new if record.shard not in known]
    if added:
        there.write(MANIFEST_FILE, b"".join([*lines.values(), *added]))
