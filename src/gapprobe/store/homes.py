"""Which shard holds which row, and whether one that no line of the manifest names is needed for any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from gapprobe.errors import StoreError
from gapprobe.store.format import ROWS_TENSOR, ShardRecord, StoreHeader, rows_name, shard_name
from gapprobe.store.shard import open_shard
from gapprobe.store.table import ID, decode_table, read_table


class Homes:
    """The sealed shards of a store, and the rows that they hold."""

    def __init__(self, path: Path, header: StoreHeader, records: Iterable[ShardRecord]) -> None:
        self._path = path
        self._header = header
        self._records = list(records)
        self._home = {
            id_: i
            for i, record in enumerate(self._records)
            for id_ in cast(list[str], read_table(path, header, record, [ID]).column(ID).to_pylist())
        }

    def why_needed(self, number: int) -> str:
        """Return why a shard that no line names must stay; empty if all that it holds is held elsewhere."""
        file = self._path / shard_name(number)
        if not file.exists() or not file.stat().st_size:
            # A writer publishes the shard first; what has a table and no shard has lost it.
            return "its shard is missing" if (self._path / rows_name(number)).exists() else ""
        try:
            ids = published_ids(self._path, self._header, number)
        except StoreError as error:
            return str(error).removeprefix(f"{file} ")
        if not self._home.keys() >= ids:
            return "some of its rows are sealed nowhere else; `gapprobe store repair` seals them"
        for home in sorted({self._home[id_] for id_ in ids}):
            record = self._records[home]
            try:
                open_shard(self._path / shard_name(record.shard), self._header, record)
            except StoreError as error:
                return f"shard {record.shard}, which holds its rows now, is damaged: {error}"
        return ""


def published_ids(store: Path, header: StoreHeader, number: int) -> set[str]:
    """Return the ids of the rows of a shard that no line of the manifest names. Reads little more than its table.

    Raises:
        StoreError: it is damaged there, or no shard of this store.
    """
    path = store / shard_name(number)
    shard = open_shard(path, header)
    _, shape, begin = shard.tensors[ROWS_TENSOR]
    if shard.damaged_blocks(begin, begin + shape[0]):
        raise StoreError(f"{path} is damaged: bytes of its table of rows have changed")
    table = decode_table(shard.table(), path, shard.rows, [ID])
    return set(cast(list[str], table.column(ID).to_pylist()))
