"""Activations that users already have, whatever form they come in, as rows of tensors: arrays, lists, files, caches.

Nothing is stored here; `importing` does that. Arrays are only ever sliced, so that a file may be larger than memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gapprobe.errors import DataError

# TransformerLens' names of the residual stream. Vision towers and encoders have a prefix and are another stream.
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# "layers.7" is no such name on purpose: in module paths it means the block whose output is layer 8.
_LAYER = re.compile(r"(?:(?:layer|residual)[._-]?)?(\d+)")
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
_MOST_ROWS = 4096

Layers = Sequence[int] | Mapping[str, int]


@runtime_checkable
class Array(Protocol):
    """What is read from arrays of any library: numpy, torch, h5py, zarr and others."""

    @property
    def shape(self) -> Any:
        """Return the length of each axis."""
        ...

    @property
    def dtype(self) -> Any:
        """Return the type of the numbers."""
        ...

    def __getitem__(self, key: Any, /) -> Any:
        """Return a slice along the first axis."""
        ...


@runtime_checkable
class HookCache(Protocol):
    """What is read of a TransformerLens `ActivationCache`, without importing TransformerLens."""

    cache_dict: Any
    has_batch_dim: Any


@dataclass(frozen=True)
class Kind:
    """What all rows have in common.

    Attributes:
        layers: their numbers, rising.
        width: of the residual stream.
        dtype: name of the numbers' type, such as "float32".
        counted: whether the layers were numbered 0, 1, … for want of names.
    """

    layers: tuple[int, ...]
    width: int
    dtype: str
    counted: bool


@dataclass(frozen=True)
class Block:
    """Residuals on a grid of lines (rows, or single tokens), layers and, in most cases, tokens.

    Attributes:
        kind: of the residuals.
        lines: length of the first axis.
        tokens: of each line; None where the array has no axis of tokens.
        read: returns lines from the first up to but not including the last, `[l n t d]` with t = 1 where there is no
            axis of tokens.
    """

    kind: Kind
    lines: int
    tokens: int | None
    read: Callable[[int, int], Shaped[Tensor, "l n t d"]]


@dataclass(frozen=True)
class _Grid:
    block: Block

    @property
    def kind(self) -> Kind:
        """Return what all rows have in common."""
        return self.block.kind


@dataclass(frozen=True)
class PaddedRows(_Grid):
    """A line is a row; `mask` [n, t] says which of its tokens are real, else all are."""

    mask: Array | None

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the padded length of each row."""
        tokens = 1 if self.block.tokens is None else self.block.tokens
        return np.full(self.block.lines, tokens, np.int64)

    def residuals(self, first: int, last: int) -> list[Tensor]:
        """Return some rows without their padding."""
        rows, kept = self.block.read(first, last), self._kept(first, last)
        if kept is None:
            return list(rows.unbind(1))
        return [rows[:, i, real] for i, real in enumerate(kept)]

    def per_token(self, name: str, values: object) -> Callable[[int, int], list[Tensor]]:
        """Take numbers of the shape of the rows."""
        lines, tokens = self.block.lines, self.block.tokens
        array = require_array(name, values, (lines,) if tokens is None else (lines, tokens))

        def read(first: int, last: int) -> list[Tensor]:
            rows, kept = to_tensor(name, array[first:last]).reshape(last - first, -1), self._kept(first, last)
            return list(rows) if kept is None else [row[real] for row, real in zip(rows, kept, strict=True)]

        return read

    def _kept(self, first: int, last: int) -> Bool[Tensor, "n t"] | None:
        return None if self.mask is None else to_tensor("mask", self.mask[first:last]).bool()


@dataclass(frozen=True)
class FlatRows(_Grid):
    """A line is a token; row i has the lines `offsets[i]` up to but not including `offsets[i + 1]`."""

    offsets: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the length of each row."""
        return np.diff(self.offsets)

    def residuals(self, first: int, last: int) -> list[Tensor]:
        """Return some rows."""
        tokens = self.block.read(int(self.offsets[first]), int(self.offsets[last]))[:, :, 0]
        return list(tokens.split(self._lengths(first, last), dim=1))

    def per_token(self, name: str, values: object) -> Callable[[int, int], list[Tensor]]:
        """Take one number a token, row after row."""
        array = require_array(name, values, (self.block.lines,))

        def read(first: int, last: int) -> list[Tensor]:
            tokens = to_tensor(name, array[int(self.offsets[first]) : int(self.offsets[last])])
            return list(tokens.split(self._lengths(first, last)))

        return read

    def _lengths(self, first: int, last: int) -> list[int]:
        return np.diff(self.offsets[first : last + 1]).tolist()


@dataclass(frozen=True)
class ListedRows:
    """Each row is an array of its own, `[l t d]`, or `[l d]` for one token."""

    kind: Kind
    rows: Sequence[Array]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return the length of each row."""
        return np.array([1 if len(row.shape) == 2 else row.shape[1] for row in self.rows], np.int64)

    def residuals(self, first: int, last: int) -> list[Tensor]:
        """Return some rows."""
        read = [to_tensor("activations", row[:]) for row in self.rows[first:last]]
        return [row.unsqueeze(1) if row.ndim == 2 else row for row in read]

    def per_token(self, name: str, values: object) -> Callable[[int, int], list[Tensor]]:
        """Take a list of one vector a row."""
        sizes = self.sizes
        if isinstance(values, str | Path) or not isinstance(values, Sequence | Array):
            raise DataError(f"{name}: activations that come as a list of rows want a list of vectors, one a row")
        listed = cast(Sequence[object], values)
        if len(listed) != len(sizes):
            raise DataError(f"activations have {len(sizes)} rows, {name} has {len(listed)}")

        def read(first: int, last: int) -> list[Tensor]:
            rows = [torch.atleast_1d(to_tensor(name, listed[i])) for i in range(first, last)]
            for i, row in zip(range(first, last), rows, strict=True):
                if tuple(row.shape) != (sizes[i],):
                    raise DataError(f"row {i} has {sizes[i]} tokens, its {name} the shape {tuple(row.shape)}")
            return rows

        return read


Source = PaddedRows | FlatRows | ListedRows


def open_source(activations: object, *, layers: Layers | None, mask: object = None, lengths: object = None) -> Source:
    """Understand activations without reading them.

    Args:
        activations: see `importing.import_activations`.
        layers: which layers the axis of layers is of, or which to take by name or number.
        mask: `[n t]`, which tokens are real.
        lengths: `[n]`, how many tokens each row has.

    Raises:
        DataError: they are of no form that is known, or their parts do not fit together.
    """
    if mask is not None and lengths is not None:
        raise DataError("both mask and lengths say which tokens are real; give one of them")
    if isinstance(activations, str | Path):
        activations = _unboxed(open_file(Path(activations)), layers)
    if isinstance(activations, HookCache):
        activations = _unwrap(activations)
    if isinstance(activations, Mapping):
        named = cast(Mapping[object, object], activations)
        return _of_block(_of_layers(_by_layer(named, layers)), mask, lengths)
    if isinstance(activations, tuple):
        raise DataError(
            "activations are a tuple: for one array a layer (transformers' hidden_states) give a dictionary, layer -> "
            "array, without the last, which transformers takes after the final norm; for one array a row give a list"
        )
    if isinstance(activations, list):
        if mask is not None or lengths is not None:
            raise DataError("activations that come as a list of rows have no padding; leave out mask and lengths")
        return _of_list(cast(list[object], activations), layers)
    if isinstance(activations, Array):
        return _of_block(_of_array(activations, layers), mask, lengths)
    raise DataError(
        f"activations are of type {type(activations).__name__}; give an array [n, layers, d] or [n, layers, tokens, "
        "d], a dictionary layer -> array, a list of arrays, a TransformerLens cache, or the path of a .safetensors, "
        ".npy or .npz file"
    )


def spans(sizes: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into batches of at most `most` tokens (or one row), yielding the first and one past the last of each."""
    ends = sizes.cumsum()
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + most, side="right"))
        last = min(max(last, first + 1), first + _MOST_ROWS)
        yield first, last
        first = last


def to_tensor(name: str, values: object) -> Tensor:
    """Return numbers of any library as a tensor on the CPU.

    Raises:
        DataError: they are no real numbers, or of a type that torch does not know.
    """
    if isinstance(values, Tensor) and not values.is_complex():
        return values.detach().to("cpu")
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise DataError(f"{name}: numbers of type {array.dtype} cannot be read; convert them to float32 first")
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def require_array(name: str, values: object, shape: tuple[int, ...]) -> Array:
    """Return an array, or the one in a .npy file, of exactly this shape.

    Raises:
        DataError: it has another shape, or the file cannot be read.
    """
    if isinstance(values, str | Path):
        values = _numpy(Path(values))
    array = values if isinstance(values, Array) else np.asarray(values)
    if tuple(array.shape) != shape:
        raise DataError(f"{name} has shape {tuple(array.shape)}; the activations ask for {shape}")
    return array


def _of_block(block: Block, mask: object, lengths: object) -> PaddedRows | FlatRows:
    if mask is not None:
        if block.tokens is None:
            raise DataError("activations have no axis of tokens, so there is nothing that a mask could mask")
        return PaddedRows(block, require_array("mask", mask, (block.lines, block.tokens)))
    if lengths is None:
        return PaddedRows(block, None)
    if isinstance(lengths, str | Path):
        lengths = _numpy(Path(lengths))
    counts = to_tensor("lengths", lengths).numpy()
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (len(counts) and counts.min() < 0):
        raise DataError("lengths must be whole numbers from 0, one a row")
    if block.tokens is None:
        offsets = np.concatenate([np.zeros(1, np.int64), counts.astype(np.int64).cumsum()])
        if offsets[-1] != block.lines:
            raise DataError(f"lengths add up to {offsets[-1]} tokens, the activations have {block.lines}")
        return FlatRows(block, offsets)
    if len(counts) != block.lines:
        raise DataError(f"activations have {block.lines} rows, lengths has {len(counts)}")
    if len(counts) and counts.max() > block.tokens:
        raise DataError(f"row {counts.argmax()} has length {counts.max()}, the activations {block.tokens} tokens a row")
    return PaddedRows(block, cast(Array, np.arange(block.tokens) < counts[:, None]))


def _of_array(array: Array, layers: Layers | None) -> Block:
    """Read an array [n, l, d] or [n, l, t, d]."""
    shape = tuple(array.shape)
    if len(shape) not in (3, 4):
        raise DataError(
            f"activations have shape {shape}; an array must be [n, layers, d] or [n, layers, tokens, d]. For one layer "
            "give a dictionary: {layer: array}"
        )

    def read(first: int, last: int) -> Tensor:
        lines = to_tensor("activations", array[first:last]).movedim(1, 0)
        return lines if lines.ndim == 4 else lines.unsqueeze(2)

    tokens = shape[2] if len(shape) == 4 else None
    kind = Kind(_axis(shape[1], layers), shape[-1], _type_name(array), counted=layers is None)
    return Block(kind, shape[0], tokens, read)


def _of_layers(arrays: Mapping[int, Array]) -> Block:
    """Read arrays [n, d] or [n, t, d], one a layer."""
    numbers = tuple(sorted(arrays))
    first_array = arrays[numbers[0]]
    shape, kind = tuple(first_array.shape), _type_name(first_array)
    if len(shape) not in (2, 3):
        raise DataError(f"layer {numbers[0]} has shape {shape}; an array of one layer must be [n, d] or [n, tokens, d]")
    for number in numbers:
        if tuple(arrays[number].shape) != shape or _type_name(arrays[number]) != kind:
            raise DataError(
                f"layer {number} is {_type_name(arrays[number])} {tuple(arrays[number].shape)}, "
                f"layer {numbers[0]} is {kind} {shape}: all layers must be alike"
            )

    def read(first: int, last: int) -> Tensor:
        lines = torch.stack([to_tensor(f"layer {number}", arrays[number][first:last]) for number in numbers])
        return lines if lines.ndim == 4 else lines.unsqueeze(2)

    tokens = shape[1] if len(shape) == 3 else None
    return Block(Kind(numbers, shape[-1], kind, counted=False), shape[0], tokens, read)


def _of_list(rows: list[object], layers: Layers | None) -> ListedRows:
    """Read a list of arrays [l, t, d] or [l, d], one a row."""
    if not rows:
        raise DataError("activations have no rows")
    known: tuple[int, int, str] | None = None
    for i, row in enumerate(rows):
        if not isinstance(row, Array) or len(row.shape) not in (2, 3):
            told = f"of shape {tuple(row.shape)}" if isinstance(row, Array) else f"a {type(row).__name__}"
            raise DataError(f"row {i} of the activations is {told}; a row must be an array [layers, tokens, d]")
        here = (int(row.shape[0]), int(row.shape[-1]), _type_name(row))
        known = known or here
        if here != known:
            raise DataError(
                f"row {i} has {here[0]} layers of width {here[1]} in {here[2]}, row 0 has {known[0]} of {known[1]} in "
                f"{known[2]}: all rows must be alike but for their tokens"
            )
    count, width, kind = cast(tuple[int, int, str], known)
    return ListedRows(Kind(_axis(count, layers), width, kind, counted=layers is None), cast(list[Array], rows))


def _axis(count: int, layers: Layers | None) -> tuple[int, ...]:
    """Return the numbers of an axis of layers."""
    if not count:
        raise DataError("activations have no layers")
    if layers is None:
        return tuple(range(count))
    if isinstance(layers, Mapping):
        raise DataError("layers by name are for activations by name; an array wants the numbers of its axis in order")
    numbers = tuple(int(layer) for layer in layers)
    if len(numbers) != count:
        raise DataError(f"activations have {count} layers, but {len(numbers)} numbers of layers were given")
    if any(a >= b for a, b in zip((-1, *numbers), numbers, strict=False)):
        raise DataError(f"layers {list(numbers)} do not rise from 0 or more; order the activations by layer")
    return numbers


def _by_layer(named: Mapping[object, object], layers: Layers | None) -> dict[int, Array]:
    """Return the arrays of a mapping by the number of their layer."""
    found = _named(named, layers) if isinstance(layers, Mapping) else _numbered(named)
    if layers is not None and not isinstance(layers, Mapping):
        missing = [layer for layer in layers if layer not in found]
        if missing:
            raise DataError(f"activations have no layer {missing[0]}; they have {sorted(found)}")
        found = {layer: found[layer] for layer in layers}
    if not found:
        raise DataError("activations name no layer")
    arrays: dict[int, Array] = {}
    for layer, array in found.items():
        if not isinstance(array, Array):
            raise DataError(f"layer {layer} is a {type(array).__name__}, not an array")
        arrays[layer] = array
    return arrays


def _named(named: Mapping[object, object], layers: Mapping[str, int]) -> dict[int, object]:
    missing = [name for name in layers if name not in named]
    if missing:
        raise DataError(f"activations have no {missing[0]!r}; they have {_told(named)}")
    if len(set(layers.values())) != len(layers) or any(layer < 0 for layer in layers.values()):
        raise DataError(f"layers {dict(layers)} must give each name a number of its own, from 0")
    return {layer: named[name] for name, layer in layers.items()}


def _numbered(named: Mapping[object, object]) -> dict[int, object]:
    """Return what stands under hook names of TransformerLens or, where there are none, under names with a number."""
    hooks = {name: match for name in named if (match := _HOOK.fullmatch(str(name)))}
    if hooks:
        before = {int(m[1]): named[name] for name, m in hooks.items() if m[2] == "pre"}
        after = {int(m[1]) + 1: named[name] for name, m in hooks.items() if m[2] == "post"}
        # What a block is given is what the one before left, unless something was added between: layer l is the latter.
        return before | after
    if any(str(name) == "hook_embed" for name in named):
        raise DataError(
            "the cache has no blocks.N.hook_resid_pre or hook_resid_post, only parts of the residual stream such as "
            "hook_embed, which lacks the positional embeddings; cache the residual stream itself"
        )
    found: dict[int, object] = {}
    for name, array in named.items():
        match = _LAYER.fullmatch(str(name))
        if not match or isinstance(name, bool):
            raise DataError(
                f"{name!r} names no layer; use its number (0 is the embeddings, l what block l leaves) or layer_7, "
                f"or say which is which: layers={{{name!r}: 7}}"
            )
        if int(match[1]) in found:
            raise DataError(f"two names stand for layer {match[1]}: {_told(named)}")
        found[int(match[1])] = array
    return found


def _unboxed(content: object, layers: Layers | None) -> object:
    """Return the one array of a file that holds all layers, as `numpy.savez(file, array)` writes it."""
    if isinstance(content, Mapping) and len(content) == 1 and not isinstance(layers, Mapping):
        ((name, array),) = cast(Mapping[str, Array], content).items()
        # A number in the name may be meant for a layer's, and then the axes mean something else.
        if len(array.shape) in (3, 4) and (name == "arr_0" or not any(letter.isdigit() for letter in name)):
            return array
    return content


def _unwrap(cache: HookCache) -> Mapping[str, object]:
    """Return the tensors of a TransformerLens cache, with an axis of rows where it was taken away."""
    tensors = cast(Mapping[str, Tensor], cache.cache_dict)
    if cache.has_batch_dim:
        return tensors
    return {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}


def open_file(path: Path) -> object:
    """Return the arrays of a file, or of a folder of .npy files named by layer, without reading them."""
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        if not files:
            raise DataError(f"{path} is a folder without .npy files, one a layer (layer_07.npy)")
        return {name: _numpy(file) for name, file in files.items()}
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.suffix == ".npy":
        return _numpy(path)
    if path.suffix == ".npz":
        return _zipped(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in _PICKLES:
        raise DataError(
            f"{path} is a pickle, which can run code when it is read; load it where you trust it and save it with "
            "safetensors.torch.save_file"
        )
    raise DataError(f"{path} is none of .safetensors, .npy, .npz; convert it, or give the arrays themselves")


def _numpy(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a .npy file: {error}") from error


def _zipped(path: Path) -> dict[str, Array]:
    """Map the arrays of an .npz file; those that are compressed are read whole."""
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                mapped = _mapped(path, entry) if entry.compress_type == zipfile.ZIP_STORED else None
                arrays[name] = cast(Array, loaded[name] if mapped is None else mapped)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error
    return arrays


def _mapped(path: Path, entry: zipfile.ZipInfo) -> NDArray[Any] | None:
    """Map an array that lies uncompressed in a zip file; None where that cannot be, and numpy has to read it."""
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        # The local header repeats the name and has extra fields of its own length.
        skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        file.seek(skip, 1)
        start = file.tell()
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if dtype.hasobject or not size or file.tell() - start + size != entry.file_size:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _safetensors(path: Path) -> dict[str, Array]:
    try:
        # The slices keep the file open as long as they live.
        file = cast(Any, safe_open(path, framework="pt"))
        return {name: cast(Array, _Slice(file.get_slice(name))) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a safetensors file: {error}") from error


class _Slice:
    """A tensor of a safetensors file, read where it is sliced."""

    def __init__(self, lazy: Any) -> None:
        self._lazy = lazy
        self.shape = tuple(cast(list[int], lazy.get_shape()))
        # An empty slice has the type that torch gives the tensor.
        self.dtype = cast(torch.dtype, lazy[:0].dtype) if self.shape else torch.float64

    def __getitem__(self, key: slice) -> Tensor:
        return cast(Tensor, self._lazy[key])


def _type_name(array: Array) -> str:
    dtype = array.dtype
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else np.dtype(dtype).name


def _told(named: Mapping[object, object]) -> str:
    names = [str(name) for name in named]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
