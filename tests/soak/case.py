"""A store in pieces: a small sound one, its files taken apart, and files that are no files.

`Case` says what readers of the changed store may still be held to; `accidents` and `authors` change it, `oracle` holds
readers to it.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import xxhash

from gapprobe.store.format import StoredRow
from tests.store.rows import make_row, some_rows, write

MANIFEST, STORE = "manifest.jsonl", "store.json"


class Pick(Protocol):
    """Where choices come from: `random.Random`, hypothesis, or the bytes that a fuzzer feeds."""

    def randint(self, a: int, b: int) -> int:
        """Return a number from a to b."""
        ...

    def choice(self, seq: Sequence) -> object:
        """Return one of a sequence."""
        ...

    def randbytes(self, n: int) -> bytes:
        """Return n bytes."""
        ...


@dataclass(frozen=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe in place of a file."""


@dataclass(frozen=True)
class Folder:
    """A folder in place of a file."""


@dataclass(frozen=True)
class Sparse:
    """A file that begins with these bytes, has others further on, and claims to be longer without taking room."""

    head: bytes
    size: int
    later: tuple[int, bytes] = (0, b"")


File = bytes | Link | Pipe | Folder | Sparse


@dataclass
class Case:
    """A store made of mutations.

    Attributes:
        files: by name inside the store.
        told: the names of the mutations.
        free: shards whose rows may read back as anything, for nothing short of `verify` could tell, or an author
            wrote them so. Rows of other shards must come back right or not at all.
        anything: the same for all shards.
        authored: a checksum was made to fit what somebody wrote, so that not even `verify` can tell.
        harmless: nothing that readers need was touched: every row must come back, and right.
        seen: `verify` must find something.
        enormous: a shard is as large as the manifest says, and that is too large to be read in a test.
        rows: of the sound store, by id; `home` says in which shard each is.
    """

    files: dict[str, File]
    rows: Mapping[str, StoredRow]
    home: Mapping[str, int]
    told: list[str] = field(default_factory=list)
    free: set[int] = field(default_factory=set)
    anything: bool = False
    authored: bool = False
    harmless: bool = True
    seen: bool = False
    enormous: bool = False

    def build(self, path: Path) -> None:
        """Make the store at `path`."""
        for folder in (path, path / "shards", path / "rows"):
            folder.mkdir()
        for name, content in self.files.items():
            folder = self.files.get(name.split("/")[0]) if "/" in name else None
            # What lies in a folder is not made where a file or a link has taken the folder's place.
            if folder is None or isinstance(folder, Folder):
                put(path / name, content)

    def must(self, id_: str) -> bool:
        """Whether a row, if it reads back at all, must read back right."""
        return id_ in self.rows and not self.anything and self.home[id_] not in self.free


def put(file: Path, content: File) -> None:
    """Make one file, in place of a folder too."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    match content:
        case bytes():
            file.write_bytes(content)
        case Link(target):
            file.symlink_to(target)
        case Pipe():
            os.mkfifo(file)
        case Folder():
            file.mkdir()
        case Sparse(head, size, (at, later)):
            file.write_bytes(head)
            os.truncate(file, size)
            with file.open("r+b") as stream:
                stream.seek(at)
                stream.write(later)


class Seed:
    """The sound store: two shards of short rows, and one of long rows with dense copies of their positions."""

    def __init__(self, folder: Path) -> None:
        short, long = some_rows(6), [make_row(f"long {i}", 40) for i in range(2)]
        write(folder, short)
        write(folder, long)
        self.files: dict[str, File] = {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }
        self.rows = {row.id: row for row in (*short, *long)}
        self.home = {row.id: number // 3 for number, row in enumerate((*short, *long))}

    def case(self) -> Case:
        """Return the store without mutations."""
        return Case(dict(self.files), self.rows, self.home)


def shard_file(number: int) -> str:
    """Return a shard's name in the store."""
    return f"shards/{number:06d}.safetensors"


def rows_file(number: int) -> str:
    """Return a table's name in the store."""
    return f"rows/{number:06d}.parquet"


@dataclass
class Parts:
    """A shard taken apart: description and content of each tensor, in the order of the file."""

    metadata: object
    entries: dict[str, dict]
    data: dict[str, bytes]

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        """Take a sound shard apart."""
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        metadata = entries.pop("__metadata__", None)
        data = {name: content[8 + length :][slice(*entry["data_offsets"])] for name, entry in entries.items()}
        order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        return cls(metadata, {name: entries[name] for name in order}, {name: data[name] for name in order})

    def place(self) -> None:
        """Have the tensors' places fit their content."""
        at = 0
        for name, content in self.data.items():
            self.entries[name]["data_offsets"] = [at, at + len(content)]
            at += len(content)

    def checksums(self) -> None:
        """Have the block checksums fit the data before them."""
        before = b"".join(content for name, content in self.data.items() if name != "block_checksums")
        blocks = [before[i : i + (1 << 20)] for i in range(0, len(before), 1 << 20)]
        self.data["block_checksums"] = b"".join(xxhash.xxh3_64_digest(block) for block in blocks)
        self.entries["block_checksums"]["shape"] = [len(blocks), 8]

    def join(self, text: bytes | None = None) -> bytes:
        """Put the shard together; with another header text, if given."""
        if text is None:
            text = json.dumps({"__metadata__": self.metadata, **self.entries}).encode()
        text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
        return len(text).to_bytes(8, "little") + text + b"".join(self.data.values())


def parts(case: Case, number: int) -> Parts | None:
    """Take a shard apart, if earlier mutations left that possible."""
    content = case.files.get(shard_file(number))
    try:
        return Parts.of(content) if isinstance(content, bytes) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def lines(case: Case) -> list[bytes]:
    """Return the manifest's lines."""
    content = case.files.get(MANIFEST, b"")
    return content.splitlines(keepends=True) if isinstance(content, bytes) else []


def records(case: Case) -> list[dict]:
    """Return the fields of the manifest's lines that are objects."""
    found = []
    for line in lines(case):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(fields, dict):
            found.append({name: value for name, value in fields.items() if name != "line_sha256"})
    return found


def signed(fields: Mapping[str, object]) -> bytes:
    """Return a manifest line with a right checksum, whatever its fields."""
    body = json.dumps(fields, separators=(",", ":")).encode()
    return b'{"line_sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:] + b"\n"


def reseal(case: Case, number: int, **fields: object) -> None:
    """Make the manifest fit the shard's files as they are now, or say something else of it."""
    changed = []
    for record in records(case):
        if record.get("shard") == number:
            shard, table = case.files.get(shard_file(number)), case.files.get(rows_file(number))
            if isinstance(shard, bytes):
                record |= {"shard_bytes": len(shard), "shard_xxh128": xxhash.xxh3_128(shard).hexdigest()}
            if isinstance(table, bytes):
                record |= {"rows_bytes": len(table), "rows_sha256": hashlib.sha256(table).hexdigest()}
            record |= fields
        changed.append(signed(record))
    case.files[MANIFEST] = b"".join(changed)


def hostile(case: Case, number: int) -> None:
    """Note that an author rewrote a shard."""
    case.free.add(number)
    case.authored, case.harmless = True, False
