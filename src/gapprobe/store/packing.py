"""Writing one shard: an arena of rows becomes a safetensors file whose header is written last.

Sizes are known before the first byte. Tensors are copied, in the order of the file, into pieces that lie as the disk
wants them, and checksums are taken there, while the disk takes the piece before.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import xxhash
from torch import Tensor

from gapprobe.kernels.memory import fresh
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

# Marked positions are stored a second time, densely, where that takes at most this share of the residuals.
DENSE_SHARE = 1 / 8
# Pieces of a file in memory at a time.
_ROOMS = 3


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
    if _pays(header, size.rows, size.tokens):
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


def derive(header: StoreHeader, arena: Arena) -> dict[str, Tensor]:
    """Return what a shard keeps besides the rows' own tensors, by name: moments and, where they pay, dense copies."""
    positions = range(len(header.positions))
    count, mean, std = by_position(arena.residual, arena.token_marks, len(header.positions))
    found = {"moments.count": count, "moments.mean": mean, "moments.std": std}
    if _pays(header, arena.rows, arena.tokens):
        found |= {position_name(i): arena.at_position(i) for i in positions}
    return found


def write_shard(
    descriptor: int, header: StoreHeader, arena: Arena, derived: Mapping[str, Tensor], table: bytes
) -> tuple[int, str]:
    """Write the rows of an arena into an empty file, its header last, and sync it.

    Args:
        descriptor: of the file.
        header: of the store.
        arena: the rows.
        derived: what `derive` makes of them.
        table: their columns, as parquet.

    Returns:
        The file's size and XXH128.
    """
    plan = plan_shard(header, ShardSize(arena.rows, arena.tokens, len(table)))
    tensors = {
        **{layer_name(layer): arena.residual[index] for index, layer in enumerate(header.layers)},
        "offsets": arena.offsets,
        "token_ids": arena.token_ids,
        "token_positions": arena.token_positions,
        "token_roles": arena.token_roles,
        "token_marks": arena.token_marks,
        ROWS_TENSOR: torch.frombuffer(bytearray(table), dtype=torch.uint8),
        **derived,
    }
    wrong = [name for name in plan.tensors if name != CHECKSUMS_TENSOR and tensors[name].shape != plan.tensors[name][1]]
    if wrong:
        raise ValueError(f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, planned {plan.tensors[wrong[0]][1]}")
    disk.reserve(descriptor, plan.size)
    disk.write_past_cache(descriptor)
    whole, checksums, at = xxhash.xxh3_128(plan.head), bytearray(), len(plan.head)
    with ThreadPoolExecutor(1, "gapprobe-write") as pool:
        # The disk has a piece to take and the next one at hand while a third is made.
        writing: deque[Future[None]] = deque()
        for piece in _pieces([as_bytes(tensors[name]) for name in plan.tensors if name != CHECKSUMS_TENSOR]):
            for block in range(0, len(piece), BLOCK):
                checksums += xxhash.xxh3_64_digest(piece[block : block + BLOCK])
            whole.update(piece)
            if len(writing) == _ROOMS - 1:
                writing.popleft().result()
            writing.append(pool.submit(disk.write_all, descriptor, piece, at))
            at += len(piece)
        for written in writing:
            written.result()
    whole.update(checksums)
    disk.write_all(descriptor, memoryview(checksums), at)
    disk.write_all(descriptor, memoryview(plan.head), 0)
    os.fsync(descriptor)
    return plan.size, whole.hexdigest()


def _pieces(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut what stands one after another in a file into large pieces, each in the memory of that `_ROOMS` before."""
    left = sum(map(len, parts))
    size = min(disk.PIECE, left)
    rooms = [fresh((-(-size // disk.ALIGNMENT) * disk.ALIGNMENT,), torch.uint8).numpy() for _ in range(_ROOMS)]
    number = filled = 0
    for part in parts:
        data = np.frombuffer(part, np.uint8)
        while len(data):
            count = min(len(data), size - filled)
            # numpy copies without holding the interpreter up.
            rooms[number % _ROOMS][filled : filled + count] = data[:count]
            data, filled = data[count:], filled + count
            if filled == size:
                yield rooms[number % _ROOMS].data[:filled]
                number += 1
                left -= filled
                size, filled = min(disk.PIECE, left), 0


def _pays(header: StoreHeader, rows: int, tokens: int) -> bool:
    """Return whether a shard keeps dense copies of its marked positions."""
    return rows * len(header.positions) <= tokens * DENSE_SHARE


def _head(entries: Mapping[str, object]) -> bytes:
    """Return length and header, padded so that data begin on a page and can be mapped or read directly."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // disk.ALIGNMENT) * disk.ALIGNMENT - 8)
    return len(text).to_bytes(8, "little") + text
