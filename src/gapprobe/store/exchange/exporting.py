"""Export: rows of a store for numpy, TransformerLens and Hugging Face datasets, in memory or as a folder.

Every export says all that the store says: `import_activations` makes the same rows of it again (`exported`).
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from gapprobe.errors import ConfigError, DataError, OutputError, StoreError
from gapprobe.files import sync_folder
from gapprobe.store.exchange.exported import (
    CACHE_FILE,
    DATA_FILE,
    EXPORT_FILE,
    OFFSETS_FILE,
    ROWS_FILE,
    TOKENS_FILE,
    describe_export,
    hook_name,
)
from gapprobe.store.exchange.sources import spans
from gapprobe.store.format import DTYPES, StoreHeader, layer_name
from gapprobe.store.reader import Store
from gapprobe.store.shard import BYTES, TOKEN_TENSORS, as_bytes

Form = Literal["numpy", "transformer_lens", "datasets"]
Side = Literal["left", "right"]

# Read and written at once.
_BATCH_BYTES = 32 << 20
_EXTRA = "export"
_CODES: Mapping[torch.dtype, str] = {torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
_HOW: Mapping[str, str] = {
    "numpy": (
        "`residual.LL.npy` is the residual stream at layer LL, one line a token; row i of `rows.parquet` has lines\n"
        "`offsets[i]` up to but not including `offsets[i + 1]`, and so in `token_*.npy`.\n"
        "numpy has no bfloat16: residuals of a bfloat16 store are float32 here, exactly.\n"
    ),
    "transformer_lens": (
        "`cache.safetensors` holds tensors [rows, tokens, width] under TransformerLens' hook names:\n"
        "`ActivationCache(safetensors.torch.load_file('cache.safetensors'), model)`. Row i is that of `rows.parquet`;\n"
        "`mask` in `tokens.safetensors` is true where a token is real, and padding is zero.\n"
    ),
    "datasets": (
        "`datasets.load_from_disk('.')` maps it into memory; `.with_format('torch')` gives tensors. The columns\n"
        "`residual.LL` are the residual stream at layer LL, those of the labels follow the id.\n"
        "Arrow has no bfloat16: residuals of a bfloat16 store are float32 here, exactly.\n"
    ),
}


def export_store(
    store: Store,
    folder: str | Path,
    format: Form,
    *,
    rows: Iterable[str] | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    position: str | None = None,
    padding_side: Side = "left",
) -> Path:
    """Write rows of a store to a folder that other tools read, in a few dozen MB of memory, whatever the size.

    The folder appears when it is whole; until then it has a temporary name beside it. `import_activations(path,
    folder)` makes the same rows of it again, bit for bit.

    Args:
        store: what to export.
        folder: to be made; may exist if it is empty.
        format: "numpy": a .npy file a layer, `[tokens, d]`, with `offsets.npy` and `rows.parquet` (bfloat16 becomes
            float32, exactly). "transformer_lens": one safetensors file with its hook names, `[rows, tokens, d]`, padded
            with zeros, and the mask in another. "datasets": what `datasets.load_from_disk` reads (bfloat16 becomes
            float32, exactly); needs the extra `export`.
        rows: ids, in the order wanted; all rows by default.
        layers: some of the store's, or "all".
        position: one of the store's: only the token so marked of each row. All tokens by default.
        padding_side: of "transformer_lens".

    Returns:
        The folder.

    Raises:
        ConfigError: another format, or a package is missing.
        StoreError: the store lacks a row, layer or position, or a row has no token there.
        DataError: `rows` names a row twice, or a column of the labels has a name that "datasets" needs.
        OutputError: the folder is not empty, or cannot be written.
    """
    if format not in _HOW:
        raise ConfigError(f"format {format!r} is none of {', '.join(_HOW)}")
    chosen = _Selection.of(store, rows, layers, position)
    write: Mapping[str, Callable[[_Selection, Path], None]] = {
        "numpy": _write_numpy,
        "transformer_lens": lambda chosen, folder: _write_cache(chosen, folder, padding_side),
        "datasets": _write_dataset,
    }
    with _new_folder(Path(folder)) as temporary:
        write[format](chosen, temporary)
        with _new_file(temporary / EXPORT_FILE) as file:
            file.write(describe_export(format, chosen.header))
        with _new_file(temporary / "README.md") as file:
            file.write(f"Activations of {len(chosen.ids)} rows, exported by gapprobe.\n\n{_HOW[format]}".encode())
    return Path(folder)


def to_activation_cache(
    store: Store,
    *,
    rows: Iterable[str] | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    position: str | None = None,
    model: Any = None,
    padding_side: Side = "left",
) -> tuple[Any, Bool[Tensor, "n t"]]:
    """Return rows of a store as a TransformerLens `ActivationCache`, with the mask of its real tokens.

    Layer 0 is `blocks.0.hook_resid_pre`, layer l `blocks.{l-1}.hook_resid_post`, and the same tensor is
    `blocks.{l}.hook_resid_pre` where there is such a block. All of it is in memory, padded with zeros to the longest
    row. Needs the extra `export`.

    Args:
        store: what to export.
        rows: ids, in the order wanted; all rows by default.
        layers: some of the store's, or "all".
        position: only the token so marked of each row, `[n 1 d]`. All tokens by default.
        model: the TransformerLens model that the cache belongs to, for its methods that need one.
        padding_side: where the padding is. With "left" the last token of every row is at -1.

    Raises:
        ConfigError: transformer-lens is not installed.
        StoreError: the store lacks a row, layer or position, or a row has no token there.
        DataError: `rows` names a row twice, or the model has another width.
    """
    lens = _extra("transformer_lens")
    chosen = _Selection.of(store, rows, layers, position)
    cfg = getattr(model, "cfg", None)
    if cfg is not None and int(cfg.d_model) != store.header.width:
        raise DataError(f"the store has width {store.header.width}, the model {cfg.d_model}: it is another model's")
    mask = chosen.mask(padding_side)
    # Without a model, a block is known to be there when a layer behind it is stored.
    blocks = int(cfg.n_layers) if cfg is not None else max(chosen.layers, default=0)
    tensors: dict[str, Tensor] = {}
    for layer in chosen.layers:
        padded = tensors[hook_name(layer)] = chosen.padded(layer, mask, 0, len(chosen.ids))
        if layer < blocks:
            tensors[f"blocks.{layer}.hook_resid_pre"] = padded
    return lens.ActivationCache(tensors, model), mask


def to_dataset(
    store: Store,
    *,
    rows: Iterable[str] | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    position: str | None = None,
) -> Any:
    """Return rows of a store as a Hugging Face `datasets.Dataset` in memory.

    Columns: `id`, those of the rows, `token_ids`, `token_positions`, `token_roles`, `token_marks` (lists), and
    `residual.LL` for each layer: `[t, d]`, or `[d]` with a position. `.with_format("torch")` gives tensors. bfloat16
    becomes float32, exactly. For stores larger than memory export the format "datasets". Needs the extra `export`.

    Args:
        store: what to export.
        rows: ids, in the order wanted; all rows by default.
        layers: some of the store's, or "all".
        position: only the token so marked of each row. All tokens by default.

    Raises:
        ConfigError: datasets is not installed.
        StoreError: the store lacks a row, layer or position, or a row has no token there.
        DataError: `rows` names a row twice, or a column of the labels has a name that is needed.
    """
    datasets = _extra("datasets")
    chosen = _Selection.of(store, rows, layers, position)
    schema = _dataset_schema(chosen, datasets)
    table = pa.concat_tables([schema.empty_table(), *_dataset_tables(chosen, schema)])
    return datasets.Dataset(table, fingerprint=chosen.fingerprint)


@dataclass(frozen=True)
class _Selection:
    """What of a store is exported.

    Attributes:
        offsets: row i has the exported tokens `offsets[i]` up to but not including `offsets[i + 1]`.
        tokens: of each exported token, by the names of `TOKEN_TENSORS`.
    """

    store: Store
    ids: tuple[str, ...]
    layers: tuple[int, ...]
    position: str | None
    offsets: NDArray[np.int64]
    tokens: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, store: Store, rows: Iterable[str] | None, layers: Sequence[int] | Literal["all"], position: str | None
    ) -> _Selection:
        """Look up rows, layers and tokens."""
        ids = store.ids if rows is None else (rows,) if isinstance(rows, str) else tuple(rows)
        if len(set(ids)) < len(ids):
            again = Counter(ids).most_common(1)[0][0]
            raise DataError(f"rows name {again!r:.80} twice; an export has each row once")
        numbers = tuple(store.header.layers) if isinstance(layers, str) else tuple(sorted(set(layers)))
        if not numbers:
            raise StoreError("no layers were chosen")
        for layer in numbers:
            store.header.layer_index(layer, store.path)
        batch = store.batch(ids, layers=())
        tokens = {name: cast(Tensor, getattr(batch, name)) for name in TOKEN_TENSORS}
        offsets = batch.offsets.numpy()
        if position is not None:
            kept = _at_position(store, ids, position, offsets, tokens["token_marks"])
            tokens = {name: values[kept] for name, values in tokens.items()}
            offsets = np.arange(len(ids) + 1)
        return cls(store, ids, numbers, position, offsets, tokens)

    @property
    def header(self) -> StoreHeader:
        """Return the header of a store of what is exported."""
        return replace(self.store.header, layers=self.layers)

    @property
    def fingerprint(self) -> str:
        """Return a hash of what is exported, by which datasets caches what is computed of it."""
        digest = xxhash.xxh3_64(self.header.to_json())
        shards = [record.shard_xxh128 for record in self.store.records]
        digest.update("\n".join([str(self.position), *shards, *self.ids]).encode())
        return digest.hexdigest()

    @cached_property
    def table(self) -> pa.Table:
        """Return the table of rows, `id` first."""
        table = self.store.table
        if self.ids == self.store.ids:
            return table
        number = {id_: i for i, id_ in enumerate(self.store.ids)}
        return table.take(pa.array([number[id_] for id_ in self.ids], pa.int64()))

    def spans(self, layers: int, longest: int = 0) -> Iterator[tuple[int, int]]:
        """Cut the rows into batches that fit into memory at so many layers; `longest` is the length of padded rows."""
        size = layers * self.store.header.width * max(4, self.store.header.torch_dtype.itemsize)
        lengths = np.full(len(self.ids), longest) if longest else np.diff(self.offsets)
        return spans(lengths, max(1, _BATCH_BYTES // size))

    def residual(self, layer: int, first: int, last: int) -> Shaped[Tensor, "x d"]:
        """Return the exported tokens of some rows at a layer."""
        return self.store.layer(layer, position=self.position, rows=self.ids[first:last])

    def padded(self, layer: int, mask: Bool[Tensor, "n t"], first: int, last: int) -> Shaped[Tensor, "x t d"]:
        """Return the exported tokens of some rows at a layer, with zeros where the mask of all rows is false."""
        here = mask[first:last]
        result = torch.zeros(*here.shape, self.store.header.width, dtype=self.store.header.torch_dtype)
        result[here] = self.residual(layer, first, last)
        return result

    def mask(self, side: Side) -> Bool[Tensor, "n t"]:
        """Return which tokens of the padded rows are real."""
        lengths = torch.from_numpy(np.diff(self.offsets))[:, None]
        places = torch.arange(int(lengths.max()) if len(lengths) else 0)
        return places < lengths if side == "right" else places >= len(places) - lengths


def _at_position(
    store: Store, ids: Sequence[str], position: str, offsets: NDArray[np.int64], marks: Tensor
) -> Int64[Tensor, " n"]:
    """Return the number of each row's one token at a position."""
    marked = (marks >> store.header.position_index(position, store.path) & 1).numpy()
    before = np.concatenate([np.zeros(1, np.int64), marked.cumsum(dtype=np.int64)])[offsets]
    wrong = np.flatnonzero(np.diff(before) != 1)
    if len(wrong):
        raise StoreError(
            f"{store.path}: row {ids[wrong[0]]!r:.80} has {np.diff(before)[wrong[0]]} tokens at {position!r} "
            f"({len(wrong)} of {len(ids)} rows have not exactly one). Leave such rows out through `rows`."
        )
    return torch.from_numpy(np.flatnonzero(marked))


def _write_numpy(chosen: _Selection, folder: Path) -> None:
    dtype = _numpy_dtype(chosen.header)
    for layer in chosen.layers:
        with _new_file(folder / f"{layer_name(layer)}.npy") as file:
            shape = (int(chosen.offsets[-1]), chosen.header.width)
            described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, described)
            for first, last in chosen.spans(1):
                file.write(_plain(chosen.residual(layer, first, last)).data)
    for name, values in {OFFSETS_FILE: chosen.offsets, **{f"{n}.npy": t for n, t in chosen.tokens.items()}}.items():
        with _new_file(folder / name) as file:
            np.save(file, np.asarray(values), allow_pickle=False)
    _write_rows(chosen, folder)


def _write_cache(chosen: _Selection, folder: Path, side: Side) -> None:
    mask = chosen.mask(side)
    n, longest = mask.shape
    code, _ = DTYPES[chosen.header.dtype]

    def pieces(layer: int) -> Iterator[Tensor]:
        return (chosen.padded(layer, mask, first, last) for first, last in chosen.spans(1, longest))

    shape = (n, longest, chosen.header.width)
    residuals = {hook_name(layer): (code, shape, pieces(layer)) for layer in chosen.layers}
    _write_safetensors(folder / CACHE_FILE, residuals)
    tokens = {"mask": mask}
    for name, values in chosen.tokens.items():
        tokens[name] = torch.zeros(n, longest, dtype=values.dtype)
        tokens[name][mask] = values
    _write_safetensors(
        folder / TOKENS_FILE,
        {name: (_CODES[tensor.dtype], tuple(tensor.shape), iter([tensor])) for name, tensor in tokens.items()},
    )
    _write_rows(chosen, folder)


def _write_dataset(chosen: _Selection, folder: Path) -> None:
    datasets = _extra("datasets")
    schema = _dataset_schema(chosen, datasets)
    with _new_file(folder / DATA_FILE) as file, pa.ipc.new_stream(file, schema) as stream:
        for table in _dataset_tables(chosen, schema):
            stream.write_table(table)
    datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema)).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": DATA_FILE}],
        "_fingerprint": chosen.fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with _new_file(folder / "state.json") as file:
        file.write((json.dumps(state, indent=2) + "\n").encode())


def _dataset_schema(chosen: _Selection, datasets: Any) -> pa.Schema:
    residual = pa.list_(pa.from_numpy_dtype(_numpy_dtype(chosen.header)), chosen.header.width)
    kind = pa.list_(residual) if chosen.position is None else residual
    own = {name: pa.list_(pa.from_numpy_dtype(_plain(chosen.tokens[name][:0]).dtype)) for name in TOKEN_TENSORS}
    own |= {layer_name(layer): kind for layer in chosen.layers}
    taken = [name for name in chosen.table.column_names if name in own]
    if taken:
        raise DataError(f"the rows have a column {taken[0]!r}, which a dataset needs for itself; export another format")
    plain = pa.schema([*chosen.table.schema.remove_metadata(), *own.items()])
    return datasets.Features.from_arrow_schema(plain).arrow_schema


def _dataset_tables(chosen: _Selection, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows a few at a time, without going through Python's numbers."""
    for first, last in chosen.spans(len(chosen.layers)):
        offsets = chosen.offsets[first : last + 1]
        starts = pa.array(offsets - offsets[0], pa.int32())
        columns = {name: chosen.table.column(name).slice(first, last - first) for name in chosen.table.column_names}
        for name, values in chosen.tokens.items():
            flat = pa.array(_plain(values[offsets[0] : offsets[-1]]))
            columns[name] = pa.ListArray.from_arrays(starts, flat)
        for layer in chosen.layers:
            flat = pa.array(_plain(chosen.residual(layer, first, last)).reshape(-1))
            lines = pa.FixedSizeListArray.from_arrays(flat, chosen.header.width)
            whole = lines if chosen.position is not None else pa.ListArray.from_arrays(starts, lines)
            columns[layer_name(layer)] = whole
        yield pa.table(columns).cast(schema)


def _numpy_dtype(header: StoreHeader) -> np.dtype[Any]:
    """Return float16 for float16, and float32 for float32 and for bfloat16, which it holds exactly."""
    return np.dtype(np.float16 if header.dtype == "float16" else np.float32)


def _plain(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor for numpy, which has no bfloat16."""
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).contiguous().numpy()


def _write_rows(chosen: _Selection, folder: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(chosen.table, sink, compression="zstd")
    with _new_file(folder / ROWS_FILE) as file:
        file.write(sink.getbuffer())


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], Iterator[Tensor]]]) -> None:
    """Write tensors that come in pieces along their first axis, one piece in memory at a time."""
    entries: dict[str, object] = {}
    end = 0
    for name, (code, shape, _) in tensors.items():
        start, end = end, end + prod(shape) * BYTES[code]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with _new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in tensors.values():
            for piece in pieces:
                file.write(as_bytes(piece.contiguous()))


@contextmanager
def _new_folder(folder: Path) -> Generator[Path, None, None]:
    """Yield a temporary folder that takes the place of `folder` at the end, or vanishes on a failure."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; an export is a folder. Choose another path.")
    try:
        there = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        if there:
            raise OutputError(f"{folder} holds {there[0]!r} already. Choose an empty or a new folder.")
        target = folder.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.exporting-{secrets.token_hex(8)}"
        temporary.mkdir()
        try:
            yield temporary
            sync_folder(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}. Nothing was left behind; free some space, or "
            "choose another folder, and export again."
        ) from error


@contextmanager
def _new_file(path: Path) -> Generator[IO[bytes], None, None]:
    """Write a file that was not there, and have it on the disk at the end."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _extra(module: str) -> Any:
    """Import a package that comes with an extra."""
    try:
        return import_module(module)
    except ImportError as error:
        name = module.replace("_", "-")
        raise ConfigError(f"{name} is not installed: pip install 'gapprobe[{_EXTRA}]' ({error})") from error
