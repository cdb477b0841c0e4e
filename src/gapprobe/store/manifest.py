"""What a folder says of itself: `store.json` and the sealed shards of `manifest.jsonl`. Reads only; `writer` writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gapprobe.errors import StoreError
from gapprobe.store.format import (
    MANIFEST_FILE,
    MAX_JSON_BYTES,
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


def read_header(path: Path) -> StoreHeader:
    """Read the header of the store at `path`.

    Raises:
        StoreError: there is no store, or none that this version reads.
    """
    file = path / STORE_FILE
    try:
        with file.open("rb") as stream:
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
    records: dict[int, ShardRecord] = {}
    damaged: list[int] = []
    file = path / MANIFEST_FILE
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_JSON_BYTES):
                number += 1
                record = ShardRecord.from_line(line[:-1]) if line.endswith(b"\n") else None
                if record is not None:
                    if records.setdefault(record.shard, record) != record:
                        raise StoreError(f"{file} line {number} contradicts an earlier line about shard {record.shard}")
                elif line.endswith(b"\n") or len(line) == MAX_JSON_BYTES:
                    damaged.append(number)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    return Manifest(tuple(records.values()), tuple(damaged))


def listed_numbers(path: Path) -> set[int]:
    """Return the numbers of all shards that have a file, sealed or not."""
    names = [*(path / SHARDS).glob(f"*{SHARD_SUFFIX}"), *(path / ROWS).glob(f"*{ROWS_SUFFIX}")]
    return {int(name.stem) for name in names if re.fullmatch("[0-9]{6,10}", name.stem)}
