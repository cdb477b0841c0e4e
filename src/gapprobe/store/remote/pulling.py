"""Bringing the shards of a store elsewhere into one here, each checked before a writer seals it.

Whatever the place says is read as hostile: names of files are made from numbers, sizes are bounded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapprobe.errors import StoreError
from gapprobe.files import as_output_error, require_room
from gapprobe.store import disk
from gapprobe.store.arena import token_bytes
from gapprobe.store.format import MAX_JSON_BYTES, SHARDS, STORE_FILE, ShardRecord, StoreHeader, rows_name, shard_name
from gapprobe.store.manifest import read_header, read_manifest
from gapprobe.store.progress import Bar
from gapprobe.store.remote.places import Damaged, Place
from gapprobe.store.remote.transfers import (
    VERIFY,
    Transfer,
    in_order,
    manifest_there,
    refuse_bad,
    refuse_other_run,
    table_there,
)
from gapprobe.store.table import ID, decode_table
from gapprobe.store.writer import StoreWriter

# No honest token comes near this, and a writer has memory for one before it has a row.
MAX_TOKEN_BYTES = 1 << 30


def pull(
    url: str | Path,
    store: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    transfers: int = 4,
    progress: bool = True,
) -> Transfer:
    """Bring the shards of a store elsewhere into the store at `store`, which is made if there is none.

    Every shard is compared with its checksum before it is sealed. Rows that are here already are left out, and others
    may append meanwhile. Killed, the same call goes on where it was.

    Args:
        url: as fsspec writes it; see `push`.
        store: folder of the store.
        storage_options: for fsspec; see `push`.
        transfers: shards at once.
        progress: show a bar.

    Returns:
        What was brought.

    Raises:
        StoreError: there is no store, or that of another run; it cannot be reached; or some of its shards are damaged
            (all others are brought).
        OutputError: the folder holds something else, cannot be written, or has no room.
        ConfigError: `transfers` is less than 1.
    """
    mend = "All others are here. Push again with recheck from a sound copy, then pull again."
    return pull_from(Place(str(url), storage_options or {}, StoreError), Path(store), transfers, progress, mend)


def pull_from(there: Place, path: Path, transfers: int, progress: bool, mend: str) -> Transfer:
    """Bring what is there into the store at `path`; `mend` says what to do about shards that are bad there."""
    text = there.read(STORE_FILE, MAX_JSON_BYTES)
    if text is None:
        raise StoreError(f"{there} is no gapprobe store: no {STORE_FILE}. Give the URL that push was given.")
    header = StoreHeader.from_json(text, there.at(STORE_FILE))
    if token_bytes(header) > MAX_TOKEN_BYTES:
        raise StoreError(f"{there.at(STORE_FILE)} is damaged: {len(header.layers)} layers of width {header.width}")
    manifest, _ = manifest_there(there)
    manifest.warn_of_damage(str(there), VERIFY, stacklevel=3)
    if (path / STORE_FILE).exists():
        refuse_other_run(read_header(path), header, str(path), str(there))
    rows, bad, shards = 0, list[str](), 0
    with StoreWriter(path, header) as writer:
        missing = _missing(manifest.records, path, writer.ids, there, transfers)
        total = sum(record.shard_bytes for record in missing)
        need = total + sum(record.rows_bytes for record in missing)
        require_room(path, need, f"what {there} has and this lacks", "Free some space, or choose another folder.")
        with Bar(f"pull {path.name}", total, progress) as bar:
            fetcher = _Fetcher(path, there, bar)
            with closing(in_order(fetcher.fetch, missing, transfers, there, _Fetched.close)) as results:
                for fetched in results:
                    with closing(fetched):
                        if fetched.problem is None:
                            try:
                                rows += writer.adopt(fetched.file, fetched.record)
                                shards += 1
                            except StoreError as error:
                                # It knows the file by the name of a temporary that is gone when somebody reads this.
                                name = there.at(shard_name(fetched.record.shard))
                                told = str(error).replace(str(fetched.file), name)
                                fetched.problem = told if name in told else f"{name}: {told}"
                        if fetched.problem is not None:
                            bad.append(fetched.problem)
    refuse_bad(bad, len(manifest.records), str(there), mend)
    return Transfer(shards, rows, total, len(manifest.records) - shards)


def _missing(
    records: Sequence[ShardRecord], path: Path, ids: Collection[str], there: Place, transfers: int
) -> list[ShardRecord]:
    """Return the shards there that have rows which are not here, in their order."""
    here = {record.shard_xxh128 for record in read_manifest(path).records}
    missing = list({r.shard_xxh128: r for r in records if r.shard_xxh128 not in here}.values())
    if not missing or here <= {record.shard_xxh128 for record in records}:
        return missing

    def has_new_rows(record: ShardRecord) -> bool:
        # Pulled once already, a shard of which some rows were here lies here under another checksum.
        content = table_there(there, record)
        try:
            table = decode_table(content or b"", Path(rows_name(record.shard)), record.rows, [ID])
        except StoreError:
            return True
        return not all(id_ in ids for id_ in table.column(ID).to_pylist())

    with closing(in_order(has_new_rows, missing, 2 * transfers, there)) as new:
        return [record for record, wanted in zip(missing, new, strict=True) if wanted]


@dataclass
class _Fetched:
    """A shard in a temporary of the store, or what was wrong with it."""

    record: ShardRecord
    file: Path
    problem: str | None
    _temporary: ExitStack

    def close(self) -> None:
        """Take the temporary away."""
        self._temporary.close()


class _Fetcher:
    """Downloads shards into temporaries of the store."""

    def __init__(self, path: Path, there: Place, bar: Bar) -> None:
        self.path, self.there, self.bar = path, there, bar

    def fetch(self, record: ShardRecord) -> _Fetched:
        """Download a shard; its checksum is compared when it is adopted. No more is written than the manifest says."""
        name = shard_name(record.shard)
        with ExitStack() as stack:
            with self._writing():
                file, descriptor = stack.enter_context(disk.temporary(self.path / SHARDS))
                disk.reserve(descriptor, record.shard_bytes)
            problem = None
            try:
                self._download(name, record, descriptor)
            except Damaged as error:
                problem = str(error)
            return _Fetched(record, file, problem, stack.pop_all())

    def _download(self, name: str, record: ShardRecord, descriptor: int) -> None:
        at = 0
        with closing(self.there.pieces(name)) as pieces:
            for piece in pieces:
                if at + len(piece) > record.shard_bytes:
                    raise Damaged(f"{self.there.at(name)} has more than the {record.shard_bytes} bytes of the manifest")
                with self._writing():
                    disk.write_all(descriptor, memoryview(piece), at)
                at += len(piece)
                self.bar.update(len(piece))
        if at != record.shard_bytes:
            raise Damaged(f"{self.there.at(name)} has {at} bytes, the manifest says {record.shard_bytes}")

    def _writing(self) -> AbstractContextManager[None]:
        return as_output_error(f"{self.path}: a shard cannot be written", lambda: "What was pulled is safe.")
