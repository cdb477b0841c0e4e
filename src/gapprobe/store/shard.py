"""Reading one shard: a safetensors file of which parts are mapped or read. `packing` writes it.

The header of a file is read as hostile: nothing it claims is believed before it fits the size of the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xxhash
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import StoreError
from gapprobe.store import disk
from gapprobe.store.format import (
    BLOCK,
    CHECKSUMS_TENSOR,
    MAX_JSON_BYTES,
    MAX_SIZE,
    ROWS_TENSOR,
    ShardRecord,
    ShardSize,
    StoreHeader,
    layer_name,
    layout,
    parse_json,
)

TOKEN_TENSORS = ("token_ids", "token_positions", "token_roles", "token_marks")
# Large enough to keep a disk busy, small enough for a cache.
PIECE = 8 << 20
# Reading over a gap this small is cheaper than a read for each side of it: the disk gives whole pages.
_GAP = 4 << 10
_MAX_AXES = 16
CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "U8": torch.uint8}
# Tensors that a later version or another program added may have types that we never read; their sizes still count.
BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous tensor as bytes, which numpy knows where it does not know bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


@dataclass(frozen=True)
class Shard:
    """A shard whose header has been checked. Files are opened anew for every read, so that any number may be in use."""

    path: Path
    rows: int
    tokens: int
    begin: int
    """Where the data begin in the file."""
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    """dtype, shape, and first byte in the file, by name."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Return where each row's tokens begin, and where the last one's end.

        Raises:
            StoreError: they do not rise from 0 to the number of tokens.
        """
        offsets = self.read("offsets").numpy()
        if offsets[0] != 0 or offsets[-1] != self.tokens or (offsets[1:] < offsets[:-1]).any():
            raise StoreError(f"{self.path} is damaged: its offsets do not rise from 0 to {self.tokens}")
        return offsets

    @cached_property
    def marks(self) -> NDArray[np.uint8]:
        """Return which positions each token is marked as."""
        return self.read("token_marks").numpy()

    def marked(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, by row, the first token marked as a position (0 where there is none) and how many are."""
        if position not in self._marked:
            tokens = np.flatnonzero(self.marks >> position & 1)
            begin = np.searchsorted(tokens, self.offsets)
            count = np.diff(begin)
            first = np.zeros(len(count), np.int64)
            first[count > 0] = tokens[begin[:-1][count > 0]]
            self._marked[position] = first, count
        return self._marked[position]

    @cached_property
    def _marked(self) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return {}

    def tensor(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Map lines `first` to `last` of a tensor, privately: writing to it changes neither file nor later reads.

        Raises:
            StoreError: the file has become shorter or cannot be opened.
        """
        code, shape, begin = self.tensors[name]
        last = shape[0] if last is None else last
        shape = (last - first, *shape[1:])
        if not prod(shape):
            return torch.empty(shape, dtype=CODES[code])
        stride = prod(shape[1:]) * BYTES[code]
        data, at = _map(self.path, begin + first * stride, begin + last * stride)
        return torch.frombuffer(data, dtype=CODES[code], count=prod(shape), offset=at).view(shape)

    def flat(self, name: str, first: int, last: int) -> Shaped[Tensor, "n d"]:
        """Map lines of a tensor as `tensor` does; its last axis is a line, whatever axes stand before it."""
        code, shape, begin = self.tensors[name]
        return replace(self, tensors={name: (code, (prod(shape[:-1]), shape[-1]), begin)}).tensor(name, first, last)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Read lines of a tensor into memory; unlike a map, the result holds no descriptor and may lie anywhere."""
        code, shape, begin = self.tensors[name]
        last = shape[0] if last is None else last
        result = torch.empty(last - first, *shape[1:], dtype=CODES[code])
        if result.numel():
            with _opened(self.path) as descriptor:
                stride = prod(shape[1:]) * BYTES[code]
                _read(descriptor, self.path, as_bytes(result), begin + first * stride)
        return result

    def take(
        self,
        names: Sequence[str],
        lines: NDArray[np.int64],
        out: Shaped[Tensor, "k n d"],
        places: NDArray[np.int64],
    ) -> None:
        """Read the same lines of several tensors into `out[:, places]`, by large sequential reads where lines are near.

        The last axis of a tensor is a line, whatever axes stand before it.
        """
        if not len(lines) or not out.numel():
            return
        if (lines[1:] <= lines[:-1]).any():
            order = np.argsort(lines, kind="stable")
            lines, places = lines[order], places[order]
        target = out.view(torch.uint8).numpy()
        stride = target.shape[2]
        spans = [
            (a, b, whole and bool((np.diff(places[a:b]) == 1).all()), int(lines[b - 1] - lines[a]) + 1)
            for a, b, whole in _spans(lines, stride)
        ]
        scratch = np.empty(
            (max((count for _, _, straight, count in spans if not straight), default=0), stride), np.uint8
        )
        asked = False
        with _opened(self.path) as descriptor:
            for k, name in enumerate(names):
                begin = self.tensors[name][2]
                for a, b, straight, count in spans:
                    into = target[k, int(places[a]) :][:count] if straight else scratch[:count]
                    data, at = into.data.cast("B"), begin + int(lines[a]) * stride
                    if asked or not _read_cached(descriptor, data, at):
                        if not asked:
                            # The disk would have to be waited for: have it fetch all of it, in the order that suits it.
                            for other in names:
                                for c, _, _, size in spans:
                                    _ask_for(descriptor, self.tensors[other][2] + int(lines[c]) * stride, size * stride)
                            asked = True
                        _read(descriptor, self.path, data, at)
                    if not straight:
                        target[k, places[a:b]] = into[lines[a:b] - lines[a]]

    def ask_for(self, names: Sequence[str], first: int, last: int) -> None:
        """Have the disk fetch the same lines of several tensors ahead of their being read."""
        with _opened(self.path) as descriptor:
            for name in names:
                code, shape, begin = self.tensors[name]
                stride = shape[-1] * BYTES[code]
                _ask_for(descriptor, begin + first * stride, (last - first) * stride)

    def span(self, names: Sequence[str], first: int, last: int) -> Shaped[Tensor, "k n d"]:
        """Read lines one after another of several tensors."""
        code, shape, _ = self.tensors[names[0]]
        out = torch.empty(len(names), last - first, shape[-1], dtype=CODES[code])
        self.take(names, np.arange(first, last), out, np.arange(last - first))
        return out

    def table(self) -> bytes:
        """Return the bytes of the table of rows."""
        return bytes(as_bytes(self.read(ROWS_TENSOR)))

    def damaged_blocks(self, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
        """Return the spans of bytes of the file whose content is not what its checksum was taken of.

        Reads all of it, or what the blocks hold that bytes `first` to `last` lie in.
        """
        begin, end = self.begin, self.tensors[CHECKSUMS_TENSOR][2]
        wanted = bytes(as_bytes(self.read(CHECKSUMS_TENSOR)))
        bad: list[tuple[int, int]] = []
        piece = memoryview(bytearray(BLOCK))
        with _opened(self.path) as descriptor:
            for number, at in enumerate(range(begin, end, BLOCK)):
                data = piece[: min(BLOCK, end - at)]
                if at + len(data) <= first or (last is not None and at >= last):
                    continue
                _read(descriptor, self.path, data, at)
                if xxhash.xxh3_64_digest(data) != wanted[8 * number : 8 * number + 8]:
                    bad.append((at, at + len(data)))
        return bad


def _spans(lines: NDArray[np.int64], stride: int) -> Iterator[tuple[int, int, bool]]:
    """Cut rising lines where a gap is not worth reading over, and where a piece is full; say which have no gap."""
    gap, most, steps = max(1, _GAP // stride), max(1, PIECE // stride), np.diff(lines)
    cuts = (np.flatnonzero(steps > gap) + 1).tolist()
    for a, b in zip((0, *cuts), (*cuts, len(lines)), strict=True):
        if (steps[a : b - 1] == 1).all():
            yield a, b, True
            continue
        while a < b:
            stop = a + int(np.searchsorted(lines[a:b], lines[a] + most))
            yield a, stop, False
            a = stop


class _opened:
    """A descriptor for reading, closed at the end; failures are StoreErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = disk.open_regular(self.path)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}. Run `gapprobe store verify`.") from error
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _map(path: Path, begin: int, end: int) -> tuple[mmap.mmap | bytearray, int]:
    """Return a writable buffer over bytes of a file, and where in it they begin."""
    with _opened(path) as descriptor:
        # Touching a mapped page behind the end of the file would kill the process.
        if os.fstat(descriptor).st_size < end:
            raise StoreError(f"{path} is truncated: it ends before byte {end}. Run `gapprobe store verify`.")
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            return mmap.mmap(descriptor, end - page, access=mmap.ACCESS_COPY, offset=page), begin - page
        except OSError:
            # Some file systems refuse to map (ENODEV); reading costs memory but works everywhere.
            data = bytearray(end - begin)
            _read(descriptor, path, memoryview(data), begin)
            return data, 0


def _read(descriptor: int, path: Path, target: memoryview, at: int) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:] if done else target], at + done)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error
        if not count:
            raise StoreError(f"{path} is truncated: it ends before byte {at + len(target)}")
        done += count


def _read_cached(descriptor: int, target: memoryview, at: int) -> bool:
    """Read what is in memory already; return False where the disk would have to be waited for, or who knows."""
    try:
        return os.preadv(descriptor, [target], at, os.RWF_NOWAIT) == len(target)
    # Linux alone has the flag, and not all of its file systems.
    except (OSError, AttributeError):
        return False


def _ask_for(descriptor: int, at: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)


def open_shard(path: Path, header: StoreHeader, record: ShardRecord | None = None) -> Shard:
    """Check a shard's header against its file, its store and, when given, its line of the manifest.

    Raises:
        StoreError: the file is missing, truncated, no safetensors file, or not a shard of this store.
    """
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if record is not None and size != record.shard_bytes:
            raise StoreError(
                f"{path} has {size} bytes, the manifest says {record.shard_bytes}; see `gapprobe store verify`"
            )
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise StoreError(f"{path} is damaged: no safetensors header")
        text = bytearray(length)
        _read(descriptor, path, memoryview(text), 8)
    entries = parse_json(bytes(text), str(path))
    metadata = entries.pop("__metadata__", None)
    tensors = _check_entries(path, entries, 8 + length, size)
    lengths = [prod(tensors.get(name, ("", (0,), 0))[1]) for name in ("offsets", "token_ids", ROWS_TENSOR)]
    claimed = ShardSize(lengths[0] - 1, lengths[1], lengths[2])
    wanted = claimed if record is None else ShardSize(record.rows, record.tokens, record.rows_bytes)
    must, may = layout(header, wanted)
    moments = [name for name in may if name.startswith("moments.")]
    if any(name in tensors for name in moments):
        must |= {name: may[name] for name in moments}
    must[CHECKSUMS_TENSOR] = ("U8", (-(-_checksummed(tensors, 8 + length) // BLOCK), 8))
    for name, entry in (must | {name: entry for name, entry in may.items() if name in tensors}).items():
        if tensors.get(name, ())[:2] != entry:
            raise StoreError(f"{path} is damaged: {name} is {tensors.get(name, ('missing',))[:2]}, not {entry}")
    if not isinstance(metadata, dict) or cast(dict[str, object], metadata).get("fingerprint") != header.fingerprint:
        raise StoreError(f"{path} belongs to another store: its fingerprint differs from that of store.json")
    return Shard(path, wanted.rows, wanted.tokens, 8 + length, tensors)


def _checksummed(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], begin: int) -> int:
    """Return how many bytes of data stand before the block checksums."""
    return tensors[CHECKSUMS_TENSOR][2] - begin if CHECKSUMS_TENSOR in tensors else 0


def _check_entries(
    path: Path, entries: Mapping[str, object], begin: int, size: int
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return dtype, shape and first byte by name, once the tensors fill the file from `begin`, no hole, no overlap."""
    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in entries.items():
        fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
        code, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        numbers = (*shape, *span) if isinstance(shape, list) and isinstance(span, list) and len(span) == 2 else (-1,)
        sound = len(numbers) <= _MAX_AXES and all(type(n) is int and 0 <= n < MAX_SIZE for n in numbers)
        if not isinstance(code, str) or code not in BYTES or not sound:
            raise StoreError(f"{path} is damaged: its header describes {name!r:.80} as {entry!r:.200}")
        dims = tuple(cast(list[int], shape))
        first, last = cast(list[int], span)
        if prod(dims) * BYTES[code] != last - first:
            raise StoreError(f"{path} is damaged: {name!r:.80} takes {last - first} bytes, its shape another number")
        found.append((first, last, name, code, dims))
    at = 0
    for first, last, name, _, _ in sorted(found):
        if first != at:
            raise StoreError(f"{path} is damaged: hole or overlap before {name!r:.80}")
        at = last
    if begin + at != size:
        raise StoreError(f"{path} is damaged: its tensors end at byte {begin + at}, the file at {size}")
    return {name: (code, dims, begin + first) for first, _, name, code, dims in found}


def layer_names(header: StoreHeader) -> list[str]:
    """Return the names of all layers' tensors, in the order of the header."""
    return [layer_name(layer) for layer in header.layers]


def file_xxh128(path: Path) -> str:
    """Return the XXH128 of a file in hex, as `xxh128sum` prints it."""
    digest = xxhash.xxh3_128()
    with _opened(path) as descriptor:
        at = 0
        while piece := os.pread(descriptor, PIECE, at):
            digest.update(piece)
            at += len(piece)
    return digest.hexdigest()
