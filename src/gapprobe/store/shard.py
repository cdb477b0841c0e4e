"""One shard: a safetensors file whose sizes are known before the first byte, written layer by layer, read by mapping.

The header of a file is read as hostile: nothing it claims is believed before it fits the size of the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from gapprobe.errors import StoreError
from gapprobe.store.disk import reserve, write_all
from gapprobe.store.format import (
    MAX_JSON_BYTES,
    ShardRecord,
    StoredRow,
    StoreHeader,
    layer_name,
    layout,
    parse_json,
)

ALIGNMENT = 4096
CHUNK = 4 << 20
_CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "U8": torch.uint8}
# Tensors that a later version or another program added may have types that we never read; their sizes still count.
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


def write_shard(
    descriptor: int, header: StoreHeader, rows: Sequence[StoredRow], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write rows into an empty file, its header last, and sync it. Return its size and SHA-256."""
    tokens = sum(len(row.token_ids) for row in rows)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (code, shape) in layout(header, len(rows), tokens).items():
        start, end = end, end + prod(shape) * _BYTES[code]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Data begin on a page, so that every tensor of whole pages can be mapped or read directly.
    text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
    head = len(text).to_bytes(8, "little") + text
    reserve(descriptor, len(head) + end)
    digest = hashlib.sha256(head)
    at = len(head)
    for tensor in _tensors(header, rows):
        data = _bytes(tensor)
        for begin in range(0, len(data), CHUNK):
            piece = data[begin : begin + CHUNK]
            digest.update(piece)
            write_all(descriptor, piece, at)
            at += len(piece)
    write_all(descriptor, memoryview(head), 0)
    os.fsync(descriptor)
    return at, digest.hexdigest()


def _tensors(header: StoreHeader, rows: Sequence[StoredRow]) -> Iterator[Tensor]:
    """Yield the tensors of `layout`, in its order, one at a time."""
    lengths = torch.tensor([0, *(len(row.token_ids) for row in rows)])
    yield lengths.cumsum(0)
    yield torch.cat([row.token_ids for row in rows])
    yield torch.cat([row.token_positions for row in rows])
    for index in range(len(header.layers)):
        yield torch.cat([row.residual[index] for row in rows])
    yield torch.cat([row.token_roles for row in rows])
    yield torch.cat([row.token_marks for row in rows])


def _bytes(tensor: Tensor) -> memoryview:
    """View a contiguous tensor as bytes, which numpy knows where it does not know bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


@dataclass(frozen=True)
class Shard:
    """A shard whose header has been checked. Files are opened anew for every read, so that any number may be in use."""

    path: Path
    rows: int
    tokens: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    """dtype, shape, and first byte in the file, by name."""

    @cached_property
    def offsets(self) -> Int64[Tensor, " rows_1"]:
        """Return where each row's tokens begin, and where the last one's end.

        Raises:
            StoreError: they do not rise from 0 to the number of tokens.
        """
        offsets = self.read("offsets")
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.tokens or bool((offsets[1:] < offsets[:-1]).any()):
            raise StoreError(f"{self.path} is damaged: its offsets do not rise from 0 to {self.tokens}")
        return offsets

    def tensor(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Map lines `first` to `last` of a tensor, privately: writing to it changes neither file nor later reads.

        Raises:
            StoreError: the file has become shorter or cannot be opened.
        """
        code, shape, begin = self.tensors[name]
        last = shape[0] if last is None else last
        shape = (last - first, *shape[1:])
        if not prod(shape):
            return torch.empty(shape, dtype=_CODES[code])
        stride = prod(shape[1:]) * _BYTES[code]
        data, at = _map(self.path, begin + first * stride, begin + last * stride)
        return torch.frombuffer(data, dtype=_CODES[code], count=prod(shape), offset=at).view(shape)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Read lines of a tensor into memory; unlike a map, the result holds no descriptor."""
        return self.tensor(name, first, last).clone()

    def layers(self, names: Sequence[str], first: int, last: int) -> Shaped[Tensor, "l t d"]:
        """Read the same few tokens of several layers, by plain reads: faster than maps for one row."""
        code, (_, width), _ = self.tensors[names[0]]
        result = torch.empty(len(names), last - first, width, dtype=_CODES[code])
        if result.numel():
            with _opened(self.path) as descriptor:
                for index, name in enumerate(names):
                    at = self.tensors[name][2] + first * width * _BYTES[code]
                    _read(descriptor, self.path, _bytes(result[index]), at)
        return result


class _opened:
    """A descriptor for reading, closed at the end; failures are StoreErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
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
            count = os.preadv(descriptor, [target[done:]], at + done)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error
        if not count:
            raise StoreError(f"{path} is truncated: it ends before byte {at + len(target)}")
        done += count


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
    offsets = tensors.get("offsets", ("", (0,), 0))[1]
    ids = tensors.get("token_ids", ("", (0,), 0))[1]
    rows, tokens = (prod(offsets) - 1, prod(ids)) if record is None else (record.rows, record.tokens)
    for name, wanted in layout(header, rows, tokens).items():
        if tensors.get(name, ())[:2] != wanted:
            raise StoreError(f"{path} is damaged: {name} is {tensors.get(name, ('missing',))[:2]}, not {wanted}")
    if not isinstance(metadata, dict) or cast(dict[str, object], metadata).get("fingerprint") != header.fingerprint:
        raise StoreError(f"{path} belongs to another store: its fingerprint differs from that of store.json")
    return Shard(path, rows, tokens, cast(dict[str, str], metadata), tensors)


def _check_entries(
    path: Path, entries: Mapping[str, object], begin: int, size: int
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return dtype, shape and first byte by name, once the tensors fill the file from `begin`, no hole, no overlap."""
    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in entries.items():
        fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
        code, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        numbers = (*shape, *span) if isinstance(shape, list) and isinstance(span, list) and len(span) == 2 else (-1,)
        if not isinstance(code, str) or code not in _BYTES or not all(type(n) is int and n >= 0 for n in numbers):
            raise StoreError(f"{path} is damaged: its header describes {name!r:.80} as {entry!r:.200}")
        dims = tuple(cast(list[int], shape))
        first, last = cast(list[int], span)
        if prod(dims) * _BYTES[code] != last - first:
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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
