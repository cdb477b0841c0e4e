"""Contestants of the store's benchmark that need libraries of their own (extra `bench`), imported when they run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from benchmarks._measure import sync_tree
from benchmarks.store_contestants import (
    Contestant,
    Gapprobe,
    GapprobeOneShard,
    GapprobeWithoutDense,
    Memmap,
    Plain,
    PlainDirect,
    Safetensors,
    Sqlite,
)
from benchmarks.store_data import Data, concatenated
from gapprobe.store.format import StoredRow, layer_name


class Hdf5(Contestant):
    """h5py, contiguous: one dataset a layer, its size known beforehand."""

    name = "h5py"
    label = "h5py, sizes known"
    module = "h5py"
    distributions = ("h5py",)
    FILE = "activations.h5"

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Write slices batch by batch."""
        with _h5py().File(folder / Hdf5.FILE, "w") as file:
            layers = [
                file.create_dataset(layer_name(layer), (data.tokens, data.width), np.float16)
                for layer in range(data.layers)
            ]
            at = 0
            for batch in data.batches:
                count = sum(len(row.token_ids) for row in batch)
                for layer, dataset in enumerate(layers):
                    dataset[at : at + count] = concatenated(batch, layer).numpy()
                at += count
            file["offsets"] = data.offsets
        sync_tree(folder)

    def __init__(self, folder: Path) -> None:
        self._file = _h5py().File(folder / self.FILE, "r")
        self._offsets = self._file["offsets"][:]
        self._layers = [self._file[name] for name in sorted(set(self._file) - {"offsets"})]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Read the dataset straight into new memory."""
        return torch.from_numpy(_whole(self._layers[layer]))

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Read a slice of every dataset."""
        return self.some([row])

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Select lines, which h5py does faster from contiguous datasets than reading all of them."""
        return [torch.from_numpy(dataset[self._offsets[1:] - 1]) for dataset in self._layers]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Read slices of every dataset straight into place."""
        spans = [(int(self._offsets[row]), int(self._offsets[row + 1])) for row in rows]
        shape = (len(self._layers), sum(last - first for first, last in spans), self._layers[0].shape[1])
        result = np.empty(shape, np.float16)
        for dataset, target in zip(self._layers, result, strict=True):
            at = 0
            for first, last in spans:
                dataset.read_direct(target, np.s_[first:last], np.s_[at : at + last - first])
                at += last - first
        return torch.from_numpy(result)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Hdf5Resizable(Hdf5):
    """h5py as it must be used where the number of tokens is not known beforehand: chunked datasets that grow."""

    name = "h5py (resizable)"
    label = "h5py, growing"
    CHUNK = 64
    """Tokens; 128 KiB at width 1,024, of which HDF5's cache of 1 MiB holds eight."""

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Grow every dataset by every batch."""
        with _h5py().File(folder / Hdf5.FILE, "w") as file:
            layers = [
                file.create_dataset(
                    layer_name(layer),
                    (0, data.width),
                    np.float16,
                    maxshape=(None, data.width),
                    chunks=(Hdf5Resizable.CHUNK, data.width),
                )
                for layer in range(data.layers)
            ]
            at = 0
            for batch in data.batches:
                count = sum(len(row.token_ids) for row in batch)
                for layer, dataset in enumerate(layers):
                    dataset.resize(at + count, axis=0)
                    dataset[at:] = concatenated(batch, layer).numpy()
                at += count
            file["offsets"] = data.offsets
        sync_tree(folder)

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Read every dataset and pick: faster than selecting lines of chunked datasets."""
        return [torch.from_numpy(_whole(dataset)[self._offsets[1:] - 1]) for dataset in self._layers]


class Zarr(Contestant):
    """zarr 3: one array a layer without compression, its size known beforehand, whole chunks written at once."""

    name = "zarr"
    label = "zarr 3, uncompressed"
    module = "zarr"
    distributions = ("zarr",)
    CHUNK = 1024
    """Tokens; 2 MiB at width 1,024. Larger chunks read layers faster and rows slower."""

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Hold rows until they fill chunks, then write these."""
        group = _zarr().open_group(folder, mode="w")
        shape, chunks = (data.tokens, data.width), (Zarr.CHUNK, data.width)
        layers = [
            group.create_array(
                layer_name(i), shape=shape, chunks=chunks, dtype="float16", compressors=None, filters=None
            )
            for i in range(data.layers)
        ]
        at = 0
        for block in _blocks(data, Zarr.CHUNK):
            for array, values in zip(layers, block, strict=True):
                array[at : at + block.shape[1]] = values.numpy()
            at += block.shape[1]
        group.create_array("offsets", data=data.offsets, compressors=None, filters=None)
        sync_tree(folder)

    def __init__(self, folder: Path) -> None:
        group = _zarr().open_group(folder, mode="r")
        self._offsets = group["offsets"][:]
        self._layers = [group[name] for name in sorted(set(group.array_keys()) - {"offsets"})]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Read the array."""
        return torch.from_numpy(self._layers[layer][:])

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Read a slice of every array."""
        first, last = self._offsets[row : row + 2].tolist()
        return torch.from_numpy(np.stack([array[first:last] for array in self._layers]))

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Select lines of every array."""
        lines = (self._offsets[1:] - 1, slice(None))
        return [torch.from_numpy(array.get_orthogonal_selection(lines)) for array in self._layers]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Select the lines of all rows at once, so that no chunk is read twice."""
        lines = np.concatenate([np.arange(self._offsets[row], self._offsets[row + 1]) for row in rows])
        return torch.from_numpy(
            np.stack([array.get_orthogonal_selection((lines, slice(None))) for array in self._layers])
        )


class Lance(Contestant):
    """Lance: a line a token, a column of fixed-size lists a layer, written as a stream of batches."""

    name = "lance"
    label = "Lance"
    module = "lance"
    distributions = ("pylance",)

    @staticmethod
    def write(folder: Path, data: Data) -> None:
        """Write a record batch for each batch of rows, and the offsets as a table of their own."""
        lance, arrow = _lance()
        kind = arrow.list_(arrow.float16(), data.width)
        schema = arrow.schema([(f"residual_{layer:02d}", kind) for layer in range(data.layers)])

        def batches() -> Iterator[Any]:
            for batch in data.batches:
                values = [concatenated(batch, layer).view(-1).numpy() for layer in range(data.layers)]
                columns = [arrow.FixedSizeListArray.from_arrays(arrow.array(each), data.width) for each in values]
                yield arrow.record_batch(columns, schema=schema)

        lance.write_dataset(arrow.RecordBatchReader.from_batches(schema, batches()), folder / "tokens.lance")
        lance.write_dataset(arrow.table({"offset": data.offsets}), folder / "offsets.lance")
        sync_tree(folder)

    def __init__(self, folder: Path) -> None:
        lance, _ = _lance()
        # Arrow's memory is read-only, and nobody writes.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._offsets = lance.dataset(folder / "offsets.lance").to_table().column(0).to_numpy()
        self._tokens = lance.dataset(folder / "tokens.lance")
        self._names = self._tokens.schema.names

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def layer(self, layer: int) -> Float16[Tensor, "t d"]:
        """Read one column, in large batches: the default of 8,192 lines is slower."""
        return _tensor(self._tokens.to_table(columns=[self._names[layer]], batch_size=1 << 14).column(0))

    def row(self, row: int) -> Float16[Tensor, "l t d"]:
        """Take the lines of a row."""
        return self.some([row])

    def last(self) -> list[Float16[Tensor, "n d"]]:
        """Take the last line of every row."""
        return [_tensor(column) for column in self._tokens.take((self._offsets[1:] - 1).tolist()).columns]

    def some(self, rows: Sequence[int]) -> Float16[Tensor, "l t d"]:
        """Take the lines of all rows at once."""
        lines = np.concatenate([np.arange(self._offsets[row], self._offsets[row + 1]) for row in rows])
        return torch.stack([_tensor(column) for column in self._tokens.take(lines.tolist()).columns])


CONTESTANTS: tuple[type[Contestant], ...] = (
    Plain,
    PlainDirect,
    Gapprobe,
    GapprobeWithoutDense,
    GapprobeOneShard,
    Safetensors,
    Hdf5,
    Hdf5Resizable,
    Zarr,
    Lance,
    Memmap,
    Sqlite,
)


def _blocks(data: Data, tokens: int) -> Iterator[Float16[Tensor, "l t d"]]:
    """Yield all tokens in blocks of exactly `tokens`, the last one of what is left."""
    held: list[StoredRow] = []
    left = torch.empty(data.layers, 0, data.width, dtype=torch.float16)
    for batch in data.batches:
        held.extend(batch)
        while left.shape[1] + sum(len(row.token_ids) for row in held) >= tokens:
            joined = torch.cat([left, *(row.residual for row in held)], dim=1)
            held.clear()
            yield joined[:, :tokens]
            left = joined[:, tokens:]
    yield torch.cat([left, *(row.residual for row in held)], dim=1)


def _whole(dataset: Any) -> np.ndarray[Any, np.dtype[np.float16]]:
    result = np.empty(dataset.shape, np.float16)
    dataset.read_direct(result)
    return result


def _tensor(column: Any) -> Float16[Tensor, "t d"]:
    """Return a column of fixed-size lists; without a copy where it is one chunk."""
    chunks = [torch.from_numpy(chunk.flatten().to_numpy()) for chunk in column.chunks]
    flat = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
    return flat.view(len(column), -1)


def _h5py() -> Any:
    return import_module("h5py")


def _zarr() -> Any:
    return import_module("zarr")


def _lance() -> tuple[Any, Any]:
    return import_module("lance"), import_module("pyarrow")
