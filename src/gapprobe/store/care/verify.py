"""Checking every byte of a store: checksums, headers, offsets, finite values, ids, and files that no line speaks of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gapprobe.errors import StoreError
from gapprobe.store.care.examining import Examined, examine_all
from gapprobe.store.format import MANIFEST_FILE, StoreHeader, rows_name, shard_name
from gapprobe.store.homes import published_ids
from gapprobe.store.manifest import Manifest, listed_numbers, read_header, read_manifest


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


def verify_store(path: str | Path, progress: bool = True) -> list[Problem]:
    """Return what is wrong with the store at `path`, nothing when it is sound. Reads every byte once, writes nothing.

    Any change of any byte of shards, tables of rows and manifest is found, and the rows it touches are named: as few as
    the checksums of each 2^20 bytes allow, none where only header, statistics or copies are touched. What a killed run
    leaves (temporaries, a torn last line of the manifest, shards whose rows are all sealed elsewhere) is no problem.

    Args:
        path: the folder.
        progress: show a bar when it takes longer than a moment.
    """
    path = Path(path)
    while True:
        try:
            header, manifest = read_header(path), read_manifest(path)
        except StoreError as error:
            return [Problem(str(path), str(error))]
        problems = _verify(path, header, manifest, progress)
        # What a compaction or repair replaced meanwhile may be gone by now, and what it made was not looked at.
        after = {record.shard: record for record in read_manifest(path).records}
        if not problems or all(after.get(record.shard) == record for record in manifest.records):
            return problems


def _verify(path: Path, header: StoreHeader, manifest: Manifest, progress: bool) -> list[Problem]:
    published = listed_numbers(path)
    problems = damaged_lines(manifest.damaged)
    seen: set[str] = set()
    for found in examine_all(path, header, manifest.records, f"verify {path.name}", progress):
        problems += problems_of(found)
        again = tuple(id_ for id_ in found.ids if id_ in seen)
        if again:
            problems.append(repeated(found.number, again))
        seen.update(found.ids)
    # Read again: a live writer may have recorded in the meantime what it had published when we looked.
    recorded = {record.shard for record in read_manifest(path).records}
    return problems + [
        Problem(shard_name(number), "published but not sealed; opening the store for writing seals it if it is whole")
        for number in sorted(published - recorded)
        if not _superseded(path, header, number, seen)
    ]


def damaged_lines(numbers: Iterable[int]) -> list[Problem]:
    """Return the problems that damaged lines of the manifest are."""
    what = "is damaged; the rows it sealed are not seen until they are sealed again"
    return [Problem(MANIFEST_FILE, f"line {number} {what}") for number in numbers]


def repeated(number: int, ids: tuple[str, ...]) -> Problem:
    """Return the problem that rows of a shard are when an earlier one holds them already."""
    return Problem(rows_name(number), "rows that an earlier shard holds already", ids)


def problems_of(found: Examined) -> list[Problem]:
    """Return what is wrong with a shard and its table of rows."""
    problems: list[Problem] = []
    if found.table_fault:
        problems.append(Problem(rows_name(found.number), found.table_fault))
    if found.fault:
        touched = found.ids_of(found.damaged)
        lost = int(found.damaged.sum())
        told = "" if touched else f"; {lost} rows whose ids are lost" if lost else "; no row is touched"
        problems.append(Problem(shard_name(found.number), found.fault + told, touched))
    if found.nonfinite.any():
        what = "NaN or infinite residuals"
        problems.append(Problem(shard_name(found.number), what, found.ids_of(found.nonfinite)))
    return problems


def _superseded(path: Path, header: StoreHeader, number: int, sealed: set[str]) -> bool:
    """Return whether all rows of a shard that no line names are sealed elsewhere, as those of a compacted one are."""
    try:
        return sealed.issuperset(published_ids(path, header, number))
    except StoreError:
        return False
