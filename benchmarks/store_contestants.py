"""What a contestant of the store's benchmark is, and those that need nothing but gapprobe's own dependencies.

Those that need libraries of their own are in `store_peers`. Each is written as a careful user would write it.
"""

from __future__ import annotations

import io
import mmap
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors
import torch
from jaxtyping import Float16, UInt8
from safetensors.torch import save_file
from torch import Tensor

from benchmarks._measure import files_of, sync_tree
from benchmarks.store_data import DTYPE, POSITION, Data, concatenated, offsets_of, row_id
from gapprobe.store import packing
from gapprobe.store.format import StoredRow, layer_name
from gapprobe.store.reader import open_store
from gapprobe.store.writer import StoreWriter

OFFSETS = "offsets.npy"
Buffer = UInt8[np.ndarray, " b"]


class Contestant(ABC):
    """One way to keep activations: `write` makes a folder, an instance is that folder opened for reading."""

    name: ClassVar[str]
    label: ClassVar[str]
    """For readers who do not know the name."""
    module: ClassVar[str] = "gapprobe"
    """What must be importable."""
    distributions: ClassVar[tuple[str, ...]] = ()
    """Whose versions the results name."""
    reads: ClassVar[bool] = True
    """Whether it takes part in more than writing."""

    @staticmethod
    @abstractmethod
    def write(folder: Path, data: Data) -> None:
        """Write all rows, batch by batch, and return when they are safe on disk."""

    @abstractmethod
    def __init__(self, folder: Path) -> None:
        """Open a written folder."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Read one layer of all rows."""

    @abstractmethod
    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Read all layers and tokens of one row."""

    @abstractmethod
    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Read the last token of every row, layer by layer."""

    @abstractmethod
    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Read all layers and tokens of some rows, one after another in the order given."""

    def close(self) -> None:  # noqa: B027 (most hold nothing that needs closing)
        """Close what is open."""


class Plain(Contestant):
    """The disk's own limit: the same bytes written and read one after another, with no way to find anything in them.

    Reads give the first bytes of the files, as many as the operation asks for, in calls of the same sizes.
    """

    name = "plain"
    label = "plain sequential I/O"
    PIECE = 8 << 20

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Write the rows as they lie in memory, in pieces of about `PIECE`, and fsync every file."""
        for number, rows in enumerate(data.shards()):
            descriptor = os.open(folder / f"{number:06d}", os.O_CREAT | os.O_WRONLY)
            held: list[memoryview] = []
            for row in rows:
                held.append(row.residual.numpy().data.cast("B"))
                if sum(map(len, held)) >= Plain.PIECE:
                    _write(descriptor, held)
                    held = []
            _write(descriptor, held)
            os.fsync(descriptor)
            os.close(descriptor)
        np.save(folder / OFFSETS, data.offsets)
        np.save(folder / "shape.npy", [data.layers, data.width])
        sync_tree(folder)

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / OFFSETS)
        self._layers, self._width = np.load(folder / "shape.npy").tolist()
        paths = [path for path in files_of(folder) if not path.suffix]
        self._files = [(os.open(path, os.O_RDONLY), path.stat().st_size) for path in paths]
        self._file = self._at = 0

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def layer(self, layer: int) -> UInt8[Tensor, " b"]:  # noqa: ARG002 (the next bytes, whatever they are)
        """Read as many bytes as a layer has."""
        return self._next(int(self._offsets[-1]))

    def row(self, row: int) -> UInt8[Tensor, " b"]:
        """Read as many bytes as the row has."""
        return self._next(self._layers * int(self._offsets[row + 1] - self._offsets[row]))

    def last(self) -> list[UInt8[Tensor, " b"]]:
        """Read as many bytes as the last tokens have."""
        return [self._next(len(self)) for _ in range(self._layers)]

    def some(self, rows: Sequence[int]) -> UInt8[Tensor, " b"]:
        """Read as many bytes as the rows have."""
        return self._next(self._layers * sum(int(self._offsets[row + 1] - self._offsets[row]) for row in rows))

    def close(self) -> None:
        """Close the files."""
        for descriptor, _ in self._files:
            os.close(descriptor)

    def _next(self, vectors: int) -> UInt8[Tensor, " b"]:
        result = torch.empty(vectors * self._width * DTYPE.itemsize, dtype=torch.uint8)
        target, done = result.numpy().data, 0
        while done < len(target):
            descriptor, size = self._files[self._file]
            piece = target[done : done + min(self.PIECE, size - self._at)]
            count = os.preadv(descriptor, [piece], self._at)
            done, self._at = done + count, self._at + count
            if self._at == size:
                # After the last file the first follows: 50 rows of a small store may be more than the store.
                self._file, self._at = (self._file + 1) % len(self._files), 0
        return result


class PlainDirect(Plain):
    """The same bytes written past the page cache, from two buffers that are filled and written in turn.

    It only writes: what it leaves on the disk is what `Plain` leaves.
    """

    name = "plain (direct)"
    label = "plain sequential write with O_DIRECT"
    module = "fcntl"
    reads = False
    PIECE = 4 << 20
    PAGE = 4096

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Write the rows as they lie in memory, in pieces of `PIECE`, and fsync every file."""
        buffers = [np.frombuffer(mmap.mmap(-1, PlainDirect.PIECE), np.uint8) for _ in range(2)]
        with ThreadPoolExecutor(1) as pool:
            for number, rows in enumerate(data.shards()):
                descriptor = os.open(folder / f"{number:06d}", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
                size = sum(row.residual.nbytes for row in rows)
                os.posix_fallocate(descriptor, 0, size)
                at, writing = 0, None
                for buffer, filled in PlainDirect._pieces(rows, buffers):
                    if writing:
                        writing.result()
                    # The last page is written whole, and cut afterwards.
                    whole = -(-filled // PlainDirect.PAGE) * PlainDirect.PAGE
                    writing = pool.submit(os.pwrite, descriptor, buffer[:whole], at)
                    at += filled
                if writing:
                    writing.result()
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
                os.close(descriptor)
        np.save(folder / OFFSETS, data.offsets)
        np.save(folder / "shape.npy", [data.layers, data.width])
        sync_tree(folder)

    @staticmethod
    def _pieces(rows: Sequence[StoredRow], buffers: list[Buffer]) -> Iterator[tuple[Buffer, int]]:
        filled = 0
        for row in rows:
            left = row.residual.view(-1).view(torch.uint8).numpy()
            while len(left):
                count = min(len(left), PlainDirect.PIECE - filled)
                buffers[0][filled : filled + count] = left[:count]
                left, filled = left[count:], filled + count
                if filled == PlainDirect.PIECE:
                    yield buffers[0], filled
                    buffers.reverse()
                    filled = 0
        if filled:
            yield buffers[0], filled


class Gapprobe(Contestant):
    """Ours: a store with its table of rows, checksums and statistics, ids looked up by name."""

    name = "gapprobe"
    label = "gapprobe"
    distributions = ("gapprobe", "torch", "pyarrow", "xxhash")

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Append batch by batch."""
        with StoreWriter(folder, data.header, data.shard_bytes) as writer:
            for batch in data.batches:
                writer.append(batch)

    def __init__(self, folder: Path) -> None:
        self._store = open_store(folder)

    def __len__(self) -> int:
        return len(self._store)

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Ask for the layer."""
        return self._store.layer(layer)

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Ask for the row by its id."""
        return self._store.row(row_id(row)).residual

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Ask for the position, layer by layer."""
        return [self._store.layer(layer, position=POSITION) for layer in self._store.header.layers]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Ask for a batch by its ids."""
        return self._store.batch([row_id(row) for row in rows]).residual


class GapprobeWithoutDense(Gapprobe):
    """Ours without the second, dense copy of the marked positions that shards of long rows have."""

    name = "gapprobe (no dense)"
    label = "gapprobe, no dense copies"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Append as usual while no share of the shard is small enough for dense copies."""
        usual = packing.DENSE_SHARE
        packing.DENSE_SHARE = 0
        try:
            Gapprobe.write(folder, data)
        finally:
            packing.DENSE_SHARE = usual


class GapprobeOneShard(Gapprobe):
    """Ours in a single shard, as `gapprobe store compact` can make it: a layer is mapped and not copied."""

    name = "gapprobe (one shard)"
    label = "gapprobe, one shard"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Append as usual; nothing is sealed before the end."""
        Gapprobe.write(folder, replace(data, shard_bytes=2 * data.bytes))


class Safetensors(Contestant):
    """`save_file` of about 256 MB of rows a file, one tensor a layer; read through `safe_open`."""

    name = "safetensors"
    label = "safetensors save_file / safe_open"
    distributions = ("safetensors",)

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Save a file for each shard's worth of rows."""
        for number, rows in enumerate(data.shards()):
            tensors = {layer_name(layer): concatenated(rows, layer) for layer in range(data.layers)}
            save_file({**tensors, "offsets": offsets_of(rows)}, folder / f"{number:06d}.safetensors")
        sync_tree(folder)

    def __init__(self, folder: Path) -> None:
        self._files = [safetensors.safe_open(path, "pt") for path in files_of(folder)]
        self._offsets = [file.get_tensor("offsets").numpy() for file in self._files]
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self._layers = sum(name != "offsets" for name in self._files[0].keys())  # noqa: SIM118 (no mapping)

    def __len__(self) -> int:
        return int(self._first[-1])

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Join the files' tensors."""
        return torch.cat([file.get_tensor(layer_name(layer)) for file in self._files])

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Slice every layer."""
        return torch.stack(self._slices(row))

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Pick lines of the mapped tensors: a slice for each row would take longer."""
        lines = [torch.from_numpy(offsets[1:] - 1) for offsets in self._offsets]
        return [
            torch.cat(
                [f.get_tensor(layer_name(layer)).index_select(0, at) for f, at in zip(self._files, lines, strict=True)]
            )
            for layer in range(self._layers)
        ]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Slice every layer of every row."""
        slices = [self._slices(row) for row in rows]
        return torch.stack([torch.cat(parts) for parts in zip(*slices, strict=True)])

    def close(self) -> None:
        """Let go of the maps."""
        self._files.clear()

    def _slices(self, row: int) -> list[Float16[Tensor, "t d"]]:
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        first, last = self._offsets[number][row - self._first[number] :][:2].tolist()
        return [self._files[number].get_slice(layer_name(layer))[first:last] for layer in range(self._layers)]


class Memmap(Contestant):
    """One `.npy` a layer, filled and read through numpy's memory map. The number of tokens must be known beforehand."""

    name = "numpy memmap"
    label = "numpy memmap"
    distributions = ("numpy",)

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Fill the maps batch by batch."""
        shape, dtype = (data.tokens, data.width), np.float16
        maps = [
            np.lib.format.open_memmap(folder / f"{layer_name(layer)}.npy", mode="w+", dtype=dtype, shape=shape)
            for layer in range(data.layers)
        ]
        at = 0
        for batch in data.batches:
            count = sum(len(row.token_ids) for row in batch)
            for layer, target in enumerate(maps):
                torch.cat([row.residual[layer] for row in batch], out=torch.from_numpy(target[at : at + count]))
            at += count
        for target in maps:
            target.flush()
        np.save(folder / OFFSETS, data.offsets)
        sync_tree(folder)

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / OFFSETS)
        # Copy on write: torch takes no read-only arrays, and nobody writes.
        self._maps = [np.load(path, mmap_mode="c") for path in files_of(folder) if path.name != OFFSETS]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Hand out the map itself."""
        return torch.from_numpy(self._maps[layer])

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Copy a slice of every map."""
        return self.some([row])

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Pick lines of every map."""
        return [torch.from_numpy(array[self._offsets[1:] - 1]) for array in self._maps]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Copy slices of every map."""
        spans = [slice(self._offsets[row], self._offsets[row + 1]) for row in rows]
        return torch.from_numpy(np.stack([np.concatenate([array[span] for span in spans]) for array in self._maps]))

    def close(self) -> None:
        """Let go of the maps."""
        self._maps.clear()


class Sqlite(Contestant):
    """What vlm-lens does: a pickle of `torch.save` for every layer of every row in an SQLite table. With an index."""

    name = "sqlite"
    label = "SQLite blobs of torch.save"
    FILE = "activations.db"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Commit every batch, which SQLite syncs."""
        with closing(sqlite3.connect(folder / Sqlite.FILE)) as database:
            database.execute("CREATE TABLE activations (row INTEGER, layer INTEGER, tensor BLOB)")
            database.execute("CREATE UNIQUE INDEX found ON activations (layer, row)")
            at = 0
            for batch in data.batches:
                for number, row in enumerate(batch, at):
                    blobs = ((number, layer, _pickled(row.residual[layer])) for layer in range(data.layers))
                    database.executemany("INSERT INTO activations VALUES (?, ?, ?)", blobs)
                database.commit()
                at += len(batch)

    def __init__(self, folder: Path) -> None:
        self._database = sqlite3.connect(folder / self.FILE)
        self._layers = self._database.execute("SELECT MAX(layer) FROM activations").fetchone()[0] + 1

    def __len__(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM activations WHERE layer = 0").fetchone()[0]

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Join the blobs of a layer."""
        return torch.cat(self._tensors("layer = ? ORDER BY row", layer))

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Stack the blobs of a row."""
        return torch.stack([self._tensors("layer = ? AND row = ?", layer, row)[0] for layer in range(self._layers)])

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Load every blob: a part of one cannot be had."""
        return [
            torch.stack([tensor[-1] for tensor in self._tensors("layer = ? ORDER BY row", layer)])
            for layer in range(self._layers)
        ]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Join the rows."""
        return torch.cat([self.row(row) for row in rows], dim=1)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _tensors(self, where: str, *values: int) -> list[Tensor]:
        found = self._database.execute(f"SELECT tensor FROM activations WHERE {where}", values)
        return [torch.load(io.BytesIO(blob)) for (blob,) in found]


def _write(descriptor: int, pieces: list[memoryview]) -> None:
    while pieces:
        count = os.writev(descriptor, pieces)
        while pieces and count >= len(pieces[0]):
            count -= len(pieces.pop(0))
        if pieces:
            pieces[0] = pieces[0][count:]


def _pickled(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    # Without the clone torch.save would keep the whole row's memory for each of its layers.
    torch.save(tensor.clone(), stream)
    return stream.getvalue()
