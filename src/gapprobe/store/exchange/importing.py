"""Import: activations that users already have, with their labels, become a store, without any capture.

What forms activations and labels may have is in `sources` and `labels`; what `exporting` wrote is read by `exported`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isnan
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor
from tqdm import tqdm

from gapprobe.errors import DataError, StoreError
from gapprobe.store.exchange.exported import EXPORT_FILE, open_export
from gapprobe.store.exchange.labels import read_labels
from gapprobe.store.exchange.sources import Array, HookCache, Layers, Source, open_source, spans
from gapprobe.store.format import DTYPES, MAX_POSITIONS, StoredRow, StoreHeader, Value
from gapprobe.store.reader import Store, open_store
from gapprobe.store.shard import as_bytes
from gapprobe.store.table import ID
from gapprobe.store.writer import StoreWriter

# Read and handed to the writer at once.
_BATCH_BYTES = 32 << 20
_IMPORTED = "imported"
_UNKNOWN_TOKEN = -1
_INTEGERS: Mapping[int, torch.dtype] = {2: torch.int16, 4: torch.int32}

Position = Sequence[int | None] | np.ndarray | Tensor


@runtime_checkable
class TracedModel(Protocol):
    """What is asked of a model that the activations come from; what `gapprobe.load_model` returns has it."""

    @property
    def n_layers(self) -> int:
        """Return the number of blocks."""
        ...

    @property
    def width(self) -> int:
        """Return the width of the residual stream."""
        ...

    @property
    def attention(self) -> str:
        """Return the attention implementation."""
        ...

    @property
    def processor_fingerprint(self) -> str:
        """Return a hash of the processor."""
        ...

    def describe(self) -> dict[str, str]:
        """Return what tells the model apart."""
        ...


def import_activations(
    path: str | Path,
    activations: Array | Mapping[Any, Any] | Sequence[Any] | HookCache | str | Path,
    labels: object = None,
    *,
    position: str | Mapping[str, Position] = "last_input",
    layers: Layers | None = None,
    ids: Sequence[object] | np.ndarray | None = None,
    mask: Array | Sequence[Any] | str | Path | None = None,
    lengths: Array | Sequence[int] | str | Path | None = None,
    token_ids: Array | Sequence[Any] | str | Path | None = None,
    model: TracedModel | Mapping[str, str] | str | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    shard_bytes: int = 256 << 20,
    progress: bool = False,
) -> Store:
    """Make a store of activations that you already have, so that probes, lenses and cosines work on them.

    The same call again adds nothing; a stopped one goes on where it was. Everything is read in batches of 32 MB, so
    files may be larger than memory.

    Layer 0 is the embeddings, layer l the residual stream after block l, before the final norm: beware that the last of
    transformers' `hidden_states` is taken after it.

    Args:
        path: folder of the store.
        activations: one of
            an array `[n, l, d]` (one token a row) or `[n, l, t, d]`, of numpy, torch, h5py or anything alike;
            a dictionary from layer to an array `[n, d]` or `[n, t, d]`;
            a list with an array `[l, t, d]` for each row, the rows of different lengths;
            a TransformerLens `ActivationCache`, or a dictionary with its hook names (of which
            `blocks.0.hook_resid_pre` is layer 0 and `blocks.{l-1}.hook_resid_post` layer l; all others are left out);
            the path of a .safetensors, .npy or .npz file of these, or of a folder of .npy files named by layer. Pickles
            are never read;
            a folder that `export_store` wrote, which brings its own labels, header and all.
        labels: a pandas, polars or Arrow table, a dictionary of columns, a vector (column `label`), or the path of a
            .csv, .tsv or .parquet file; one line a row.
        position: name of the position that is marked, the last real token of each row; or, by name, which of its real
            tokens it is in each row (0 is the first, -1 the last, None where the row has none).
        layers: the numbers of an array's layers (0, 1, … by default); or which layers to take of a dictionary, by
            number or as a dictionary from its names to numbers.
        ids: of the rows, any text. By default the column `id` of the labels, else their index if it is of text, else
            the hash of each row's residuals and token ids.
        mask: `[n, t]`, true for real tokens, false for padding.
        lengths: `[n]`, in its place: the number of real tokens of each row, padded on the right; or, where the
            activations have no axis of tokens, flattened row after row.
        token_ids: of the vocabulary, of the same shape as the tokens; -1 is stored where they are not given.
        model: what the activations come from: a model of `load_model`, which lets `logit_lens` accept the store; or
            what is known of it, by name (`weights`, `architecture`, …); or just its name.
        dtype: "float32", "bfloat16" or "float16": convert to this. By default the activations' own; other types, such
            as float64, are not converted unasked.
        allow_nonfinite: store NaN and infinities too. `verify` will name these rows as damaged.
        shard_bytes: size of a shard, and half the memory that writing takes.
        progress: show a progress bar.

    Returns:
        The store. Its rows stand in the order given, with the columns of the labels.

    Raises:
        DataError: activations, labels or other arguments cannot be read, do not fit together, or hold NaN or
            infinities.
        StoreError: the store in `path` belongs to other activations, or holds a row of the same id but other content.
        OutputError: `path` holds something else, or the disk has no room.
    """
    path = Path(path)
    if isinstance(activations, str | Path) and (Path(activations) / EXPORT_FILE).is_file():
        given = [labels, layers, ids, mask, lengths, token_ids, model, dtype]
        if position != "last_input" or any(value is not None for value in given):
            raise DataError(f"{activations} was exported by gapprobe and brings its own labels; give the path alone")
        header, count, read = open_export(Path(activations))
        return _write(path, header, count, read(min(_BATCH_BYTES, shard_bytes)), shard_bytes, progress)
    source = open_source(activations, layers=layers, mask=mask, lengths=lengths)
    n = len(source.sizes)
    if not n:
        raise DataError("activations have no rows")
    table, names = (pa.table({}), None) if labels is None else read_labels(labels)
    if labels is not None and table.num_rows != n:
        raise DataError(f"activations have {n} rows, labels {table.num_rows}: give one line of labels a row")
    rows = _Rows(
        source,
        None if labels is None else table,
        _ids(ids, names, n),
        _positions(position, n),
        None if token_ids is None else source.per_token("token_ids", token_ids),
        _dtype(source, dtype),
        allow_nonfinite,
    )
    header = _header(source, model, rows)
    batches = rows.batches(min(_BATCH_BYTES, shard_bytes))
    return _write(path, header, n, batches, shard_bytes, progress)


@dataclass(frozen=True)
class _Rows:
    """All that becomes rows of a store.

    Attributes:
        positions: index of the marked token of each row, by name; None for a row's last token.
    """

    source: Source
    labels: pa.Table | None
    ids: Sequence[str] | None
    positions: Mapping[str, Sequence[int | None] | None]
    token_ids: Callable[[int, int], list[Tensor]] | None
    dtype: str
    allow_nonfinite: bool

    def batches(self, most_bytes: int) -> Iterator[list[StoredRow]]:
        """Yield the rows a few at a time."""
        repeats: Counter[str] = Counter()
        source = self.source
        token_bytes = len(source.kind.layers) * source.kind.width * DTYPES[self.dtype][1].itemsize
        for first, last in spans(source.sizes, max(1, most_bytes // token_bytes)):
            residuals = source.residuals(first, last)
            tokens = None if self.token_ids is None else self.token_ids(first, last)
            empty = [{}] * (last - first)
            columns = empty if self.labels is None else self.labels.slice(first, last - first).to_pylist()
            yield [
                self._row(first + i, residual, columns[i], None if tokens is None else tokens[i], repeats)
                for i, residual in enumerate(residuals)
            ]

    def _row(
        self,
        number: int,
        residual: Shaped[Tensor, "l t d"],
        columns: dict[str, Value],
        tokens: Tensor | None,
        repeats: Counter[str],
    ) -> StoredRow:
        converted = residual.to(DTYPES[self.dtype][1])
        length = converted.shape[1]
        if tokens is not None and (tokens.is_floating_point() or tokens.dtype is torch.bool):
            raise DataError(f"token_ids are {tokens.dtype}; give whole numbers")
        numbers = torch.full((length,), _UNKNOWN_TOKEN, dtype=torch.int64) if tokens is None else tokens.to(torch.int64)
        id_ = _content_id(converted, numbers, repeats) if self.ids is None else self.ids[number]
        if not self.allow_nonfinite and not _finite(converted):
            self._refuse_nonfinite(number, id_, residual, converted)
        return StoredRow(
            id_,
            columns,
            converted,
            numbers,
            torch.arange(length),
            torch.zeros(length, dtype=torch.uint8),
            self._marks(number, id_, length),
        )

    def _marks(self, number: int, id_: str, length: int) -> UInt8[Tensor, " t"]:
        marks = torch.zeros(length, dtype=torch.uint8)
        for bit, (name, places) in enumerate(self.positions.items()):
            place = (-1 if length else None) if places is None else places[number]
            if place is None:
                continue
            if not -length <= place < length:
                raise DataError(f"row {number} ({id_}) has {length} tokens, so {name} cannot be token {place}")
            marks[place] |= 1 << bit
        return marks

    def _refuse_nonfinite(self, number: int, id_: str, given: Tensor, converted: Tensor) -> None:
        layer = self.source.kind.layers[int((~converted.isfinite()).any(-1).any(-1).nonzero()[0])]
        if not given.is_floating_point() or bool(given.isfinite().all()):
            mend = f"numbers too large for {self.dtype}; choose another dtype"
        else:
            mend = "NaN or infinity; leave the row out, or allow_nonfinite=True"
        raise DataError(f"row {number} ({id_}), layer {layer}: {mend}")


def _write(
    path: Path, header: StoreHeader, count: int, batches: Iterator[list[StoredRow]], shard_bytes: int, progress: bool
) -> Store:
    """Append what is not stored yet, and refuse rows that are stored with other content."""
    # Read before anything is made: most mistakes show in the first rows.
    batches = chain([first] if (first := next(batches, None)) else [], batches)
    with (
        StoreWriter(path, header, shard_bytes) as writer,
        tqdm(total=count, unit="row", desc="import", disable=not progress) as bar,
    ):
        stored = _Stored(open_store(path)) if writer.ids else None
        for rows in batches:
            new = rows if stored is None else stored.without(rows)
            writer.append(new)
            bar.update(len(rows))
    return open_store(path)


class _Stored:
    """The rows that a store held before the import."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = {id_: number for number, id_ in enumerate(store.ids)}

    def without(self, rows: Sequence[StoredRow]) -> list[StoredRow]:
        """Return the rows that are not stored; raise StoreError for one that is, with other content."""
        known = [row for row in rows if row.id in self._number]
        if not known:
            return list(rows)
        batch = self._store.batch([row.id for row in known])
        columns = self._store.table.take([self._number[row.id] for row in known]).to_pylist()
        for i, (row, there) in enumerate(zip(known, columns, strict=True)):
            here = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
            tensors = {
                "residual": (row.residual, batch.residual[:, here]),
                "token_ids": (row.token_ids, batch.token_ids[here]),
                "token_positions": (row.token_positions, batch.token_positions[here]),
                "token_roles": (row.token_roles, batch.token_roles[here]),
                "token_marks": (row.token_marks, batch.token_marks[here]),
            }
            differing = [
                name for name, (mine, stored) in tensors.items() if not torch.equal(_bits(mine), _bits(stored))
            ]
            names = {*row.columns, *there} - {ID}
            differing += [f"column {name!r}" for name in names if not _same(row.columns.get(name), there.get(name))]
            if differing:
                raise StoreError(
                    f"{self._store.path} holds row {row.id!r:.80} already, with another {min(differing)}. Give the row "
                    "another id, or choose another folder."
                )
        return [row for row in rows if row.id not in self._number]


def _bits(values: Tensor) -> Tensor:
    """View floating-point numbers as integers, which agree in every bit or not at all, NaN included."""
    return values.view(_INTEGERS[values.itemsize]) if values.is_floating_point() else values


def _finite(values: Shaped[Tensor, "l t d"]) -> bool:
    """Return whether no number is NaN or infinite: ten times as fast as `isfinite`, which a large import waits for."""
    # Both have an exponent of ones only, which no other number reaches.
    magnitude = torch.iinfo(_INTEGERS[values.itemsize]).max
    infinity = int(_bits(torch.tensor(torch.inf, dtype=values.dtype)))
    return not values.numel() or int((_bits(values) & magnitude).max()) < infinity


def _same(a: Value, b: Value) -> bool:
    """Return whether two values of a column are the same, NaN included."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and isinstance(b, float) and isnan(a) and isnan(b))


def _content_id(residual: Shaped[Tensor, "l t d"], tokens: Int64[Tensor, " t"], repeats: Counter[str]) -> str:
    """Return the XXH128 of a row's content; equal rows are counted, so that none is lost."""
    digest = xxhash.xxh3_128(f"{residual.dtype} {tuple(residual.shape)}\n".encode())
    digest.update(as_bytes(residual.contiguous()))
    digest.update(as_bytes(tokens.contiguous()))
    id_ = digest.hexdigest()
    repeats[id_] += 1
    return id_ if repeats[id_] == 1 else f"{id_}-{repeats[id_]}"


def _ids(ids: Sequence[object] | np.ndarray | None, of_labels: Sequence[str] | None, n: int) -> Sequence[str] | None:
    given = of_labels if ids is None else [str(id_) for id_ in ids]
    if given is None:
        return None
    if len(given) != n:
        raise DataError(f"activations have {n} rows, ids {len(given)}")
    if of_labels is not None and given is not of_labels:
        other = next((i for i, (a, b) in enumerate(zip(given, of_labels, strict=True)) if a != b), None)
        if other is not None:
            raise DataError(
                f"row {other} is {given[other]!r} by ids and {of_labels[other]!r} by labels; bring both in one order"
            )
    seen: dict[str, int] = {}
    for i, id_ in enumerate(given):
        if seen.setdefault(id_, i) != i:
            raise DataError(f"id {id_!r:.80} stands twice, at rows {seen[id_]} and {i}; give each row one of its own")
    return given


def _positions(position: str | Mapping[str, Position], n: int) -> dict[str, Sequence[int | None] | None]:
    if isinstance(position, str):
        return {position: None}
    if len(position) > MAX_POSITIONS:
        raise DataError(f"{len(position)} positions were given; a store has at most {MAX_POSITIONS}")
    found: dict[str, Sequence[int | None] | None] = {}
    for name, places in position.items():
        listed = cast(list[Any], places.tolist() if isinstance(places, np.ndarray | Tensor) else list(places))
        if len(listed) != n:
            raise DataError(f"activations have {n} rows, position {name!r} is given for {len(listed)}")
        wrong = next((p for p in listed if p is not None and not isinstance(p, int | np.integer)), None)
        if wrong is not None:
            raise DataError(f"position {name!r} holds {wrong!r}, which is neither a whole number nor None")
        found[name] = [None if place is None else int(place) for place in listed]
    return found


def _dtype(source: Source, dtype: str | None) -> str:
    if dtype is not None and dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if dtype is None and source.kind.dtype not in DTYPES:
        raise DataError(
            f"activations are {source.kind.dtype}; a store holds {', '.join(DTYPES)}. Say which to convert to, such as "
            "dtype='float32'"
        )
    return dtype or source.kind.dtype


def _header(source: Source, model: TracedModel | Mapping[str, str] | str | None, rows: _Rows) -> StoreHeader:
    described = {"source": _IMPORTED, "revision": "", "architecture": _IMPORTED, "family": _IMPORTED}
    described["weights"] = _IMPORTED
    processor = attention = _IMPORTED
    if isinstance(model, str):
        # The source is only recorded; under a name of its own, another model is refused.
        described |= {"source": model, "name": model}
    elif isinstance(model, Mapping):
        described |= {str(name): str(value) for name, value in model.items()}
    elif model is not None:
        _refuse_misfit(source, model)
        described, processor, attention = model.describe(), model.processor_fingerprint, model.attention
    return StoreHeader(
        model=described,
        processor=processor,
        attention=attention,
        padding_side="left",
        dtype=rows.dtype,
        layers=source.kind.layers,
        width=source.kind.width,
        positions=tuple(rows.positions),
        generation={"method": _IMPORTED},
        versions={"torch": torch.__version__},
    )


def _refuse_misfit(source: Source, model: TracedModel) -> None:
    """Raise DataError where the activations cannot be this model's."""
    if source.kind.width != model.width:
        raise DataError(
            f"activations have width {source.kind.width}, the model {model.width}: they are not of this model"
        )
    blocks = model.n_layers
    if source.kind.layers[-1] > blocks:
        raise DataError(f"activations have layer {source.kind.layers[-1]}, the model {blocks} blocks")
    if source.kind.counted and len(source.kind.layers) == blocks:
        raise DataError(
            f"activations have as many layers as the model has blocks, {blocks}. Say which they are: "
            f"layers=range(1, {blocks + 1}) for what each block leaves, range({blocks}) for what each is given"
        )
