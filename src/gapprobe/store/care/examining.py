"""One reading of a shard that tells all that is wrong with it: checksums, offsets, marks, values that are not finite.

Verifying, repairing, compacting and merging share it, so that none of them takes for sound what another would not.
What to do about it is decided elsewhere; nothing is written here.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import StoreError
from gapprobe.store import disk
from gapprobe.store.arena import Arena
from gapprobe.store.format import (
    BLOCK,
    CHECKSUMS_TENSOR,
    DTYPES,
    ROWS_TENSOR,
    ShardRecord,
    ShardSize,
    StoreHeader,
    rows_name,
    shard_name,
)
from gapprobe.store.packing import plan_shard
from gapprobe.store.progress import Bar
from gapprobe.store.shard import BYTES, CODES, TOKEN_TENSORS, Shard, layer_names, open_shard
from gapprobe.store.table import ID, decode_table

# Enough reads in flight to keep a disk busy.
_READERS = 4
_SMALL = 16 << 20
# Of each residual dtype: an integer as wide, and the bits that are all set in NaN and infinities, and only there.
_EXPONENT: Mapping[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F800000),
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
}
_EMPTY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Held:
    """A shard's whole file in memory, so that what is copied is what was checked."""

    layout: Shard
    content: memoryview

    def tensor(self, name: str) -> Tensor:
        """Return a view of a tensor."""
        code, shape, begin = self.layout.tensors[name]
        size = prod(shape) * BYTES[code]
        if not size:
            return torch.empty(shape, dtype=CODES[code])
        data = np.frombuffer(self.content[begin : begin + size], np.uint8)
        # Another program may have put a tensor where its numbers are not aligned.
        data = data if data.ctypes.data % BYTES[code] == 0 else data.copy()
        return torch.from_numpy(data).view(CODES[code]).view(shape)

    def tokens_of(self, rows: NDArray[np.int64]) -> int:
        """Return how many tokens some rows have together."""
        return int(np.diff(self.tensor("offsets").numpy())[rows].sum())

    def pour(self, header: StoreHeader, ids: Sequence[str], rows: NDArray[np.int64], arena: Arena) -> None:
        """Copy some rows, rising, into an arena, without columns; `ids` are those of all rows of the shard."""
        if not len(rows):
            return
        offsets = self.tensor("offsets").numpy()
        here = arena.claim([ids[int(row)] for row in rows], (offsets[rows + 1] - offsets[rows]).tolist())
        targets = dict(zip(layer_names(header), arena.residual, strict=True))
        targets |= {name: cast(Tensor, getattr(arena, name)) for name in TOKEN_TENSORS}
        for name, target in targets.items():
            source, at = self.tensor(name), here.start
            # Rows that follow one another are copied at once.
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                first, last = int(offsets[run[0]]), int(offsets[run[-1] + 1])
                target[at : at + last - first] = source[first:last]
                at += last - first


@dataclass(frozen=True)
class Examined:
    """What one reading of a shard and its table of rows told.

    Attributes:
        number: of the shard.
        fault: what is wrong with the shard's file, empty if nothing.
        table_fault: what is wrong with the file of its table of rows, empty if nothing.
        table: the sound table of rows, from either place.
        ids: of all rows; empty where no table is sound.
        damaged: by row, whether it touches damage, so that nothing can be told of it.
        nonfinite: by row, whether a residual is NaN or infinite; damaged rows are not looked at.
        held: the shard in memory, if that was asked for and there is anything to be had.
        unreadable: a file could not be read for a reason that is no damage, such as a permission; `fault` tells it.
    """

    number: int
    fault: str
    table_fault: str
    table: bytes | None
    ids: tuple[str, ...]
    damaged: NDArray[np.bool_]
    nonfinite: NDArray[np.bool_]
    held: Held | None = None
    unreadable: bool = False

    def ids_of(self, rows: NDArray[np.bool_]) -> tuple[str, ...]:
        """Return the ids of some rows, as far as ids are known."""
        return tuple(self.ids[row] for row in np.flatnonzero(rows).tolist()) if self.ids else ()


def examine(store: Path, header: StoreHeader, record: ShardRecord, keep: bool = False) -> Examined:
    """Read every byte of a sealed shard and of its table of rows, once.

    Args:
        store: the folder.
        header: of the store.
        record: the shard's line of the manifest.
        keep: the content in memory, for copying what is sound.
    """
    try:
        table, table_fault = _read_table_file(store / rows_name(record.shard), record)
        content, fault = _read_sealed(store / shard_name(record.shard), header, record, keep)
    except (_UnreadableError, MemoryError) as error:
        return _unreadable(record.shard, record.rows, error)
    if content is not None:
        embedded = bytes(content.small[ROWS_TENSOR])
        if hashlib.sha256(embedded).hexdigest() == record.rows_sha256:
            table = embedded
        else:
            fault = fault or "its table of rows is not the one that the manifest names"
    return _judge(record.shard, record.rows, header, content, fault, table, table_fault)


def examine_published(
    store: Path, header: StoreHeader, number: int, table: bytes | None = None, keep: bool = False
) -> Examined:
    """Read every byte of a shard that no line of the manifest names; its own checksums tell what is sound.

    `table` is its table of rows if that is known to be sound.
    """
    try:
        content, fault = _read_published(store / shard_name(number), header, keep)
    except (_UnreadableError, MemoryError) as error:
        return _unreadable(number, 0, error)
    if content is not None and not content.touches(ROWS_TENSOR):
        table = bytes(content.small[ROWS_TENSOR])
    return _judge(number, 0 if content is None else content.layout.rows, header, content, fault, table, "")


def examine_all(
    store: Path, header: StoreHeader, records: Sequence[ShardRecord], what: str, progress: bool
) -> Iterator[Examined]:
    """Examine sealed shards, several at once, in their order, with a bar when it takes more than a moment."""
    total = sum(record.shard_bytes + record.rows_bytes for record in records)
    with Bar(what, total, progress) as bar, ThreadPoolExecutor(_READERS, "gapprobe-examine") as pool:
        # Threads cost more than they save where all is read in a moment.
        at_once = pool.map if total > _SMALL else map
        results: Iterable[Examined] = at_once(lambda record: examine(store, header, record), records)
        for record, result in zip(records, results, strict=True):
            bar.update(record.shard_bytes + record.rows_bytes)
            yield result


class _NoFileError(Exception):
    """There is no file of a name."""


class _UnreadableError(Exception):
    """A file could not be read for a reason that is no damage."""


def _unreadable(number: int, rows: int, error: _UnreadableError | MemoryError) -> Examined:
    fault = str(error) if isinstance(error, _UnreadableError) else "it takes more memory than there is"
    return Examined(number, fault, "", None, (), np.ones(rows, bool), np.zeros(rows, bool), None, True)


@dataclass(frozen=True)
class _Content:
    """What a reading of a file gathers. `file` is empty unless it was to be kept."""

    layout: Shard
    head: bytes
    whole: str
    """XXH128 of the file."""
    mended: str
    """XXH128 of the file as it would be with the header that its sizes demand and the checksums that its data have."""
    damaged: list[tuple[int, int]]
    """Spans of bytes whose content is not what was written."""
    small: Mapping[str, memoryview]
    nonfinite: NDArray[np.int64]
    """Tokens with a residual that is not finite."""
    file: memoryview

    def touches(self, name: str) -> bool:
        """Return whether damage touches a tensor."""
        code, shape, begin = self.layout.tensors[name]
        end = begin + prod(shape) * BYTES[code]
        return any(first < end and last > begin for first, last in self.damaged)


def _read_table_file(path: Path, record: ShardRecord) -> tuple[bytes | None, str]:
    """Return the content of a table's file if it is sound, and what is wrong with it otherwise."""
    try:
        with _opened(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != record.rows_bytes:
                return None, f"it has {size} bytes, the manifest says {record.rows_bytes}"
            content = memoryview(bytearray(size))
            if not _fill(descriptor, content, 0):
                return None, "the disk cannot read it"
    except _NoFileError as error:
        return None, str(error)
    if hashlib.sha256(content).hexdigest() != record.rows_sha256:
        return None, "bytes have changed: its checksum is not that of the manifest"
    return bytes(content), ""


def _read_sealed(path: Path, header: StoreHeader, record: ShardRecord, keep: bool) -> tuple[_Content | None, str]:
    """Read a shard that the manifest names; return its content where there is any to be trusted, and what is wrong."""
    plan = plan_shard(header, ShardSize(record.rows, record.tokens, record.rows_bytes))
    try:
        with _opened(path) as descriptor:
            size, layout, fault = os.fstat(descriptor).st_size, None, ""
            if size != record.shard_bytes:
                fault = f"it has {size} bytes, the manifest says {record.shard_bytes}"
            else:
                try:
                    layout = open_shard(path, header, record)
                except (StoreError, OSError) as error:
                    fault = _told(error, path)
            if layout is None:
                # What gapprobe writes follows from the sizes, so that a lost header costs nothing if the rest fits.
                # Without the checksums, which stand last, nothing could be told of the rest.
                if plan.size != record.shard_bytes or size < plan.tensors[CHECKSUMS_TENSOR][2]:
                    return None, fault
                layout = Shard(path, record.rows, record.tokens, len(plan.head), plan.tensors)
            content = _read_through(descriptor, layout, header, record.shard_bytes, plan.head, keep)
    except _NoFileError as error:
        return None, str(error)
    if not fault and content.whole == record.shard_xxh128:
        # Then checksums of blocks that do not fit were written so, and no byte has changed.
        content.damaged.clear()
        return content, ""
    if content.mended == record.shard_xxh128:
        content.damaged.clear()
        return content, fault or "bytes have changed, but only in its header or block checksums"
    if fault and content.head != plan.head:
        return None, fault
    return content, fault or _told_blocks(content)


def _read_published(path: Path, header: StoreHeader, keep: bool) -> tuple[_Content | None, str]:
    """Read a shard that no line names; return its content where there is any to be trusted, and what is wrong."""
    try:
        with _opened(path) as descriptor:
            layout = open_shard(path, header)
            content = _read_through(descriptor, layout, header, os.fstat(descriptor).st_size, b"", keep)
    except _NoFileError as error:
        return None, str(error)
    except (StoreError, OSError) as error:
        return None, _told(error, path)
    return content, _told_blocks(content) if content.damaged else ""


def _told(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path} ") if isinstance(error, StoreError) else "the disk cannot read its header"


def _told_blocks(content: _Content) -> str:
    if not content.damaged:
        return "bytes have changed: its checksum is not that of the manifest, though those of its data are sound"
    first = min(content.damaged)[0]
    return f"bytes have changed, in {len(content.damaged)} of its blocks of 1 MiB, the first at byte {first}"


@contextmanager
def _opened(path: Path) -> Generator[int, None, None]:
    """Open a file for reading."""
    try:
        descriptor = disk.open_regular(path)
    except FileNotFoundError as error:
        raise _NoFileError("it is missing") from error
    except OSError as error:
        if path.exists() and not path.is_file():
            raise _NoFileError("it is no file, but something else") from error
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass
class _Gatherer:
    """Takes what is wanted out of the pieces of a file as they pass: small tensors, and tokens that are not finite."""

    layout: Shard
    header: StoreHeader
    small: dict[str, memoryview] = field(default_factory=dict[str, memoryview])
    nonfinite: list[NDArray[np.int64]] = field(default_factory=list[NDArray[np.int64]])

    def __post_init__(self) -> None:
        """Find out where what is wanted lies."""
        self._code = DTYPES[self.header.dtype][0]
        self._width = BYTES[self._code]
        self._stride = self._width * self.header.width
        self._layers = sorted(self.layout.tensors[name][2] for name in layer_names(self.header))
        self._bytes = self.layout.tokens * self._stride
        self._aligned = all((begin - self.layout.begin) % self._width == 0 for begin in self._layers)
        self._spans: list[tuple[int, int]] = []
        for begin in self._layers:
            # Layers that follow one another are looked at as one.
            if self._spans and self._spans[-1][1] == begin:
                self._spans[-1] = (self._spans[-1][0], begin + self._bytes)
            else:
                self._spans.append((begin, begin + self._bytes))
        for name in ("offsets", "token_marks", ROWS_TENSOR):
            code, shape, _ = self.layout.tensors[name]
            self.small[name] = memoryview(bytearray(prod(shape) * BYTES[code]))

    def take(self, piece: memoryview, at: int) -> None:
        """Look at a piece that begins at a byte of the file."""
        for name, target in self.small.items():
            begin = self.layout.tensors[name][2]
            first, last = max(at, begin), min(at + len(piece), begin + len(target))
            if first < last:
                target[first - begin : last - begin] = piece[first - at : last - at]
        for begin, end in self._spans if self._aligned else ():
            first, last = max(at, begin), min(at + len(piece), end)
            if first < last:
                self._take_residuals(piece[first - at : last - at], first)

    def _take_residuals(self, data: memoryview, at: int) -> None:
        kind, exponent = _EXPONENT[self._code]
        exponents = np.frombuffer(data, kind) & np.array(exponent, kind)
        if exponents.max() == exponent:
            places = np.flatnonzero(exponents == exponent) * self._width + at
            begins = np.array(self._layers)
            within = places - begins[np.searchsorted(begins, places, side="right") - 1]
            self.nonfinite.append(np.unique(within // self._stride))

    def finish(self) -> NDArray[np.int64]:
        """Return the tokens that are not finite. Layers that lie out of line are read once more."""
        for name in () if self._aligned else layer_names(self.header):
            wrong = ~self.layout.read(name).isfinite().all(1)
            self.nonfinite.append(wrong.nonzero()[:, 0].numpy())
        return np.unique(np.concatenate([_EMPTY, *self.nonfinite]))


def _read_through(descriptor: int, layout: Shard, header: StoreHeader, size: int, head: bytes, keep: bool) -> _Content:
    """Read a file from its first byte to its last; `head` is the header that its sizes demand."""
    begin, end = layout.begin, layout.tensors[CHECKSUMS_TENSOR][2]
    blocks = [(at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK)]
    tail = (end, size)
    file = memoryview(bytearray(size if keep else 0))
    buffer = memoryview(bytearray(0 if keep else max(begin, BLOCK, size - end)))
    gatherer, damaged, sums = _Gatherer(layout, header), list[tuple[int, int]](), bytearray()

    def read(first: int, last: int) -> memoryview:
        piece = file[first:last] if keep else buffer[: last - first]
        if not _fill(descriptor, piece, first):
            damaged.append((first, last))
        return piece

    found = bytes(read(0, begin))
    whole, mended = xxhash.xxh3_128(found), xxhash.xxh3_128(head)
    same = found == head
    damaged.clear()
    for first, last in blocks:
        piece = read(first, last)
        whole.update(piece)
        if not same:
            mended.update(piece)
        sums += xxhash.xxh3_64_digest(piece)
        gatherer.take(piece, first)
    if same:
        mended = whole.copy()
    piece = read(*tail)
    gatherer.take(piece, end)
    whole.update(piece)
    found_sums, wanted, rest = bytes(sums), bytes(piece[: len(sums)]), piece[len(sums) :]
    mended.update(found_sums)
    mended.update(rest)
    wrong = [span for i, span in enumerate(blocks) if found_sums[8 * i : 8 * i + 8] != wanted[8 * i : 8 * i + 8]]
    # Of what stands behind the checksums they tell nothing.
    wrong += [(end + len(sums), size)] if len(rest) else []
    return _Content(
        layout,
        found,
        whole.hexdigest(),
        mended.hexdigest(),
        sorted({*wrong, *(span for span in damaged if span != tail)}),
        gatherer.small,
        gatherer.finish(),
        file,
    )


def _fill(descriptor: int, target: memoryview, at: int) -> bool:
    """Read bytes of a file; zeros, and False, where the file has ended or the disk cannot read them."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], at + done)
        except OSError as error:
            if error.errno != errno.EIO:
                raise _UnreadableError(f"it cannot be read at byte {at + done}: {error.strerror}") from error
            count = 0
        if not count:
            target[done:] = bytes(len(target) - done)
            return False
        done += count
    return True


def _judge(
    number: int,
    rows: int,
    header: StoreHeader,
    content: _Content | None,
    fault: str,
    table: bytes | None,
    table_fault: str,
) -> Examined:
    """Say which rows are lost to what a reading found."""
    every, none = np.ones(rows, bool), np.zeros(rows, bool)
    ids: tuple[str, ...] = ()
    if table is not None:
        try:
            ids = tuple(decode_table(table, Path(rows_name(number)), rows, [ID]).column(ID).to_pylist())
        except StoreError as error:
            # As its writer left it, but no table: nothing that a disk does.
            table, fault = None, fault or str(error)
    if content is None or table is None:
        return Examined(number, fault or "no table of its rows is sound", table_fault, table, ids, every, none)
    layout = content.layout
    offsets = np.frombuffer(content.small["offsets"], "<i8")
    held = Held(layout, content.file) if len(content.file) else None
    if content.touches("offsets"):
        return Examined(number, fault, table_fault, table, ids, every, none, held)
    if offsets[0] != 0 or offsets[-1] != layout.tokens or (offsets[1:] < offsets[:-1]).any():
        fault = fault or f"its offsets do not rise from 0 to {layout.tokens}"
        return Examined(number, fault, table_fault, table, ids, every, none, held)
    damaged = _touched(layout, header, offsets, content.damaged)
    marks = np.frombuffer(content.small["token_marks"], np.uint8)
    unnamed = _rows_of(offsets, np.flatnonzero(marks >= 1 << len(header.positions))) & ~damaged
    if unnamed.any():
        fault = fault or "a token is marked as a position that the header does not name"
        damaged |= unnamed
    nonfinite = _rows_of(offsets, content.nonfinite) & ~damaged
    return Examined(number, fault, table_fault, table, ids, damaged, nonfinite, held)


def _rows_of(offsets: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return by row whether one of the tokens is its own."""
    found = np.zeros(len(offsets) - 1, bool)
    found[np.searchsorted(offsets, tokens, side="right") - 1] = True
    return found


def _touched(
    layout: Shard, header: StoreHeader, offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    """Return by row whether its residuals or tokens touch spans of bytes of the file."""
    touched = np.zeros(layout.rows, bool)
    for first, last in spans:
        for name in (*layer_names(header), *TOKEN_TENSORS):
            code, shape, begin = layout.tensors[name]
            stride = BYTES[code] * prod(shape[1:])
            end = begin + shape[0] * stride
            if first < end and last > begin:
                a, b = (max(first, begin) - begin) // stride, -(-(min(last, end) - begin) // stride)
                touched |= (offsets[:-1] < b) & (offsets[1:] > a) & (offsets[1:] > offsets[:-1])
    return touched
