"""Checking every byte of a store: checksums, headers, offsets, finite values, ids, and files that no line speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gapprobe.errors import StoreError
from gapprobe.store.format import MANIFEST_FILE, ShardRecord, StoreHeader, rows_name, shard_name
from gapprobe.store.manifest import listed_numbers, read_header, read_manifest
from gapprobe.store.shard import file_sha256, layer_names, open_shard
from gapprobe.store.table import ID, read_table


@dataclass(frozen=True)
class Problem:
    """Something wrong with a store: in which file, what, and the ids of the rows it touches, where they are known."""

    file: str
    what: str
    rows: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line; the first rows stand for all."""
        if not self.rows:
            return f"{self.file}: {self.what}"
        more = f" and {len(self.rows) - 3} more" if len(self.rows) > 3 else ""
        return f"{self.file}: {self.what} (rows {', '.join(self.rows[:3])}{more})"


def verify_store(path: str | Path) -> list[Problem]:
    """Return what is wrong with the store at `path`, nothing when it is sound. Reads every byte, writes nothing.

    What a killed run leaves (temporaries, a torn last line of the manifest) is no problem: writing goes on over it.
    """
    path = Path(path)
    try:
        header, manifest = read_header(path), read_manifest(path)
    except StoreError as error:
        return [Problem(str(path), str(error))]
    published = listed_numbers(path)
    problems = [
        Problem(MANIFEST_FILE, f"line {number} is damaged; the rows it sealed are not seen until they are sealed again")
        for number in manifest.damaged
    ]
    seen: set[str] = set()
    for record in manifest.records:
        ids, found = _verify_rows(path, record)
        problems += found + _verify_shard(path, header, record, ids)
        again = tuple(id_ for id_ in ids if id_ in seen)
        if again:
            problems.append(Problem(rows_name(record.shard), "rows that an earlier shard holds already", again))
        seen.update(ids)
    # Read again: a live writer may have recorded in the meantime what it had published when we looked.
    recorded = {record.shard for record in read_manifest(path).records}
    problems += [
        Problem(shard_name(number), "published but not sealed; opening the store for writing seals it if it is whole")
        for number in sorted(published - recorded)
    ]
    return problems


def _verify_rows(path: Path, record: ShardRecord) -> tuple[list[str], list[Problem]]:
    """Return the ids of a shard's rows, as far as its table can be trusted."""
    try:
        return read_table(path, record, [ID]).column(ID).to_pylist(), []
    except StoreError as error:
        return [], [Problem(rows_name(record.shard), str(error))]


def _verify_shard(path: Path, header: StoreHeader, record: ShardRecord, ids: list[str]) -> list[Problem]:
    name = shard_name(record.shard)
    try:
        shard = open_shard(path / name, header, record)
        problems: list[Problem] = []
        if file_sha256(path / name) != record.shard_sha256:
            problems.append(Problem(name, "its checksum is not that of the manifest: bytes have changed", tuple(ids)))
        if record.tokens and int(shard.tensor("token_marks").max()) >> len(header.positions):
            problems.append(Problem(name, "a token is marked as a position that the header does not name", tuple(ids)))
        finite = torch.ones(record.tokens, dtype=torch.bool)
        for layer in layer_names(header):
            finite &= shard.tensor(layer).isfinite().all(1)
        bad = torch.searchsorted(shard.offsets, (~finite).nonzero().flatten(), right=True) - 1
        if len(bad):
            rows = tuple(ids[row] for row in dict.fromkeys(bad.tolist()) if row < len(ids))
            problems.append(Problem(name, "NaN or infinite residuals", rows))
    # A disk that cannot read is what this looks for.
    except (StoreError, OSError) as error:
        return [Problem(name, str(error), tuple(ids))]
    return problems
