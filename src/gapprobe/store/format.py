"""What stands in a store: header, rows, manifest lines, and their text form. `docs/store-format.md` outranks this file.

Nothing here touches the disk; `disk`, `shard` and `table` do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from types import MappingProxyType
from typing import TypeVar, cast

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from gapprobe.errors import StoreError

FORMAT = "gapprobe.store"
VERSION = 2
STORE_FILE = "store.json"
MANIFEST_FILE = "manifest.jsonl"
LOCK_FILE = "lock"
SHARDS = "shards"
ROWS = "rows"
DAMAGED = "damaged"
SHARD_SUFFIX = ".safetensors"
ROWS_SUFFIX = ".parquet"
ROWS_TENSOR = "rows_parquet"
CHECKSUMS_TENSOR = "block_checksums"

# No honest store comes near these; a damaged or hostile one may claim anything.
MAX_JSON_BYTES = 1 << 20
MAX_SHARD_NUMBER = 10**9
MAX_POSITIONS = 8
MAX_SIZE = 1 << 56

# Each checksum of a shard's `block_checksums` is that of so many bytes of its data.
BLOCK = 1 << 20

DTYPES: Mapping[str, tuple[str, torch.dtype]] = MappingProxyType(
    {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}
)
_ROLES = (
    *("other", "image", "system", "question", "entity", "reference", "answer_cue", "answer", "padding", "query"),
    *("audio", "start"),
)
ROLES: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(_ROLES)})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_RECORDED = ("model.source", "model.revision", "versions.")

T = TypeVar("T")
Value = str | int | float | bool | list[int] | list[float] | None


@dataclass(frozen=True)
class StoreHeader:
    """What all rows of a store have in common.

    Attributes:
        model: `architecture`, `family`, `weights` (a fingerprint), `source`, `revision`, and whatever else tells models
            apart. Source and revision are only recorded: the same weights may lie in another folder tomorrow.
        processor: fingerprint of the processor and its chat template.
        attention: the attention implementation, as transformers names it.
        padding_side: `left` or `right`.
        dtype: of the stored residuals: `float32`, `bfloat16` or `float16`.
        layers: numbers of the stored layers, rising; 0 is the embeddings, l the residual stream after block l.
        width: of the residual stream.
        positions: names of the token positions that `StoredRow.token_marks` marks, at most 8.
        generation: how answers were generated.
        versions: of torch, transformers and nnsight; recorded, never a reason to refuse.

    Raises:
        StoreError: a field holds what no store can hold.
    """

    model: Mapping[str, str]
    processor: str
    attention: str
    padding_side: str
    dtype: str
    layers: tuple[int, ...]
    width: int
    positions: tuple[str, ...]
    generation: Mapping[str, str | int | float]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        _require(self.dtype in DTYPES, f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        rising = all(a < b for a, b in zip((-1, *self.layers), self.layers, strict=False))
        _require(bool(self.layers) and rising, f"layers {self.layers} do not rise from 0 or more")
        _require(0 < self.width < 1 << 24, f"width {self.width} is not between 1 and 2^24")
        _require(len(set(self.positions)) == len(self.positions), f"positions {self.positions} repeat a name")
        _require(len(self.positions) <= MAX_POSITIONS, f"more than {MAX_POSITIONS} positions")
        for key, value in self.generation.items():
            _require(isfinite(value) if isinstance(value, float) else True, f"generation.{key} is {value}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of the stored residuals as torch knows it."""
        return DTYPES[self.dtype][1]

    @property
    def compared(self) -> dict[str, object]:
        """Return what must be equal for two runs to share a store, by dotted name, in the order of the fields."""
        flat: dict[str, object] = {}
        for name, value in _plain(self).items():
            if isinstance(value, dict):
                flat |= {f"{name}.{key}": value[key] for key in sorted(value)}
            else:
                flat[name] = value
        return {name: value for name, value in flat.items() if not name.startswith(_RECORDED)}

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of `compared` as canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.compared, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def layer_index(self, layer: int, where: object) -> int:
        """Return which of `layers` a layer is; raise StoreError, naming the store, if it is none of them."""
        if layer not in self._numbers:
            raise StoreError(f"{where} has no layer {layer}; it has {', '.join(map(str, self.layers))}")
        return self._numbers[layer]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        # Of each of very many layers, `index` would take for ever.
        return {layer: number for number, layer in enumerate(self.layers)}

    def position_index(self, position: str, where: object) -> int:
        """Return which of `positions` a position is; raise StoreError, naming the store, if it is none of them."""
        if position not in self.positions:
            raise StoreError(
                f"{where} has no position {position!r}; it has {shown(', '.join(self.positions)) or 'none'}"
            )
        return self.positions.index(position)

    def to_json(self) -> bytes:
        """Return the content of store.json."""
        fields = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint} | _plain(self)
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> StoreHeader:
        """Read store.json.

        Raises:
            StoreError: it is none, of a newer format version, damaged, or does not match its own fingerprint.
        """
        fields = parse_json(text, where)
        version = fields.get("version")
        if fields.get("format") != FORMAT or not _is_int(version):
            raise StoreError(f"{where} does not describe a gapprobe store (no format {FORMAT!r} with a version)")
        if version != VERSION:
            mend = "Update gapprobe." if cast(int, version) > VERSION else "No release wrote it: capture again."
            raise StoreError(f"{where} has store format version {version}; this gapprobe reads {VERSION}. {mend}")
        try:
            header = cls(
                model=_mapping(fields, "model", str),
                processor=_field(fields, "processor", str),
                attention=_field(fields, "attention", str),
                padding_side=_field(fields, "padding_side", str),
                dtype=_field(fields, "dtype", str),
                layers=_tuple(fields, "layers", int),
                width=_field(fields, "width", int),
                positions=_tuple(fields, "positions", str),
                generation=_mapping(fields, "generation", (str, int, float)),
                versions=_mapping(fields, "versions", str),
            )
        except StoreError as error:
            raise StoreError(f"{where} is damaged: {error}") from error
        if fields.get("fingerprint") != header.fingerprint:
            raise StoreError(f"{where} is damaged or was edited: its fingerprint does not fit its fields")
        return header

    def differences(self, other: StoreHeader, here: str, there: str) -> str:
        """Tell in which fields of `compared` two headers differ, and what this one has here and the other there."""
        mine, theirs = self.compared, other.compared
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        return "; ".join(f"{shown(n)} is {mine.get(n)!r:.400} {here} and {theirs.get(n)!r:.400} {there}" for n in names)

    def refuse_difference(self, other: StoreHeader, where: str) -> None:
        """Raise StoreError naming the fields in which `other`, a run about to append, is not this store's header."""
        told = self.differences(other, "in the store", "in this run")
        if told:
            raise StoreError(f"{where} belongs to another run: {told}. Choose another folder, or run with the same.")


@dataclass(frozen=True)
class StoredRow:
    """One call of the model: what was asked and answered (`columns`) and the residual stream of the kept tokens.

    Attributes:
        id: unique in the store; any text without control characters.
        columns: of the table of rows. A column that is absent reads back as None.
        residual: by layer (in the order of the header's `layers`), token and width; no token at all for a call that
            failed.
        token_ids: vocabulary numbers.
        token_positions: index of each token in the unpadded sequence.
        token_roles: values of `ROLES`.
        token_marks: bit i is set where the token is position i of the header's `positions`.
    """

    id: str
    columns: Mapping[str, Value]
    residual: Shaped[Tensor, "l t d"]
    token_ids: Int[Tensor, " t"]
    token_positions: Int[Tensor, " t"]
    token_roles: UInt8[Tensor, " t"]
    token_marks: UInt8[Tensor, " t"]


@dataclass(frozen=True)
class ShardRecord:
    """A line of the manifest: a sealed shard and its table of rows. Checksums are of whole files.

    `versions` are the packages that made the shard, where they are not those of the store's header; `later` are fields
    of other versions of the format, which are passed on.
    """

    shard: int
    rows: int
    tokens: int
    shard_bytes: int
    shard_xxh128: str
    rows_bytes: int
    rows_sha256: str
    versions: Mapping[str, str] | None = None
    later: Mapping[str, object] = field(default_factory=dict[str, object], compare=False)

    def made_with(self, header: StoreHeader) -> Mapping[str, str]:
        """Return the versions of the packages that made the shard."""
        return header.versions if self.versions is None else self.versions

    def to_line(self) -> bytes:
        """Return the manifest line, ending in a newline."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        versions, later = fields.pop("versions"), fields.pop("later")
        fields |= ({} if versions is None else {"versions": dict(versions)}) | dict(later)
        body = json.dumps(fields, separators=(",", ":")).encode()
        return b'{"line_sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:] + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> ShardRecord | None:
        """Return the record of a line without its newline; None when the line is torn or damaged."""
        head = len(b'{"line_sha256":"') + 64
        body = b"{" + line[head + 2 :]
        if line != b'{"line_sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:]:
            return None
        fields, known = parse_json(body, "manifest line"), cls.__dataclass_fields__
        record = cls(
            shard=_field(fields, "shard", int),
            rows=_field(fields, "rows", int),
            tokens=_field(fields, "tokens", int),
            shard_bytes=_field(fields, "shard_bytes", int),
            shard_xxh128=_field(fields, "shard_xxh128", str),
            rows_bytes=_field(fields, "rows_bytes", int),
            rows_sha256=_field(fields, "rows_sha256", str),
            versions=_mapping(fields, "versions", str) if "versions" in fields else None,
            later={name: value for name, value in fields.items() if name == "later" or name not in known},
        )
        sizes = (record.rows, record.tokens, record.shard_bytes, record.rows_bytes)
        sound = 0 <= record.shard <= MAX_SHARD_NUMBER and all(0 <= size < MAX_SIZE for size in sizes)
        _require(sound, "manifest line with a number out of range")
        return record


def shown(text: str) -> str:
    """Return text out of a file with its control characters escaped: a terminal would obey them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def check_id(id_: str) -> None:
    """Raise StoreError unless this can be the id of a row."""
    _require(bool(id_) and not _CONTROL.search(id_), f"row {id_!r:.80}: an id is text without control characters")
    try:
        id_.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"row {id_!r:.80}: an id is text that UTF-8 can hold") from error


def shard_name(number: int) -> str:
    """Return the path of a shard inside its store."""
    return f"{SHARDS}/{number:06d}{SHARD_SUFFIX}"


def rows_name(number: int) -> str:
    """Return the path of a shard's table of rows inside its store."""
    return f"{ROWS}/{number:06d}{ROWS_SUFFIX}"


@dataclass(frozen=True)
class ShardSize:
    """What a shard's tensors are as long as."""

    rows: int
    tokens: int
    table: int
    """Bytes of the table of rows."""


Layout = dict[str, tuple[str, tuple[int, ...]]]


def layout(header: StoreHeader, size: ShardSize) -> tuple[Layout, Layout]:
    """Return the tensors that a shard must have and those that it may have: safetensors dtype and shape by name."""
    code, tokens = DTYPES[header.dtype][0], size.tokens
    positions, layers = len(header.positions), len(header.layers)
    must: Layout = {
        "offsets": ("I64", (size.rows + 1,)),
        "token_ids": ("I64", (tokens,)),
        "token_positions": ("I64", (tokens,)),
        **{layer_name(layer): (code, (tokens, header.width)) for layer in header.layers},
        "token_roles": ("U8", (tokens,)),
        "token_marks": ("U8", (tokens,)),
        ROWS_TENSOR: ("U8", (size.table,)),
    }
    may: Layout = {
        "moments.count": ("I64", (positions,)),
        "moments.mean": ("F32", (positions, layers, header.width)),
        "moments.std": ("F32", (positions, layers, header.width)),
        **{position_name(i): (code, (layers, size.rows, header.width)) for i in range(positions)},
    }
    return must, may


def layer_name(layer: int) -> str:
    """Return the name of a layer's tensor in a shard."""
    return f"residual.{layer:02d}"


def position_name(index: int) -> str:
    """Return the name of the tensor of the header's position `index` in a shard."""
    return f"position.{index:02d}"


def parse_json(text: bytes, where: str) -> dict[str, object]:
    """Read a JSON object strictly: UTF-8, no NaN, no name twice.

    Raises:
        StoreError: it is anything else.
    """
    if len(text) > MAX_JSON_BYTES:
        raise StoreError(f"{where} is damaged: more than {MAX_JSON_BYTES} bytes of JSON")
    try:
        parsed: object = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    # json answers deep nesting with RecursionError.
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is damaged: {error}") from error
    if not isinstance(parsed, dict):
        raise StoreError(f"{where} is damaged: not a JSON object")
    return cast(dict[str, object], parsed)


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _plain(header: StoreHeader) -> dict[str, object]:
    """Return the fields as JSON types."""
    fields = {name: getattr(header, name) for name in header.__dataclass_fields__}
    return {
        name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
    }


def _require(sound: bool, message: str) -> None:
    if not sound:
        raise StoreError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _field(fields: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = fields.get(name)
    _require(_is(value, kind), f"field {name!r} is {value!r:.80}, not of type {kind.__name__}")
    return cast(T, value)


def _tuple(fields: Mapping[str, object], name: str, kind: type[T]) -> tuple[T, ...]:
    values = cast(list[object], _field(fields, name, list))
    _require(all(_is(value, kind) for value in values), f"field {name!r} holds another type than {kind.__name__}")
    return cast(tuple[T, ...], tuple(values))


def _mapping(fields: Mapping[str, object], name: str, kind: type[T] | tuple[type[T], ...]) -> dict[str, T]:
    values = cast(dict[str, object], _field(fields, name, dict))
    _require(all(_is(value, kind) for value in values.values()), f"field {name!r} holds a value of another type")
    return cast(dict[str, T], values)
