"""Writing one shard: an arena of rows becomes a safetensors file whose header is written last.

Sizes are known before the first byte, so every tensor is written where it belongs, and moments and checksums are taken
from memory while the disk works.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
import xxhash
from torch import Tensor

from gapprobe.store import disk
from gapprobe.store.arena import Arena
from gapprobe.store.format import (
    BLOCK,
    CHECKSUMS_TENSOR,
    FORMAT,
    ROWS_TENSOR,
    VERSION,
    ShardSize,
    StoreHeader,
    layer_name,
    layout,
    position_name,
)
from gapprobe.store.moments import by_position
from gapprobe.store.shard import BYTES, as_bytes

ALIGNMENT = 4096
# Marked positions are stored a second time, densely, where that takes at most this share of the residuals.
DENSE_SHARE = 1 / 8


@dataclass(frozen=True)
class Plan:
    """Where everything goes in a shard: its first bytes, and dtype, shape and first byte in the file by tensor."""

    head: bytes
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    size: int


def plan_shard(header: StoreHeader, size: ShardSize) -> Plan:
    """Return how a shard of so many rows and tokens is laid out; it follows from nothing else."""
    metadata = {"format": FORMAT, "version": str(VERSION), "fingerprint": header.fingerprint}
    must, may = layout(header, size)
    sizes = must | {name: entry for name, entry in may.items() if name.startswith("moments.")}
    if size.rows * len(header.positions) <= size.tokens * DENSE_SHARE:
        sizes |= {name: entry for name, entry in may.items() if name.startswith("position.")}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(sizes, key=lambda name: -BYTES[sizes[name][0]]):
        begins[name] = end
        end += prod(sizes[name][1]) * BYTES[sizes[name][0]]
    sizes[CHECKSUMS_TENSOR], begins[CHECKSUMS_TENSOR] = ("U8", (-(-end // BLOCK), 8)), end
    described: dict[str, object] = {"__metadata__": metadata}
    for name, begin in begins.items():
        code, shape = sizes[name]
        described[name] = {
            "dtype": code, "shape": list(shape), "data_offsets": [begin, begin + prod(shape) * BYTES[code]]
        }  # fmt: skip
    head = _head(described)
    tensors = {name: (*sizes[name], len(head) + begin) for name, begin in begins.items()}
    return Plan(head, tensors, len(head) + end + prod(sizes[CHECKSUMS_TENSOR][1]))


def write_shard(descriptor: int, header: StoreHeader, arena: Arena, table: bytes) -> tuple[int, str]:
    """Write the rows of an arena into an empty file, its header last, and sync it. Return its size and XXH128."""
    plan = plan_shard(header, ShardSize(len(arena.ids), arena.tokens, len(table)))
    disk.reserve(descriptor, plan.size)

    data: dict[str, memoryview] = {}

    def write(name: str, tensor: Tensor) -> None:
        data[name] = as_bytes(tensor)
        disk.write_all(descriptor, data[name], plan.tensors[name][2])

    with ThreadPoolExecutor(1, "gapprobe-moments") as pool:
        # The processor takes the moments while the disk takes the residuals.
        found = pool.submit(by_position, arena.residual, arena.token_marks, len(header.positions))
        for index, layer in enumerate(header.layers):
            write(layer_name(layer), arena.residual[index])
        for i in range(len(header.positions)):
            if position_name(i) in plan.tensors:
                write(position_name(i), arena.at_position(i))
        write("offsets", arena.offsets)
        for name in ("token_ids", "token_positions", "token_roles", "token_marks"):
            write(name, cast(Tensor, getattr(arena, name)))
        write(ROWS_TENSOR, torch.frombuffer(bytearray(table), dtype=torch.uint8))
        for name, tensor in zip(("count", "mean", "std"), found.result(), strict=True):
            write(f"moments.{name}", tensor)
    whole, sums = xxhash.xxh3_128(plan.head), _BlockSums()
    for name in plan.tensors:
        if name != CHECKSUMS_TENSOR:
            whole.update(data[name])
            sums.update(data[name])
    checksums = sums.digest()
    whole.update(checksums)
    disk.write_all(descriptor, memoryview(checksums), plan.tensors[CHECKSUMS_TENSOR][2])
    disk.write_all(descriptor, memoryview(plan.head), 0)
    os.fsync(descriptor)
    return plan.size, whole.hexdigest()


def _head(entries: Mapping[str, object]) -> bytes:
    """Return length and header, padded so that data begin on a page and can be mapped or read directly."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
    return len(text).to_bytes(8, "little") + text


class _BlockSums:
    """XXH3-64 of each `BLOCK` bytes of a stream."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._open, self._size = xxhash.xxh3_64(), 0

    def update(self, data: memoryview) -> None:
        """Take more bytes of the stream."""
        while len(data):
            piece, data = data[: BLOCK - self._size], data[BLOCK - self._size :]
            self._open.update(piece)
            self._size += len(piece)
            if self._size == BLOCK:
                self._done += self._open.digest()
                self._open, self._size = xxhash.xxh3_64(), 0

    def digest(self) -> bytes:
        """Return the checksums of all blocks, the last of which may be short."""
        return bytes(self._done + (self._open.digest() if self._size else b""))
