"""What a folder says of itself: `store.json` and the sealed shards of `manifest.jsonl`. Reads only; `writer` writes."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from gapprobe.errors import StoreError
from gapprobe.store import disk
from gapprobe.store.format import (
    MANIFEST_FILE,
    MAX_JSON_BYTES,
    MAX_SHARD_NUMBER,
    ROWS,
    ROWS_SUFFIX,
    SHARD_SUFFIX,
    SHARDS,
    STORE_FILE,
    ShardRecord,
    StoreHeader,
)


@dataclass(frozen=True)
class Manifest:
    """The sealed shards in the order of sealing, and the numbers (from 1) of lines that fail their checksum.

    A last line without newline is what a killed writer leaves, and is in neither.
    """

    records: tuple[ShardRecord, ...]
    damaged: tuple[int, ...]

    @classmethod
    def of(cls, lines: Iterable[tuple[int, bytes, ShardRecord | None]]) -> Manifest:
        """Take what `manifest_lines` yields."""
        records: dict[int, ShardRecord] = {}
        damaged: list[int] = []
        for number, _, record in lines:
            if record is None:
                damaged.append(number)
            else:
                records[record.shard] = record
        return cls(tuple(records.values()), tuple(damaged))

    def warn_of_damage(self, where: str, mend: str, stacklevel: int) -> None:
        """Warn of lines that do not count; `stacklevel` as seen from the caller of this."""
        if self.damaged:
            what = f"line {self.damaged[0]} of its manifest is damaged and the rows it sealed are left out"
            warnings.warn(f"{where}: {what}. {mend}", stacklevel=stacklevel + 1)


def read_header(path: Path) -> StoreHeader:
    """Read the header of the store at `path`.

    Raises:
        StoreError: there is no store, or none that this version reads.
    """
    file = path / STORE_FILE
    try:
        with open(disk.open_regular(file), "rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{path} is no gapprobe store: no {STORE_FILE}. Give the folder that capture wrote."
        ) from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    return StoreHeader.from_json(text, str(file))


def read_manifest(path: Path) -> Manifest:
    """Read which shards of the store at `path` are sealed; none when nothing has been sealed yet.

    Raises:
        StoreError: the manifest cannot be read, or two sound lines tell different things of one shard.
    """
    file = path / MANIFEST_FILE
    try:
        with open(disk.open_regular(file), "rb") as stream:
            return Manifest.of(manifest_lines(stream, str(file)))
    except FileNotFoundError:
        return Manifest((), ())
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error


def manifest_lines(stream: BufferedIOBase, where: str) -> Iterator[tuple[int, bytes, ShardRecord | None]]:
    """Yield the number (from 1), text and record of each line; a damaged one has no record.

    Raises:
        StoreError: two sound lines tell different things of one shard, or one tells what cannot be or has no end.
    """
    records: dict[int, ShardRecord] = {}
    for number, line in enumerate(iter(lambda: stream.readline(MAX_JSON_BYTES), b""), 1):
        whole = line.endswith(b"\n")
        if len(line) == MAX_JSON_BYTES:
            raise StoreError(f"{where} is damaged: line {number} has more than {MAX_JSON_BYTES} bytes")
        try:
            record = ShardRecord.from_line(line[:-1]) if whole else None
        except StoreError as error:
            raise StoreError(f"{where} line {number}: {error}") from error
        if record is not None and records.setdefault(record.shard, record) != record:
            raise StoreError(f"{where} line {number} contradicts an earlier line about shard {record.shard}")
        if whole:
            yield number, line, record


def listed_numbers(path: Path) -> set[int]:
    """Return the numbers of all shards that have a file, sealed or not."""
    stems: list[str] = []
    for folder, suffix in ((SHARDS, SHARD_SUFFIX), (ROWS, ROWS_SUFFIX)):
        with suppress(OSError), os.scandir(path / folder) as entries:
            # A folder of such a name is none of ours.
            names = [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
            stems += [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    numbers = {stem: int(stem) for stem in stems if re.fullmatch("[0-9]{6,10}", stem)}
    return {number for stem, number in numbers.items() if stem == f"{number:06d}" and number <= MAX_SHARD_NUMBER}
