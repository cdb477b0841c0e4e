"""What the footer of a parquet file claims of its columns, read here because pyarrow cannot be asked.

`RowGroupMetaData.column` of pyarrow 26 ends the process where a footer contradicts itself (statistics of sizes that do
not fit the schema, columns said to be encrypted); reading the table says so in an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

# Types of Thrift's compact protocol (apache/thrift, doc/specs/thrift-compact-protocol.md).
_TRUE, _FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13
_SIZES = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
_DEEPEST = 32
# By number and type: readers pass over fields of another type than the one they know.
_Struct = dict[tuple[int, int], object]
# Of the structures in parquet.thrift (apache/parquet-format), by number and type.
_ROW_GROUPS, _COLUMNS, _META_DATA, _VALUES, _UNCOMPRESSED = (4, _LIST), (1, _LIST), (3, _STRUCT), (5, _I64), (6, _I64)


def claimed_sizes(content: bytes) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each row group, how many values each column says it has, and bytes once unpacked.

    Raises:
        ValueError: the footer is none, or says nothing of it.
    """
    length = int.from_bytes(content[-8:-4], "little")
    if len(content) < 12 or length > len(content) - 12:
        raise ValueError("no footer")
    footer = _Reader(content[-8 - length : -8]).struct()
    for group in _structs(footer, _ROW_GROUPS):
        columns = [column.get(_META_DATA) for column in _structs(group, _COLUMNS)]
        sizes = [(_number(column, _VALUES), _number(column, _UNCOMPRESSED)) for column in columns]
        yield sizes


def _structs(of: _Struct, field: tuple[int, int]) -> list[_Struct]:
    found = of.get(field, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in cast(list[object], found)):
        raise ValueError("its footer has numbers where structures should be")
    return cast(list[_Struct], found)


def _number(of: object, field: tuple[int, int]) -> int:
    found = cast(_Struct, of).get(field) if isinstance(of, dict) else None
    if not isinstance(found, int) or found < 0:
        raise ValueError("its footer does not say how large a column is")
    return found


class _Reader:
    """Reads Thrift's compact protocol: whole numbers, lists and structures; of all else only where it ends."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._depth = 0

    def struct(self) -> _Struct:
        """Read a structure."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("its footer is nested too deeply")
        found: _Struct = {}
        number = 0
        while head := self._byte():
            # Of 16 bits, as readers in C++ have it: what is a known field to them must be that one here.
            number = (number + (head >> 4) if head >> 4 else self._signed()) & 0xFFFF
            kind = head & 15
            # As a field, a truth value is in its type alone.
            found[number, kind] = None if kind in (_TRUE, _FALSE) else self._value(kind)
        self._depth -= 1
        return found

    def _value(self, kind: int) -> object:
        if kind == _STRUCT:
            return self.struct()
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            return [self._item(head & 15) for _ in range(self._fitting(count))]
        if kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            for _ in range(self._fitting(count)):
                self._item(kinds >> 4)
                self._item(kinds & 15)
            return None
        if _BYTE < kind <= _I64:
            return self._signed()
        return self._skip(self._unsigned() if kind == _BINARY else _SIZES.get(kind, len(self._data) + 1))

    def _item(self, kind: int) -> object:
        return self._skip(1) if kind in (_TRUE, _FALSE) else self._value(kind)

    def _fitting(self, count: int) -> int:
        if count > len(self._data) - self._at:
            raise ValueError("its footer has a list that is longer than the footer")
        return count

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise ValueError("its footer ends too early")

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise ValueError("its footer ends too early")
        self._at += 1
        return self._data[self._at - 1]

    def _unsigned(self) -> int:
        result = self._byte()
        if result < 128:
            return result
        result, shift = result & 127, 7
        while True:
            byte = self._byte()
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result & (1 << 64) - 1
            if shift > 63:
                raise ValueError("its footer has a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
