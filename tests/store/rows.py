"""Rows to store, made up from their ids, and writers to run (and kill) in processes of their own."""

import contextlib
import hashlib
import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gapprobe.errors import StoreError
from gapprobe.store import table
from gapprobe.store.format import ROLES, StoredRow, StoreHeader
from gapprobe.store.reader import open_store
from gapprobe.store.table import read_table
from gapprobe.store.writer import StoreWriter

HEADER = StoreHeader(
    model={"source": "./model", "revision": "", "architecture": "A", "family": "llava", "weights": "abc"},
    processor="def",
    attention="eager",
    padding_side="left",
    dtype="bfloat16",
    layers=(0, 1, 3),
    width=6,
    positions=("last_input", "last_output"),
    generation={"max_new_tokens": 10, "stop": "###", "temperature": 0.5},
    versions={"torch": "2.13.0"},
)


def make_row(name: str, tokens: int, header: StoreHeader = HEADER) -> StoredRow:
    """The first token is the last of the input, the last one that of the output; the same name gives the same row."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    generator = torch.Generator().manual_seed(seed)
    marks = torch.zeros(tokens, dtype=torch.uint8)
    if tokens:
        marks[0] |= 1
        marks[-1] |= 2
    return StoredRow(
        id=name,
        columns={
            "setting": "visual" if seed % 2 else "text_only",
            "error": None if tokens else "image is empty",
            "n": seed,
            "right": bool(seed % 3),
            "logprobs": [-0.5 * i for i in range(tokens)],
            "answer_ids": list(range(tokens)),
        },
        residual=torch.randn(len(header.layers), tokens, header.width, generator=generator).to(header.torch_dtype),
        token_ids=torch.randint(0, 32000, (tokens,), generator=generator),
        token_positions=torch.arange(tokens) + 5,
        token_roles=torch.full((tokens,), ROLES["answer"], dtype=torch.uint8),
        token_marks=marks,
    )


def some_rows(count: int, header: StoreHeader = HEADER) -> list[StoredRow]:
    """Rows of 0 to 4 tokens."""
    return [make_row(f"row {i}", (2, 0, 4, 1, 3)[i % 5], header) for i in range(count)]


def write(
    path: Path, rows: Sequence[StoredRow], header: StoreHeader = HEADER, batch: int = 3, shard_bytes: int = 1
) -> None:
    """Append what is missing, in batches; a shard a batch unless `shard_bytes` says otherwise."""
    with StoreWriter(path, header, shard_bytes) as writer:
        for start in range(0, len(rows), batch):
            writer.append(rows[start : start + batch])


def equal(a: StoredRow, b: StoredRow) -> bool:
    """Whether two rows agree bit for bit."""
    names = ("residual", "token_ids", "token_positions", "token_roles", "token_marks")
    tensors = [(getattr(a, name), getattr(b, name)) for name in names]
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)
    return same and a.id == b.id and dict(a.columns) == dict(b.columns)


def holds(path: Path, rows: Sequence[StoredRow]) -> bool:
    """Whether the store has exactly these rows, whatever their order, bit for bit, and is sound."""
    store = open_store(path)
    return (
        store.verify() == []
        and sorted(store.ids) == sorted(row.id for row in rows)
        and all(equal(store.row(row.id), row) for row in rows)
    )


def write_in_child(path: Path, count: int, started: str) -> None:
    """Entry of a child process: write the rows one by one, and say when it begins."""
    torch.set_num_threads(1)
    Path(started).touch()
    write(path, some_rows(count), batch=1)


def write_slice_in_child(path: Path, first: int, last: int) -> None:
    """Entry of a child process: write some of 40 rows, two in a batch."""
    torch.set_num_threads(1)
    write(path, some_rows(40)[first:last], batch=2)


CALLS = ("pwrite", "write", "fsync", "link", "unlink", "rename", "posix_fallocate", "ftruncate", "truncate", "mkdir")


def die_at_call(number: int, links: bool, calls: Sequence[str] = CALLS) -> None:
    """Be killed at the given call that changes the disk, in mid-write; `links` says whether the disk has hard links."""
    real = {name: getattr(os, name) for name in calls}
    # Another thread may call between counting and comparing.
    turns = itertools.count(1)

    def counting(name):
        def call(*args, **kwargs):
            if name == "link" and not links:
                raise PermissionError(1, "Operation not permitted")
            if next(turns) == number:
                # Past the page cache, half a piece may be refused.
                with contextlib.suppress(OSError):
                    if name in ("write", "pwrite"):
                        real[name](args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args, **kwargs)

        return call

    for name in calls:
        setattr(os, name, counting(name))


def write_and_die(path: Path, number: int, links: bool) -> None:
    """Entry of a child process: write, and be killed at the given call that changes the disk."""
    torch.set_num_threads(1)
    die_at_call(number, links)
    write(path, some_rows(4), batch=2)


def reheaded(**changes) -> StoreHeader:
    """The usual header with other fields."""
    return replace(HEADER, **changes)


def unpack_in_child(path: Path, limit: int, most: int) -> None:
    """Entry of a child process: look at the rows of a store whose tables are to take at most `limit` MiB.

    Ends with 0 if that was a StoreError after at most `most` MiB.
    """
    store = open_store(path)
    # What is needed for any table at all does not count.
    read_table(path, store.header, store.records[1])
    table.MAX_TABLE_BYTES = limit << 20
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mib()
    try:
        assert store.ids
    except StoreError:
        os._exit(0 if _peak_mib() - before <= most else 2)
    os._exit(1)


def _peak_mib() -> int:
    """Return the most memory that was resident since it was last asked to forget."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10
